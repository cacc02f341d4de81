//! `peer doctor` behind every kind of router: it must name what the router was built to do.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use end_to_end::process::{PATIENCE, Program};
use end_to_end::world::{SITE_DELAY, World};
use libtest_mimic::Trial;
use netsim::{Filtering, Host, InputPolicy, Mapping, PortAllocation, Router, RouterKind, SiteConfig};
use serde_json::Value;

use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials: Vec<_> = RouterKind::ALL
        .into_iter()
        .enumerate()
        .filter(|(_, kind)| *kind != RouterKind::UdpBlocked)
        .map(|(place, kind)| {
            let input = InputPolicy::ALL[place % InputPolicy::ALL.len()];
            trial(format!("doctor::names_what_{kind}_does"), move || names(kind, input))
        })
        .collect();
    trials.push(trial("doctor::says_what_is_left_where_udp_is_blocked", blocked));
    trials.push(trial("doctor::says_who_answers_in_the_servers_place", intercepted));
    trials.push(trial("doctor::tells_as_much_as_a_server_with_one_address_can", one_address));
    trials.push(trial("doctor::hears_a_router_that_hairpins", hairpinning));
    trials.push(trial("doctor::measures_ipv6", ipv6));
    trials.push(trial("doctor::measures_the_whole_binding_lifetime", lifetime));
    trials
}

fn site(kind: RouterKind, input: InputPolicy) -> SiteConfig {
    SiteConfig::new(kind).input(input).delay(SITE_DELAY)
}

/// Runs the doctor in `host` and gives its report.
fn examine(host: &Host, server: &str, more: &[&str]) -> anyhow::Result<(Value, Option<i32>)> {
    let arguments: Vec<&str> = ["doctor", "--json", "--server", server].iter().chain(more).copied().collect();
    let mut doctor = Program::start(host, "peer", &arguments, false)?;
    let report = doctor.event(|event| event["event"] == "diagnosis", PATIENCE * 3)?;
    Ok((report, doctor.wait(PATIENCE)?.code()))
}

fn mapping(routers: &[Router]) -> &'static str {
    let of = |wanted: fn(Mapping) -> bool| routers.iter().filter_map(|router| router.mapping).any(wanted);
    match of(|mapping| mapping != Mapping::EndpointIndependent) {
        true => "address-and-port-dependent",
        false if of(|_| true) => "endpoint-independent",
        false => "none",
    }
}

/// The router that has every destination see another port.
fn hard(routers: &[Router]) -> Option<&Router> {
    routers.iter().find(|router| router.mapping == Some(Mapping::AddressAndPortDependent))
}

fn filtering(routers: &[Router]) -> &'static str {
    let any = |wanted| routers.iter().any(|router| router.filtering == Some(wanted));
    if any(Filtering::AddressAndPortDependent) {
        "address-and-port-dependent"
    } else if any(Filtering::AddressDependent) {
        "address-dependent"
    } else {
        "endpoint-independent"
    }
}

fn names(kind: RouterKind, input: InputPolicy) -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let site = world.lab.add_site("a", site(kind, input))?;
    let start = Instant::now();
    let (report, code) = examine(&site.host(0), &world.address, &[])?;
    ensure!(code == Some(0), "exit code {code:?}");
    let (ipv4, routers) = (&report["ipv4"], kind.routers());
    ensure!(ipv4["mapping"] == mapping(&routers), "{report}");
    ensure!(ipv4["filtering"] == filtering(&routers), "{report}");
    if let Some(hard) = hard(&routers) {
        let (ports, step) = match hard.allocation {
            PortAllocation::Sequential { step } => ("sequential", Some(step)),
            PortAllocation::Preserving => ("preserving", None),
            _ => ("random", None),
        };
        ensure!(ipv4["ports"] == ports && ipv4["port_step"] == serde_json::json!(step), "{report}");
    }
    let carrier = routers.len() > 1;
    let nats = if carrier {
        "carrier"
    } else if routers[0].mapping.is_some() {
        "one"
    } else {
        "none"
    };
    ensure!(report["nats"] == nats, "{report}");
    if routers[0].mapping.is_some() {
        ensure!(ipv4["hairpinning"] == false, "{report}");
    }
    ensure!(ipv4["lifetime_at_least_s"].as_u64().is_some_and(|alive| alive >= 5), "{report}");
    ensure!(report["signalling"]["works"] == true, "{report}");
    let verdict = match (hard(&routers).map(|hard| hard.allocation), filtering(&routers)) {
        (Some(PortAllocation::Random), _) => "not-port-dependent",
        (Some(_), _) => "not-random-ports",
        (_, "address-and-port-dependent") => "everybody-in-time",
        _ => "everybody",
    };
    ensure!(report["verdict"] == verdict, "{report}");
    // Ten seconds, and what a busy machine adds.
    ensure!(start.elapsed() < Duration::from_secs(20), "it took {:?}", start.elapsed());
    Ok(())
}

