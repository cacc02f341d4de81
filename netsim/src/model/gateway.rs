//! One router: what it translates, filters, remembers and answers. Pure.
//!
//! It works as the lab's routers do, which are Linux: flows are tracked, and translation is decided once per flow. Where filtering is weaker than by
//! address and port, bindings are kept beside the flows, as the lab keeps them in nftables maps.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use rand::Rng;
use rand::rngs::StdRng;
use rustc_hash::FxHashMap;

use super::conntrack::{Conntrack, Tuple};
use super::packet::{Packet, Protocol};
use crate::router::{Egress, Filtering, InputPolicy, Mapping, PortAllocation, Router};

/// How long a binding outlives its last outbound packet (RFC 4787, REQ-5), where it is kept beside the flows.
const BINDING_LIFETIME: Duration = Duration::from_secs(120);

/// Lowest port that is given away, as in the kernel for source ports that are not privileged themselves.
const FIRST_PORT: u16 = 1024;

/// How many ports the kernel tries for a flow before it gives up (`NF_NAT_MAX_ATTEMPTS`).
const ATTEMPTS: u16 = 128;

/// What becomes of a packet at a router. It has been rewritten where it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It goes on.
    Forward,
    /// It is gone.
    Drop,
    /// Its TTL has ended here; ICMP says so.
    Expired,
    /// ICMP port unreachable goes back.
    Unreachable,
    /// An echo reply goes back.
    Echoed,
}

/// A binding kept beside the flows.
#[derive(Debug)]
struct Binding {
    inside: SocketAddr,
    expires: Instant,
    contacts: FxHashMap<IpAddr, Instant>,
}

/// A router at work.
#[derive(Debug)]
pub(super) struct Gateway {
    router: Router,
    wan: Ipv4Addr,
    conntrack: Conntrack,
    /// By reflexive port. Only of UDP.
    bindings: FxHashMap<u16, Binding>,
    /// Which reflexive port an inside endpoint has, with endpoint-independent mapping.
    reflexive: FxHashMap<SocketAddr, u16>,
    /// How many ports of the sequence have been given.
    sequence: usize,
}

impl Gateway {
    pub(super) fn new(router: Router, wan: Ipv4Addr) -> Self {
        let conntrack = Conntrack::new(router.binding_lifetime);
        Self {
            router,
            wan,
            conntrack,
            bindings: FxHashMap::default(),
            reflexive: FxHashMap::default(),
            sequence: 0,
        }
    }

    /// How many flows it remembers.
    pub(super) fn flows(&mut self, now: Instant) -> usize {
        self.conntrack.count(now)
    }

    /// A packet from inside on its way out.
    pub(super) fn outbound(&mut self, packet: &mut Packet, random: &mut StdRng, now: Instant) -> Verdict {
        if self.router.filtering.is_none() {
            return pass(packet);
        }
        let tuple = Tuple::of(packet);
        if let Some(found) = self.conntrack.track(tuple, now) {
            let verdict = pass(packet);
            if verdict == Verdict::Forward {
                (packet.source, packet.destination) = (found.source, found.destination);
                self.renew(tuple.source, packet, now);
            }
            return verdict;
        }
        if packet.ttl <= 1 {
            return Verdict::Expired;
        }
        if !self.may_leave(packet) || self.is_full(now) {
            return Verdict::Drop;
        }
        let translated = self.router.mapping.is_some() && packet.source.is_ipv4();
        let source = match self.router.mapping.filter(|_| translated) {
            None => packet.source,
            Some(mapping) => match self.choose(mapping, tuple, random, now) {
                Some(port) => SocketAddr::new(self.wan.into(), port),
                None => return Verdict::Drop,
            },
        };
        let onward = Tuple { source, ..tuple };
        if !self.conntrack.insert(tuple, onward.inverse(), now) {
            return Verdict::Drop;
        }
        packet.source = source;
        self.renew(tuple.source, packet, now);
        pass(packet)
    }

