//! Rendezvous servers as the driver knows them: registration, reflection, and the candidates that come of it.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand::Rng as _;
use rendezvous_wire::candidate::{Candidate, CandidateKind, MAX_CANDIDATES, Mapping};
use rendezvous_wire::message::{
    IntroductionId, IntroductionPolicy, MAX_POLICY_IDS, Register, Registered, RegistrationId, Request,
};
use rendezvous_wire::stun::Received;
use rendezvous_wire::{PeerId, RendezvousAddress, Token};
use tokio::sync::{Notify, mpsc, watch};

use crate::backoff;
use crate::doctor::BindingLifetime;
use crate::doctor::drive::{drive, open};
use crate::doctor::lifetime::LifetimeSearch;
use crate::gather::host_candidates;
use crate::keep_alive::{KeepAlive, Measurement, SAFE, SILENCES};
use crate::link::{Place, Reached, Registering};
use crate::reflection::Reflection;
use crate::server_changes::{ServerStanding, ServerState, Standing};
use crate::session::RelayTransport;
use crate::signalling::{ServerError, Signalling};
use crate::socket::{Remote, Route, Straight};

use super::remote::RemoteState;
use super::roaming::ANSWER;
use super::vigil::{Step, Vigil};
use super::way::{Streams, Way};
use super::{Driver, Event, Online};

/// Requests that may wait for a signalling connection.
const REQUEST_QUEUE: usize = 256;

/// A rendezvous server.
pub(super) struct Server {
    requests: mpsc::Sender<Request>,
    /// Has the signalling task connect anew.
    void: Arc<Notify>,
    /// Whether somebody waits for it.
    urgent: Arc<AtomicBool>,
    /// Has it try TCP: nothing is answered over UDP.
    deaf: watch::Sender<bool>,
    pub(super) address: RendezvousAddress,
    pub(super) state: State,
    /// Whether it answers.
    vigil: Vigil,
    /// Reflection clients: the present registration's last, before it those of earlier ones whose introductions still live, since
    /// their relay bindings must not lapse.
    reflections: Vec<(RegistrationId, Reflection)>,
    /// How often its bindings are renewed.
    keep_alive: KeepAlive,
    /// What was uploaded last.
    uploaded: Option<Register>,
    streams: Streams,
    /// Of the last binding, other than by a bind request of a present reflection client.
    sequence: u64,
    /// The relay is reached over UDP again, and those whom we have sessions with are to hear where we are seen.
    renews: bool,
    /// It has said that it goes away.
    leaving: bool,
    /// Admits us where the server asks for one.
    token: Option<Token>,
    /// Since when, and until when, the relay is to answer.
    answer_by: Option<(Instant, Instant)>,
    /// When to connect to it anew: it is there again, and so is everybody else.
    return_at: Option<Instant>,
}

/// Whether a server can be used.
pub(super) enum State {
    /// Not yet known.
    Connecting,
    /// Registered.
    Up(Up),
    /// Not at present.
    Down(ServerError),
}

/// A registration in force.
#[derive(Clone)]
pub(super) struct Up {
    pub(super) registration: RegistrationId,
    /// Where relay frames go.
    pub(super) way: Way,
    /// Where the signalling connection goes, when that is QUIC.
    signalling: Option<SocketAddr>,
    /// Mappings of the other family are kept up, too.
    both: bool,
    /// How long the relay remembers us.
    lease: Duration,
}

/// Bind requests that may still leave while a stream makes its binding, which has to be the later one.
const MARGIN: u64 = 16;

impl Server {
    pub(super) fn up(&self) -> Option<&Up> {
        match &self.state {
            State::Up(up) => Some(up),
            State::Connecting | State::Down(_) => None,
        }
    }

    /// How it stands with it, for people.
    pub(super) fn standing(&self) -> ServerStanding {
        let state = match &self.state {
            State::Connecting => Standing::Connecting,
            State::Up(_) if self.is_doubtful() => Standing::Silent,
            State::Up(up) => Standing::Registered(up.way.transport()),
            State::Down(error) => Standing::Down(error.clone()),
        };
        ServerStanding { server: self.address.clone(), state }
    }

    /// How its relay is reached.
    pub(super) fn relay_transport(&self) -> Option<RelayTransport> {
        self.up().map(|up| up.way.transport())
    }

    /// Registered, bound, and everything known that soon will be.
    fn is_settled(&self) -> bool {
        match self.up() {
            Some(Up { way: Way::Stream { .. }, .. }) => true,
            Some(_) => self.current().is_some_and(Reflection::is_settled),
            None => false,
        }
    }

