//! What was tried and what came of it: the answer to "why am I relayed?"

use std::net::SocketAddr;
use std::time::Duration;

use rendezvous_wire::CandidateKind;

use crate::path::Path;

/// State of a pair (RFC 8445, 6.1.2.6, without Frozen).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum PairState {
    /// Not checked yet in this round.
    Waiting,
    /// Checked, not answered yet.
    InProgress,
    /// A check was answered.
    Succeeded,
    /// No check was answered.
    Failed,
    /// Given up in favour of the selected path.
    Superseded,
}

/// Why a pair has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum CheckError {
    /// No answer.
    #[error("no answer")]
    Timeout,
    /// The answer came from another address than the check was sent to (RFC 8445, 7.2.5.2.1).
    #[error("answered from another address")]
    NotSymmetric,
    /// An authentic error response.
    #[error("refused with error {0}")]
    Refused(u16),
    /// The path was in use and consent was lost (RFC 7675).
    #[error("was in use and went silent")]
    ConsentLost,
}

/// A pair that was tried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairReport {
    /// The pair.
    pub path: Path,
    /// The kind of the remote candidate.
    pub remote_kind: CandidateKind,
    /// Pair priority (RFC 8445, 6.1.2.3).
    pub priority: u64,
    /// State in the running or the last round.
    pub state: PairState,
    /// Whether data uses it.
    pub selected: bool,
    /// Checks sent since the agent began.
    pub checks_sent: u64,
    /// Checks answered since the agent began.
    pub checks_answered: u64,
    /// Authentic checks of the other side that came on it. More than zero while none of ours is answered: the path
    /// works one way.
    pub checks_received: u64,
    /// Smoothed round-trip time.
    pub rtt: Option<Duration>,
    /// Our address as the other side last saw it on this pair.
    pub mapped: Option<SocketAddr>,
    /// Why it failed, in the running round or the last one that has ended.
    pub error: Option<CheckError>,
}
