//! One cell of the matrix: a dialler behind one kind of router, a listener behind another.

use std::io::{Read as _, Write as _};
use std::time::Duration;

use anyhow::Context as _;
use netsim::{Host, InputPolicy, RouterKind, SiteConfig};
use nix::sys::signal::Signal;

use crate::process::{PATIENCE, Program};
use crate::world::{SITE_DELAY, World};

/// What is to come of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// A direct path.
    Direct,
    /// A session over the relay, and no direct path.
    Relayed,
    /// The same, and a side that cannot use UDP reaches the relay over TCP.
    RelayedOverTcp,
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
        /// What has led to the path.
        rung: String,
    },
    /// It stayed on the relay and said so.
    Relayed {
        /// From the dial to the first byte echoed, in milliseconds.
        first_byte: f64,
        /// How the dialler reaches the relay.
        over: String,
    },
    /// There was no session.
    None {
        /// What the program said.
        why: String,
    },
}

/// A site's network, as the tables name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Network {
    /// Its routers.
    pub kind: RouterKind,
    /// What the outermost does with packets for nobody inside.
    pub input: InputPolicy,
}

impl Network {
    /// A network with a router that drops what is for nobody inside.
    pub const fn new(kind: RouterKind) -> Self {
        Self { kind, input: InputPolicy::Drop }
    }

    const fn with(kind: RouterKind, input: InputPolicy) -> Self {
        Self { kind, input }
    }

    /// A site for it.
    pub fn site(self) -> SiteConfig {
        SiteConfig::new(self.kind).input(self.input).delay(SITE_DELAY)
    }

    /// Whether its filtering lets in a packet from a port that it has not sent to (an address-and-port-dependent mapping on the other side sends
    /// from such a port).
    fn admits_new_ports(self) -> bool {
        matches!(self.kind, RouterKind::Public | RouterKind::EimEif | RouterKind::EimAdf)
    }

    /// Whether every destination sees a port that nobody could have foretold.
    fn takes_random_ports(self) -> bool {
        matches!(self.kind, RouterKind::Apdm | RouterKind::CarrierApdm)
    }

    /// Whether every destination sees another port, but one that can be foretold.
    fn takes_foreseeable_ports(self) -> bool {
        matches!(self.kind, RouterKind::ApdmSequential | RouterKind::ApdmPreserving)
    }
}

impl std::fmt::Display for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.input {
            InputPolicy::Drop => f.pad(self.kind.name()),
            input => f.pad(&format!("{}+{input}", self.kind)),
        }
    }
}

impl std::str::FromStr for Network {
    type Err = netsim::UnknownName;

    /// A kind's name, or one with `+` and a policy behind it.
    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let (kind, input) = name.split_once('+').unwrap_or((name, "drop"));
        Ok(Self { kind: kind.parse()?, input: input.parse()? })
    }
}

/// The networks of the main table.
pub const NETWORKS: [Network; 10] = [
    Network::new(RouterKind::Public),
    Network::new(RouterKind::EimEif),
    Network::new(RouterKind::EimAdf),
    Network::new(RouterKind::EimApdf),
    Network::with(RouterKind::EimApdf, InputPolicy::Reject),
    Network::new(RouterKind::CarrierEim),
    Network::new(RouterKind::Firewall),
    Network::new(RouterKind::Apdm),
    Network::new(RouterKind::CarrierApdm),
    Network::new(RouterKind::UdpBlocked),
];

/// Networks with a NAT that keeps its port, or none.
const STEADY: [RouterKind; 6] = [
    RouterKind::Public,
    RouterKind::EimEif,
    RouterKind::EimAdf,
    RouterKind::EimApdf,
    RouterKind::CarrierEim,
    RouterKind::Firewall,
];

/// Which pairs a table holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Table {
    /// Every ordered pair of the ten usual networks.
    Usual,
    /// Routers that take stray packets for their own, on either or both sides.
    Accepting,
    /// NATs whose ports can be foretold, with one another and with every steady kind.
    Foreseeable,
}

impl Table {
    /// Its pairs: who dials, who listens.
    pub fn pairs(self) -> Vec<(Network, Network)> {
        let all = |rows: &[Network], columns: &[Network]| -> Vec<_> {
            rows.iter().flat_map(|row| columns.iter().map(move |column| (*row, *column))).collect()
        };
        let swapped = |pairs: &[(Network, Network)]| pairs.iter().map(|(a, b)| (*b, *a)).collect();
        match self {
            Self::Usual => all(&NETWORKS, &NETWORKS),
            Self::Accepting => {
                let accepting = STEADY[1..].iter().map(|kind| Network::with(*kind, InputPolicy::Accept));
                let accepting: Vec<_> = accepting.collect();
                let both = all(&accepting, &accepting);
                let hard = [RouterKind::Apdm, RouterKind::CarrierApdm].map(Network::new);
                let hard_accepting = hard.map(|network| Network::with(network.kind, InputPolicy::Accept));
                let steady = STEADY.map(Network::new);
                let others = [&steady[..], &hard, &hard_accepting].concat();
                let one = [all(&accepting, &others), all(&steady, &hard_accepting)].concat();
                let other: Vec<_> = swapped(&one);
                [both, one, other].concat()
            }
            Self::Foreseeable => {
                let foreseeable = [RouterKind::ApdmSequential, RouterKind::ApdmPreserving].map(Network::new);
                let one = all(&foreseeable, &STEADY.map(Network::new));
                let other: Vec<_> = swapped(&one);
                [all(&foreseeable, &foreseeable), one, other].concat()
            }
        }
    }
}

