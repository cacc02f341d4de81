//! Sends back what arrives, on every stream of every session.
//!
//!     cargo run --example echo -- rv://…              # prints its id, and echoes until stopped
//!     cargo run --example echo -- rv://… PEER hello   # sends it there, prints what comes back

use peer::{Endpoint, PeerId, Session};

type Error = Box<dyn std::error::Error>;

/// Most bytes that are taken back.
const MOST: usize = 1 << 20;

async fn serve(endpoint: &Endpoint) -> Result<(), Error> {
    println!("{}", endpoint.id());
    while let Some(session) = endpoint.accept().await {
        tokio::spawn(echo(session));
    }
    Ok(())
}

async fn echo(session: Session) {
    while let Ok((mut send, mut receive)) = session.accept_bi().await {
        tokio::spawn(async move {
            // It ends as the stream does, or the session.
            let _ = tokio::io::copy(&mut receive, &mut send).await;
            let _ = send.finish();
        });
    }
}

async fn ask(endpoint: &Endpoint, peer: PeerId, words: &str) -> Result<(), Error> {
    let session = endpoint.connect(peer).await?;
    let (mut send, mut receive) = session.open_bi().await?;
    send.write_all(words.as_bytes()).await?;
    send.finish()?;
    println!("{}", String::from_utf8_lossy(&receive.read_to_end(MOST).await?));
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (server, target) = match arguments.as_slice() {
        [server] => (server, None),
        [server, peer, words @ ..] => (server, Some((peer.parse()?, words.join(" ")))),
        [] => return Err("usage: echo SERVER, or echo SERVER PEER WORDS".into()),
    };
    // With a key of its own for each run; a real program keeps one, see `peer::identity`.
    let endpoint = Endpoint::builder().server(server.parse()?).bind().await?;
    endpoint.online().await?;
    let outcome = match &target {
        Some((peer, words)) => ask(&endpoint, *peer, words).await,
        None => serve(&endpoint).await,
    };
    endpoint.close().await;
    outcome
}
