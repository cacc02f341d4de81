//! A protocol of one's own, which no other program is mistaken for: whoever speaks another fails in the handshake.
//!
//!     cargo run --example custom_alpn -- rv://…        # prints its id, and tells everyone the time until stopped
//!     cargo run --example custom_alpn -- rv://… PEER   # asks it, prints the seconds since 1970 there

use std::time::{SystemTime, UNIX_EPOCH};

use peer::{Endpoint, PeerId, Session};

type Error = Box<dyn std::error::Error + Send + Sync>;

/// With the version: the next one may be another protocol.
const ALPN: &[u8] = b"example-clock/1";

async fn serve(endpoint: &Endpoint) -> Result<(), Error> {
    println!("{}", endpoint.id());
    while let Some(session) = endpoint.accept().await {
        tokio::spawn(async move {
            if let Err(error) = tell(&session).await {
                eprintln!("{}: {error}", session.peer());
            }
        });
    }
    Ok(())
}

/// The protocol: whoever is called opens a stream, and says eight bytes on it.
async fn tell(session: &Session) -> Result<(), Error> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let mut stream = session.open_uni().await?;
    stream.write_all(&seconds.to_be_bytes()).await?;
    stream.finish()?;
    // It is the caller who hangs up.
    session.closed().await;
    Ok(())
}

async fn ask(endpoint: &Endpoint, peer: PeerId) -> Result<(), Error> {
    let session = endpoint.connect(peer).await?;
    let mut seconds = [0; 8];
    session.accept_uni().await?.read_exact(&mut seconds).await?;
    println!("{}", u64::from_be_bytes(seconds));
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (server, target) = match arguments.as_slice() {
        [server] => (server, None),
        [server, peer] => (server, Some(peer.parse()?)),
        _ => return Err("usage: custom_alpn SERVER, or custom_alpn SERVER PEER".into()),
    };
    // With a key of its own for each run; a real program keeps one, see `peer::identity`.
    let endpoint = Endpoint::builder().alpn(ALPN).server(server.parse()?).bind().await?;
    endpoint.online().await?;
    let outcome = match target {
        Some(peer) => ask(&endpoint, peer).await,
        None => serve(&endpoint).await,
    };
    endpoint.close().await;
    outcome
}
