//! IPv4 and IPv6: which of them a pair meets over, and what IPv6 that does not work costs.

use std::net::SocketAddr;

use anyhow::{Context as _, ensure};
use end_to_end::process::PATIENCE;
use end_to_end::world::{SITE_DELAY, World};
use libtest_mimic::Trial;
use netsim::{Host, Ipv6, RouterKind, SiteConfig};

use crate::networks::{Session, explained, remote};
use crate::trial;

/// What each side has, behind which routers, and the family of the path that comes of it.
struct Case {
    name: &'static str,
    kind: RouterKind,
    sides: [Ipv6; 2],
    ipv4: bool,
}

/// Behind routers with random ports only IPv6 can be direct; behind the others either.
const CASES: [Case; 8] = [
    Case { name: "firewalls", kind: RouterKind::Apdm, sides: [Ipv6::Firewall, Ipv6::Firewall], ipv4: false },
    Case { name: "no_firewalls", kind: RouterKind::Apdm, sides: [Ipv6::Open, Ipv6::Open], ipv4: false },
    Case { name: "one_firewall", kind: RouterKind::Apdm, sides: [Ipv6::Open, Ipv6::Firewall], ipv4: false },
    Case { name: "ipv6_only", kind: RouterKind::EimApdf, sides: [Ipv6::Only, Ipv6::Only], ipv4: false },
    Case { name: "one_ipv6_only", kind: RouterKind::Apdm, sides: [Ipv6::Only, Ipv6::Firewall], ipv4: false },
    // Who has both registers over IPv6, and must know its IPv4 mapping nevertheless.
    Case {
        name: "one_ipv4_only",
        kind: RouterKind::EimApdf,
        sides: [Ipv6::Firewall, Ipv6::None],
        ipv4: true,
    },
    Case { name: "one_broken", kind: RouterKind::EimApdf, sides: [Ipv6::Broken, Ipv6::Firewall], ipv4: true },
    Case { name: "both_broken", kind: RouterKind::EimApdf, sides: [Ipv6::Broken, Ipv6::Broken], ipv4: true },
];

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for Case { name, kind, sides: [a, b], ipv4 } in CASES {
        trials.push(trial(format!("families::{name}"), move || direct(kind, [a, b], ipv4)));
        if a != b {
            trials.push(trial(format!("families::{name}_dialled"), move || direct(kind, [b, a], ipv4)));
        }
    }
    for sides in [[Ipv6::None, Ipv6::Only], [Ipv6::Only, Ipv6::None]] {
        let [a, _] = sides;
        trials.push(trial(format!("families::nothing_in_common_{a}_dials"), move || apart(sides)));
    }
    for (ipv6, name) in [(Ipv6::Firewall, "ipv6"), (Ipv6::None, "no_ipv6"), (Ipv6::Broken, "broken_ipv6")] {
        trials.push(trial(format!("families::a_server_by_name_with_{name}"), move || by_name(ipv6)));
    }
    trials.push(trial("families::broken_ipv6_costs_less_than_a_second", cost_of_broken_ipv6));
    trials
}

fn pair(world: &mut World, kind: RouterKind, sides: [Ipv6; 2]) -> anyhow::Result<[Host; 2]> {
    let [a, b] = sides.map(|ipv6| SiteConfig::new(kind).delay(SITE_DELAY).ipv6(ipv6));
    Ok([world.lab.add_site("a", a)?.host(0), world.lab.add_site("b", b)?.host(0)])
}

fn direct(kind: RouterKind, sides: [Ipv6; 2], ipv4: bool) -> anyhow::Result<()> {
    let mut world = World::of_both_families(1)?;
    let [dialler, listener] = pair(&mut world, kind, sides)?;
    let mut session = Session::start(&world, &dialler, &listener)?;
    let event = session.direct()?;
    ensure!(remote(&event)?.is_ipv4() == ipv4, "the other family: {event}");
    session.close()?;
    Ok(())
}

/// A name that has an address of each family leads to the server over one that works, IPv6 if it does.
fn by_name(ipv6: Ipv6) -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let [dialler, listener] = pair(&mut world, RouterKind::EimApdf, [ipv6, Ipv6::None])?;
    let (_listening, id) = world.listener(&listener, "listener", &["--echo"])?;
    let server = &world.server_host;
    let addresses = [server.ipv4().into(), server.ipv6().context("servers have IPv6")?.into()];
    let mut peer = world.peer_with_server_name(&dialler, "dialler", &addresses, &["connect", &id])?;
    let stdin = peer.stdin()?;
    let relayed = peer.named("path")?;
    let relay = relayed["relay"].as_str().with_context(|| format!("not over the relay first: {relayed}"))?;
    let relay: SocketAddr = relay.parse()?;
    ensure!(relay.is_ipv6() == (ipv6 == Ipv6::Firewall), "over the other family: {relayed}");
    let is_direct = |event: &serde_json::Value| event["event"] == "path" && event["path"] == "direct";
    let direct = peer.event(is_direct, PATIENCE)?;
    ensure!(remote(&direct)?.is_ipv4(), "{direct}");
    drop(stdin);
    ensure!(peer.wait(PATIENCE)?.success(), "not a clean end");
    Ok(())
}

/// The relay joins them, and nothing else can.
fn apart(sides: [Ipv6; 2]) -> anyhow::Result<()> {
    let mut world = World::of_both_families(1)?;
    let [dialler, listener] = pair(&mut world, RouterKind::EimApdf, sides)?;
    let path = Session::start(&world, &dialler, &listener)?.close()?;
    ensure!(path["path"] == "relayed", "{path}");
    let explained = explained(&world, &dialler, &listener)?;
    ensure!(explained["verdict"] == "nothing-to-try", "{explained}");
    Ok(())
}

/// From the start of the program to the first byte echoed, in milliseconds; the best of three.
fn first_byte(ipv6: Ipv6) -> anyhow::Result<f64> {
    let mut world = World::of_both_families(1)?;
    let [dialler, listener] = pair(&mut world, RouterKind::EimApdf, [ipv6, Ipv6::Firewall])?;
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let mut session = Session::start(&world, &dialler, &listener)?;
        let event = session.peer.named("first_byte")?;
        best = best.min(event["ms"].as_f64().context("milliseconds")?);
        session.close()?;
    }
    Ok(best)
}

fn cost_of_broken_ipv6() -> anyhow::Result<()> {
    let (without, broken) = (first_byte(Ipv6::None)?, first_byte(Ipv6::Broken)?);
    println!("the first byte after {without} ms without IPv6, after {broken} ms with IPv6 that is broken");
    ensure!(broken < without + 1_000.0, "{broken} ms, {without} ms without IPv6");
    Ok(())
}
