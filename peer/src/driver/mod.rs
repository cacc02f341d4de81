//! The driver: the one task that owns what changes in an endpoint. Servers, introductions, agents and routes are its own; the rest of the
//! crate sends it [`Event`]s.
//!
//! | module | what |
//! |---|---|
//! | `mod` | the loop: events, STUN, timers |
//! | [`servers`] | rendezvous servers: registration, reflection, candidates |
//! | [`dial`] | sessions in the making: connecting, accepting, both at once |
//! | [`remote`] | a remote endpoint: its agent, its route, its end |

mod dial;
mod remote;
mod servers;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::{Connection, ConnectionError};
use rand::Rng as _;
use rendezvous_wire::message::{IntroductionPolicy, Notice, Register, Registered};
use rendezvous_wire::stun::{Class, Received, split_username};
use rendezvous_wire::{KeyPair, PeerId, RendezvousAddress};
use tokio::sync::{mpsc, oneshot, watch};

use crate::endpoint::ConnectError;
use crate::session::Session;
use crate::signalling::ServerError;
use crate::socket::{Outlets, PathSocket, StunDatagram};

use remote::RemoteState;
use servers::Server;

/// Events that may wait for the driver; senders wait beyond that.
const EVENT_QUEUE: usize = 256;

/// How often remotes are looked at for being over.
const SWEEP: Duration = Duration::from_secs(1);

/// A remote endpoint's name inside the driver: its synthetic address.
type Key = SocketAddr;

/// What the driver is told.
pub(crate) enum Event {
    /// Open a session.
    Connect { target: PeerId, reply: oneshot::Sender<Result<Session, ConnectError>> },
    /// Give this server address a synthetic one to connect to.
    ServerAddress { address: SocketAddr, reply: oneshot::Sender<Option<SocketAddr>> },
    /// A signalling connection stands; say what to register.
    ServerConnected { server: usize, reply: oneshot::Sender<Register> },
    /// The registration is in force.
    ServerUp { server: usize, address: SocketAddr, registered: Registered },
    /// The signalling connection is gone or could not be made.
    ServerDown { server: usize, error: ServerError },
    /// The server has something to say.
    Notice { server: usize, notice: Notice },
    /// A QUIC handshake begins.
    Incoming(Box<quinn::Incoming>),
    /// A handshake that we began has ended.
    Dialled { key: Key, result: Result<Connection, ConnectionError> },
    /// A handshake that the other side began has ended.
    Accepted { key: Key, result: Result<Connection, ConnectionError> },
    /// The other side has confirmed the handshake: data may overtake it no longer.
    Confirmed { key: Key },
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
    quinn: quinn::Endpoint,
    socket: Arc<PathSocket>,
    outlets: Outlets,
    policy: IntroductionPolicy,
    events: mpsc::Receiver<Event>,
    events_tx: mpsc::Sender<Event>,
    accept: mpsc::Sender<Session>,
    online: watch::Sender<Online>,
    /// Tells this process from others with the same key.
    instance: u64,
    servers: Vec<Server>,
    remotes: BTreeMap<Key, RemoteState>,
    /// Which remote an agent's ufrag belongs to.
    ufrags: BTreeMap<String, Key>,
    /// Dials that no server has been free for yet.
    waiting: Vec<dial::Waiting>,
    next_remote: u64,
    next_request: u64,
    next_sweep: Instant,
}

impl Driver {
    #[expect(clippy::too_many_arguments, reason = "one call, at the endpoint's making")]
    pub(crate) fn new(
        identity: Arc<KeyPair>,
        quinn: quinn::Endpoint,
        socket: Arc<PathSocket>,
        outlets: Outlets,
        policy: IntroductionPolicy,
        addresses: Vec<RendezvousAddress>,
        accept: mpsc::Sender<Session>,
        online: watch::Sender<Online>,
    ) -> Self {
        let (events_tx, events) = mpsc::channel(EVENT_QUEUE);
        let mut driver = Self {
            identity,
            quinn,
            socket,
            outlets,
            policy,
            events,
            events_tx,
            accept,
            online,
            instance: rand::rng().random(),
            servers: Vec::new(),
            remotes: BTreeMap::new(),
            ufrags: BTreeMap::new(),
            waiting: Vec::new(),
            next_remote: 1,
            next_request: 1,
            next_sweep: Instant::now() + SWEEP,
        };
        for address in addresses {
            driver.add_server(address);
        }
        driver
    }

    pub(crate) fn events(&self) -> mpsc::Sender<Event> {
        self.events_tx.clone()
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
        loop {
            let wake = self.next_wake();
            tokio::select! {
                event = self.events.recv() => match event {
                    Some(Event::Shutdown { reply }) => {
                        self.shut_down();
                        let _ = reply.send(());
                        return;
                    }
                    Some(event) => self.handle_event(event, Instant::now()),
                    None => return,
                },
                Some(flight) = self.outlets.flights.recv() => self.flight_captured(flight, Instant::now()),
                Some(datagram) = self.outlets.stun.recv() => self.handle_stun(&datagram, Instant::now()),
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
            Event::ServerUp { server, address, registered } => {
                self.server_up(server, address, registered, now);
            }
            Event::ServerDown { server, error } => self.server_down(server, error),
            Event::Notice { server, notice } => self.handle_notice(server, notice, now),
            Event::Incoming(incoming) => self.incoming(*incoming),
            Event::Dialled { key, result } => self.dialled(key, result, now),
            Event::Accepted { key, result } => self.accepted(key, result, now),
            Event::Confirmed { key } => self.confirmed(key, now),
            // Taken out by the loop.
            Event::Shutdown { .. } => {}
        }
    }

    fn handle_notice(&mut self, server: usize, notice: Notice, now: Instant) {
        match notice {
            // The signalling task turns these into `ServerUp`.
            Notice::Registered(_) => {}
            Notice::Introduction(introduction) => match introduction.request {
                Some(request) => self.introduced_as_asked(server, request, introduction, now),
                None => self.introduced_unasked(server, introduction, now),
            },
            Notice::NotIntroduced(request, reason) => self.not_introduced(request, reason, now),
            Notice::Closed(introduction) => self.introduction_closed(server, introduction),
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
        agents.chain(servers).chain(waiting).min().map_or(self.next_sweep, |wake| wake.min(self.next_sweep))
    }

    fn handle_timeout(&mut self, now: Instant) {
        self.pump_servers(now);
        self.expire_waiting(now);
        let due: Vec<Key> = self
            .remotes
            .iter()
            .filter(|(_, state)| state.next_wake().is_some_and(|wake| wake <= now))
            .map(|(key, _)| *key)
            .collect();
        for key in due {
            self.expire_dial(key, now);
            if let Some(state) = self.remotes.get_mut(&key) {
                state.handle_timeout(now);
                self.pump(key, now);
            }
        }
        if self.next_sweep <= now {
            self.sweep(now);
            self.next_sweep = now + SWEEP;
        }
    }

    /// Closes all connections, the servers' last: dropping their request queues says goodbye.
    fn shut_down(&mut self) {
        for (_, state) in std::mem::take(&mut self.remotes) {
            if let Some(introduction) = state.introduction_id() {
                self.request_close(introduction);
            }
            state.close_sessions();
        }
        self.servers.clear();
    }
}

/// Ends a helper task with the driver.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
