//! Selected paths: consent, change, loss.

mod util;

use std::time::Duration;

use peer_agent::{DeselectReason, Event, PairState};
use rendezvous_wire::message::Role;
use util::{A, B, Filtering, Kind, Line, Mapping, World, ms, secs};

const EIM_APDF: Kind = Kind::Behind(Mapping::Eim, Filtering::Apdf);
const EIM_EIF: Kind = Kind::Behind(Mapping::Eim, Filtering::Eif);

const SIDES: [usize; 2] = [A, B];

fn selections(world: &World, side: usize) -> usize {
    world.peers[side].count(|event| matches!(event, Event::Selected(_)))
}

/// How long it takes from now until both agree on a working path again.
fn time_to_agree(world: &mut World, at_most: Duration) -> Duration {
    let start = world.now;
    world.run_while(start + at_most, |world| !world.agree());
    assert!(world.agree(), "no agreement after {at_most:?}");
    world.now - start
}

#[test]
fn consent_loss_falls_back_and_the_path_is_found_again() {
    for seed in 0..100 {
        let mut world = World::new([EIM_APDF, EIM_APDF], seed);
        world.run_until(secs(60));
        world.line.cut = true;
        world.run_until(secs(200));
        for side in SIDES {
            let peer = &world.peers[side];
            let lost = peer.first(|event| {
                matches!(event, Event::Deselected { reason: DeselectReason::ConsentExpired, .. })
            });
            // The last answer came at most 6 s and a round trip before the cut.
            let lost = lost.expect("deselected") - secs(60);
            assert!(lost > secs(30 - 7) && lost <= secs(30) + ms(20), "seed {seed}: lost after {lost:?}");
            assert_eq!(peer.selected(), None);
            assert!(peer.count(|event| *event == Event::Exhausted) >= 3);
        }
        world.line.cut = false;
        let took = time_to_agree(&mut world, secs(66));
        assert!(took > Duration::ZERO);
        world.check_invariants();
    }
}

#[test]
fn half_an_hour_of_idling_changes_nothing() {
    let mut world = World::new([EIM_APDF, EIM_APDF], 1).with_v6();
    world.run_until(secs(10));
    let before = SIDES.map(|side| world.peers[side].sent.len());
    world.run_until(secs(10 + 1800));
    assert!(world.agree());
    for side in SIDES {
        assert_eq!(
            selections(&world, side),
            selections(&world, side).min(2),
            "one choice, perhaps a better one"
        );
        let last = world.peers[side].events.last().unwrap().0;
        assert!(last < secs(3), "nothing happened since {last:?}");
        // A check and an answer to one, every 4 to 6 s.
        let sent = world.peers[side].sent.len() - before[side];
        assert!((600..=900).contains(&sent), "{sent} datagrams");
    }
}

#[test]
fn half_an_hour_of_idling_on_a_bad_line_changes_nothing() {
    for seed in 0..20 {
        let line = Line { loss: [0.05; 2], jitter: ms(15), duplication: 0.02, ..Line::default() };
        let mut world = World::new([EIM_APDF, EIM_APDF], seed).with_line(line);
        world.run_until(secs(1800));
        assert!(world.agree());
        for side in SIDES {
            assert_eq!(selections(&world, side), 1, "seed {seed}");
        }
    }
}

#[test]
fn a_mapping_that_changes_is_followed_where_filtering_lets_it() {
    for seed in 0..50 {
        let mut world = World::new([EIM_APDF, EIM_EIF], seed);
        world.run_until(secs(20));
        assert!(world.agree());
        world.sites[A].reboot();
        assert!(!world.agree());
        // A's next consent check shows the new mapping; three checks on the old one later B uses it.
        let took = time_to_agree(&mut world, secs(10));
        assert!(took < secs(6) + ms(1000), "seed {seed}: {took:?}");
    }
}

#[test]
fn a_peer_that_moves_and_restarts_is_found_within_a_second() {
    for (mover, controlling) in [(A, A), (A, B), (B, A), (B, B)] {
        let mut world = World::new([Kind::Public, Kind::Public], 7);
        world.peers[controlling].role = Role::Controlling;
        world.peers[1 - controlling].role = Role::Controlled;
        world.run_until(secs(100));
        assert!(world.agree());
        world.peers[mover].sockets[0].1 = "203.0.113.99:4000".parse().unwrap();
        world.with_agent(mover, peer_agent::Agent::restart);
        let took = time_to_agree(&mut world, secs(10));
        assert!(took < ms(1000), "{mover} moves, {controlling} controls: {took:?}");
        assert_eq!(world.peers[mover].count(|event| matches!(event, Event::Deselected { .. })), 0);
    }
}

#[test]
fn a_dead_family_is_left_after_a_restart_of_either_side() {
    for restarts in SIDES {
        let mut world = World::new([EIM_APDF, EIM_APDF], 3).with_v6();
        world.run_until(secs(300));
        assert!(world.peers[A].selected().unwrap().remote.is_ipv6());
        world.line.cut_family[1] = true;
        world.with_agent(restarts, peer_agent::Agent::restart);
        let v4 = |world: &World| {
            world.agree() && world.peers[A].selected().is_some_and(|path| path.remote.is_ipv4())
        };
        world.run_while(secs(310), |world| !v4(world));
        assert!(v4(&world), "{restarts} restarts");
        let took = world.now - secs(300);
        assert!(took < ms(1100), "{restarts} restarts: {took:?}");
    }
}

