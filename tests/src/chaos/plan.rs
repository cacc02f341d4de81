//! What happens when, to whom: a pure function of the seed, on virtual time.

use std::fmt;
use std::time::Duration;

use netsim::{InputPolicy, RouterKind};
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom as _, SliceRandom as _};
use rand::{Rng, SeedableRng};

use crate::cell::Network;

/// Peers, each in a home of its own at first.
pub const PEERS: usize = 6;

/// Networks that are nobody's home, to move to.
const ELSEWHERE: usize = 4;

/// After a server is back, before another may be killed: peers have found it again.
const BETWEEN_KILLS: Duration = Duration::from_secs(10);

/// What a run is like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// Everything random follows from it.
    pub seed: u64,
    /// How long, the quiet end included.
    pub lasts: Duration,
    /// How many events begin in a minute.
    pub events_per_minute: f64,
    /// Nothing is wrong any more in the last part.
    pub quiet_end: Duration,
    /// Rendezvous servers: 1 or 2. Of two, one is always up.
    pub servers: usize,
}

/// A place where peers can be, by its place in [`Plan::places`].
pub type PlaceId = usize;

/// A peer, by its number.
pub type PeerIndex = usize;

/// A network with a line.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Place {
    /// Its routers.
    pub network: Network,
    /// Of its line, one way.
    pub delay: Duration,
}

/// Which packets of a path vanish, seen from the first of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Way {
    /// All.
    Both,
    /// Those of the first to the second.
    There,
    /// Those of the second to the first.
    Back,
}

/// Something that happens. Places are where the peers are at that time.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Disturbance {
    /// Nothing comes through between two places; the servers can be reached.
    Cut {
        /// The places.
        between: [PlaceId; 2],
        /// In which direction.
        way: Way,
    },
    /// A peer is in another network.
    Move {
        /// Who.
        peer: PeerIndex,
        /// Where it is from now on.
        to: PlaceId,
    },
    /// Two are, at the same moment.
    MoveBoth {
        /// Who.
        peers: [PeerIndex; 2],
        /// Where each is from now on.
        to: [PlaceId; 2],
    },
    /// A peer's process is stopped, and goes on.
    Sleep {
        /// Who.
        peer: PeerIndex,
    },
    /// Two are.
    SleepBoth {
        /// Who.
        peers: [PeerIndex; 2],
    },
    /// A router is off for a while, then knows nothing of before.
    Reboot {
        /// Whose.
        place: PlaceId,
        /// Whether the ports after it are others.
        other_ports: bool,
    },
    /// UDP does not leave.
    NoUdp {
        /// From where.
        place: PlaceId,
    },
    /// Longer packets vanish between two places.
    Narrow {
        /// The places.
        between: [PlaceId; 2],
        /// The longest packets that come through, in bytes.
        mtu: u16,
    },
    /// A line loses packets in each direction.
    Loss {
        /// Whose.
        place: PlaceId,
        /// How many of a thousand.
        per_mille: u16,
    },
    /// A line is slow in each direction.
    Slow {
        /// Whose.
        place: PlaceId,
        /// Delay beside its own.
        more: Duration,
        /// Bits per second.
        rate: u64,
    },
    /// `kill -9` of a rendezvous server, and a new start.
    KillServer {
        /// By its number.
        server: usize,
    },
}

/// What kind of disturbance it is: the causes that stalls are put down to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Kind {
    /// A path is cut in both directions.
    CutBoth,
    /// In one.
    CutOneWay,
    /// A peer has moved.
    Move,
    /// Two have.
    MoveBoth,
    /// A process is stopped.
    Sleep,
    /// Two are.
    SleepBoth,
    /// A router has forgotten its bindings; ports are the same afterwards where it keeps them.
    Reboot,
    /// Ports are others.
    RebootOtherPorts,
    /// UDP is blocked.
    NoUdp,
    /// A path is narrow.
    Narrow,
    /// A line loses packets.
    Loss,
    /// A line is slow.
    Slow,
    /// A server is down.
    KillServer,
}

impl Kind {
    /// Every kind; each once in a round.
    pub const ALL: [Self; 13] = [
        Self::CutBoth,
        Self::CutOneWay,
        Self::Move,
        Self::MoveBoth,
        Self::Sleep,
        Self::SleepBoth,
        Self::Reboot,
        Self::RebootOtherPorts,
        Self::NoUdp,
        Self::Narrow,
        Self::Loss,
        Self::Slow,
        Self::KillServer,
    ];

