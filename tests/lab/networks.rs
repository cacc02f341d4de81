//! Two peers that are nearer than two homes on the internet: on one LAN, behind one NAT, behind one carrier.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use end_to_end::process::PATIENCE;
use end_to_end::world::{SITE_DELAY, World};
use libtest_mimic::Trial;
use netsim::{Host, RouterKind, SiteConfig};
use serde_json::Value;

use crate::trial;

/// What comes of plain checks comes in well under a second.
const SOON: Duration = Duration::from_secs(5);

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for kind in [RouterKind::EimApdf, RouterKind::Apdm, RouterKind::CarrierEim, RouterKind::EimEif] {
        for hairpin in [false, true] {
            let name = if hairpin { "hairpinning_" } else { "" };
            trials.push(trial(format!("networks::one_lan_behind_{name}{kind}"), move || {
                one_lan(SiteConfig::new(kind).hairpin(hairpin))
            }));
        }
    }
    for kind in [RouterKind::EimApdf, RouterKind::EimEif] {
        trials.push(trial(format!("networks::isolated_behind_hairpinning_{kind}"), move || {
            isolated_with_hairpinning(kind)
        }));
    }
    trials.push(trial("networks::isolated_without_hairpinning_is_explained", isolated_without_hairpinning));
    for swapped in [false, true] {
        let name = if swapped { "second_dials_first" } else { "first_dials_second" };
        trials.push(trial(format!("networks::one_hairpinning_carrier_{name}"), move || {
            one_carrier_with_hairpinning(swapped)
        }));
        trials.push(trial(format!("networks::one_carrier_is_explained_{name}"), move || {
            one_carrier_without_hairpinning(swapped)
        }));
    }
    for lifetime in [10, 30] {
        trials.push(trial(format!("networks::idle_beyond_a_binding_lifetime_of_{lifetime}_s"), move || {
            idle(Duration::from_secs(lifetime))
        }));
    }
    trials
}

/// A dial to a listener that echoes.
pub(crate) struct Session {
    pub(crate) peer: end_to_end::process::Program,
    stdin: std::process::ChildStdin,
    stdout: std::process::ChildStdout,
    _listening: end_to_end::process::Program,
}

impl Session {
    pub(crate) fn start(world: &World, dialler: &Host, listener: &Host) -> anyhow::Result<Self> {
        let (listening, id) = world.listener(listener, "listener", &["--echo"])?;
        let mut peer = world.peer(dialler, "dialler", &["connect", &id])?;
        let (stdin, stdout) = (peer.stdin()?, peer.stdout()?);
        let mut session = Self { peer, stdin, stdout, _listening: listening };
        session.echo("over whatever path there is")?;
        Ok(session)
    }

    fn echo(&mut self, text: &str) -> anyhow::Result<()> {
        self.stdin.write_all(text.as_bytes())?;
        self.stdin.flush()?;
        let mut heard = vec![0; text.len()];
        self.stdout.read_exact(&mut heard)?;
        ensure!(heard == text.as_bytes(), "another echo: {heard:?}");
        Ok(())
    }

    /// The event of the direct path, once data has crossed it.
    pub(crate) fn direct(&mut self) -> anyhow::Result<Value> {
        let is_direct = |event: &Value| event["event"] == "path" && event["path"] == "direct";
        let event = self.peer.event(is_direct, SOON).context("not direct")?;
        self.echo("over the direct path")?;
        Ok(event)
    }

    /// Ends it in good order; the path at its end.
    pub(crate) fn close(self) -> anyhow::Result<Value> {
        let Self { mut peer, stdin, .. } = self;
        drop(stdin);
        let closed = peer.named("closed")?;
        ensure!(peer.wait(PATIENCE)?.success(), "not a clean end");
        Ok(closed["path"].clone())
    }
}

pub(crate) fn remote(path: &Value) -> anyhow::Result<SocketAddr> {
    Ok(path["remote"].as_str().with_context(|| format!("no remote address in {path}"))?.parse()?)
}

/// Two hosts of one LAN talk on it, and not by way of the router.
fn one_lan(config: SiteConfig) -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let site = world.lab.add_site("a", config.delay(SITE_DELAY).hosts(2))?;
    let mut session = Session::start(&world, &site.host(0), &site.host(1))?;
    let event = session.direct()?;
    let expected = IpAddr::from(site.host(1).ipv4());
    ensure!(remote(&event)?.ip() == expected, "not on the LAN: {event}");
    let proven = event["timeline"]["proven_ms"].as_f64().context("a proven path")?;
    // The introduction takes one round trip to the server; the LAN nothing to speak of.
    ensure!(proven < 1_000.0, "{event}");
    let path = session.close()?;
    ensure!(remote(&path)?.ip() == expected, "not on the LAN at the end: {path}");
    Ok(())
}