    /// A sequence for the next binding that is no bind request of a present reflection client.
    fn next_sequence(&mut self) -> u64 {
        let requested = self.reflections.iter().map(|(_, reflection)| reflection.sequence());
        self.sequence = requested.max().unwrap_or(0).max(self.sequence) + MARGIN;
        self.sequence
    }

    pub(super) fn request(&self, request: Request) -> bool {
        self.requests.try_send(request).is_ok()
    }

    pub(super) fn next_wake(&self) -> Option<Instant> {
        let reflections = self.reflections.iter().filter_map(|(_, reflection)| reflection.poll_timeout());
        let measurement = self.up().and_then(|_| self.keep_alive.poll_timeout());
        let answer = self.answer_by.map(|(_, until)| until);
        let others = self
            .streams
            .poll_timeout()
            .into_iter()
            .chain(answer)
            .chain(self.vigil.poll_timeout())
            .chain(self.return_at);
        reflections.chain(measurement).chain(others).min()
    }

    /// Has all reflection clients renew as often as is right now.
    fn apply_keep_alive(&mut self, now: Instant) {
        let Some(up) = self.up() else { return };
        let Some(signalling) = up.signalling else { return };
        let mut interval = self.keep_alive.interval(up.lease);
        if up.both {
            // What was measured is true of the relay's family alone.
            interval = interval.min(SAFE);
        }
        tracing::debug!(?interval, "keep-alive");
        for (_, reflection) in &mut self.reflections {
            reflection.set_keep_alive(interval, signalling, now);
        }
    }

    /// The machine is in another network.
    pub(super) fn handle_network_change(&mut self, now: Instant) {
        for (_, reflection) in &mut self.reflections {
            reflection.handle_network_change(now);
        }
        self.answer_by = Some((now, now + ANSWER));
    }

    /// Has the relay asked at once whether it still knows us, and where.
    fn ask_anew(&mut self, now: Instant) {
        for (_, reflection) in &mut self.reflections {
            reflection.ask_anew(now);
        }
        self.answer_by = Some((now, now + ANSWER));
    }

    /// The machine has slept: it is in doubt no longer, and asked anew.
    pub(super) fn wake(&mut self, now: Instant) {
        if self.up().is_some() {
            self.vigil.wake(now);
        }
        self.ask_anew(now);
    }

    /// It should have answered something.
    pub(super) fn suspect(&mut self, now: Instant) {
        if self.up().is_some() {
            self.vigil.suspect(now);
        }
    }

    /// Whether another is better used: it does not answer, or goes away.
    pub(super) fn is_doubtful(&self) -> bool {
        self.vigil.is_doubtful() || self.leaving
    }

    /// It goes away.
    pub(super) const fn leave(&mut self) {
        self.leaving = true;
    }

    /// It has answered. True when that ends a doubt.
    pub(super) fn answered(&mut self, now: Instant) -> bool {
        let doubted = self.vigil.handle_answer(now);
        self.tell_deafness();
        doubted
    }

    /// Whether TCP is worth a try: the relay is asked over UDP, and does not answer.
    fn tell_deafness(&self) {
        let unanswered = self.vigil.is_doubtful() || self.current().is_some_and(Reflection::is_unanswered);
        let deaf = unanswered && self.current().is_some();
        self.deaf.send_if_modified(|known| std::mem::replace(known, deaf) != deaf);
    }

    /// Asks it whether it is there. True: it is in doubt from now on.
    fn keep_vigil(&mut self, now: Instant) -> bool {
        let mut doubted = false;
        while let Some(step) = self.vigil.poll(now) {
            match step {
                Step::Doubt => doubted = true,
                Step::Ask => {
                    self.streams.ask();
                    // Of whatever registration: any answer is one.
                    if let Some((_, reflection)) = self.reflections.last_mut() {
                        reflection.hurry(now);
                    }
                }
            }
        }
        doubted
    }

    fn set_urgent(&mut self, urgent: bool, now: Instant) {
        self.urgent.store(urgent, Ordering::Relaxed);
        self.vigil.set_urgent(urgent, now);
    }

    /// Connects to it anew, soon: it is there, and does not know us.
    pub(super) fn come_back(&mut self, urgent: bool, now: Instant) {
        self.set_urgent(urgent, now);
        let at = now + backoff::return_pause(urgent, &mut rand::rng());
        self.return_at = Some(self.return_at.map_or(at, |planned| planned.min(at)));
    }

