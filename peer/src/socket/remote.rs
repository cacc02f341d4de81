//! One remote endpoint as QUIC sees it: a synthetic address that stays, over a path that does not.

use std::net::{Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use arc_swap::ArcSwap;
use rendezvous_wire::message::{MAX_FIRST_FLIGHT, MAX_FLIGHT_DATAGRAM};
use rendezvous_wire::relay::Channel;

use super::congestion::PathEpoch;
use super::meter::Meter;
use super::pieces::Reassembly;
use super::relay_meter::RelayMeter;
use crate::tunnel::outlet::Outlet;

/// The index of one of the path socket's UDP sockets.
pub(crate) type SocketIndex = usize;

/// How datagrams for a remote leave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Route {
    /// No way is known yet: what quinn sends is kept as the first flight of an introduction.
    Capture,
    /// Straight to an address.
    Direct(Straight),
    /// In frames to a relay.
    Relay(Framed),
    /// Everything both ways, while the direct one is in doubt. QUIC drops whichever copy comes second.
    Both { direct: Straight, relay: Framed },
    /// Everything over two relays, while the first is in doubt.
    Relays { first: Framed, second: Framed },
}

/// Straight to an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Straight {
    pub(crate) socket: SocketIndex,
    pub(crate) address: SocketAddr,
}

/// In frames to a relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Framed {
    pub(crate) carrier: Carrier,
    pub(crate) channel: Channel,
}

/// How frames reach a relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Carrier {
    /// In datagrams.
    Udp { socket: SocketIndex, address: SocketAddr },
    /// On a stream to, or through, this address.
    Stream { address: SocketAddr, outlet: Arc<Outlet> },
}

impl Framed {
    /// Where what the relay sends comes from.
    pub(super) fn source(&self) -> SocketAddr {
        match &self.carrier {
            Carrier::Udp { address, .. } | Carrier::Stream { address, .. } => *address,
        }
    }
}

impl Route {
    /// Where it goes without a relay.
    pub(crate) fn direct(&self) -> Option<SocketAddr> {
        match self {
            Self::Direct(direct) | Self::Both { direct, .. } => Some(direct.address),
            Self::Capture | Self::Relay(_) | Self::Relays { .. } => None,
        }
    }

    /// The relay in use, unless a direct path is.
    fn relay(&self) -> Option<&Framed> {
        match self {
            Self::Relay(relay) | Self::Relays { first: relay, .. } => Some(relay),
            Self::Capture | Self::Direct(_) | Self::Both { .. } => None,
        }
    }
}

/// Bytes of QUIC that have gone each way, retransmissions and all. What goes over two paths at the same time counts on both.
#[derive(Debug, Default)]
pub(crate) struct Carried {
    pub(crate) direct_sent: AtomicU64,
    pub(crate) direct_received: AtomicU64,
    pub(crate) relayed_sent: AtomicU64,
    pub(crate) relayed_received: AtomicU64,
}

/// A remote endpoint.
#[derive(Debug)]
pub(crate) struct Remote {
    /// What quinn takes for its address.
    pub(crate) synthetic: SocketAddr,
    /// Shared with the congestion controllers of its connections.
    pub(crate) epoch: Arc<PathEpoch>,
    route: ArcSwap<Route>,
    /// Of the direct route.
    pub(crate) meter: Meter,
    /// Of the relayed one.
    pub(crate) relay_meter: RelayMeter,
    pub(crate) carried: Arc<Carried>,
    /// Whether the direct path, and the relayed one, are known to carry datagrams of full size.
    pub(super) direct_is_wide: AtomicBool,
    pub(super) relay_is_wide: AtomicBool,
    /// Of the next datagram that goes in two pieces.
    pub(super) number: AtomicU16,
    pub(super) pieces: Mutex<Reassembly>,
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
            meter: Meter::new(now),
            relay_meter: RelayMeter::new(now),
            carried: Arc::default(),
            direct_is_wide: AtomicBool::new(false),
            relay_is_wide: AtomicBool::new(false),
            number: AtomicU16::new(0),
            pieces: Mutex::default(),
            captured: Mutex::default(),
        }
    }

    /// The present route.
    pub(crate) fn route(&self) -> arc_swap::Guard<Arc<Route>> {
        self.route.load()
    }

    /// Sends everything from now on by `route`. Gives false when that is what it does already.
    pub(crate) fn switch(&self, route: Route, now: Instant) -> bool {
        let before = self.route.load_full();
        if *before == route {
            return false;
        }
        let direct = matches!(route, Route::Direct(_));
        // The relay goes on as it is when the direct route beside it ends.
        let same = match (&*before, &route) {
            (Route::Capture, _) | (Route::Both { .. }, Route::Relay(_)) => true,
            // One of the two goes on as it is.
            (Route::Relays { first, second }, Route::Relay(relay)) => relay == first || relay == second,
            _ => false,
        };
        if before.relay() != route.relay() {
            self.relay_meter.reset();
        }
        if before.direct() != route.direct() {
            self.meter.reset();
            self.direct_is_wide.store(false, Ordering::Relaxed);
        }
        self.route.store(Arc::new(route));
        if !same {
            self.epoch.advance(direct, now);
        }
        true
    }

    /// The same way carries again after it has not for a while: what was sent before is lost, and says nothing of what is sent now.
    pub(crate) fn begin_anew(&self, now: Instant) {
        self.epoch.advance(matches!(**self.route.load(), Route::Direct(_)), now);
    }

    /// Whether its direct path, or its relayed one, carries datagrams of full size; until then longer ones go in pieces.
    pub(crate) fn set_wide(&self, direct: bool, wide: bool) {
        let which = if direct { &self.direct_is_wide } else { &self.relay_is_wide };
        which.store(wide, Ordering::Relaxed);
    }

    /// A datagram of its own, or several that came as one, has come from `source`, over a relay or not. True when the driver has to be told.
    pub(super) fn note_received(&self, source: SocketAddr, relayed: bool, length: usize) -> bool {
        let received = if relayed { &self.carried.relayed_received } else { &self.carried.direct_received };
        received.fetch_add(length as u64, Ordering::Relaxed);
        let route = self.route.load();
        if let Some(relay) = route.relay() {
            return relayed && self.relay_meter.note_received(relay.source() == source);
        }
        let Some(direct) = route.direct() else { return false };
        if relayed {
            return self.meter.note_copy();
        }
        if direct == source {
            self.meter.note_received();
        }
        false
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
