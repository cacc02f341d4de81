//! A message every so often to a `peer listen --echo`, and on standard output what came back when and over which path, one JSON object
//! a line. Ends when its standard input does, once everything has come back. Times are microseconds of the system's clock since 1970, which is the
//! same for whoever started it.

#![forbid(unsafe_code)]

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use clap::Parser;
use end_to_end::echo::{MESSAGE, PATIENCE};
use futures_util::StreamExt as _;
use peer::quinn::{RecvStream, SendStream, Side};
use peer::{Endpoint, PeerId, RendezvousAddress, Session};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt as _;
use tokio::time::{MissedTickBehavior, interval, timeout};

#[derive(Debug, Parser)]
struct Arguments {
    /// The `rv://` address of a server, or of several.
    #[arg(long, required = true)]
    server: Vec<RendezvousAddress>,
    /// Milliseconds from message to message.
    #[arg(long, default_value_t = 20)]
    every: u64,
    /// Whom to send to.
    peer: PeerId,
}

/// What opens a stream of `peer`'s, see its `pipe` module.
const PIPE: u8 = 1;

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as u64
}

fn say(event: &Value) {
    println!("{event}");
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    if std::env::var_os("RUST_LOG").is_some() {
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    }
    let arguments = Arguments::parse();
    let builder = arguments.server.into_iter().fold(Endpoint::builder(), peer::Builder::server);
    let endpoint = builder.bind().await?;
    endpoint.online().await?;
    let session = endpoint.connect(arguments.peer).await?;
    let mut paths = session.path_changes();
    tokio::spawn(async move {
        while let Some(path) = paths.next().await {
            say(
                &json!({ "event": "path", "direct": path.is_direct(), "at": now(), "path": path.to_string() }),
            );
        }
    });
    let (send, receive) = streams(&session).await?;
    let reader = tokio::spawn(read(receive));
    let sent = write(send, Duration::from_millis(arguments.every)).await?;
    let (received, in_order) = timeout(PATIENCE, reader).await.context("not everything came back")???;
    say(&json!({ "event": "done", "sent": sent, "received": received, "in_order": in_order }));
    endpoint.close().await;
    Ok(())
}

async fn streams(session: &Session) -> anyhow::Result<(SendStream, RecvStream)> {
    if session.side() == Side::Client {
        let (mut send, receive) = session.open_bi().await?;
        send.write_all(&[PIPE]).await?;
        return Ok((send, receive));
    }
    let (send, mut receive) = session.accept_bi().await?;
    receive.read_exact(&mut [0]).await?;
    Ok((send, receive))
}

/// Sends until the input ends; how many.
async fn write(mut send: SendStream, every: Duration) -> anyhow::Result<u64> {
    let input = tokio::spawn(async { tokio::io::stdin().read_to_end(&mut Vec::new()).await });
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut number = 0_u64;
    while !input.is_finished() {
        ticks.tick().await;
        let mut message = [0; MESSAGE];
        message[..8].copy_from_slice(&number.to_be_bytes());
        message[8..].copy_from_slice(&now().to_be_bytes());
        send.write_all(&message).await?;
        number += 1;
    }
    send.finish()?;
    Ok(number)
}

/// Tells of everything that comes back; how much, and whether in order.
async fn read(mut receive: RecvStream) -> anyhow::Result<(u64, bool)> {
    let (mut count, mut in_order) = (0, true);
    let mut message = [0; MESSAGE];
    loop {
        if let Err(error) = receive.read_exact(&mut message).await {
            return match error {
                peer::quinn::ReadExactError::FinishedEarly(0) => Ok((count, in_order)),
                error => Err(error.into()),
            };
        }
        let [number, sent] =
            [0, 8].map(|at| message[at..at + 8].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)));
        in_order &= number == count;
        count += 1;
        let at = now();
        say(&json!({ "event": "echo", "at": at, "took": at.saturating_sub(sent) }));
    }
}
