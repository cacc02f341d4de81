//! What must not impress an agent, and what an authenticated but hostile peer cannot do.

mod util;

use std::net::SocketAddr;

use peer_agent::{Agent, Event, MAX_PEER_REFLEXIVE, SocketId};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rendezvous_wire::candidate::MAX_CANDIDATES;
use rendezvous_wire::message::Role;
use rendezvous_wire::stun::{self, Check, Class, Key, Received, TransactionId};
use rendezvous_wire::{Candidate, CandidateKind};
use util::{A, B, Filtering, Kind, Mapping, World, ms, secs};

const EIM_APDF: Kind = Kind::Behind(Mapping::Eim, Filtering::Apdf);
const SOCKET: SocketId = SocketId(0);

/// Everything of an agent that can be seen from outside.
fn state(agent: &Agent) -> String {
    format!("{:?} {:?} {:?} {:?}", agent.role(), agent.selected(), agent.poll_timeout(), agent.report())
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// A check as B would send it to A.
struct Forged<'a> {
    username: [&'a str; 2],
    password: &'a str,
    role: Role,
    use_candidate: bool,
}

impl Default for Forged<'_> {
    fn default() -> Self {
        let username = ["ufragofA", "ufragofB"];
        Self {
            username,
            password: "a password of 0, 22+ characters",
            role: Role::Controlled,
            use_candidate: false,
        }
    }
}

impl Forged<'_> {
    fn datagram(&self, transaction: u8) -> Vec<u8> {
        let check = Check {
            transaction: TransactionId([transaction; 12]),
            remote_ufrag: self.username[0],
            local_ufrag: self.username[1],
            key: &Key::new(self.password).unwrap(),
            priority: 1000,
            role: self.role,
            tie_breaker: 1,
            use_candidate: self.use_candidate,
        };
        check.encode().unwrap()
    }
}

/// A world in the middle of things: selected, or still checking.
fn worlds() -> Vec<World> {
    let mut selected = World::new([Kind::Public, EIM_APDF], 1);
    selected.run_until(secs(12));
    let mut checking = World::new([EIM_APDF, EIM_APDF], 1);
    checking.line.cut = true;
    checking.run_until(ms(500));
    vec![selected, checking]
}

fn assert_ignored(world: &mut World, source: SocketAddr, datagram: &[u8], what: &str) {
    let before = state(world.peers[A].agent());
    let sent = world.peers[A].sent.len();
    let events = world.peers[A].events.len();
    let mine = world.with_agent(A, |agent, now| agent.handle_datagram(SOCKET, source, datagram, now));
    assert!(!mine, "{what}");
    assert_eq!(state(world.peers[A].agent()), before, "{what}");
    assert_eq!((world.peers[A].sent.len(), world.peers[A].events.len()), (sent, events), "{what}");
}

#[test]
fn noise_changes_nothing() {
    for mut world in worlds() {
        let mut rng = StdRng::seed_from_u64(1);
        for round in 0..5000 {
            let mut datagram = vec![0; rng.random_range(0..200)];
            rng.fill(&mut datagram[..]);
            if round % 2 == 0 && datagram.len() >= 8 {
                // Like STUN at first sight.
                let length = datagram.len() as u16 - 20.min(datagram.len() as u16);
                datagram[..2].copy_from_slice(&[rng.random_range(0..2), rng.random_range(0..18)]);
                datagram[2..4].copy_from_slice(&length.to_be_bytes());
                datagram[4..8].copy_from_slice(&stun::MAGIC_COOKIE);
            }
            assert_ignored(&mut world, address("203.0.113.7:7"), &datagram, "noise");
        }
    }
}

#[test]
fn altered_messages_change_nothing() {
    for mut world in worlds() {
        let mut rng = StdRng::seed_from_u64(2);
        let remote = world.peers[A].agent().report()[0].path.remote;
        for round in 0..3000u32 {
            let mut datagram = Forged { use_candidate: true, ..Forged::default() }.datagram(round as u8);
            // FINGERPRINT, the last eight bytes, is not under the protection of MESSAGE-INTEGRITY.
            let protected = datagram.len() - 8;
            let index = rng.random_range(0..protected);
            datagram[index] ^= rng.random_range(1..=255u8);
            if rng.random_bool(0.2) {
                datagram.truncate(rng.random_range(0..datagram.len()));
            }
            assert_ignored(&mut world, remote, &datagram, "altered");
        }
    }
}

