//! One remote endpoint: the agent that finds paths to it, the route in use, its sessions, its end.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use peer_agent::{Budget, Ladder, Output, Setup, SocketId};
use rand::Rng as _;
use rendezvous_wire::PeerId;
use rendezvous_wire::candidate::{Candidate, CandidateKind, Mapping};
use rendezvous_wire::message::{
    Introduction, IntroductionId, Meeting, MeetingNumber, Purpose, RegistrationId, Request, Role,
};
use rendezvous_wire::stun::{Received, TransactionId};

use crate::config;
use crate::explain::Explanation;
use crate::session::{PathNews, WeakSession};
use crate::socket::{Remote, Route, StunDatagram};

use super::convalescence::Convalescence;
use super::dial::Dial;
use super::extras::Extras;
use super::lanes::Lane;
use super::loss::{Counts, LossWatch};
use super::precedence::Precedence;
use super::relay_watch::RelayWatch;
use super::renewal::Renewal;
use super::standby::Wanting;
use super::width::Widths;
use super::{Driver, Key};

/// How long an introduction may stay without a session, at its beginning and after the last one: the other side may be dialling once
/// more over the path that it knows.
const UNUSED: Duration = Duration::from_secs(20);

/// Addresses that one remote may be known under at the same time; a peer that shows more is known under its latest.
const MAX_SOURCES: usize = 32;

/// Everything about one remote endpoint.
pub(super) struct RemoteState {
    pub(super) remote: Arc<Remote>,
    pub(super) peer: PeerId,
    /// Which of the processes that hold the peer's key; known from the introduction on.
    pub(super) instance: Option<u64>,
    pub(super) news: PathNews,
    pub(super) introduced_at: Option<Instant>,
    pub(super) introduction: Option<Introduced>,
    /// Relay channels besides the introduction's own.
    pub(super) spares: Vec<Lane>,
    /// The spare ones that are to be asked for, by server.
    pub(super) wanting: BTreeMap<usize, Wanting>,
    /// The channel in use, when it is not the introduction's own.
    pub(super) in_use: Option<(usize, IntroductionId)>,
    /// Whether that still carries.
    pub(super) relay_watch: RelayWatch,
    /// Which one counts.
    pub(super) precedence: Precedence,
    /// Whether it is to be made anew.
    pub(super) renewal: Renewal,
    pub(super) convalescence: Convalescence,
    pub(super) dials: Vec<Dial>,
    pub(super) sessions: Vec<WeakSession>,
    /// Where its QUIC comes from, the latest last.
    sources: VecDeque<SocketAddr>,
    pub(super) confirmed: bool,
    pub(super) selected: Option<peer_agent::Selected>,
    /// The sockets of its ladder.
    pub(super) extras: Extras,
    /// While it probes.
    loss: Option<LossWatch>,
    pub(super) widths: Widths,
    /// Grown by one with every kick.
    pub(super) kicks: u32,
    /// Until then it may be without a session.
    keep_until: Instant,
}

/// An introduction in force.
pub(super) struct Introduced {
    pub(super) lane: Lane,
    pub(super) role: Role,
    pub(super) ladder: Ladder,
    ufrag: String,
    /// How the other side's NAT maps, by its own measure.
    mapping: Mapping,
    /// The server has never seen it over UDP.
    unseen: bool,
}

impl RemoteState {
    pub(super) fn introduction_id(&self) -> Option<(usize, IntroductionId)> {
        self.introduction.as_ref().map(|introduced| introduced.lane.named())
    }

    /// Where its introduction can be made anew: the server, our registration there, and its number.
    pub(super) fn renewable(&self) -> Option<(usize, RegistrationId, IntroductionId)> {
        let lane =
            self.introduction.as_ref().map(|introduced| &introduced.lane).filter(|lane| !lane.closed)?;
        Some((lane.server, lane.registration, lane.id))
    }

