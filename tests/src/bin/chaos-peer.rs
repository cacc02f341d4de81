//! One of the peers of `chaos`: a stream with each of the others, blocks both ways at a steady rate, and on standard output what happens, one
//! JSON object a line. Times are microseconds of the system's clock since 1970, which is the same for whoever started it.
//!
//! Standard input is told the others, then `finish`, then `close`, a line each.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use clap::Parser;
use end_to_end::chaos::blocks::{Blocks, LEAST};
use futures_util::StreamExt as _;
use peer::quinn::{ReadExactError, RecvStream, SendStream};
use peer::{Endpoint, PeerId, RendezvousAddress, Session};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};

#[derive(Debug, Parser)]
struct Arguments {
    /// The `rv://` address of a server; once for each.
    #[arg(long, required = true)]
    server: Vec<RendezvousAddress>,
    /// Its own number.
    #[arg(long)]
    index: usize,
    /// Blocks a second, to each of the others.
    #[arg(long, default_value_t = 50.0)]
    rate: f64,
    /// Bytes of a block.
    #[arg(long, default_value_t = 1000)]
    block: usize,
    /// Milliseconds without a block from which on it is told.
    #[arg(long, default_value_t = 300)]
    threshold: u64,
    /// A file for what the library logs, as `RUST_LOG` asks.
    #[arg(long)]
    log: Option<PathBuf>,
}

/// Progress is told this often.
const PROGRESS: Duration = Duration::from_secs(1);

/// The machine is looked at this often, and told to be busy when that comes late by so much.
const LOOK: Duration = Duration::from_millis(50);
const LATE: Duration = Duration::from_millis(150);

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as u64
}

fn say(event: &Value) {
    println!("{event}");
}

/// What is known of the stream with one of the others.
#[derive(Default)]
struct Flow {
    sent: AtomicU64,
    received: AtomicU64,
    /// When the latest block came, and when that was sent.
    heard: AtomicU64,
    dated: AtomicU64,
    direct: AtomicBool,
}

struct Other {
    index: usize,
    id: PeerId,
    dials: bool,
    flow: Flow,
    /// There has been a session.
    met: AtomicBool,
}

struct Me {
    arguments: Arguments,
    others: Vec<Other>,
    finish: watch::Receiver<bool>,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    anyhow::ensure!(arguments.block >= LEAST, "blocks have {LEAST} bytes at least");
    log(&arguments)?;
    let mut builder = Endpoint::builder();
    for server in &arguments.server {
        builder = builder.server(server.clone());
    }
    let endpoint = builder.bind().await?;
    endpoint.online().await?;
    say(&json!({ "event": "online", "id": endpoint.id().to_string() }));
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    let first = lines.next_line().await?.context("the others")?;
    let others = others(&serde_json::from_str(&first)?)?;
    let (finish, finishing) = watch::channel(false);
    let me = Arc::new(Me { arguments, others, finish: finishing });
    for place in 0..me.others.len() {
        if me.others[place].dials {
            tokio::spawn(dial(me.clone(), endpoint.clone(), place));
        }
    }
    tokio::spawn(accept(me.clone(), endpoint.clone()));
    tokio::spawn(progress(me.clone()));
    tokio::spawn(watch_the_machine());
    while let Some(line) = lines.next_line().await? {
        match line.trim() {
            "finish" => drop(finish.send_replace(true)),
            "close" => break,
            other => bail!("`{other}` is neither finish nor close"),
        }
    }
    endpoint.close().await;
    Ok(())
}

fn log(arguments: &Arguments) -> anyhow::Result<()> {
    let Some(path) = &arguments.log else { return Ok(()) };
    let file = std::fs::File::create(path).with_context(|| format!("{} cannot be made", path.display()))?;
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(Mutex::new(file)).init();
    Ok(())
}

fn others(told: &Value) -> anyhow::Result<Vec<Other>> {
    let told = told.as_array().context("a list")?;
    let other = |told: &Value| {
        Ok(Other {
            index: told["index"].as_u64().context("an index")? as usize,
            id: told["id"].as_str().context("an id")?.parse()?,
            dials: told["dial"] == true,
            flow: Flow::default(),
            met: AtomicBool::new(false),
        })
    };
    told.iter().map(other).collect()
}

