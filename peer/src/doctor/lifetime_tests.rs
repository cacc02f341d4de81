use super::super::model::{DependsOn, Nat, Ports, World, server};
use super::*;

fn seconds(silences: &[u64]) -> Vec<Duration> {
    silences.iter().map(|silence| Duration::from_secs(*silence)).collect()
}

fn nat(lifetime: u64, mapping: (DependsOn, Ports)) -> Nat {
    let lifetime = Duration::from_secs(lifetime);
    Nat { mapping: Some(mapping), filtering: DependsOn::AddressAndPort, lifetime, hairpins: false }
}

fn search(world: &mut World, silences: &[u64], limit: u64) -> (BindingLifetime, Duration) {
    let mut search = LifetimeSearch::new(server()[0], 0, &seconds(silences), 3, world.now);
    let took = world.run(&mut search, Duration::from_secs(limit));
    assert!(search.is_done() || took > Duration::from_secs(limit));
    (search.result(), took)
}

const SILENCES: [u64; 7] = [5, 10, 15, 30, 60, 120, 240];

#[test]
fn a_lifetime_is_found_between_two_silences() {
    for mapping in [
        (DependsOn::Nothing, Ports::Kept),
        (DependsOn::Nothing, Ports::Random),
        (DependsOn::AddressAndPort, Ports::Random),
        (DependsOn::AddressAndPort, Ports::Step(2)),
    ] {
        for (lifetime, at_least, less_than) in [
            (3, None, Some(5)),
            (12, Some(10), Some(15)),
            (31, Some(30), Some(60)),
            (100, Some(60), Some(120)),
            (600, Some(240), None),
        ] {
            let mut world = World::new(nat(lifetime, mapping), 1);
            let (found, took) = search(&mut world, &SILENCES, 600);
            let expected = [at_least, less_than].map(|known| known.map(Duration::from_secs));
            assert_eq!([found.at_least, found.less_than], expected, "{mapping:?}, {lifetime} s");
            // It does not go on where the answer is known.
            let last = less_than.unwrap_or(240);
            assert!(took < Duration::from_secs(last + 10), "{took:?}");
        }
    }
}

#[test]
fn lost_packets_are_not_taken_for_lost_bindings() {
    for seed in 0..200 {
        let mut world = World::new(nat(38, (DependsOn::Nothing, Ports::Kept)), seed);
        world.loss = 0.05;
        let found = search(&mut world, &SILENCES, 600).0;
        assert!(found.less_than.is_none_or(|gone| gone >= Duration::from_secs(60)), "seed {seed}: {found:?}");
        assert_eq!(found.at_least, Some(Duration::from_secs(30)), "seed {seed}: {found:?}");
    }
}

#[test]
fn a_silent_server_proves_nothing() {
    let mut world = World::new(nat(31, (DependsOn::Nothing, Ports::Kept)), 1);
    world.blocked = true;
    assert_eq!(search(&mut world, &SILENCES, 600).0, BindingLifetime::default());

    let mut world = World::new(nat(31, (DependsOn::Nothing, Ports::Kept)), 1);
    let mut lost = LifetimeSearch::new(server()[0], 0, &seconds(&SILENCES), 3, world.now);
    world.run(&mut lost, Duration::from_secs(8));
    world.blocked = true;
    world.run(&mut lost, Duration::from_secs(600));
    assert_eq!(lost.result().at_least, Some(Duration::from_secs(5)));
    assert_eq!(lost.result().less_than, None, "the server is gone, not the bindings");
}
