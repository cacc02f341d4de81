//! Two agents, a modelled network between them, one virtual clock. `World::run_until` jumps from wake-up to wake-up.

#![allow(dead_code, unreachable_pub, reason = "shared between test binaries, each of which uses a part")]

pub mod nat;
pub mod traffic;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use peer_agent::{Agent, Config, Event, Path, SocketId, Timers};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rendezvous_wire::candidate::is_probeable;
use rendezvous_wire::message::{Credentials, Role};
use rendezvous_wire::{Candidate, CandidateKind};

pub use nat::{Filtering, Mapping, Nat};
pub use traffic::Flow;

pub const A: usize = 0;
pub const B: usize = 1;

pub const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

pub const fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

/// The server whose reflection gave the server-reflexive candidates.
const SERVER: &str = "192.0.2.250:3478";

/// How a peer is attached to the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Public,
    Behind(Mapping, Filtering),
}

/// The line between the two.
#[derive(Debug, Clone)]
pub struct Line {
    /// One way, from A and from B.
    pub delay: [Duration; 2],
    /// The same for IPv6, where it differs.
    pub delay_v6: Option<[Duration; 2]>,
    /// Probability of loss, per direction.
    pub loss: [f64; 2],
    /// Probability that a datagram comes twice.
    pub duplication: f64,
    /// Most additional delay; more than the time between two datagrams reorders them.
    pub jitter: Duration,
    /// Nothing passes.
    pub cut: bool,
    /// Nothing passes over IPv4, or over IPv6.
    pub cut_family: [bool; 2],
}

impl Default for Line {
    fn default() -> Self {
        Self {
            delay: [ms(20); 2],
            delay_v6: None,
            loss: [0.0; 2],
            duplication: 0.0,
            jitter: Duration::ZERO,
            cut: false,
            cut_family: [false; 2],
        }
    }
}

/// A datagram that left a host.
#[derive(Debug, Clone, Copy)]
pub struct Sent {
    pub at: Duration,
    pub path: Path,
    pub request: bool,
}

pub struct Peer {
    pub agent: Option<Agent>,
    /// Index of its router.
    pub site: Option<usize>,
    pub sockets: Vec<(SocketId, SocketAddr)>,
    pub candidates: Vec<Candidate>,
    /// Hears of the introduction at this time.
    pub introduced: Duration,
    pub role: Role,
    pub seed: u64,
    pub events: Vec<(Duration, Event)>,
    pub sent: Vec<Sent>,
    pub flow: Flow,
}

impl Peer {
    pub fn agent(&self) -> &Agent {
        self.agent.as_ref().expect("introduced")
    }

    /// When its first path was proven.
    pub fn proven(&self) -> Option<Duration> {
        self.first(|event| matches!(event, Event::Proven { .. }))
    }

    pub fn first(&self, wanted: impl Fn(&Event) -> bool) -> Option<Duration> {
        self.events.iter().find(|(_, event)| wanted(event)).map(|(at, _)| *at)
    }

    pub fn count(&self, wanted: impl Fn(&Event) -> bool) -> usize {
        self.events.iter().filter(|(_, event)| wanted(event)).count()
    }

    pub fn selected(&self) -> Option<Path> {
        self.agent().selected().map(|selected| selected.path)
    }
}

struct Packet {
    to: SocketAddr,
    from: SocketAddr,
    data: Vec<u8>,
}

pub struct World {
    origin: Instant,
    pub now: Duration,
    pub peers: [Peer; 2],
    pub sites: Vec<Nat>,
    pub line: Line,
    pub timers: Timers,
    rng: StdRng,
    wire: BTreeMap<(Duration, u64), Packet>,
    serial: u64,
}

fn credentials(side: usize) -> Credentials {
    Credentials {
        ufrag: ["ufragofA", "ufragofB"][side].to_owned(),
        password: format!("a password of {side}, 22+ characters"),
    }
}

