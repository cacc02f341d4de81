//! Birthday probing: how a side whose NAT takes a new port for every destination (*hard*: address-and-port-dependent mapping) meets one
//! whose NAT keeps its port but filters by port (*easy*). Pure; its owner has the sockets.
//!
//! The hard side opens many sockets and sends from each toward the easy side's one address: its NAT makes as many mappings, each open to the
//! easy side. The easy side probes ports of the hard side's address at random. A probe that meets one of the mappings arrives, and a check
//! from the socket behind it goes back through the door that the probe has opened. With M sockets and N probes the two meet with
//! a probability of 1 - (1 - M/64512)^N: 99.7 % with 512 and 740.
//!
//! What they cost. Each probe is a conntrack entry in the easy side's router for some 30 s, and that has taken whole homes off line; hence the budget. Each
//! socket is one in the hard side's.
//!
//! A router whose `INPUT` chain accepts (the kernel's default) remembers a stray packet as a flow of its own, and then keeps the port in it from its hosts. So
//! whatever goes all the way before there is a mapping for it does harm, on either side, and the order matters:
//!
//! - All sockets knock at once and [near](Reach::Near): the easy side's router hears nothing. They are open when the probes come, but for the first of these;
//!   a mapping that is made later cannot get a port that was probed.
//! - When the probes are through, some of the sockets knock [far](Reach::Far). Where a host is so deep inside that near knocks die before its NAT,
//!   they make the mappings, and each finds its door open with a probability of N/64512: 95 %. An easy side's router that accepts remembers these
//!   knocks as well, and there is no room for more of them beside the probes.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use rendezvous_wire::candidate::{Mapping, PortAllocation};

/// Sockets that the hard side opens. All at once: those that came after the probes would do nothing where the router remembers these.
pub const SOCKETS: usize = 512;

/// How many of them knock [far](Reach::Far) at last.
const FAR_SOCKETS: usize = 256;

/// Probes that the easy side sends in one attempt. With the hard side's far knocks, which may leave an entry each, and what signalling, relay and
/// checks need, they stay below the 1,024 entries that a small router can spare.
pub const PROBES: usize = 740;

/// Between two probes: they are through in 3 s.
pub const PROBE_INTERVAL: Duration = Duration::from_millis(4);

/// As much of a late wake-up is made up for by a burst: no more packets than a web page asks for.
const CATCH_UP: Duration = Duration::from_millis(40);

/// When, after the beginning, the hard side knocks far: the probes are through, and half a second is for skew and loss.
const TURN: Duration = Duration::from_millis(3500);

/// Between two sockets' knocks: 512 mappings in half a second.
const OPEN_INTERVAL: Duration = Duration::from_millis(1);

/// Between two checks of one socket: the first may be lost.
const REPEAT: Duration = Duration::from_millis(1500);

/// Head start of the ordinary checks, which are over in one round trip where they can work at all.
pub const START: Duration = Duration::from_millis(300);

/// The hard side keeps its sockets open this long: a second after its last knocks.
const ATTEMPT: Duration = Duration::from_secs(6);

/// From one attempt to the next. The entries of the last attempt must be gone first: Linux keeps an unanswered one for 30 s
/// (`nf_conntrack_udp_timeout`).
pub const ATTEMPT_INTERVAL: Duration = Duration::from_secs(40);

/// Attempts of one introduction. After that the two are on the relay for good.
const ATTEMPTS: u32 = 3;

/// Knocks from many sockets, one after the other.
struct Wave {
    /// Since the attempt's beginning.
    at: Duration,
    sockets: usize,
    reach: Reach,
}

const WAVES: [Wave; 4] = [
    Wave { at: Duration::ZERO, sockets: SOCKETS, reach: Reach::Near },
    Wave { at: REPEAT, sockets: SOCKETS, reach: Reach::Near },
    Wave { at: TURN, sockets: FAR_SOCKETS, reach: Reach::Far },
    Wave { at: TURN.saturating_add(REPEAT), sockets: FAR_SOCKETS, reach: Reach::Far },
];

/// Lowest port that is probed: NATs give the others to nobody (RFC 4787, REQ-3).
const FIRST_PORT: u16 = 1024;

/// Which part a side plays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Opens sockets.
    Hard,
    /// Probes ports.
    Easy,
}

impl Part {
    /// Ours, from both sides' mappings; `None` where birthday probing is of no use: where both keep their port the ordinary checks do, and where neither
    /// does it would take hours.
    pub fn of(local: Mapping, remote: Mapping) -> Option<Self> {
        use Mapping::{AddressAndPortDependent as Dependent, EndpointIndependent as Independent};
        match (local, remote) {
            (Dependent(PortAllocation::Random), Independent) => Some(Self::Hard),
            (Independent, Dependent(PortAllocation::Random)) => Some(Self::Easy),
            _ => None,
        }
    }
}

/// How far a knock is to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Through our own routers and no further: it makes a mapping. At the other side's router it could do nothing but harm: one that takes it
    /// for its own traffic gives the probe that would meet it another port.
    Near,
    /// All the way.
    Far,
}

/// What its owner is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Send a check from the ordinary socket to here.
    Probe(SocketAddr),
    /// Send a check from the extra socket of this number, from 0 to [`SOCKETS`], to here; open it if it is not.
    Knock(usize, SocketAddr, Reach),
    /// Close all extra sockets.
    Close,
}

/// One introduction's probing.
#[derive(Debug)]
pub struct Birthday {
    part: Part,
    target: SocketAddr,
    random: StdRng,
    begin: Instant,
    attempt: u32,
    next: Instant,
    /// Probes of this attempt, or knocks of this wave.
    sent: usize,
    /// The wave of this attempt.
    wave: usize,
    /// Probes or knocks of all attempts.
    total: u64,
    probed: BTreeSet<u16>,
    over: bool,
}

