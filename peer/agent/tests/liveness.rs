//! Paths that die under traffic, and paths that only seem to.

mod util;

use std::time::Duration;

use peer_agent::{DeselectReason, Event};
use util::{A, B, Filtering, Kind, Line, Mapping, World, ms, secs};

const EIM_APDF: Kind = Kind::Behind(Mapping::Eim, Filtering::Apdf);

const SIDES: [usize; 2] = [A, B];

/// Homes 80 ms apart.
fn homes(seed: u64) -> World {
    let line = Line { delay: [ms(40); 2], ..Line::default() };
    World::new([EIM_APDF, EIM_APDF], seed).with_line(line)
}

fn doubts(world: &World, side: usize) -> usize {
    world.peers[side].count(|event| matches!(event, Event::Doubtful { .. }))
}

fn losses(world: &World, side: usize) -> usize {
    world.peers[side].count(|event| matches!(event, Event::Deselected { .. }))
}

/// Which directions are cut: from A, from B.
const CUTS: [[bool; 2]; 3] = [[true, true], [true, false], [false, true]];

fn cut(world: &mut World, directions: [bool; 2]) {
    world.line.loss = directions.map(f64::from);
}

#[test]
fn a_path_that_dies_under_traffic_is_left_within_half_a_second_and_taken_again_within_two() {
    for directions in CUTS {
        for (outage, sender) in [(5, A), (5, B), (20, A), (20, B)] {
            for seed in 0..4 {
                let what = format!("{directions:?} for {outage} s, {sender} sends, seed {seed}");
                let mut world = homes(seed);
                world.run_until(secs(3));
                world.ping(sender, ms(20));
                world.run_until(secs(10) + ms(seed));
                assert!(world.agree());
                let start = world.now;
                cut(&mut world, directions);
                world.run_until(start + secs(outage));
                let gap = world.peers[sender].flow.gap(start, world.now);
                assert!(gap <= ms(460), "{what}: {gap:?} without an answer");
                for side in SIDES {
                    let peer = &world.peers[side];
                    let lost = peer.first(|event| {
                        matches!(event, Event::Deselected { reason: DeselectReason::TrafficUnanswered, .. })
                    });
                    let lost = lost.unwrap_or_else(|| panic!("{what}: {side} does not notice")) - start;
                    assert!(lost < ms(2000), "{what}: {lost:?}");
                    assert_eq!(peer.flow.uses(), [false, true], "{what}: the relay alone");
                }
                let back = world.now;
                cut(&mut world, [false; 2]);
                world.run_while(back + secs(10), |world| {
                    !(world.agree()
                        && SIDES.iter().all(|side| world.peers[*side].flow.uses() == [true, false]))
                });
                let took = world.now - back;
                assert!(took < ms(2000), "{what}: direct again after {took:?}");
                let answered = world.now;
                world.run_until(back + secs(20));
                let gap = world.peers[sender].flow.gap(back, world.now);
                assert!(gap <= ms(250), "{what}: {gap:?} on the way back, {answered:?}");
                for side in SIDES {
                    assert_eq!(losses(&world, side), 1, "{what}: and it stays");
                }
                world.check_invariants();
            }
        }
    }
}

#[test]
fn the_other_side_learns_of_its_deafness_by_copies() {
    // Whoever is heard and does not hear notices at once; the other one has nothing to send.
    for deaf in SIDES {
        let mut world = homes(3);
        world.run_until(secs(10));
        world.line.loss[1 - deaf] = 1.0;
        world.ping(deaf, ms(20));
        world.run_until(secs(10) + ms(500));
        for side in SIDES {
            assert!(doubts(&world, side) > 0, "{side}");
        }
        assert!(!world.peers[deaf].flow.answered.is_empty());
    }
}

#[test]
fn half_an_hour_without_traffic_is_no_reason() {
    for seed in 0..10 {
        let line = Line { delay: [ms(40); 2], loss: [0.05; 2], jitter: ms(50), ..Line::default() };
        let mut world = World::new([EIM_APDF, EIM_APDF], seed).with_line(line);
        world.run_until(secs(1800));
        for side in SIDES {
            assert_eq!((doubts(&world, side), losses(&world, side)), (0, 0));
        }
    }
}

#[test]
fn a_path_that_goes_quiet_after_traffic_is_not_asked_for_ever() {
    let mut world = homes(1);
    world.run_until(secs(10));
    let before = SIDES.map(|side| world.peers[side].sent.len());
    world.ping(A, ms(20));
    world.run_until(secs(20));
    world.peers[A].flow.next = None;
    world.run_until(secs(1800));
    for side in SIDES {
        assert_eq!((doubts(&world, side), losses(&world, side)), (0, 0));
        let sent = world.peers[side].sent.len() - before[side];
        assert!(sent <= 910, "{sent} datagrams: consent and little else");
    }
}

