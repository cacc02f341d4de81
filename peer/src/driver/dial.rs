//! Sessions in the making: asking for an introduction with the first flight, being introduced, both sides dialling at
//! once.

use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn::{Connection, ConnectionError};
use rendezvous_wire::PeerId;
use rendezvous_wire::message::{
    Introduce, Introduction, IntroductionId, NotIntroduced, Purpose, Request, RequestId,
};
use tokio::sync::oneshot;

use crate::config;
use crate::endpoint::ConnectError;
use crate::link::is_wrong_key;
use crate::session::Session;
use crate::signalling::ServerError;
use crate::socket::Route;

use super::remote::RemoteState;
use super::server::State;
use super::{AbortOnDrop, Driver, Event, Key};

/// How long a dial may take from its beginning to a session.
const DIAL_TIMEOUT: Duration = Duration::from_secs(15);

/// How long a dial over a path that is already there may take before a new introduction is asked for: the other side may have been started
/// anew without our having noticed.
const KNOWN_PATH_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a fresh connection is asked whether its handshake is confirmed, for want of an event that says so.
const CONFIRMATION_POLL: Duration = Duration::from_millis(1);

type Reply = oneshot::Sender<Result<Session, ConnectError>>;

/// A dial that no server has been free for yet.
pub(super) struct Waiting {
    target: PeerId,
    reply: Reply,
    pub(super) deadline: Instant,
}

/// A dial on its way.
pub(super) struct Dial {
    /// Tells its handshake's end from those of other dials.
    number: u64,
    reply: Reply,
    pub(super) started: Instant,
    pub(super) deadline: Instant,
    /// When to ask for a new introduction rather than wait for the known path.
    pub(super) give_up_path: Option<Instant>,
    stage: Stage,
    /// Repeated to the next server when one does not know the target.
    first_flight: Vec<Vec<u8>>,
    /// The handshake that we began; aborted when the other side's is to win.
    handshake: Option<AbortOnDrop>,
}

/// How far a dial has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// quinn has not yet produced the first flight.
    Begun,
    /// An introduction was asked for, at this server.
    Asked { server: usize, request: RequestId },
    /// The introduction is here; the handshake runs.
    Introduced,
    /// The other side dialled too, and its handshake is the one that counts.
    Yielded,
}

impl Stage {
    fn missing(self) -> &'static str {
        match self {
            Self::Begun => "the dial did not begin",
            Self::Asked { .. } => "the rendezvous server made no introduction",
            Self::Introduced | Self::Yielded => {
                "it was introduced, but nothing came back. Has it just gone, or does a network block UDP?"
            }
        }
    }
}

impl Driver {
    pub(super) fn connect(&mut self, target: PeerId, reply: Reply, now: Instant) {
        if target == self.identity.id() {
            let _ = reply.send(Err(ConnectError::Refused(NotIntroduced::Oneself)));
            return;
        }
        let known = |state: &RemoteState| state.is_live() || state.is_dialling_anew();
        let on_its_way = self.remotes.iter().find(|(_, state)| state.peer == target && known(state));
        if let Some((key, _)) = on_its_way {
            // There is a path, or there will be one: no introduction is needed.
            let key = *key;
            self.begin_handshake(key, reply, Stage::Introduced, (now, now));
        } else if self.servers.iter().any(|server| server.up().is_some()) {
            self.dial_anew(target, reply, (now, now));
        } else if let Some(error) = self.all_down() {
            let _ = reply.send(Err(error.into()));
        } else {
            self.waiting.push(Waiting { target, reply, deadline: now + DIAL_TIMEOUT });
        }
    }

    fn all_down(&self) -> Option<ServerError> {
        let mut error = None;
        for server in &self.servers {
            match &server.state {
                State::Down(cause) => error = Some(cause.clone()),
                State::Up(_) | State::Connecting => return None,
            }
        }
        error
    }

    pub(super) fn start_waiting(&mut self, now: Instant) {
        for waiting in std::mem::take(&mut self.waiting) {
            self.connect(waiting.target, waiting.reply, now);
        }
    }

    pub(super) fn fail_waiting(&mut self, error: &ServerError) {
        for waiting in self.waiting.drain(..) {
            let _ = waiting.reply.send(Err(error.clone().into()));
        }
    }

    pub(super) fn expire_waiting(&mut self, now: Instant) {
        let (late, still) =
            std::mem::take(&mut self.waiting).into_iter().partition(|waiting| waiting.deadline <= now);
        self.waiting = still;
        let late: Vec<Waiting> = late;
        for waiting in late {
            let stage = "no rendezvous server has answered yet";
            let error = ConnectError::TimedOut { peer: waiting.target, stage, limit: DIAL_TIMEOUT };
            let _ = waiting.reply.send(Err(error));
        }
    }

