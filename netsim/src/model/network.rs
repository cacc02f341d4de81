//! The modelled internet at work: packets on their way, one after the other, on virtual time.

use std::cell::RefCell;
use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::gateway::Verdict;
use super::packet::{DEFAULT_TTL, Packet, Protocol};
use super::topology::{Route, Topology, Uplink};
use crate::ipv6::Ipv6;
use crate::link::{Fate, Line};
use crate::site::SiteConfig;

/// How long a packet takes on a LAN.
pub const LAN_DELAY: Duration = Duration::from_micros(100);

/// Linux's range of ports for sockets that ask for any (`ip_local_port_range`).
const EPHEMERAL: std::ops::RangeInclusive<u16> = 32_768..=60_999;

/// A machine: a server, or a host of a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostId(pub(super) usize);

/// A site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SiteId(pub(super) usize);

/// Something came to a socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrival {
    /// Where.
    pub host: HostId,
    /// The socket, by the address that [`Network::bind`] returned.
    pub socket: SocketAddr,
    /// What.
    pub what: What,
}

/// What can come to a socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// A packet.
    Packet(Packet),
    /// An ICMP error about a packet that the socket has sent: its TTL has ended, or nobody listens.
    Error {
        /// Who says so.
        reporter: IpAddr,
    },
    /// An ICMP echo reply.
    EchoReply,
}

/// The address is in use, or there are no ports left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the address is in use, or no port is free")]
pub struct BindError;

/// One thing that happened to a packet, for people to read.
#[derive(Debug)]
pub struct Step<'a> {
    /// When.
    pub at: Instant,
    /// Where: `site 1`, `carrier of site 2`, `line of site 1`, `host 3`.
    pub place: &'a str,
    /// What: `leaves`, `enters`, `is dropped`, ...
    pub what: &'static str,
    /// The packet as it is now.
    pub packet: &'a Packet,
}

type Observer = Box<dyn FnMut(&Step<'_>)>;

/// A packet and who will hear of its end.
#[derive(Debug, Clone)]
struct Traveller {
    packet: Packet,
    host: usize,
    socket: SocketAddr,
    sent: Instant,
}

#[derive(Debug)]
enum Event {
    /// It has crossed a line toward the internet.
    Edge(usize, Traveller),
    /// It has crossed a line toward a site.
    Site(usize, Traveller),
    /// It has reached a machine.
    Machine(usize, Traveller),
    /// News of its end has reached its sender.
    Report(usize, SocketAddr, What),
}

#[derive(Debug)]
struct Due {
    at: Instant,
    number: u64,
    event: Event,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    /// The earliest is the greatest, which a binary heap gives first.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.number).cmp(&(self.at, self.number))
    }
}

/// An internet with servers and sites, in memory.
pub struct Network {
    seed: u64,
    random: StdRng,
    now: Instant,
    topology: Topology,
    queue: BinaryHeap<Due>,
    number: u64,
    observer: Option<RefCell<Observer>>,
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Network")
            .field("now", &self.now)
            .field("under_way", &self.queue.len())
            .finish_non_exhaustive()
    }
}

impl Network {
    /// An internet with nothing attached. Everything random in it follows from `seed`; `start` is any instant.
    pub fn new(seed: u64, start: Instant) -> Self {
        Self {
            seed,
            random: StdRng::seed_from_u64(seed),
            now: start,
            topology: Topology::default(),
            queue: BinaryHeap::new(),
            number: 0,
            observer: None,
        }
    }

    /// Attaches a server with two addresses per family.
    ///
    /// # Panics
    ///
    /// When there are no addresses left; so does [`add_site`](Self::add_site).
    pub fn add_server(&mut self) -> HostId {
        HostId(self.topology.add_server())
    }

    /// Attaches a site.
    ///
    /// # Panics
    ///
    /// When the configuration has no router, or more than two.
    pub fn add_site(&mut self, config: &SiteConfig) -> SiteId {
        SiteId(self.topology.add_site(config, self.seed))
    }

    /// Attaches a site behind the outermost router of another: one more customer of the same carrier. Only its first router counts; its line is the
    /// carrier's.
    pub fn add_site_behind(&mut self, other: SiteId, config: &SiteConfig) -> SiteId {
        SiteId(self.topology.add_site_behind(other.0, config))
    }

