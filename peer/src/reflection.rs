//! What a rendezvous server's reflection tells a peer: the addresses its sockets are mapped to, how its NAT maps, and that
//! the relay knows where to find it. Pure: time, randomness and packets come from outside.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use peer_agent::prediction;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use rendezvous_wire::candidate::Mapping;
use rendezvous_wire::message::RegistrationId;
use rendezvous_wire::stun::{self, BindRequest, Class, Key, Received, StunError, TransactionId};

use crate::keep_alive::SAFE;
use crate::socket::SocketIndex;

/// First retransmission timeout. RFC 8489 6.2.1 suggests 500 ms for a path of unknown RTT; there are at most a handful of these
/// requests in 15 s and the relay waits for one, so we ask again sooner.
const RTO: Duration = Duration::from_millis(250);

/// Requests of one transaction round (RFC 8489 6.2.1, Rc).
const MAX_REQUESTS: u32 = 7;

/// Where a request goes and what it is for.
#[derive(Debug)]
struct Probe {
    socket: SocketIndex,
    destination: SocketAddr,
    /// Binds the registration's address at the relay, besides.
    bind: bool,
    /// Outstanding transactions of this round: an answer to an earlier copy counts.
    outstanding: Vec<TransactionId>,
    /// How many of these were sent before their time.
    hurried: usize,
    next: Instant,
    mapped: Option<SocketAddr>,
    /// Where it was mapped to first, in this network. All flows began together, so these tell how the NAT maps; a flow that was forgotten and has begun
    /// anew shows a port of another time.
    first: Option<SocketAddr>,
    unanswered_rounds: u32,
}

/// A datagram to send.
#[derive(Debug, PartialEq, Eq)]
pub struct ProbeTransmit {
    /// From which socket, by its owner's number.
    pub socket: SocketIndex,
    /// Where to.
    pub destination: SocketAddr,
    /// A STUN message.
    pub datagram: Vec<u8>,
}

/// The reflection client of one registration.
#[derive(Debug)]
pub struct Reflection {
    registration: RegistrationId,
    key: Key,
    sequence: u64,
    probes: Vec<Probe>,
    random: StdRng,
    /// The port that the socket is bound to whose mapping is judged.
    local_port: u16,
    /// What the signalling connection's source looked like to the server, in this network.
    observed: Option<SocketAddr>,
    /// When the relay has answered a bind request last.
    answered: Option<Instant>,
    /// The relay has answered that it does not know the registration.
    disowned: bool,
    /// Longest pause between two requests to the same destination while all is well.
    keep_alive: Duration,
    /// The binding of the signalling connection, when that is renewed here.
    signalling: Option<(SocketIndex, SocketAddr)>,
    renewed: Instant,
}

impl Reflection {
    /// `local_port` is that of the IPv4 socket if there are destinations of IPv4; `observed` is where the server saw signalling come from. Binds through the first of `destinations`, which is on the relay's port and of the signalling connection's
    /// family; asks the others only to learn mappings. Bind requests count on from `sequence`.
    ///
    /// # Errors
    ///
    /// When STUN does not allow the key.
    pub fn new(
        registration: RegistrationId,
        key: &str,
        (observed, local_port): (SocketAddr, u16),
        destinations: &[(SocketIndex, SocketAddr)],
        sequence: u64,
        seed: u64,
        now: Instant,
    ) -> Result<Self, StunError> {
        let probes = destinations.iter().enumerate().map(|(index, (socket, destination))| Probe {
            socket: *socket,
            destination: *destination,
            bind: index == 0,
            outstanding: Vec::new(),
            hurried: 0,
            next: now,
            mapped: None,
            first: None,
            unanswered_rounds: 0,
        });
        Ok(Self {
            registration,
            key: Key::new(key)?,
            sequence,
            probes: probes.collect(),
            random: StdRng::seed_from_u64(seed),
            local_port,
            observed: Some(observed),
            answered: None,
            disowned: false,
            keep_alive: SAFE,
            signalling: None,
            renewed: now,
        })
    }

    /// Takes another pause between keep-alives. Under the safe one, which the signalling connection has as well, its binding toward
    /// `signalling` is renewed from here.
    pub(crate) fn set_keep_alive(&mut self, interval: Duration, signalling: SocketAddr, now: Instant) {
        self.keep_alive = interval;
        self.signalling =
            self.probes.first().filter(|_| interval < SAFE).map(|probe| (probe.socket, signalling));
        for probe in &mut self.probes {
            probe.next = probe.next.min(now + interval);
        }
    }