impl Birthday {
    /// Probing that begins [`START`] after `now`, the arrival of the introduction: at the same moment on both sides. `target` is the other side's
    /// mapped address; of a hard one only the IP address counts.
    pub fn new(part: Part, target: SocketAddr, seed: u64, now: Instant) -> Self {
        let begin = now + START;
        Self {
            part,
            target,
            random: StdRng::seed_from_u64(seed),
            begin,
            attempt: 0,
            next: begin,
            sent: 0,
            wave: 0,
            total: 0,
            probed: BTreeSet::new(),
            over: false,
        }
    }

    /// When [`poll`](Self::poll) has something to do next; `None`: never again.
    pub fn poll_timeout(&self) -> Option<Instant> {
        (!self.over).then_some(self.next)
    }

    /// Whether an attempt is running.
    pub fn is_running(&self, now: Instant) -> bool {
        !self.over && now >= self.begin && self.has_begun()
    }

    /// Something was sent in this attempt.
    fn has_begun(&self) -> bool {
        self.wave > 0 || self.sent > 0
    }

    /// The two have met, or there is a better way: what is left to do. Later attempts may follow if `for_good` is false.
    pub fn stop(&mut self, for_good: bool, now: Instant) -> Option<Action> {
        let was_open = self.part == Part::Hard && self.has_begun();
        if for_good {
            self.over = true;
        } else {
            self.end_attempt(now);
        }
        was_open.then_some(Action::Close)
    }

    /// One knock was answered: there are no more in this attempt, but all sockets stay open until its end. Whoever answered may have room for a few of those
    /// who knocked, and be busy with others than this one.
    pub fn hold(&mut self) {
        self.next = self.next.max(self.begin + ATTEMPT);
    }

    /// A direct path was lost: attempts begin again, at the times that both sides know.
    pub fn resume(&mut self, now: Instant) {
        self.over = false;
        self.attempt = 0;
        (self.wave, self.sent) = (0, 0);
        self.probed.clear();
        while self.begin <= now {
            self.begin += ATTEMPT_INTERVAL;
        }
        self.next = self.begin;
    }

    /// Which part this side plays.
    pub fn part(&self) -> Part {
        self.part
    }

    /// Probes or knocks sent since it began.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The end of the attempt that is running or comes next.
    pub fn attempt_ends(&self) -> Instant {
        self.begin + ATTEMPT
    }

    /// The next thing that is due.
    pub fn poll(&mut self, now: Instant) -> Option<Action> {
        if self.over || now < self.next {
            return None;
        }
        match self.part {
            Part::Easy => self.poll_easy(now),
            Part::Hard => self.poll_hard(now),
        }
    }

    fn poll_easy(&mut self, now: Instant) -> Option<Action> {
        if self.sent >= PROBES {
            if now >= self.begin + ATTEMPT {
                self.end_attempt(now);
            } else {
                self.next = self.begin + ATTEMPT;
            }
            return None;
        }
        self.sent += 1;
        self.total += 1;
        // A late wake-up is made up for in part: the rate is a promise to the router.
        self.next = (self.next + PROBE_INTERVAL).max(now.checked_sub(CATCH_UP).unwrap_or(now));
        let port = loop {
            let port = self.random.random_range(FIRST_PORT..=u16::MAX);
            if self.probed.insert(port) {
                break port;
            }
        };
        Some(Action::Probe(SocketAddr::new(self.target.ip(), port)))
    }

    fn poll_hard(&mut self, now: Instant) -> Option<Action> {
        if now >= self.begin + ATTEMPT {
            self.end_attempt(now);
            return Some(Action::Close);
        }
        let wave = WAVES.get(self.wave)?;
        let index = self.sent;
        self.sent += 1;
        self.total += 1;
        self.next += OPEN_INTERVAL;
        if self.sent == wave.sockets {
            (self.wave, self.sent) = (self.wave + 1, 0);
            self.next = self.begin + WAVES.get(self.wave).map_or(ATTEMPT, |wave| wave.at);
        }
        Some(Action::Knock(index, self.target, wave.reach))
    }

    fn end_attempt(&mut self, now: Instant) {
        self.attempt += 1;
        self.over |= self.attempt >= ATTEMPTS;
        self.begin += ATTEMPT_INTERVAL;
        while self.begin <= now {
            self.begin += ATTEMPT_INTERVAL;
        }
        self.next = self.begin;
        (self.wave, self.sent) = (0, 0);
        self.probed.clear();
    }
}

/// The other side's address to aim at: that of its candidates which its NAT is most likely to have given it.
pub fn target(candidates: &[rendezvous_wire::Candidate]) -> Option<SocketAddr> {
    use rendezvous_wire::CandidateKind::{Host, ServerReflexive};
    let is_global = |address: &SocketAddr| match address.ip() {
        // Shared address space (RFC 6598) is a carrier's inside.
        IpAddr::V4(ip) => !(ip.is_private() || ip.octets()[0] == 100 && ip.octets()[1] & 0xc0 == 64),
        // IPv6 is hardly ever translated.
        IpAddr::V6(_) => false,
    };
    let of = |kind| {
        let mut own = candidates.iter().filter(move |candidate| candidate.kind == kind);
        own.find(|candidate| is_global(&candidate.address)).map(|candidate| candidate.address)
    };
    of(ServerReflexive).or_else(|| of(Host))
}

#[cfg(test)]
#[path = "birthday_tests.rs"]
mod tests;
