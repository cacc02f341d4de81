//! Routers that take stray packets for their own (WAN `INPUT` accept): when the other side's checks arrive before anything was sent to it, the kernel
//! remembers them as a flow, and gives ours another port.

use std::io::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use end_to_end::cell::Network;
use end_to_end::world::World;
use libtest_mimic::Trial;
use netsim::{InputPolicy, RouterKind, Site};
use nix::sys::signal::Signal;

use crate::trial;

/// From the moment at which both sides know of each other. Half a second is usual.
const PATIENCE: Duration = Duration::from_secs(3);

pub(crate) fn trials() -> Vec<Trial> {
    use InputPolicy::{Accept, Drop};
    use RouterKind::{CarrierEim, EimAdf, EimApdf, Firewall};
    let cells = [
        (EimApdf, Drop, EimApdf),
        (EimApdf, Accept, EimApdf),
        (Firewall, Drop, EimApdf),
        (CarrierEim, Accept, EimApdf),
        (EimAdf, Drop, EimApdf),
        (EimApdf, Accept, CarrierEim),
    ];
    let name = |a, input, b| format!("poisoned::{a}_with_input_{input}_dials_{b}_that_hears_of_it_late");
    cells.map(|(a, input, b)| trial(name(a, input, b), move || late_listener(a, input, b))).into()
}

/// Whether the site's router remembers a flow that the other site has begun.
fn is_poisoned(site: &Site, by: &Site) -> anyhow::Result<bool> {
    // Behind a NAT hosts of both sites may have the same address; without one, the host's own is seen.
    let host = by.host(0).ipv4();
    let seen = if host.is_private() { by.wan_ipv4() } else { host };
    let flows = site.conntrack()?;
    let source =
        |line: &String| line.split_whitespace().find(|word| word.starts_with("src=")).map(str::to_owned);
    Ok(flows.iter().filter_map(source).any(|source| source == format!("src={seen}")))
}

/// The listener is held up until the dialler's checks have poisoned its router.
fn late_listener(a: RouterKind, input: InputPolicy, b: RouterKind) -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let dialler = world.lab.add_site("a", Network { kind: a, input }.site())?;
    let site = world.lab.add_site("b", Network { kind: b, input: InputPolicy::Accept }.site())?;
    let (listening, id) = world.listener(&site.host(0), "b", &["--echo"])?;
    listening.signal(Signal::SIGSTOP)?;
    let mut peer = world.peer(&dialler.host(0), "a", &["connect", &id])?;
    let mut stdin = peer.stdin()?;
    stdin.write_all(b"are you there?")?;
    stdin.flush()?;
    let deadline = Instant::now() + end_to_end::process::PATIENCE;
    while !is_poisoned(&site, &dialler)? {
        ensure!(Instant::now() < deadline, "the dialler's checks do not poison the listener's router");
        std::thread::sleep(Duration::from_millis(5));
    }
    listening.signal(Signal::SIGCONT)?;
    let heard = Instant::now();
    let direct = peer.event(|event| event["event"] == "path" && event["path"] == "direct", PATIENCE);
    let event = direct.context("not direct")?;
    ensure!(heard.elapsed() < PATIENCE, "direct only after {:?}", heard.elapsed());
    // The listener is seen at a port that nothing was ever sent to; only who filters by address alone lets it in.
    let expected = if a == RouterKind::EimAdf { "plain" } else { "primed" };
    ensure!(event["rung"] == expected, "{event}");
    drop(stdin);
    peer.named("closed")?;
    Ok(())
}
