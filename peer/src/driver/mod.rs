//! The driver: the one task that owns what changes in an endpoint. Servers, introductions, agents and routes are its own; the rest of the
//! crate sends it [`Event`]s.
//!
//! | module | what |
//! |---|---|
//! | `mod` | the loop: events, STUN, timers |
//! | [`servers`] | rendezvous servers: registration, reflection, candidates; [`server`], one of them; [`vigil`], whether one still answers |
//! | [`way`] | how their relays are reached, over UDP or on a stream |
//! | [`dial`] | sessions in the making: connecting, accepting, both at once |
//! | [`extras`] | the extra sockets of its ladder, and [`gate`], who may probe; [`loss`], when to stop |
//! | [`remote`] | a remote endpoint: its agent, its end; [`route`], which way its datagrams go; [`width`], how long they may be |
//! | [`lanes`] | the relay channels to it; [`standby`], the spare one; [`relay_watch`], whether the one in use carries; [`doubt`], what is made of that |
//! | [`precedence`] | which of several introductions counts |
//! | [`roaming`] | another network; [`renewal`], when to be introduced anew; [`convalescence`], what a sleep leaves behind |

mod convalescence;
mod dial;
mod doubt;
mod extras;
mod gate;
mod lanes;
mod loss;
mod precedence;
mod relay_watch;
mod remote;
mod renewal;
mod roaming;
mod route;
mod server;
mod servers;
mod standby;
mod vigil;
mod way;
mod width;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use peer_agent::Budget;
use quinn::{Connection, ConnectionError};
use rand::Rng as _;
use rendezvous_wire::message::{IntroductionPolicy, Notice, Registered};
use rendezvous_wire::stun::{Class, Received, split_username};
use rendezvous_wire::{KeyPair, PeerId, RendezvousAddress, Token};
use tokio::sync::{mpsc, oneshot, watch};

use crate::doctor::BindingLifetime;
use crate::endpoint::ConnectError;
use crate::explain::Explanation;
use crate::keep_alive::Measurement;
use crate::link::{Reached, Registering};
use crate::network;
use crate::portmap::Mapped;
use crate::server_changes::{Announcer, ServerStanding, WeakAnnouncer};
use crate::session::Session;
use crate::signalling::ServerError;
use crate::socket::{Outlets, PathSocket, StunDatagram};

pub(crate) use relay_watch::{LULL, RelayTraffic};
use remote::RemoteState;
use server::Server;

/// Events that may wait for the driver; senders wait beyond that.
const EVENT_QUEUE: usize = 256;

/// Datagrams of extra sockets that may wait for the driver.
const KNOCK_QUEUE: usize = 64;

/// How often remotes are looked at for being over.
const SWEEP: Duration = Duration::from_secs(1);

/// Shutting down waits one round trip of its slowest session and this, at most [`SHUTDOWN_MAX`], for the last words to leave and, should they
/// be lost, for what the other side still sends to be answered with them again.
const SHUTDOWN_GRACE: Duration = Duration::from_millis(20);

/// See [`SHUTDOWN_GRACE`].
const SHUTDOWN_MAX: Duration = Duration::from_millis(500);

/// How often it looks whether they have: quinn has no event for a drained connection.
const SHUTDOWN_POLL: Duration = Duration::from_millis(5);

/// A remote endpoint's name inside the driver: its synthetic address.
pub(crate) type Key = SocketAddr;

/// What the driver is told.
pub(crate) enum Event {
    /// Open a session.
    Connect { target: PeerId, reply: oneshot::Sender<Result<Session, ConnectError>> },
    /// Give this server address a synthetic one to connect to.
    ServerAddress { address: SocketAddr, reply: oneshot::Sender<Option<SocketAddr>> },
    /// A signalling connection stands; say what to register.
    ServerConnected { server: usize, reply: oneshot::Sender<Registering> },
    /// The registration is in force.
    ServerUp { server: usize, reached: Reached, registered: Registered },
    /// The signalling connection is gone or could not be made.
    ServerDown { server: usize, error: ServerError },
    /// Another connection beside it, or in the place of one whose registration is void, could not be made.
    AttemptFailed { server: usize, error: ServerError },
    /// Nothing has come back on the signalling connection.
    ServerSilent { server: usize },
    /// The server has answered on a stream.
    StreamAnswered { server: usize },
    /// The server has something to say.
    Notice { server: usize, notice: Notice },
    /// A QUIC handshake begins.
    Incoming(Box<quinn::Incoming>),
    /// A handshake that we began has ended.
    Dialled { key: Key, dial: u64, result: Result<Connection, ConnectionError> },
    /// A handshake that the other side began has ended.
    Accepted { key: Key, result: Result<Connection, ConnectionError> },
    /// The other side has confirmed the handshake: data may overtake it no longer.
    Confirmed { key: Key },
    /// What is known of how long bindings live has grown.
    LifetimeLearnt { server: usize, measurement: Measurement, lifetime: BindingLifetime },
    /// The router takes packets for us at this address, or at none any more.
    PortMapped { mapped: Option<Mapped> },
    /// Say why a remote's path is what it is.
    Explain { key: Key, reply: oneshot::Sender<Option<Explanation>> },
    /// Say how it stands with the servers.
    Servers { reply: oneshot::Sender<Vec<ServerStanding>> },
    /// The network has changed, or the machine has slept.
    NetworkChanged(network::Change),
    /// Others may be introduced to us from now on.
    Policy(IntroductionPolicy),
    /// Close everything.
    Shutdown { reply: oneshot::Sender<()> },
}

