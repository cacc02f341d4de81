//! The agent itself.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use rendezvous_wire::candidate::{Candidate, CandidateKind, is_probeable};
use rendezvous_wire::message::{Credentials, Role};
use rendezvous_wire::stun::{self, Check, Class, Key, Received, StunError, TransactionId, error_code};

use crate::consent::Consent;
use crate::pair::{Outstanding, Pair};
use crate::report::{PairReport, PairState};
use crate::selection::is_better;
use crate::timers::{MAX_PAIRS, ROUND_PAUSE, ROUND_PAUSE_MAX, SETTLE, TA, TA_DEPTH};

/// One of the owner's sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SocketId(pub u32);

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl From<SocketAddr> for Family {
    fn from(address: SocketAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// A candidate pair by what identifies it here: the socket that sends and the address it sends to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Path {
    /// Our side.
    pub socket: SocketId,
    /// The other side.
    pub remote: SocketAddr,
}

/// What an agent needs to begin.
#[derive(Debug, Clone)]
pub struct Config {
    /// Ours. A conflict is resolved by tie-breakers (RFC 8445, 7.3.1.1).
    pub role: Role,
    /// Credentials of checks that we receive.
    pub local: Credentials,
    /// Credentials of checks that we send.
    pub remote: Credentials,
    /// Of all randomness: transaction ids, the tie-breaker, jitter.
    pub seed: u64,
}

impl Config {
    /// A configuration of these parts.
    pub fn new(role: Role, local: Credentials, remote: Credentials, seed: u64) -> Self {
        Self { role, local, remote, seed }
    }
}

/// A datagram to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transmit {
    /// From where to where.
    pub path: Path,
    /// Its bytes.
    pub datagram: Vec<u8>,
}

/// A path that carries data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Selected {
    /// The path.
    pub path: Path,
    /// Round-trip time of the latest answered check.
    pub rtt: Duration,
    /// How the remote address was learnt.
    pub remote_kind: CandidateKind,
}

/// Why a path no longer carries data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Deselection {
    /// No consent check was answered for 30 s (RFC 7675, 5.1).
    ConsentExpired,
}

/// What the owner must know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// An authentic check came from here: traffic from this address belongs to this session.
    SourceKnown(Path),
    /// A check of ours was answered for the first time on this path: proven in both directions.
    Proven {
        /// The path.
        path: Path,
        /// The check's round-trip time.
        rtt: Duration,
        /// How the remote address was learnt.
        remote_kind: CandidateKind,
    },
    /// Data is to use this path from now on.
    Selected(Selected),
    /// Data is to leave this path, for the relay.
    Deselected {
        /// The path.
        path: Path,
        /// Why.
        reason: Deselection,
    },
    /// A round of checks has ended with no path. Another follows after a pause.
    Exhausted,
}

#[derive(Debug)]
struct Socket {
    id: SocketId,
    family: Family,
    /// Priority of the best candidate with this base.
    priority: u32,
}

/// The path that carries data, and consent to use it.
#[derive(Debug)]
struct InUse {
    pair: usize,
    consent: Consent,
    /// Until then other pairs are tried for a better one.
    settles: Option<Instant>,
}

/// Connectivity establishment for one introduction. See the [crate's page](crate).
#[derive(Debug)]
pub struct Agent {
    role: Role,
    tie_breaker: u64,
    local: Credentials,
    local_key: Key,
    remote: Credentials,
    remote_key: Key,
    random: StdRng,
    sockets: Vec<Socket>,
    remotes: Vec<Candidate>,
    pairs: Vec<Pair>,
    in_use: Option<InUse>,
    /// Tokens of the pacing bucket at `paced_at`, in units of Ta.
    tokens: f64,
    paced_at: Instant,
    /// When the next round begins, after one without success.
    next_round: Option<Instant>,
    pause: Duration,
    transmits: VecDeque<Transmit>,
    events: VecDeque<Event>,
}

