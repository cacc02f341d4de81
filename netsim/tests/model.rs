//! The modelled routers do what their names say. That they do what the lab's do is tested in `routers`, beside these.

use netsim::probe::{self, Behaviour};
use netsim::{Filtering, InputPolicy, Mapping, PortAllocation, Router, RouterKind, SiteConfig};

#[test]
fn every_kind_behaves_as_named() {
    for input in InputPolicy::ALL {
        for kind in RouterKind::ALL {
            for seed in 1..4 {
                let expected = Behaviour::expected(kind, input);
                let config = SiteConfig::new(kind).input(input);
                assert_eq!(
                    probe::observe_model(config, &expected, seed).unwrap(),
                    expected,
                    "{kind}, INPUT {input}"
                );
            }
        }
    }
}

#[test]
fn every_mapping_goes_with_every_filtering() {
    use Filtering::{AddressAndPortDependent as Apdf, AddressDependent as Adf, EndpointIndependent as Eif};
    use Mapping::{AddressAndPortDependent as Apdm, EndpointIndependent as Eim};
    for mapping in [Eim, Apdm] {
        for filtering in [Eif, Adf, Apdf] {
            for allocation in
                [PortAllocation::Random, PortAllocation::Sequential { step: 2 }, PortAllocation::Preserving]
            {
                let mut router = Router::nat(mapping, filtering);
                router.allocation = allocation;
                let expected = Behaviour::expected(RouterKind::EimEif, InputPolicy::Drop);
                let seen =
                    probe::observe_model(SiteConfig::with_routers(vec![router]), &expected, 1).unwrap();
                assert_eq!(
                    (seen.mapping, seen.filtering, seen.shared_port),
                    (Some(mapping), Some(filtering), Some(true)),
                    "{mapping:?} {filtering:?} {allocation:?}"
                );
            }
        }
    }
}
