//! One cell of the matrix: a dialler behind one kind of router, a listener behind another.

use std::io::{Read as _, Write as _};
use std::time::Duration;

use anyhow::Context as _;
use netsim::{Host, InputPolicy, RouterKind, SiteConfig};

use crate::process::PATIENCE;
use crate::world::{SITE_DELAY, World};

/// What is to come of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// A direct path.
    Direct,
    /// A session over the relay, and no direct path.
    Relayed,
    /// A session over the relay at best: one side cannot use UDP.
    RelayedOrNone,
}

/// What came of a run.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// The session went over to a direct path.
    Direct {
        /// From the dial to the first byte echoed, in milliseconds.
        first_byte: f64,
        /// From the dial to the first direct path proven, in milliseconds.
        proven: f64,
        /// From the dial to the session on the direct path, in milliseconds.
        direct: f64,
    },
    /// It stayed on the relay and said so.
    Relayed {
        /// From the dial to the first byte echoed, in milliseconds.
        first_byte: f64,
    },
    /// There was no session.
    None {
        /// What the program said.
        why: String,
    },
}

/// Whether this side's filtering lets in a packet from a port that it has not sent to (an address-and-port-dependent mapping on the other
/// side sends from such a port).
fn admits_new_ports(kind: RouterKind) -> bool {
    matches!(kind, RouterKind::Public | RouterKind::EimEif | RouterKind::EimAdf)
}

fn takes_new_ports(kind: RouterKind) -> bool {
    matches!(kind, RouterKind::Apdm | RouterKind::CarrierApdm)
}

/// From the kinds alone, by RFC 4787's definitions, and not from what the program does.
pub fn expected(a: RouterKind, b: RouterKind) -> Expected {
    if a == RouterKind::UdpBlocked || b == RouterKind::UdpBlocked {
        Expected::RelayedOrNone
    } else if takes_new_ports(a) && takes_new_ports(b) {
        Expected::Relayed
    } else {
        Expected::Direct
    }
}

/// Whether the two can only meet by chance: one takes a new port for every destination, and the other lets none of them in.
pub fn is_by_chance(a: RouterKind, b: RouterKind) -> bool {
    let meets = |hard, other| takes_new_ports(hard) && !admits_new_ports(other);
    expected(a, b) == Expected::Direct && (meets(a, b) || meets(b, a))
}

/// How long a run may take to become direct. By chance an attempt of 4 s succeeds in 98 of 100 cases, and the next ones begin after 40 and
/// 80 s.
pub fn patience(a: RouterKind, b: RouterKind) -> Duration {
    Duration::from_secs(if is_by_chance(a, b) { 90 } else { 20 })
}

/// Whether an outcome is what was expected.
pub fn agrees(expected: Expected, outcome: &Outcome) -> bool {
    match expected {
        Expected::Direct => matches!(outcome, Outcome::Direct { .. }),
        Expected::Relayed => matches!(outcome, Outcome::Relayed { .. }),
        Expected::RelayedOrNone => !matches!(outcome, Outcome::Direct { .. }),
    }
}

/// A site for a cell.
pub fn site(kind: RouterKind, input: InputPolicy) -> SiteConfig {
    SiteConfig::new(kind).input(input).delay(SITE_DELAY)
}

/// Dials once from `dialler` to the echoing listener `target` and sees what comes of it. A session that is not direct
/// after `patience` counts as relayed.
///
/// # Errors
///
/// When a program misbehaves: wrong echo, no end, an exit code that does not fit.
pub fn run(
    world: &World,
    dialler: &Host,
    name: &str,
    target: &str,
    patience: Duration,
) -> anyhow::Result<Outcome> {
    let mut peer = world.peer(dialler, name, &["connect", target])?;
    let mut stdin = peer.stdin()?;
    let mut stdout = peer.stdout()?;
    stdin.write_all(b"are you there?")?;
    stdin.flush()?;
    let begun = peer.event(|event| event["event"] == "first_byte" || event["event"] == "error", PATIENCE)?;
    if begun["event"] == "error" {
        let status = peer.wait(PATIENCE)?;
        anyhow::ensure!(!status.success(), "an error, and yet success");
        return Ok(Outcome::None { why: begun["message"].as_str().unwrap_or_default().to_owned() });
    }
    let first_byte = begun["since_dial_ms"].as_f64().context("milliseconds")?;
    let mut echo = [0; 14];
    stdout.read_exact(&mut echo)?;
    anyhow::ensure!(&echo == b"are you there?", "the echo is not what was sent");
    let direct = peer.event(|event| event["event"] == "path" && event["path"] == "direct", patience);
    drop(stdin);
    let closed = peer.named("closed")?;
    anyhow::ensure!(peer.wait(PATIENCE)?.success(), "not a clean end");
    match direct {
        Ok(event) => Ok(Outcome::Direct {
            first_byte,
            proven: event["timeline"]["proven_ms"].as_f64().context("a proven path")?,
            direct: event["timeline"]["direct_ms"].as_f64().context("a direct path")?,
        }),
        Err(_) => {
            anyhow::ensure!(closed["path"]["path"] == "relayed", "neither direct nor relayed: {closed}");
            Ok(Outcome::Relayed { first_byte })
        }
    }
}