    /// The registrations at `server` that this remote's relay channels hang on.
    pub(super) fn registrations(&self, server: usize) -> impl Iterator<Item = RegistrationId> {
        self.lanes().filter(move |lane| lane.server == server).map(|lane| lane.registration)
    }

    fn is_closed(&self) -> bool {
        self.introduction.as_ref().is_none_or(|introduced| introduced.lane.closed)
    }

    /// Whether there is a session on it and so a path to it.
    pub(super) fn is_live(&self) -> bool {
        !self.is_closed()
            && self.has_connections()
            && self.sessions.iter().any(|session| {
                session.connection().is_some_and(|connection| connection.close_reason().is_none())
            })
    }

    /// Every connection's congestion controller holds the epoch: with no other holder left there is no connection.
    pub(super) fn has_connections(&self) -> bool {
        Arc::strong_count(&self.remote.epoch) > 1
    }

    pub(super) fn owns(&self, transaction: TransactionId) -> bool {
        self.introduction.as_ref().is_some_and(|introduced| introduced.ladder.owns_transaction(transaction))
    }

    pub(super) fn handle_stun(&mut self, datagram: &StunDatagram, message: &Received<'_>, now: Instant) {
        if let Some(introduced) = &mut self.introduction {
            let socket = self.extras.id(datagram.socket);
            introduced.ladder.handle_message(socket, datagram.source, message, now);
        }
        self.watch_traffic(now);
    }

    /// Why its path is what it is.
    pub(super) fn explain(&self, local: Mapping) -> Option<Explanation> {
        let introduced = self.introduction.as_ref()?;
        Some(Explanation {
            local,
            remote: introduced.mapping,
            remote_unseen: introduced.unseen,
            pairs: introduced.ladder.report(),
            rungs: introduced.ladder.rungs(),
            rung: self.selected.map(|selected| introduced.ladder.rung(selected.path)),
            exhausted: self.news.is_exhausted(),
            ..Explanation::default()
        })
    }

    pub(super) fn next_wake(&self) -> Option<Instant> {
        let ladder = self.introduction.as_ref().and_then(|introduced| introduced.ladder.poll_timeout());
        let dials =
            self.dials.iter().map(|dial| dial.give_up_path.unwrap_or(dial.deadline).min(dial.deadline));
        let chain = ladder.into_iter().chain(dials);
        chain
            .chain(self.renewal.poll_timeout())
            .chain(self.spares_wake())
            .chain(self.relay_watch.poll_timeout())
            .chain(self.widths.next_wake())
            .chain(self.convalescence.poll_timeout())
            .min()
    }

    pub(super) fn handle_timeout(&mut self, budget: &mut Budget, now: Instant) {
        self.watch_traffic(now);
        if let Some(introduced) = &mut self.introduction {
            introduced.ladder.handle_timeout(budget, now);
        }
    }

    /// Breaks off birthday probing when the relay begins to lose.
    pub(super) fn watch_for_loss(&mut self, budget: &mut Budget, now: Instant) {
        let Some(introduced) = &mut self.introduction else { return };
        if !introduced.ladder.is_probing(now) {
            self.loss = None;
            return;
        }
        let connections = self.sessions.iter().filter_map(WeakSession::connection);
        let counts = connections.fold(Counts::default(), |counts, connection| {
            let path = connection.stats().path;
            Counts { sent: counts.sent + path.sent_packets, lost: counts.lost + path.lost_packets }
        });
        let watch = self.loss.get_or_insert_with(|| LossWatch::new(counts, now));
        if watch.has_begun(counts, now) {
            tracing::info!(peer = %self.peer.short(), "the relay loses: probing is broken off");
            introduced.ladder.handle_relay_loss(budget, now);
        }
    }

    /// Closes its sessions; the longest round trip among them.
    pub(super) fn close_sessions(&self) -> Option<Duration> {
        let connections = self.sessions.iter().filter_map(WeakSession::connection);
        let closed = connections.map(|connection| {
            connection.close(config::close::DONE.into(), b"");
            connection.rtt()
        });
        closed.max()
    }
}

