use super::*;

use std::net::SocketAddrV4;

use crate::portmap::Protocol;

const EIM: Mapping = Mapping::EndpointIndependent(Allocation::Preserving);
const APDM: Mapping = Mapping::AddressAndPortDependent(Allocation::Random);

fn finding(mapping: Mapping, filtering: Filtering) -> FamilyFinding {
    FamilyFinding {
        local: "192.168.1.10:4000".parse().unwrap(),
        mapped: vec!["198.18.1.2:4000".parse().unwrap(); 4],
        rtt: Some(Duration::from_millis(40)),
        mapping,
        filtering,
        hairpinning: Some(false),
        lifetime: BindingLifetime { at_least: Some(Duration::from_secs(7)), less_than: None },
    }
}

fn diagnosis(ipv4: Family) -> Diagnosis {
    Diagnosis {
        server: "rv://aebagbafaydqqcikbmga2dqpcaireeyuculbogazdinryhi6d4qa@203.0.113.10".parse().unwrap(),
        signalling: Ok(("203.0.113.10:443".parse().unwrap(), Duration::from_millis(40))),
        ipv4,
        ipv6: Family::NotAtServer { here: false },
        hops: vec!["192.168.1.1".parse().unwrap()],
        tcp: Tcp::Silent,
        portal: None,
        port_mapping: PortMapping::NotTested,
        machine: Machine::default(),
    }
}

fn of(mapping: Mapping, filtering: Filtering) -> Diagnosis {
    diagnosis(Family::Works(finding(mapping, filtering)))
}

fn blocked() -> Diagnosis {
    let host = "203.0.113.10".to_owned();
    let mut blocked = diagnosis(Family::Broken { local: "192.168.1.10".parse().unwrap() });
    blocked.signalling = Err(ServerError::Unreachable { host, port: 443 });
    blocked.tcp = Tcp::Refused;
    blocked
}

#[test]
fn a_mapping_at_the_address_that_servers_see_makes_up_for_the_nat() {
    let filtering = Filtering::AddressAndPortDependent;
    let seen = match of(APDM, filtering).ipv4.finding().unwrap().mapped[0] {
        SocketAddr::V4(address) => *address.ip(),
        SocketAddr::V6(address) => panic!("{address}"),
    };
    let works = |ip| {
        let external = SocketAddrV4::new(ip, 40_000);
        PortMapping::Works(Mapped { protocol: Protocol::NatPmp, external })
    };
    for (port_mapping, expected, words) in [
        (works(seen), Reach::Everybody, "asked by NAT-PMP"),
        (works("8.7.6.5".parse().unwrap()), Reach::NotPortDependent, "8.7.6.5:40000"),
        (PortMapping::BehindAnotherNat, Reach::NotPortDependent, "behind another NAT"),
        (PortMapping::Unavailable, Reach::NotPortDependent, "switch on port mapping"),
    ] {
        let diagnosis = Diagnosis { port_mapping, ..of(APDM, filtering) };
        assert_eq!(diagnosis.reach(), expected, "{diagnosis}");
        assert!(diagnosis.to_string().contains(words), "{diagnosis}");
    }
}

#[test]
fn every_finding_has_its_reach() {
    use Filtering::{AddressAndPortDependent, AddressDependent, EndpointIndependent, NotByPort, Unknown};
    let sequential = Mapping::AddressAndPortDependent(Allocation::Sequential(1));
    for (mapping, filtering, expected) in [
        (Mapping::None, EndpointIndependent, Reach::Everybody),
        (Mapping::None, AddressAndPortDependent, Reach::EverybodyInTime),
        (EIM, EndpointIndependent, Reach::Everybody),
        (EIM, AddressDependent, Reach::Everybody),
        (Mapping::NotByPort(Allocation::Random), NotByPort, Reach::Everybody),
        (EIM, AddressAndPortDependent, Reach::EverybodyInTime),
        (EIM, Unknown, Reach::EverybodyInTime),
        (APDM, AddressAndPortDependent, Reach::NotPortDependent),
        (sequential, AddressAndPortDependent, Reach::NotRandomPorts),
        (Mapping::AddressDependent(Allocation::Random), AddressDependent, Reach::NotPortDependent),
        (Mapping::Unknown, Unknown, Reach::Unknown),
    ] {
        assert_eq!(of(mapping, filtering).reach(), expected, "{mapping}, {filtering}");
    }
    assert_eq!(blocked().reach(), Reach::Nobody);
    let absent = Family::Absent;
    assert_eq!(diagnosis(absent).reach(), Reach::Unknown, "signalling works, so UDP does");
}

