use std::collections::BTreeMap;

use super::*;
use crate::tests::origin;

const STEADY: Mapping = Mapping::EndpointIndependent;
const SEQUENTIAL: Mapping = Mapping::AddressAndPortDependent(PortAllocation::Sequential);
const PRESERVING: Mapping = Mapping::AddressAndPortDependent(PortAllocation::Preserving);
const RANDOM: Mapping = Mapping::AddressAndPortDependent(PortAllocation::Random);

fn reflectors() -> Vec<SocketAddr> {
    vec!["198.51.100.1:3478".parse().unwrap(), "198.51.100.1:3479".parse().unwrap()]
}

/// One side: meetings behind a NAT that does what `mapping` says.
struct Side {
    meetings: Meetings,
    mapping: Mapping,
    ip: IpAddr,
    step: u16,
    next_port: u16,
    /// Ports that other flows of the household take before each of our flows.
    drift: u16,
    /// By local port and, for port-dependent mapping, destination.
    mapped: BTreeMap<(u16, Option<SocketAddr>), u16>,
    ports: BTreeMap<usize, u16>,
    opened: u16,
    offers: Vec<Vec<SocketAddr>>,
    primed: Option<MeetingNumber>,
    /// Source and destination of every check, as seen outside, and its hop limit.
    checks: Vec<(SocketAddr, SocketAddr, Option<u8>)>,
}

impl Side {
    fn new(number: u8, mapping: Mapping, remote: Mapping, step: u16, now: Instant) -> Self {
        let ip = IpAddr::from([203, 0, 113, number]);
        Self {
            meetings: Meetings::new((mapping, remote), ip, reflectors(), number.into(), now).unwrap(),
            mapping,
            ip,
            step,
            next_port: 20_000,
            drift: 0,
            mapped: BTreeMap::new(),
            ports: BTreeMap::new(),
            opened: 0,
            offers: Vec::new(),
            primed: None,
            checks: Vec::new(),
        }
    }

    fn source(&mut self, slot: usize, to: SocketAddr) -> SocketAddr {
        let local = self.ports[&slot];
        let key = (local, self.mapping.is_port_dependent().then_some(to));
        let port = match self.mapped.get(&key) {
            Some(port) => *port,
            None => {
                let taken = self.mapped.values().any(|port| *port == local);
                let port = match self.mapping {
                    SEQUENTIAL => {
                        self.next_port += self.step;
                        self.next_port
                    }
                    PRESERVING if taken => 1024 + self.mapped.len() as u16,
                    _ => local,
                };
                self.mapped.insert(key, port);
                port
            }
        };
        SocketAddr::new(self.ip, port)
    }

    /// Does what is due; the ports of sockets are told when everything else is done.
    fn run(&mut self, now: Instant) {
        loop {
            let opened = self.run_once(now);
            for slot in &opened {
                self.meetings.handle_opened(*slot, self.ports[slot]);
            }
            if opened.is_empty() {
                return;
            }
        }
    }

    fn run_once(&mut self, now: Instant) -> Vec<usize> {
        let mut opened = Vec::new();
        while let Some(act) = self.meetings.poll(now) {
            match act {
                Act::Open(slot) => {
                    self.opened += 1;
                    self.ports.insert(slot, 40_000 + self.opened);
                    opened.push(slot);
                }
                Act::Ask(slot, to, transaction) => {
                    let mapped = self.source(slot, to);
                    assert!(self.meetings.handle_mapped(to, transaction, mapped, now));
                }
                Act::Offer(doors) => {
                    self.next_port += self.drift * self.step;
                    self.offers.push(doors);
                }
                Act::Check(slot, to, ttl) => {
                    let from = self.source(slot, to);
                    self.checks.push((from, to, ttl));
                }
                Act::Primed(number) => self.primed = Some(number),
                Act::Close(slot) => assert!(self.ports.remove(&slot).is_some()),
            }
        }
        opened
    }
}

/// Brings two sides together once, with a perfect network; whether a flow of one went to a flow of the other.
fn meet(a: &mut Side, b: &mut Side, number: u32, now: Instant) -> bool {
    let number = MeetingNumber(number);
    a.checks.clear();
    b.checks.clear();
    a.run(now);
    b.run(now);
    let (doors_a, doors_b) = (a.offers.pop().expect("an offer"), b.offers.pop().expect("an offer"));
    a.meetings.handle_doors(number, &doors_b, now);
    b.meetings.handle_doors(number, &doors_a, now);
    a.run(now);
    b.run(now);
    assert_eq!((a.primed, b.primed), (Some(number), Some(number)));
    for side in [&*a, &*b] {
        assert!(side.checks.iter().all(|(.., ttl)| ttl.is_some_and(|ttl| (2..=4).contains(&ttl))));
        assert!(side.checks.len() <= MAX_DOORS && !side.checks.is_empty());
    }
    let primed = a.checks.len();
    a.meetings.handle_go(number, now);
    b.meetings.handle_go(number, now);
    a.run(now);
    b.run(now);
    assert_eq!(a.checks.len(), 2 * primed, "every door that was primed is knocked at");
    assert!(a.checks[primed..].iter().all(|(.., ttl)| ttl.is_none()));
    let met = |(from, to, _): &(SocketAddr, SocketAddr, Option<u8>)| {
        b.checks.iter().any(|(other_from, other_to, _)| other_from == to && other_to == from)
    };
    a.checks.iter().any(met)
}