impl Driver {
    /// A remote endpoint with a synthetic address of its own.
    pub(super) fn add_remote(&mut self, peer: PeerId, route: Route, now: Instant) -> Key {
        let remote = Arc::new(Remote::new(self.next_remote, route, now));
        let carried = remote.carried.clone();
        self.next_remote += 1;
        let key = remote.synthetic;
        self.socket.update(|table| {
            table.remotes.insert(key, remote.clone());
        });
        self.remotes.insert(
            key,
            RemoteState {
                remote,
                peer,
                instance: None,
                news: PathNews::new(self.events_tx.clone(), key, carried),
                introduced_at: None,
                introduction: None,
                spares: Vec::new(),
                wanting: BTreeMap::new(),
                in_use: None,
                relay_watch: RelayWatch::default(),
                precedence: Precedence::default(),
                renewal: Renewal::default(),
                convalescence: Convalescence::default(),
                dials: Vec::new(),
                sessions: Vec::new(),
                sources: VecDeque::new(),
                confirmed: false,
                selected: None,
                extras: Extras::default(),
                loss: None,
                widths: Widths::default(),
                kicks: 0,
                keep_until: now + UNUSED,
            },
        );
        key
    }

    /// Puts an introduction in force: the relay carries from now on, and checks begin.
    pub(super) fn introduce(&mut self, key: Key, server: usize, introduction: Introduction, now: Instant) {
        let Some(up) = self.servers.get(server).and_then(super::Server::up).cloned() else { return };
        let Some(state) = self.remotes.get_mut(&key) else { return };
        if introduction.purpose == Purpose::Spare {
            self.add_spare(key, server, &introduction, now);
            return;
        }
        if !state.precedence.admits(introduction.purpose, introduction.introduction) {
            // It is heard, and goes as soon as there is one too many.
            tracing::debug!(peer = %state.peer.short(), "another introduction counts");
            self.add_spare(key, server, &introduction, now);
            return;
        }
        let relay = up.way.relay();
        let agent = peer_agent::Config::new(
            introduction.role,
            introduction.local.clone(),
            introduction.remote.clone(),
            rand::rng().random(),
        );
        // What the server sees of a peer on UDP is offered for it, unless it is an address of its own: then its mapping is known.
        let reflexive = |candidate: &Candidate| candidate.kind == CandidateKind::ServerReflexive;
        let unseen =
            introduction.mapping == Mapping::Unknown && !introduction.candidates.iter().any(reflexive);
        let sockets = self.socket.local_addresses().iter().zip(0..);
        let setup = Setup {
            agent,
            sockets: sockets.map(|(local, index)| (SocketId(index), (*local).into())).collect(),
            local_candidates: self.local_candidates(),
            remote_candidates: introduction.candidates.clone(),
            local_mapping: self.mapping(),
            remote_mapping: introduction.mapping,
            reflectors: self.reflectors(),
        };
        let Ok(ladder) = Ladder::new(setup, now) else {
            tracing::warn!("the rendezvous server gave credentials that cannot be used");
            return;
        };
        let lane = Lane::new(&introduction, server, (up.registration, up.way.clone()));
        let former = self.end_introduction(key);
        let Some(state) = self.remotes.get_mut(&key) else { return };
        let ufrag = introduction.local.ufrag;
        self.ufrags.insert(ufrag.clone(), key);
        state.instance = Some(introduction.instance);
        let first = state.introduced_at.replace(now).is_none();
        state.keep_until = now + UNUSED;
        state.renewal.done();
        if first && introduction.mapping == Mapping::Unknown && !unseen {
            state.consider_again(now);
        }
        state.news.note(|milestones| {
            milestones.introduced.get_or_insert(now);
        });
        state.introduction = Some(Introduced {
            lane,
            role: introduction.role,
            ladder,
            ufrag,
            mapping: introduction.mapping,
            unseen,
        });
        state.in_use = None;
        let silent = state.relay_watch.is_silent();
        state.relay_watch.reset();
        self.socket.update(|table| {
            table.channels.insert((relay, introduction.channel), key);
        });
        let again = (server, introduction.introduction);
        let named_again = |lane: &Lane| lane.named() == again;
        state.spares.retain(|lane| !named_again(lane));
        let other = former.filter(|lane| !named_again(lane));
        tracing::debug!(peer = %state.peer.short(), mapping = %introduction.mapping, candidates = introduction.candidates.len(), "introduced");
        state.selected = None;
        if let Some(lane) = other {
            self.keep_lane(key, lane, now);
        }
        self.route_over_relay(key, now);
        if let Some(state) = self.remotes.get_mut(&key) {
            // The other side may have been away for long, and neither has had an answer to anything.
            if silent {
                state.remote.begin_anew(now);
            }
            state.kick();
            state.convalescence.begin(now);
            self.socket.flush(&state.remote);
        }
        self.pump(key, now);
    }

