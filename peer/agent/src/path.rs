//! Sockets, families and paths.

use std::fmt;
use std::net::SocketAddr;

/// One of the caller's UDP sockets: a *base* (RFC 8445, section 4). The number is the caller's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SocketId(pub u32);

/// The address family that a socket is bound in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl From<SocketAddr> for Family {
    fn from(address: SocketAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// A candidate pair, by what makes it one here: the socket that sends and the address sent to.
///
/// A socket bound to the unspecified address reaches a remote address in one way only, the one that the system's
/// routes choose; two local candidates of one socket make the same packets (RFC 8445, 6.1.2.4, prunes them for that
/// reason).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Path {
    /// Ours.
    pub socket: SocketId,
    /// Theirs.
    pub remote: SocketAddr,
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} from socket {}", self.remote, self.socket.0)
    }
}

/// An address in the one form that compares equal: IPv4-mapped IPv6 unmapped, flow label and scope dropped.
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
