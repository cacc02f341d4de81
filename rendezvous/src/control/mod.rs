//! The live commands: what an operator asks of a running server, over a Unix socket that is the server's own user's and root's.
//!
//! One connection is one question: a line of JSON each way. [`ask`] is the client's end.

mod listener;

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use rendezvous_wire::PeerId;

pub(crate) use listener::{Desk, listen};

/// Name of the socket in the state directory.
pub const SOCKET_NAME: &str = "control.sock";

/// Most bytes of a question.
pub const MOST_QUESTION: u64 = 16 * 1024;

/// Most bytes of an answer: some 200 for each of all the registrations that a server takes, several times over.
const MOST_ANSWER: u64 = 64 * 1024 * 1024;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// A question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "ask", deny_unknown_fields)]
pub enum Question {
    /// Let a peer in whatever the mode.
    Admit {
        /// Whom.
        #[serde(serialize_with = "write_id", deserialize_with = "read_id")]
        peer: PeerId,
        /// For the operator.
        note: String,
    },
    /// Take that back.
    Withdraw {
        /// From whom.
        #[serde(serialize_with = "write_id", deserialize_with = "read_id")]
        peer: PeerId,
    },
    /// Who was let in so.
    Admitted,
    /// Ban a peer, and end what it has.
    Ban {
        /// Whom.
        #[serde(serialize_with = "write_id", deserialize_with = "read_id")]
        peer: PeerId,
        /// For how long.
        seconds: Option<u64>,
        /// For the peer.
        reason: String,
    },
    /// Take a ban back.
    Unban {
        /// From whom.
        #[serde(serialize_with = "write_id", deserialize_with = "read_id")]
        peer: PeerId,
    },
    /// Who is banned.
    Banned,
    /// Make a token.
    NewToken {
        /// How many peers it admits.
        uses: u32,
        /// For how long.
        seconds: Option<u64>,
        /// For the operator.
        note: String,
    },
    /// Which there are.
    Tokens,
    /// Take one back. Whom it has admitted stays.
    WithdrawToken {
        /// Its number.
        number: u64,
    },
    /// Who is registered.
    Peers,
    /// What the relay has channels for.
    Sessions,
    /// Numbers.
    Stats,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It is done, and on disk; whether anything has changed.
    Done(bool),
    /// It cannot be done.
    Failed(String),
    /// A token, told once.
    Token(NewToken),
    /// Of [`Question::Tokens`].
    Tokens(Vec<TokenRow>),
    /// Of [`Question::Admitted`].
    Admitted(Vec<AdmittedRow>),
    /// Of [`Question::Banned`].
    Banned(Vec<BanRow>),
    /// Of [`Question::Peers`].
    Peers(Vec<PeerRow>),
    /// Of [`Question::Sessions`].
    Sessions(Vec<SessionRow>),
    /// Of [`Question::Stats`].
    Stats(Box<Stats>),
}

/// A token, told once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewToken {
    /// Its number.
    pub number: u64,
    /// The token itself.
    pub token: String,
    /// The server's address with it, for `peer init`.
    pub address: String,
}

/// A token as it is listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRow {
    /// Its number.
    pub number: u64,
    /// How many peers it admits.
    pub uses: u32,
    /// How many it has admitted.
    pub used: u32,
    /// Since when.
    pub made: String,
    /// Until when.
    pub expires: Option<String>,
    /// The operator's words.
    pub note: String,
}

/// A peer that was let in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdmittedRow {
    /// Whom.
    pub peer: String,
    /// Since when.
    pub since: String,
    /// The number of the token that it has presented.
    pub token: Option<u64>,
    /// The operator's words.
    pub note: String,
}

/// A ban.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BanRow {
    /// Whom.
    pub peer: String,
    /// Since when.
    pub since: String,
    /// Until when.
    pub until: Option<String>,
    /// What the peer is told.
    pub reason: String,
}

/// A registration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerRow {
    /// Whose.
    pub peer: String,
    /// Where its signalling comes from.
    pub source: SocketAddr,
    /// `udp` or `tcp`.
    pub over: String,
    /// How long this connection has been there.
    pub seconds: u64,
    /// Candidates that it offers.
    pub candidates: usize,
    /// Relay channels of which the registration is an end.
    pub channels: usize,
    /// Bytes that the relay has carried from and to the peer this month.
    pub relayed_this_month: u64,
}