    /// Takes a remote's introduction out of force, if there is one. Its channel is still known.
    fn end_introduction(&mut self, key: Key) -> Option<Lane> {
        let state = self.remotes.get_mut(&key)?;
        let mut introduced = state.introduction.take()?;
        introduced.ladder.leave(&mut self.budget);
        // Routes through them have gone over to the new introduction's relay, or are of no more use.
        state.extras.clear(&self.socket);
        self.ufrags.remove(&introduced.ufrag);
        Some(introduced.lane)
    }

    /// Carries out what a remote's ladder wants.
    pub(super) fn pump(&mut self, key: Key, now: Instant) {
        loop {
            let Some(state) = self.remotes.get_mut(&key) else { return };
            let Some(introduced) = &mut state.introduction else { return };
            let Some(output) = introduced.ladder.poll_output() else { return };
            match output {
                Output::Open(id) => match state.extras.open(id, key, &self.knocked_tx) {
                    Ok(port) => introduced.ladder.handle_opened(id, port),
                    Err(error) => tracing::debug!(%error, "an extra socket cannot be opened"),
                },
                Output::Close(id) => state.extras.close(id, &self.socket),
                Output::Adopt(id) => state.extras.adopt(id, &self.socket),
                Output::Transmit(transmit) => match state.extras.index(transmit.path.socket) {
                    Some(socket) => self.socket.send_stun(socket, transmit.path.remote, &transmit.datagram),
                    None => state.extras.send(&transmit),
                },
                Output::Meet(doors) => {
                    tracing::debug!(peer = %state.peer.short(), doors = doors.len(), "ready to meet");
                    let (server, introduction) = introduced.lane.named();
                    self.request(server, Request::Meet(Meeting { introduction, doors }));
                }
                Output::Primed(number) => {
                    let (server, introduction) = introduced.lane.named();
                    self.request(server, Request::Primed(introduction, number));
                }
                Output::Event(event) => self.handle_agent_event(key, event, now),
                _ => {}
            }
        }
    }

    fn handle_agent_event(&mut self, key: Key, event: peer_agent::Event, now: Instant) {
        let Some(state) = self.remotes.get_mut(&key) else { return };
        match event {
            peer_agent::Event::SourceKnown(path) => self.add_source(path.remote, key),
            peer_agent::Event::Proven { path, rtt, remote_kind } => {
                tracing::debug!(peer = %state.peer.short(), remote = %path.remote, ?rtt, %remote_kind, "proven");
                state.news.note(|milestones| {
                    milestones.proven.get_or_insert(now);
                });
                self.add_source(path.remote, key);
            }
            peer_agent::Event::Selected(selected) => {
                state.news.set_exhausted(false);
                state.selected = Some(selected);
                self.route_directly(key, now);
            }
            peer_agent::Event::Deselected { path, reason } => {
                tracing::debug!(peer = %state.peer.short(), remote = %path.remote, ?reason, "direct path lost");
                state.selected = None;
                self.route_over_relay(key, now);
                self.mend(key, now);
            }
            peer_agent::Event::Doubtful { .. } => {
                self.ask_relay(key, now);
                self.route_both_ways(key, now);
            }
            peer_agent::Event::Trusted { .. } => self.route_directly(key, now),
            peer_agent::Event::Exhausted => {
                state.news.set_exhausted(true);
                tracing::debug!(peer = %state.peer.short(), "no direct path found; staying on the relay");
            }
            _ => {}
        }
    }