impl Agent {
    /// An agent with no sockets and no candidates yet.
    ///
    /// # Errors
    ///
    /// [`StunError::Credential`] when a password is not one that STUN allows.
    pub fn new(config: Config, now: Instant) -> Result<Self, StunError> {
        let mut random = StdRng::seed_from_u64(config.seed);
        Ok(Self {
            role: config.role,
            tie_breaker: random.random(),
            local_key: Key::new(&config.local.password)?,
            remote_key: Key::new(&config.remote.password)?,
            local: config.local,
            remote: config.remote,
            random,
            sockets: Vec::new(),
            remotes: Vec::new(),
            pairs: Vec::new(),
            in_use: None,
            tokens: f64::from(TA_DEPTH),
            paced_at: now,
            next_round: None,
            pause: ROUND_PAUSE,
            transmits: VecDeque::new(),
            events: VecDeque::new(),
        })
    }

    /// Adds a socket. Of `candidates`, the local ones of its family give its pairs their priority.
    pub fn add_socket(&mut self, id: SocketId, family: Family, candidates: &[Candidate], now: Instant) {
        if self.sockets.iter().any(|socket| socket.id == id) {
            return;
        }
        let own = candidates.iter().filter(|candidate| Family::from(candidate.address) == family);
        let priority = own.map(|candidate| candidate.priority).max();
        let priority = priority.unwrap_or(CandidateKind::Host.priority(0));
        self.sockets.push(Socket { id, family, priority });
        for candidate in self.remotes.clone() {
            self.pair_up(id, family, priority, candidate, now);
        }
    }

    /// Adds a candidate of the other side; at any time (RFC 8838).
    pub fn add_remote_candidate(&mut self, candidate: Candidate, now: Instant) {
        let known = self.remotes.iter().any(|known| known.address == candidate.address);
        if known || self.remotes.len() >= MAX_PAIRS || !is_probeable(candidate.address) {
            return;
        }
        self.remotes.push(candidate);
        let sockets: Vec<_> =
            self.sockets.iter().map(|socket| (socket.id, socket.family, socket.priority)).collect();
        for (id, family, priority) in sockets {
            self.pair_up(id, family, priority, candidate, now);
        }
    }

    fn pair_up(&mut self, socket: SocketId, family: Family, local: u32, candidate: Candidate, now: Instant) {
        let path = Path { socket, remote: candidate.address };
        let known = self.pairs.iter().any(|pair| pair.path == path);
        if family != candidate.address.into() || known || self.pairs.len() >= MAX_PAIRS {
            return;
        }
        // What a peer-reflexive candidate with this base would have (RFC 8445, 7.1.1).
        let check_priority = CandidateKind::PeerReflexive.type_preference() << 24 | (local & 0x00ff_ffff);
        let mut pair = Pair::new(path, candidate.kind, check_priority, now);
        pair.prioritise(self.role, local, candidate.priority);
        self.pairs.push(pair);
        self.next_round = None;
    }

    /// The username fragment by which checks name this agent.
    pub fn local_ufrag(&self) -> &str {
        &self.local.ufrag
    }

    /// Whether a response with this transaction answers one of our checks.
    pub fn owns_transaction(&self, transaction: TransactionId) -> bool {
        let mut checks = self.pairs.iter().flat_map(|pair| &pair.outstanding);
        checks.any(|check| check.transaction == transaction)
    }

    /// Takes a STUN message that came to `socket` from `source`. False when it is not for this agent or not authentic; then nothing has
    /// changed.
    pub fn handle_message(
        &mut self,
        socket: SocketId,
        source: SocketAddr,
        message: &Received<'_>,
        now: Instant,
    ) -> bool {
        let path = Path { socket, remote: source };
        let handled = match message.class() {
            Class::Request => self.handle_request(path, message, now),
            Class::Success | Class::Error => self.handle_response(path, message, now),
            Class::Indication => false,
        };
        if handled {
            self.send_due(now);
        }
        handled
    }