async fn dial(me: Arc<Me>, endpoint: Endpoint, place: usize) {
    let other = &me.others[place];
    loop {
        match endpoint.connect(other.id).await {
            Ok(session) => return meet(me.clone(), session, true).await,
            Err(error) => say(&json!({ "event": "dial", "peer": other.index, "error": error.to_string() })),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn accept(me: Arc<Me>, endpoint: Endpoint) {
    while let Some(session) = endpoint.accept().await {
        tokio::spawn(meet(me.clone(), session, false));
    }
}

/// A session with one of the others, from its beginning to its end. There is to be one and no more.
async fn meet(me: Arc<Me>, session: Session, dialled: bool) {
    let Some(place) = me.others.iter().position(|other| other.id == session.peer()) else { return };
    let other = &me.others[place];
    let again = other.met.swap(true, Ordering::Relaxed);
    say(&json!({ "event": "session", "peer": other.index, "at": now(), "dialled": dialled, "again": again }));
    if again || dialled != other.dials {
        return fault(other, "another session than the one that was dialled");
    }
    tokio::spawn(tell_paths(me.clone(), place, session.clone()));
    match exchange(&me, place, &session, dialled).await {
        // Held until all is over: whoever drops it first closes it under the other.
        Ok(()) => drop(session.closed().await),
        Err(error) => fault(other, &format!("{error:#}")),
    }
}

fn fault(other: &Other, what: &str) {
    say(&json!({ "event": "fault", "peer": other.index, "at": now(), "what": what }));
}

async fn tell_paths(me: Arc<Me>, place: usize, session: Session) {
    let other = &me.others[place];
    let mut paths = session.path_changes();
    while let Some(path) = paths.next().await {
        other.flow.direct.store(path.is_direct(), Ordering::Relaxed);
        let (direct, text) = (path.is_direct(), path.to_string());
        say(&json!({ "event": "path", "peer": other.index, "at": now(), "direct": direct, "path": text }));
    }
}

async fn exchange(me: &Arc<Me>, place: usize, session: &Session, dialled: bool) -> anyhow::Result<()> {
    let (send, receive) = if dialled { session.open_bi().await? } else { session.accept_bi().await? };
    let writer = tokio::spawn(write(me.clone(), place, send));
    let reader = tokio::spawn(read(me.clone(), place, receive));
    let (sent, received) = tokio::try_join!(writer, reader)?;
    let (sent, received) = (sent.context("sending")?, received.context("receiving")?);
    say(&json!({
        "event": "done", "peer": me.others[place].index,
        "sent": sent.count(), "sent_hash": sent.hash(),
        "received": received.count(), "received_hash": received.hash(),
    }));
    Ok(())
}

/// Blocks at a steady rate until told to finish. Time in which none could be sent is not made up for.
async fn write(me: Arc<Me>, place: usize, mut send: SendStream) -> anyhow::Result<Blocks> {
    let other = &me.others[place];
    let stream = (me.arguments.index * 64 + other.index) as u64;
    let mut ticks = interval(Duration::from_secs_f64(1.0 / me.arguments.rate));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut blocks, mut block) = (Blocks::default(), vec![0; me.arguments.block]);
    let mut finish = me.finish.clone();
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            _ = finish.wait_for(|finish| *finish) => break,
        }
        blocks.fill(&mut block, stream, now());
        send.write_all(&block).await?;
        other.flow.sent.store(blocks.count(), Ordering::Relaxed);
    }
    send.finish()?;
    Ok(blocks)
}

/// Takes blocks to the end of the stream, and tells of every silence.
async fn read(me: Arc<Me>, place: usize, mut receive: RecvStream) -> anyhow::Result<Blocks> {
    let other = &me.others[place];
    let threshold = me.arguments.threshold * 1000;
    let (mut blocks, mut block) = (Blocks::default(), vec![0; me.arguments.block]);
    let mut last: Option<(u64, bool)> = None;
    loop {
        match receive.read_exact(&mut block).await {
            Ok(()) => {}
            Err(ReadExactError::FinishedEarly(0)) => return Ok(blocks),
            Err(error) => return Err(error.into()),
        }
        let dated = blocks.take(&block)?;
        let (at, direct) = (now(), other.flow.direct.load(Ordering::Relaxed));
        if let Some((since, was_direct)) = last
            && at.saturating_sub(since) >= threshold
        {
            say(&json!({
                "event": "stall", "peer": other.index, "since": since, "until": at,
                "direct": was_direct, "direct_after": direct, "block": blocks.count() - 1,
            }));
        }
        last = Some((at, direct));
        other.flow.heard.store(at, Ordering::Relaxed);
        other.flow.dated.store(dated, Ordering::Relaxed);
        other.flow.received.store(blocks.count(), Ordering::Relaxed);
    }
}

async fn progress(me: Arc<Me>) {
    let mut ticks = interval(PROGRESS);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let flow = |other: &Other| {
            let number = |value: &AtomicU64| value.load(Ordering::Relaxed);
            let flow = &other.flow;
            json!({
                "peer": other.index, "sent": number(&flow.sent), "received": number(&flow.received),
                "heard": number(&flow.heard), "dated": number(&flow.dated),
                "direct": flow.direct.load(Ordering::Relaxed),
            })
        };
        let flows: Vec<Value> = me.others.iter().map(flow).collect();
        say(&json!({ "event": "progress", "at": now(), "flows": flows }));
    }
}

/// Tells when this process has not run although it wanted to: a silence then is the machine's fault, or that of who has stopped it.
async fn watch_the_machine() {
    loop {
        let before = Instant::now();
        tokio::time::sleep(LOOK).await;
        let late = before.elapsed().saturating_sub(LOOK);
        if late >= LATE {
            say(&json!({ "event": "late", "until": now(), "by": late.as_micros() as u64 }));
        }
    }
}
