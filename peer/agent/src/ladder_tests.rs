use rendezvous_wire::candidate::PortAllocation;
use rendezvous_wire::message::{Credentials, Role};

use super::*;
use crate::tests::origin;

const EIM: Mapping = Mapping::EndpointIndependent;
const APDM: Mapping = Mapping::AddressAndPortDependent(PortAllocation::Random);
const MS: Duration = Duration::from_millis(1);
const DELAY: Duration = Duration::from_millis(20);
const OWN: SocketId = SocketId(0);

fn reflector() -> SocketAddr {
    "198.51.100.1:3478".parse().unwrap()
}

fn credentials(side: usize) -> Credentials {
    Credentials { ufrag: format!("ufrag{side}"), password: format!("a password of side {side} that is long") }
}

fn address(side: usize, socket: SocketId) -> SocketAddr {
    SocketAddr::new(IpAddr::from([203, 0, 113, 1 + side as u8]), 4000 + (socket.0 % 50_000) as u16)
}

/// Two ladders without NATs on a network of one delay, on which the own sockets do not reach each other.
struct World {
    now: Instant,
    ladders: [Ladder; 2],
    budgets: [Budget; 2],
    open: [Vec<SocketId>; 2],
    adopted: [Vec<SocketId>; 2],
    offers: [Option<Vec<SocketAddr>>; 2],
    primed: [bool; 2],
    wire: Vec<(Instant, usize, SocketId, SocketAddr, Vec<u8>)>,
    own_sockets_are_deaf: bool,
}

impl World {
    fn new(mappings: [Mapping; 2]) -> Self {
        Self::seeded(mappings, 0)
    }

    fn seeded(mappings: [Mapping; 2], seed: u64) -> Self {
        let now = origin();
        let ladder = |side: usize| {
            let role = [Role::Controlling, Role::Controlled][side];
            let (local, remote) = (credentials(side), credentials(1 - side));
            let candidate = |side| Candidate::new(CandidateKind::ServerReflexive, address(side, OWN), 1);
            let setup = Setup {
                agent: Config::new(role, local, remote, seed + side as u64),
                sockets: vec![(OWN, Family::V4)],
                local_candidates: vec![candidate(side)],
                remote_candidates: vec![candidate(1 - side)],
                local_mapping: mappings[side],
                remote_mapping: mappings[1 - side],
                reflectors: vec![reflector()],
            };
            Ladder::new(setup, now).unwrap()
        };
        Self {
            now,
            ladders: [ladder(0), ladder(1)],
            budgets: Default::default(),
            open: Default::default(),
            adopted: Default::default(),
            offers: [None, None],
            primed: [false; 2],
            wire: Vec::new(),
            own_sockets_are_deaf: true,
        }
    }

    fn send(&mut self, side: usize, transmit: &Transmit) {
        let (from, to) = (transmit.path.socket, transmit.path.remote);
        let source = address(side, from);
        if to == reflector() {
            let request = Received::parse(&transmit.datagram).unwrap();
            let answer = stun::binding_success(request.transaction(), source, None).unwrap();
            self.wire.push((self.now + 2 * DELAY, side, from, to, answer));
            return;
        }
        let other = 1 - side;
        let target = self.open[other].iter().chain([&OWN]).find(|socket| address(other, **socket) == to);
        let lost = transmit.ttl.is_some() || (from == OWN && self.own_sockets_are_deaf);
        if let (Some(target), false) = (target, lost) {
            self.wire.push((self.now + 2 * DELAY, other, *target, source, transmit.datagram.clone()));
        }
    }

    fn pump(&mut self, side: usize) {
        while let Some(output) = self.ladders[side].poll_output() {
            match output {
                Output::Open(socket) => {
                    self.open[side].push(socket);
                    self.ladders[side].handle_opened(socket, address(side, socket).port());
                }
                Output::Close(socket) => {
                    assert!(self.open[side].contains(&socket));
                    self.open[side].retain(|open| *open != socket);
                    self.adopted[side].retain(|adopted| *adopted != socket);
                }
                Output::Adopt(socket) => {
                    assert!(self.open[side].contains(&socket) && !self.adopted[side].contains(&socket));
                    self.adopted[side].push(socket);
                }
                Output::Transmit(transmit) => {
                    let socket = transmit.path.socket;
                    assert!(socket == OWN || self.open[side].contains(&socket), "from a closed socket");
                    self.send(side, &transmit);
                }
                Output::Meet(doors) => {
                    self.offers[side] = Some(doors);
                    if let [Some(a), Some(b)] = self.offers.clone() {
                        self.offers = [None, None];
                        self.ladders[0].handle_doors(MeetingNumber(1), &b, self.now);
                        self.ladders[1].handle_doors(MeetingNumber(1), &a, self.now);
                        self.pump(1 - side);
                    }
                }
                Output::Primed(number) => {
                    self.primed[side] = true;
                    if self.primed == [true; 2] {
                        self.ladders[0].handle_go(number, self.now);
                        self.ladders[1].handle_go(number, self.now);
                        self.pump(1 - side);
                    }
                }
                Output::Event(_) => {}
            }
        }
    }