    /// Makes the signalling connection anew.
    pub(super) fn reconnect(&mut self) {
        self.answer_by = None;
        self.return_at = None;
        self.void.notify_one();
    }

    /// Tells the server what we offer, if it can be told.
    pub(super) fn upload(&mut self, register: &Register) {
        if self.up().is_some() && self.request(Request::Update(register.clone())) {
            self.uploaded = Some(register.clone());
        }
    }

    /// Makes the signalling connection anew if the relay has not answered when it should have.
    fn judge_silence(&mut self, now: Instant) {
        let Some((asked, _)) = self.answer_by.filter(|(_, until)| *until <= now) else { return };
        self.answer_by = None;
        if !self.current().is_some_and(|reflection| reflection.has_answered_since(asked)) {
            tracing::debug!("the relay does not answer from this network");
            self.reconnect();
        }
    }

    /// Nothing more is to be learnt from it at present.
    fn is_quiet(&self) -> bool {
        self.current().is_none() || self.is_settled()
    }

    fn current(&self) -> Option<&Reflection> {
        let up = self.up()?;
        self.reflections.iter().find(|(id, _)| *id == up.registration).map(|(_, reflection)| reflection)
    }
}

impl Driver {
    pub(super) fn add_server(&mut self, address: RendezvousAddress, token: Option<Token>) {
        let (requests, requests_rx) = mpsc::channel(REQUEST_QUEUE);
        let (void, urgent) = (Arc::new(Notify::new()), Arc::new(AtomicBool::new(true)));
        let (deaf, is_deaf) = watch::channel(false);
        let signalling = Signalling {
            index: self.servers.len(),
            address: address.clone(),
            identity: self.identity.clone(),
            quinn: self.quinn.clone(),
            socket: self.socket.clone(),
            events: self.events_tx.clone(),
            requests: requests_rx,
            void: void.clone(),
            deaf: is_deaf,
            alive: self.alive.clone(),
            before: None,
            urgent: urgent.clone(),
        };
        tokio::spawn(signalling.run());
        self.servers.push(Server {
            requests,
            void,
            urgent,
            deaf,
            address,
            state: State::Connecting,
            vigil: Vigil::new(rand::rng().random()),
            reflections: Vec::new(),
            keep_alive: KeepAlive::new(),
            uploaded: None,
            streams: Streams::default(),
            sequence: 0,
            renews: false,
            leaving: false,
            token,
            answer_by: None,
            return_at: None,
        });
    }

    /// A synthetic address for a server's own, the same whenever it is asked for.
    pub(super) fn server_synthetic(&mut self, address: SocketAddr, now: Instant) -> Option<SocketAddr> {
        let socket = self.socket.socket_for(address)?;
        let remote =
            Arc::new(Remote::new(self.next_remote, Route::Direct(Straight { socket, address }), now));
        let mut synthetic = remote.synthetic;
        self.next_remote += 1;
        self.socket.update(|table| {
            synthetic = *table.sources.entry(address).or_insert(synthetic);
            table.remotes.entry(synthetic).or_insert(remote);
        });
        Some(synthetic)
    }

    /// What to register at a server.
    pub(super) fn registration(&mut self, server: usize) -> Registering {
        let register = self.register();
        let (mut sequence, mut token) = (0, None);
        if let Some(server) = self.servers.get_mut(server) {
            server.uploaded = Some(register.clone());
            sequence = server.next_sequence();
            token.clone_from(&server.token);
        }
        Registering { register, sequence, token }
    }

    pub(super) fn register(&self) -> Register {
        let mut candidates = self.local_candidates();
        candidates.truncate(MAX_CANDIDATES);
        Register { instance: self.instance, candidates, mapping: self.mapping(), policy: self.open_policy() }
    }

    /// Who may be introduced to us: whoever has a session with us as well, for it may have to be introduced anew.
    fn open_policy(&self) -> IntroductionPolicy {
        let IntroductionPolicy::Only(ids) = &self.policy else { return self.policy.clone() };
        let live = self.remotes.values().filter(|state| state.has_connections()).map(|state| state.peer);
        let ids: BTreeSet<PeerId> = ids.iter().copied().chain(live).collect();
        IntroductionPolicy::Only(ids.into_iter().take(MAX_POLICY_IDS).collect())
    }