    /// The server brings the two sides of an introduction together.
    pub(super) fn met(&mut self, server: usize, number: MeetingNumber, meeting: &Meeting, now: Instant) {
        self.with_ladder((server, meeting.introduction), now, |ladder| {
            ladder.handle_doors(number, &meeting.doors, now);
        });
    }

    /// Both sides of a meeting are primed.
    pub(super) fn go(&mut self, introduction: (usize, IntroductionId), number: MeetingNumber, now: Instant) {
        self.with_ladder(introduction, now, |ladder| ladder.handle_go(number, now));
    }

    fn with_ladder(
        &mut self,
        introduction: (usize, IntroductionId),
        now: Instant,
        call: impl FnOnce(&mut Ladder),
    ) {
        let mut remotes = self.remotes.iter_mut();
        let Some((key, state)) = remotes.find(|(_, state)| state.introduction_id() == Some(introduction))
        else {
            return;
        };
        let key = *key;
        if let Some(introduced) = &mut state.introduction {
            call(&mut introduced.ladder);
            self.pump(key, now);
        }
    }

    /// QUIC from `source` belongs to this remote from now on.
    fn add_source(&mut self, source: SocketAddr, key: Key) {
        let Some(state) = self.remotes.get_mut(&key) else { return };
        let in_use = state.remote.route().direct();
        state.sources.retain(|known| *known != source);
        state.sources.push_back(source);
        let forgotten = if state.sources.len() > MAX_SOURCES {
            let oldest = state.sources.iter().position(|known| Some(*known) != in_use);
            oldest.and_then(|oldest| state.sources.remove(oldest))
        } else {
            None
        };
        self.socket.update(|table| {
            if let Some(forgotten) = forgotten
                && table.sources.get(&forgotten) == Some(&key)
            {
                table.sources.remove(&forgotten);
            }
            // A rendezvous server's address belongs to the server whatever a peer says.
            let owner = table.sources.entry(source).or_insert(key);
            if self.remotes.contains_key(owner) {
                *owner = key;
            }
        });
    }

    /// Removes remotes that nobody needs any more.
    pub(super) fn sweep(&mut self, now: Instant) {
        for key in self.remotes.keys().copied().collect::<Vec<_>>() {
            self.remove_if_over(key, now);
        }
    }

    /// Removes a remote without connections or dials, once it has had its time.
    pub(super) fn remove_if_over(&mut self, key: Key, now: Instant) {
        let Some(state) = self.remotes.get_mut(&key) else { return };
        state.sessions.retain(|session| session.connection().is_some());
        if state.has_connections() {
            state.keep_until = now + UNUSED;
            return;
        }
        let expected = state.introduction.is_some() && !state.is_closed() && now < state.keep_until;
        if !state.dials.is_empty() || expected {
            return;
        }
        tracing::debug!(peer = %state.peer.short(), "no session left");
        let mut lanes = std::mem::take(&mut state.spares);
        lanes.extend(self.end_introduction(key));
        for lane in &lanes {
            self.forget_lane(lane);
        }
        self.remotes.remove(&key);
        self.socket.update(|table| {
            table.remotes.remove(&key);
            table.sources.retain(|_, owner| *owner != key);
        });
    }
}
