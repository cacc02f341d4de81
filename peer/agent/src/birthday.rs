//! Birthday probing: how a side whose NAT takes a new port for every destination (*hard*: address-and-port-dependent mapping) meets one
//! whose NAT keeps its port but filters by port (*easy*). Pure; its owner has the sockets.
//!
//! The hard side opens many sockets and sends from each to the easy side's one address: its NAT makes as many mappings, each open to the
//! easy side. The easy side probes ports of the hard side's address at random. A probe that meets one of the mappings arrives, and a check
//! from the socket behind it goes back through the door that the probe has opened. With M sockets and N probes the two meet with
//! a probability of 1 - (1 - M/64512)^N: 95 % with 256 and 740.
//!
//! Each probe costs the easy side's router a conntrack entry for some 30 s, and that has taken whole homes off line; hence the budget. But each entry is also an
//! open door for as long. So when the probes are through, the hard side takes as many fresh sockets and knocks at the easy side itself: each of its new
//! mappings finds its door open with a probability of N/64512, which makes another 95 %, and 99.7 % in all, for no more entries than a router costs that
//! remembers stray packets.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use rendezvous_wire::candidate::{Mapping, PortAllocation};

/// Sockets that the hard side opens at a time.
pub const SOCKETS: usize = 256;

/// Probes that the easy side sends in one attempt. With the hard side's last knocks, which may leave an entry each, and what signalling, relay and
/// checks need, they stay below the 1,024 entries that a small router can spare.
pub const PROBES: usize = 740;

/// Between two probes: they are through in 3 s.
pub const PROBE_INTERVAL: Duration = Duration::from_millis(4);

/// As much of a late wake-up is made up for by a burst: no more packets than a web page asks for.
const CATCH_UP: Duration = Duration::from_millis(40);

/// When, after the beginning, the hard side turns to the doors that the probes have opened: they are through, and half a second is for skew and loss.
const TURN: Duration = Duration::from_millis(3500);

/// Between two sockets' first checks: 256 mappings in a quarter of a second.
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

/// When each wave of knocks begins: all sockets once, and again, then fresh ones once, and again.
const WAVES: [Duration; 4] = [Duration::ZERO, REPEAT, TURN, TURN.saturating_add(REPEAT)];