#[test]
fn only_the_right_names_and_passwords_count() {
    let wrong = [
        Forged { username: ["ufragofA", "ufragofC"], ..Forged::default() },
        Forged { username: ["ufragofB", "ufragofA"], ..Forged::default() },
        Forged { username: ["ufragofA", "ufragofB:x"], ..Forged::default() },
        Forged { username: ["", ""], ..Forged::default() },
        Forged { password: "a password of 1, 22+ characters", ..Forged::default() },
        Forged { password: "something else altogether!", ..Forged::default() },
    ];
    for mut world in worlds() {
        for (index, forged) in wrong.iter().enumerate() {
            assert_ignored(&mut world, address("203.0.113.7:7"), &forged.datagram(index as u8), "wrong name");
        }
        let bare = stun::binding_request(TransactionId([1; 12])).unwrap();
        assert_ignored(&mut world, address("203.0.113.7:7"), &bare, "no integrity");
    }
}

#[test]
fn authentic_checks_from_impossible_places_are_ignored() {
    for mut world in worlds() {
        for source in [
            "127.0.0.1:9",
            "0.0.0.0:9",
            "224.0.0.1:9",
            "203.0.113.7:0",
            "[2001:db8::1]:9",
            "[::ffff:127.0.0.1]:9",
        ] {
            assert_ignored(&mut world, address(source), &Forged::default().datagram(1), source);
        }
    }
}

#[test]
fn an_authentic_check_is_answered_and_its_source_known() {
    let mut world = worlds().remove(1);
    let source = address("203.0.113.7:7");
    let datagram = Forged::default().datagram(3);
    let now = world.instant(world.now);
    let agent = world.peers[A].agent.as_mut().unwrap();
    assert!(agent.handle_datagram(SOCKET, source, &datagram, now));
    let answer = agent.poll_transmit().unwrap();
    let received = Received::parse(&answer.datagram).unwrap();
    assert_eq!((received.class(), received.mapped_address()), (Class::Success, Some(source)));
    assert!(received.verify(&Key::new("a password of 0, 22+ characters").unwrap()));
    assert!(answer.datagram.len() <= datagram.len(), "an answer is never larger than its request");
    let triggered = agent.poll_transmit().unwrap();
    assert_eq!(triggered.path.remote, source);
    let mut events = std::iter::from_fn(|| agent.poll_event());
    assert!(events.any(|event| matches!(event, Event::SourceKnown(path) if path.remote == source)));
}

#[test]
fn nobody_but_the_other_side_can_answer_a_check() {
    let mut world = worlds().remove(1);
    world.with_agent(A, peer_agent::Agent::restart);
    let now = world.instant(world.now);
    let agent = world.peers[A].agent.as_mut().unwrap();
    agent.handle_timeout(now);
    let check = agent.poll_transmit().unwrap();
    let transaction = Received::parse(&check.datagram).unwrap().transaction();
    assert!(agent.owns_transaction(transaction));
    let mapped = address("198.51.100.1:9");
    for key in [None, Some(Key::new("a password of 0, 22+ characters").unwrap())] {
        let forged = [
            stun::binding_success(transaction, mapped, key.as_ref()).unwrap(),
            stun::binding_error(transaction, 487, &[], key.as_ref()).unwrap(),
            stun::binding_error(transaction, 400, &[], key.as_ref()).unwrap(),
        ];
        for answer in forged {
            assert!(!agent.handle_datagram(SOCKET, check.path.remote, &answer, now));
        }
    }
    assert_eq!(agent.role(), Role::Controlling);
    let key = Key::new("a password of 1, 22+ characters").unwrap();
    let right = stun::binding_success(transaction, mapped, Some(&key)).unwrap();
    assert!(agent.handle_datagram(SOCKET, check.path.remote, &right, now));
    assert!(!agent.handle_datagram(SOCKET, check.path.remote, &right, now), "a replay is no answer");
    assert_eq!(agent.selected().unwrap().path, check.path);
}

#[test]
fn an_answer_from_elsewhere_proves_nothing() {
    let mut world = worlds().remove(1);
    world.with_agent(A, peer_agent::Agent::restart);
    let now = world.instant(world.now);
    let agent = world.peers[A].agent.as_mut().unwrap();
    agent.handle_timeout(now);
    let check = agent.poll_transmit().unwrap();
    let transaction = Received::parse(&check.datagram).unwrap().transaction();
    let key = Key::new("a password of 1, 22+ characters").unwrap();
    let answer = stun::binding_success(transaction, address("198.51.100.1:9"), Some(&key)).unwrap();
    agent.handle_datagram(SOCKET, address("203.0.113.7:7"), &answer, now);
    assert_eq!(agent.selected(), None);
    let report = agent.report();
    let pair = report.iter().find(|pair| pair.path == check.path).unwrap();
    assert_eq!(pair.error, Some(peer_agent::CheckError::NotSymmetric));
}

