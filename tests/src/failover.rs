//! The direct path between two homes dies under a steady echo, and comes back.

use std::fmt;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use netsim::{Direction, RouterKind, SiteConfig};

use crate::echo::{EVERY, Echo, now};
use crate::world::{SITE_DELAY, World};

/// The longest that no echo may come, in milliseconds.
pub const MOST_GAP: f64 = 600.0;

/// How soon the session is direct again once the path is back, in milliseconds.
pub const MOST_RETURN: f64 = 2_000.0;

/// Watched before the cut and after the return.
const CALM: Duration = Duration::from_secs(2);

/// What is cut, seen from the sender, and for how long.
#[derive(Debug, Clone, Copy)]
pub struct Outage {
    /// Toward the listener, from it, or both.
    pub direction: Direction,
    /// From the cut to the return.
    pub lasts: Duration,
}

impl fmt::Display for Outage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let direction = match self.direction {
            Direction::Both => "both_ways",
            Direction::Up => "one_way",
            Direction::Down => "the_other_way",
        };
        write!(f, "{direction}_for_{}_s", self.lasts.as_secs())
    }
}

/// All that are tested.
pub fn outages() -> Vec<Outage> {
    let mut all = Vec::new();
    for lasts in [5, 20] {
        for direction in [Direction::Both, Direction::Up, Direction::Down] {
            all.push(Outage { direction, lasts: Duration::from_secs(lasts) });
        }
    }
    all
}

/// One run, in milliseconds.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    /// The longest time between two echoes while nothing was wrong.
    pub control: f64,
    /// The slowest echo of that time.
    pub control_slowest: f64,
    /// The longest time between two echoes from the cut on.
    pub gap: f64,
    /// The slowest echo from the cut on.
    pub slowest: f64,
    /// From the path's return until the sender was direct again; 0 when it never was anything else.
    pub back: f64,
}

/// One outage in a lab of its own. Everything must come back, over one connection.
///
/// # Errors
///
/// When it does not, or either side does not come back to the direct path.
pub fn run(seed: u64, outage: Outage) -> anyhow::Result<Run> {
    let mut world = World::new(seed)?;
    let config = || SiteConfig::new(RouterKind::EimApdf).delay(SITE_DELAY);
    let a = world.lab.add_site("a", config())?;
    let b = world.lab.add_site("b", config())?;
    let mut echo = Echo::start(&world, &a.host(0), &b.host(0), EVERY)?;
    // What the switch to the direct path shakes up has settled.
    std::thread::sleep(CALM);
    let calm = now();
    std::thread::sleep(CALM);
    let cut = now();
    a.cut_between(&b, outage.direction)?;
    std::thread::sleep(outage.lasts);
    // It may be found again before this has returned.
    let restored = now();
    a.restore()?;
    echo.direct(2, Duration::from_secs(20))?;
    std::thread::sleep(CALM);
    let end = now();
    let echoes = echo.finish()?;
    let relayed = echoes.path_after(false, cut).context("never relayed")?;
    ensure!(relayed < (restored - cut) as f64 / 1e3, "relayed only after {relayed} ms");
    ensure!(echoes.listener_left(), "the listener did not leave the path");
    Ok(Run {
        control: echoes.gap(calm, cut),
        control_slowest: echoes.slowest(calm, cut),
        gap: echoes.gap(cut, end),
        slowest: echoes.slowest(cut, end),
        back: echoes.path_after(true, restored).context("not direct again")?,
    })
}

/// A home router that forgets everything.
#[derive(Debug, Clone, Copy)]
pub struct Reboot {
    /// The kind of the router that reboots. It keeps the port, or the other one lets everyone in.
    pub kind: RouterKind,
    /// Whether it is the sender's.
    pub sender: bool,
}

impl fmt::Display for Reboot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "reboot_of_the_{}_{}", if self.sender { "senders" } else { "listeners" }, self.kind)
    }
}

impl Reboot {
    /// The longest that no echo may come, in milliseconds: where the port is kept, and where it is another.
    pub fn most_gap(&self) -> f64 {
        if self.kind == RouterKind::EimApdf { 250.0 } else { 500.0 }
    }
}

/// All that are tested: the port is kept, or is another.
pub fn reboots() -> Vec<Reboot> {
    let kinds = [RouterKind::EimApdf, RouterKind::Apdm];
    kinds.into_iter().flat_map(|kind| [true, false].map(|sender| Reboot { kind, sender })).collect()
}

/// One reboot in a lab of its own. Everything must come back, over one connection.
///
/// # Errors
///
/// When it does not, or the session is not direct at the end.
pub fn run_reboot(seed: u64, reboot: Reboot) -> anyhow::Result<Run> {
    let mut world = World::new(seed)?;
    let other = if reboot.kind == RouterKind::EimApdf { RouterKind::EimApdf } else { RouterKind::EimEif };
    let kinds = if reboot.sender { [reboot.kind, other] } else { [other, reboot.kind] };
    let config = |kind| SiteConfig::new(kind).delay(SITE_DELAY);
    let a = world.lab.add_site("a", config(kinds[0]))?;
    let b = world.lab.add_site("b", config(kinds[1]))?;
    let echo = Echo::start(&world, &a.host(0), &b.host(0), EVERY)?;
    std::thread::sleep(CALM);
    let calm = now();
    std::thread::sleep(CALM);
    let rebooted = now();
    if reboot.sender { &a } else { &b }.reboot()?;
    std::thread::sleep(2 * CALM);
    let end = now();
    let echoes = echo.finish()?;
    ensure!(echoes.is_direct(end), "not direct any more");
    Ok(Run {
        control: echoes.gap(calm, rebooted),
        control_slowest: echoes.slowest(calm, rebooted),
        gap: echoes.gap(rebooted, end),
        slowest: echoes.slowest(rebooted, end),
        back: echoes.path_after(true, rebooted).unwrap_or(0.0),
    })
}

/// Of the routers, in [`run_idle`].
const BINDING_LIFETIME: Duration = Duration::from_secs(10);

/// How long nothing is sent, in [`run_idle`].
const IDLE: Duration = Duration::from_secs(60);

/// The longest that the echo after a long silence may take, in milliseconds: a round trip and 100 ms.
pub const MOST_AFTER_IDLING: f64 = 180.0;

/// A minute without traffic between two routers that forget after 10 s: how long the echo then takes, in milliseconds.
///
/// # Errors
///
/// When it does not come, or the path is another.
pub fn run_idle(seed: u64) -> anyhow::Result<f64> {
    let mut world = World::new(seed)?;
    let config = || SiteConfig::new(RouterKind::EimApdf).delay(SITE_DELAY).binding_lifetime(BINDING_LIFETIME);
    let a = world.lab.add_site("a", config())?;
    let b = world.lab.add_site("b", config())?;
    let mut echo = Echo::start(&world, &a.host(0), &b.host(0), IDLE)?;
    echo.direct(1, Duration::from_secs(20))?;
    std::thread::sleep(Duration::from_secs(1));
    let idle = now();
    std::thread::sleep(IDLE);
    let end = now();
    let echoes = echo.finish()?;
    ensure!(echoes.path_after(false, idle).is_none() && echoes.is_direct(end), "the path has changed");
    Ok(echoes.slowest(idle, end))
}