/// The first wave of fresh sockets.
const TURN_WAVE: usize = 2;

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
    /// for its own traffic gives the probes another port.
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
    /// Probes or knocks of this attempt.
    sent: usize,
    /// Of all attempts.
    total: u64,
    probed: BTreeSet<u16>,
    /// The hard side has taken fresh sockets in this attempt.
    turned: bool,
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
            total: 0,
            probed: BTreeSet::new(),
            turned: false,
            over: false,
        }
    }

    /// When [`poll`](Self::poll) has something to do next; `None`: never again.
    pub fn poll_timeout(&self) -> Option<Instant> {
        (!self.over).then_some(self.next)
    }

    /// Whether an attempt is running.
    pub fn is_running(&self, now: Instant) -> bool {
        !self.over && now >= self.begin && self.sent > 0
    }

    /// The two have met, or there is a better way: what is left to do. Later attempts may follow if `for_good` is false.
    pub fn stop(&mut self, for_good: bool, now: Instant) -> Option<Action> {
        let was_open = self.part == Part::Hard && self.sent > 0;
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
        self.sent = 0;
        self.turned = false;
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
        let (wave, index) = (self.sent / SOCKETS, self.sent % SOCKETS);
        if wave == TURN_WAVE && index == 0 && !self.turned {
            self.turned = true;
            return Some(Action::Close);
        }
        self.sent += 1;
        self.total += 1;
        self.next = if self.sent.is_multiple_of(SOCKETS) {
            self.begin + WAVES.get(wave + 1).copied().unwrap_or(ATTEMPT)
        } else {
            self.next + OPEN_INTERVAL
        };
        let reach = if wave < TURN_WAVE { Reach::Near } else { Reach::Far };
        Some(Action::Knock(index, self.target, reach))
    }

    fn end_attempt(&mut self, now: Instant) {
        self.attempt += 1;
        self.over |= self.attempt >= ATTEMPTS;
        self.begin += ATTEMPT_INTERVAL;
        while self.begin <= now {
            self.begin += ATTEMPT_INTERVAL;
        }
        self.next = self.begin;
        self.sent = 0;
        self.turned = false;
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
mod tests {
    use super::*;
    use crate::tests::origin;

    fn target_address() -> SocketAddr {
        "203.0.113.7:4000".parse().unwrap()
    }

    /// Runs to the end; every action with its time.
    fn run(part: Part, seed: u64) -> Vec<(Duration, Action)> {
        let start = origin();
        let mut birthday = Birthday::new(part, target_address(), seed, start);
        let mut actions = Vec::new();
        while let Some(now) = birthday.poll_timeout() {
            while let Some(action) = birthday.poll(now) {
                actions.push((now - start, action));
            }
        }
        actions
    }

    #[test]
    fn only_one_hard_side_with_one_easy_side_probes() {
        use Mapping::{EndpointIndependent as I, Unknown as U};
        let [d, s, p] = [PortAllocation::Random, PortAllocation::Sequential, PortAllocation::Preserving]
            .map(Mapping::AddressAndPortDependent);
        assert_eq!(Part::of(d, I), Some(Part::Hard));
        assert_eq!(Part::of(I, d), Some(Part::Easy));
        for (local, remote) in [(d, d), (I, I), (U, d), (d, U), (U, U), (I, U), (I, s), (p, I), (s, d)] {
            assert_eq!(Part::of(local, remote), None);
        }
    }

    #[test]
    fn the_easy_side_keeps_its_budget_and_never_probes_a_port_twice() {
        let actions = run(Part::Easy, 1);
        assert_eq!(actions.len(), PROBES * ATTEMPTS as usize);
        for attempt in actions.chunks(PROBES) {
            let ports: BTreeSet<u16> = attempt
                .iter()
                .map(|(_, action)| match action {
                    Action::Probe(address) => address.port(),
                    other => panic!("{other:?}"),
                })
                .collect();
            assert_eq!(ports.len(), PROBES);
            assert!(ports.iter().all(|port| *port >= FIRST_PORT));
            let length = attempt[PROBES - 1].0 - attempt[0].0;
            assert!(length >= PROBE_INTERVAL * (PROBES as u32 - 1) && length < ATTEMPT, "{length:?}");
        }
        // Never more than one attempt's entries in any 30 s.
        for (index, (time, _)) in actions.iter().enumerate() {
            let recent =
                actions[..=index].iter().filter(|(other, _)| *time - *other < Duration::from_secs(30));
            assert!(recent.count() <= PROBES);
        }
    }

    #[test]
    fn late_wake_ups_cost_few_probes_and_make_no_flood() {
        let start = origin();
        let mut birthday = Birthday::new(Part::Easy, target_address(), 1, start);
        let mut now = start + START;
        let mut by_turn = 0;
        while now < start + START + TURN {
            let burst = std::iter::from_fn(|| birthday.poll(now)).count();
            assert!(burst <= 11, "{burst}");
            by_turn += burst;
            // A machine that is busy with something else.
            now += Duration::from_millis(if by_turn.is_multiple_of(3) { 45 } else { 3 });
        }
        assert_eq!(by_turn, PROBES);
        now += Duration::from_mins(1);
        assert!(std::iter::from_fn(|| birthday.poll(now)).count() <= 11);
    }

    #[test]
    fn the_hard_side_knocks_from_every_socket_and_then_from_as_many_fresh_ones() {
        let actions = run(Part::Hard, 1);
        let attempts: Vec<_> = actions.split(|(_, action)| *action == Action::Close).collect();
        assert_eq!(
            attempts.len(),
            2 * ATTEMPTS as usize + 1,
            "what is open is closed before the turn and at the end"
        );
        for (part, waves) in attempts[..2].iter().zip([&WAVES[..TURN_WAVE], &WAVES[TURN_WAVE..]]) {
            assert_eq!(part.len(), waves.len() * SOCKETS);
            let reach = if waves[0] == TURN { Reach::Far } else { Reach::Near };
            for (number, (time, action)) in part.iter().enumerate() {
                assert_eq!(*action, Action::Knock(number % SOCKETS, target_address(), reach));
                let begin = START + waves[number / SOCKETS];
                assert!(*time >= begin && *time < begin + Duration::from_millis(300));
            }
        }
    }

    #[test]
    fn the_two_meet_as_often_as_the_formula_says() {
        // The hard NAT gives 256 random ports; the share of seeds in which a probe meets one is 94.7 %. Fresh ones that find a door open make it 99.7 %.
        let met = (0..400).filter(|seed| {
            let mut random = StdRng::seed_from_u64(seed + 1_000_000);
            let mapped: BTreeSet<u16> =
                (0..SOCKETS).map(|_| random.random_range(FIRST_PORT..=u16::MAX)).collect();
            let probes = run(Part::Easy, *seed);
            let meets = |(_, action): &(Duration, Action)| matches!(action, Action::Probe(to) if mapped.contains(&to.port()));
            probes[..PROBES].iter().any(meets)
        });
        let first: BTreeSet<u64> = met.collect();
        assert!((364..=392).contains(&first.len()), "{} of 400", first.len());
        let missed = (0..400).filter(|seed| !first.contains(seed));
        let fresh = missed.filter(|seed| {
            let mut random = StdRng::seed_from_u64(seed + 2_000_000);
            let probes = run(Part::Easy, *seed);
            let open: BTreeSet<u16> = probes[..PROBES]
                .iter()
                .filter_map(|(_, action)| match action {
                    Action::Probe(to) => Some(to.port()),
                    _ => None,
                })
                .collect();
            (0..SOCKETS).any(|_| open.contains(&random.random_range(FIRST_PORT..=u16::MAX)))
        });
        let met = first.len() + fresh.count();
        assert!(met >= 396, "{met} of 400");
    }

    #[test]
    fn stopping_ends_it_and_closes_what_is_open() {
        let start = origin();
        let mut birthday = Birthday::new(Part::Hard, target_address(), 1, start);
        assert_eq!(birthday.stop(false, start), None);
        let mut birthday = Birthday::new(Part::Hard, target_address(), 1, start);
        assert!(birthday.poll(start + START).is_some());
        assert_eq!(birthday.stop(true, start + START), Some(Action::Close));
        assert_eq!(birthday.poll_timeout(), None);
    }

    #[test]
    fn the_target_is_a_mapped_address_before_a_host_one_and_never_a_private_one() {
        use rendezvous_wire::{Candidate, CandidateKind};
        let candidate = |kind, text: &str| Candidate::new(kind, text.parse().unwrap(), 1);
        let host = candidate(CandidateKind::Host, "192.168.1.2:7");
        let public = candidate(CandidateKind::Host, "198.51.100.2:7");
        let mapped = candidate(CandidateKind::ServerReflexive, "198.51.100.3:7");
        assert_eq!(target(&[host, public, mapped]), Some(mapped.address));
        assert_eq!(target(&[host, public]), Some(public.address));
        assert_eq!(target(&[host]), None);
    }
}
