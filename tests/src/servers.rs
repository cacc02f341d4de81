//! A rendezvous server is lost under a steady echo: of two, where the session goes over to the other, or the only one, which comes back.

use std::fmt;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use netsim::{Direction, Host, RouterKind, SiteConfig};

use crate::echo::{EVERY, Echo, now};
use crate::process::PATIENCE;
use crate::world::{SITE_DELAY, World};

/// The longest that no echo may come, and how soon one must come once the only server listens again, in milliseconds.
pub const MOST: f64 = 1_000.0;

/// The same where the server has said that it goes away: what it relays has moved before it does.
pub const MOST_STOPPED: f64 = 250.0;

/// The longest that no echo of a session with a direct path may come, in milliseconds: it is to notice nothing.
pub const MOST_DIRECT: f64 = 150.0;

/// Watched before the loss.
const CALM: Duration = Duration::from_secs(3);

/// Between whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pair {
    /// Two homes with random ports: the relay, over UDP.
    Relayed,
    /// Two homes without UDP: the relay, over TCP.
    Tcp,
    /// Two homes with a direct path.
    Direct,
}

impl Pair {
    fn kind(self) -> RouterKind {
        match self {
            Self::Relayed => RouterKind::Apdm,
            Self::Tcp => RouterKind::UdpBlocked,
            Self::Direct => RouterKind::EimApdf,
        }
    }
}

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// The process of one of two servers is killed.
    Killed,
    /// One of two servers is told to stop, and tells its peers.
    Stopped,
    /// The host of one of two servers is heard of no more: no ICMP, no TCP reset.
    Vanished,
    /// The process of the only server is killed, and started again after this.
    Restarted(Duration),
    /// The only server's host is heard of no more, and is again after this; it has forgotten nothing.
    Away(Duration),
}

/// One way to lose a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Case {
    /// What happens.
    pub loss: Loss,
    /// To whom.
    pub pair: Pair,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.loss {
            Loss::Killed => write!(f, "one_of_two_killed")?,
            Loss::Stopped => write!(f, "one_of_two_stopped")?,
            Loss::Vanished => write!(f, "one_of_two_vanished")?,
            Loss::Restarted(after) => write!(f, "killed_for_{}_s", after.as_secs())?,
            Loss::Away(after) => write!(f, "away_for_{}_s", after.as_secs())?,
        }
        match self.pair {
            Pair::Relayed => f.write_str("_relayed"),
            Pair::Tcp => f.write_str("_over_tcp"),
            Pair::Direct => f.write_str("_direct"),
        }
    }
}

/// All that are tested.
pub fn cases() -> Vec<Case> {
    let losses = [
        Loss::Killed,
        Loss::Stopped,
        Loss::Vanished,
        Loss::Restarted(Duration::from_secs(5)),
        Loss::Restarted(Duration::from_secs(30)),
        Loss::Away(Duration::from_secs(5)),
    ];
    let pairs = [Pair::Relayed, Pair::Tcp, Pair::Direct];
    losses.into_iter().flat_map(|loss| pairs.map(|pair| Case { loss, pair })).collect()
}

impl Case {
    /// The bound of [`Run::gap`], where there is one.
    pub fn most_gap(&self) -> Option<f64> {
        match (self.pair, self.loss) {
            (Pair::Direct, _) => Some(MOST_DIRECT),
            (_, Loss::Stopped) => Some(MOST_STOPPED),
            (_, Loss::Killed | Loss::Vanished) => Some(MOST),
            (_, Loss::Restarted(_) | Loss::Away(_)) => None,
        }
    }

    /// The bound of [`Run::back`], where there is one.
    pub fn most_back(&self) -> Option<f64> {
        let returns = matches!(self.loss, Loss::Restarted(_) | Loss::Away(_));
        (returns && self.pair != Pair::Direct).then_some(MOST)
    }
}

/// One run, in milliseconds.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    /// The longest time between two echoes while nothing was wrong.
    pub control: f64,
    /// The longest time between two echoes from the loss on.
    pub gap: f64,
    /// From the moment that the only server was there again until the next echo; 0 where it is one of two.
    pub back: f64,
    /// Where there was a direct path: the longest time between two echoes when that was cut in the end, and the relay had to carry.
    pub fallen_back: f64,
}

/// One loss in a lab of its own. Everything must come back, over one connection.
///
/// # Errors
///
/// When it does not.
pub fn run(seed: u64, case: Case) -> anyhow::Result<Run> {
    let mut world = World::new(seed)?;
    let second = match case.loss {
        Loss::Killed | Loss::Stopped | Loss::Vanished => Some(world.another_server("second")?),
        Loss::Restarted(_) | Loss::Away(_) => None,
    };
    let config = || SiteConfig::new(case.pair.kind()).delay(SITE_DELAY);
    let a = world.lab.add_site("a", config())?;
    let b = world.lab.add_site("b", config())?;
    let others: Vec<&str> = second.iter().map(|(_, address)| address.as_str()).collect();
    let mut echo = Echo::begin(&world, &a.host(0), &b.host(0), EVERY, &others)?;
    if case.pair == Pair::Direct {
        echo.direct(1, Duration::from_secs(20))?;
    }
    // What the beginning shakes up has settled, and there is a spare channel where there can be.
    std::thread::sleep(CALM);
    let calm = now();
    std::thread::sleep(CALM);
    let lost = now();
    let mut again = None;
    match case.loss {
        Loss::Killed => world.kill_server()?,
        Loss::Stopped => world.stop_server()?,
        Loss::Vanished => silence(&world.server_host, true)?,
        Loss::Restarted(after) => {
            world.kill_server()?;
            std::thread::sleep(after);
            world.start_server_again()?;
            again = Some(now());
        }
        Loss::Away(after) => {
            silence(&world.server_host, true)?;
            std::thread::sleep(after);
            silence(&world.server_host, false)?;
            again = Some(now());
        }
    }
    std::thread::sleep(2 * CALM);
    let end = now();
    let mut cut = None;
    if case.pair == Pair::Direct {
        a.cut_between(&b, Direction::Both)?;
        cut = Some(end);
        echo.relayed(PATIENCE)?;
        std::thread::sleep(CALM);
    }
    let over = now();
    let echoes = echo.finish()?;
    if case.pair == Pair::Direct {
        ensure!(echoes.changes(lost, end) == 0 && echoes.is_direct(end), "the direct path was left");
    }
    Ok(Run {
        control: echoes.gap(calm, lost),
        gap: echoes.gap(lost, end),
        back: match again {
            Some(again) => echoes.first_after(again).context("nothing came any more")?,
            None => 0.0,
        },
        fallen_back: cut.map_or(0.0, |cut| echoes.gap(cut, over)),
    })
}

/// Lets a host be heard of no more, or again.
fn silence(host: &Host, silent: bool) -> anyhow::Result<()> {
    let rules = match silent {
        true => {
            "add table inet silence\n\
             add chain inet silence in { type filter hook input priority raw; policy drop; }\n\
             add chain inet silence out { type filter hook output priority raw; policy drop; }\n"
        }
        false => "delete table inet silence\n",
    };
    let status = host.command("nft").arg(rules).status()?;
    ensure!(status.success(), "nft: {status}");
    Ok(())
}
