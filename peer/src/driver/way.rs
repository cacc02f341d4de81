//! How a relay is reached, over UDP or on a stream, and moving from one to the other with all that is relayed.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rendezvous_wire::message::{RegistrationId, Request};
use rendezvous_wire::relay::Channel;

use crate::session::{Path, RelayTransport};
use crate::socket::{Carrier, Framed, Route, SocketIndex};
use crate::tunnel::Tunnel;
use crate::tunnel::outlet::Outlet;

use super::lanes::Lane;
use super::remote::RemoteState;
use super::{Driver, Key};

/// How long a stream that has been left stays open for what the relay still had in it.
const LINGER: Duration = Duration::from_secs(1);

/// How a relay is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Way {
    /// In datagrams from this socket.
    Udp { socket: SocketIndex, relay: SocketAddr },
    /// On a stream.
    Stream { relay: SocketAddr, through_proxy: bool, outlet: Arc<Outlet> },
}

impl Way {
    pub(super) fn stream(tunnel: &Tunnel) -> Self {
        let outlet = tunnel.outlet.clone();
        Self::Stream { relay: tunnel.address, through_proxy: tunnel.through_proxy, outlet }
    }

    /// The address under which the relay's channels are known here.
    pub(super) fn relay(&self) -> SocketAddr {
        match self {
            Self::Udp { relay, .. } | Self::Stream { relay, .. } => *relay,
        }
    }

    pub(super) fn transport(&self) -> RelayTransport {
        match self {
            Self::Udp { .. } => RelayTransport::Udp,
            Self::Stream { through_proxy: false, .. } => RelayTransport::Tcp,
            Self::Stream { through_proxy: true, .. } => RelayTransport::Proxy,
        }
    }

    /// The way to the other side on a channel.
    pub(super) fn framed(&self, channel: Channel) -> Framed {
        let carrier = match self {
            Self::Udp { socket, relay } => Carrier::Udp { socket: *socket, address: *relay },
            Self::Stream { relay, outlet, .. } => Carrier::Stream { address: *relay, outlet: outlet.clone() },
        };
        Framed { carrier, channel }
    }

    /// How a path through the relay is shown.
    pub(super) fn path(&self) -> Path {
        Path::Relayed { relay: self.relay(), over: self.transport() }
    }
}

/// The streams to one server: at most the one in use and the one just left.
#[derive(Default)]
pub(super) struct Streams {
    current: Option<Tunnel>,
    left: Option<(Instant, Tunnel)>,
}

impl Streams {
    /// A new one takes the place of all others.
    pub(super) fn enter(&mut self, tunnel: Tunnel) {
        *self = Self { current: Some(tunnel), left: None };
    }

    /// Asks the one in use for an answer.
    pub(super) fn ask(&self) {
        if let Some(tunnel) = &self.current {
            tunnel.ask();
        }
    }

    /// UDP has taken its place.
    pub(super) fn leave(&mut self, now: Instant) {
        self.left = self.current.take().map(|tunnel| (now + LINGER, tunnel)).or(self.left.take());
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.left.as_ref().map(|(until, _)| *until)
    }

    pub(super) fn handle_timeout(&mut self, now: Instant) {
        self.left.take_if(|(until, _)| *until <= now);
    }
}

impl RemoteState {
    /// The relay at `server` is reached in another way. `None`: that is nothing to this remote.
    fn move_relay(&mut self, server: usize, registration: RegistrationId, way: &Way) -> Option<()> {
        let mut moved = None;
        let here = |lane: &&mut Lane| lane.server == server && lane.registration == registration;
        for lane in self.lanes_mut().filter(here).filter(|lane| lane.way != *way) {
            let former = std::mem::replace(&mut lane.way, way.clone()).relay();
            lane.former.retain(|relay| *relay != former && *relay != way.relay());
            if former != way.relay() {
                lane.former.push(former);
            }
            moved = Some(());
        }
        moved
    }
}

impl Driver {
    /// The relay of a server is reached in another way: so is everybody whose channel hangs on our registration there.
    pub(super) fn move_relayed(&mut self, index: usize, now: Instant) {
        let Some(up) = self.servers.get(index).and_then(super::Server::up) else { return };
        let keys: Vec<Key> = self
            .remotes
            .iter_mut()
            .filter_map(|(key, state)| state.move_relay(index, up.registration, &up.way).map(|_| *key))
            .collect();
        tracing::debug!(
            server = index,
            transport = up.way.transport().name(),
            sessions = keys.len(),
            "the relay is reached"
        );
        for key in keys {
            self.rejoin_channel(key, now);
        }
    }

    /// UDP is back and it is known where we are seen: both sides of what is relayed can try for a direct path.
    pub(super) fn renew_relayed(&mut self, index: usize) {
        let relayed = self.remotes.values().filter(|state| state.is_live() && state.selected.is_none());
        let introductions: Vec<_> = relayed
            .filter_map(|state| Some((state.introduction_id()?, state.precedence.next_round())))
            .filter(|((server, _), _)| *server == index)
            .collect();
        for ((_, introduction), round) in introductions {
            self.request(index, Request::Renew(introduction, round));
        }
    }

    /// The relay is reached in another way: its channel is known there too, and what is relayed goes there.
    fn rejoin_channel(&mut self, key: Key, now: Instant) {
        let Some(state) = self.remotes.get(&key) else { return };
        let known: Vec<_> = state.lanes().flat_map(Lane::names).map(|name| (name, key)).collect();
        let route = (**state.remote.route()).clone();
        self.socket.update(|table| table.channels.extend(known));
        match route {
            Route::Relay(_) | Route::Relays { .. } => self.route_over_relay(key, now),
            Route::Both { .. } => self.route_both_ways(key, now),
            Route::Capture | Route::Direct(_) => {}
        }
    }
}
