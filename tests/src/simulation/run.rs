//! One run: a network, its peers, and what became of their dials.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use netsim::model::{Network, What};
use peer_agent::Rung;

use super::log::{Log, Trace};
use super::oracle::{self, Chance, Verdict};
use super::peer::Peer;
use super::scenario::{Options, Scenario};
use super::server::{SIGNALLING, Server};

/// Peers that are not online by then will not be.
const ONLINE: Duration = Duration::from_secs(60);

/// How long two peers look for a path from their introduction on: three birthday attempts and all meetings.
const SEARCH: Duration = Duration::from_secs(150);

/// The same, where there is none to be found: several rounds of everything.
const VAIN_SEARCH: Duration = Duration::from_secs(45);

/// How often the two say something over the paths that they have selected.
const DATA_INTERVAL: Duration = Duration::from_millis(250);

/// How often it is looked whether all is over.
const LOOK: Duration = Duration::from_millis(50);

/// What became of a pair.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Outcome {
    /// Both have selected paths that are two ends of one, and data went over it both ways.
    Direct {
        /// What led to it.
        rung: Rung,
        /// From the introduction of whoever heard of it first until both had selected.
        after: Duration,
    },
    /// Data went over the relay both ways, and nowhere else.
    Relayed,
    /// There was no introduction.
    NoSession,
}

impl Outcome {
    /// A short name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Direct { rung, .. } => rung.name(),
            Self::Relayed => "relayed",
            Self::NoSession => "no session",
        }
    }
}

/// Two peers and what was expected of them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pair {
    /// By their places in the scenario.
    pub peers: (usize, usize),
    /// What is possible.
    pub verdict: Verdict,
    /// What happened.
    pub outcome: Outcome,
    /// How long one heard of the introduction after the other.
    pub apart: Duration,
    /// How long a path may take; `None` where it is not sure to come although it is possible.
    pub bound: Option<Duration>,
    /// What birthday probing can do, if that is what the two depend on.
    pub chance: Option<Chance>,
}

impl Pair {
    /// Whether what happened is what had to. By chance, or without a bound, both a path and none may be.
    pub fn agrees(&self) -> bool {
        match self.verdict {
            Verdict::Plain | Verdict::Predicted if self.bound.is_none() => self.outcome != Outcome::NoSession,
            Verdict::Plain | Verdict::Predicted => {
                matches!(self.outcome, Outcome::Direct { after, .. } if self.bound.is_none_or(|bound| after <= bound))
            }
            Verdict::Chance => self.outcome != Outcome::NoSession,
            Verdict::Never => self.outcome == Outcome::Relayed,
            Verdict::NoSession => self.outcome == Outcome::NoSession,
        }
    }
}

/// What came of a run.
#[derive(Debug, Clone)]
pub struct Run {
    /// Its seed.
    pub seed: u64,
    /// Every two peers of which one has dialled the other.
    pub pairs: Vec<Pair>,
    /// What must never happen, and did.
    pub violations: Vec<String>,
}

impl Run {
    /// Whether all is as it has to be.
    pub fn agrees(&self) -> bool {
        self.violations.is_empty() && self.pairs.iter().all(Pair::agrees)
    }
}

/// The run of this seed.
pub fn run(seed: u64, options: &Options, origin: Instant, trace: Option<Trace>) -> Run {
    let scenario = Scenario::new(seed, options);
    let mut world = World::new(&scenario, origin, trace);
    if let Some(handicap) = options.handicap {
        world.peers.iter_mut().for_each(|peer| peer.hinder(handicap));
    }
    world.go_online();
    world.search()
}

/// A pair on its way.
#[derive(Debug)]
struct Search {
    peers: (usize, usize),
    verdict: Verdict,
    /// When it is given up.
    end: Instant,
    selected_at: Option<Instant>,
    /// Of the data sent last.
    mark: u32,
    next_data: Option<Instant>,
    outcome: Option<Outcome>,
}

impl Search {
    fn new(peers: (usize, usize), verdict: Verdict, end: Instant) -> Self {
        Self { peers, verdict, end, selected_at: None, mark: 0, next_data: None, outcome: None }
    }

