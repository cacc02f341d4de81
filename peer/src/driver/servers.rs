//! What the driver does with its rendezvous servers: registration, reflection, and the candidates that come of it.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use rand::Rng as _;
use rendezvous_wire::candidate::{Candidate, CandidateKind, MAX_CANDIDATES, Mapping};
use rendezvous_wire::message::{
    IntroductionId, IntroductionPolicy, MAX_POLICY_IDS, Register, Registered, RegistrationId, Request,
};
use rendezvous_wire::stun::Received;
use rendezvous_wire::{PeerId, RendezvousAddress, Token};
use tokio::sync::{Notify, mpsc, watch};

use crate::doctor::BindingLifetime;
use crate::doctor::drive::{drive, open};
use crate::doctor::lifetime::LifetimeSearch;
use crate::gather::host_candidates;
use crate::keep_alive::{KeepAlive, Measurement, SILENCES};
use crate::link::{Place, Reached, Registering};
use crate::reflection::Reflection;
use crate::server_changes::ServerState;
use crate::session::RelayTransport;
use crate::signalling::{ServerError, Signalling};
use crate::socket::{Remote, Route, Straight};

use super::remote::RemoteState;
use super::server::{Server, State, Up};
use super::vigil::Vigil;
use super::way::{Streams, Way};
use super::{Driver, Event, Online};

/// Requests that may wait for a signalling connection.
const REQUEST_QUEUE: usize = 256;

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
