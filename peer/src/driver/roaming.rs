//! What an endpoint does when its machine is in another network, or has slept: the relay and the servers are told at once, sessions go over the relay
//! meanwhile, and both sides are introduced anew, with what they can offer now.

use std::time::{Duration, Instant};

use rendezvous_wire::message::{Introduce, Introduction, Purpose, Request, RequestId};

use crate::network::Change;

use super::remote::RemoteState;
use super::server::Server;
use super::{Driver, Key};

/// How long the relay may take to answer from the new network before the signalling connection is made anew: it may be bound to an address
/// family that is no more.
pub(super) const ANSWER: Duration = Duration::from_secs(1);

/// A server drops a connection that was silent for so long (its idle time-out is no less).
const SILENT: Duration = Duration::from_secs(30);

/// For so long after a change, whatever is learnt of the new network makes one more introduction worth while.
const FRESH: Duration = Duration::from_secs(5);

/// By then ordinary checks and meetings have done what they can; a new introduction before would only disturb them.
const PUNCHED: Duration = Duration::from_secs(2);

impl RemoteState {
    /// One more introduction may help if this one does not: its checks have their time first.
    pub(super) fn consider_again(&mut self, now: Instant) {
        let punched = self.introduced_at.map_or(now, |introduced| introduced + PUNCHED);
        self.renewal.consider(punched.max(now));
    }
}

impl Driver {
    /// The network has changed, or the machine has slept.
    pub(super) fn network_changed(&mut self, change: Change, now: Instant) {
        tracing::info!(?change, "the network has changed");
        self.fresh_until = Some(now + FRESH);
        let register = self.register();
        for server in &mut self.servers {
            match &change {
                Change::Moved { .. } => server.handle_network_change(now),
                Change::Woke(slept) if *slept >= SILENT => server.reconnect(),
                Change::Woke(_) => server.wake(now),
            }
            // The server sees from where it comes.
            server.upload(&register);
        }
        self.pump_servers(now);
        for key in self.live_remotes() {
            if let Change::Moved { kept } = &change {
                self.leave_unless_kept(key, kept, now);
            }
            self.want_renewal(key, now);
            if let Some(state) = self.remotes.get_mut(&key) {
                if let Change::Woke(_) = change {
                    // Whatever was under way is not any more.
                    state.remote.begin_anew(now);
                    state.kick();
                }
                state.convalescence.begin(now);
            }
        }
        self.pump_renewals(now);
    }

    /// A server is there again.
    pub(super) fn hasten_renewals(&mut self, now: Instant) {
        let fresh = self.fresh_until.is_some_and(|until| until > now);
        for state in self.remotes.values_mut() {
            // A server that was started anew has forgotten both sides: one of them is enough to ask.
            let defer = if fresh { Duration::ZERO } else { state.defers() };
            state.renewal.hasten(now + defer);
        }
        self.pump_renewals(now);
    }

    /// A direct path is in doubt. A router that has begun anew may have given us another port, from which the relay takes nothing until it is
    /// bound: the copies that go over it now would be lost as well.
    pub(super) fn ask_relay(&mut self, key: Key, now: Instant) {
        let lane = self.remotes.get(&key).and_then(RemoteState::lane).map(|lane| lane.server);
        if let Some(server) = lane {
            self.suspect_server(server, now);
        }
    }

    /// What we offer has changed. So soon after the network has, the other sides should know.
    pub(super) fn offer_changed(&mut self, now: Instant) {
        if self.fresh_until.is_none_or(|until| until <= now) {
            return;
        }
        for key in self.live_remotes() {
            self.want_renewal(key, now);
        }
        self.pump_renewals(now);
    }

    /// The router takes packets for us now. Where nothing else has led to a direct path, the other side is told.
    pub(super) fn offer_port_mapping(&mut self, now: Instant) {
        for state in self.remotes.values_mut().filter(|state| state.has_connections()) {
            state.consider_again(now);
        }
    }

    fn live_remotes(&self) -> Vec<Key> {
        let live = self.remotes.iter().filter(|(_, state)| state.has_connections());
        live.map(|(key, _)| *key).collect()
    }

    fn want_renewal(&mut self, key: Key, now: Instant) {
        if let Some(state) = self.remotes.get_mut(&key) {
            state.renewal.want(now);
        }
    }

    /// Asks for the introductions that are wanted anew and due.
    pub(super) fn pump_renewals(&mut self, now: Instant) {
        let keys: Vec<Key> = self.remotes.keys().copied().collect();
        for key in keys {
            let Some(state) = self.remotes.get_mut(&key) else { continue };
            if !state.has_connections() {
                state.renewal.done();
                continue;
            }
            if state.renewal.is_due(now) && state.selected.is_none() {
                state.renewal.want(now);
            }
            let Some(attempt) = state.renewal.poll(now) else { continue };
            let renewed = attempt == 0 && self.ask_to_renew(key);
            let request = if renewed { None } else { self.ask_again(key, attempt) };
            if let Some(state) = self.remotes.get_mut(&key) {
                state.renewal.asked(request, &mut rand::rng(), now);
            }
        }
    }

    /// Has the introduction in force made anew, where it still is.
    fn ask_to_renew(&self, key: Key) -> bool {
        let Some(state) = self.remotes.get(&key) else { return false };
        let Some((server, registration, introduction)) = state.renewable() else { return false };
        let round = state.precedence.next_round();
        let server = self.servers.get(server);
        let server = server.filter(|server| {
            !server.is_doubtful() && server.up().is_some_and(|up| up.registration == registration)
        });
        server.is_some_and(|server| server.request(Request::Renew(introduction, round)))
    }

    /// Asks for an introduction at one of the servers, another each time.
    fn ask_again(&mut self, key: Key, attempt: u32) -> Option<RequestId> {
        let state = self.remotes.get(&key)?;
        let (target, purpose) = (state.peer, Purpose::Again(state.precedence.next_round()));
        let usable = |server: &&Server| server.up().is_some() && !server.is_doubtful();
        let up: Vec<_> = self.servers.iter().filter(usable).collect();
        let server = up.get(attempt as usize % up.len().max(1))?;
        let request = RequestId(self.next_request);
        let introduce = Introduce { request, target, purpose, first_flight: Vec::new() };
        let asked = server.request(Request::Introduce(introduce));
        self.next_request += 1;
        asked.then_some(request)
    }

    /// A new introduction is here as asked.
    pub(super) fn renewed(&mut self, key: Key, server: usize, introduction: Introduction, now: Instant) {
        let Some(state) = self.remotes.get_mut(&key) else { return };
        if state.instance == Some(introduction.instance) {
            self.introduce(key, server, introduction, now);
            return;
        }
        // Another process with the same key: it knows nothing of our sessions.
        state.renewal.refused(&mut rand::rng(), now);
        self.request_close((server, introduction.introduction));
    }

    /// The remote whose renewal has asked this.
    pub(super) fn renewing(&self, request: RequestId) -> Option<Key> {
        self.remotes.iter().find(|(_, state)| state.renewal.awaits(request)).map(|(key, _)| *key)
    }
}