    fn handle_request(&mut self, path: Path, message: &Received<'_>, now: Instant) -> bool {
        let names_us = message.username().and_then(stun::split_username)
            == Some((self.local.ufrag.as_str(), self.remote.ufrag.as_str()));
        if !names_us || !message.verify(&self.local_key) {
            return false;
        }
        let transaction = message.transaction();
        let unknown = message.unknown_required();
        if !unknown.is_empty() {
            self.refuse(path, transaction, error_code::UNKNOWN_ATTRIBUTE, &unknown);
            return true;
        }
        let (Some((role, tie_breaker)), Some(priority)) = (message.role(), message.priority()) else {
            self.refuse(path, transaction, error_code::BAD_REQUEST, &[]);
            return true;
        };
        if role == self.role {
            // RFC 8445, 7.3.1.1: the greater tie-breaker controls.
            let ours_controls = self.tie_breaker >= tie_breaker;
            if ours_controls == (self.role == Role::Controlling) {
                self.refuse(path, transaction, error_code::ROLE_CONFLICT, &[]);
                return true;
            }
            self.switch_role();
        }
        let Some(index) = self.pair_of_check(path, priority, now) else { return false };
        if let Ok(datagram) = stun::binding_success(transaction, path.remote, Some(&self.local_key)) {
            self.transmits.push_back(Transmit { path, datagram });
        }
        let pair = &mut self.pairs[index];
        if !pair.heard_from {
            pair.heard_from = true;
            self.events.push_back(Event::SourceKnown(path));
        }
        let nominated = self.role == Role::Controlled && message.use_candidate();
        let pair = &mut self.pairs[index];
        pair.nominated |= nominated;
        if pair.state == PairState::Succeeded {
            if nominated {
                self.select(index, now);
            }
        } else if nominated || self.in_use.is_none() || pair.state == PairState::Waiting {
            pair.trigger(now);
        }
        true
    }

    /// The pair that a check came on; a new one with a peer-reflexive candidate where it is unknown (RFC 8445, 7.3.1.3).
    fn pair_of_check(&mut self, path: Path, priority: u32, now: Instant) -> Option<usize> {
        let find = |pairs: &[Pair]| pairs.iter().position(|pair| pair.path == path);
        if let Some(index) = find(&self.pairs) {
            return Some(index);
        }
        let socket = self.sockets.iter().find(|socket| socket.id == path.socket)?;
        let (family, local) = (socket.family, socket.priority);
        if !is_probeable(path.remote) {
            return None;
        }
        let candidate = Candidate { kind: CandidateKind::PeerReflexive, address: path.remote, priority };
        self.pair_up(path.socket, family, local, candidate, now);
        find(&self.pairs)
    }

    fn refuse(&mut self, path: Path, transaction: TransactionId, code: u16, unknown: &[u16]) {
        if let Ok(datagram) = stun::binding_error(transaction, code, unknown, Some(&self.local_key)) {
            self.transmits.push_back(Transmit { path, datagram });
        }
    }

    fn switch_role(&mut self) {
        self.role = self.role.opposite();
        for pair in &mut self.pairs {
            pair.nominating = false;
            let socket = self.sockets.iter().find(|socket| socket.id == pair.path.socket);
            let remote = self.remotes.iter().find(|candidate| candidate.address == pair.path.remote);
            if let (Some(socket), Some(remote)) = (socket, remote) {
                pair.prioritise(self.role, socket.priority, remote.priority);
            }
        }
    }

    fn handle_response(&mut self, path: Path, message: &Received<'_>, now: Instant) -> bool {
        let transaction = message.transaction();
        let asked = self.pairs.iter().enumerate().find_map(|(index, pair)| {
            let check = pair.outstanding.iter().find(|check| check.transaction == transaction)?;
            Some((index, *check))
        });
        let Some((index, check)) = asked else { return false };
        if !message.verify(&self.remote_key) {
            return false;
        }
        let pair = &mut self.pairs[index];
        pair.outstanding.retain(|other| other.transaction != transaction);
        if pair.path != path {
            // RFC 8445, 7.2.5.2.1: the addresses must be symmetric.
            if pair.state != PairState::Succeeded {
                pair.stop(PairState::Failed);
            }
            return true;
        }
        if message.class() == Class::Error {
            self.check_refused(index, message.error_code(), now);
            return true;
        }
        let rtt = now.saturating_duration_since(check.sent);
        let first = pair.state != PairState::Succeeded;
        pair.rtt = Some(rtt);
        pair.mapped = message.mapped_address();
        pair.stop(PairState::Succeeded);
        if check.nominating {
            pair.nominating = false;
        } else if pair.nominating {
            // An older, plain check was answered; the nomination is still to come.
            pair.begin(now);
        }
        let (remote_kind, nominated) = (pair.remote_kind, pair.nominated);
        if first {
            self.events.push_back(Event::Proven { path, rtt, remote_kind });
        }
        if let Some(in_use) = self.in_use.as_mut().filter(|in_use| in_use.pair == index) {
            in_use.consent.answered(now);
        }
        self.next_round = None;
        match self.role {
            Role::Controlling if first => self.consider(index, now),
            Role::Controlled if nominated => self.select(index, now),
            _ => {}
        }
        true
    }