/// An introduction with its relay channel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionRow {
    /// Who has asked.
    pub asker: String,
    /// For whom.
    pub target: String,
    /// The relay channel's number.
    pub channel: u32,
}

/// Numbers of a running server.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// The program's version.
    pub version: String,
    /// Seconds since the start.
    pub seconds: u64,
    /// Registrations that are online.
    pub registrations: usize,
    /// Different peers of these.
    pub peers: usize,
    /// Introductions in force; as many relay channels are open.
    pub sessions: usize,
    /// Connections that have not registered.
    pub unregistered: usize,
    /// Newcomers a second, over the last ten seconds or so.
    pub newcomers_a_second: f64,
    /// Newcomers that were asked for work since the start.
    pub challenged: u64,
    /// Registrations refused since the start.
    pub refused: u64,
    /// Frames that the relay has forwarded since the start.
    pub relay_forwarded: u64,
    /// Bytes of these.
    pub relay_forwarded_bytes: u64,
    /// Runs of frames without a channel or a binding.
    pub relay_refused: u64,
    /// Runs of frames that a stream did not take in time.
    pub relay_dropped: u64,
    /// Runs of frames over a limit.
    pub relay_limited: u64,
    /// STUN answers.
    pub stun_answered: u64,
    /// Datagrams that the kernel dropped.
    pub overflowed: u64,
    /// Bytes a second that everybody may send at present, where the relay is full.
    pub relay_share: Option<u64>,
    /// Whether the server is going away.
    pub leaving: bool,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AskError {
    /// No socket, or nobody behind it.
    #[error("no server answers at {}: {source}. Is `rendezvous serve` running? With another state directory, say so with --state-dir", path.display())]
    Absent {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not ours to ask.
    #[error("{} belongs to the server's own user: run this as that user or as root (with sudo)", path.display())]
    Denied {
        /// The socket.
        path: PathBuf,
    },
    /// Half an answer, or none.
    #[error("the server has not answered: {0}")]
    Broken(#[from] io::Error),
    /// An answer of another version.
    #[error(
        "the server's answer cannot be read, so it is of another version than this program; restart it: {0}"
    )]
    Version(#[from] serde_json::Error),
}

/// Asks the server behind a socket. Blocks.
///
/// # Errors
///
/// When there is none, when it is not ours to ask, or when it does not answer.
pub fn ask(path: &Path, question: &Question) -> Result<Answer, AskError> {
    let mut stream = UnixStream::connect(path).map_err(|source| match source.kind() {
        io::ErrorKind::PermissionDenied => AskError::Denied { path: path.to_owned() },
        _ => AskError::Absent { path: path.to_owned(), source },
    })?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = serde_json::to_string(question)?;
    line.push('\n');
    let mut answer = String::new();
    let written = stream.write_all(line.as_bytes());
    let read = written.and_then(|()| BufReader::new(stream.take(MOST_ANSWER)).read_line(&mut answer));
    // A server that does not let us ask hangs up at once.
    let hung_up = |error: &io::Error| {
        matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
    };
    match read {
        Ok(0) => Err(AskError::Denied { path: path.to_owned() }),
        Err(error) if hung_up(&error) => Err(AskError::Denied { path: path.to_owned() }),
        Err(error) => Err(error.into()),
        Ok(_) => Ok(serde_json::from_str(&answer)?),
    }
}

fn write_id<S: Serializer>(id: &PeerId, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(id)
}

fn read_id<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PeerId, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_survive_their_line() {
        let peer = PeerId::from_bytes([3; 32]);
        let question = Question::Ban { peer, seconds: Some(60), reason: "loud\nand rude".into() };
        let line = serde_json::to_string(&question).unwrap();
        assert!(!line.contains('\n') && line.contains(&peer.to_string()), "{line}");
        assert_eq!(serde_json::from_str::<Question>(&line).unwrap(), question);
        assert!(serde_json::from_str::<Question>("{\"ask\":\"everything\"}").is_err());
    }

    #[test]
    fn a_server_that_is_not_there_is_named_with_a_way_out() {
        let error = ask(Path::new("/nonexistent/control.sock"), &Question::Peers).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/control.sock") && error.contains("--state-dir"), "{error}");
    }
}
