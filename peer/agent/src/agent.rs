//! The agent: its state and its public face. What it does by time is in `schedule`, what it does with datagrams in
//! `inbound`, which path it takes in `choice`.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Instant;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rendezvous_wire::Candidate;
use rendezvous_wire::message::{Credentials, Role};
use rendezvous_wire::stun::{Check, Key, Received, StunError, TransactionId};

use crate::checklist::Checklist;
use crate::choice::Choice;
use crate::config::{Config, Timers};
use crate::event::{Event, Selected, Transmit};
use crate::pacing::Pacer;
use crate::path::{Family, Path, SocketId};
use crate::report::{PairReport, PairState};
use crate::rounds::Rounds;
use crate::transaction::{Transaction, Transactions};
use crate::volley::Volley;

/// Most datagrams that wait for [`Agent::poll_transmit`]; answers to more are dropped.
const MAX_QUEUED: usize = 256;

/// Finds, proves, chooses and watches the direct paths of one introduction.
#[derive(Debug)]
pub struct Agent {
    pub(crate) role: Role,
    pub(crate) tie_breaker: u64,
    local: Credentials,
    remote: Credentials,
    /// USERNAME of the checks that are for us.
    pub(crate) username: String,
    pub(crate) local_key: Key,
    pub(crate) remote_key: Key,
    pub(crate) timers: Timers,
    pub(crate) rng: StdRng,
    pub(crate) checklist: Checklist,
    pub(crate) transactions: Transactions,
    pub(crate) pacer: Pacer,
    pub(crate) rounds: Rounds,
    pub(crate) choice: Choice,
    volleys: u32,
    transmits: VecDeque<Transmit>,
    events: VecDeque<Event>,
}

impl Agent {
    /// An agent whose first round begins `now`. Call [`handle_timeout`](Self::handle_timeout) with the same `now`
    /// once the sockets and candidates that are known have been added: that sends the first checks.
    ///
    /// # Errors
    ///
    /// When STUN does not allow the credentials.
    pub fn new(config: Config, now: Instant) -> Result<Self, StunError> {
        let Config { role, local, remote, seed, timers } = config;
        let mut rng = StdRng::seed_from_u64(seed);
        let mut checklist = Checklist::default();
        checklist.set_role(role);
        let agent = Self {
            role,
            tie_breaker: rng.random(),
            username: format!("{}:{}", local.ufrag, remote.ufrag),
            local_key: Key::new(&local.password)?,
            remote_key: Key::new(&remote.password)?,
            checklist,
            transactions: Transactions::default(),
            pacer: Pacer::new(timers.ta, timers.burst, now),
            rounds: Rounds::new(&timers, [&local.ufrag, &remote.ufrag], now),
            choice: Choice::default(),
            volleys: 0,
            transmits: VecDeque::new(),
            events: VecDeque::new(),
            local,
            remote,
            timers,
            rng,
        };
        agent.encode(TransactionId([0; 12]), 1, false)?;
        Ok(agent)
    }

    /// Adds a socket. `local_candidates` are ours, those of another family being passed over; they give the priority
    /// of the base, tell a hairpin from a mapping elsewhere, and are no news when a check reveals them. Adding a
    /// known socket updates these.
    pub fn add_socket(
        &mut self,
        socket: SocketId,
        family: Family,
        local_candidates: &[Candidate],
        now: Instant,
    ) {
        if self.checklist.add_socket(socket, family, local_candidates) {
            self.start_new_pairs(now);
        }
    }

    /// Adds a socket that is for one meeting: it makes pairs with those alone whose checks come to it.
    pub(crate) fn add_reserved_socket(&mut self, socket: SocketId, family: Family) {
        self.checklist.add_reserved_socket(socket, family);
    }

    /// Forgets a socket and its pairs, unless it is the selected path's. True when it is gone.
    pub fn remove_socket(&mut self, socket: SocketId) -> bool {
        let unused = self.choice.path().is_none_or(|path| path.socket != socket);
        if unused {
            self.checklist.remove_socket(socket);
        }
        unused
    }

    /// The first socket of a family.
    pub(crate) fn socket_of(&self, family: Family) -> Option<SocketId> {
        self.checklist.socket_of(family)
    }

    /// Adds a candidate of the other side, at any time (RFC 8838), and checks it at once. Nothing happens when it is
    /// known or must not be probed ([`is_probeable`](rendezvous_wire::candidate::is_probeable)). When there are
    /// [`MAX_CANDIDATES`](rendezvous_wire::candidate::MAX_CANDIDATES) already, the oldest that is not proven goes.
    pub fn add_remote_candidate(&mut self, candidate: Candidate, now: Instant) {
        let keep = self.choice.path();
        self.checklist.add_named(candidate, keep);
        self.start_new_pairs(now);
    }

    /// Our username fragment: the first part of the USERNAME of every check that is for this agent.
    pub fn local_ufrag(&self) -> &str {
        &self.local.ufrag
    }

    /// Our present role.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Whether a response with this transaction id is for this agent.
    pub fn owns_transaction(&self, transaction: TransactionId) -> bool {
        self.transactions.get(transaction).is_some()
    }

