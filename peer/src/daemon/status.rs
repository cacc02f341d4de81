//! How a daemon is, for people and for programs.

use std::collections::BTreeMap;

use rendezvous_wire::{PeerId, RendezvousAddress};
use serde::{Deserialize, Serialize};

use super::message::text;
use crate::server_changes::{ServerStanding, Standing};

/// How a daemon is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Its process.
    pub pid: u32,
    /// The key that it is known by.
    #[serde(with = "text")]
    pub id: PeerId,
    /// The program's version.
    pub version: String,
    /// Since when it runs, by RFC 3339.
    pub since: String,
    /// How it stands with its rendezvous servers.
    pub servers: Vec<ServerStatus>,
    /// Sessions, the oldest first.
    pub sessions: Vec<SessionStatus>,
    /// Commands that wait for what peers bring.
    pub waiting: Vec<CommandStatus>,
    /// What is served.
    #[serde(flatten)]
    pub serving: ServingStatus,
}

/// How it stands with a rendezvous server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerStatus {
    /// Its address.
    #[serde(with = "text")]
    pub server: RendezvousAddress,
    /// `registered`, `connecting`, `silent` or `down`.
    pub state: String,
    /// `udp`, `tcp` or `proxy`, where it is registered.
    pub over: Option<String>,
    /// Why not, where it is down.
    pub message: Option<String>,
}

impl From<ServerStanding> for ServerStatus {
    fn from(standing: ServerStanding) -> Self {
        let (state, over, message) = match standing.state {
            Standing::Registered(over) => ("registered", Some(over.name().to_owned()), None),
            Standing::Connecting => ("connecting", None, None),
            Standing::Silent => ("silent", None, None),
            Standing::Down(error) => ("down", None, Some(error.to_string())),
        };
        Self { server: standing.server, state: state.to_owned(), over, message }
    }
}

/// A session.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SessionStatus {
    /// The other side.
    #[serde(with = "text")]
    pub peer: PeerId,
    /// What people call it.
    pub alias: Option<String>,
    /// Whether this side has opened it.
    pub dialled: bool,
    /// Since when it stands, by RFC 3339.
    pub since: String,
    /// Whether its path is direct.
    pub direct: bool,
    /// Its path, in words.
    pub path: Option<String>,
    /// Our address, where the path is direct.
    pub local: Option<String>,
    /// The other side's address, or the relay's.
    pub remote: Option<String>,
    /// The round-trip time that QUIC measures, in milliseconds.
    pub rtt_ms: f64,
    /// Bytes that its paths have carried.
    pub bytes: BytesStatus,
    /// The commands that use it.
    pub commands: Vec<CommandStatus>,
    /// Streams of the other side's that are being served.
    pub served: usize,
}

/// Bytes of datagrams that carry QUIC, retransmissions and all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BytesStatus {
    /// Sent without a relay.
    pub direct_sent: u64,
    /// Received without a relay.
    pub direct_received: u64,
    /// Sent over a relay.
    pub relayed_sent: u64,
    /// Received over a relay.
    pub relayed_received: u64,
}

/// A command that uses the daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandStatus {
    /// As it was started.
    pub command: String,
    /// Its process.
    pub pid: u32,
    /// Since when, by RFC 3339.
    pub since: String,
    /// Its streams at the moment.
    pub streams: usize,
}

/// What is served, and what was refused.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServingStatus {
    /// What to whom.
    pub serves: Vec<ServesStatus>,
    /// Requests that were served since the daemon's start.
    pub accepted: u64,
    /// Requests that were refused since then, by the ids of those who made them, or their names.
    pub refused: BTreeMap<String, u64>,
    /// What is wrong with the configuration, of which the state before holds.
    pub problem: Option<String>,
}

/// What some peers may use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServesStatus {
    /// Who.
    pub to: Vec<String>,
    /// Where connections may be made to.
    pub forward: Vec<String>,
    /// Where they may have us listen.
    pub listen: Vec<String>,
    /// Whether they may measure what a session carries.
    pub bench: bool,
}
