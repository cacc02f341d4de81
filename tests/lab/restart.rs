//! Who has begun anew and knows nothing of before: a server of what it has introduced, a router of the ports it has given.

use std::time::{Duration, Instant};

use anyhow::ensure;
use end_to_end::process::PATIENCE;
use end_to_end::pulse::Pulse;
use end_to_end::world::{SITE_DELAY, World};
use libtest_mimic::Trial;
use netsim::{Direction, RouterKind, SiteConfig};

use crate::trial;

/// From the server's return to a new echo: until the next keep-alive (15 s) shows that the server has forgotten us, and what a busy machine takes.
const BACK: Duration = Duration::from_secs(25);

/// The longest time between two echoes when a router gives other ports: until the path is in doubt, and the relay has answered; and what a busy machine
/// takes.
const OTHER_PORTS: Duration = Duration::from_millis(2_500);

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("restart::a_relayed_session_goes_on_when_its_server_is_back", || goes_on(RouterKind::Apdm)),
        trial("restart::a_direct_session_has_a_relay_again_when_its_server_is_back", || {
            goes_on(RouterKind::EimApdf)
        }),
        trial("restart::a_router_gives_other_ports_under_a_direct_session", other_ports),
    ]
}

fn goes_on(kind: RouterKind) -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let site = || SiteConfig::new(kind).delay(SITE_DELAY);
    let (a, b) = (world.lab.add_site("a", site())?, world.lab.add_site("b", site())?);
    let (mut listening, id) = world.listener(&b.host(0), "b", &["--echo"])?;
    let mut pulse = Pulse::start(world.peer(&a.host(0), "a", &["connect", &id])?)?;
    let direct = kind == RouterKind::EimApdf;
    pulse.next_path(if direct { "direct" } else { "relayed" }, PATIENCE)?;
    pulse.echo_after(Instant::now(), PATIENCE)?;
    world.restart_server()?;
    let restarted = Instant::now();
    if direct {
        // The session has no need of the server, and does not tell when it is back.
        std::thread::sleep(BACK);
        a.cut_between(&b, Direction::Both)?;
        let cut = Instant::now();
        let took = pulse.echo_after(cut, PATIENCE)?;
        ensure!(took <= Duration::from_secs(3), "an echo over the relay only after {took:?}");
    } else {
        let took = pulse.echo_after(restarted, BACK)?;
        eprintln!("the session goes on {took:?} after the server is back");
    }
    pulse.finish(PATIENCE)?;
    let connections = listening.said().iter().filter(|event| event["event"] == "connected").count();
    ensure!(connections == 1, "{connections} connections");
    Ok(())
}

/// Neither the other side nor the relay takes anything from the new port until it has been told.
fn other_ports() -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let site = || SiteConfig::new(RouterKind::EimApdf).delay(SITE_DELAY);
    let (a, b) = (world.lab.add_site("a", site())?, world.lab.add_site("b", site())?);
    let (_listening, id) = world.listener(&b.host(0), "b", &["--echo"])?;
    let mut pulse = Pulse::start(world.peer(&a.host(0), "a", &["connect", &id])?)?;
    pulse.next_path("direct", PATIENCE)?;
    pulse.echo_after(Instant::now(), PATIENCE)?;
    for site in [&a, &b] {
        let rebooted = Instant::now();
        site.reboot_with_other_ports()?;
        pulse.echo_after(rebooted, PATIENCE)?;
        let gap = pulse.longest_gap(rebooted)?;
        eprintln!("other ports: a gap of {gap:?}");
        ensure!(gap <= OTHER_PORTS, "a gap of {gap:?}");
        pulse.next_path("direct", PATIENCE)?;
    }
    pulse.finish(PATIENCE)?;
    Ok(())
}
