//! The relay at full load for a long time, while thousands of channels are open and come and go. Its memory must stay flat, nothing may
//! be forwarded from or to an address that has not bound, and every datagram must be accounted for.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::Parser;
use end_to_end::bench::contender::Server;
use end_to_end::bench::lanes::{Generator, Lane, Pattern, Socket};
use end_to_end::bench::registrar::Line;
use end_to_end::bench::subject::Place;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rendezvous_wire::PeerId;
use rendezvous_wire::message::{IntroductionId, Notice, Request};
use rendezvous_wire::relay::Channel;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// Full load, channels coming and going.
#[derive(Debug, Clone, Parser)]
struct Arguments {
    /// How long, once all channels are open.
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// Channels open all the time.
    #[arg(long, default_value_t = 5_000)]
    channels: usize,
    /// Channels opened, and as many closed, a second.
    #[arg(long, default_value_t = 1_000)]
    churn: usize,
    /// Registrations between which the channels are.
    #[arg(long, default_value_t = 640)]
    registrations: usize,
    /// Relay threads.
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

/// Lanes that carry the load.
const LANES: usize = 16;
/// Datagrams between two looks at the clock.
const DATAGRAMS: usize = 20_000;
/// How often bindings are renewed; a lease is 300 s.
const RENEWAL: Duration = Duration::from_secs(60);
/// Bytes that a stray datagram carries.
const STRAY: [u8; 64] = [0xbd; 64];
/// How far memory may stray from its mean once the load is steady.
const FLAT: f64 = 0.02;

/// What a peer's task is told.
enum Order {
    Ask(PeerId),
    Close(IntroductionId),
}

/// A channel that a peer has been introduced over.
struct Opened {
    asker: usize,
    introduction: IntroductionId,
    channel: Channel,
}

/// The channels that come and go.
struct Churn {
    orders: Vec<UnboundedSender<Order>>,
    ids: Vec<PeerId>,
    opened: UnboundedReceiver<Opened>,
    open: VecDeque<Opened>,
    asked: usize,
}

impl Churn {
    fn ask(&mut self) {
        let peers = self.ids.len();
        let asker = self.asked % peers;
        // Ever other pairs: a registration asks another for few at a time.
        let target = (asker + 1 + self.asked / peers % (peers - 1)) % peers;
        self.asked += 1;
        let _ = self.orders[asker].send(Order::Ask(self.ids[target]));
    }

    /// Opens and closes at the rate, and tells `counts` of it, until told to stop.
    async fn run(
        mut self,
        rate: usize,
        stop: Arc<AtomicBool>,
        counts: Arc<Counts>,
        newest: Arc<Mutex<Option<Channel>>>,
    ) {
        let (start, mut due) = (Instant::now(), 0);
        while !stop.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(5)).await;
            let by_now = (start.elapsed().as_secs_f64() * rate as f64) as usize;
            while due < by_now {
                due += 1;
                self.ask();
                if let Some(oldest) = self.open.pop_front() {
                    let _ = self.orders[oldest.asker].send(Order::Close(oldest.introduction));
                }
            }
            while let Ok(opened) = self.opened.try_recv() {
                counts.opened.fetch_add(1, Ordering::Relaxed);
                if let Ok(mut newest) = newest.lock() {
                    *newest = Some(opened.channel);
                }
                self.open.push_back(opened);
            }
        }
        counts.left.store(self.open.len() as u64, Ordering::Relaxed);
    }
}

#[derive(Default)]
struct Counts {
    opened: AtomicU64,
    left: AtomicU64,
    refused: AtomicU64,
}

