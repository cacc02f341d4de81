//! Which way a remote's datagrams go.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Instant;

use crate::config;
use crate::session::{Path, WeakSession};
use crate::socket::{Route, Straight};

use super::lanes::Lane;
use super::remote::RemoteState;
use super::{Driver, Key};

impl RemoteState {
    /// Tells its agent what has passed on the direct path, while that carries data.
    pub(super) fn watch_traffic(&mut self, now: Instant) {
        if let Some(introduced) =
            self.introduction.as_mut().filter(|_| self.remote.route().direct().is_some())
        {
            if let Some(alive) = introduced.ladder.agent().alive() {
                self.remote.meter.settle(alive, now);
            }
            introduced.ladder.handle_traffic(self.remote.meter.take(), now);
        }
    }

    /// Takes from QUIC what a sleep has left behind.
    pub(super) fn recover(&mut self, now: Instant) {
        let connections = || self.sessions.iter().filter_map(WeakSession::connection);
        if self.convalescence.poll(now, || connections().map(|connection| connection.rtt()).max()) {
            self.kick();
        }
    }

    /// Has every connection send something that wants an acknowledgement, which clears what a dead path has left in the
    /// loss detection. A window that grows by one byte is such a thing, and the application does not see it.
    pub(super) fn kick(&mut self) {
        self.kicks += 1;
        let window = config::RECEIVE_WINDOW.saturating_add(self.kicks);
        for connection in self.sessions.iter().filter_map(WeakSession::connection) {
            connection.set_receive_window(window.into());
        }
    }
}

impl Driver {
    pub(super) fn route_over_relay(&mut self, key: Key, now: Instant) {
        let Some(state) = self.remotes.get_mut(&key) else { return };
        let Some(lane) = state.lane() else { return };
        let (path, relay) = (lane.way.path(), lane.framed());
        let second = state.spare(&self.servers).filter(|_| state.relay_watch.is_doubtful()).map(Lane::framed);
        state.news.announce(path);
        state.widths.no_direct();
        if state.widths.relay(relay.clone(), now) {
            state.remote.set_wide(false, false);
        }
        let route = match second {
            Some(second) => Route::Relays { first: relay, second },
            None => Route::Relay(relay),
        };
        if state.remote.switch(route, now) {
            state.kick();
        }
    }

    /// Something was sent on a direct path where nothing was unanswered, or has come over the relay beside it.
    pub(super) fn watch_traffic(&mut self, key: Key, now: Instant) {
        if let Some(state) = self.remotes.get_mut(&key) {
            state.watch_traffic(now);
            self.pump(key, now);
            self.watch_relay(key, now);
        }
    }

    /// The direct path is in doubt: the relay carries everything as well.
    pub(super) fn route_both_ways(&mut self, key: Key, now: Instant) {
        let Some(state) = self.remotes.get_mut(&key) else { return };
        let Some(lane) = state.lane() else { return };
        let relay = lane.framed();
        let (Route::Direct(direct) | Route::Both { direct, .. }) = (**state.remote.route()).clone() else {
            return;
        };
        if state.widths.relay(relay.clone(), now) {
            state.remote.set_wide(false, false);
        }
        if state.remote.switch(Route::Both { direct, relay }, now) {
            state.kick();
        }
    }

    /// Leaves a direct path, unless it begins at an address that this machine has had all along.
    pub(super) fn leave_unless_kept(&mut self, key: Key, kept: &BTreeSet<IpAddr>, now: Instant) {
        let Some(state) = self.remotes.get_mut(&key) else { return };
        let Some(Path::Direct { local, remote, .. }) = state.news.path() else { return };
        let here = local_address(Some(SocketAddr::new(unspecified(local), local.port())), remote);
        if here == local && kept.contains(&local.ip()) {
            return;
        }
        tracing::debug!(peer = %state.peer.short(), %local, "the direct path began in another network");
        state.selected = None;
        self.route_over_relay(key, now);
    }

    /// The handshake is confirmed: a direct path may carry data.
    pub(super) fn confirmed(&mut self, key: Key, now: Instant) {
        if let Some(state) = self.remotes.get_mut(&key) {
            state.confirmed = true;
            self.route_directly(key, now);
        }
    }

    /// Moves to the selected path, unless the handshake is still on its way: data that overtakes it is thrown away.
    pub(super) fn route_directly(&mut self, key: Key, now: Instant) {
        let Some(state) = self.remotes.get_mut(&key) else { return };
        let Some(selected) = state.selected.filter(|_| state.confirmed) else { return };
        let remote = selected.path.remote;
        let Some(socket) = state.extras.index(selected.path.socket) else { return };
        let rung = state.introduction.as_ref().map(|introduced| introduced.ladder.rung(selected.path));
        let path = Path::Direct {
            local: local_address(self.socket.local_address(socket), remote),
            remote,
            kind: selected.remote_kind,
            rung: rung.unwrap_or(peer_agent::Rung::Plain),
            rtt: selected.rtt,
        };
        let straight = Straight { socket, address: remote };
        if state.remote.switch(Route::Direct(straight), now) {
            state.widths.direct(straight, now);
            state.news.note(|milestones| {
                milestones.direct.get_or_insert(now);
            });
            tracing::debug!(peer = %state.peer.short(), %path, "switched");
            state.news.announce(path);
            state.kick();
        }
    }
}

/// Any address, of the same family.
fn unspecified(address: SocketAddr) -> IpAddr {
    if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
}

/// The address that the system sends from on the way to `remote`; what the socket is bound to when it does not say.
fn local_address(bound: Option<SocketAddr>, remote: SocketAddr) -> SocketAddr {
    let bound = bound.unwrap_or_else(|| SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0));
    if !bound.ip().is_unspecified() {
        return bound;
    }
    // Connecting a UDP socket sends nothing; it asks the routing table.
    let routed = std::net::UdpSocket::bind(SocketAddr::new(bound.ip(), 0))
        .and_then(|socket| socket.connect(remote).and_then(|()| socket.local_addr()));
    routed.map_or(bound, |routed| SocketAddr::new(routed.ip(), bound.port()))
}
