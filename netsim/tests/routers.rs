//! Every kind of router does what its name says, and early packets do the harm that the field knows.

mod common;

use std::net::SocketAddr;
use std::process::ExitCode;

use common::{TestResult, receive, trial, udp};
use netsim::probe::{self, Behaviour};
use netsim::{
    BuildError, Filtering, InputPolicy, Lab, Mapping, PortAllocation, Router, RouterKind, SiteConfig,
    enter_user_namespace,
};

fn main() -> ExitCode {
    enter_user_namespace().expect("the lab needs root or user namespaces");
    let mut trials = Vec::new();
    for input in InputPolicy::ALL {
        for kind in RouterKind::ALL {
            let name = format!("{kind}_with_input_{input}_behaves_as_named").replace('-', "_");
            trials.push(trial(name, move || behaves_as_named(kind, input)));
        }
    }
    trials
        .push(trial("no_two_kinds_are_expected_to_behave_alike", no_two_kinds_are_expected_to_behave_alike));
    trials.push(trial("a_router_that_is_not_what_its_name_says_is_noticed", a_wrong_router_is_noticed));
    trials.push(trial("an_early_packet_takes_the_port_where_input_is_accepted", || {
        early_packet(InputPolicy::Accept)
    }));
    trials.push(trial("an_early_packet_does_no_harm_where_input_is_dropped", || {
        early_packet(InputPolicy::Drop)
    }));
    trials.push(trial("a_low_ttl_primer_keeps_the_port", a_low_ttl_primer_keeps_the_port));
    trials.push(trial("conntrack_counts_bindings", conntrack_counts_bindings));
    for kind in [RouterKind::EimEif, RouterKind::EimAdf, RouterKind::EimApdf, RouterKind::CarrierEim] {
        trials.push(trial(format!("{kind}_hairpins").replace('-', "_"), move || hairpins(kind)));
    }
    for step in [1, 2, 4, 64] {
        trials.push(trial(format!("a_sequence_with_steps_of_{step}"), move || sequence(step)));
    }
    trials.push(trial("a_full_table_drops_new_flows_and_serves_the_old", full_table));
    trials.push(trial("what_cannot_be_built_is_refused", what_cannot_be_built_is_refused));
    common::run(trials)
}

fn behaves_as_named(kind: RouterKind, input: InputPolicy) -> TestResult {
    let report = probe::probe(kind, input, 1)?;
    assert!(report.agrees, "\n{}", probe::table(&[report]));
    let modelled = probe::observe_model(SiteConfig::new(kind).input(input), &report.expected, 1)?;
    assert_eq!(modelled, report.observed, "the model does not do what the kernel does");
    Ok(())
}

fn no_two_kinds_are_expected_to_behave_alike() -> TestResult {
    for one in RouterKind::ALL {
        for two in RouterKind::ALL.into_iter().filter(|two| *two != one) {
            let [one, two] = [one, two].map(|kind| Behaviour::expected(kind, InputPolicy::Drop));
            assert_ne!(one, two);
        }
    }
    Ok(())
}

/// The probe is given a router that filters less, one that keeps no port, and one that rejects.
fn a_wrong_router_is_noticed() -> TestResult {
    let expected = Behaviour::expected(RouterKind::EimAdf, InputPolicy::Drop);
    let observed = probe::observe(SiteConfig::new(RouterKind::EimEif), &expected, 1)?;
    assert_eq!(observed.filtering, Some(Filtering::EndpointIndependent));
    let observed = probe::observe(SiteConfig::new(RouterKind::Apdm), &expected, 1)?;
    assert_eq!(
        (observed.mapping, observed.port_preserved),
        (Some(Mapping::AddressAndPortDependent), Some(false))
    );
    let rejecting = SiteConfig::new(RouterKind::EimAdf).input(InputPolicy::Reject);
    assert_eq!(probe::observe(rejecting, &expected, 1)?.input, InputPolicy::Reject);
    Ok(())
}

/// A peer's packet reaches the router before ours to that peer has left.
fn early_packet(input: InputPolicy) -> TestResult {
    let mut lab = Lab::new(1)?;
    let server = lab.add_server("server")?;
    let site = lab.add_site("a", SiteConfig::new(RouterKind::EimApdf).input(input))?;
    let peer = lab.add_site("b", SiteConfig::new(RouterKind::Public))?.host(0);
    let (inside, reflector) =
        (udp(&site.host(0), site.host(0).ipv4(), 40_000), udp(&server, server.ipv4(), 3478));
    let remote = udp(&peer, peer.ipv4(), 50_000);

    inside.send_to(b"who am I?", reflector.local_addr()?)?;
    let (_, reflexive) = receive(&reflector)?;
    assert_eq!(reflexive, SocketAddr::from((site.wan_ipv4(), 40_000)));
    remote.send_to(b"early", reflexive)?;
    settle(&inside, &reflector)?;
    inside.send_to(b"ours", remote.local_addr()?)?;
    let (_, seen) = receive(&remote)?;
    assert_eq!(seen != reflexive, input == InputPolicy::Accept, "seen as {seen} instead of {reflexive}");
    Ok(())
}