    fn check_refused(&mut self, index: usize, code: Option<u16>, now: Instant) {
        if code == Some(error_code::ROLE_CONFLICT) {
            // RFC 8445, 7.2.5.1: change roles and ask again.
            self.switch_role();
            self.pairs[index].trigger(now);
        } else if self.pairs[index].state != PairState::Succeeded {
            self.pairs[index].stop(PairState::Failed);
        }
    }

    /// Controlling: a pair has become valid.
    fn consider(&mut self, index: usize, now: Instant) {
        let better = match &self.in_use {
            None => true,
            Some(in_use) => is_better(self.pairs[index].merit(), self.pairs[in_use.pair].merit()),
        };
        if better {
            let pair = &mut self.pairs[index];
            pair.nominating = true;
            pair.begin(now);
            self.select(index, now);
        }
    }

    fn select(&mut self, index: usize, now: Instant) {
        if self.in_use.as_ref().is_some_and(|in_use| in_use.pair == index) {
            return;
        }
        let settles = match &self.in_use {
            None => Some(now + SETTLE),
            Some(in_use) => in_use.settles,
        };
        self.in_use = Some(InUse { pair: index, consent: Consent::new(now, &mut self.random), settles });
        self.pause = ROUND_PAUSE;
        // Nominations of the other side that came before this one are history.
        for (_, pair) in self.pairs.iter_mut().enumerate().filter(|(other, _)| *other != index) {
            pair.nominated = false;
            if std::mem::take(&mut pair.nominating) {
                pair.due = None;
            }
        }
        let selected = self.pairs.get(index).and_then(Self::selected_pair);
        self.events.extend(selected.map(Event::Selected));
    }

    fn selected_pair(pair: &Pair) -> Option<Selected> {
        Some(Selected { path: pair.path, rtt: pair.rtt?, remote_kind: pair.remote_kind })
    }

    /// The path that carries data.
    pub fn selected(&self) -> Option<Selected> {
        self.pairs.get(self.in_use.as_ref()?.pair).and_then(Self::selected_pair)
    }

    /// Our present role.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Tries all pairs again at once, as after a change of network. The selected path stays until it is lost or a better one
    /// is found.
    pub fn restart(&mut self, now: Instant) {
        self.pause = ROUND_PAUSE;
        self.begin_round(now);
    }

    fn begin_round(&mut self, now: Instant) {
        self.next_round = None;
        let in_use = self.in_use.as_ref().map(|in_use| in_use.pair);
        for (index, pair) in self.pairs.iter_mut().enumerate() {
            if Some(index) != in_use {
                pair.state = PairState::Waiting;
                pair.begin(now);
            }
        }
        if let Some(in_use) = &mut self.in_use {
            in_use.settles = Some(now + SETTLE);
        }
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.watch_consent(now);
        if let Some(in_use) = &mut self.in_use
            && in_use.settles.is_some_and(|settles| settles <= now)
        {
            in_use.settles = None;
            let selected = in_use.pair;
            for (_, pair) in self.pairs.iter_mut().enumerate().filter(|(index, _)| *index != selected) {
                if matches!(pair.state, PairState::Waiting | PairState::InProgress) {
                    pair.stop(PairState::Abandoned);
                }
            }
        }
        if self.next_round.is_some_and(|next| next <= now) {
            self.begin_round(now);
        }
        self.send_due(now);
    }

    fn watch_consent(&mut self, now: Instant) {
        let Some(in_use) = &mut self.in_use else { return };
        let index = in_use.pair;
        if in_use.consent.expires() <= now {
            self.in_use = None;
            let path = self.pairs[index].path;
            self.events.push_back(Event::Deselected { path, reason: Deselection::ConsentExpired });
            self.restart(now);
        } else if in_use.consent.next_check <= now {
            in_use.consent.checked(now, &mut self.random);
            // Repeats the nomination, should the first have been lost.
            let check = self.send_check(index, self.role == Role::Controlling, now);
            self.pairs[index].note(check);
        }
    }

