//! `peer explain`: every pair that stays relayed is told why, with both NATs, and what would help.

use std::net::Ipv6Addr;

use anyhow::{Context as _, ensure};
use end_to_end::cell::{Network, Way};
use end_to_end::process::PATIENCE;
use end_to_end::world::World;
use libtest_mimic::Trial;
use netsim::RouterKind;
use peer::{Endpoint, Verdict};

use crate::dialling::{on, runtime};
use crate::trial;

/// Every kind that takes a new port for every destination.
const PORT_DEPENDENT: [RouterKind; 4] =
    [RouterKind::Apdm, RouterKind::ApdmSequential, RouterKind::ApdmPreserving, RouterKind::CarrierApdm];

pub(crate) fn trials() -> Vec<Trial> {
    let pairs = PORT_DEPENDENT.into_iter().flat_map(|a| PORT_DEPENDENT.map(|b| (a, b)));
    let relayed = pairs.filter(|(a, b)| Way::of(Network::new(*a), Network::new(*b)) == Way::Never);
    let mut trials: Vec<_> =
        relayed.map(|(a, b)| trial(format!("explain::{a}_with_{b}"), move || relayed_pair(a, b))).collect();
    trials.push(trial("explain::ipv6_only_with_ipv4_only", no_family_in_common));
    trials
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

/// One side uses IPv6 alone, the other has none: the relay joins them, and nothing else can.
fn no_family_in_common() -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let dialler = world.lab.add_site("a", Network::new(RouterKind::EimApdf).site().ipv6(true))?.host(0);
    let listener = world.lab.add_site("b", Network::new(RouterKind::EimApdf).site())?;
    let (_listening, id) = world.listener(&listener.host(0), "b", &["--echo"])?;
    let (server_id, _) = world.address.split_once('@').context("an address with @")?;
    let server = world.server_host.ipv6().context("servers have IPv6")?;
    let server = format!("{server_id}@[{server}]").parse()?;
    let target = id.parse()?;
    let explanation = on(&runtime(&dialler)?, async move {
        let any = (Ipv6Addr::UNSPECIFIED, 0).into();
        let endpoint = Endpoint::builder().server(server).address(any).bind().await?;
        endpoint.online().await?;
        let session = endpoint.connect(target).await?;
        let (mut send, mut receive) = session.open_bi().await?;
        // The first byte says that a plain pipe is meant.
        send.write_all(b"\x01over the relay").await?;
        send.finish()?;
        let heard = receive.read_to_end(100).await?;
        ensure!(heard == b"over the relay", "{heard:?}");
        session.explain().await.context("an explanation")
    })?;
    ensure!(explanation.verdict() == Verdict::NothingToTry, "{explanation}");
    ensure!(explanation.to_string().contains("IPv6 only"), "{explanation}");
    Ok(())
}
