//! What the driver makes of doubts: about a server ([`Vigil`](super::vigil::Vigil)), and about a relayed session ([`RelayWatch`](super::relay_watch::RelayWatch)).

use std::time::Instant;

use rendezvous_wire::message::Limit;

use crate::server_changes::ServerState;
use crate::session::{RelayTransport, WeakSession};
use crate::socket::Route;

use super::lanes::Lane;
use super::relay_watch::{Circumstances, Verdict};
use super::remote::RemoteState;
use super::{Driver, Key};

impl RemoteState {
    /// Of its fastest session.
    fn rtt(&self) -> Option<std::time::Duration> {
        self.sessions.iter().filter_map(WeakSession::connection).map(|connection| connection.rtt()).min()
    }

    pub(super) fn is_relayed(&self) -> bool {
        matches!(**self.remote.route(), Route::Relay(_) | Route::Relays { .. })
    }
}

impl Driver {
    /// Looks at a remote's relayed traffic, and does what has to be done.
    pub(super) fn watch_relay(&mut self, key: Key, now: Instant) {
        let servers = &self.servers;
        let Some(state) = self.remotes.get_mut(&key) else { return };
        let Some(lane) = state.lane().filter(|_| state.is_relayed()) else {
            state.relay_watch.reset();
            return;
        };
        let (server, doubtful) = (lane.server, !lane.is_sound(servers));
        let spare = state.spare(servers).map(Lane::named);
        let about = Circumstances { doubtful, spare: spare.is_some(), rtt: state.rtt() };
        let traffic = state.remote.relay_meter.take();
        let verdict = state.relay_watch.poll(traffic, about, now);
        if state.relay_watch.take_revival() {
            tracing::debug!(peer = %state.peer.short(), "heard again over the relay");
            state.remote.begin_anew(now);
            state.kick();
            state.convalescence.begin(now);
        }
        if state.relay_watch.poll_timeout().is_none() && state.remote.relay_meter.disarm(traffic) {
            state.relay_watch.look_again(now);
        }
        let Some(verdict) = verdict else { return };
        let peer = state.peer.short();
        match verdict {
            Verdict::Ask => {
                self.suspect_server(server, now);
                return;
            }
            Verdict::Doubt => tracing::debug!(%peer, server, "the relay is in doubt, both carry"),
            Verdict::Keep => tracing::debug!(%peer, server, "the relay carries"),
            Verdict::Move => {
                state.in_use = spare;
                let relay = state.lane().map(|lane| lane.way.relay());
                tracing::info!(%peer, from = server, to = ?relay, "the session has moved to another server");
            }
        }
        self.route_over_relay(key, now);
        self.mend(key, now);
    }

    /// A server is in doubt: what it relays goes another way as well, and who waits for its answer asks another.
    pub(super) fn server_doubted(&mut self, index: usize, now: Instant) {
        if let Some(server) = self.servers.get_mut(index).filter(|server| server.up().is_some()) {
            tracing::info!(host = %server.address.host, "the rendezvous server does not answer");
            self.changes.announce(&server.address, ServerState::Silent);
            if server.relay_transport().is_some_and(|transport| transport != RelayTransport::Udp) {
                // TCP sends again ever more rarely (RFC 6298, section 5.5): another stream is there sooner than this one speaks again.
                server.reconnect();
            }
        }
        self.ask_others(index);
        self.mend_all(now);
    }

    /// A server goes away in so many seconds: what it relays goes over another one from now on, where there is one, and nothing is asked of it.
    pub(super) fn server_leaving(&mut self, index: usize, seconds: u32, now: Instant) {
        let Some(server) = self.servers.get_mut(index) else { return };
        tracing::info!(host = %server.address.host, seconds, "the rendezvous server goes away");
        server.leave();
        self.changes.announce(&server.address, ServerState::Leaving(seconds));
        self.ask_others(index);
        self.mend_all(now);
    }

    /// A limit of a server holds us back.
    pub(super) fn server_limited(&self, index: usize, limit: Limit) {
        if let Some(server) = self.servers.get(index) {
            tracing::warn!(host = %server.address.host, "the rendezvous server: {limit}");
            self.changes.announce(&server.address, ServerState::Limited(limit));
        }
    }

    /// A server has answered, by its relay or by a registration.
    pub(super) fn server_answered(&mut self, index: usize, now: Instant) {
        let urgent = self.is_awaited(index);
        let Some(server) = self.servers.get_mut(index) else { return };
        if server.answered(now) {
            tracing::info!(host = %server.address.host, "the rendezvous server answers again");
            self.changes.announce(&server.address, ServerState::Answers);
            if server.up().is_none() {
                // Whatever was tried while it was away waits for nothing.
                server.come_back(urgent, now);
            }
            self.mend_all(now);
        }
    }

    /// A server has not answered something, or what it should have passed on is unanswered: it is asked.
    pub(super) fn suspect_server(&mut self, index: usize, now: Instant) {
        if let Some(server) = self.servers.get_mut(index) {
            server.suspect(now);
            self.pump_servers(now);
        }
    }
}