    /// The name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::CutBoth => "cut both ways",
            Self::CutOneWay => "cut one way",
            Self::Move => "move",
            Self::MoveBoth => "both move",
            Self::Sleep => "sleep",
            Self::SleepBoth => "both sleep",
            Self::Reboot => "reboot",
            Self::RebootOtherPorts => "reboot, other ports",
            Self::NoUdp => "no UDP",
            Self::Narrow => "narrow path",
            Self::Loss => "loss",
            Self::Slow => "slow line",
            Self::KillServer => "server killed",
        }
    }

    /// How long it may last, in milliseconds. Zero: it is over at once.
    const fn lasts(self) -> (u64, u64) {
        match self {
            Self::CutBoth | Self::CutOneWay => (500, 20_000),
            Self::Move | Self::MoveBoth => (0, 0),
            Self::Sleep | Self::SleepBoth => (1_000, 30_000),
            Self::Reboot | Self::RebootOtherPorts => (1, 10_000),
            Self::NoUdp => (2_000, 30_000),
            Self::Narrow => (5_000, 30_000),
            Self::Loss => (1_000, 10_000),
            Self::Slow => (3_000, 20_000),
            Self::KillServer => (500, 15_000),
        }
    }
}

impl Disturbance {
    /// Its kind.
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Cut { way: Way::Both, .. } => Kind::CutBoth,
            Self::Cut { .. } => Kind::CutOneWay,
            Self::Move { .. } => Kind::Move,
            Self::MoveBoth { .. } => Kind::MoveBoth,
            Self::Sleep { .. } => Kind::Sleep,
            Self::SleepBoth { .. } => Kind::SleepBoth,
            Self::Reboot { other_ports: false, .. } => Kind::Reboot,
            Self::Reboot { other_ports: true, .. } => Kind::RebootOtherPorts,
            Self::NoUdp { .. } => Kind::NoUdp,
            Self::Narrow { .. } => Kind::Narrow,
            Self::Loss { .. } => Kind::Loss,
            Self::Slow { .. } => Kind::Slow,
            Self::KillServer { .. } => Kind::KillServer,
        }
    }

    /// Peers that it takes hold of themselves.
    pub fn peers(&self) -> Vec<PeerIndex> {
        match self {
            Self::Move { peer, .. } | Self::Sleep { peer } => vec![*peer],
            Self::MoveBoth { peers, .. } | Self::SleepBoth { peers } => peers.to_vec(),
            _ => Vec::new(),
        }
    }
}

impl fmt::Display for Disturbance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind().name())?;
        match self {
            Self::Cut { between: [a, b], way } => {
                let arrow = match way {
                    Way::Both => "<->",
                    Way::There => "->",
                    Way::Back => "<-",
                };
                write!(f, ": place {a} {arrow} {b}")
            }
            Self::Move { peer, to } => write!(f, ": peer {peer} to place {to}"),
            Self::MoveBoth { peers, to } => {
                write!(f, ": peers {} and {} to places {} and {}", peers[0], peers[1], to[0], to[1])
            }
            Self::Sleep { peer } => write!(f, ": peer {peer}"),
            Self::SleepBoth { peers } => write!(f, ": peers {} and {}", peers[0], peers[1]),
            Self::Reboot { place, .. } | Self::NoUdp { place } => write!(f, ": place {place}"),
            Self::Narrow { between: [a, b], mtu } => write!(f, ": place {a} <-> {b}, {mtu} bytes"),
            Self::Loss { place, per_mille } => write!(f, ": place {place}, {per_mille} per mille"),
            Self::Slow { place, more, rate } => {
                write!(f, ": place {place}, {} ms more, {} Mbit/s", more.as_millis(), rate / 1_000_000)
            }
            Self::KillServer { server } => write!(f, ": server {server}"),
        }
    }
}

/// Something that happens, and when.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Event {
    /// After the start of the run.
    pub at: Duration,
    /// Zero where it is over at once.
    pub lasts: Duration,
    /// What happens.
    pub what: Disturbance,
}

impl Event {
    /// When it is over, but for what follows from it.
    pub fn until(&self) -> Duration {
        self.at + self.lasts
    }
}

