//! What comes out of an agent.

use std::net::SocketAddr;
use std::time::Duration;

use rendezvous_wire::CandidateKind;

use crate::path::Path;

/// A datagram to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transmit {
    /// From which socket and where to.
    pub path: Path,
    /// A whole STUN message, at most 200 bytes with the credentials of an introduction.
    pub datagram: Vec<u8>,
    /// The hop limit to send with; the system's own when `None`.
    pub ttl: Option<u8>,
}

/// The path that data should use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Selected {
    /// The path.
    pub path: Path,
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// The kind of the remote candidate.
    pub remote_kind: CandidateKind,
}

/// What the caller should know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// An authenticated check came from here: traffic from this address belongs to this session.
    SourceKnown(Path),
    /// Our own check was answered: the path is proven both ways. Once per pair and round.
    Proven {
        /// The path.
        path: Path,
        /// Round-trip time of the check.
        rtt: Duration,
        /// The kind of the remote candidate.
        remote_kind: CandidateKind,
    },
    /// The other side sees us at an address that is none of our candidates: a peer-reflexive one (RFC 8445,
    /// 7.2.5.3.1).
    Mapped {
        /// The path of the check that told us.
        path: Path,
        /// Our address as the other side sees it.
        mapped: SocketAddr,
    },
    /// Data should use this path from now on.
    Selected(Selected),
    /// Traffic on the selected path is unanswered, or the other side no longer trusts it: data should use the relay
    /// as well.
    Doubtful {
        /// The path.
        path: Path,
    },
    /// The selected path was in doubt and is proven again: data should use it alone.
    Trusted {
        /// The path.
        path: Path,
    },
    /// Data should no longer use this path, and there is no other: back to the relay.
    Deselected {
        /// The path.
        path: Path,
        /// Why.
        reason: DeselectReason,
    },
    /// A round of checks ended and no path is proven. It will be repeated.
    Exhausted,
}

/// Why a path carries no data any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum DeselectReason {
    /// No answer for [`consent_timeout`](crate::Timers::consent_timeout) (RFC 7675, section 5.1).
    #[error("consent expired")]
    ConsentExpired,
    /// A whole volley went unanswered, which nominated it or asked whether it is still alive.
    #[error("a volley of checks went unanswered")]
    Unanswered,
    /// Traffic was unanswered, and every check that asked why ([`Timers::doubt`](crate::Timers::doubt)).
    #[error("traffic and the checks that followed went unanswered")]
    TrafficUnanswered,
}
