//! A server that dies and starts again knows nothing of what it has introduced: whoever has a session is introduced anew.

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

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("restart::a_relayed_session_goes_on_when_its_server_is_back", || goes_on(RouterKind::Apdm)),
        trial("restart::a_direct_session_has_a_relay_again_when_its_server_is_back", || {
            goes_on(RouterKind::EimApdf)
        }),
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