#[expect(clippy::disallowed_methods, reason = "an arbitrary origin for the virtual clock")]
fn origin() -> Instant {
    Instant::now()
}

impl World {
    /// Two peers of these kinds, each with an IPv4 socket and the candidates of a registration.
    pub fn new(kinds: [Kind; 2], seed: u64) -> Self {
        let mut sites = Vec::new();
        let peers = [A, B].map(|side| {
            let (site, local) = match kinds[side] {
                Kind::Public => (None, format!("203.0.113.{}:4000", side + 1)),
                Kind::Behind(mapping, filtering) => {
                    sites.push(Nat::new(
                        format!("198.51.100.{}", side + 1).parse().unwrap(),
                        mapping,
                        filtering,
                    ));
                    (Some(sites.len() - 1), format!("192.168.{}.10:4000", side + 1))
                }
            };
            Peer {
                agent: None,
                site,
                sockets: vec![(SocketId(0), local.parse().unwrap())],
                candidates: Vec::new(),
                introduced: Duration::ZERO,
                role: [Role::Controlling, Role::Controlled][side],
                seed: seed ^ (0xa5a5_0000 + side as u64),
                events: Vec::new(),
                sent: Vec::new(),
                flow: Flow::default(),
            }
        });
        let mut world = Self {
            origin: origin(),
            now: Duration::ZERO,
            peers,
            sites,
            line: Line::default(),
            timers: Timers::default(),
            rng: StdRng::seed_from_u64(seed),
            wire: BTreeMap::new(),
            serial: 0,
        };
        world.gather();
        world
    }

    /// Both behind one router.
    pub fn same_site(mapping: Mapping, filtering: Filtering, hairpin: bool, seed: u64) -> Self {
        let mut world = Self::new([Kind::Behind(mapping, filtering); 2], seed);
        world.sites.truncate(1);
        world.sites[0].hairpin = hairpin;
        for (side, peer) in world.peers.iter_mut().enumerate() {
            peer.site = Some(0);
            peer.sockets[0].1 = format!("192.168.1.{}:4000", 10 + side).parse().unwrap();
        }
        world.gather();
        world
    }

    /// Both get an IPv6 address too.
    pub fn with_v6(mut self) -> Self {
        for (side, peer) in self.peers.iter_mut().enumerate() {
            peer.sockets.push((SocketId(1), format!("[2001:db8:{}::1]:6000", side + 1).parse().unwrap()));
        }
        self.gather();
        self
    }

    pub fn with_line(mut self, line: Line) -> Self {
        self.line = line;
        self
    }

    pub fn introduced_at(mut self, a: Duration, b: Duration) -> Self {
        self.peers[A].introduced = a;
        self.peers[B].introduced = b;
        self
    }

    /// Host candidates, and what a reflection server sees.
    pub fn gather(&mut self) {
        for side in [A, B] {
            let mut candidates = Vec::new();
            for (_, local) in self.peers[side].sockets.clone() {
                candidates.push(Candidate::new(CandidateKind::Host, local, 65535));
                if let (Some(site), true) = (self.peers[side].site, local.is_ipv4()) {
                    let mapped = self.sites[site].outbound(local, SERVER.parse().unwrap());
                    candidates.push(Candidate::new(CandidateKind::ServerReflexive, mapped, 65535));
                }
            }
            self.peers[side].candidates = candidates;
        }
    }

    pub fn instant(&self, at: Duration) -> Instant {
        self.origin + at
    }

    fn introduce(&mut self, side: usize) {
        let now = self.instant(self.now);
        let peer = &self.peers[side];
        let mut config = Config::new(peer.role, credentials(side), credentials(1 - side), peer.seed);
        config.timers = self.timers.clone();
        let mut agent = Agent::new(config, now).unwrap();
        for (socket, local) in &peer.sockets {
            agent.add_socket(*socket, (*local).into(), &peer.candidates, now);
        }
        for candidate in &self.peers[1 - side].candidates {
            agent.add_remote_candidate(*candidate, now);
        }
        self.peers[side].agent = Some(agent);
    }