    fn dial_anew(&mut self, target: PeerId, reply: Reply, (started, now): (Instant, Instant)) {
        let key = self.add_remote(target, Route::Capture, now);
        self.begin_handshake(key, reply, Stage::Begun, (started, now));
    }

    fn begin_handshake(&mut self, key: Key, reply: Reply, stage: Stage, (started, now): (Instant, Instant)) {
        let Some(state) = self.remotes.get_mut(&key) else { return };
        let config = match config::client(&self.identity, state.peer, &self.alpn, &state.remote) {
            Ok(config) => config,
            Err(error) => {
                tracing::error!(%error, "no session can be configured");
                let _ = reply.send(Err(ConnectError::Closed));
                return;
            }
        };
        let connecting = match self.quinn.connect_with(config, key, "peer") {
            Ok(connecting) => connecting,
            Err(error) => {
                tracing::debug!(%error, "no connection can be begun");
                let _ = reply.send(Err(ConnectError::Closed));
                return;
            }
        };
        let events = self.events_tx.clone();
        let number = self.next_dial;
        self.next_dial += 1;
        let handshake = tokio::spawn(async move {
            let result = connecting.await;
            let _ = events.send(Event::Dialled { key, dial: number, result }).await;
        });
        state.dials.push(Dial {
            number,
            reply,
            started,
            deadline: started + DIAL_TIMEOUT,
            give_up_path: (stage == Stage::Introduced).then_some(now + KNOWN_PATH_TIMEOUT),
            stage,
            first_flight: Vec::new(),
            handshake: Some(AbortOnDrop(handshake)),
        });
    }

    /// quinn has produced a first flight: ask for the introduction that carries it.
    pub(super) fn flight_captured(&mut self, key: Key, _now: Instant) {
        let Some(state) = self.remotes.get_mut(&key) else { return };
        // What is captured later waits for the introduction.
        if let Some(dial) = state.dials.first_mut().filter(|dial| dial.stage == Stage::Begun) {
            dial.first_flight = state.remote.take_captured();
            self.ask(key, 0);
        }
    }

    /// Asks the first server from `from` on that is up.
    fn ask(&mut self, key: Key, from: usize) -> bool {
        let Some(state) = self.remotes.get_mut(&key) else { return false };
        let Some(dial) = state.dials.first_mut() else { return false };
        let servers = self.servers.iter().enumerate().skip(from).filter(|(_, server)| server.up().is_some());
        // One that does not answer at present is asked when no other is left.
        let (doubtful, sound): (Vec<_>, Vec<_>) = servers.partition(|(_, server)| server.is_doubtful());
        for (index, server) in sound.into_iter().chain(doubtful) {
            let request = RequestId(self.next_request);
            self.next_request += 1;
            let introduce = Introduce {
                request,
                target: state.peer,
                purpose: Purpose::Session,
                first_flight: dial.first_flight.clone(),
            };
            if server.request(Request::Introduce(introduce)) {
                dial.stage = Stage::Asked { server: index, request };
                return true;
            }
        }
        false
    }

    /// A server does not answer: the dials that wait for it turn to another, if there is one.
    pub(super) fn ask_others(&mut self, silent: usize) {
        if !self.servers.iter().any(|server| server.up().is_some() && !server.is_doubtful()) {
            return;
        }
        let waits = |dial: &Dial| matches!(dial.stage, Stage::Asked { server, .. } if server == silent);
        let waiting = self.remotes.iter().filter(|(_, state)| state.dials.first().is_some_and(waits));
        for key in waiting.map(|(key, _)| *key).collect::<Vec<_>>() {
            self.ask(key, 0);
        }
    }

    fn asked(&self, wanted: RequestId) -> Option<(Key, usize)> {
        self.remotes.iter().find_map(|(key, state)| match state.dials.first()?.stage {
            Stage::Asked { server, request } if request == wanted => Some((*key, server)),
            _ => None,
        })
    }

    pub(super) fn not_introduced(&mut self, request: RequestId, reason: NotIntroduced, now: Instant) {
        if let Some(state) = self.renewing(request).and_then(|key| self.remotes.get_mut(&key)) {
            state.renewal.refused(&mut rand::rng(), now);
            return;
        }
        if self.spare_refused(request, now) {
            return;
        }
        let Some((key, server)) = self.asked(request) else { return };
        if reason == NotIntroduced::Unavailable && self.ask(key, server + 1) {
            return;
        }
        let Some(state) = self.remotes.get(&key) else { return };
        let error = match reason {
            NotIntroduced::Unavailable => ConnectError::Unavailable(state.peer),
            reason => ConnectError::Refused(reason),
        };
        self.fail_dial(key, error, now);
    }