    fn run(&mut self, duration: Duration) {
        let end = self.now + duration;
        while self.now < end {
            self.now += MS;
            let due = self.wire.extract_if(.., |(at, ..)| *at <= self.now).collect::<Vec<_>>();
            for (_, side, socket, source, datagram) in due {
                if socket == OWN || self.open[side].contains(&socket) {
                    let message = Received::parse(&datagram).unwrap();
                    self.ladders[side].handle_message(socket, source, &message, self.now);
                    self.pump(side);
                }
            }
            for side in 0..2 {
                if self.ladders[side].poll_timeout().is_some_and(|at| at <= self.now) {
                    self.ladders[side].handle_timeout(&mut self.budgets[side], self.now);
                }
                self.pump(side);
            }
        }
    }
}

#[test]
fn plain_checks_need_no_extra_socket() {
    let mut world = World::new([EIM, EIM]);
    world.own_sockets_are_deaf = false;
    world.run(Duration::from_secs(5));
    for side in 0..2 {
        let selected = world.ladders[side].selected().unwrap();
        assert_eq!(world.ladders[side].rung(selected.path), Rung::Plain);
        assert!(world.open[side].is_empty());
    }
}

#[test]
fn where_they_fail_a_meeting_finds_a_path_and_leaves_one_socket_open() {
    let mut world = World::new([EIM, EIM]);
    world.run(Duration::from_millis(600));
    for side in 0..2 {
        let selected = world.ladders[side].selected().expect("a path");
        assert_ne!(selected.path.socket, OWN);
        assert_eq!(world.ladders[side].rung(selected.path), Rung::Primed);
    }
    world.run(Duration::from_secs(5));
    for side in 0..2 {
        let selected = world.ladders[side].selected().unwrap();
        assert_eq!(world.open[side], [selected.path.socket]);
        assert_eq!(world.adopted[side], [selected.path.socket]);
    }
}

#[test]
fn the_hard_side_knocks_with_a_low_hop_limit_and_closes_what_it_opened() {
    let mut world = World::new([APDM, EIM]);
    world.run(Duration::from_secs(3));
    assert!(world.open[0].len() <= SOCKETS && world.open[0].len() > SOCKETS / 2, "{}", world.open[0].len());
    assert!(world.ladders[0].is_probing(world.now) && world.ladders[1].is_probing(world.now));
    assert!(world.ladders[0].selected().is_none(), "own sockets are deaf and knocks die on the way");
    world.run(Duration::from_secs(5));
    assert!(world.open[0].is_empty());
}

#[test]
fn a_knock_that_was_answered_leaves_the_others_open_until_a_path_is_selected() {
    let mut world = World::new([APDM, EIM]);
    world.run(Duration::from_secs(1));
    let knocks = world.open[0].clone();
    // The other side has room for a few of those who knock, and may be busy with others than the first.
    for (met, socket) in [knocks[3], knocks[9]].into_iter().enumerate() {
        let check = world.ladders[1].agent.stray_check().unwrap();
        let message = Received::parse(&check).unwrap();
        assert!(world.ladders[0].handle_message(socket, address(1, OWN), &message, world.now));
        world.pump(0);
        assert_eq!(world.adopted[0].len(), met + 1);
    }
    assert_eq!(world.open[0].len(), knocks.len(), "none is closed, and no more are opened");
    world.run(Duration::from_secs(8));
    assert!(world.ladders[0].selected().is_none() && world.open[0].is_empty(), "they came to nothing");
}

#[test]
fn probing_is_broken_off_when_the_relay_begins_to_lose() {
    let mut world = World::new([APDM, EIM]);
    world.run(Duration::from_secs(1));
    for side in 0..2 {
        world.ladders[side].handle_relay_loss(&mut world.budgets[side], world.now);
        world.pump(side);
        assert!(!world.ladders[side].is_probing(world.now) && world.open[side].is_empty());
        assert!(world.ladders[side].rungs().iter().any(|rung| rung.to_string().contains("broken off")));
    }
}

#[test]
fn two_ladders_of_a_host_do_not_probe_at_once() {
    let mut one = World::new([EIM, APDM]);
    let mut other = World::seeded([EIM, APDM], 7);
    one.run(Duration::from_millis(500));
    std::mem::swap(&mut one.budgets, &mut other.budgets);
    other.run(Duration::from_millis(500));
    assert!(one.ladders[0].is_probing(one.now));
    assert!(!other.ladders[0].is_probing(other.now));
}

#[test]
fn the_next_ladder_may_probe_as_soon_as_the_one_before_it_is_given_up() {
    let mut one = World::new([APDM, EIM]);
    one.run(Duration::from_secs(2));
    assert!(one.ladders[0].is_probing(one.now));
    let mut next = World::seeded([APDM, EIM], 7);
    let [budget, _] = &mut one.budgets;
    one.ladders[0].leave(budget);
    std::mem::swap(&mut one.budgets, &mut next.budgets);
    next.now += Duration::from_secs(2);
    next.run(Duration::from_secs(1));
    assert!(next.ladders[0].is_probing(next.now));
    assert!(next.open[0].len() > SOCKETS * 3 / 4, "{} sockets", next.open[0].len());
}