    /// A packet from outside.
    pub(super) fn inbound(&mut self, packet: &mut Packet, now: Instant) -> Verdict {
        let for_us = packet.destination.ip() == self.wan;
        if self.router.filtering.is_none() {
            return if for_us { answer(packet) } else { pass(packet) };
        }
        if packet.protocol == Protocol::Echo && for_us {
            return self.input(packet);
        }
        if let Some(verdict) = self.expected(packet, now) {
            return verdict;
        }
        if !for_us {
            return if packet.ttl <= 1 { Verdict::Expired } else { Verdict::Drop };
        }
        let tuple = Tuple::of(packet);
        if self.router.input == InputPolicy::Accept && packet.protocol == Protocol::Udp {
            // The kernel remembers what it has accepted. This is what costs our own flow its port.
            self.conntrack.insert(tuple, tuple.inverse(), now);
        }
        self.input(packet)
    }

    /// A packet of its own that it has just sent to itself (RFC 4787, section 6).
    pub(super) fn loop_back(&mut self, packet: &mut Packet, now: Instant) -> Verdict {
        self.expected(packet, now).unwrap_or(Verdict::Drop)
    }

    /// What becomes of a packet from outside that belongs to a flow, or is for a bound port; `None` for all others.
    fn expected(&mut self, packet: &mut Packet, now: Instant) -> Option<Verdict> {
        let tuple = Tuple::of(packet);
        let inside = if let Some(found) = self.conntrack.track(tuple, now) {
            if found.destination.ip() == self.wan {
                // A flow that the router itself has accepted: nobody listens.
                return Some(Verdict::Unreachable);
            }
            found.destination
        } else {
            let Some(inside) = self.bound(tuple, now)? else {
                // Kept out, and kept from the router's own stack.
                let silent = self.router.input == InputPolicy::Drop;
                return Some(if silent { Verdict::Drop } else { Verdict::Unreachable });
            };
            if packet.ttl <= 1 {
                return Some(Verdict::Expired);
            }
            // What goes back is a flow of this one, except where each destination has a mapping of its own: filtering lets a packet in, and makes none.
            if self.router.mapping == Some(Mapping::EndpointIndependent) {
                let onward = Tuple { destination: inside, ..tuple };
                if self.is_full(now) || !self.conntrack.insert(tuple, onward.inverse(), now) {
                    return Some(Verdict::Drop);
                }
            }
            inside
        };
        let verdict = pass(packet);
        if verdict == Verdict::Forward {
            packet.destination = inside;
        }
        Some(verdict)
    }

    /// A packet for nobody inside.
    fn input(&self, packet: &Packet) -> Verdict {
        match self.router.input {
            InputPolicy::Drop => Verdict::Drop,
            InputPolicy::Reject => Verdict::Unreachable,
            InputPolicy::Accept => answer(packet),
        }
    }

    fn may_leave(&self, packet: &Packet) -> bool {
        match self.router.egress {
            Egress::All => true,
            Egress::Web => packet.protocol == Protocol::Tcp && matches!(packet.destination.port(), 80 | 443),
        }
    }

    fn is_full(&mut self, now: Instant) -> bool {
        self.router.most_flows.is_some_and(|most| self.conntrack.holds_as_many(most, now))
    }

    fn keeps_bindings(&self, protocol: Protocol) -> bool {
        protocol == Protocol::Udp && self.router.filtering != Some(Filtering::AddressAndPortDependent)
    }

    /// The reflexive port of a new flow; `None` when the kernel would find none.
    fn choose(&mut self, mapping: Mapping, tuple: Tuple, random: &mut StdRng, now: Instant) -> Option<u16> {
        let own = tuple.source.port();
        match mapping {
            Mapping::EndpointIndependent if self.keeps_bindings(tuple.protocol) => {
                let known = self.reflexive.get(&tuple.source).copied();
                let known =
                    known.filter(|port| self.bindings.get(port).is_some_and(|binding| binding.expires > now));
                if let Some(port) = known {
                    // Its own port toward everybody, or nothing.
                    return self.is_free(tuple, port, now).then_some(port);
                }
                let taken = self.is_bound(own, now) || !self.is_free(tuple, own, now);
                if taken { self.any(tuple, random, now) } else { Some(own) }
            }
            Mapping::EndpointIndependent => {
                // As MASQUERADE: what the endpoint's latest flow has got, then its own, then any.
                let latest =
                    self.conntrack.latest(tuple.protocol, tuple.source, now).map(|address| address.port());
                let tries = latest.into_iter().chain([own]);
                let kept = tries.into_iter().find(|port| self.is_free(tuple, *port, now));
                kept.or_else(|| self.any(tuple, random, now))
            }
            Mapping::AddressDependent => unreachable!("refused when the site was configured"),
            Mapping::AddressAndPortDependent => match self.router.allocation {
                PortAllocation::Random => self.any(tuple, random, now),
                PortAllocation::Sequential { step } => self.next_in_sequence(tuple, step, now),
                PortAllocation::Preserving => {
                    let taken =
                        self.conntrack.holds(tuple.protocol, own, now) || !self.is_free(tuple, own, now);
                    if taken { self.any(tuple, random, now) } else { Some(own) }
                }
            },
        }
    }