fn blocked() -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let site = world.lab.add_site("a", site(RouterKind::UdpBlocked, InputPolicy::Drop))?;
    let (report, code) = examine(&site.host(0), &world.address, &[])?;
    ensure!(code == Some(0), "exit code {code:?}");
    ensure!(report["ipv4"]["state"] == "broken" && report["verdict"] == "relay-only", "{report}");
    ensure!(report["tcp"] == "works", "{report}");
    ensure!(report["signalling"]["works"] == false && report["captive_portal"].is_null(), "{report}");
    // Where there is no server, TCP passes and nobody listens.
    let nobody = world.lab.add_server("nobody")?;
    let (id, _) = world.address.split_once('@').context("an address with @")?;
    let (report, code) = examine(&site.host(0), &format!("{id}@{}", nobody.ipv4()), &[])?;
    ensure!(code == Some(3), "exit code {code:?}");
    ensure!(report["verdict"] == "nobody" && report["tcp"] == "refused", "{report}");
    Ok(())
}

/// Something else than the server answers over TCP, as a captive portal does: here the server of another.
fn intercepted() -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let site = world.lab.add_site("a", site(RouterKind::UdpBlocked, InputPolicy::Drop))?;
    let other = peer::KeyPair::generate()?.id();
    let (report, code) = examine(&site.host(0), &format!("rv://{other}@{}", world.server_host.ipv4()), &[])?;
    ensure!(code == Some(3), "exit code {code:?}");
    ensure!(report["verdict"] == "nobody" && report["tcp"] == "another-key", "{report}");
    Ok(())
}

fn one_address() -> anyhow::Result<()> {
    for (kind, mapping, filtering) in [
        (
            RouterKind::EimAdf,
            "endpoint-independent-or-address-dependent",
            "endpoint-independent-or-address-dependent",
        ),
        (RouterKind::Apdm, "address-and-port-dependent", "address-and-port-dependent"),
    ] {
        let mut world = World::with_one_address(1)?;
        let site = world.lab.add_site("a", site(kind, InputPolicy::Drop))?;
        let (report, _) = examine(&site.host(0), &world.address, &[])?;
        ensure!(report["ipv4"]["mapping"] == mapping && report["ipv4"]["filtering"] == filtering, "{report}");
    }
    Ok(())
}

fn hairpinning() -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let mut router = Router::nat(Mapping::EndpointIndependent, Filtering::EndpointIndependent);
    router.hairpin = true;
    let site = world.lab.add_site("a", SiteConfig::with_routers(vec![router]).delay(SITE_DELAY))?;
    let (report, _) = examine(&site.host(0), &world.address, &[])?;
    ensure!(report["ipv4"]["hairpinning"] == true, "{report}");
    Ok(())
}

fn ipv6() -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let config = site(RouterKind::EimApdf, InputPolicy::Drop);
    let site = world.lab.add_site("a", config.ipv6(true))?;
    let (id, _) = world.address.split_once('@').context("an address with @")?;
    let server = world.server_host.ipv6().context("servers have IPv6")?;
    let (report, code) = examine(&site.host(0), &format!("{id}@[{server}]"), &[])?;
    ensure!(code == Some(0) && report["ipv4"]["state"] == "not-at-server", "{report}");
    let ipv6 = &report["ipv6"];
    ensure!(ipv6["mapping"] == "none" && ipv6["filtering"] == "address-and-port-dependent", "{report}");
    Ok(())
}

fn lifetime() -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let config = site(RouterKind::EimApdf, InputPolicy::Drop).binding_lifetime(Duration::from_secs(22));
    let site = world.lab.add_site("a", config)?;
    let (report, _) = examine(&site.host(0), &world.address, &["--lifetime"])?;
    let ipv4 = &report["ipv4"];
    ensure!(ipv4["lifetime_at_least_s"] == 20 && ipv4["lifetime_less_than_s"] == 25, "{report}");
    ensure!(report["advice"].to_string().contains("time-out"), "{report}");
    Ok(())
}