    /// Tells the servers when others may be introduced to us than before.
    pub(super) fn refresh_policy(&mut self) {
        let policy = self.open_policy();
        let outdated = |server: &Server| server.uploaded.as_ref().is_some_and(|told| told.policy != policy);
        if self.servers.iter().any(outdated) {
            let register = self.register();
            for server in &mut self.servers {
                server.upload(&register);
            }
        }
    }

    /// How this side's NAT maps.
    pub(super) fn mapping(&self) -> Mapping {
        let mut seen = self.servers.iter().filter_map(Server::current).map(Reflection::mapping);
        seen.find(|mapping| *mapping != Mapping::Unknown).unwrap_or_default()
    }

    /// Host candidates, then server-reflexive ones, then what the router has mapped.
    pub(super) fn local_candidates(&self) -> Vec<Candidate> {
        let mut candidates = host_candidates(self.socket.local_addresses());
        let mapped = self.servers.iter().filter_map(Server::current).flat_map(Reflection::mapped);
        for (rank, (_, address)) in mapped.enumerate() {
            if !candidates.iter().any(|candidate| candidate.address == address) {
                let preference = u16::MAX - rank as u16;
                candidates.push(Candidate::new(CandidateKind::ServerReflexive, address, preference));
            }
        }
        let port_mapped = self.port_mapped.borrow().map(|mapped| SocketAddr::V4(mapped.external));
        // At the same place as a reflexive one it is that, with less filtering.
        let new = |address: &SocketAddr| !candidates.iter().any(|candidate| candidate.address == *address);
        if let Some(address) = port_mapped.filter(new) {
            candidates.push(Candidate::new(CandidateKind::PortMapped, address, u16::MAX));
        }
        candidates
    }

    pub(super) fn server_up(&mut self, index: usize, reached: Reached, registered: Registered, now: Instant) {
        let in_use: Vec<RegistrationId> =
            self.remotes.values().flat_map(|state| state.registrations(index)).collect();
        let Some(server) = self.servers.get_mut(index) else { return };
        let id = registered.registration;
        // One that has begun anew has lost what the old one knew, but counts on.
        server.next_sequence();
        server.reflections.retain(|(other, reflection)| {
            *other != id && in_use.contains(other) && !reflection.is_disowned()
        });
        server.vigil.handle_answer(now);
        server.return_at = None;
        server.leaving = false;
        self.changes.announce(&server.address, ServerState::Registered);
        let lease = Duration::from_secs(registered.lease.into());
        match reached {
            Reached::Stream(tunnel) => {
                let way = Way::stream(&tunnel);
                tracing::debug!(server = index, relay = %way.relay(), "registered on a stream");
                server.streams.enter(tunnel);
                server.renews = false;
                server.state = State::Up(Up { registration: id, way, signalling: None, both: false, lease });
            }
            Reached::Udp(place) => {
                let Some((way, both, reflection)) = self.reflect(index, place, &registered, now) else {
                    return;
                };
                tracing::debug!(server = index, relay = %way.relay(), observed = %registered.observed, "registered");
                let relay = way.relay();
                let Some(server) = self.servers.get_mut(index) else { return };
                server.reflections.push((id, reflection));
                // A stream relays until UDP is proven.
                let way = match &server.state {
                    State::Up(up) if up.registration == id && up.way.transport() != RelayTransport::Udp => {
                        up.way.clone()
                    }
                    _ => way,
                };
                let signalling = Some(place.signalling);
                server.state = State::Up(Up { registration: id, way, signalling, both, lease });
                server.apply_keep_alive(now);
                self.socket.update(|table| {
                    table.relays.insert(relay);
                });
            }
        }
        self.move_relayed(index, now);
        self.pump_servers(now);
        self.start_waiting(now);
        self.mend_all(now);
        self.hasten_renewals(now);
    }

    /// The way that a registration over UDP binds, whether it learns mappings of both families, and its reflection client.
    fn reflect(
        &self,
        index: usize,
        place: Place,
        registered: &Registered,
        now: Instant,
    ) -> Option<(Way, bool, Reflection)> {
        let relay = SocketAddr::new(place.signalling.ip(), registered.reflection_ports[0]);
        let socket = self.socket.socket_for(relay)?;
        // A direct path may be one of the other family, to a side that has no other: its mappings are wanted, too.
        let other = place.other.and_then(|address| Some((self.socket.socket_for(address)?, address)));
        let destinations: Vec<_> = std::iter::once((socket, place.signalling))
            .chain(other)
            .flat_map(|(socket, address)| {
                registered.reflection_ports.map(|port| (socket, SocketAddr::new(address.ip(), port)))
            })
            .collect();
        let translated = destinations.iter().find(|(_, address)| address.is_ipv4());
        let translated = translated.map_or(socket, |(socket, _)| *socket);
        let reflection = Reflection::new(
            registered.registration,
            &registered.key,
            (registered.observed, self.socket.local_address(translated).map_or(0, |local| local.port())),
            &destinations,
            self.servers.get(index)?.sequence,
            rand::rng().random(),
            now,
        );
        match reflection {
            Ok(reflection) => Some((Way::Udp { socket, relay }, other.is_some(), reflection)),
            Err(_) => {
                tracing::warn!("the rendezvous server gave a key that cannot be used");
                None
            }
        }
    }