    /// The next port of the sequence that all flows share. The kernel does not look further when it is taken.
    fn next_in_sequence(&mut self, tuple: Tuple, step: u16, now: Instant) -> Option<u16> {
        let mut ports = PortAllocation::sequence(step);
        let place = self.sequence % ports.len();
        self.sequence += 1;
        let port = ports.nth(place)?;
        self.is_free(tuple, port, now).then_some(port)
    }

    /// Whether a flow from this reflexive port would be told from all others.
    fn is_free(&mut self, tuple: Tuple, port: u16, now: Instant) -> bool {
        let source = SocketAddr::new(self.wan.into(), port);
        !self.conntrack.is_used(Tuple { source, ..tuple }.inverse(), now)
    }

    fn is_bound(&self, port: u16, now: Instant) -> bool {
        self.bindings.get(&port).is_some_and(|binding| binding.expires > now)
    }

    /// Where a packet for a bound port goes: `None` if the port is not bound, `Some(None)` if filtering keeps it out.
    fn bound(&self, tuple: Tuple, now: Instant) -> Option<Option<SocketAddr>> {
        if !self.keeps_bindings(tuple.protocol) {
            return None;
        }
        let binding = self.bindings.get(&tuple.destination.port()).filter(|binding| binding.expires > now)?;
        let contacted = || binding.contacts.get(&tuple.source.ip()).is_some_and(|until| *until > now);
        let admitted = self.router.filtering == Some(Filtering::EndpointIndependent) || contacted();
        Some(admitted.then_some(binding.inside))
    }

    /// An outbound packet keeps its binding alive, and its destination among the contacts.
    fn renew(&mut self, inside: SocketAddr, leaving: &Packet, now: Instant) {
        if !self.keeps_bindings(leaving.protocol) || leaving.source.ip() != self.wan {
            return;
        }
        let port = leaving.source.port();
        let expires = now + self.router.binding_lifetime.unwrap_or(BINDING_LIFETIME);
        let fresh = || Binding { inside, expires, contacts: FxHashMap::default() };
        let binding = self.bindings.entry(port).or_insert_with(fresh);
        if binding.inside != inside {
            *binding = fresh();
        }
        binding.expires = expires;
        binding.contacts.insert(leaving.destination.ip(), expires);
        self.reflexive.insert(inside, port);
    }

    /// A random port, or one of those after it.
    fn any(&mut self, tuple: Tuple, random: &mut StdRng, now: Instant) -> Option<u16> {
        let range = u16::MAX - FIRST_PORT + 1;
        let offset = random.random_range(0..range);
        let keeps_bindings = self.keeps_bindings(tuple.protocol);
        (0..ATTEMPTS)
            .map(|attempt| FIRST_PORT + ((u32::from(offset) + u32::from(attempt)) % u32::from(range)) as u16)
            .find(|port| self.is_free(tuple, *port, now) && !(keeps_bindings && self.is_bound(*port, now)))
    }
}

/// Takes one from the TTL.
pub(super) fn pass(packet: &mut Packet) -> Verdict {
    if packet.ttl <= 1 {
        return Verdict::Expired;
    }
    packet.ttl -= 1;
    Verdict::Forward
}

/// What a router's own stack says, on which nobody listens.
fn answer(packet: &Packet) -> Verdict {
    if packet.protocol == Protocol::Echo { Verdict::Echoed } else { Verdict::Unreachable }
}