/// What [`Endpoint::online`](crate::Endpoint::online) waits for.
#[derive(Debug, Clone, Default)]
pub(crate) struct Online {
    /// Registered at one server, and bound at its relay.
    pub(crate) ready: bool,
    /// Every server has failed; the last one's failure.
    pub(crate) failed: Option<ServerError>,
}

pub(crate) struct Driver {
    identity: Arc<KeyPair>,
    /// The application protocol of sessions.
    alpn: Arc<[u8]>,
    quinn: quinn::Endpoint,
    socket: Arc<PathSocket>,
    outlets: Outlets,
    policy: IntroductionPolicy,
    events: mpsc::Receiver<Event>,
    events_tx: mpsc::Sender<Event>,
    accept: mpsc::Sender<Session>,
    online: watch::Sender<Online>,
    /// Held by whatever must end in good order.
    alive: watch::Receiver<()>,
    /// Tells this process from others with the same key.
    instance: u64,
    servers: Vec<Server>,
    changes: Announcer,
    /// Where our router takes packets for us, because we have asked it to.
    port_mapped: watch::Sender<Option<Mapped>>,
    remotes: BTreeMap<Key, RemoteState>,
    /// Which remote an agent's ufrag belongs to.
    ufrags: BTreeMap<String, Key>,
    /// What comes to the extra sockets of birthday probing.
    knocked: mpsc::Receiver<extras::Knocked>,
    knocked_tx: mpsc::Sender<extras::Knocked>,
    /// What our own router has had to remember lately.
    budget: Budget,
    /// Dials that no server has been free for yet.
    waiting: Vec<dial::Waiting>,
    next_remote: u64,
    next_request: u64,
    next_dial: u64,
    next_sweep: Instant,
    /// The network has changed lately.
    fresh_until: Option<Instant>,
    /// What we offer has changed, and more may be learnt.
    offer_pending: bool,
    shutdown: Option<Shutdown>,
}

impl Driver {
    #[expect(clippy::too_many_arguments, reason = "one call, at the endpoint's making")]
    pub(crate) fn new(
        identity: Arc<KeyPair>,
        alpn: Arc<[u8]>,
        quinn: quinn::Endpoint,
        socket: Arc<PathSocket>,
        outlets: Outlets,
        policy: IntroductionPolicy,
        addresses: Vec<(RendezvousAddress, Option<Token>)>,
        accept: mpsc::Sender<Session>,
        online: watch::Sender<Online>,
        alive: watch::Receiver<()>,
    ) -> Self {
        let (events_tx, events) = mpsc::channel(EVENT_QUEUE);
        let (knocked_tx, knocked) = mpsc::channel(KNOCK_QUEUE);
        let mut driver = Self {
            identity,
            alpn,
            quinn,
            socket,
            outlets,
            policy,
            events,
            events_tx,
            accept,
            online,
            alive,
            instance: rand::rng().random(),
            servers: Vec::new(),
            changes: Announcer::new(),
            port_mapped: watch::Sender::new(None),
            remotes: BTreeMap::new(),
            ufrags: BTreeMap::new(),
            knocked,
            knocked_tx,
            budget: Budget::new(gate::host_wide()),
            waiting: Vec::new(),
            next_remote: 1,
            next_request: 1,
            next_dial: 1,
            next_sweep: Instant::now() + SWEEP,
            fresh_until: None,
            offer_pending: false,
            shutdown: None,
        };
        let mut known = BTreeSet::new();
        for (address, token) in addresses {
            // A server has one registration of this process, however often it is named.
            if known.insert(address.id) {
                driver.add_server(address, token);
            } else {
                tracing::warn!(%address, "this server is named twice; only its first address is used");
            }
        }
        driver
    }