    /// The relay has answered over UDP: what a stream has relayed goes there.
    fn leave_stream(&mut self, index: usize, now: Instant) {
        let Some(server) = self.servers.get_mut(index) else { return };
        let bound = server
            .current()
            .and_then(Reflection::relay)
            .filter(|_| server.up().is_some_and(|up| up.way.transport() != RelayTransport::Udp));
        let Some((socket, relay)) = bound else { return };
        if let State::Up(up) = &mut server.state {
            up.way = Way::Udp { socket, relay };
        }
        server.streams.leave(now);
        server.renews = true;
        self.move_relayed(index, now);
    }

    pub(super) fn server_down(&mut self, index: usize, error: ServerError, now: Instant) {
        let urgent = self.is_awaited(index);
        let Some(server) = self.servers.get_mut(index) else { return };
        let was_up = server.up().is_some();
        server.set_urgent(urgent, now);
        let doubted = server.vigil.lose(now);
        if was_up && urgent {
            server.come_back(urgent, now);
        }
        server.leaving = false;
        server.state = State::Down(error.clone());
        server.uploaded = None;
        let usable = self.servers.iter().any(|server| !matches!(server.state, State::Down(_)));
        if !usable {
            self.fail_waiting(&error);
        }
        let ready = self.servers.iter().any(Server::is_settled);
        self.online.send_replace(Online { ready, failed: (!usable).then_some(error.clone()) });
        if let Some(server) = self.servers.get(index) {
            let state = if was_up || matches!(error, ServerError::Lost { .. }) {
                tracing::info!(host = %server.address.host, %error, "the rendezvous server is lost");
                ServerState::Lost(error)
            } else {
                ServerState::Failed(error)
            };
            self.changes.announce(&server.address, state);
        }
        if doubted && was_up {
            self.server_doubted(index, now);
        }
    }

    /// A connection in the place of another could not be made; it is tried again.
    pub(super) fn attempt_failed(&self, index: usize, error: ServerError) {
        if let Some(server) = self.servers.get(index) {
            self.changes.announce(&server.address, ServerState::Failed(error));
        }
    }

    /// Whether somebody waits for it: a session that has no other way, or a dial.
    pub(super) fn is_awaited(&self, index: usize) -> bool {
        let relayed = |state: &RemoteState| {
            state.has_connections() && state.is_relayed() && state.lanes().any(|lane| lane.server == index)
        };
        !self.waiting.is_empty() || self.remotes.values().any(relayed)
    }

    /// Sends what reflection has due.
    pub(super) fn pump_servers(&mut self, now: Instant) {
        let mut doubted = Vec::new();
        for index in 0..self.servers.len() {
            if self.servers[index].is_doubtful() {
                let urgent = self.is_awaited(index);
                self.servers[index].set_urgent(urgent, now);
            }
            let server = &mut self.servers[index];
            if server.return_at.is_some_and(|at| at <= now) {
                server.reconnect();
            }
            server.streams.handle_timeout(now);
            server.judge_silence(now);
            if server.keep_vigil(now) {
                doubted.push(index);
            }
            let relay = server.current().and_then(Reflection::relay).map(|(_, relay)| relay);
            if let Some(relay) = relay
                && let Some(measurement) = server.keep_alive.poll_measurement(now)
            {
                tokio::spawn(measure_lifetime(index, relay, measurement, self.events_tx.clone()));
            }
            for (_, reflection) in &mut server.reflections {
                while let Some(transmit) = reflection.poll_transmit(now) {
                    self.socket.send_stun(transmit.socket, transmit.destination, &transmit.datagram);
                }
            }
            server.tell_deafness();
        }
        self.handle_settled(now);
        for index in doubted {
            self.server_doubted(index, now);
        }
    }