#[test]
fn a_carriers_nat_is_known_by_its_range() {
    let filtering = Filtering::AddressAndPortDependent;
    assert_eq!(of(EIM, filtering).translators(), Translators::One);
    assert_eq!(of(Mapping::None, filtering).translators(), Translators::None);
    assert_eq!(blocked().translators(), Translators::Unknown);
    let mut carrier = of(APDM, filtering);
    carrier.hops.push("100.64.0.1".parse().unwrap());
    assert_eq!(carrier.translators(), Translators::Carrier);
    assert!(carrier.to_string().contains("100.64.0.1"));
    assert!(carrier.advice()[0].contains("carrier"), "no advice to change a router that is not the cause");
    assert!(of(APDM, filtering).advice()[0].contains("router"));

    // Some VPNs use that range as well.
    let mut own = finding(EIM, filtering);
    own.local = "100.100.1.2:4000".parse().unwrap();
    let mut vpn = diagnosis(Family::Works(own));
    assert_eq!(vpn.translators(), Translators::Carrier);
    vpn.machine.through = Some("tailscale0".to_owned());
    assert_eq!(vpn.translators(), Translators::One);
    assert!(vpn.to_string().contains("leave the VPN"));
}

#[test]
fn the_report_has_a_line_for_every_fact_and_a_verdict() {
    let text = of(EIM, Filtering::AddressAndPortDependent).to_string();
    for words in [
        "rendezvous server   203.0.113.10:443",
        "192.168.1.10:4000 is seen as 198.18.1.2:4000\n",
        "endpoint-independent, own port where it is free: ",
        "address-and-port-dependent: ",
        "hairpinning       no",
        "binding lifetime  at least 7 s",
        "verdict: direct with everybody",
    ] {
        assert!(text.contains(words), "no {words:?} in\n{text}");
    }
    let text = blocked().to_string();
    assert!(text.contains("no answer from 203.0.113.10 on UDP port 443"), "{text}");
    assert!(
        text.contains("nobody listens at the server's port")
            && text.contains("let out UDP")
            && text.contains("see to the server"),
        "{text}"
    );
    let mut portal = blocked();
    portal.portal = Some("http://login.example/".to_owned());
    assert!(portal.to_string().contains("http://login.example/") && portal.advice()[0].contains("log in"));
}

#[test]
fn what_tcp_leaves_is_told() {
    let address: SocketAddr = "203.0.113.10:443".parse().unwrap();
    let works = |through_proxy| Tcp::Works { address, through_proxy, took: Duration::from_millis(80) };
    let mut left = blocked();
    left.tcp = works(false);
    assert_eq!((left.reach(), left.failure().is_none()), (Reach::RelayOnly, true));
    let text = left.to_string();
    for words in ["no answer from 203.0.113.10 on UDP port 443", "key proved", "by TCP", "let out UDP"] {
        assert!(text.contains(words), "no {words:?} in {text}");
    }
    assert!(!text.contains("nor on TCP"), "{text}");
    left.tcp = works(true);
    assert!(left.to_string().contains("through the proxy 203.0.113.10:443"));
    // Somebody in between: that is the cause, and not that nothing came back.
    let host = "203.0.113.10".to_owned();
    let cause = "its answer is not TLS".to_owned();
    left.tcp = Tcp::Failed(ServerError::Intercepted { host, port: 443, cause });
    assert_eq!(left.reach(), Reach::Nobody);
    assert!(left.failure().unwrap().to_string().contains("captive portal"));
    assert!(left.to_string().contains("not TLS"), "{left}");
    // Where UDP works, that is what counts.
    let mut fine = of(EIM, Filtering::EndpointIndependent);
    fine.tcp = Tcp::Refused;
    assert_eq!((fine.reach(), fine.failure().is_none()), (Reach::Everybody, true));
}

#[test]
fn lifetimes_are_told_as_far_as_they_are_known() {
    let seconds = |known: Option<u64>| known.map(Duration::from_secs);
    for (at_least, less_than, words, advised) in [
        (Some(7), None, "at least 7 s", false),
        (Some(7), Some(10), "from 7 s to 10 s", true),
        (Some(60), Some(75), "from 60 s to 75 s", false),
        (None, Some(4), "less than 4 s", true),
        (None, None, "could not be measured", false),
    ] {
        let mut found = finding(EIM, Filtering::AddressDependent);
        found.lifetime = BindingLifetime { at_least: seconds(at_least), less_than: seconds(less_than) };
        let diagnosis = diagnosis(Family::Works(found));
        assert!(diagnosis.to_string().contains(words), "{words}");
        assert_eq!(diagnosis.advice().iter().any(|advice| advice.contains("time-out")), advised, "{words}");
    }
}