/// Two hosts that the LAN keeps apart meet at the outside of their router.
fn isolated_with_hairpinning(kind: RouterKind) -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let config = SiteConfig::new(kind).delay(SITE_DELAY).hosts(2).isolated(true).hairpin(true);
    let site = world.lab.add_site("a", config)?;
    let mut session = Session::start(&world, &site.host(0), &site.host(1))?;
    let event = session.direct()?;
    ensure!(remote(&event)?.ip() == site.wan_ipv4(), "{event}");
    let path = session.close()?;
    ensure!(remote(&path)?.ip() == site.wan_ipv4(), "{path}");
    Ok(())
}

/// Longer than either router remembers a flow that nobody uses.
const IDLE: Duration = Duration::from_secs(45);
/// A round trip takes 80 ms.
const AT_ONCE: Duration = Duration::from_secs(3);

/// Consent checks (RFC 7675, section 5.1: every 5 s) keep a path that nobody uses.
fn idle(lifetime: Duration) -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let config = || SiteConfig::new(RouterKind::EimApdf).delay(SITE_DELAY).binding_lifetime(lifetime);
    let (a, b) = (world.lab.add_site("a", config())?, world.lab.add_site("b", config())?);
    let mut session = Session::start(&world, &a.host(0), &b.host(0))?;
    let direct = session.direct()?;
    // Not a wait for something: silence is what is tested.
    std::thread::sleep(IDLE);
    let asked = Instant::now();
    session.echo("still there?")?;
    let took = asked.elapsed();
    let paths = session.peer.said().iter().filter(|event| event["event"] == "path").count();
    let path = session.close()?;
    ensure!(remote(&path)? == remote(&direct)?, "another path: {path}, {direct}");
    ensure!(paths <= 2, "the path has changed {paths} times, from relayed to direct and on");
    ensure!(took < AT_ONCE, "{took:?}");
    Ok(())
}

/// What `peer explain` says of a pair that cannot be direct.
pub(crate) fn explained(world: &World, dialler: &Host, listener: &Host) -> anyhow::Result<Value> {
    let (_listening, id) = world.listener(listener, "listener", &["--echo"])?;
    let mut peer = world.peer(dialler, "dialler", &["explain", &id])?;
    let explained = peer.event(|event| event["event"] == "explained", 2 * PATIENCE)?;
    ensure!(peer.wait(PATIENCE)?.success());
    Ok(explained)
}

fn isolated_without_hairpinning() -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let config = SiteConfig::new(RouterKind::EimApdf).delay(SITE_DELAY).hosts(2).isolated(true);
    let site = world.lab.add_site("a", config)?;
    let explained = explained(&world, &site.host(0), &site.host(1))?;
    ensure!(explained["verdict"] == "no-hairpinning", "{explained}");
    ensure!(explained["carrier"].is_null(), "{explained}");
    ensure!(explained["advice"].to_string().contains("isolation"), "{explained}");
    Ok(())
}

/// Two homes behind one carrier, with the same addresses inside.
fn one_carrier(hairpin: bool, swapped: bool) -> anyhow::Result<(World, [Host; 2])> {
    let mut world = World::new(1)?;
    let carrier = SiteConfig::new(RouterKind::CarrierEim).delay(SITE_DELAY).hairpin(hairpin);
    let first = world.lab.add_site("a", carrier)?;
    let second = world.lab.add_site_behind("b", SiteConfig::new(RouterKind::EimApdf), &first)?;
    let mut hosts = [first.host(0), second.host(0)];
    if swapped {
        hosts.reverse();
    }
    Ok((world, hosts))
}

fn one_carrier_with_hairpinning(swapped: bool) -> anyhow::Result<()> {
    let (world, [dialler, listener]) = one_carrier(true, swapped)?;
    let mut session = Session::start(&world, &dialler, &listener)?;
    let event = session.direct()?;
    ensure!(remote(&event)?.ip() == listener.reflexive_ipv4(), "{event}");
    session.close()?;
    Ok(())
}

fn one_carrier_without_hairpinning(swapped: bool) -> anyhow::Result<()> {
    let (world, [dialler, listener]) = one_carrier(false, swapped)?;
    let explained = explained(&world, &dialler, &listener)?;
    ensure!(explained["verdict"] == "no-hairpinning", "{explained}");
    ensure!(explained["carrier"] == "100.64.0.1", "{explained}");
    Ok(())
}