/// How a pair can become direct.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// One round trip after the introduction.
    AtOnce,
    /// By primed checks or predicted ports, if not at once.
    Meeting,
    /// By chance: one side takes a random port for every destination, and the other lets none of them in.
    Chance,
    /// Not at all.
    Never,
    /// Not at all: one side cannot use UDP, and reaches the relay over TCP.
    NoUdp,
}

impl Way {
    /// From the kinds alone, by RFC 4787's definitions, and not from what the program does.
    pub fn of(a: Network, b: Network) -> Self {
        let random = [a, b].map(Network::takes_random_ports);
        let either = |is: fn(Network) -> bool| is(a) || is(b);
        if either(|network| network.kind == RouterKind::UdpBlocked) {
            return Self::NoUdp;
        }
        match random {
            [true, true] => Self::Never,
            [true, false] if b.admits_new_ports() => Self::AtOnce,
            [false, true] if a.admits_new_ports() => Self::AtOnce,
            [true, false] if b.takes_foreseeable_ports() => Self::Never,
            [false, true] if a.takes_foreseeable_ports() => Self::Never,
            [true, false] | [false, true] => Self::Chance,
            _ if either(|network| network.input == InputPolicy::Accept) => Self::Meeting,
            _ if either(Network::takes_foreseeable_ports) => Self::Meeting,
            _ => Self::AtOnce,
        }
    }

    /// What is to come of it.
    pub fn expected(self) -> Expected {
        match self {
            Self::AtOnce | Self::Meeting | Self::Chance => Expected::Direct,
            Self::Never => Expected::Relayed,
            Self::NoUdp => Expected::RelayedOverTcp,
        }
    }

    /// How long a run may take to become direct. Probing by chance begins anew after 40 and 80 s.
    pub fn patience(self) -> Duration {
        Duration::from_secs(if self == Self::Chance { 90 } else { 20 })
    }

    /// From the dial to the session on the direct path, and the share of runs for which it holds.
    pub fn promise(self) -> Option<(Duration, f64)> {
        match self {
            Self::AtOnce => Some((Duration::from_millis(200), 0.5)),
            Self::Meeting => Some((Duration::from_secs(3), 1.0)),
            Self::Chance => Some((Duration::from_secs(8), 0.95)),
            Self::Never | Self::NoUdp => None,
        }
    }
}

/// Whether an outcome is what was expected.
pub fn agrees(expected: Expected, outcome: &Outcome) -> bool {
    match expected {
        Expected::Direct => matches!(outcome, Outcome::Direct { .. }),
        Expected::Relayed | Expected::RelayedOverTcp => matches!(outcome, Outcome::Relayed { .. }),
    }
}

/// One dial to an echoing listener.
pub struct Dial<'a> {
    world: &'a World,
    host: &'a Host,
    name: &'a str,
    target: &'a str,
    patience: Duration,
    held_up: Option<(&'a Program, Duration)>,
}

impl<'a> Dial<'a> {
    /// From `host`, with the key of `name`, to the id `target`. A session that is not direct after `patience` counts as relayed.
    pub fn new(world: &'a World, host: &'a Host, name: &'a str, target: &'a str, patience: Duration) -> Self {
        Self { world, host, name, target, patience, held_up: None }
    }

    /// The listener is stopped for so long when the dialler starts.
    #[must_use]
    pub fn held_up(self, listener: &'a Program, time: Duration) -> Self {
        Self { held_up: Some((listener, time)), ..self }
    }

    /// Dials and sees what comes of it.
    ///
    /// # Errors
    ///
    /// When a program misbehaves: wrong echo, no end, an exit code that does not fit.
    pub fn run(&self) -> anyhow::Result<Outcome> {
        if let Some((listener, _)) = self.held_up {
            listener.signal(Signal::SIGSTOP)?;
        }
        let mut peer = self.world.peer(self.host, self.name, &["connect", self.target])?;
        let mut stdin = peer.stdin()?;
        let mut stdout = peer.stdout()?;
        stdin.write_all(b"are you there?")?;
        stdin.flush()?;
        if let Some((listener, time)) = self.held_up {
            // Not a wait for something: this is the disturbance.
            std::thread::sleep(time);
            listener.signal(Signal::SIGCONT)?;
        }
        let begun =
            peer.event(|event| event["event"] == "first_byte" || event["event"] == "error", PATIENCE)?;
        if begun["event"] == "error" {
            let status = peer.wait(PATIENCE)?;
            anyhow::ensure!(!status.success(), "an error, and yet success");
            return Ok(Outcome::None { why: begun["message"].as_str().unwrap_or_default().to_owned() });
        }
        let first_byte = begun["since_dial_ms"].as_f64().context("milliseconds")?;
        let mut echo = [0; 14];
        stdout.read_exact(&mut echo)?;
        anyhow::ensure!(&echo == b"are you there?", "the echo is not what was sent");
        let direct = peer.event(|event| event["event"] == "path" && event["path"] == "direct", self.patience);
        drop(stdin);
        let closed = peer.named("closed")?;
        anyhow::ensure!(peer.wait(PATIENCE)?.success(), "not a clean end");
        match direct {
            Ok(event) => Ok(Outcome::Direct {
                first_byte,
                proven: event["timeline"]["proven_ms"].as_f64().context("a proven path")?,
                direct: event["timeline"]["direct_ms"].as_f64().context("a direct path")?,
                rung: event["rung"].as_str().context("a rung")?.to_owned(),
            }),
            Err(_) => {
                anyhow::ensure!(closed["path"]["path"] == "relayed", "neither direct nor relayed: {closed}");
                let over = closed["path"]["over"].as_str().context("how the relay is reached")?.to_owned();
                Ok(Outcome::Relayed { first_byte, over })
            }
        }
    }
}
