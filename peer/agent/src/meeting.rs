//! Meetings: rounds of checks that both sides prepare and the server starts.
//!
//! Plain checks fail where a NAT must have sent before the other side's first packet arrives (a router that accepts stray packets for itself remembers
//! them, and then gives our own flow another port), and where every destination sees another port. At a meeting each side takes fresh sockets, foretells
//! the addresses that they will be seen at, its *doors*, and offers them through the server. Once it has the other side's doors it *primes*: it
//! sends to them with a hop limit that opens its own NAT and reaches no further. When the server has heard from both that they are primed, it says go,
//! and both knock.
//!
//! Three kinds of side can foretell their doors:
//!
//! - *steady*, with endpoint-independent mapping or no NAT: one socket, one door, which the server has seen;
//! - *sequential*: sixteen sockets, one flow each, which will get the next ports of a sequence that the server has just seen a bit of. Other flows of
//!   the household may take some of these ports, so more doors than flows are offered;
//! - *preserving*: a few sockets, one flow each, which will be seen at their own ports, since nothing else has these.
//!
//! A steady side knocks at all doors from its one. The flows of the others go one to each door, in order, since each begins a mapping: the n-th
//! mapping of one side must aim at the n-th of the other. Every second one aims a little further, in case the ports have been shifted meanwhile.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use rendezvous_wire::candidate::{Mapping, PortAllocation, is_probeable};
use rendezvous_wire::message::{MAX_DOORS, MeetingNumber, OFFER_LIFETIME};
use rendezvous_wire::stun::TransactionId;

use crate::prediction::Sequence;

/// Flows of a sequential side.
const SEQUENTIAL_FLOWS: usize = 16;

/// Flows of a preserving side: the first will do unless the other side is a sequential one with a busy household.
const PRESERVING_FLOWS: usize = 8;

/// Sockets from which a sequential side asks for the state of its sequence, each at two ports: the smallest of three steps is the step.
const SAMPLERS: usize = 2;

/// Most sockets of one meeting.
pub(crate) const MAX_SLOTS: usize = SEQUENTIAL_FLOWS + SAMPLERS;

/// Head start of the plain checks, which are over in one round trip where they can work at all.
const START: Duration = Duration::from_millis(300);

/// Rest before each meeting; after the last there is no other. A meeting takes three round trips to the server and one to the other side, so
/// there are four in the first few seconds.
const RESTS: [Duration; 8] = [
    START,
    Duration::from_millis(200),
    Duration::from_millis(200),
    Duration::from_millis(400),
    Duration::from_secs(8),
    Duration::from_secs(16),
    Duration::from_secs(32),
    Duration::from_secs(64),
];

/// Between two requests to a reflector: RFC 8489, 6.2.1, has 500 ms at first; this is one of four requests, and the meeting waits for it.
const RTO: Duration = Duration::from_millis(250);

/// How long a meeting's steps may take: to measure, to hear of the other side's doors (for as long as the server keeps ours, and the way there and back), to hear
/// that it is primed.
const MEASURE: Duration = Duration::from_millis(1000);
const OFFER: Duration = OFFER_LIFETIME.saturating_add(Duration::from_millis(500));
const PRIME: Duration = Duration::from_millis(1500);

/// When to knock, counted from the go; after the last the meeting is over. As in a volley, the first may be lost, or come too soon.
const KNOCKS: [Duration; 3] = [Duration::ZERO, Duration::from_millis(100), Duration::from_millis(250)];

/// How long a door that was knocked at stays open for the other side's late knock.
const LINGER: Duration = Duration::from_millis(350);

/// Hop limits for priming, by meeting: past one's own router and a carrier's, and not as far as the other side's. 3 passes two routers and dies
/// behind them; 2 is for two homes behind the same carrier, 4 for a home with one more router in it.
const PRIMING_TTL: [u8; 4] = [3, 2, 3, 4];

/// How far off its place every second flow may aim: other flows of either household may have shifted the ports.
const SHIFT: usize = 3;

