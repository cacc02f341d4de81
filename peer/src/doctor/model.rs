//! A NAT and a rendezvous server's reflection on a virtual clock, for tests.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use rendezvous_wire::stun::behaviour::DiscoveryResponse;
use rendezvous_wire::stun::{self, Received};

use super::drive::Core;
use super::exchange::Transmit;

/// Each way.
const DELAY: Duration = Duration::from_millis(20);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DependsOn {
    Nothing,
    Address,
    AddressAndPort,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ports {
    Kept,
    Step(u16),
    Random,
}

/// A NAT in the terms of RFC 4787; without mapping, a firewall.
#[derive(Debug, Clone, Copy)]
pub(super) struct Nat {
    pub(super) mapping: Option<(DependsOn, Ports)>,
    pub(super) filtering: DependsOn,
    pub(super) lifetime: Duration,
    pub(super) hairpins: bool,
}

struct Binding {
    inside: SocketAddr,
    /// What the mapping depends on.
    toward: Option<SocketAddr>,
    outside: SocketAddr,
    contacts: BTreeMap<SocketAddr, Instant>,
    last: Instant,
}

/// One machine behind one NAT, and a server.
pub(super) struct World {
    pub(super) nat: Nat,
    pub(super) two_addresses: bool,
    /// Neither way.
    pub(super) blocked: bool,
    /// Share of packets that are lost.
    pub(super) loss: f64,
    pub(super) now: Instant,
    pub(super) sent: u64,
    bindings: Vec<Binding>,
    flights: BTreeMap<(Instant, u64), (SocketAddr, SocketAddr, Vec<u8>)>,
    next_port: u16,
    random: StdRng,
}

pub(super) const LOCAL: &str = "192.168.1.10";
const WAN: &str = "198.18.1.2";
pub(super) const SERVERS: [&str; 2] = ["203.0.113.10", "203.0.113.11"];
const PORTS: [u16; 2] = [3478, 3479];
const FIRST_PORT: u16 = 4000;

/// The own ports of so many sockets.
pub(super) fn own_ports(count: usize) -> Vec<u16> {
    (FIRST_PORT..).take(count).collect()
}

pub(super) fn server() -> [SocketAddr; 2] {
    PORTS.map(|port| SocketAddr::new(ip(SERVERS[0]), port))
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// The part of an address that something depends on.
fn part(depends: DependsOn, address: SocketAddr) -> Option<SocketAddr> {
    match depends {
        DependsOn::Nothing => None,
        DependsOn::Address => Some(SocketAddr::new(address.ip(), 0)),
        DependsOn::AddressAndPort => Some(address),
    }
}

impl World {
    pub(super) fn new(nat: Nat, seed: u64) -> Self {
        Self {
            nat,
            two_addresses: true,
            blocked: false,
            loss: 0.0,
            now: Instant::now(),
            sent: 0,
            bindings: Vec::new(),
            flights: BTreeMap::new(),
            next_port: 7000,
            random: StdRng::seed_from_u64(seed),
        }
    }

    /// Runs until the core is done, at most for `limit`; how long it took.
    pub(super) fn run(&mut self, core: &mut impl Core, limit: Duration) -> Duration {
        let start = self.now;
        while !core.is_done() && self.now <= start + limit {
            while let Some(transmit) = core.poll_transmit(self.now) {
                self.sent += 1;
                self.leave(SocketAddr::new(ip(LOCAL), FIRST_PORT + transmit.socket as u16), transmit);
            }
            let arrival = self.flights.keys().next().map(|(at, _)| *at);
            let Some(next) = arrival.into_iter().chain(core.poll_timeout()).min() else { break };
            assert!(
                next > self.now || arrival == Some(next),
                "it wants to wake up now, and has nothing to send"
            );
            self.now = next;
            while let Some(entry) = self.flights.first_entry().filter(|entry| entry.key().0 <= self.now) {
                let (source, destination, bytes) = entry.remove();
                self.arrive(source, destination, &bytes, core);
            }
        }
        self.now - start
    }

    fn fly(&mut self, source: SocketAddr, destination: SocketAddr, bytes: Vec<u8>) {
        if self.random.random_bool(1.0 - self.loss) {
            let number = self.random.random();
            self.flights.insert((self.now + DELAY, number), (source, destination, bytes));
        }
    }

    fn leave(&mut self, own: SocketAddr, transmit: Transmit) {
        if self.blocked {
            return;
        }
        let source = self.outbound(own, transmit.destination);
        self.fly(source, transmit.destination, transmit.datagram);
    }

    fn outbound(&mut self, inside: SocketAddr, destination: SocketAddr) -> SocketAddr {
        let (now, nat) = (self.now, self.nat);
        self.bindings.retain(|binding| binding.last + nat.lifetime > now);
        let (depends, ports) = nat.mapping.unwrap_or((DependsOn::Nothing, Ports::Kept));
        let toward = part(depends, destination);
        let found =
            self.bindings.iter().position(|binding| binding.inside == inside && binding.toward == toward);
        let place = found.unwrap_or_else(|| {
            let taken = |port| self.bindings.iter().any(|binding| binding.outside.port() == port);
            let port = match ports {
                Ports::Kept if !taken(inside.port()) => inside.port(),
                Ports::Step(step) => {
                    self.next_port += step;
                    self.next_port
                }
                Ports::Kept | Ports::Random => self.random.random_range(1024..=u16::MAX),
            };
            let ip = if nat.mapping.is_some() { ip(WAN) } else { inside.ip() };
            let outside = SocketAddr::new(ip, port);
            self.bindings.push(Binding { inside, toward, outside, contacts: BTreeMap::new(), last: now });
            self.bindings.len() - 1
        });
        let binding = &mut self.bindings[place];
        binding.last = now;
        binding.contacts.insert(destination, now);
        binding.outside
    }

    fn arrive(&mut self, source: SocketAddr, destination: SocketAddr, bytes: &[u8], core: &mut impl Core) {
        let is_server =
            SERVERS[..if self.two_addresses { 2 } else { 1 }].iter().any(|own| ip(own) == destination.ip());
        if is_server {
            if let Some((from, to, answer)) = self.answer(source, destination, bytes) {
                self.fly(from, to, answer);
            }
            return;
        }
        let (now, nat) = (self.now, self.nat);
        let hairpinned = self.bindings.iter().any(|binding| binding.outside == source);
        let admitted = |binding: &&mut Binding| {
            let contacts = binding.contacts.keys();
            binding.outside == destination
                && binding.last + nat.lifetime > now
                && (nat.filtering == DependsOn::Nothing
                    || contacts.into_iter().any(|to| part(nat.filtering, *to) == part(nat.filtering, source)))
        };
        if hairpinned && !nat.hairpins {
            return;
        }
        if let Some(binding) = self.bindings.iter_mut().find(admitted) {
            binding.last = now;
            let socket = usize::from(binding.inside.port() - FIRST_PORT);
            core.handle(socket, source, &Received::parse(bytes).unwrap(), now);
        }
    }

    /// What the server answers, from where and to whom.
    fn answer(
        &self,
        source: SocketAddr,
        destination: SocketAddr,
        bytes: &[u8],
    ) -> Option<(SocketAddr, SocketAddr, Vec<u8>)> {
        let request = Received::parse(bytes).ok()?;
        let other = |change_ip: bool, change_port: bool| {
            let second = destination.ip() == ip(SERVERS[0]);
            let ip = if change_ip { ip(SERVERS[usize::from(second)]) } else { destination.ip() };
            let port = if change_port {
                PORTS[usize::from(destination.port() == PORTS[0])]
            } else {
                destination.port()
            };
            SocketAddr::new(ip, port)
        };
        let change = request.change_request().unwrap_or_default();
        let transaction = request.transaction();
        if change.ip && !self.two_addresses {
            return Some((destination, source, stun::binding_error(transaction, 420, &[3], None).ok()?));
        }
        let from = other(change.ip, change.port);
        let to = SocketAddr::new(source.ip(), request.response_port().unwrap_or(source.port()));
        let response = DiscoveryResponse {
            transaction,
            mapped: source,
            origin: Some(from),
            other: self.two_addresses.then(|| other(true, true)),
            padded: false,
            limit: 200,
        };
        Some((from, to, response.encode().ok()?))
    }
}