    /// Calls an agent from outside, and carries out what it wants.
    pub fn with_agent<T>(&mut self, side: usize, call: impl FnOnce(&mut Agent, Instant) -> T) -> T {
        let now = self.instant(self.now);
        let value = call(self.peers[side].agent.as_mut().expect("introduced"), now);
        self.pump(side);
        value
    }

    /// Everything until `until`, that included.
    pub fn run_until(&mut self, until: Duration) {
        self.run_while(until, |_| true);
    }

    /// Everything until `until`, or until `go_on` says no.
    pub fn run_while(&mut self, until: Duration, go_on: impl Fn(&Self) -> bool) {
        while go_on(self) {
            let Some(next) = self.next_wake().filter(|next| *next <= until) else {
                self.now = self.now.max(until);
                return;
            };
            self.now = self.now.max(next);
            self.step();
        }
    }

    fn next_wake(&self) -> Option<Duration> {
        let wire = self.wire.keys().next().map(|(at, _)| *at);
        let peers = self.peers.iter().filter_map(|peer| match &peer.agent {
            None => Some(peer.introduced),
            Some(agent) => agent.poll_timeout().map(|(at, _)| at.saturating_duration_since(self.origin)),
        });
        let flows = self.peers.iter().filter_map(|peer| peer.flow.next);
        wire.into_iter().chain(peers).chain(flows).min()
    }

    fn step(&mut self) {
        while let Some(entry) = self.wire.first_entry().filter(|entry| entry.key().0 <= self.now) {
            let packet = entry.remove();
            self.deliver(packet);
        }
        for side in [A, B] {
            if self.peers[side].agent.is_none() {
                if self.peers[side].introduced > self.now {
                    continue;
                }
                self.introduce(side);
            }
            self.drive_flow(side);
            let now = self.instant(self.now);
            let agent = self.peers[side].agent.as_mut().unwrap();
            if agent.poll_timeout().is_some_and(|(at, _)| at <= now) {
                agent.handle_timeout(now);
            }
            self.pump(side);
            if let Some((at, why)) = self.peers[side].agent().poll_timeout() {
                assert!(at > now, "a wake-up that is not in the future: {why}");
            }
        }
    }

    fn pump(&mut self, side: usize) {
        let peer = &mut self.peers[side];
        let agent = peer.agent.as_mut().unwrap();
        while let Some(event) = agent.poll_event() {
            peer.events.push((self.now, event));
            peer.flow.note_event(&event);
        }
        let mut datagrams = Vec::new();
        while let Some(transmit) = agent.poll_transmit() {
            assert!(is_probeable(transmit.path.remote), "sent to {}", transmit.path.remote);
            let request = transmit.datagram[0] == 0;
            peer.sent.push(Sent { at: self.now, path: transmit.path, request });
            datagrams.push(transmit);
        }
        for transmit in datagrams {
            let sockets = &self.peers[side].sockets;
            let Some((_, local)) = sockets.iter().find(|(id, _)| *id == transmit.path.socket) else {
                continue;
            };
            self.send(side, *local, transmit.path.remote, transmit.datagram);
        }
    }

    fn send(&mut self, side: usize, local: SocketAddr, to: SocketAddr, data: Vec<u8>) {
        let site = self.peers[side].site;
        let neighbour = |peer: &Peer| peer.site == site && peer.sockets.iter().any(|(_, own)| *own == to);
        if site.is_some() && self.peers.iter().any(neighbour) {
            self.put(ms(1), Packet { to, from: local, data });
            return;
        }
        let from = match site.filter(|_| local.is_ipv4()) {
            Some(site) => self.sites[site].outbound(local, to),
            None => local,
        };
        if site.is_some_and(|site| self.sites[site].ip == to.ip()) {
            if self.sites[site.unwrap()].hairpin {
                self.put(ms(2), Packet { to, from, data });
            }
            return;
        }
        if matches!(to, SocketAddr::V4(to) if to.ip().is_private()) {
            return;
        }
        let family = usize::from(to.is_ipv6());
        if self.line.cut || self.line.cut_family[family] || self.rng.random_bool(self.line.loss[side]) {
            return;
        }
        let delay = self.line.delay_v6.filter(|_| to.is_ipv6()).unwrap_or(self.line.delay)[side];
        let copies = 1 + usize::from(self.rng.random_bool(self.line.duplication));
        for _ in 0..copies {
            let jitter = self.line.jitter.mul_f64(self.rng.random());
            self.put(delay + jitter, Packet { to, from, data: data.clone() });
        }
    }