    /// The machine is in another network: nothing that was seen holds, and the relay must hear of it at once.
    pub(crate) fn handle_network_change(&mut self, now: Instant) {
        self.observed = None;
        for probe in &mut self.probes {
            probe.mapped = None;
            probe.first = None;
        }
        self.ask_anew(now);
    }

    /// Asks every destination at once, as if nothing had been asked lately.
    pub(crate) fn ask_anew(&mut self, now: Instant) {
        for probe in &mut self.probes {
            probe.outstanding.clear();
            probe.next = now;
        }
    }

    /// Asks the relay now, besides.
    pub(crate) fn hurry(&mut self, now: Instant) {
        for probe in self.probes.iter_mut().filter(|probe| probe.bind) {
            // These alone do not end a round.
            let surplus = (probe.outstanding.len() + 1).saturating_sub(MAX_REQUESTS as usize);
            probe.outstanding.drain(..surplus);
            // At most so many that a full round is silence all the same.
            probe.hurried = (probe.hurried + 1).min(3);
            probe.next = now;
        }
    }

    /// Whether the relay has answered a bind request since then.
    pub(crate) fn has_answered_since(&self, moment: Instant) -> bool {
        self.answered.is_some_and(|answered| answered >= moment)
    }

    /// Where the relay saw us last.
    pub(crate) fn bound_at(&self) -> Option<SocketAddr> {
        self.probes.iter().find(|probe| probe.bind)?.mapped
    }

    /// Whether the relay knows the registration no longer: the server has been started anew, or the lease has lapsed. The answer cannot be
    /// authenticated, but only who sees our requests can forge it.
    pub fn is_disowned(&self) -> bool {
        self.disowned
    }