    pub(crate) fn events(&self) -> mpsc::Sender<Event> {
        self.events_tx.clone()
    }

    pub(crate) fn server_changes(&self) -> WeakAnnouncer {
        self.changes.listen()
    }

    pub(crate) fn port_mapped(&self) -> watch::Receiver<Option<Mapped>> {
        self.port_mapped.subscribe()
    }

    /// Runs until shut down or aborted.
    pub(crate) async fn run(mut self) {
        let quinn = self.quinn.clone();
        let events = self.events();
        let accepting = tokio::spawn(async move {
            while let Some(incoming) = quinn.accept().await {
                if events.send(Event::Incoming(Box::new(incoming))).await.is_err() {
                    return;
                }
            }
        });
        let _accepting = AbortOnDrop(accepting);
        let _watching = AbortOnDrop(tokio::spawn(network::watch(self.socket.clone(), self.events())));
        while !self.is_shut_down(Instant::now()) {
            let wake = self.next_wake();
            tokio::select! {
                event = self.events.recv() => match event {
                    Some(event) => self.handle_event(event, Instant::now()),
                    None => return,
                },
                Some(flight) = self.outlets.flights.recv() => self.flight_captured(flight, Instant::now()),
                Some((key, width)) = self.outlets.widths.recv() => self.handle_width(key, width),
                Some(key) = self.outlets.traffic.recv() => self.watch_traffic(key, Instant::now()),
                Some(datagram) = self.outlets.stun.recv() => self.handle_stun(&datagram, Instant::now()),
                Some(knocked) = self.knocked.recv() => self.handle_knock(&knocked, Instant::now()),
                () = tokio::time::sleep_until(wake.into()) => self.handle_timeout(Instant::now()),
            }
        }
    }

    fn handle_event(&mut self, event: Event, now: Instant) {
        match event {
            Event::Connect { target, reply } => self.connect(target, reply, now),
            Event::ServerAddress { address, reply } => {
                let _ = reply.send(self.server_synthetic(address, now));
            }
            Event::ServerConnected { server, reply } => {
                let _ = reply.send(self.registration(server));
            }
            Event::ServerUp { server, reached, registered } => {
                self.server_up(server, reached, registered, now);
            }
            Event::ServerDown { server, error } => self.server_down(server, error, now),
            Event::AttemptFailed { server, error } => self.attempt_failed(server, error),
            Event::ServerSilent { server } => self.suspect_server(server, now),
            Event::StreamAnswered { server } => self.server_answered(server, now),
            Event::Notice { server, notice } => self.handle_notice(server, notice, now),
            Event::Incoming(incoming) => self.incoming(*incoming),
            Event::Dialled { key, dial, result } => self.dialled(key, dial, result, now),
            Event::Accepted { key, result } => self.accepted(key, result, now),
            Event::Confirmed { key } => self.confirmed(key, now),
            Event::LifetimeLearnt { server, measurement, lifetime } => {
                self.lifetime_learnt(server, measurement, lifetime, now);
            }
            Event::PortMapped { mapped } => {
                self.port_mapped.send_replace(mapped);
                self.upload_changes();
                if mapped.is_some() {
                    self.offer_port_mapping(now);
                }
            }
            Event::Explain { key, reply } => {
                let local = self.mapping();
                let candidates = self.local_candidates();
                let state = self.remotes.get(&key);
                let server = state.and_then(RemoteState::lane).map(|lane| lane.server);
                let over = server.and_then(|server| self.servers.get(server)?.relay_transport());
                let explanation = state.and_then(|state| state.explain(local));
                let explanation =
                    explanation.map(|explanation| Explanation { candidates, over, ..explanation });
                let _ = reply.send(explanation);
            }
            Event::Servers { reply } => {
                let _ = reply.send(self.servers.iter().map(Server::standing).collect());
            }
            Event::NetworkChanged(change) => self.network_changed(change, now),
            Event::Policy(policy) => {
                self.policy = policy;
                self.refresh_policy();
            }
            Event::Shutdown { reply } => self.begin_shutdown(reply, now),
        }
    }