    fn is_open(&self, now: Instant) -> bool {
        self.outcome.is_none() && now < self.end
    }
}

struct World<'a> {
    scenario: &'a Scenario,
    origin: Instant,
    network: Network,
    server: Server,
    peers: Vec<Peer>,
}

impl<'a> World<'a> {
    fn new(scenario: &'a Scenario, origin: Instant, trace: Option<Trace>) -> Self {
        let mut network = Network::new(scenario.seed, origin);
        let log = Log::new(origin, trace);
        log.observe(&mut network);
        let host = network.add_server();
        let mut sites = Vec::new();
        for site in &scenario.sites {
            let id = match site.behind {
                None => network.add_site(&site.config()),
                Some(other) => network.add_site_behind(sites[other], &site.config()),
            };
            sites.push(id);
        }
        let server = Server::new(host, &mut network, scenario.seed);
        let address = SocketAddr::new(network.addresses(host)[0], SIGNALLING);
        let peers = scenario.peers.iter().zip(1..).map(|(at, number)| {
            let host = network.host(sites[at.site], at.host);
            let seed = scenario.seed.wrapping_mul(31).wrapping_add(number);
            let mut peer = Peer::new(number, host, address, seed, &mut network, origin + at.start);
            peer.skew = at.skew;
            peer.log = log.clone();
            peer
        });
        let peers = peers.collect();
        Self { scenario, origin, network, server, peers }
    }

    fn go_online(&mut self) {
        while self.network.now() < self.origin + ONLINE && !self.peers.iter().all(Peer::is_online) {
            self.advance(self.network.now() + LOOK);
        }
    }

    /// Every dial at its time, and what becomes of it.
    fn search(mut self) -> Run {
        let begun = self.network.now();
        let mut dials = self.scenario.dials.clone();
        dials.sort_by_key(|(.., at)| std::cmp::Reverse(*at));
        let mut searches = self.searches(begun);
        let registered = self.peers.iter().any(Peer::is_online);
        while registered && searches.iter().any(|search| search.is_open(self.network.now())) {
            let look = self.network.now() + LOOK;
            while let Some((from, to, at)) = dials.pop_if(|(.., at)| begun + *at <= look) {
                self.advance(begun + at);
                self.dial(from, to);
            }
            self.advance(look);
            for search in &mut searches {
                self.look(search);
            }
        }
        self.finish(searches)
    }

    /// Every two peers of which one dials the other.
    fn searches(&self, begun: Instant) -> Vec<Search> {
        let mut searches: Vec<Search> = Vec::new();
        for (from, to, at) in &self.scenario.dials {
            let peers = (*from.min(to), *from.max(to));
            let verdict = oracle::verdict(self.scenario, peers.0, peers.1);
            let vain = matches!(verdict, Verdict::Never | Verdict::NoSession);
            let end = begun + *at + if vain { VAIN_SEARCH } else { SEARCH };
            match searches.iter_mut().find(|search| search.peers == peers) {
                Some(search) => search.end = search.end.max(end),
                None => searches.push(Search::new(peers, verdict, end)),
            }
        }
        searches
    }

    fn dial(&mut self, from: usize, to: usize) {
        if self.peers[from].is_online() && self.peers[to].is_online() {
            let target = self.peers[to].id();
            let now = self.network.now();
            self.peers[from].dial(target, &mut self.network, now);
        }
    }