#[test]
fn every_two_sides_that_know_their_doors_meet() {
    let now = origin();
    for (local, remote) in [STEADY, SEQUENTIAL, PRESERVING]
        .into_iter()
        .flat_map(|local| [STEADY, SEQUENTIAL, PRESERVING].map(|remote| (local, remote)))
    {
        for step in [1, 2, 4, 60] {
            let mut a = Side::new(1, local, remote, step, now);
            let mut b = Side::new(2, remote, local, 1, now);
            assert!(meet(&mut a, &mut b, 1, now + START), "{local} with {remote}, step {step}");
        }
    }
}

#[test]
fn a_busy_household_costs_a_steady_other_side_nothing_and_a_sequential_one_a_few_meetings() {
    let start = origin();
    for drift in 0..=10 {
        let mut a = Side::new(1, SEQUENTIAL, STEADY, 2, start);
        let mut b = Side::new(2, STEADY, SEQUENTIAL, 1, start);
        a.drift = drift;
        assert!(meet(&mut a, &mut b, 1, start + START), "drift {drift}");
    }
    let mut a = Side::new(1, SEQUENTIAL, SEQUENTIAL, 1, start);
    let mut b = Side::new(2, SEQUENTIAL, SEQUENTIAL, 1, start);
    (a.drift, b.drift) = (1, 2);
    let mut now = start;
    let met = (1..=4).any(|number| {
        now = a.meetings.poll_timeout().unwrap().max(b.meetings.poll_timeout().unwrap());
        while !matches!(a.meetings.stage, Stage::Resting) || !matches!(b.meetings.stage, Stage::Resting) {
            a.run(now);
            b.run(now);
            now = a.meetings.poll_timeout().unwrap().max(b.meetings.poll_timeout().unwrap());
        }
        meet(&mut a, &mut b, number, now)
    });
    assert!(met);
}

#[test]
fn a_random_side_has_no_doors() {
    let new = |local, remote| {
        Meetings::new((local, remote), [192, 0, 2, 1].into(), reflectors(), 1, origin()).is_some()
    };
    assert!(!new(RANDOM, STEADY) && !new(STEADY, RANDOM) && !new(RANDOM, RANDOM));
    assert!(new(STEADY, Mapping::Unknown));
}

#[test]
fn a_side_that_is_left_alone_tries_a_few_times_and_then_no_more() {
    let start = origin();
    let mut alone = Side::new(1, STEADY, STEADY, 1, start);
    let mut now = start;
    while let Some(next) = alone.meetings.poll_timeout() {
        assert!(next > now || now == start);
        now = next;
        alone.run(now);
    }
    assert_eq!(alone.offers.len(), RESTS.len());
    assert_eq!(alone.meetings.progress(), Progress::Alone);
    assert!(alone.ports.is_empty(), "every socket is closed");
    assert!(now - start < Duration::from_secs(180));
}

#[test]
fn what_the_other_side_names_is_bounded_and_filtered() {
    let start = origin();
    let mut side = Side::new(1, STEADY, STEADY, 1, start);
    side.run(start + START);
    let mut doors: Vec<SocketAddr> = (0..100).map(|port| ([192, 0, 2, 1], 1000 + port).into()).collect();
    doors[0] = "127.0.0.1:9".parse().unwrap();
    doors[1] = "[2001:db8::1]:9".parse().unwrap();
    side.meetings.handle_doors(MeetingNumber(1), &doors, start + START);
    side.run(start + START);
    assert_eq!(side.checks.len(), MAX_DOORS - 2);
}

#[test]
fn what_comes_out_of_turn_is_ignored() {
    let start = origin();
    let mut side = Side::new(1, STEADY, STEADY, 1, start);
    let doors = ["192.0.2.1:1000".parse().unwrap()];
    side.meetings.handle_doors(MeetingNumber(1), &doors, start);
    side.meetings.handle_go(MeetingNumber(1), start);
    side.run(start + START);
    assert!(side.checks.is_empty());
    side.meetings.handle_doors(MeetingNumber(2), &doors, start + START);
    side.meetings.handle_go(MeetingNumber(1), start + START);
    side.run(start + START);
    assert_eq!(side.checks.len(), 1, "primed, and no more");
}