/// Everything that a run consists of.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The homes of the peers, in their order, then the other places.
    pub places: Vec<Place>,
    /// In the order of their beginning.
    pub events: Vec<Event>,
}

impl Plan {
    /// The plan of these settings.
    pub fn new(settings: &Settings) -> Self {
        let mut random = StdRng::seed_from_u64(settings.seed);
        let places = places(&mut random);
        let busy = settings.lasts.saturating_sub(settings.quiet_end);
        let count = (settings.events_per_minute * busy.as_secs_f64() / 60.0).round() as usize;
        let mut times: Vec<u64> =
            (0..count).map(|_| random.random_range(0..=busy.as_millis() as u64)).collect();
        times.sort_unstable();
        let mut draw = Draw {
            random,
            peers: (0..PEERS).collect(),
            places: places.len(),
            servers: settings.servers,
            busy,
            deck: Vec::new(),
            events: Vec::new(),
        };
        for at in times {
            draw.event(Duration::from_millis(at));
        }
        Self { places, events: draw.events }
    }
}

/// Who is behind what. At most one home blocks UDP, in one plan of three.
fn places(random: &mut StdRng) -> Vec<Place> {
    use RouterKind as K;
    const KINDS: [(K, u32); 8] = [
        (K::EimApdf, 4),
        (K::EimAdf, 2),
        (K::EimEif, 1),
        (K::Firewall, 2),
        (K::CarrierEim, 2),
        (K::Apdm, 2),
        (K::ApdmSequential, 1),
        (K::CarrierApdm, 1),
    ];
    let mut place = |kind: Option<K>| {
        let weighted = KINDS.choose_weighted(random, |(_, weight)| *weight);
        let kind = kind.unwrap_or(weighted.map_or(K::EimApdf, |(kind, _)| *kind));
        let input = [InputPolicy::Drop, InputPolicy::Drop, InputPolicy::Reject, InputPolicy::Accept];
        let input = input.choose(random).copied().unwrap_or_default();
        Place { network: Network { kind, input }, delay: Duration::from_millis(random.random_range(5..=30)) }
    };
    let mut places: Vec<Place> = (0..PEERS + ELSEWHERE).map(|_| place(None)).collect();
    // One that every other kind can be direct with, so that no plan is without direct paths.
    let first = place(Some(K::EimApdf));
    let blocked = place(Some(K::UdpBlocked));
    places[0] = first;
    if random.random_ratio(1, 3) {
        places[1] = blocked;
    }
    places
}

/// Draws events one after the other.
struct Draw {
    random: StdRng,
    /// Where each peer is.
    peers: Vec<PlaceId>,
    places: usize,
    servers: usize,
    /// When all must be over.
    busy: Duration,
    /// The kinds still to come in this round.
    deck: Vec<Kind>,
    events: Vec<Event>,
}

impl Draw {
    /// The next kind that is possible now. One that is not stays in the deck for later; where none is, another round begins.
    fn event(&mut self, at: Duration) {
        let mut kinds = std::mem::take(&mut self.deck);
        for _ in 0..2 {
            for place in (0..kinds.len()).rev() {
                let lasts = self.duration(kinds[place], at);
                if let Some(what) = self.what(kinds[place], at, at + lasts) {
                    kinds.remove(place);
                    self.events.push(Event { at, lasts, what });
                    self.deck = kinds;
                    return;
                }
            }
            let mut round = Kind::ALL;
            round.shuffle(&mut self.random);
            // Those that have waited come first: from the end.
            kinds.splice(0..0, round);
        }
        self.deck = kinds;
    }

    /// Short times are as likely as long ones: evenly distributed by their logarithm.
    fn duration(&mut self, kind: Kind, at: Duration) -> Duration {
        let (least, most) = kind.lasts();
        if most == 0 {
            return Duration::ZERO;
        }
        let exponent = self.random.random_range((least as f64).ln()..=(most as f64).ln());
        Duration::from_millis(exponent.exp() as u64).min(self.busy.saturating_sub(at))
    }