/// Does what it is told, and tells of introductions that it has asked for.
async fn live(
    number: usize,
    mut line: Line,
    mut orders: UnboundedReceiver<Order>,
    opened: UnboundedSender<Opened>,
    counts: Arc<Counts>,
) -> anyhow::Result<()> {
    loop {
        tokio::select! {
            order = orders.recv() => match order {
                Some(Order::Ask(target)) => line.ask(target).await?,
                Some(Order::Close(introduction)) => line.tell(&Request::Close(introduction)).await?,
                None => return Ok(()),
            },
            notice = line.next() => match notice? {
                Notice::Introduction(introduction) if introduction.request.is_some() => {
                    let (id, channel) = (introduction.introduction, introduction.channel);
                    let _ = opened.send(Opened { asker: number, introduction: id, channel });
                }
                Notice::NotIntroduced(..) => {
                    counts.refused.fetch_add(1, Ordering::Relaxed);
                }
                _ => {}
            },
        }
    }
}

/// Somebody whose registration is real and whose socket has never bound, on a channel with a bound peer.
struct Silent {
    socket: Socket,
    other: Socket,
    channel: Channel,
    _lines: [Line; 2],
}

impl Silent {
    fn new(server: &mut Server) -> anyhow::Result<Self> {
        let here = [127, 0, 0, 1].into();
        let (socket, other) = (Socket::bind(here)?, Socket::bind(here)?);
        let registrar = &mut server.registrar;
        let (mut one, mut two) = (registrar.register()?, registrar.register()?);
        two.bind(&other, registrar.relay)?;
        let introduction = registrar.block_on(async {
            one.ask(two.id()).await?;
            one.introduction().await
        })?;
        Ok(Self { socket, other, channel: introduction.channel, _lines: [one, two] })
    }

    /// Both send, and others on channels that are not theirs; none of it may arrive. How many were sent.
    fn stray(&self, server: &Server, lanes: &[Lane], newest: Option<Channel>) -> anyhow::Result<u64> {
        let relay = server.registrar.relay;
        let mut frames = vec![(&self.socket, self.channel.header()), (&self.other, self.channel.header())];
        // Nobody's own: an address that has not bound, on a channel under full load; a bound one on a stranger's.
        frames.push((&self.socket, lanes[0].header));
        if let Some(newest) = newest {
            frames.push((&self.other, newest.header()));
        }
        for (socket, header) in &frames {
            socket.tell(relay, &[&header[..], &STRAY[..]].concat())?;
        }
        Ok(frames.len() as u64)
    }
}