/// Our own packet opens the router before the peer's arrives, and dies before it comes near the peer.
fn a_low_ttl_primer_keeps_the_port() -> TestResult {
    let mut lab = Lab::new(1)?;
    let config = SiteConfig::new(RouterKind::EimApdf).input(InputPolicy::Accept);
    let site = lab.add_site("a", config)?;
    let peer = lab.add_site("b", SiteConfig::new(RouterKind::Public))?.host(0);
    let (inside, remote) = (udp(&site.host(0), site.host(0).ipv4(), 40_000), udp(&peer, peer.ipv4(), 50_000));
    inside.set_ttl(2)?;
    inside.send_to(b"primer", remote.local_addr()?)?;
    // The report of its death may be taken for a failure of the next call.
    inside.set_ttl(64)?;
    assert!(common::is_silent(&remote), "the primer arrived");
    let reflexive = SocketAddr::from((site.wan_ipv4(), 40_000));
    remote.send_to(b"early", reflexive)?;
    assert_eq!(receive(&inside)?.0, b"early");
    inside.send_to(b"ours", remote.local_addr()?)?;
    assert_eq!(receive(&remote)?, (b"ours".to_vec(), reflexive));
    Ok(())
}

fn hairpins(kind: RouterKind) -> TestResult {
    let mut expected = Behaviour::expected(kind, InputPolicy::Drop);
    expected.hairpin = Some(true);
    let config = SiteConfig::new(kind).hairpin(true);
    assert_eq!(probe::observe(config.clone(), &expected, 1)?, expected);
    assert_eq!(probe::observe_model(config, &expected, 1)?, expected, "the model");
    Ok(())
}

/// Ports come in steps, whichever host asks, and begin anew when the range is through.
fn sequence(step: u16) -> TestResult {
    let mut lab = Lab::new(1)?;
    let server = lab.add_server("server")?;
    let router = Router::nat(Mapping::AddressAndPortDependent, Filtering::AddressAndPortDependent)
        .with_allocation(PortAllocation::Sequential { step });
    let site = lab.add_site("a", SiteConfig::with_routers(vec![router]).hosts(2))?;
    let reflector = udp(&server, server.ipv4(), 3478);
    let mut last: Option<u16> = None;
    for flow in 0..700 {
        let host = site.host(flow % 2);
        let inside = udp(&host, host.ipv4(), 10_000 + flow as u16);
        inside.send_to(b"next", reflector.local_addr()?)?;
        let (_, seen) = receive(&reflector)?;
        let port = seen.port();
        let anew = port < last.unwrap_or(0);
        assert!(last.is_none_or(|last| port == last + step) || anew, "{last:?}, then {port}");
        assert!(!anew || last.is_some_and(|last| last.checked_add(step).is_none()), "too early: {last:?}");
        last = Some(port);
    }
    Ok(())
}

fn full_table() -> TestResult {
    const MOST: usize = 50;
    let mut lab = Lab::new(1)?;
    let server = lab.add_server("server")?;
    let site = lab.add_site("a", SiteConfig::new(RouterKind::EimApdf).most_flows(MOST))?;
    let reflector = udp(&server, server.ipv4(), 3478);
    let host = site.host(0);
    let open = |port: usize| {
        let inside = udp(&host, host.ipv4(), 10_000 + port as u16);
        inside.send_to(b"open", reflector.local_addr()?)?;
        Ok::<_, std::io::Error>(inside)
    };
    let mut inside = Vec::new();
    for port in 0..MOST {
        let socket = open(port)?;
        let (_, seen) = receive(&reflector).map_err(|error| format!("flow {port}: {error}"))?;
        reflector.send_to(b"answer", seen)?;
        receive(&socket)?;
        inside.push(socket);
    }
    open(MOST)?;
    assert!(common::is_silent(&reflector), "a flow too many");
    inside[0].send_to(b"old", reflector.local_addr()?)?;
    assert_eq!(receive(&reflector)?.0, b"old");
    Ok(())
}

fn conntrack_counts_bindings() -> TestResult {
    let mut lab = Lab::new(1)?;
    let server = lab.add_server("server")?;
    let site = lab.add_site("a", SiteConfig::new(RouterKind::Apdm))?;
    let before = site.conntrack_count()?;
    let reflector = udp(&server, server.ipv4(), 3478);
    for port in 40_000..40_100 {
        udp(&site.host(0), site.host(0).ipv4(), port).send_to(b"open", reflector.local_addr()?)?;
        receive(&reflector)?;
    }
    // The kernel's own group memberships (IGMP) may be counted as well.
    let opened = site.conntrack_count()? - before;
    assert!((100..105).contains(&opened), "{opened}");
    Ok(())
}

fn what_cannot_be_built_is_refused() -> TestResult {
    let mut lab = Lab::new(1)?;
    let impossible = Router::nat(Mapping::AddressAndPortDependent, Filtering::EndpointIndependent);
    let refused = lab.add_site("a", SiteConfig::with_routers(vec![impossible]));
    assert!(matches!(refused, Err(BuildError::Unsupported(name)) if name == "a"));
    assert!(matches!(lab.add_site("a", SiteConfig::with_routers(vec![])), Err(BuildError::Unsupported(_))));
    lab.add_site("a", SiteConfig::new(RouterKind::Public))?;
    assert!(matches!(lab.add_server("a"), Err(BuildError::NameTaken(_))));
    Ok(())
}

/// Whatever was on its way through the site's router before has passed it afterwards.
fn settle(inside: &std::net::UdpSocket, outside: &std::net::UdpSocket) -> TestResult {
    for _ in 0..3 {
        inside.send_to(b"settle", outside.local_addr()?)?;
        let (_, from) = receive(outside)?;
        outside.send_to(b"settle", from)?;
        receive(inside)?;
    }
    Ok(())
}