    fn handle_notice(&mut self, server: usize, notice: Notice, now: Instant) {
        match notice {
            // The signalling task turns the one into `ServerUp`, and answers the other.
            Notice::Registered(_) | Notice::Challenge(_) => {}
            Notice::Leaving(seconds) => self.server_leaving(server, seconds, now),
            Notice::Limited(limit) => self.server_limited(server, limit),
            Notice::Introduction(introduction) => match introduction.request {
                Some(request) => self.introduced_as_asked(server, request, introduction, now),
                None => self.introduced_unasked(server, introduction, now),
            },
            Notice::NotIntroduced(request, reason) => self.not_introduced(request, reason, now),
            Notice::Closed(introduction) => self.introduction_closed(server, introduction, now),
            Notice::Meet(number, meeting) => self.met(server, number, &meeting, now),
            Notice::Go(introduction, number) => self.go((server, introduction), number, now),
        }
    }

    fn handle_stun(&mut self, datagram: &StunDatagram, now: Instant) {
        let Ok(message) = Received::parse(&datagram.bytes) else { return };
        let key = match message.class() {
            Class::Request | Class::Indication => {
                let ufrag = message.username().and_then(split_username).map(|(local, _)| local);
                ufrag.and_then(|ufrag| self.ufrags.get(ufrag)).copied()
            }
            Class::Success | Class::Error => {
                if self.reflected(datagram.source, &message, now) {
                    return;
                }
                let transaction = message.transaction();
                self.remotes.iter().find(|(_, state)| state.owns(transaction)).map(|(key, _)| *key)
            }
        };
        let Some(key) = key else { return };
        if let Some(state) = self.remotes.get_mut(&key) {
            state.handle_stun(datagram, &message, now);
            self.pump(key, now);
        }
    }

    fn next_wake(&self) -> Instant {
        let agents = self.remotes.values().filter_map(RemoteState::next_wake);
        let servers = self.servers.iter().filter_map(Server::next_wake);
        let waiting = self.waiting.iter().map(|waiting| waiting.deadline);
        let shutdown = self.shutdown.iter().map(|_| Instant::now() + SHUTDOWN_POLL);
        agents
            .chain(servers)
            .chain(self.budget.poll_timeout())
            .chain(waiting)
            .chain(shutdown)
            .min()
            .map_or(self.next_sweep, |wake| wake.min(self.next_sweep))
    }

    fn handle_timeout(&mut self, now: Instant) {
        self.pump_servers(now);
        self.expire_waiting(now);
        self.budget.handle_timeout(now);
        let due: Vec<Key> = self
            .remotes
            .iter()
            .filter(|(_, state)| state.next_wake().is_some_and(|wake| wake <= now))
            .map(|(key, _)| *key)
            .collect();
        for key in due {
            self.expire_dial(key, now);
            if let Some(state) = self.remotes.get_mut(&key) {
                state.probe_widths(&self.socket, now);
                state.recover(now);
                state.watch_for_loss(&mut self.budget, now);
                state.handle_timeout(&mut self.budget, now);
                self.pump(key, now);
                self.watch_relay(key, now);
            }
        }
        self.pump_spares(now);
        self.pump_renewals(now);
        if self.next_sweep <= now {
            self.sweep(now);
            self.refresh_policy();
            self.next_sweep = now + SWEEP;
        }
    }

    /// Closes all sessions. The servers stay a little: closing an introduction closes its relay channel, over which the sessions'
    /// last words may have to go.
    fn begin_shutdown(&mut self, reply: oneshot::Sender<()>, now: Instant) {
        let slowest = self.remotes.values().filter_map(RemoteState::close_sessions).max();
        let wait = slowest.map_or(SHUTDOWN_GRACE, |rtt| (rtt + SHUTDOWN_GRACE).min(SHUTDOWN_MAX));
        let shutdown = Shutdown { replies: Vec::new(), deadline: now + wait };
        self.shutdown.get_or_insert(shutdown).replies.push(reply);
    }

    /// Whether all that was to be closed is closed; then says so to whoever waits for it.
    fn is_shut_down(&mut self, now: Instant) -> bool {
        let Some(shutdown) = &mut self.shutdown else { return false };
        if now < shutdown.deadline && self.remotes.values().any(RemoteState::has_connections) {
            return false;
        }
        let replies = std::mem::take(&mut shutdown.replies);
        for state in self.remotes.values() {
            for lane in state.lanes() {
                self.request_close(lane.named());
            }
        }
        // Without their request queues the signalling tasks say goodbye.
        self.servers.clear();
        for reply in replies {
            let _ = reply.send(());
        }
        true
    }
}

/// The endpoint is being closed.
struct Shutdown {
    replies: Vec<oneshot::Sender<()>>,
    deadline: Instant,
}

/// Ends a helper task with the driver.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
