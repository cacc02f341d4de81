//! Random networks: who is where, behind what, and when everybody does something. All of it follows from a seed.

use std::fmt;
use std::time::Duration;

use netsim::{Egress, Filtering, Impairment, InputPolicy, Ipv6, Mapping, PortAllocation, Router, SiteConfig};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// What may differ from run to run beside the seed.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Options {
    /// The share of packets that every access line loses in each direction.
    pub loss: f64,
    /// What the peers are kept from, to see that it is noticed.
    pub handicap: Option<Handicap>,
}

/// Something that peers are kept from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handicap {
    /// No meetings: neither primed checks nor foretold ports.
    NoMeetings,
    /// No birthday probing.
    NoProbing,
    /// What comes over a direct path is lost, but for checks.
    NoData,
    /// The other side's checks are not answered.
    NoAnswers,
}

/// A network and what happens in it.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// Everything follows from it.
    pub seed: u64,
    /// Where peers may be.
    pub sites: Vec<Site>,
    /// Who there is.
    pub peers: Vec<Peer>,
    /// Who asks for whom, by their places in `peers`, and how long after both are online.
    pub dials: Vec<(usize, usize, Duration)>,
}

/// A site.
#[derive(Debug, Clone)]
pub struct Site {
    /// The one nearest to the hosts first.
    pub routers: Vec<Router>,
    /// It is behind the second router of this site, which is its own as well.
    pub behind: Option<usize>,
    /// What IPv6 is like there.
    pub ipv6: Ipv6,
    /// The third number of its LAN 192.168.*n*.0/24.
    pub lan: u8,
    /// Hosts on the LAN.
    pub hosts: u8,
    pub(super) up: Impairment,
    pub(super) down: Impairment,
    pub(super) delays: [Duration; 2],
}

/// A peer's place and times.
#[derive(Debug, Clone, Copy)]
pub struct Peer {
    /// By its place in `sites`.
    pub site: usize,
    /// Which host of the site.
    pub host: usize,
    /// When its process starts.
    pub start: Duration,
    /// How much later than others it hears of introductions.
    pub skew: Duration,
}

impl Site {
    /// One host behind these routers, the one nearest to it first, on a line that does nothing.
    pub fn new(routers: Vec<Router>) -> Self {
        Self {
            routers,
            behind: None,
            ipv6: Ipv6::None,
            lan: 1,
            hosts: 1,
            up: Impairment::none(),
            down: Impairment::none(),
            delays: [Duration::ZERO; 2],
        }
    }

    /// As netsim wants it.
    pub fn config(&self) -> SiteConfig {
        SiteConfig::with_routers(self.routers.clone())
            .hosts(self.hosts)
            .ipv6(self.ipv6)
            .lan([192, 168, self.lan, 0].into())
            .up(self.up.clone())
            .down(self.down.clone())
    }
}

impl Scenario {
    /// The network of this seed.
    pub fn new(seed: u64, options: &Options) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let random = &mut random;
        let mut sites = vec![site(random, options)];
        let mut peers = vec![peer(random, 0, 0)];
        let others = if random.random_bool(0.1) { 2 } else { 1 };
        for _ in 0..others {
            let place = random.random_range(0..100);
            let (at, host) = if place < 8 {
                sites[0].hosts += 1;
                (0, usize::from(sites[0].hosts) - 1)
            } else if place < 25 && sites[0].routers.len() == 2 {
                let neighbour = neighbour(random, &sites[0], options);
                sites.push(neighbour);
                (sites.len() - 1, 0)
            } else {
                sites.push(site(random, options));
                (sites.len() - 1, 0)
            };
            peers.push(peer(random, at, host));
        }
        let wait = |random: &mut StdRng| {
            let most = if random.random_bool(0.8) { 5.0 } else { 90.0 };
            between(random, 0.0, most)
        };
        let mut dials: Vec<_> = (1..peers.len())
            .map(|other| {
                let (from, to) = if random.random_bool(0.5) { (0, other) } else { (other, 0) };
                (from, to, wait(random))
            })
            .collect();
        if peers.len() == 2 && random.random_bool(0.1) {
            // Both at once, or nearly.
            let (from, to, at) = dials[0];
            dials.push((to, from, at + between(random, 0.0, 0.2)));
        }
        Self { seed, sites, peers, dials }
    }
}