    /// Tells every server that holds a registration of ours what it does not know yet.
    pub(super) fn upload_changes(&mut self) {
        let register = self.register();
        for server in &mut self.servers {
            if server.up().is_some() && server.uploaded.as_ref() != Some(&register) {
                server.upload(&register);
                self.offer_pending = true;
            }
        }
    }

    /// Takes a STUN response from a server. False: not one of ours.
    pub(super) fn reflected(&mut self, source: SocketAddr, message: &Received<'_>, now: Instant) -> bool {
        let answers = |server: &mut Server| {
            let mut reflections = server.reflections.iter_mut();
            reflections.any(|(_, reflection)| reflection.handle_response(source, message, now))
        };
        let Some(answering) = self.servers.iter_mut().position(answers) else { return false };
        let mut forgotten = false;
        for index in 0..self.servers.len() {
            let urgent = self.is_awaited(index);
            let server = &mut self.servers[index];
            if let Some(mapped) = server.current().and_then(Reflection::bound_at)
                && server.keep_alive.seen(mapped, now)
            {
                server.apply_keep_alive(now);
            }
            if server.current().is_some_and(Reflection::is_disowned) {
                tracing::debug!("the server does not know the registration any more");
                server.state = State::Connecting;
                server.come_back(urgent, now);
                forgotten = true;
            }
        }
        if forgotten {
            self.mend_all(now);
        }
        for index in 0..self.servers.len() {
            self.leave_stream(index, now);
        }
        self.upload_changes();
        self.handle_settled(now);
        self.server_answered(answering, now);
        true
    }

    /// What is known settles with an answer, or with the time for one gone by.
    fn handle_settled(&mut self, now: Instant) {
        for index in 0..self.servers.len() {
            let server = &mut self.servers[index];
            if server.renews && server.is_settled() {
                server.renews = false;
                self.renew_relayed(index);
            }
        }
        let ready = self.servers.iter().any(Server::is_settled);
        if ready && !self.online.borrow().ready {
            self.online.send_replace(Online { ready, failed: None });
        }
        if self.offer_pending && self.servers.iter().all(Server::is_quiet) {
            self.offer_pending = false;
            self.offer_changed(now);
        }
    }

    /// A measurement of how long bindings live has learnt something.
    pub(super) fn lifetime_learnt(
        &mut self,
        server: usize,
        measurement: Measurement,
        lifetime: BindingLifetime,
        now: Instant,
    ) {
        let Some(server) = self.servers.get_mut(server) else { return };
        if server.keep_alive.learnt(measurement, lifetime) {
            server.apply_keep_alive(now);
        }
    }

    /// Asks a server for something, if it is there to be asked.
    pub(super) fn request(&self, server: usize, request: Request) {
        if let Some(server) = self.servers.get(server) {
            server.request(request);
        }
    }

    /// Tells the server that an introduction is over.
    pub(super) fn request_close(&self, (server, introduction): (usize, IntroductionId)) {
        self.request(server, Request::Close(introduction));
    }

    /// Where STUN answers are to be had.
    pub(super) fn reflectors(&self) -> Vec<SocketAddr> {
        self.servers.iter().filter_map(Server::current).flat_map(Reflection::destinations).collect()
    }
}

/// Finds out how long bindings live, with sockets of its own, and tells the driver whatever it learns.
async fn measure_lifetime(
    server: usize,
    relay: SocketAddr,
    measurement: Measurement,
    events: mpsc::Sender<Event>,
) {
    let sockets = match open(relay.is_ipv4(), 1 + SILENCES.len()).await {
        Ok(sockets) => sockets,
        Err(error) => {
            tracing::debug!(%error, "no sockets to measure binding lifetimes with");
            return;
        }
    };
    let mut search = LifetimeSearch::new(relay, 0, &SILENCES, rand::random(), Instant::now());
    let (found, mut news) = watch::channel(BindingLifetime::default());
    let tell = async {
        while news.changed().await.is_ok() {
            let lifetime = *news.borrow_and_update();
            if events.send(Event::LifetimeLearnt { server, measurement, lifetime }).await.is_err() {
                return;
            }
        }
    };
    let measure = async {
        drive(&mut search, sockets, |search| {
            found.send_if_modified(|known| std::mem::replace(known, search.result()) != *known);
        })
        .await;
        drop(found);
    };
    // The driver may be gone before the measurement is over.
    tokio::select! {
        ((), ()) = async { tokio::join!(tell, measure) } => {}
        () = events.closed() => {}
    }
}
