//! A listener that nobody has talked to for a while is reached at once, however soon its router forgets.

use std::io::{Read as _, Write as _};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use end_to_end::process::PATIENCE;
use end_to_end::world::{SITE_DELAY, World};
use libtest_mimic::Trial;
use netsim::{RouterKind, SiteConfig};

use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for kind in [RouterKind::EimApdf, RouterKind::Apdm] {
        for lifetime in [10, 30] {
            trials.push(trial(format!("keep_alive::{kind}_that_forgets_after_{lifetime}_s"), move || {
                idle_listeners(kind, Duration::from_secs(lifetime))
            }));
        }
    }
    trials
}

/// Listeners that start so far apart that a safe keep-alive, 15 s, would find some of them without a binding at any time.
const LISTENERS: usize = 6;
const APART: Duration = Duration::from_millis(2_500);

/// Long enough for the lifetime to be found.
const IDLE: Duration = Duration::from_secs(65);

/// Ten times what it takes. A listener whose binding was gone is silent until its next keep-alive, up to 5 s.
const AT_ONCE: f64 = 2_000.0;

/// How much longer than with a listener that has only just registered it may take on a machine that is busy.
const LONGER: f64 = 2.0;

fn idle_listeners(kind: RouterKind, lifetime: Duration) -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let config = SiteConfig::new(kind).delay(SITE_DELAY).binding_lifetime(lifetime);
    let site = world.lab.add_site("a", config)?;
    let other = world.lab.add_site("b", SiteConfig::new(RouterKind::Public).delay(SITE_DELAY))?;
    let mut listeners = Vec::new();
    for number in 0..LISTENERS {
        let next = Instant::now() + APART;
        listeners.push(world.listener(&site.host(0), &format!("listener{number}"), &["--echo"])?);
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    std::thread::sleep(IDLE);
    // Dialled with the others: what the machine makes of seven dials at once.
    listeners.push(world.listener(&site.host(0), "fresh", &["--echo"])?);
    let mut dials = Vec::new();
    for (number, (_, id)) in listeners.iter().enumerate() {
        let mut peer = world.peer(&other.host(0), &format!("dialler{number}"), &["connect", id])?;
        let mut stdin = peer.stdin()?;
        stdin.write_all(b"awake?")?;
        dials.push((peer, stdin));
    }
    let mut took = Vec::new();
    for (mut peer, stdin) in dials {
        let first_byte = peer.named("first_byte")?["since_dial_ms"].as_f64().context("milliseconds")?;
        drop(stdin);
        let mut echo = String::new();
        peer.stdout()?.read_to_string(&mut echo)?;
        ensure!(echo == "awake?" && peer.wait(PATIENCE)?.success(), "{echo:?}");
        took.push(first_byte);
    }
    let most = AT_ONCE.max(took[LISTENERS] * LONGER);
    ensure!(took.iter().all(|first_byte| *first_byte <= most), "asleep: {took:?} ms, the last one fresh");
    Ok(())
}
