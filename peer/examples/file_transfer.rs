//! Files and folders from one machine to another with the library alone.
//!
//!     cargo run --example file_transfer -- rv://… incoming/               # prints its id, takes what comes
//!     cargo run --example file_transfer -- rv://… PEER photos report.pdf  # sends it there
//!
//! The same again goes on where it was interrupted.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use peer::transfer::{Consent, Manifest, Progress, Source, receive, send};
use peer::{Endpoint, PeerId};

type Error = Box<dyn std::error::Error>;

/// Takes what the owner of this program would: here, up to a gigabyte, and never in place of something else.
struct UpToAGigabyte;

impl Consent for UpToAGigabyte {
    async fn accept(&mut self, offer: &Manifest) -> bool {
        println!(
            "{} files, {} bytes: {}",
            offer.files(),
            offer.bytes(),
            offer.top().collect::<Vec<_>>().join(", ")
        );
        offer.bytes() <= 1 << 30
    }

    async fn replace(&mut self, _paths: &[String]) -> bool {
        false
    }
}

async fn take(endpoint: &Endpoint, folder: &Path) -> Result<(), Error> {
    std::fs::create_dir_all(folder)?;
    println!("{}", endpoint.id());
    let session = endpoint.accept().await.ok_or("the endpoint is closed")?;
    let (writing, reading) = session.accept_bi().await?;
    let received = receive(writing, reading, folder, &mut UpToAGigabyte, &Arc::default()).await?;
    println!("{} received, {} were here", received.received, received.same);
    for path in received.kept {
        println!("another {path} is here, and was kept");
    }
    session.closed().await;
    Ok(())
}

async fn give(endpoint: &Endpoint, peer: PeerId, paths: &[PathBuf]) -> Result<(), Error> {
    let source = Source::collect(paths)?;
    let session = endpoint.connect(peer).await?;
    let (writing, reading) = session.open_bi().await?;
    let progress = Arc::new(Progress::default());
    send(writing, reading, &source, &progress).await?;
    println!("{} of {} bytes were carried", progress.now().carried, source.manifest().bytes());
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [server, target, paths @ ..] = arguments.as_slice() else {
        return Err("usage: file_transfer SERVER FOLDER, or file_transfer SERVER PEER FILE...".into());
    };
    // With a key of its own for each run; a real program keeps one, see `peer::identity`.
    let endpoint = Endpoint::builder().server(server.parse()?).bind().await?;
    endpoint.online().await?;
    let outcome = if paths.is_empty() {
        take(&endpoint, Path::new(target)).await
    } else {
        let paths: Vec<PathBuf> = paths.iter().map(PathBuf::from).collect();
        give(&endpoint, target.parse()?, &paths).await
    };
    endpoint.close().await;
    outcome
}
