use super::super::finding::{Allocation, Mapping};
use super::super::model::{DependsOn, LOCAL, Nat, Ports, World, own_ports, server};
use super::*;

const SILENCES: [Duration; 2] = [Duration::from_secs(3), Duration::from_secs(6)];

fn measure(world: &mut World) -> (FamilyFinding, Duration) {
    let plan = Plan {
        server: server(),
        ports: own_ports(Plan::sockets(SILENCES.len())),
        local: LOCAL.parse().unwrap(),
        silences: SILENCES.to_vec(),
    };
    let mut measurement = Measurement::new(plan, 9, world.now);
    let took = world.run(&mut measurement, Duration::from_secs(30));
    assert!(measurement.is_done());
    (measurement.finding(), took)
}

const LONG: Duration = Duration::from_secs(120);

const MAPPINGS: [Option<(DependsOn, Ports)>; 9] = [
    None,
    Some((DependsOn::Nothing, Ports::Kept)),
    Some((DependsOn::Nothing, Ports::Step(2))),
    Some((DependsOn::Nothing, Ports::Random)),
    Some((DependsOn::Address, Ports::Random)),
    Some((DependsOn::Address, Ports::Step(1))),
    Some((DependsOn::AddressAndPort, Ports::Kept)),
    Some((DependsOn::AddressAndPort, Ports::Step(4))),
    Some((DependsOn::AddressAndPort, Ports::Random)),
];

const FILTERINGS: [DependsOn; 3] = [DependsOn::Nothing, DependsOn::Address, DependsOn::AddressAndPort];

fn expected_mapping(mapping: Option<(DependsOn, Ports)>, two: bool) -> Mapping {
    let Some((depends, ports)) = mapping else { return Mapping::None };
    let allocation = match ports {
        Ports::Kept => Allocation::Preserving,
        Ports::Step(step) => Allocation::Sequential(step.into()),
        Ports::Random => Allocation::Random,
    };
    match depends {
        DependsOn::Nothing if two => Mapping::EndpointIndependent(allocation),
        DependsOn::Address if two => Mapping::AddressDependent(allocation),
        DependsOn::Nothing | DependsOn::Address => Mapping::NotByPort(allocation),
        DependsOn::AddressAndPort => Mapping::AddressAndPortDependent(allocation),
    }
}

fn expected_filtering(filtering: DependsOn, two: bool) -> Filtering {
    match filtering {
        DependsOn::Nothing if two => Filtering::EndpointIndependent,
        DependsOn::Address if two => Filtering::AddressDependent,
        DependsOn::Nothing | DependsOn::Address => Filtering::NotByPort,
        DependsOn::AddressAndPort => Filtering::AddressAndPortDependent,
    }
}

#[test]
fn every_kind_of_nat_is_named_with_one_server_address_and_with_two() {
    for two_addresses in [true, false] {
        for mapping in MAPPINGS {
            for filtering in FILTERINGS {
                let nat = Nat { mapping, filtering, lifetime: LONG, hairpins: false };
                let mut world = World::new(nat, 5);
                world.two_addresses = two_addresses;
                let (finding, took) = measure(&mut world);
                assert_eq!(finding.mapping, expected_mapping(mapping, two_addresses), "{nat:?}");
                assert_eq!(finding.filtering, expected_filtering(filtering, two_addresses), "{nat:?}");
                assert_eq!(finding.lifetime.at_least, Some(SILENCES[1]));
                assert_eq!(finding.rtt, Some(Duration::from_millis(40)));
                assert!(took < Duration::from_secs(10), "{took:?}");
                assert!(world.sent < 80, "{} packets", world.sent);
            }
        }
    }
}

#[test]
fn hairpinning_is_seen() {
    for hairpins in [true, false] {
        let mapping = Some((DependsOn::Nothing, Ports::Kept));
        for filtering in FILTERINGS {
            let mut world = World::new(Nat { mapping, filtering, lifetime: LONG, hairpins }, 5);
            assert_eq!(measure(&mut world).0.hairpinning, Some(hairpins), "{filtering:?}");
        }
    }
}

#[test]
fn short_lifetimes_are_bounded() {
    let mapping = Some((DependsOn::Nothing, Ports::Kept));
    let nat = Nat {
        mapping,
        filtering: DependsOn::AddressAndPort,
        lifetime: Duration::from_secs(5),
        hairpins: false,
    };
    let lifetime = measure(&mut World::new(nat, 5)).0.lifetime;
    assert_eq!((lifetime.at_least, lifetime.less_than), (Some(SILENCES[0]), Some(SILENCES[1])));
}

#[test]
fn a_blocked_network_is_given_up_soon() {
    let nat = Nat { mapping: None, filtering: DependsOn::Nothing, lifetime: LONG, hairpins: false };
    let mut world = World::new(nat, 5);
    world.blocked = true;
    let (finding, took) = measure(&mut world);
    assert!(!finding.works() && took < Duration::from_secs(5), "{took:?}");
    assert_eq!((finding.mapping, finding.filtering), (Mapping::Unknown, Filtering::Unknown));
}

#[test]
fn loss_does_not_change_what_is_found() {
    let nat = Nat {
        mapping: Some((DependsOn::Nothing, Ports::Kept)),
        filtering: DependsOn::Address,
        lifetime: LONG,
        hairpins: true,
    };
    let mut right = 0;
    for seed in 0..100 {
        let mut world = World::new(nat, seed);
        world.loss = 0.05;
        let (finding, _) = measure(&mut world);
        assert_eq!(finding.mapping, Mapping::EndpointIndependent(Allocation::Preserving), "seed {seed}");
        right += usize::from(
            finding.filtering == Filtering::AddressDependent && finding.hairpinning == Some(true),
        );
    }
    assert!(right >= 98, "{right} of 100");
}