    /// Takes a datagram. True when it was authentic and for this agent; all others are ignored without a trace.
    pub fn handle_datagram(
        &mut self,
        socket: SocketId,
        source: SocketAddr,
        datagram: &[u8],
        now: Instant,
    ) -> bool {
        Received::parse(datagram).is_ok_and(|message| self.handle_message(socket, source, &message, now))
    }

    /// Whether this is a request of the other side, as [`handle_message`](Self::handle_message) would take it.
    pub fn is_authentic(&self, message: &Received<'_>) -> bool {
        message.username() == Some(self.username.as_str()) && message.verify(&self.local_key)
    }

    /// A check that belongs to no pair, for addresses that are too many to be candidates ([`birthday`](crate::birthday)). Answers to it are ignored:
    /// what counts is the other side's own check.
    pub fn stray_check(&mut self) -> Option<Vec<u8>> {
        let transaction = TransactionId(self.rng.random());
        self.encode(transaction, rendezvous_wire::CandidateKind::PeerReflexive.priority(0), false).ok()
    }

    /// Does what is due at `now`.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.drive(now);
    }

    /// When to call [`handle_timeout`](Self::handle_timeout) next, and why. An instant that has passed means at once.
    pub fn poll_timeout(&self) -> Option<(Instant, &'static str)> {
        self.next_wake()
    }

    /// The next datagram to send. Drain it after every call of anything else.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.transmits.pop_front()
    }

    /// The next event. Drain it after every call of anything else.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// The path that data should use, if there is one.
    pub fn selected(&self) -> Option<Selected> {
        let pair = self.checklist.get(self.choice.path()?)?;
        Some(Selected { path: pair.path, rtt: pair.rtt?, remote_kind: pair.kind })
    }

    /// Every pair that was tried, best first.
    pub fn report(&self) -> Vec<PairReport> {
        let mut pairs: Vec<_> = self.checklist.pairs.iter().collect();
        pairs.sort_unstable_by_key(|pair| pair.order);
        let report = |pair: &crate::checklist::Pair| PairReport {
            path: pair.path,
            remote_kind: pair.kind,
            priority: self.checklist.priority(pair),
            state: pair.state,
            selected: self.choice.path() == Some(pair.path),
            checks_sent: pair.sent,
            checks_answered: pair.answered,
            checks_received: pair.requests,
            rtt: pair.rtt,
            mapped: pair.mapped,
            error: pair.error,
        };
        pairs.into_iter().map(report).collect()
    }

    /// Tries all pairs again, at once: for a change of network. The selected path stays selected, but has to show
    /// within one volley that it is alive, and after three unanswered checks makes way for any path that is.
    pub fn restart(&mut self, now: Instant) {
        tracing::debug!("checks begin anew");
        self.rounds.succeeded();
        self.begin_round(now);
        self.suspect(now);
    }

    pub(crate) fn emit(&mut self, event: Event) {
        self.events.push_back(event);
    }

    pub(crate) fn transmit(&mut self, path: Path, datagram: Vec<u8>) {
        if self.transmits.len() < MAX_QUEUED {
            tracing::trace!(%path, bytes = datagram.len(), "send");
            self.transmits.push_back(Transmit { path, datagram, ttl: None });
        }
    }

    pub(crate) fn new_volley(&mut self, urgent: bool, now: Instant) -> Volley {
        self.volleys = self.volleys.wrapping_add(1);
        Volley::new(self.volleys, urgent, now)
    }

    /// Gives a volley to every pair that has had none.
    pub(crate) fn start_new_pairs(&mut self, now: Instant) {
        for index in 0..self.checklist.pairs.len() {
            let pair = &self.checklist.pairs[index];
            if pair.state == PairState::Waiting && pair.volley.is_none() {
                self.checklist.pairs[index].volley = Some(self.new_volley(false, now));
            }
        }
    }

    /// Sends one check on a pair, outside of its volley or (with `volley`) as part of it.
    pub(crate) fn send_check(&mut self, index: usize, volley: Option<u32>, now: Instant) {
        let path = self.checklist.pairs[index].path;
        let transaction = TransactionId(self.rng.random());
        let priority = self.checklist.peer_reflexive_priority(path.socket);
        let nominates = self.nominates(path);
        // The credentials were tried at the start.
        let Ok(datagram) = self.encode(transaction, priority, nominates) else { return };
        self.checklist.pairs[index].sent += 1;
        let expires = now + self.timers.volley();
        let volley = volley.unwrap_or(0);
        let open = Transaction { path, sent: now, role: self.role, nominates, volley, expires };
        self.transactions.insert(transaction, open);
        self.pacer.spend(now);
        self.transmit(path, datagram);
    }

    fn encode(
        &self,
        transaction: TransactionId,
        priority: u32,
        use_candidate: bool,
    ) -> Result<Vec<u8>, StunError> {
        let check = Check {
            transaction,
            remote_ufrag: &self.remote.ufrag,
            local_ufrag: &self.local.ufrag,
            key: &self.remote_key,
            priority,
            role: self.role,
            tie_breaker: self.tie_breaker,
            use_candidate,
        };
        check.encode()
    }
}