#[test]
fn addresses_that_must_not_be_probed_are_never_pairs() {
    let mut world = World::new([EIM_APDF, EIM_APDF], 1);
    for bad in
        ["127.0.0.1:1", "0.0.0.0:1", "239.1.1.1:1", "192.0.2.1:0", "255.255.255.255:1", "169.254.169.254:80"]
    {
        world.peers[B].candidates.push(Candidate::new(CandidateKind::Host, address(bad), 1));
    }
    world.run_until(secs(20));
    assert_eq!(world.peers[A].agent().report().len(), 2);
}

#[test]
fn a_hostile_peer_cannot_have_us_remember_or_send_without_bound() {
    let mut world = World::new([Kind::Public, Kind::Public], 1).with_v6();
    world.line.cut = true;
    world.run_until(ms(100));
    let mut rng = StdRng::seed_from_u64(9);
    for round in 0..20_000u32 {
        world.run_until(world.now + ms(1));
        let [a, b, c] = [rng.random_range(1..=99u8), rng.random(), rng.random()];
        let source = address(&format!("203.{a}.{b}.{c}:5000"));
        let datagram = Forged::default().datagram(round as u8);
        world.with_agent(A, |agent, now| agent.handle_datagram(SOCKET, source, &datagram, now));
        if round % 3 == 0 {
            let named = Candidate::new(CandidateKind::Host, address(&format!("198.{a}.{b}.{c}:6000")), 1);
            world.with_agent(A, |agent, now| agent.add_remote_candidate(named, now));
        }
    }
    let pairs = world.peers[A].agent().report().len();
    assert!(pairs <= MAX_CANDIDATES + MAX_PEER_REFLEXIVE, "{pairs} pairs");
    // 100 checks a second by the pace, and one answer for each check that came.
    let sent = &world.peers[A].sent;
    let checks = sent.iter().filter(|sent| sent.request).count();
    assert!(checks <= 20 * 100 + 50, "{checks} checks in twenty seconds");
    assert!(sent.len() - checks <= 20_000);
}

#[test]
fn a_check_for_whose_source_there_is_no_room_gets_no_answer() {
    let mut world = worlds().remove(1);
    let mut answered = 0;
    for number in 0..=u8::try_from(MAX_PEER_REFLEXIVE).unwrap() {
        let source = address(&format!("203.0.113.{}:7", number + 1));
        let datagram = Forged::default().datagram(number);
        let now = world.instant(world.now);
        let agent = world.peers[A].agent.as_mut().unwrap();
        agent.handle_datagram(SOCKET, source, &datagram, now);
        let known = agent.report().iter().any(|pair| pair.path.remote == source);
        let sent: Vec<_> = std::iter::from_fn(|| agent.poll_transmit()).collect();
        let success = |sent: &peer_agent::Transmit| {
            Received::parse(&sent.datagram).is_ok_and(|message| message.class() == Class::Success)
        };
        assert_eq!(
            sent.iter().any(success),
            known,
            "{source}: an answer proves a path that must then be known"
        );
        answered += usize::from(known);
    }
    assert_eq!(answered, MAX_PEER_REFLEXIVE);
}

#[test]
fn a_replayed_nomination_is_no_news() {
    let mut world = World::new([Kind::Public, Kind::Public], 1).with_v6();
    world.peers[A].role = Role::Controlled;
    world.peers[B].role = Role::Controlling;
    world.run_until(secs(5));
    let forged = Forged { role: Role::Controlling, use_candidate: true, ..Forged::default() };
    let paths = world.peers[A].agent().report();
    let other = paths.iter().find(|pair| !pair.selected).unwrap().path;
    let chosen = world.peers[A].selected().unwrap();
    for (path, transaction, ends_on) in [(other, 1, other), (chosen, 2, chosen), (other, 1, chosen)] {
        let datagram = forged.datagram(transaction);
        let now = world.now;
        world.with_agent(A, |agent, at| agent.handle_datagram(path.socket, path.remote, &datagram, at));
        world.run_until(now + ms(100));
        assert_eq!(world.peers[A].selected(), Some(ends_on), "transaction {transaction}");
    }
}
