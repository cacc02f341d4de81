//! Garbage on every port while a session goes on: nothing crashes, nothing stops.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use end_to_end::data::{consume, produce};
use end_to_end::process::PATIENCE;
use end_to_end::world::World;
use libtest_mimic::Trial;
use netsim::{Host, RouterKind, SiteConfig};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![trial("garbage::a_session_goes_on_under_random_and_mutated_datagrams", session_goes_on)]
}

/// How long garbage is sent; `LAB_GARBAGE_SECONDS` overrides.
fn duration() -> Duration {
    let seconds = std::env::var("LAB_GARBAGE_SECONDS").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(60))
}

/// Datagrams that look like ours and are not: first bytes of every protocol, lengths of every kind, real messages with bits flipped.
struct Garbage {
    random: SmallRng,
    models: Vec<Vec<u8>>,
}

impl Garbage {
    fn new(seed: u64) -> Self {
        use rendezvous_wire::relay::Channel;
        use rendezvous_wire::stun::{BindRequest, Key, TransactionId, binding_request, binding_success};
        let key = Key::new("notthekeynotthekeynotthekey").expect("a valid password");
        let transaction = TransactionId([7; 12]);
        let bind = BindRequest { registration: rendezvous_wire::message::RegistrationId(1), sequence: 1 };
        let channel = Channel::new(1).expect("a small number").header();
        let models = vec![
            binding_request(transaction).expect("encodes"),
            binding_success(transaction, SocketAddr::from(([192, 0, 2, 1], 1)), Some(&key)).expect("encodes"),
            bind.encode(transaction, &key).expect("encodes"),
            [&channel[..], &[0x40; 60]].concat(),
            // A QUIC version 1 Initial's outline, and an unknown version.
            [&[0xc3, 0, 0, 0, 1, 8][..], &[1; 8], &[0, 0, 0x44, 0xb0], &[0; 1200]].concat(),
            [&[0xc3, 0xba, 0xba, 0xba, 0xba, 8][..], &[1; 8], &[0, 0], &[0; 1200]].concat(),
        ];
        Self { random: SmallRng::seed_from_u64(seed), models }
    }

    fn next(&mut self) -> Vec<u8> {
        if self.random.random_bool(0.3) {
            let length = self.random.random_range(0..1400);
            return (0..length).map(|_| self.random.random()).collect();
        }
        let mut datagram = self.models[self.random.random_range(0..self.models.len())].clone();
        for _ in 0..self.random.random_range(0..6) {
            let place = self.random.random_range(0..datagram.len());
            datagram[place] = self.random.random();
        }
        if self.random.random_bool(0.2) {
            datagram.truncate(self.random.random_range(0..datagram.len()));
        }
        datagram
    }
}

/// Sends garbage to all targets until told to stop, at a rate that leaves the machine to the session; how many datagrams.
fn bombard(host: &Host, targets: &[SocketAddr], seed: u64, stop: &AtomicBool) -> anyhow::Result<u64> {
    let socket = host.run(|| UdpSocket::bind("0.0.0.0:0"))?;
    let mut garbage = Garbage::new(seed);
    let mut sent = 0;
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..20 {
            for target in targets {
                // An ICMP error of an earlier one is no reason to stop.
                sent += u64::from(socket.send_to(&garbage.next(), target).is_ok());
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(sent)
}

fn session_goes_on() -> anyhow::Result<()> {
    let mut world = World::new(8)?;
    let a = world.lab.add_site("a", SiteConfig::new(RouterKind::Public))?.host(0);
    let b = world.lab.add_site("b", SiteConfig::new(RouterKind::Public))?.host(0);
    let attacker = world.lab.add_site("attacker", SiteConfig::new(RouterKind::Public))?.host(0);
    let (mut listener, id) = world.listener(&b, "b", &["--echo"])?;
    let mut peer = world.peer(&a, "a", &["connect", &id])?;
    let path = peer.event(|event| event["path"] == "direct", PATIENCE)?;
    let server = world.server_host.ipv4();
    let mut targets: Vec<SocketAddr> = [443, 3478, 3479].map(|port| (server, port).into()).to_vec();
    for field in ["local", "remote"] {
        targets.push(path[field].as_str().context("an address")?.parse()?);
    }
    let stop = Arc::new(AtomicBool::new(false));
    let bombing = {
        let (stop, attacker) = (stop.clone(), attacker.clone());
        std::thread::spawn(move || bombard(&attacker, &targets, 8, &stop))
    };
    let (mut input, mut output) = (peer.stdin()?, peer.stdout()?);
    let reader = std::thread::spawn(move || consume(&mut output));
    let deadline = Instant::now() + duration();
    let mut digests = 0;
    while Instant::now() < deadline {
        // A steady trickle through the session, and new sessions all the while.
        produce(8, 100_000, &mut input)?;
        let mut other = world.peer(&a, "other", &["connect", &id])?;
        drop(other.stdin()?);
        ensure!(other.wait(PATIENCE)?.success(), "a new session failed under garbage");
        digests += 1;
    }
    stop.store(true, Ordering::Relaxed);
    let sent = bombing.join().map_err(|_| anyhow::anyhow!("the attacker panicked"))??;
    ensure!(sent > 1000, "hardly any garbage was sent: {sent}");
    drop(input);
    let (echoed, _) = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
    ensure!(echoed == digests * 100_000, "{echoed} bytes of {} came back", digests * 100_000);
    ensure!(peer.wait(PATIENCE)?.success());
    let reconnects = listener.said().iter().filter(|event| event["event"] == "session_failed").count();
    ensure!(reconnects == 0, "sessions failed");
    Ok(())
}