    /// Puts a datagram on the wire as anybody might.
    pub fn inject(&mut self, from: SocketAddr, to: SocketAddr, data: Vec<u8>) {
        self.put(Duration::ZERO, Packet { to, from, data });
    }

    fn put(&mut self, delay: Duration, packet: Packet) {
        self.serial += 1;
        self.wire.insert((self.now + delay, self.serial), packet);
    }

    fn deliver(&mut self, packet: Packet) {
        let site = self.sites.iter_mut().find(|site| site.ip == packet.to.ip());
        let to = match site {
            Some(site) => match site.inbound(packet.from, packet.to) {
                Some(inside) => inside,
                None => return,
            },
            None => packet.to,
        };
        if traffic::is_data(&packet.data) {
            self.deliver_data(packet.from, to, &packet.data);
            return;
        }
        for side in [A, B] {
            let own = self.peers[side].sockets.iter().find(|(_, local)| *local == to).map(|(id, _)| *id);
            if let Some(socket) = own {
                if self.peers[side].agent.is_some() {
                    self.with_agent(side, |agent, now| {
                        agent.handle_datagram(socket, packet.from, &packet.data, now)
                    });
                }
                return;
            }
        }
    }

    /// Whether both have selected, and each the way back of the other's.
    pub fn agree(&self) -> bool {
        let ends = [A, B].map(|side| {
            let path = self.peers[side].agent.as_ref()?.selected()?.path;
            let sockets = &self.peers[side].sockets;
            let local = sockets.iter().find(|(id, _)| *id == path.socket)?.1;
            Some((local, path.remote))
        });
        let [Some((a_local, a_remote)), Some((b_local, b_remote))] = ends else { return false };
        self.reaches(a_remote, b_local) && self.reaches(b_remote, a_local)
    }

    /// Whether `remote` is an address of `other`, its own or a mapping.
    fn reaches(&self, remote: SocketAddr, other: SocketAddr) -> bool {
        remote == other
            || self.sites.iter().any(|site| site.ip == remote.ip() && site.inside(remote) == Some(other))
    }

    /// The most datagrams that a peer sent in any second.
    pub fn peak(&self, side: usize, requests_only: bool) -> usize {
        let sent = &self.peers[side].sent;
        let times: Vec<_> =
            sent.iter().filter(|sent| sent.request || !requests_only).map(|sent| sent.at).collect();
        let within =
            |start: usize| times[start..].iter().take_while(|at| **at < times[start] + secs(1)).count();
        (0..times.len()).map(within).max().unwrap_or(0)
    }

    /// What must hold whatever happens: selected only after proven, nothing faster than the pace.
    pub fn check_invariants(&self) {
        for (side, peer) in self.peers.iter().enumerate() {
            let mut proven = Vec::new();
            for (at, event) in &peer.events {
                match event {
                    Event::Proven { path, .. } => proven.push(*path),
                    Event::Selected(selected) => {
                        assert!(proven.contains(&selected.path), "selected unproven at {at:?}");
                    }
                    _ => {}
                }
            }
            // 100 a second by Ta, the burst, and what urgent checks may overdraw.
            let peak = self.peak(side, true);
            assert!(peak <= 100 + 4 + 8, "{peak} checks in a second");
        }
    }
}
