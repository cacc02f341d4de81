//! `peer explain`: every pair that stays relayed is told why, with both NATs, and what would help.

use anyhow::ensure;
use end_to_end::cell::{Network, Way};
use end_to_end::process::PATIENCE;
use end_to_end::world::World;
use libtest_mimic::Trial;
use netsim::RouterKind;

use crate::trial;

/// Every kind that takes a new port for every destination.
const PORT_DEPENDENT: [RouterKind; 4] =
    [RouterKind::Apdm, RouterKind::ApdmSequential, RouterKind::ApdmPreserving, RouterKind::CarrierApdm];

pub(crate) fn trials() -> Vec<Trial> {
    let pairs = PORT_DEPENDENT.into_iter().flat_map(|a| PORT_DEPENDENT.map(|b| (a, b)));
    let relayed = pairs.filter(|(a, b)| Way::of(Network::new(*a), Network::new(*b)) == Way::Never);
    relayed.map(|(a, b)| trial(format!("explain::{a}_with_{b}"), move || relayed_pair(a, b))).collect()
}

/// What a peer says of its NAT.
fn mapping(kind: RouterKind) -> &'static str {
    match kind {
        RouterKind::ApdmSequential => "address-and-port-dependent-sequential",
        RouterKind::ApdmPreserving => "address-and-port-dependent-preserving",
        _ => "address-and-port-dependent",
    }
}

fn relayed_pair(a: RouterKind, b: RouterKind) -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let dialler = world.lab.add_site("a", Network::new(a).site())?;
    let listener = world.lab.add_site("b", Network::new(b).site())?;
    let (_listening, id) = world.listener(&listener.host(0), "b", &["--echo"])?;
    let mut peer = world.peer(&dialler.host(0), "a", &["explain", &id])?;
    let explained = peer.named("explained")?;
    ensure!(explained["verdict"] == "both-port-dependent", "{explained}");
    ensure!(explained["local_mapping"] == mapping(a), "{explained}");
    ensure!(explained["remote_mapping"] == mapping(b), "{explained}");
    let advice = explained["advice"].to_string();
    for words in ["IPv6", "\"here: ", "\"there: "] {
        ensure!(advice.contains(words), "no {words:?} in {advice}");
    }
    let carrier = a == RouterKind::CarrierApdm;
    ensure!(
        explained["carrier"].is_null() != carrier && advice.contains("carrier") == carrier,
        "{explained}"
    );
    ensure!(peer.wait(PATIENCE)?.success());
    Ok(())
}
