//! What was tried and what came of it.

use std::net::SocketAddr;
use std::time::Duration;

use rendezvous_wire::candidate::CandidateKind;

use crate::agent::Path;

/// How far a pair has come (RFC 8445, 6.1.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum PairState {
    /// Not checked yet.
    Waiting,
    /// Checks are on their way.
    InProgress,
    /// Proven in both directions.
    Succeeded,
    /// No check was answered.
    Failed,
    /// Given up since another pair was selected.
    Abandoned,
}

/// One pair of this session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct PairReport {
    /// Our socket and the other side's address.
    pub path: Path,
    /// How the other side's address was learnt.
    pub remote_kind: CandidateKind,
    /// How far it has come.
    pub state: PairState,
    /// Checks sent on it so far.
    pub checks_sent: u32,
    /// Whether an authentic check of the other side has arrived on it.
    pub heard_from: bool,
    /// Round-trip time of the latest answered check.
    pub rtt: Option<Duration>,
    /// The address that the other side saw our check come from.
    pub mapped: Option<SocketAddr>,
    /// Whether it carries data.
    pub selected: bool,
}