    /// Shows everything that happens to packets from now on.
    pub fn observe(&mut self, observer: impl FnMut(&Step<'_>) + 'static) {
        self.observer = Some(RefCell::new(Box::new(observer)));
    }

    /// The time.
    pub fn now(&self) -> Instant {
        self.now
    }

    /// Host number `index` of a site, counted from zero.
    ///
    /// # Panics
    ///
    /// When there is no such host.
    pub fn host(&self, site: SiteId, index: usize) -> HostId {
        HostId(self.topology.places[site.0].machines[index])
    }

    /// The addresses of a machine, IPv4 first.
    pub fn addresses(&self, host: HostId) -> &[IpAddr] {
        &self.topology.machines[host.0].addresses
    }

    /// The address of a site's outermost router on the internet.
    pub fn wan_ipv4(&self, site: SiteId) -> Ipv4Addr {
        self.topology.places[site.0].wan
    }

    /// How many flows a site's outermost router remembers.
    pub fn flows(&mut self, site: SiteId) -> usize {
        let router = self.topology.places[site.0].outermost;
        self.topology.nodes[router].gateway.flows(self.now)
    }

    /// Opens a socket; port 0 stands for any. What it is called from then on is returned.
    ///
    /// # Errors
    ///
    /// When the address is in use.
    pub fn bind(
        &mut self,
        host: HostId,
        protocol: Protocol,
        address: SocketAddr,
    ) -> Result<SocketAddr, BindError> {
        let sockets = &mut self.topology.machines[host.0].sockets;
        if address.port() != 0 {
            return if sockets.insert((protocol, address)) { Ok(address) } else { Err(BindError) };
        }
        for _ in 0..100 {
            let any = SocketAddr::new(address.ip(), self.random.random_range(EPHEMERAL));
            if sockets.insert((protocol, any)) {
                return Ok(any);
            }
        }
        Err(BindError)
    }

    /// Closes a socket.
    pub fn close(&mut self, host: HostId, protocol: Protocol, socket: SocketAddr) {
        self.topology.machines[host.0].sockets.remove(&(protocol, socket));
    }

    /// Sends a UDP datagram from a socket, with [`DEFAULT_TTL`] unless another is given. A host without an address of the family sends
    /// nothing.
    pub fn send(
        &mut self,
        host: HostId,
        socket: SocketAddr,
        destination: SocketAddr,
        ttl: Option<u8>,
        payload: Vec<u8>,
    ) {
        self.send_as(Protocol::Udp, host, socket, destination, ttl, payload);
    }

    /// As [`send`](Self::send), of any protocol.
    pub fn send_as(
        &mut self,
        protocol: Protocol,
        host: HostId,
        socket: SocketAddr,
        destination: SocketAddr,
        ttl: Option<u8>,
        payload: Vec<u8>,
    ) {
        let machine = &self.topology.machines[host.0];
        let of_family = |ip: &&IpAddr| ip.is_ipv4() == destination.is_ipv4();
        let ip = if socket.ip().is_unspecified() {
            machine.addresses.iter().find(of_family).copied()
        } else {
            Some(socket.ip()).filter(|ip| of_family(&ip))
        };
        let Some(ip) = ip else { return };
        let router = machine.router;
        let source = SocketAddr::new(ip, socket.port());
        let packet = Packet { protocol, source, destination, ttl: ttl.unwrap_or(DEFAULT_TTL), payload };
        let traveller = Traveller { packet, host: host.0, socket, sent: self.now };
        self.show(|| format!("host {}", host.0), "sends", &traveller);
        match router {
            None => self.at_core(traveller),
            Some(router) if self.topology.nodes[router].is_on_lan(destination.ip()) => {
                self.on_lan(router, traveller);
            }
            Some(router) => self.leave(router, traveller),
        }
    }

    /// When something happens next, to a packet or to a socket.
    pub fn next_event(&self) -> Option<Instant> {
        self.queue.peek().map(|due| due.at)
    }

    /// Goes on until something arrives at a socket, but not beyond `until`. `None`: it is `until` now.
    pub fn poll(&mut self, until: Instant) -> Option<Arrival> {
        while self.queue.peek().is_some_and(|due| due.at <= until) {
            let due = self.queue.pop()?;
            self.now = self.now.max(due.at);
            match due.event {
                Event::Edge(line, traveller) => self.at_edge(line, traveller),
                Event::Site(line, traveller) => self.enter(self.topology.lines[line].router, traveller),
                Event::Machine(machine, traveller) => {
                    if let Some(arrival) = self.at_machine(machine, traveller) {
                        return Some(arrival);
                    }
                }
                Event::Report(machine, socket, what) => {
                    let sockets = &self.topology.machines[machine].sockets;
                    if [Protocol::Udp, Protocol::Tcp, Protocol::Echo]
                        .iter()
                        .any(|it| sockets.contains(&(*it, socket)))
                    {
                        return Some(Arrival { host: HostId(machine), socket, what });
                    }
                }
            }
        }
        self.now = self.now.max(until);
        None
    }

    /// From the inside of a router outward.
    fn leave(&mut self, router: usize, mut traveller: Traveller) {
        let node = &mut self.topology.nodes[router];
        let (wan, lan, now) = (node.wan, node.lan, self.now);
        let to = traveller.packet.destination.ip();
        if to == wan && node.hairpin {
            self.hairpin(router, traveller);
            return;
        }
        if to == wan || to == lan {
            // Its own stack, on the side that nothing is filtered on.
            self.report(traveller, What::Error { reporter: to });
            return;
        }
        let packet = &mut traveller.packet;
        let verdict = match node.ipv6 {
            Ipv6::Open if packet.destination.is_ipv6() => super::gateway::pass(packet),
            Ipv6::Broken if packet.destination.is_ipv6() => Verdict::Drop,
            _ => node.gateway.outbound(packet, &mut self.random, now),
        };
        self.show(|| self.name(router), told(verdict, "leaves"), &traveller);
        if self.settle(verdict, lan.into(), &traveller) {
            match self.topology.nodes[router].uplink {
                Uplink::Line(line) => self.carry(line, true, traveller),
                Uplink::Carrier(carrier) if self.topology.nodes[carrier].is_on_lan(to) => {
                    self.on_lan(carrier, traveller);
                }
                Uplink::Carrier(carrier) => self.leave(carrier, traveller),
            }
        }
    }

    /// Out of a router and in again (RFC 4787, section 6): the receiver sees the reflexive endpoint of the sender.
    fn hairpin(&mut self, router: usize, mut traveller: Traveller) {
        let node = &mut self.topology.nodes[router];
        let lan = node.lan;
        let mut verdict = node.gateway.outbound(&mut traveller.packet, &mut self.random, self.now);
        if verdict == Verdict::Forward {
            // One router, one hop.
            traveller.packet.ttl += 1;
            verdict = node.gateway.loop_back(&mut traveller.packet, self.now);
        }
        self.show(|| self.name(router), told(verdict, "turns around"), &traveller);
        if self.settle(verdict, lan.into(), &traveller) {
            self.on_lan(router, traveller);
        }
    }

    /// From the outside of a router inward.
    fn enter(&mut self, router: usize, mut traveller: Traveller) {
        let node = &mut self.topology.nodes[router];
        let wan = node.wan;
        let packet = &mut traveller.packet;
        let verdict = match node.ipv6 {
            Ipv6::Open if packet.destination.is_ipv6() => super::gateway::pass(packet),
            Ipv6::Broken if packet.destination.is_ipv6() => Verdict::Drop,
            _ => node.gateway.inbound(packet, self.now),
        };
        self.show(|| self.name(router), told(verdict, "enters"), &traveller);
        if self.settle(verdict, wan.into(), &traveller) {
            self.on_lan(router, traveller);
        }
    }

    /// To whomever it is for on the inside of a router.
    fn on_lan(&mut self, router: usize, traveller: Traveller) {
        let node = &self.topology.nodes[router];
        let to = traveller.packet.destination.ip();
        let machine =
            node.machines.iter().find(|machine| self.topology.machines[**machine].addresses.contains(&to));
        if let Some(machine) = machine {
            let event = Event::Machine(*machine, traveller);
            self.schedule(self.now + LAN_DELAY, event);
            return;
        }
        let behind = |customer: &&usize| {
            let customer = &self.topology.nodes[**customer];
            customer.wan == to || (to.is_ipv6() && customer.is_on_lan(to))
        };
        if let Some(customer) = node.customers.iter().find(behind) {
            self.enter(*customer, traveller);
        } else {
            self.show(|| self.name(router), "finds nobody for", &traveller);
        }
    }

    fn at_edge(&mut self, line: usize, mut traveller: Traveller) {
        let edge = if traveller.packet.destination.is_ipv4() {
            IpAddr::from(self.topology.lines[line].edge)
        } else {
            self.topology.lines[line].edge_v6.into()
        };
        if self.hop(edge, &mut traveller) {
            if self.topology.route(traveller.packet.destination.ip()) == Route::Line(line) {
                self.carry(line, false, traveller);
            } else {
                self.at_core(traveller);
            }
        }
    }

    fn at_core(&mut self, mut traveller: Traveller) {
        let core = if traveller.packet.destination.is_ipv4() {
            IpAddr::from(crate::address::SERVERS_GATEWAY_V4)
        } else {
            crate::address::SERVERS_GATEWAY_V6.into()
        };
        match self.topology.route(traveller.packet.destination.ip()) {
            Route::Server(server) => {
                let from_server = self.topology.machines[traveller.host].router.is_none();
                if from_server || self.hop(core, &mut traveller) {
                    let event = Event::Machine(server, traveller);
                    self.schedule(self.now, event);
                }
            }
            Route::Line(line) => {
                let edge = self.topology.lines[line].edge.into();
                if self.hop(core, &mut traveller) && self.hop(edge, &mut traveller) {
                    self.carry(line, false, traveller);
                }
            }
            Route::Nowhere => self.report(traveller, What::Error { reporter: core }),
        }
    }

    fn at_machine(&mut self, machine: usize, traveller: Traveller) -> Option<Arrival> {
        let sockets = &self.topology.machines[machine].sockets;
        let packet = &traveller.packet;
        let any: IpAddr = match packet.destination {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
        };
        let candidates = [packet.destination, SocketAddr::new(any, packet.destination.port())];
        let socket = candidates.into_iter().find(|socket| sockets.contains(&(packet.protocol, *socket)));
        let host = HostId(machine);
        match socket {
            Some(socket) => {
                self.show(|| format!("host {machine}"), "receives", &traveller);
                Some(Arrival { host, socket, what: What::Packet(traveller.packet) })
            }
            None => {
                self.show(|| format!("host {machine}"), "has no socket for", &traveller);
                let what = if packet.protocol == Protocol::Echo {
                    What::EchoReply
                } else {
                    What::Error { reporter: packet.destination.ip() }
                };
                self.report(traveller, what);
                None
            }
        }
    }

    /// Takes one from the TTL at a router that only routes.
    fn hop(&mut self, router: IpAddr, traveller: &mut Traveller) -> bool {
        let verdict = super::gateway::pass(&mut traveller.packet);
        if verdict != Verdict::Forward {
            self.show(|| router.to_string(), told(verdict, "forwards"), traveller);
        }
        self.settle(verdict, router, traveller)
    }

    /// Sees to it that the sender hears of what did not go on.
    fn settle(&mut self, verdict: Verdict, reporter: IpAddr, traveller: &Traveller) -> bool {
        match verdict {
            Verdict::Forward => return true,
            Verdict::Drop => {}
            Verdict::Expired | Verdict::Unreachable => {
                self.report(traveller.clone(), What::Error { reporter });
            }
            Verdict::Echoed => self.report(traveller.clone(), What::EchoReply),
        }
        false
    }

    fn report(&mut self, traveller: Traveller, what: What) {
        // Back the way it came, which took as long.
        let at = self.now + (self.now - traveller.sent);
        self.schedule(at, Event::Report(traveller.host, traveller.socket, what));
    }

    fn carry(&mut self, line: usize, up: bool, traveller: Traveller) {
        let access = &mut self.topology.lines[line];
        let direction: &mut Line = if up { &mut access.up } else { &mut access.down };
        // IPv4 and UDP headers; an IPv6 one is 20 longer, which no line cares about.
        let length = traveller.packet.payload.len() + 28;
        let event = if up { Event::Edge } else { Event::Site };
        match direction.carry(length, self.now) {
            Fate::Lost => self.show(|| format!("line {}", line + 1), "loses", &traveller),
            Fate::Arrives(at) => self.schedule(at, event(line, traveller)),
            Fate::ArrivesTwice(at) => {
                self.schedule(at, event(line, traveller.clone()));
                self.schedule(at, event(line, traveller));
            }
        }
    }

    fn schedule(&mut self, at: Instant, event: Event) {
        self.number += 1;
        self.queue.push(Due { at, number: self.number, event });
    }

    fn name(&self, router: usize) -> String {
        let of = |place: &super::topology::Place| place.outermost == router;
        match self.topology.places.iter().position(of) {
            Some(place) => format!("outermost router of site {}", place + 1),
            None => format!("router {}", self.topology.nodes[router].wan),
        }
    }

    fn show(&self, place: impl FnOnce() -> String, what: &'static str, traveller: &Traveller) {
        if let Some(observer) = &self.observer {
            let step = Step { at: self.now, place: &place(), what, packet: &traveller.packet };
            observer.borrow_mut()(&step);
        }
    }
}

fn told(verdict: Verdict, forwarded: &'static str) -> &'static str {
    match verdict {
        Verdict::Forward => forwarded,
        Verdict::Drop => "drops",
        Verdict::Expired => "ends the TTL of",
        Verdict::Unreachable => "has nobody for",
        Verdict::Echoed => "answers",
    }
}
