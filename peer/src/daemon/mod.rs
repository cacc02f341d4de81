//! One endpoint for all programs of a user.
//!
//! A daemon keeps the registration, and a session with a peer for as long as somebody uses it. Commands ask it, over a Unix socket, for a *share* of
//! a session: a [`Session`](crate::Session) like any other, whose streams and datagrams the daemon passes on. [`Access`] is the seam: whoever opens sessions by it need not
//! know whether they are its own.
//!
//! | module | what |
//! |---|---|
//! | `message` | what a command and the daemon say to each other, and its frames; `line`, one end of the socket; `place`, where it is and who may use it |
//! | `packets` | QUIC over that socket: a share is a QUIC connection between the command and the daemon |
//! | `client` | the command's end |
//! | `server` | the daemon's: `sessions`, which there are and who uses them; `share`, one use; `splice`, stream to stream |
//! | `status` | how it is |
//!
//! What a peer asks for goes to the daemon's [`Host`], or to a command that [serves](Wanted) it.

mod access;
mod client;
mod line;
mod message;
mod packets;
mod place;
mod server;
mod sessions;
mod share;
mod splice;
mod status;

#[cfg(test)]
mod daemon_tests;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use rendezvous_wire::PeerId;

pub use access::Access;
pub(crate) use client::Leased;
pub use client::{Client, Serving, down, reload, status};
pub use message::{Explained, Wanted};
pub use place::default_place;
pub use server::{Daemon, End, Host};
pub use status::{
    BytesStatus, CommandStatus, ServerStatus, ServesStatus, ServingStatus, SessionStatus, Status,
};

/// Application close codes between a command and the daemon.
mod close {
    /// The daemon ends.
    pub(super) const DAEMON_ENDS: u32 = 0x5e20;
    /// The session beneath has ended otherwise than by the other side's word.
    pub(super) const SESSION_LOST: u32 = 0x5e21;
}

/// Why a daemon cannot be used, or cannot be one.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum DaemonError {
    /// Nobody listens there.
    #[error("no daemon runs: nobody listens at {}. `peer up` starts one", path.display())]
    NotRunning {
        /// Where it would.
        path: PathBuf,
    },
    /// Whoever listens there is somebody else, or takes us for somebody else.
    #[error(
        "the daemon at {} is another user's, or what is there is not for you. Name your own with --control, or use --alone",
        path.display()
    )]
    Foreign {
        /// Where.
        path: PathBuf,
    },
    /// Whoever listens there is no daemon of ours.
    #[error("what listens at {} is no daemon of `peer`, or does not answer. Name another place with --control", path.display())]
    Mute {
        /// Where.
        path: PathBuf,
    },
    /// It is of another version.
    #[error(
        "the daemon (process {pid}) speaks version {theirs} of its protocol, and this program version {}. Start it again: `peer down`, `peer up`",
        message::VERSION
    )]
    Version {
        /// Its process.
        pid: u32,
        /// Its version.
        theirs: u32,
    },
    /// It is known by another key.
    #[error("the daemon (process {pid}) is known as {theirs}, and this command as {own}")]
    Identity {
        /// Its process.
        pid: u32,
        /// Its id.
        theirs: PeerId,
        /// Ours.
        own: PeerId,
    },
    /// It has ended.
    #[error(
        "the daemon (process {pid}) has ended, and this command's sessions with it. Start it again with `peer up`, or use --alone"
    )]
    Gone {
        /// Its process.
        pid: u32,
    },
    /// It could not do what was asked for.
    #[error("{0}")]
    Failed(String),
    /// Another daemon has that key.
    #[error(
        "another daemon runs with the key {}. `peer status` shows it, `peer down` ends it; each identity has one",
        key.display()
    )]
    IdentityTaken {
        /// The key file.
        key: PathBuf,
    },
    /// Another daemon has that socket.
    #[error("another daemon listens at {}. Name another place with --control, or end it with `peer down`", path.display())]
    PlaceTaken {
        /// Where.
        path: PathBuf,
    },
    /// Something else is there.
    #[error("{} is there and is no socket. Move it away, or name another place with --control", path.display())]
    NoSocket {
        /// Where.
        path: PathBuf,
    },
    /// Others could get at the socket.
    #[error("the control socket's folder {0} is open to others (mode {mode:04o}). Close it with `chmod 700 {0}`", path.display())]
    OpenDirectory {
        /// The folder.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The folder is somebody else's.
    #[error("the control socket's folder {} is another user's. Name one of your own with --control", path.display())]
    ForeignDirectory {
        /// The folder.
        path: PathBuf,
    },
    /// The system does not let us.
    #[error("{}: {source}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// What it says.
        source: Arc<io::Error>,
    },
}
