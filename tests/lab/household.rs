//! Birthday probing beside a household: what it costs the router never comes near what the others of the house need.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use end_to_end::cell::Network;
use end_to_end::process::{PATIENCE, Program};
use end_to_end::world::World;
use libtest_mimic::Trial;
use netsim::{Host, RouterKind, Site};

use crate::trial;

/// What the router remembers at most: few for a home.
const MOST_FLOWS: usize = 2_048;
/// Sockets of the household, and ports of the internet that each talks to: 900 flows.
const OWN: usize = 30;
const FAR: usize = 30;
/// Entries that we may cost the router at any time.
const OURS: usize = 1_024;
/// Probing that meets nobody begins anew after 40 and 80 s.
const PATIENCE_OF_CHANCE: Duration = Duration::from_secs(100);

/// Room for a registration, which is three flows, and for nothing else: every other one would be a door.
const FULL: usize = 3;
/// More than plain checks cost.
const MANY: usize = 500;
/// Probing pauses for less than that while it goes on.
const QUIET: Duration = Duration::from_secs(8);

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("household::unharmed_by_birthday_probing_when_it_dials", || unharmed(true)),
        trial("household::unharmed_by_birthday_probing_when_it_is_dialled", || unharmed(false)),
        trial("household::unharmed_by_birthday_probing_in_vain", unharmed_in_vain),
    ]
}

/// Somebody on the internet who answers with the endpoint that was seen.
struct Echoes {
    addresses: Vec<SocketAddr>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Echoes {
    fn start(host: &Host) -> anyhow::Result<Self> {
        let open = || UdpSocket::bind((host.ipv4(), 0));
        let sockets: Vec<UdpSocket> = host.run(|| (0..=FAR).map(|_| open()).collect::<Result<_, _>>())?;
        sockets.iter().try_for_each(|socket| socket.set_nonblocking(true))?;
        let addresses = sockets.iter().map(UdpSocket::local_addr).collect::<Result<_, _>>()?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while !stopping.load(Ordering::Relaxed) {
                let mut idle = true;
                for socket in &sockets {
                    while let Ok((_, from)) = socket.recv_from(&mut buffer) {
                        idle = false;
                        let _ = socket.send_to(from.to_string().as_bytes(), from);
                    }
                }
                if idle {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        });
        Ok(Self { addresses, stop, thread: Some(thread) })
    }
}

impl Drop for Echoes {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One flow: sends, and gives the endpoint at which it was seen. Nothing on the way loses packets by itself.
fn ask(socket: &UdpSocket, far: SocketAddr) -> anyhow::Result<String> {
    socket.send_to(b"where am I?", far)?;
    let mut buffer = [0; 64];
    loop {
        let (length, from) =
            socket.recv_from(&mut buffer).with_context(|| format!("no answer from {far}"))?;
        if from == far {
            return Ok(String::from_utf8(buffer[..length].to_vec())?);
        }
    }
}

fn socket(host: &Host) -> anyhow::Result<UdpSocket> {
    let socket = host.run(|| UdpSocket::bind((host.ipv4(), 0)))?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    Ok(socket)
}

/// A host of the household that keeps 900 flows.
struct Household {
    sockets: Vec<UdpSocket>,
    /// Where each flow was seen at first, by socket.
    seen: Vec<Vec<String>>,
}

impl Household {
    fn open(host: &Host, far: &[SocketAddr]) -> anyhow::Result<Self> {
        let sockets: Vec<_> = (0..OWN).map(|_| socket(host)).collect::<anyhow::Result<_>>()?;
        let mut household = Self { sockets, seen: Vec::new() };
        household.seen = household.ask_all(far)?;
        Ok(household)
    }

    /// Uses every flow once, all sockets at the same time.
    fn ask_all(&self, far: &[SocketAddr]) -> anyhow::Result<Vec<Vec<String>>> {
        std::thread::scope(|scope| {
            let each = |socket| move || far[..FAR].iter().map(|far| ask(socket, *far)).collect();
            let threads: Vec<_> = self.sockets.iter().map(|socket| scope.spawn(each(socket))).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        })
    }

    fn is_unharmed(&self, far: &[SocketAddr]) -> anyhow::Result<()> {
        let now = self.ask_all(far)?;
        ensure!(now == self.seen, "flows of the household come from elsewhere now");
        Ok(())
    }
}

/// Flows of a host that its router remembers: those that it has begun.
fn flows_of(site: &Site, host: &Host) -> anyhow::Result<usize> {
    let begun = format!(" src={} ", host.ipv4());
    let first = |line: &String| line.find(" src=").is_some_and(|at| line[at..].starts_with(&begun));
    Ok(site.conntrack()?.iter().filter(|line| first(line)).count())
}

/// A house with a peer and a family, and what the peer has cost so far.
struct House {
    site: Site,
    household: Household,
    echoes: Echoes,
    /// Most flows of ours at a time.
    most: usize,
    /// New flows of the household.
    opened: usize,
}

impl House {
    fn new(world: &mut World) -> anyhow::Result<Self> {
        let echoes = Echoes::start(&world.lab.add_server("web")?)?;
        let config = Network::new(RouterKind::EimApdf).site().most_flows(MOST_FLOWS).hosts(2);
        let site = world.lab.add_site("house", config)?;
        let household = Household::open(&site.host(1), &echoes.addresses)?;
        ensure!(flows_of(&site, &site.host(1))? >= OWN * FAR, "the household has too few flows");
        Ok(Self { site, household, echoes, most: 0, opened: 0 })
    }

