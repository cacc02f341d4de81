use std::collections::HashSet;

use super::*;

fn settings(seed: u64) -> Settings {
    Settings {
        seed,
        lasts: Duration::from_secs(600),
        events_per_minute: 12.0,
        quiet_end: Duration::from_secs(30),
        servers: 2,
    }
}

/// Where everybody is after `events`.
fn whereabouts(events: &[Event]) -> Vec<PlaceId> {
    let mut peers: Vec<PlaceId> = (0..PEERS).collect();
    for event in events {
        match event.what {
            Disturbance::Move { peer, to } => peers[peer] = to,
            Disturbance::MoveBoth { peers: both, to } => {
                both.into_iter().zip(to).for_each(|(peer, to)| peers[peer] = to);
            }
            _ => {}
        }
    }
    peers
}

#[test]
fn a_seed_has_one_plan_and_another_seed_another() {
    assert_eq!(Plan::new(&settings(1)), Plan::new(&settings(1)));
    assert_ne!(Plan::new(&settings(1)).events, Plan::new(&settings(2)).events);
}

#[test]
fn events_are_as_many_as_asked_for_and_of_every_kind() {
    for seed in 0..50 {
        let plan = Plan::new(&settings(seed));
        assert_eq!(plan.events.len(), 114, "seed {seed}: 9.5 minutes of 12");
        let kinds: HashSet<Kind> = plan.events.iter().map(|event| event.what.kind()).collect();
        assert_eq!(kinds.len(), Kind::ALL.len(), "seed {seed}");
    }
}

#[test]
fn three_minutes_hold_every_kind() {
    for seed in 0..50 {
        let plan = Plan::new(&Settings {
            lasts: Duration::from_secs(180),
            events_per_minute: 8.0,
            servers: 1,
            ..settings(seed)
        });
        let kinds: HashSet<Kind> = plan.events.iter().map(|event| event.what.kind()).collect();
        let missing: Vec<_> = Kind::ALL.into_iter().filter(|kind| !kinds.contains(kind)).collect();
        assert!(missing.is_empty(), "seed {seed}: {missing:?}");
    }
}

#[test]
fn nothing_lasts_into_the_quiet_end_and_nothing_beyond_its_bounds() {
    for seed in 0..50 {
        let settings = settings(seed);
        let plan = Plan::new(&settings);
        assert!(plan.events.is_sorted_by_key(|event| event.at));
        for event in &plan.events {
            assert!(event.until() <= settings.lasts - settings.quiet_end, "seed {seed}: {event:?}");
            let (_, most) = event.what.kind().lasts();
            assert!(event.lasts <= Duration::from_millis(most), "seed {seed}: {event:?}");
        }
    }
}

#[test]
fn a_server_is_always_up_where_there_are_two() {
    for seed in 0..50 {
        let plan = Plan::new(&settings(seed));
        let kills = plan.events.iter().filter(|event| event.what.kind() == Kind::KillServer);
        let kills: Vec<_> = kills.collect();
        assert!(kills.len() >= 5, "seed {seed}");
        for pair in kills.windows(2) {
            assert!(pair[0].until() + BETWEEN_KILLS <= pair[1].at, "seed {seed}: {pair:?}");
        }
    }
}

#[test]
fn paths_are_between_the_places_of_peers() {
    for seed in 0..50 {
        let plan = Plan::new(&settings(seed));
        for (number, event) in plan.events.iter().enumerate() {
            let peers = whereabouts(&plan.events[..number]);
            match event.what {
                Disturbance::Cut { between, .. } | Disturbance::Narrow { between, .. } => {
                    assert_ne!(between[0], between[1]);
                    assert!(between.iter().all(|place| peers.contains(place)), "seed {seed}: {event:?}");
                }
                Disturbance::Move { peer, to } => assert_ne!(peers[peer], to),
                Disturbance::MoveBoth { peers: both, to } => {
                    assert_ne!(both[0], both[1]);
                    assert!(both.into_iter().zip(to).all(|(peer, to)| peers[peer] != to));
                }
                Disturbance::SleepBoth { peers } => assert_ne!(peers[0], peers[1]),
                _ => {}
            }
        }
    }
}

#[test]
fn homes_differ_and_some_block_udp() {
    let plans: Vec<_> = (0..60).map(|seed| Plan::new(&settings(seed))).collect();
    let blocked = plans
        .iter()
        .filter(|plan| plan.places.iter().any(|place| place.network.kind == RouterKind::UdpBlocked));
    assert!((10..30).contains(&blocked.count()));
    let kinds: HashSet<_> = plans.iter().flat_map(|plan| &plan.places).map(|place| place.network).collect();
    assert!(kinds.len() >= 20, "{}", kinds.len());
}