fn between(random: &mut StdRng, least: f64, most: f64) -> Duration {
    Duration::from_secs_f64(random.random_range(least..most))
}

fn peer(random: &mut StdRng, site: usize, host: usize) -> Peer {
    let skew = match random.random_range(0..10) {
        0..6 => Duration::ZERO,
        6..9 => between(random, 0.0, 0.3),
        _ => between(random, 0.0, 3.0),
    };
    Peer { site, host, start: between(random, 0.0, 3.0), skew }
}

fn site(random: &mut StdRng, options: &Options) -> Site {
    let routers = routers(random);
    // From a few milliseconds to some hundred, small ones as often as great ones.
    let delay = |random: &mut StdRng| Duration::from_secs_f64(0.001 * 120f64.powf(random.random()));
    let delays = [delay(random), delay(random)];
    let [up, down] = delays.map(|delay| line(random, delay, options));
    let lan = if random.random_bool(0.6) { 1 } else { random.random_range(2..5) };
    let ipv6 = match random.random_range(0..100) {
        0..15 => Ipv6::Firewall,
        15..22 => Ipv6::Open,
        22..28 => Ipv6::Broken,
        _ => Ipv6::None,
    };
    Site { ipv6, lan, up, down, delays, ..Site::new(routers) }
}

/// One more customer of a site's carrier.
fn neighbour(random: &mut StdRng, of: &Site, options: &Options) -> Site {
    let mut neighbour = site(random, options);
    neighbour.routers = vec![home(random), of.routers[1].clone()];
    neighbour.behind = Some(0);
    neighbour
}

fn line(random: &mut StdRng, delay: Duration, options: &Options) -> Impairment {
    let mut line = Impairment::none().delay(delay).loss(options.loss);
    if random.random_bool(0.5) {
        line = line.jitter(delay.mul_f64(random.random_range(0.0..0.3)));
    }
    if random.random_bool(0.2) {
        line = line.reorder(0.02).reorder_by(between(random, 0.001, 0.05));
    }
    if random.random_bool(0.2) {
        line = line.duplicate(0.02);
    }
    line
}

fn routers(random: &mut StdRng) -> Vec<Router> {
    use Filtering::{AddressAndPortDependent as Apdf, AddressDependent as Adf, EndpointIndependent as Eif};
    use Mapping::{AddressAndPortDependent as Apdm, EndpointIndependent as Eim};
    match random.random_range(0..100) {
        0..6 => vec![Router::transparent()],
        6..14 => vec![finish(random, Router::nat(Eim, Eif))],
        14..22 => vec![finish(random, Router::nat(Eim, Adf))],
        22..44 => vec![finish(random, Router::nat(Eim, Apdf))],
        44..50 => vec![finish(random, Router::firewall())],
        50..62 => vec![apdm(random, PortAllocation::Random)],
        62..70 => {
            let step = [1, 1, 2, 4][random.random_range(0..4)];
            vec![apdm(random, PortAllocation::Sequential { step })]
        }
        70..78 => vec![apdm(random, PortAllocation::Preserving)],
        78..80 => vec![finish(random, Router::nat(Apdm, Eif))],
        80..82 => vec![finish(random, Router::nat(Apdm, Adf))],
        82..84 => {
            let home = finish(random, Router::nat(Eim, Apdf));
            vec![home.with_egress(Egress::Web)]
        }
        84..94 => {
            let filtering = filtering(random);
            let carrier = finish(random, Router::nat(Eim, filtering));
            vec![home(random), carrier]
        }
        _ => vec![home(random), apdm(random, PortAllocation::Random)],
    }
}