/// What its owner is to do. Slots are sockets, from 0 to [`MAX_SLOTS`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Act {
    Open(usize),
    /// Send a plain Binding request to a reflector.
    Ask(usize, SocketAddr, TransactionId),
    Offer(Vec<SocketAddr>),
    /// Send a check, with this hop limit if there is one.
    Check(usize, SocketAddr, Option<u8>),
    Primed(MeetingNumber),
    Close(usize),
}

/// How one side's doors are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Steady,
    Sequential,
    Preserving,
}

#[derive(Debug)]
enum Stage {
    Resting,
    Measuring,
    Offered,
    Primed(MeetingNumber),
    /// Since when, and how many knocks are done.
    Knocking(Instant, usize),
    /// No more meetings.
    Over,
}

/// A Binding request and its answer.
#[derive(Debug)]
struct Sample {
    slot: usize,
    to: SocketAddr,
    transactions: Vec<TransactionId>,
    mapped: Option<SocketAddr>,
}

/// The meetings of one introduction.
#[derive(Debug)]
pub(crate) struct Meetings {
    kind: Kind,
    /// The other side's flows are seen at one address each as well.
    reflectors: Vec<SocketAddr>,
    /// Our IPv4 address as servers see it.
    public: IpAddr,
    random: StdRng,
    /// Meetings begun.
    attempts: usize,
    /// The furthest that any has come.
    progress: Progress,
    stage: Stage,
    /// When the stage is over, or its next step due.
    next: Instant,
    /// The beginning of the meeting.
    begun: Instant,
    /// The end of a measurement, which repeats its requests before.
    give_up: Instant,
    /// The local port of every open socket, where it is known.
    slots: Vec<Option<u16>>,
    samples: Vec<Sample>,
    /// Where each flow goes.
    aims: Vec<(usize, SocketAddr)>,
    acts: VecDeque<Act>,
}

/// How far meetings have come: the answer to "why did it not help?"
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Progress {
    /// None was needed yet.
    NotBegun,
    /// Our own doors could not be foretold: no reflector answered, or the ports were in no order.
    Unmeasured,
    /// The other side did not come.
    Alone,
    /// The other side came, and did not say that it was primed.
    HalfPrimed,
    /// Both knocked.
    Knocked,
}

impl Meetings {
    /// `None` where they are of no use: one side cannot foretell its doors. `public` is our IPv4 address as servers see it; `reflectors` are UDP
    /// addresses of a STUN server, the last of which counts for steady sides.
    pub(crate) fn new(
        (local, remote): (Mapping, Mapping),
        public: IpAddr,
        reflectors: Vec<SocketAddr>,
        seed: u64,
        now: Instant,
    ) -> Option<Self> {
        let kind = match local {
            Mapping::AddressAndPortDependent(PortAllocation::Random) => return None,
            Mapping::AddressAndPortDependent(PortAllocation::Sequential) => Kind::Sequential,
            Mapping::AddressAndPortDependent(PortAllocation::Preserving) => Kind::Preserving,
            Mapping::EndpointIndependent | Mapping::Unknown => Kind::Steady,
        };
        let reflectors: Vec<SocketAddr> = reflectors.into_iter().filter(SocketAddr::is_ipv4).collect();
        if !remote.is_predictable() || reflectors.is_empty() || !public.is_ipv4() {
            return None;
        }
        Some(Self {
            kind,
            reflectors,
            public,
            random: StdRng::seed_from_u64(seed),
            attempts: 0,
            progress: Progress::NotBegun,
            stage: Stage::Resting,
            next: now + START,
            begun: now,
            give_up: now,
            slots: Vec::new(),
            samples: Vec::new(),
            aims: Vec::new(),
            acts: VecDeque::new(),
        })
    }

    /// Whether ports have to be foretold, which is more than to prime.
    pub(crate) fn predicts(&self, remote: Mapping) -> bool {
        self.kind != Kind::Steady || remote.is_port_dependent()
    }

    pub(crate) fn attempts(&self) -> usize {
        self.attempts
    }

    pub(crate) fn progress(&self) -> Progress {
        self.progress
    }

