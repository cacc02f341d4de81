//! Every ordered pair of the usual networks, once. `make matrix` does it many times.

use std::time::Duration;

use anyhow::ensure;
use end_to_end::cell::{self, Dial, Expected, Network, Outcome, Table, Way};
use end_to_end::world::World;
use libtest_mimic::Trial;
use netsim::RouterKind;

use crate::trial;

/// A pair that is to stay relayed has this long to surprise us: some ten times what a direct path takes.
const RELAY_PATIENCE: Duration = Duration::from_millis(2500);

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for (a, b) in Table::Usual.pairs() {
        trials.push(trial(format!("matrix::{a}_dials_{b}"), move || cell(a, b)));
    }
    trials.push(trial("matrix::birthday_probing_keeps_its_budget_of_conntrack_entries", budget));
    for (a, b, verdict) in [
        (RouterKind::EimApdf, RouterKind::EimApdf, "direct"),
        (RouterKind::Apdm, RouterKind::Public, "direct"),
        (RouterKind::Apdm, RouterKind::Apdm, "both-port-dependent"),
        (RouterKind::Apdm, RouterKind::CarrierApdm, "both-port-dependent"),
        (RouterKind::UdpBlocked, RouterKind::EimApdf, "local-udp-blocked"),
        (RouterKind::EimApdf, RouterKind::UdpBlocked, "remote-udp-blocked"),
        (RouterKind::UdpBlocked, RouterKind::UdpBlocked, "local-udp-blocked"),
    ] {
        trials.push(trial(format!("matrix::{a}_with_{b}_is_explained"), move || explained(a, b, verdict)));
    }
    trials
}

fn cell(a: Network, b: Network) -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let dialler = world.lab.add_site("a", a.site())?;
    let listener = world.lab.add_site("b", b.site())?;
    let way = Way::of(a, b);
    let expected = way.expected();
    let (_listening, id) = world.listener(&listener.host(0), "b", &["--echo"])?;
    let patience = if expected == Expected::Direct { way.patience() } else { RELAY_PATIENCE };
    let outcome = Dial::new(&world, &dialler.host(0), "a", &id, patience).run()?;
    ensure!(cell::agrees(expected, &outcome), "expected {expected:?}, got {outcome:?}");
    if let Outcome::Relayed { over, .. } = outcome {
        let expected = if a.kind == RouterKind::UdpBlocked { "tcp" } else { "udp" };
        ensure!(over == expected, "over {over}");
    }
    Ok(())
}

/// The easy side's router never holds more entries of ours than the budget allows, counted by its kernel.
fn budget() -> anyhow::Result<()> {
    /// 740 probes, 256 knocks that a router may remember, and what signalling, relay and checks need.
    const MOST: usize = 1024;
    let mut most = 0;
    for seed in 0..3 {
        let mut world = World::new(seed)?;
        let easy = world.lab.add_site("a", Network::new(RouterKind::EimApdf).site())?;
        let hard = world.lab.add_site("b", Network::new(RouterKind::CarrierApdm).site())?;
        let (_listening, id) = world.listener(&hard.host(0), "b", &["--echo"])?;
        let mut peer = world.peer(&easy.host(0), "a", &["connect", &id])?;
        let _stdin = peer.stdin()?;
        let deadline = std::time::Instant::now() + Duration::from_secs(6);
        let is_direct = |event: &serde_json::Value| event["path"] == "direct";
        while std::time::Instant::now() < deadline && !peer.said().iter().any(is_direct) {
            most = most.max(easy.conntrack_count()?);
        }
    }
    ensure!(most <= MOST, "{most} entries");
    ensure!(most > 30, "only {most} entries: nothing was probed, so this proves nothing");
    Ok(())
}

/// `peer explain` names the cause.
fn explained(a: RouterKind, b: RouterKind, verdict: &str) -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let dialler = world.lab.add_site("a", Network::new(a).site())?;
    let listener = world.lab.add_site("b", Network::new(b).site())?;
    let (_listening, id) = world.listener(&listener.host(0), "b", &["--echo"])?;
    let mut peer = world.peer(&dialler.host(0), "a", &["explain", &id])?;
    let explained = peer.named("explained")?;
    ensure!(explained["verdict"] == verdict, "{explained}");
    ensure!(explained["pairs"].as_array().is_some_and(|pairs| !pairs.is_empty()), "{explained}");
    ensure!(peer.wait(end_to_end::process::PATIENCE)?.success());
    Ok(())
}