    pub(super) fn introduced_as_asked(
        &mut self,
        server: usize,
        request: RequestId,
        introduction: Introduction,
        now: Instant,
    ) {
        if let Some(key) = self.renewing(request).or_else(|| self.spare_asked(request)) {
            self.renewed(key, server, introduction, now);
            return;
        }
        let Some((key, _)) = self.asked(request) else {
            // The dial has ended, or has yielded to the other side's.
            self.request_close((server, introduction.introduction));
            return;
        };
        if let Some(dial) = self.remotes.get_mut(&key).and_then(|state| state.dials.first_mut()) {
            dial.stage = Stage::Introduced;
            dial.first_flight = Vec::new();
        }
        self.introduce(key, server, introduction, now);
    }

    pub(super) fn introduced_unasked(&mut self, server: usize, mut introduction: Introduction, now: Instant) {
        let peer = introduction.peer;
        let flight = std::mem::take(&mut introduction.first_flight);
        let dialling = self.remotes.iter().find(|(_, state)| state.peer == peer && state.is_dialling_anew());
        let known = || {
            let same =
                |state: &RemoteState| state.peer == peer && state.instance == Some(introduction.instance);
            self.remotes.iter().find(|(_, state)| same(state))
        };
        let again = known().filter(|_| introduction.purpose != Purpose::Session);
        let key = if let Some((key, _)) = again {
            *key
        } else if introduction.purpose == Purpose::Spare {
            tracing::debug!(peer = %peer.short(), "there is no session to be spared");
            self.request_close((server, introduction.introduction));
            return;
        } else if let Some((key, _)) = dialling {
            if self.identity.id() < peer {
                // Both dial at once: the smaller id's session is kept, on both sides.
                tracing::debug!(peer = %peer.short(), "both dialled at once, ours is kept");
                return;
            }
            let key = *key;
            self.yield_dial(key);
            key
        } else if let Some((key, _)) = known() {
            *key
        } else {
            self.add_remote(peer, Route::Capture, now)
        };
        self.introduce(key, server, introduction, now);
        for datagram in flight {
            self.socket.inject(key, Bytes::from(datagram));
        }
    }

    /// Both dial at once and the other side's session is kept: ours waits for that one.
    fn yield_dial(&mut self, key: Key) {
        let Some(state) = self.remotes.get_mut(&key) else { return };
        tracing::debug!(peer = %state.peer.short(), "both dialled at once, the other's is kept");
        for dial in &mut state.dials {
            dial.stage = Stage::Yielded;
            dial.handshake = None;
        }
        state.remote.take_captured();
        if let Some(introduction) = state.introduction_id() {
            self.request_close(introduction);
        }
    }

    pub(super) fn introduction_closed(&mut self, server: usize, introduction: IntroductionId, now: Instant) {
        let closed = (server, introduction);
        let keys = self.remotes.iter();
        let found = keys.filter(|(_, state)| state.lanes().any(|lane| lane.named() == closed));
        let Some(key) = found.map(|(key, _)| *key).next() else { return };
        if let Some(state) = self.remotes.get_mut(&key) {
            tracing::debug!(peer = %state.peer.short(), "the introduction was closed");
            let own = state.introduction_id() == Some(closed);
            for lane in state.lanes_mut().filter(|lane| lane.named() == closed) {
                lane.closed = true;
            }
            if own && state.has_connections() && state.selected.is_none() {
                state.renewal.want_still(now);
            }
        }
        self.watch_relay(key, now);
    }

    pub(super) fn incoming(&mut self, incoming: quinn::Incoming) {
        let key = incoming.remote_address();
        let Some(state) = self.remotes.get_mut(&key) else {
            incoming.ignore();
            return;
        };
        let awaited = state.dials.iter().any(|dial| dial.stage == Stage::Yielded);
        if !awaited && !self.policy.admits(state.peer) {
            // It knows a path to us because we dialled it, and that is no invitation.
            incoming.refuse();
            return;
        }
        let config = match config::server(&self.identity, &self.alpn, Some((state.peer, &state.remote))) {
            Ok(config) => config,
            Err(error) => {
                tracing::error!(%error, "no session can be configured");
                return;
            }
        };
        let Ok(connecting) = incoming.accept_with(std::sync::Arc::new(config)) else { return };
        let events = self.events_tx.clone();
        tokio::spawn(async move {
            let result = connecting.await;
            let _ = events.send(Event::Accepted { key, result }).await;
        });
    }