    /// Whether two peers have selected the same path.
    fn look(&mut self, search: &mut Search) {
        let now = self.network.now();
        if !search.is_open(now) {
            return;
        }
        let (one, other) = search.peers;
        let ids = [self.peers[one].id(), self.peers[other].id()];
        let sessions = [self.peers[one].session_with(ids[1]), self.peers[other].session_with(ids[0])];
        let [Some(here), Some(there)] = sessions else { return };
        let (Some((_, ours)), Some((_, theirs))) = (here.selected, there.selected) else {
            search.selected_at = None;
            return;
        };
        let since = here.since.min(there.since);
        let selected_at = *search.selected_at.get_or_insert(now);
        let relayed = here.relayed && there.relayed;
        let mark = search.mark;
        if relayed
            && self.peers[one].has_received(ids[1], mark)
            && self.peers[other].has_received(ids[0], mark)
        {
            let after = selected_at.saturating_duration_since(since);
            // An extra socket tells what it was opened for; both sides' ordinary ones have met by plain checks.
            let rung = ours.or(theirs).unwrap_or(Rung::Plain);
            search.outcome = Some(Outcome::Direct { rung, after });
        } else if search.next_data.is_none_or(|at| at <= now) {
            search.next_data = Some(now + DATA_INTERVAL);
            search.mark += 1;
            self.peers[one].send_data(ids[1], search.mark, &mut self.network);
            self.peers[other].send_data(ids[0], search.mark, &mut self.network);
        }
    }

    fn finish(mut self, searches: Vec<Search>) -> Run {
        let mut violations = std::mem::take(&mut self.server.violations);
        for peer in &mut self.peers {
            let number = peer.number;
            violations
                .extend(peer.violations.drain(..).map(|violation| format!("peer {number}: {violation}")));
        }
        let mut pairs = Vec::new();
        for search in searches {
            let (one, other) = search.peers;
            let [here, there] = [(one, other), (other, one)]
                .map(|(from, to)| self.peers[from].session_with(self.peers[to].id()));
            let outcome = search.outcome.unwrap_or_else(|| match (here, there) {
                (Some(here), Some(there)) => {
                    if !(here.relayed && there.relayed) {
                        violations.push("nothing came over the relay".into());
                    }
                    if here.selected.is_some() || there.selected.is_some() {
                        violations.push(format!(
                            "the two ends do not meet: {:?} and {:?}",
                            here.selected.map(|(selected, _)| selected.path),
                            there.selected.map(|(selected, _)| selected.path)
                        ));
                    }
                    Outcome::Relayed
                }
                (None, None) => Outcome::NoSession,
                _ => {
                    violations.push("only one side was introduced".into());
                    Outcome::NoSession
                }
            });
            let apart = here.zip(there).map_or(Duration::ZERO, |(here, there)| {
                here.since.max(there.since).saturating_duration_since(here.since.min(there.since))
            });
            let bound = oracle::bound(self.scenario, search.peers, apart);
            // Who is dialled within a round trip of coming online may be introduced before the server knows how its NAT maps: then nobody probes.
            let informed =
                here.zip(there).is_some_and(|(here, there)| here.knows_mapping && there.knows_mapping);
            let by_chance = search.verdict == Verdict::Chance && bound.is_some() && informed;
            pairs.push(Pair {
                peers: search.peers,
                verdict: search.verdict,
                outcome,
                apart,
                bound,
                chance: by_chance.then(|| oracle::birthday(self.scenario, search.peers)),
            });
        }
        Run { seed: self.scenario.seed, pairs, violations }
    }

    /// Lets everything happen until then.
    fn advance(&mut self, until: Instant) {
        loop {
            let wakes = self.peers.iter().filter_map(Peer::poll_timeout).chain(self.server.poll_timeout());
            let wake = wakes.min().map_or(until, |wake| wake.min(until));
            if let Some(arrival) = self.network.poll(wake) {
                let now = self.network.now();
                let What::Packet(packet) = &arrival.what else { continue };
                if arrival.host == self.server.host {
                    self.server.handle(packet, &mut self.network, now);
                } else if let Some(peer) = self.peers.iter_mut().find(|peer| peer.host == arrival.host) {
                    peer.handle(arrival.socket, packet, &mut self.network, now);
                }
                continue;
            }
            let now = self.network.now();
            for peer in &mut self.peers {
                if peer.poll_timeout().is_some_and(|at| at <= now) {
                    peer.handle_timeout(&mut self.network, now);
                }
            }
            if self.server.poll_timeout().is_some_and(|at| at <= now) {
                self.server.handle_timeout(&mut self.network, now);
            }
            if now >= until {
                return;
            }
        }
    }
}
