//! Who can reach whom, and how soon.

mod util;

use std::time::Duration;

use peer_agent::Event;
use rendezvous_wire::message::Role;
use util::{A, B, Filtering, Kind, Line, Mapping, World, ms, secs};

const EIM_APDF: Kind = Kind::Behind(Mapping::Eim, Filtering::Apdf);
const EIM_ADF: Kind = Kind::Behind(Mapping::Eim, Filtering::Adf);
const EIM_EIF: Kind = Kind::Behind(Mapping::Eim, Filtering::Eif);
const APDM_APDF: Kind = Kind::Behind(Mapping::Apdm, Filtering::Apdf);
const APDM_ADF: Kind = Kind::Behind(Mapping::Apdm, Filtering::Adf);
const APDM_EIF: Kind = Kind::Behind(Mapping::Apdm, Filtering::Eif);

/// Direct, both ways round, both agreeing, each side's proof after the given time (one way 20 ms).
fn direct(a: Kind, b: Kind, proven: [u64; 2]) {
    for swap in [false, true] {
        let kinds = if swap { [b, a] } else { [a, b] };
        let mut world = World::new(kinds, 1);
        world.run_until(secs(3));
        world.check_invariants();
        let expected = if swap { [proven[1], proven[0]] } else { proven };
        for side in [A, B] {
            let at = world.peers[side].proven();
            assert_eq!(at, Some(ms(expected[side])), "{kinds:?}, side {side}");
        }
        assert!(world.agree(), "{kinds:?}: {:?}", [A, B].map(|side| world.peers[side].selected()));
    }
}

/// Never selected, Exhausted reported, and not one packet more than the rounds allow.
fn relayed(a: Kind, b: Kind) {
    for kinds in [[a, b], [b, a]] {
        let mut world = World::new(kinds, 1);
        world.run_until(secs(600));
        world.check_invariants();
        for peer in &world.peers {
            assert_eq!(peer.proven(), None);
            assert_eq!(peer.selected(), None);
            // Rounds at 0, 8, 16, 32, 64, 128, ... 576 s.
            let rounds = peer.count(|event| *event == Event::Exhausted);
            assert!((12..=13).contains(&rounds), "{rounds} rounds");
            let pairs = peer.agent().report().len();
            assert!(peer.sent.len() <= (rounds + 1) * pairs * 7, "{} packets", peer.sent.len());
        }
    }
}

#[test]
fn public_with_public() {
    direct(Kind::Public, Kind::Public, [40, 40]);
}

#[test]
fn public_with_eim() {
    direct(Kind::Public, EIM_APDF, [40, 40]);
    direct(Kind::Public, EIM_EIF, [40, 40]);
}

#[test]
fn eim_with_eim_whatever_the_filtering() {
    for a in [EIM_APDF, EIM_ADF, EIM_EIF] {
        for b in [EIM_APDF, EIM_ADF, EIM_EIF] {
            direct(a, b, [40, 40]);
        }
    }
}

#[test]
fn apdm_with_public() {
    for hard in [APDM_APDF, APDM_ADF] {
        // The hard side's mapping is learnt from its check: the triggered one is answered a round trip later.
        direct(hard, Kind::Public, [40, 60]);
    }
}

#[test]
fn apdm_with_eif() {
    direct(APDM_APDF, EIM_EIF, [40, 60]);
}

#[test]
fn apdm_with_adf() {
    direct(APDM_APDF, EIM_ADF, [40, 60]);
}

#[test]
fn apdm_with_apdf_stays_on_the_relay() {
    relayed(APDM_APDF, EIM_APDF);
}

#[test]
fn apdm_with_apdm_stays_on_the_relay() {
    relayed(APDM_APDF, APDM_APDF);
}

/// Checks get through, but every answer comes from yet another mapping: the two could show each other new addresses
/// for ever.
#[test]
fn apdm_with_apdm_that_filters_nothing_does_not_run_away() {
    let mut world = World::new([APDM_EIF, APDM_EIF], 1);
    world.run_until(secs(600));
    world.check_invariants();
    for peer in &world.peers {
        assert_eq!(peer.proven(), None);
        assert!(peer.count(|event| *event == Event::Exhausted) > 5);
        let checks = peer.sent.iter().filter(|sent| sent.request).count();
        assert!(checks < 1500, "{checks} checks in ten minutes");
    }
}