fn home(random: &mut StdRng) -> Router {
    let filtering = filtering(random);
    finish(random, Router::nat(Mapping::EndpointIndependent, filtering))
}

fn apdm(random: &mut StdRng, allocation: PortAllocation) -> Router {
    let apdf = Router::nat(Mapping::AddressAndPortDependent, Filtering::AddressAndPortDependent);
    let mut router = finish(random, apdf);
    router.allocation = allocation;
    router
}

fn filtering(random: &mut StdRng) -> Filtering {
    match random.random_range(0..4) {
        0 => Filtering::EndpointIndependent,
        1 => Filtering::AddressDependent,
        _ => Filtering::AddressAndPortDependent,
    }
}

/// What differs between routers of one kind.
fn finish(random: &mut StdRng, mut router: Router) -> Router {
    router.input = match random.random_range(0..100) {
        0..50 => InputPolicy::Drop,
        50..65 => InputPolicy::Reject,
        _ => InputPolicy::Accept,
    };
    router.binding_lifetime = match random.random_range(0..100) {
        0..2 => Some(Duration::from_secs(10)),
        2..10 => Some(Duration::from_secs(20)),
        10..20 => Some(Duration::from_secs(30)),
        20..30 => Some(Duration::from_secs(120)),
        _ => None,
    };
    router.hairpin = random.random_bool(0.5);
    // The smallest table that is said to be about; birthday probing promises to fit in.
    router.most_flows = random.random_bool(0.1).then_some(1024);
    router
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, site) in self.sites.iter().enumerate() {
            write!(f, "site {}: {site}", index + 1)?;
            if let Some(other) = site.behind {
                write!(f, ", behind the carrier of site {}", other + 1)?;
            }
            writeln!(f)?;
        }
        for (index, peer) in self.peers.iter().enumerate() {
            writeln!(
                f,
                "peer {}: host {} of site {}, starts at {:?}, hears of introductions {:?} late",
                index + 1,
                peer.host,
                peer.site + 1,
                peer.start,
                peer.skew
            )?;
        }
        for (from, to, at) in &self.dials {
            writeln!(f, "peer {} dials peer {}, {at:?} after both are online", from + 1, to + 1)?;
        }
        Ok(())
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, router) in self.routers.iter().enumerate() {
            let carrier = if place > 0 { " + carrier " } else { "" };
            write!(f, "{carrier}{}", describe(router))?;
        }
        let [up, down] = self.delays.map(|delay| delay.as_secs_f64() * 1e3);
        write!(f, "; {up:.1} ms up, {down:.1} ms down, LAN 192.168.{}.0/24", self.lan)?;
        match self.ipv6 {
            Ipv6::None => Ok(()),
            ipv6 => write!(f, ", IPv6 {}", ipv6.name()),
        }
    }
}

fn describe(router: &Router) -> String {
    let mapping = match (router.mapping, router.allocation) {
        (None, _) if router.filtering.is_none() => return "public".into(),
        (None, _) => "firewall".to_owned(),
        (Some(Mapping::EndpointIndependent), _) => "EIM".into(),
        (Some(_), PortAllocation::Random) => "APDM random".into(),
        (Some(_), PortAllocation::Sequential { step }) => format!("APDM sequential +{step}"),
        (Some(_), _) => "APDM preserving".into(),
    };
    let filtering = match router.filtering {
        Some(Filtering::EndpointIndependent) => "EIF",
        Some(Filtering::AddressDependent) => "ADF",
        _ => "APDF",
    };
    let mut text = format!("{mapping} {filtering}, INPUT {}", router.input);
    if let Some(lifetime) = router.binding_lifetime {
        text += &format!(", bindings {} s", lifetime.as_secs());
    }
    if let Some(most) = router.most_flows {
        text += &format!(", at most {most} flows");
    }
    if router.hairpin {
        text += ", hairpin";
    }
    if router.egress == Egress::Web {
        text += ", UDP blocked";
    }
    text
}
