//! One remote endpoint as QUIC sees it: a synthetic address that stays, over a path that does not.

use std::net::{Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use arc_swap::ArcSwap;
use rendezvous_wire::message::{MAX_FIRST_FLIGHT, MAX_FLIGHT_DATAGRAM};
use rendezvous_wire::relay::Channel;

use super::congestion::PathEpoch;
use crate::tunnel::outlet::Outlet;

/// The index of one of the path socket's UDP sockets.
pub(crate) type SocketIndex = usize;

/// How datagrams for a remote leave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Route {
    /// No way is known yet: what quinn sends is kept as the first flight of an introduction.
    Capture,
    /// Straight to an address.
    Direct { socket: SocketIndex, address: SocketAddr },
    /// In frames to a relay.
    Relay { socket: SocketIndex, address: SocketAddr, channel: Channel },
    /// In frames to a relay, on a stream.
    Stream { outlet: Arc<Outlet>, channel: Channel },
}

/// A remote endpoint.
#[derive(Debug)]
pub(crate) struct Remote {
    /// What quinn takes for its address.
    pub(crate) synthetic: SocketAddr,
    /// Shared with the congestion controllers of its connections.
    pub(crate) epoch: Arc<PathEpoch>,
    route: ArcSwap<Route>,
    captured: Mutex<Vec<Vec<u8>>>,
}

impl Remote {
    /// A remote whose synthetic address is made of `number`, which no other remote of this endpoint has: a
    /// unique local address (RFC 4193) under a prefix of its own.
    pub(crate) fn new(number: u64, route: Route, now: Instant) -> Self {
        let [a, b, c, d] = [48, 32, 16, 0].map(|shift| (number >> shift) as u16);
        let address = Ipv6Addr::new(0xfd72, 0x656e, 0x6465, 0x7a76, a, b, c, d);
        Self {
            synthetic: SocketAddr::new(address.into(), 1),
            epoch: Arc::new(PathEpoch::new(now)),
            route: ArcSwap::from_pointee(route),
            captured: Mutex::default(),
        }
    }

    /// The present route.
    pub(crate) fn route(&self) -> arc_swap::Guard<Arc<Route>> {
        self.route.load()
    }

    /// Sends everything from now on by `route`. Gives false when that is what it does already.
    pub(crate) fn switch(&self, route: Route, now: Instant) -> bool {
        if **self.route.load() == route {
            return false;
        }
        let direct = matches!(route, Route::Direct { .. });
        let first = matches!(**self.route.load(), Route::Capture);
        self.route.store(Arc::new(route));
        if !first {
            self.epoch.advance(direct, now);
        }
        true
    }

    /// Keeps a datagram that has no route. Returns whether it is the first.
    pub(super) fn capture(&self, datagram: &[u8]) -> bool {
        let mut captured = self.captured.lock().unwrap_or_else(PoisonError::into_inner);
        if captured.len() < MAX_FIRST_FLIGHT && datagram.len() <= MAX_FLIGHT_DATAGRAM {
            captured.push(datagram.to_vec());
        }
        captured.len() == 1
    }

    /// Takes what was captured.
    pub(crate) fn take_captured(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut *self.captured.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