/// One round trip after both know of each other, when neither hears of the other before `d` after it: the case of
/// an introduction that goes to both at the same moment, by the triangle inequality.
#[test]
fn proven_one_round_trip_after_the_introduction_even_if_one_hears_it_later() {
    for late in [0, 1, 10, 19] {
        for (a, b) in [(0, late), (late, 0)] {
            let mut world = World::new([EIM_APDF, EIM_APDF], 1).introduced_at(ms(a), ms(b));
            world.run_until(secs(3));
            assert_eq!(world.peers[A].proven(), Some(ms(a + 40)), "A at {a}, B at {b}");
            assert_eq!(world.peers[B].proven(), Some(ms(b + 40)), "A at {a}, B at {b}");
            assert!(world.agree());
        }
    }
}

/// With more skew than that, the early side's first check finds the other's NAT closed; the late side's check, which
/// comes through, triggers another.
#[test]
fn more_skew_costs_the_early_side_the_way_of_one_check() {
    for late in [21, 30, 100, 150] {
        for early in [A, B] {
            let times = if early == A { (0, late) } else { (late, 0) };
            let mut world = World::new([EIM_APDF, EIM_APDF], 1).introduced_at(ms(times.0), ms(times.1));
            world.run_until(secs(3));
            assert_eq!(world.peers[1 - early].proven(), Some(ms(late + 40)));
            assert_eq!(world.peers[early].proven(), Some(ms(late + 60)));
            assert!(world.agree());
        }
    }
}

#[test]
fn many_dead_addresses_do_not_delay_the_one_that_works() {
    use rendezvous_wire::{Candidate, CandidateKind};
    let mut world = World::new([EIM_APDF, EIM_APDF], 1);
    for peer in &mut world.peers {
        for net in 17..37 {
            let address = format!("172.{net}.0.1:4000").parse().unwrap();
            peer.candidates.insert(0, Candidate::new(CandidateKind::Host, address, 65000));
        }
    }
    world.run_until(secs(3));
    assert_eq!(world.peers[A].proven(), Some(ms(40)));
    assert_eq!(world.peers[B].proven(), Some(ms(40)));
}

#[test]
fn peers_of_one_site_use_the_link_between_them() {
    for hairpin in [false, true] {
        let mut world = World::same_site(Mapping::Eim, Filtering::Apdf, hairpin, 1);
        world.run_until(secs(3));
        assert!(world.agree());
        assert_eq!(world.peers[A].selected().unwrap().remote, world.peers[B].sockets[0].1);
        assert_eq!(world.peers[A].proven(), Some(ms(2)));
    }
}

#[test]
fn the_faster_family_wins_and_a_tie_is_for_ipv6() {
    for (v6, wins) in [(20, true), (10, true), (24, false), (60, false)] {
        let line = Line { delay_v6: Some([ms(v6); 2]), ..Line::default() };
        let mut world = World::new([EIM_APDF; 2], 1).with_v6().with_line(line);
        world.run_until(secs(20));
        assert!(world.agree());
        assert_eq!(world.peers[B].selected().unwrap().remote.is_ipv6(), wins, "v6 one way {v6} ms");
        world.check_invariants();
    }
}

#[test]
fn role_conflicts_resolve() {
    for role in [Role::Controlling, Role::Controlled] {
        for kinds in [[EIM_APDF; 2], [Kind::Public; 2], [APDM_APDF, Kind::Public]] {
            for seed in 0..50 {
                let mut world = World::new(kinds, seed);
                world.peers.iter_mut().for_each(|peer| peer.role = role);
                world.run_until(secs(3));
                assert!(world.agree(), "{role:?} {kinds:?} seed {seed}");
                assert_ne!(world.peers[A].agent().role(), world.peers[B].agent().role());
                world.check_invariants();
            }
        }
    }
}

#[test]
fn the_first_checks_are_sent_at_once_and_the_rest_at_the_pace() {
    let mut world = World::new([EIM_APDF; 2], 1).with_v6();
    world.run_until(Duration::ZERO);
    assert_eq!(world.peers[A].sent.len(), 3);
}