    /// Sends the checks that are due, as far as pacing lets it: triggered ones first (RFC 8445, 6.1.4.2), then by priority.
    fn send_due(&mut self, now: Instant) {
        self.refill(now);
        loop {
            let due =
                self.pairs.iter().enumerate().filter(|(_, pair)| pair.due.is_some_and(|due| due <= now));
            let Some((index, _)) =
                due.max_by_key(|(_, pair)| (pair.triggered, pair.nominating, pair.priority))
            else {
                break;
            };
            if self.tokens < 1.0 {
                return;
            }
            if !self.pairs[index].attempt() {
                self.pair_failed(index, now);
                continue;
            }
            self.tokens -= 1.0;
            let check = self.send_check(index, self.pairs[index].nominating, now);
            self.pairs[index].sent(check);
        }
        self.end_round(now);
    }

    /// A round of checks on one pair went unanswered.
    fn pair_failed(&mut self, index: usize, now: Instant) {
        let pair = &mut self.pairs[index];
        if pair.nominating {
            // Proven once, but not a single nomination came through: left to consent, which repeats it.
            pair.nominating = false;
            pair.stop(PairState::Succeeded);
            if let Some(in_use) = &mut self.in_use {
                in_use.consent.next_check = now;
            }
        }
    }

    fn end_round(&mut self, now: Instant) {
        let over = self.in_use.is_none()
            && self.next_round.is_none()
            && !self.pairs.is_empty()
            && self.pairs.iter().all(|pair| pair.due.is_none());
        if over {
            self.events.push_back(Event::Exhausted);
            self.next_round = Some(now + self.pause.mul_f64(self.random.random_range(0.8..1.2)));
            self.pause = (self.pause * 2).min(ROUND_PAUSE_MAX);
        }
    }

    fn send_check(&mut self, index: usize, nominating: bool, now: Instant) -> Outstanding {
        let transaction = TransactionId(self.random.random());
        let pair = &self.pairs[index];
        let check = Check {
            transaction,
            remote_ufrag: &self.remote.ufrag,
            local_ufrag: &self.local.ufrag,
            key: &self.remote_key,
            priority: pair.check_priority,
            role: self.role,
            tie_breaker: self.tie_breaker,
            use_candidate: nominating,
        };
        if let Ok(datagram) = check.encode() {
            self.transmits.push_back(Transmit { path: pair.path, datagram });
        }
        Outstanding { transaction, sent: now, nominating }
    }

    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.paced_at).as_secs_f64() / TA.as_secs_f64();
        self.tokens = (self.tokens + passed).min(f64::from(TA_DEPTH));
        self.paced_at = now.max(self.paced_at);
    }

    /// When [`handle_timeout`](Self::handle_timeout) must be called next, and what for.
    pub fn poll_timeout(&self) -> Option<(Instant, &'static str)> {
        let check = self.pairs.iter().filter_map(|pair| pair.due).min().map(|due| {
            // A token must be there as well.
            let missing = (1.0 - self.tokens).max(0.0);
            let paced = self.paced_at + TA.mul_f64(missing) + Duration::from_nanos(u64::from(missing > 0.0));
            if missing > 0.0 { (due.max(paced), "pacing") } else { (due, "check") }
        });
        let in_use = self.in_use.as_ref();
        let consent =
            in_use.map(|in_use| (in_use.consent.next_check.min(in_use.consent.expires()), "consent"));
        let settles = in_use.and_then(|in_use| in_use.settles).map(|settles| (settles, "settle"));
        let round = self.next_round.map(|next| (next, "next round"));
        [check, consent, settles, round].into_iter().flatten().min_by_key(|(wake, _)| *wake)
    }

    /// The next datagram to send.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.transmits.pop_front()
    }

    /// The next thing to know.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Every pair, and what came of it.
    pub fn report(&self) -> Vec<PairReport> {
        let selected = self.in_use.as_ref().map(|in_use| in_use.pair);
        let report = |(index, pair): (usize, &Pair)| PairReport {
            path: pair.path,
            remote_kind: pair.remote_kind,
            state: pair.state,
            checks_sent: pair.checks_sent,
            heard_from: pair.heard_from,
            rtt: pair.rtt,
            mapped: pair.mapped,
            selected: selected == Some(index),
        };
        self.pairs.iter().enumerate().map(report).collect()
    }
}