#[test]
fn a_restart_on_a_healthy_line_keeps_the_path() {
    for restarts in SIDES {
        let mut world = World::new([EIM_APDF, EIM_APDF], 5).with_v6();
        world.run_until(secs(100));
        let before = world.peers[A].selected();
        world.with_agent(restarts, peer_agent::Agent::restart);
        world.run_until(secs(130));
        assert!(world.agree());
        assert_eq!(world.peers[A].selected(), before);
        for side in SIDES {
            assert_eq!(world.peers[side].count(|event| matches!(event, Event::Deselected { .. })), 0);
        }
    }
}

#[test]
fn a_selected_path_that_is_dead_after_a_restart_is_given_up_after_one_volley() {
    let mut world = World::new([EIM_APDF, EIM_APDF], 5);
    world.run_until(secs(100));
    world.line.cut = true;
    world.with_agent(B, peer_agent::Agent::restart);
    world.run_until(secs(107));
    let peer = &world.peers[B];
    assert_eq!(peer.selected(), None);
    let unanswered =
        |event: &Event| matches!(event, Event::Deselected { reason: DeselectReason::Unanswered, .. });
    assert_eq!(peer.first(unanswered), Some(secs(106)));
}

#[test]
fn a_candidate_that_comes_late_is_checked_at_once() {
    let mut world = World::new([EIM_APDF, EIM_APDF], 1);
    let candidates = [A, B].map(|side| std::mem::take(&mut world.peers[side].candidates));
    world.run_until(secs(40));
    for side in SIDES {
        assert!(world.peers[side].count(|event| *event == Event::Exhausted) > 0);
        for candidate in &candidates[1 - side] {
            world.with_agent(side, |agent, now| agent.add_remote_candidate(*candidate, now));
        }
    }
    world.run_until(secs(41));
    assert!(world.agree());
    assert_eq!(world.peers[A].proven(), Some(secs(40) + ms(40)));
}

#[test]
fn pairs_are_given_up_soon_after_a_path_is_selected() {
    let mut world = World::new([EIM_APDF, EIM_APDF], 1);
    world.run_until(secs(20));
    for peer in &world.peers {
        let last = peer.sent.iter().rfind(|sent| Some(sent.path) != peer.selected()).unwrap().at;
        assert!(last < ms(1100), "{last:?}");
        let report = peer.agent().report();
        let other = report.iter().find(|pair| !pair.selected).unwrap();
        assert_eq!((other.state, other.checks_answered), (PairState::Superseded, 0));
        let selected = report.iter().find(|pair| pair.selected).unwrap();
        assert_eq!(selected.rtt, Some(ms(40)));
        assert!(selected.mapped.is_some() && selected.checks_received > 0);
    }
}

#[test]
fn an_hour_of_sleep_costs_one_round_trip() {
    for sleeper in SIDES {
        let mut world = World::new([Kind::Public, EIM_APDF], 1).with_v6();
        world.run_until(secs(100));
        // Nobody runs: the one that slept and the one that waited wake at the same moment.
        world.now += secs(3600);
        let woke = world.now;
        world.with_agent(sleeper, peer_agent::Agent::restart);
        world.run_until(woke + ms(200));
        assert!(world.agree());
        for side in SIDES {
            let proven =
                world.peers[side].events.iter().rfind(|(_, event)| matches!(event, Event::Proven { .. }));
            assert!(proven.unwrap().0 <= woke + ms(80));
        }
    }
}

#[test]
fn the_round_trip_time_of_another_network_is_not_mixed_with_that_of_the_last() {
    let mut world = World::new([Kind::Public, Kind::Public], 1);
    world.run_until(secs(100));
    assert_eq!(world.peers[A].agent().selected().unwrap().rtt, ms(40));
    world.line.delay = [ms(100); 2];
    world.with_agent(A, peer_agent::Agent::restart);
    world.run_until(secs(101));
    assert!(world.peers[A].agent().selected().unwrap().rtt > ms(150));
}

#[test]
fn a_path_that_works_one_way_is_never_selected() {
    for deaf in SIDES {
        let mut world = World::new([Kind::Public, Kind::Public], 1);
        world.line.loss[1 - deaf] = 1.0;
        world.run_until(secs(300));
        world.check_invariants();
        for peer in &world.peers {
            assert_eq!((peer.proven(), peer.selected()), (None, None));
            let rounds = peer.count(|event| *event == Event::Exhausted);
            assert!((5..=9).contains(&rounds), "{rounds} rounds");
            // A volley by itself, and at most one more that the other side's checks set off.
            let checks = peer.sent.iter().filter(|sent| sent.request).count();
            assert!(checks <= (rounds + 1) * 2 * 7, "{checks} checks");
        }
        let report = world.peers[1 - deaf].agent().report();
        assert!(report[0].checks_received > 0 && report[0].checks_answered == 0, "the report shows it");
        assert_eq!(world.peers[deaf].agent().report()[0].checks_received, 0);
    }
}