fn soak(arguments: &Arguments) -> anyhow::Result<()> {
    let mut server = Server::start(Place::Anywhere, arguments.threads)?;
    let lanes = (0..LANES).map(|_| server.registrar.lane()).collect::<anyhow::Result<Vec<_>>>()?;
    let silent = Silent::new(&mut server)?;
    let counts = Arc::new(Counts::default());
    let (sender, opened) = unbounded_channel();
    let mut churn = Churn { orders: Vec::new(), ids: Vec::new(), opened, open: VecDeque::new(), asked: 0 };
    for number in 0..arguments.registrations {
        let line = server.registrar.register()?;
        let (orders, inbox) = unbounded_channel();
        churn.orders.push(orders);
        churn.ids.push(line.id());
        server.registrar.spawn(live(number, line, inbox, sender.clone(), counts.clone()));
    }
    drop(sender);
    for _ in 0..arguments.channels {
        churn.ask();
    }
    server.registrar.block_on(async {
        while churn.open.len() < arguments.channels {
            let next = tokio::time::timeout(Duration::from_secs(60), churn.opened.recv()).await;
            churn.open.push_back(next.context("the first channels do not open")?.context("no peer is left")?);
        }
        anyhow::Ok(())
    })?;
    println!("{} channels between {} registrations are open", churn.open.len(), arguments.registrations);

    let (stop, newest) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(None)));
    let task = churn.run(arguments.churn, stop.clone(), counts.clone(), newest.clone());
    let churning = server.registrar.spawn(async move {
        task.await;
        Ok(())
    });

    let mut generator = Generator::default();
    let (start, mut renewed) = (Instant::now(), Instant::now());
    let (mut sent, mut lost, mut strays) = (0, 0, 0);
    let mut memory = Vec::new();
    let (whole, mut told) = (Duration::from_secs(arguments.seconds), Duration::ZERO);
    while start.elapsed() < whole {
        let outcome = generator.load(&lanes, Pattern::Bulk, 1200, DATAGRAMS)?;
        sent += outcome.sent as u64;
        lost += outcome.lost as u64;
        let newest = newest.lock().ok().and_then(|newest| *newest);
        strays += silent.stray(&server, &lanes, newest)?;
        if renewed.elapsed() > RENEWAL {
            server.registrar.renew(&lanes)?;
            renewed = Instant::now();
        }
        // The first fifth fills what has a bound: queues, tables, the allocator's pools.
        if start.elapsed() > whole / 5 {
            memory.push(server.subject.memory()? as f64);
        }
        if start.elapsed() > told + Duration::from_secs(30) {
            told = start.elapsed();
            let opened = counts.opened.load(Ordering::Relaxed);
            let resident = server.subject.memory()? >> 10;
            println!(
                "{:>4} s: {sent} sent, {lost} lost, {opened} channels opened, {resident} kB",
                told.as_secs()
            );
        }
    }
    stop.store(true, Ordering::Relaxed);
    server.registrar.block_on(churning)?;
    let took = start.elapsed().as_secs_f64();
    // What is sent last is last in its thread's queue: an answer means that the strays have been dealt with.
    let probe = *b"\0\x01\0\0\x21\x12\xa4\x42............";
    for socket in [&silent.socket, &silent.other] {
        let answer = socket.ask(server.registrar.relay, &probe)?;
        ensure!(answer.starts_with(&[1, 1]), "something came to {}: {answer:02x?}", socket.address()?);
        ensure!(socket.poll()?.is_none(), "something came to {}", socket.address()?);
    }
    let opened = counts.opened.load(Ordering::Relaxed);
    let refused_peers = counts.refused.load(Ordering::Relaxed);
    let relay = server.stop()?;
    let count = |name: &str| relay[name].as_u64().with_context(|| format!("{name}: {relay}"));
    let (forwarded, refused, overflowed) = (count("forwarded")?, count("refused")?, count("overflowed")?);

    let mean = memory.iter().sum::<f64>() / memory.len() as f64;
    let part = memory.len() / 4;
    let average = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
    let growth = average(&memory[memory.len() - part..]) / average(&memory[..part]) - 1.0;
    println!(
        "{took:.0} s: {:.0} datagrams a second ({:.2} Gbit/s), {:.0} channels opened a second, {mean:.0} bytes resident, \
         grown by {:.2} %",
        sent as f64 / took,
        sent as f64 * 9.6e-6 / took,
        opened as f64 / took,
        growth * 100.0,
    );
    println!(
        "sent {sent} = forwarded {forwarded} + overflowed {overflowed}; strays {strays} = refused {refused}; lost {lost}"
    );
    ensure!(refused == strays, "{strays} strays were sent, {refused} refused");
    ensure!(
        forwarded + overflowed == sent,
        "{sent} sent, {forwarded} forwarded, {overflowed} dropped by the kernel"
    );
    ensure!(lost == overflowed, "{lost} did not arrive, {overflowed} were dropped by the kernel");
    ensure!(growth.abs() <= FLAT, "memory has changed by {:.1} %", growth * 100.0);
    ensure!(refused_peers == 0, "{refused_peers} introductions were refused");
    let rate = opened as f64 / took;
    ensure!(rate >= 0.95 * arguments.churn as f64, "{rate:.0} channels opened a second");
    // Those that have been asked for last may be on their way.
    let left = counts.left.load(Ordering::Relaxed);
    ensure!(left as usize >= arguments.channels * 9 / 10, "{left} channels were open at the end");
    Ok(())
}

fn main() -> ExitCode {
    let run = || {
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
        soak(&Arguments::parse())
    };
    match { run }() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}