    /// When [`poll`](Self::poll) has something to do next; `None`: never again.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        (!matches!(self.stage, Stage::Over)).then_some(self.next)
    }

    /// The next thing to do.
    pub(crate) fn poll(&mut self, now: Instant) -> Option<Act> {
        while self.acts.is_empty() && !matches!(self.stage, Stage::Over) && self.next <= now {
            self.step(now);
        }
        self.acts.pop_front()
    }

    /// What is left to do from before, whatever the time.
    pub(crate) fn poll_left(&mut self) -> Option<Act> {
        self.acts.pop_front()
    }

    /// A direct path was found, or lost: the running meeting ends, and the next is the first again.
    pub(crate) fn restart(&mut self, now: Instant) {
        self.close();
        self.attempts = 0;
        self.stage = Stage::Resting;
        self.next = now + START;
    }

    /// The socket of a slot is open.
    pub(crate) fn handle_opened(&mut self, slot: usize, port: u16) {
        if let Some(known) = self.slots.get_mut(slot) {
            *known = Some(port);
        }
        if matches!(self.stage, Stage::Measuring) && self.kind == Kind::Preserving && self.is_open() {
            self.next = self.begun;
        }
    }

    /// Takes the answer to a Binding request. False: to none of ours.
    pub(crate) fn handle_mapped(
        &mut self,
        source: SocketAddr,
        transaction: TransactionId,
        mapped: SocketAddr,
        now: Instant,
    ) -> bool {
        let own = |sample: &&mut Sample| sample.to == source && sample.transactions.contains(&transaction);
        let Some(sample) = self.samples.iter_mut().find(own) else { return false };
        sample.mapped = Some(mapped);
        if matches!(self.stage, Stage::Measuring) && self.samples.iter().all(|sample| sample.mapped.is_some())
        {
            self.offer(now);
        }
        true
    }

    /// The other side's doors. Whatever they are, each gets a few small packets at most.
    pub(crate) fn handle_doors(&mut self, number: MeetingNumber, doors: &[SocketAddr], now: Instant) {
        if !matches!(self.stage, Stage::Offered) {
            return;
        }
        self.aims = self.aim(&doors[..doors.len().min(MAX_DOORS)]);
        let ttl = PRIMING_TTL[(self.attempts - 1) % PRIMING_TTL.len()];
        self.acts.extend(self.aims.iter().map(|(slot, door)| Act::Check(*slot, *door, Some(ttl))));
        self.acts.push_back(Act::Primed(number));
        self.progress = self.progress.max(Progress::HalfPrimed);
        self.stage = Stage::Primed(number);
        self.next = now + PRIME;
    }

    /// Both sides are primed.
    pub(crate) fn handle_go(&mut self, number: MeetingNumber, now: Instant) {
        if matches!(self.stage, Stage::Primed(own) if own == number) {
            self.progress = Progress::Knocked;
            self.stage = Stage::Knocking(now, 0);
            self.next = now;
        }
    }

    /// Where each flow goes.
    fn aim(&mut self, doors: &[SocketAddr]) -> Vec<(usize, SocketAddr)> {
        let aim = |random: &mut StdRng, flow: usize| match doors {
            [door] => Some((flow, *door)),
            doors => {
                let shift = if flow % 2 == 1 { random.random_range(0..=SHIFT) } else { 0 };
                doors.get(flow + shift).map(|door| (flow, *door))
            }
        };
        let mut aims: Vec<(usize, SocketAddr)> = match self.kind {
            Kind::Steady => doors.iter().map(|door| (0, *door)).collect(),
            Kind::Sequential | Kind::Preserving => {
                (0..self.flows()).filter_map(|flow| aim(&mut self.random, flow)).collect()
            }
        };
        aims.retain(|(_, door)| door.is_ipv4() && is_probeable(*door));
        aims
    }

    /// Whether the ports of all sockets are known.
    fn is_open(&self) -> bool {
        self.slots.iter().all(Option::is_some)
    }

    fn flows(&self) -> usize {
        match self.kind {
            Kind::Steady => 1,
            Kind::Sequential => SEQUENTIAL_FLOWS,
            Kind::Preserving => PRESERVING_FLOWS,
        }
    }

    fn step(&mut self, now: Instant) {
        match self.stage {
            Stage::Resting => self.begin(now),
            Stage::Measuring if now >= self.give_up => {
                self.progress = self.progress.max(Progress::Unmeasured);
                self.rest(now);
            }
            Stage::Measuring if self.kind == Kind::Preserving && self.is_open() => self.offer(now),
            Stage::Measuring if self.kind == Kind::Preserving => self.next = self.give_up,
            Stage::Measuring => self.ask(now),
            Stage::Offered => {
                self.progress = self.progress.max(Progress::Alone);
                self.rest(now);
            }
            Stage::Primed(_) => self.rest(now),
            Stage::Knocking(since, done) => self.knock(since, done, now),
            Stage::Over => {}
        }
    }

    fn begin(&mut self, now: Instant) {
        self.attempts += 1;
        let flows = self.flows();
        let (samplers, reflectors): (_, &[SocketAddr]) = match self.kind {
            Kind::Steady => (0..1, &self.reflectors[..1]),
            Kind::Sequential => (flows..flows + SAMPLERS, &self.reflectors),
            Kind::Preserving => (0..0, &[]),
        };
        self.slots = vec![None; flows.max(samplers.end)];
        self.acts.extend((0..self.slots.len()).map(Act::Open));
        let sample = |slot, to: &SocketAddr| Sample { slot, to: *to, transactions: Vec::new(), mapped: None };
        self.samples = samplers.flat_map(|slot| reflectors.iter().map(move |to| sample(slot, to))).collect();
        self.stage = Stage::Measuring;
        self.begun = now;
        self.give_up = now + MEASURE;
        self.next = now;
    }

    fn ask(&mut self, now: Instant) {
        for sample in self.samples.iter_mut().filter(|sample| sample.mapped.is_none()) {
            let transaction = TransactionId(self.random.random());
            sample.transactions.push(transaction);
            self.acts.push_back(Act::Ask(sample.slot, sample.to, transaction));
        }
        self.next = (now + RTO).min(self.give_up);
    }

    /// Foretells our doors and offers them.
    fn offer(&mut self, now: Instant) {
        let doors: Vec<SocketAddr> = match self.kind {
            Kind::Steady => self.samples.iter().filter_map(|sample| sample.mapped).collect(),
            Kind::Sequential => {
                let seen: Vec<_> = self.samples.iter().filter_map(|sample| sample.mapped).collect();
                let ports: Vec<u16> = seen.iter().map(SocketAddr::port).collect();
                let ip = seen.last().map_or(self.public, SocketAddr::ip);
                let coming = Sequence::of(&ports).into_iter().flat_map(Sequence::coming);
                coming.take(MAX_DOORS).map(|port| SocketAddr::new(ip, port)).collect()
            }
            Kind::Preserving => {
                self.slots.iter().flatten().map(|port| SocketAddr::new(self.public, *port)).collect()
            }
        };
        let complete = self.kind == Kind::Steady || doors.len() >= self.flows();
        if doors.is_empty() || !complete {
            self.progress = self.progress.max(Progress::Unmeasured);
            self.rest(now);
            return;
        }
        self.acts.push_back(Act::Offer(doors));
        self.stage = Stage::Offered;
        self.next = now + OFFER;
    }

    fn knock(&mut self, since: Instant, done: usize, now: Instant) {
        if done == KNOCKS.len() {
            self.rest(now);
            return;
        }
        self.acts.extend(self.aims.iter().map(|(slot, door)| Act::Check(*slot, *door, None)));
        self.stage = Stage::Knocking(since, done + 1);
        self.next = since + KNOCKS.get(done + 1).copied().unwrap_or(KNOCKS[done] + LINGER);
    }

    fn rest(&mut self, now: Instant) {
        self.close();
        match RESTS.get(self.attempts) {
            Some(rest) => {
                self.stage = Stage::Resting;
                self.next = now + *rest;
            }
            None => self.stage = Stage::Over,
        }
    }

    fn close(&mut self) {
        self.acts.clear();
        self.acts.extend((0..self.slots.len()).map(Act::Close));
        self.slots.clear();
        self.samples.clear();
        self.aims.clear();
    }
}

#[cfg(test)]
#[path = "meeting_tests.rs"]
mod tests;