    /// When [`poll_transmit`](Self::poll_transmit) has something to send next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let signalling = self.signalling.map(|_| self.renewed + self.keep_alive);
        self.probes.iter().map(|probe| probe.next).chain(signalling).min()
    }

    /// The next datagram that is due.
    pub fn poll_transmit(&mut self, now: Instant) -> Option<ProbeTransmit> {
        let bound = self.is_bound();
        let Some(probe) = self.probes.iter_mut().find(|probe| probe.next <= now) else {
            return self.renew_signalling(now);
        };
        if probe.outstanding.len() as u32 >= MAX_REQUESTS {
            probe.outstanding.clear();
            probe.hurried = 0;
            probe.unanswered_rounds += 1;
            probe.mapped = None;
            self.observed = None;
        }
        let transaction = TransactionId(self.random.random());
        let datagram = if probe.bind {
            self.sequence += 1;
            let request = BindRequest { registration: self.registration, sequence: self.sequence };
            request.encode(transaction, &self.key)
        } else {
            stun::binding_request(transaction)
        };
        probe.outstanding.push(transaction);
        // 0.25, 0.5, 1, 2, then every 4 s until the round is over.
        let doubled = RTO * (1 << (probe.outstanding.len() - 1).min(4));
        probe.next = now
            + if bound && probe.unanswered_rounds > 0 {
                // The server answers, but not here: a port or a family that does not work. Should that change, a keep-alive tells.
                self.keep_alive
            } else {
                doubled.min(Duration::from_secs(4))
            };
        let (socket, destination) = (probe.socket, probe.destination);
        Some(ProbeTransmit { socket, destination, datagram: datagram.ok()? })
    }

    /// QUIC ignores what is no QUIC packet (RFC 9000, section 17.2), and a NAT does not look.
    fn renew_signalling(&mut self, now: Instant) -> Option<ProbeTransmit> {
        let (socket, destination) = self.signalling.filter(|_| self.renewed + self.keep_alive <= now)?;
        self.renewed = now;
        let datagram = stun::binding_indication(TransactionId(self.random.random())).ok()?;
        Some(ProbeTransmit { socket, destination, datagram })
    }

    /// Takes a STUN message. True when it answered one of ours.
    pub fn handle_response(&mut self, source: SocketAddr, message: &Received<'_>, now: Instant) -> bool {
        let transaction = message.transaction();
        let Some(probe) = self
            .probes
            .iter_mut()
            .find(|probe| probe.destination == source && probe.outstanding.contains(&transaction))
        else {
            return false;
        };
        if message.class() == Class::Error {
            self.disowned |= probe.bind && message.error_code() == Some(stun::error_code::UNAUTHENTICATED);
            return true;
        }
        // Only the relay's answer can be authenticated, so it must be.
        if message.class() != Class::Success || (probe.bind && !message.verify(&self.key)) {
            return false;
        }
        let Some(mapped) = message.mapped_address() else { return false };
        probe.mapped = Some(mapped);
        if probe.bind {
            self.answered = Some(now);
        }
        probe.unanswered_rounds = 0;
        probe.hurried = 0;
        probe.outstanding.clear();
        probe.next = now + self.keep_alive.mul_f64(self.random.random_range(0.9..1.0));
        let before = *probe.first.get_or_insert(mapped);
        if before.ip() != mapped.ip() {
            self.moved(source, mapped, now);
        }
        true
    }

    /// The sequence of the last bind request.
    pub(crate) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Whether the relay has let three bind requests in a row go unanswered, and the fourth is out: within two seconds that takes more than bad luck.
    pub(crate) fn is_unanswered(&self) -> bool {
        let silent =
            |probe: &Probe| probe.outstanding.len() > 3 + probe.hurried || probe.unanswered_rounds > 0;
        self.probes.iter().any(|probe| probe.bind && silent(probe))
    }

    /// The relay and the socket that is bound there, once it has answered.
    pub(crate) fn relay(&self) -> Option<(SocketIndex, SocketAddr)> {
        let bound = self.probes.iter().find(|probe| probe.bind && probe.mapped.is_some())?;
        Some((bound.socket, bound.destination))
    }

    /// One flow has another address than it had: another NAT, or none. All are asked at once how they begin there.
    fn moved(&mut self, destination: SocketAddr, mapped: SocketAddr, now: Instant) {
        self.observed = self.observed.filter(|observed| observed.is_ipv4() != mapped.is_ipv4());
        for probe in &mut self.probes {
            if probe.destination == destination {
                probe.first = Some(mapped);
            } else if probe.destination.is_ipv4() == destination.is_ipv4() {
                probe.first = None;
                probe.outstanding.clear();
                probe.next = now;
            }
        }
    }

    /// Whether the relay has answered a bind request: datagrams for us will come through.
    pub fn is_bound(&self) -> bool {
        self.probes.iter().any(|probe| probe.bind && probe.mapped.is_some())
    }

    /// Bound, and the mapping is known as well as it will soon be: every destination has answered, or has let a first request go unanswered.
    pub fn is_settled(&self) -> bool {
        let known = |probe: &Probe| {
            probe.mapped.is_some() || probe.outstanding.len() > 1 || probe.unanswered_rounds > 0
        };
        self.is_bound() && self.probes.iter().all(known)
    }

    /// Where it asks.
    pub fn destinations(&self) -> impl Iterator<Item = SocketAddr> {
        self.probes.iter().map(|probe| probe.destination)
    }

    /// The sockets' mapped addresses, each once.
    pub fn mapped(&self) -> Vec<(SocketIndex, SocketAddr)> {
        let mut all: Vec<_> =
            self.probes.iter().filter_map(|probe| Some((probe.socket, probe.mapped?))).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// The NAT's mapping behaviour, from at least two flows of one socket that began together. IPv4 speaks for the whole when it is
    /// there: IPv6 is hardly ever translated.
    pub fn mapping(&self) -> Mapping {
        let mut seen: BTreeMap<(bool, SocketIndex), Vec<SocketAddr>> = BTreeMap::new();
        for (index, probe) in self.probes.iter().enumerate() {
            if let Some(mapped) = probe.first {
                let views = seen.entry((mapped.is_ipv6(), probe.socket)).or_default();
                // Signalling came from the same socket to a third port of the same host, and came first.
                let observed = self.observed.filter(|observed| observed.is_ipv4() == mapped.is_ipv4());
                views.extend(observed.filter(|_| index == 0));
                views.push(mapped);
            }
        }
        match seen.into_values().find(|views| views.len() > 1) {
            None => Mapping::Unknown,
            Some(views) if views.iter().all(|view| *view == views[0]) => Mapping::EndpointIndependent,
            Some(views) => {
                let ports: Vec<u16> = views.iter().map(SocketAddr::port).collect();
                Mapping::AddressAndPortDependent(prediction::allocation(self.local_port, &ports))
            }
        }
    }
}

#[cfg(test)]
#[path = "reflection_tests.rs"]
mod tests;