    /// A handshake that we began has ended.
    pub(super) fn dialled(
        &mut self,
        key: Key,
        dial: u64,
        result: Result<Connection, ConnectionError>,
        now: Instant,
    ) {
        let Some(state) = self.remotes.get_mut(&key) else { return };
        let Some(place) = state.dials.iter().position(|other| other.number == dial) else { return };
        match result {
            Ok(connection) => {
                let dial = state.dials.remove(place);
                let session = state.news.session(connection.clone(), state.peer, dial.started);
                state.sessions.push(session.downgrade());
                if dial.reply.send(Ok(session)).is_err() {
                    connection.close(config::close::DONE.into(), b"");
                }
                tokio::spawn(watch_confirmation(key, connection, self.events_tx.clone()));
            }
            Err(source) => {
                let peer = state.peer;
                let error = match source {
                    ConnectionError::TimedOut => ConnectError::TimedOut {
                        peer,
                        stage: Stage::Introduced.missing(),
                        limit: DIAL_TIMEOUT,
                    },
                    source if is_wrong_key(&source) => ConnectError::WrongKey(peer),
                    source => ConnectError::Handshake { peer, source },
                };
                let dial = state.dials.remove(place);
                let _ = dial.reply.send(Err(error));
                self.remove_if_over(key, now);
            }
        }
    }

    /// A handshake that the other side began has ended. Ours is the server's end, so it is confirmed as well (RFC 9001, 4.1.2).
    pub(super) fn accepted(&mut self, key: Key, result: Result<Connection, ConnectionError>, now: Instant) {
        let Some(state) = self.remotes.get_mut(&key) else { return };
        let connection = match result {
            Ok(connection) => connection,
            Err(error) => {
                tracing::debug!(peer = %state.peer.short(), %error, "an incoming handshake failed");
                return;
            }
        };
        if let Some(place) = state.dials.iter().position(|dial| dial.stage == Stage::Yielded) {
            let dial = state.dials.remove(place);
            let session = state.news.session(connection, state.peer, dial.started);
            state.sessions.push(session.downgrade());
            let _ = dial.reply.send(Ok(session));
            // Dials beyond the first want sessions of their own.
            let more: Vec<Dial> = state.dials.extract_if(.., |dial| dial.stage == Stage::Yielded).collect();
            for dial in more {
                self.begin_handshake(key, dial.reply, Stage::Introduced, (dial.started, now));
            }
        } else {
            let session = state.news.session(connection, state.peer, state.introduced_at.unwrap_or(now));
            state.sessions.push(session.downgrade());
            if let Err(refused) = self.accept.try_send(session) {
                let session = refused.into_inner();
                tracing::warn!(peer = %session.peer().short(), "session refused: too many wait to be accepted");
                session.close(config::close::BUSY.into(), b"too many sessions wait to be accepted");
            }
        }
        self.confirmed(key, now);
    }

    /// Ends dials that have taken too long.
    pub(super) fn expire_dial(&mut self, key: Key, now: Instant) {
        let Some(state) = self.remotes.get_mut(&key) else { return };
        let peer = state.peer;
        while let Some(place) = state.dials.iter().position(|dial| dial.deadline <= now) {
            let dial = state.dials.remove(place);
            let stage = dial.stage.missing();
            let _ = dial.reply.send(Err(ConnectError::TimedOut { peer, stage, limit: DIAL_TIMEOUT }));
        }
        let stale: Vec<Dial> =
            state.dials.extract_if(.., |dial| dial.give_up_path.is_some_and(|limit| limit <= now)).collect();
        for dial in stale {
            tracing::debug!(peer = %peer.short(), "no answer over the known path: asking for an introduction");
            self.dial_anew(peer, dial.reply, (dial.started, now));
        }
        self.remove_if_over(key, now);
    }

    fn fail_dial(&mut self, key: Key, error: ConnectError, now: Instant) {
        let Some(state) = self.remotes.get_mut(&key) else { return };
        for dial in state.dials.drain(..) {
            let _ = dial.reply.send(Err(error.clone()));
        }
        self.remove_if_over(key, now);
    }
}

impl RemoteState {
    /// Whether a dial is on its way that needed an introduction and has no session yet.
    fn is_dialling_anew(&self) -> bool {
        self.sessions.is_empty() && self.dials.iter().any(|dial| dial.stage != Stage::Yielded)
    }
}

/// Waits until the server's end has confirmed the handshake. quinn tells in its statistics, not by an event.
async fn watch_confirmation(key: Key, connection: Connection, events: tokio::sync::mpsc::Sender<Event>) {
    let start = Instant::now();
    while connection.stats().frame_rx.handshake_done == 0 {
        let pause = CONFIRMATION_POLL.max(start.elapsed() / 50);
        tokio::select! {
            _ = connection.closed() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
    let _ = events.send(Event::Confirmed { key }).await;
}