/// Doubts and losses of both sides in an hour of 3,600 pings, or in ten minutes of many more.
fn pings(line: &Line, every: Duration, seed: u64) -> [usize; 2] {
    let mut world = World::new([EIM_APDF, EIM_APDF], seed).with_line(line.clone());
    world.run_until(secs(10));
    world.ping(A, every);
    // The other one's are never at the same moments.
    world.ping(B, every + ms(7));
    world.run_until(secs(10) + (3600 * every).max(secs(600)));
    let sum = |of: fn(&World, usize) -> usize| SIDES.iter().map(|side| of(&world, *side)).sum();
    [sum(doubts), sum(losses)]
}

#[test]
fn loss_and_jitter_make_doubts_now_and_then_but_no_path_is_given_up() {
    // Each ping costs its acknowledger a question as well: its acknowledgement has no answer.
    let lines = [(0.0, 50, 20, 0), (0.0, 50, 1000, 5), (0.01, 0, 1000, 20), (0.01, 50, 1000, 40)];
    for (loss, jitter, every, most) in lines.into_iter().chain([(0.05, 50, 20, 20), (0.05, 50, 1000, 250)]) {
        let line = Line { delay: [ms(20); 2], loss: [loss; 2], jitter: ms(jitter), ..Line::default() };
        let [doubts, losses] = pings(&line, ms(every), 11);
        let what = format!("{loss} loss, {jitter} ms jitter, a ping every {every} ms: {doubts} doubts");
        println!("{what}, {losses} paths given up");
        assert_eq!(losses, 0, "{what}");
        assert!(doubts <= most, "{what}");
    }
}

#[test]
fn false_doubts_do_not_echo_between_the_two() {
    for seed in 0..50 {
        let mut world = homes(seed);
        world.run_until(secs(10));
        world.ping(A, ms(20));
        world.ping(B, ms(20));
        world.run_until(secs(11));
        // Long enough for one doubt.
        world.line.cut = true;
        world.run_until(secs(11) + ms(350) + ms(seed));
        world.line.cut = false;
        world.run_until(secs(60));
        for side in SIDES {
            let doubts = doubts(&world, side);
            assert!((1..=2).contains(&doubts), "seed {seed}: {doubts} doubts of {side}");
            assert_eq!(losses(&world, side), 0, "seed {seed}");
            assert_eq!(world.peers[side].flow.uses(), [true, false]);
        }
    }
}

#[test]
fn a_mapping_that_changes_under_traffic_costs_half_a_second() {
    let eif = Kind::Behind(Mapping::Eim, Filtering::Eif);
    // Who has a new mapping, who sends.
    for (moved, sender) in [(A, A), (A, B), (B, A), (B, B)] {
        for seed in 0..20 {
            let what = format!("{moved} moves, {sender} sends, seed {seed}");
            let mut kinds = [eif; 2];
            kinds[moved] = EIM_APDF;
            let line = Line { delay: [ms(40); 2], ..Line::default() };
            let mut world = World::new(kinds, seed).with_line(line);
            world.run_until(secs(3));
            world.ping(sender, ms(20));
            world.run_until(secs(10) + ms(seed));
            world.sites[moved].reboot();
            let start = world.now;
            world.run_while(start + secs(5), |world| {
                world.now <= start
                    || !(world.agree()
                        && SIDES.iter().all(|side| world.peers[*side].flow.uses() == [true, false]))
            });
            let took = world.now - start;
            assert!(took < ms(1000), "{what}: settled after {took:?}");
            world.run_until(start + secs(10));
            let gap = world.peers[sender].flow.gap(start, world.now);
            assert!(gap <= ms(460), "{what}: {gap:?} without an answer");
            world.check_invariants();
        }
    }
}

#[test]
fn a_lost_path_is_asked_ever_more_rarely() {
    let mut world = homes(1);
    world.run_until(secs(10));
    world.ping(A, ms(20));
    cut(&mut world, [true; 2]);
    let per_second = |world: &World, from: u64, to: u64| {
        let sent = world.peers[A].sent.iter().filter(|sent| sent.request);
        let within = sent.filter(|sent| (secs(from)..secs(to)).contains(&sent.at)).count();
        within as f64 / (to - from) as f64
    };
    world.run_until(secs(10 + 7200));
    let rates = [(30, 60), (300, 600), (3600, 7200)].map(|(from, to)| per_second(&world, 10 + from, 10 + to));
    assert!(rates[0] < 5.0 && rates[1] < rates[0] && rates[2] < 0.5, "{rates:?}");
}