    fn peer(&self) -> Host {
        self.site.host(0)
    }

    /// New flows of the household are not turned away, and the old ones keep their endpoints.
    fn check(&mut self) -> anyhow::Result<()> {
        ask(&socket(&self.site.host(1))?, self.echoes.addresses[FAR])
            .context("a new flow of the household")?;
        self.opened += 1;
        if self.opened.is_multiple_of(10) {
            self.household.is_unharmed(&self.echoes.addresses)?;
        }
        self.most = self.most.max(flows_of(&self.site, &self.peer())?);
        ensure!(self.most <= OURS, "{} flows of ours", self.most);
        Ok(())
    }

    fn check_at_last(&mut self) -> anyhow::Result<()> {
        self.check()?;
        self.household.is_unharmed(&self.echoes.addresses)?;
        ensure!(self.opened > 3, "only {} flows were opened meanwhile: too few to tell", self.opened);
        println!("at most {} flows of ours beside {} of the household", self.most, OWN * FAR + self.opened);
        Ok(())
    }
}

fn unharmed(dials: bool) -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let mut house = House::new(&mut world)?;
    let other = world.lab.add_site("other", Network::new(RouterKind::Apdm).site())?.host(0);
    let ours = house.peer();
    let (dialler, listener) = if dials { (&ours, &other) } else { (&other, &ours) };
    let (_listening, id) = world.listener(listener, "listener", &["--echo"])?;
    let mut peer = world.peer(dialler, "dialler", &["connect", &id])?;
    let (mut stdin, mut stdout) = (peer.stdin()?, peer.stdout()?);
    stdin.write_all(b"are you there?")?;
    let deadline = Instant::now() + PATIENCE_OF_CHANCE;
    let direct = loop {
        house.check()?;
        let is_direct = |event: &&serde_json::Value| event["event"] == "path" && event["path"] == "direct";
        if let Some(event) = said(&mut peer, is_direct) {
            break event;
        }
        ensure!(Instant::now() < deadline, "not direct; {} flows of ours at most", house.most);
    };
    // Once in a hundred runs one of the mappings has the port that the server saw, and needs no probe.
    ensure!(direct["rung"] == "birthday" || direct["rung"] == "plain", "{direct}");
    // The probes are remembered still, whether or not their path is in use.
    house.check_at_last()?;
    ensure!(house.most > 10, "{} flows of ours: this was no probing", house.most);
    drop(stdin);
    let mut echo = String::new();
    stdout.read_to_string(&mut echo)?;
    ensure!(echo == "are you there?" && peer.wait(PATIENCE)?.success(), "{echo:?}");
    Ok(())
}

/// The other side's router has no room for the flows that would be the doors: nothing meets, and the whole budget is spent.
fn unharmed_in_vain() -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let mut house = House::new(&mut world)?;
    let other = Network::new(RouterKind::Apdm).site().most_flows(FULL);
    let other = world.lab.add_site("other", other)?.host(0);
    let (_listening, id) = world.listener(&other, "listener", &["--echo"])?;
    let mut peer = world.peer(&house.peer(), "dialler", &["connect", "--verbose", &id])?;
    let (mut stdin, mut stdout) = (peer.stdin()?, peer.stdout()?);
    stdin.write_all(b"are you there?")?;
    let deadline = Instant::now() + PATIENCE_OF_CHANCE;
    let mut grown = Instant::now();
    loop {
        let before = house.most;
        house.check()?;
        grown = if house.most > before { Instant::now() } else { grown };
        if house.most > MANY && grown.elapsed() > QUIET {
            break;
        }
        if Instant::now() > deadline {
            drop(stdin);
            let explained = peer.named("explained")?;
            anyhow::bail!("no probing: {} flows of ours at most; {explained}", house.most);
        }
    }
    house.check_at_last()?;
    drop(stdin);
    let mut echo = String::new();
    stdout.read_to_string(&mut echo)?;
    ensure!(echo == "are you there?" && peer.wait(PATIENCE)?.success(), "{echo:?}");
    Ok(())
}

fn said(peer: &mut Program, wanted: impl Fn(&&serde_json::Value) -> bool) -> Option<serde_json::Value> {
    peer.said().iter().find(wanted).cloned()
}