    fn what(&mut self, kind: Kind, from: Duration, until: Duration) -> Option<Disturbance> {
        Some(match kind {
            Kind::CutBoth => Disturbance::Cut { between: self.path(from)?, way: Way::Both },
            Kind::CutOneWay => {
                let way = if self.random.random() { Way::There } else { Way::Back };
                Disturbance::Cut { between: self.path(from)?, way }
            }
            Kind::Move => {
                let peer = self.random.random_range(0..PEERS);
                Disturbance::Move { peer, to: self.moved(peer) }
            }
            Kind::MoveBoth => {
                let peers = self.pair();
                Disturbance::MoveBoth { peers, to: peers.map(|peer| self.moved(peer)) }
            }
            Kind::Sleep => Disturbance::Sleep { peer: self.awake(from)? },
            Kind::SleepBoth => {
                let first = self.awake(from)?;
                let second = self.awake(from).filter(|second| *second != first)?;
                Disturbance::SleepBoth { peers: [first, second] }
            }
            Kind::Reboot | Kind::RebootOtherPorts => {
                let other_ports = kind == Kind::RebootOtherPorts;
                Disturbance::Reboot { place: self.place(kind, from)?, other_ports }
            }
            Kind::NoUdp => Disturbance::NoUdp { place: self.place(kind, from)? },
            Kind::Narrow => {
                let mtu = *[1280, 1320, 1400].choose(&mut self.random)?;
                Disturbance::Narrow { between: self.path(from)?, mtu }
            }
            Kind::Loss => {
                let per_mille = *[20, 50, 100, 200, 400].choose(&mut self.random)?;
                Disturbance::Loss { place: self.place(kind, from)?, per_mille }
            }
            Kind::Slow => {
                let more = Duration::from_millis(self.random.random_range(10..=200));
                let rate = *[6, 10, 20].choose(&mut self.random)? * 1_000_000;
                Disturbance::Slow { place: self.place(kind, from)?, more, rate }
            }
            Kind::KillServer => {
                let mut kills = self.events.iter().filter(|event| event.what.kind() == Kind::KillServer);
                let early = kills.any(|kill| kill.until() + BETWEEN_KILLS > from);
                // One that is over at the quiet end's begin has no time to be missed.
                if early || until <= from {
                    return None;
                }
                Disturbance::KillServer { server: self.random.random_range(0..self.servers.max(1)) }
            }
        })
    }

    /// Two different peers.
    fn pair(&mut self) -> [PeerIndex; 2] {
        let first = self.random.random_range(0..PEERS);
        let second = (first + self.random.random_range(1..PEERS)) % PEERS;
        [first, second]
    }

    /// The places of two peers that are in different ones, with no event of this sort between them.
    fn path(&mut self, now: Duration) -> Option<[PlaceId; 2]> {
        let between = self.pair().map(|peer| self.peers[peer]);
        let [a, b] = between;
        let taken = self.in_force(now).any(|what| match what {
            Disturbance::Cut { between, .. } | Disturbance::Narrow { between, .. } => {
                *between == [a, b] || *between == [b, a]
            }
            _ => false,
        });
        (a != b && !taken).then_some(between)
    }

    /// Somebody's place, where no event of this kind is in force.
    fn place(&mut self, kind: Kind, now: Duration) -> Option<PlaceId> {
        let chosen = self.peers[self.random.random_range(0..PEERS)];
        let taken = self.in_force(now).any(|what| match what {
            Disturbance::Reboot { place, .. } => {
                *place == chosen && matches!(kind, Kind::Reboot | Kind::RebootOtherPorts)
            }
            Disturbance::NoUdp { place }
            | Disturbance::Loss { place, .. }
            | Disturbance::Slow { place, .. } => *place == chosen && what.kind() == kind,
            _ => false,
        });
        (!taken).then_some(chosen)
    }

    /// A peer whose process is not stopped.
    fn awake(&mut self, now: Duration) -> Option<PeerIndex> {
        let chosen = self.random.random_range(0..PEERS);
        let asleep = self.in_force(now).any(|what| {
            matches!(what.kind(), Kind::Sleep | Kind::SleepBoth) && what.peers().contains(&chosen)
        });
        (!asleep).then_some(chosen)
    }

    /// Takes a peer to another place.
    fn moved(&mut self, peer: PeerIndex) -> PlaceId {
        let elsewhere = self.random.random_range(PEERS..self.places);
        // Home again, half of the time.
        let to = match self.peers[peer] {
            at if at == peer || self.random.random() && elsewhere != at => elsewhere,
            _ => peer,
        };
        self.peers[peer] = to;
        to
    }

    fn in_force(&self, now: Duration) -> impl Iterator<Item = &Disturbance> {
        self.events.iter().filter(move |event| event.until() >= now).map(|event| &event.what)
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
