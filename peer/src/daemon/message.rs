//! What a command and the daemon say to each other, and how it is framed.
//!
//! On the stream socket are frames: one byte of [`Kind`], a 24-bit big-endian length, the body. A control frame's body is one JSON object; a
//! packet's is a QUIC packet of the connection between the two, see [`packets`](super::packets). The daemon begins with a [`Hello`]; a command answers with one [`Ask`].

use std::fmt::Display;
use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;

use peer_agent::Rung;
use rendezvous_wire::candidate::CandidateKind;
use rendezvous_wire::message::{IntroductionPolicy, Limit, NotIntroduced};
use rendezvous_wire::{PeerId, RendezvousAddress};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::status::Status;
use crate::endpoint::ConnectError;
use crate::server_changes::{ServerChange, ServerState};
use crate::session::{Path, RelayTransport};
use crate::signalling::ServerError;

/// The version of all this. Both sides are the same program, so that a difference means that one of them was replaced and the other has yet to
/// be started anew.
pub(super) const VERSION: u32 = 1;

/// Bytes before a frame's body.
pub(super) const HEADER_LEN: usize = 4;

/// Most bytes of a control frame: the status of a daemon with some thousand sessions.
pub(super) const MAX_CONTROL: usize = 4 << 20;

/// Most bytes that a command may say in a control frame.
pub(super) const MAX_ASK: usize = 64 << 10;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Control = 1,
    Packet = 2,
}

/// A frame that is not one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the other end of the control socket does not speak this protocol")]
pub(super) struct Malformed;

/// What stands before a body of this length.
pub(super) fn header(kind: Kind, length: usize) -> [u8; HEADER_LEN] {
    let [_, a, b, c] = u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes();
    [kind as u8, a, b, c]
}

/// The frame at the beginning of what was read, by its kind and the length of its body; `None` while its header is not there yet.
pub(super) fn parse_header(bytes: &[u8], most: usize) -> Result<Option<(Kind, usize)>, Malformed> {
    let Some(&[kind, a, b, c]) = bytes.first_chunk() else { return Ok(None) };
    let length = u32::from_be_bytes([0, a, b, c]) as usize;
    let (kind, most) = match kind {
        1 => (Kind::Control, most),
        2 => (Kind::Packet, super::packets::MAX_PACKET),
        _ => return Err(Malformed),
    };
    if length > most { Err(Malformed) } else { Ok(Some((kind, length))) }
}

/// The body of a control frame.
pub(super) fn encode(message: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(message).unwrap_or_default()
}

/// What a control frame says.
pub(super) fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, Malformed> {
    serde_json::from_slice(body).map_err(|_| Malformed)
}

/// The daemon's first words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hello {
    /// Of the protocol. Stands in every version's first frame.
    pub(super) version: u32,
    /// The daemon's process.
    pub(super) pid: u32,
    /// The key that it is known by. `None`: the command is somebody else's, and there will be no conversation.
    #[serde(with = "maybe_text", default)]
    pub(super) id: Option<PeerId>,
    /// Where it registers.
    #[serde(with = "texts", default)]
    pub(super) servers: Vec<RendezvousAddress>,
}

/// Which command it is, for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Who {
    pub(super) command: String,
    pub(super) pid: u32,
}

/// What a command wants.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case")]
pub(super) enum Ask {
    /// A share of a session with this peer. Answered by [`Tell::Opened`] or [`Tell::NotOpened`]; then come packets.
    Open {
        #[serde(with = "text")]
        peer: PeerId,
        who: Who,
    },
    /// The streams that peers open for what this command serves. Each session that brings one is told by [`Tell::Arrived`].
    Serve { wanted: Wanted, policy: IntroductionPolicy, who: Who },
    /// Others may be let in from now on.
    Policy { policy: IntroductionPolicy },
    /// A share of a session that has arrived; answered as [`Ask::Open`].
    Take { arrival: u64, who: Who },
    /// Tell of the rendezvous servers' changes.
    Servers,
    /// Why the session of this share has the path that it has.
    Explain { number: u64 },
    /// Tell when the other side has all of this stream, which is finished, or will never have it.
    Deliver { stream: u64 },
    /// How the daemon is.
    Status,
    /// Whether these peers are there.
    Reach {
        #[serde(with = "texts")]
        peers: Vec<PeerId>,
    },
    /// Read again what is served.
    Reload,
    /// End.
    Down,
}

/// What a command serves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// Plain pipes.
    pub pipes: bool,
    /// Files.
    pub files: bool,
    /// Forwardings that the daemon itself does not allow.
    pub forwardings: bool,
    /// Measurements of what a session carries.
    pub measurements: bool,
    /// Conversations.
    pub conversations: bool,
}

/// What the daemon says.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "tell", rename_all = "kebab-case")]
pub(super) enum Tell {
    /// The share is there.
    Opened {
        #[serde(with = "text")]
        peer: PeerId,
        news: News,
    },
    /// It is not.
    NotOpened { why: NotOpened },
    /// What has changed beneath the session.
    News { news: News },
    /// The session of a share has ended.
    Ended,
    /// The other side has all of a stream, or not.
    Delivered { stream: u64, all: bool },
    /// The answer to [`Ask::Explain`], ready to be shown.
    Explained { number: u64, explained: Option<Explained> },
    /// A session has brought something for the command.
    Arrived { arrival: u64 },
    /// A rendezvous server's state.
    Server { change: Change },
    /// The answer to [`Ask::Status`].
    Status { status: Box<Status> },
    /// The answer to [`Ask::Reach`], in its order.
    Reached { paths: Vec<Option<Told>> },
    /// It is done.
    Done,
    /// It is not.
    Failed { words: String },
}

/// An explanation as it is shown.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Explained {
    /// For programs.
    pub fields: serde_json::Value,
    /// For people.
    pub words: String,
}

/// What is beneath a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct News {
    pub(super) path: Option<Told>,
    pub(super) exhausted: bool,
    /// The longest datagram.
    pub(super) width: Option<usize>,
    /// UDP datagrams received.
    pub(super) heard: u64,
}

/// A [`Path`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "path", rename_all = "kebab-case")]
pub(super) enum Told {
    Relayed { relay: SocketAddr, over: String },
    Direct { local: SocketAddr, remote: SocketAddr, kind: CandidateKind, rung: String, rtt_us: u64 },
}

impl From<Path> for Told {
    fn from(path: Path) -> Self {
        match path {
            Path::Relayed { relay, over } => Self::Relayed { relay, over: over.name().to_owned() },
            Path::Direct { local, remote, kind, rung, rtt } => Self::Direct {
                local,
                remote,
                kind,
                rung: rung.name().to_owned(),
                rtt_us: rtt.as_micros() as u64,
            },
        }
    }
}

impl From<Told> for Path {
    fn from(told: Told) -> Self {
        const RUNGS: [Rung; 5] =
            [Rung::Plain, Rung::PortMapped, Rung::Primed, Rung::Predicted, Rung::Birthday];
        const TRANSPORTS: [RelayTransport; 3] =
            [RelayTransport::Udp, RelayTransport::Tcp, RelayTransport::Proxy];
        match told {
            Told::Relayed { relay, over } => {
                let over = TRANSPORTS.into_iter().find(|one| one.name() == over);
                Self::Relayed { relay, over: over.unwrap_or(RelayTransport::Udp) }
            }
            Told::Direct { local, remote, kind, rung, rtt_us } => {
                let rung = RUNGS.into_iter().find(|one| one.name() == rung).unwrap_or(Rung::Plain);
                Self::Direct { local, remote, kind, rung, rtt: Duration::from_micros(rtt_us) }
            }
        }
    }
}

/// Why there is no session; a [`ConnectError`] as far as anybody has to tell one from another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "why", rename_all = "kebab-case")]
pub(super) enum NotOpened {
    Server { words: String },
    Unavailable,
    Refused { reason: NotIntroduced },
    WrongKey,
    Closed,
    Other { words: String },
}

impl From<&ConnectError> for NotOpened {
    fn from(error: &ConnectError) -> Self {
        match error {
            ConnectError::Server(error) => Self::Server { words: error.to_string() },
            ConnectError::Unavailable(_) => Self::Unavailable,
            ConnectError::Refused(reason) => Self::Refused { reason: *reason },
            ConnectError::WrongKey(_) => Self::WrongKey,
            ConnectError::Closed => Self::Closed,
            error => Self::Other { words: error.to_string() },
        }
    }
}

impl NotOpened {
    pub(super) fn into_error(self, peer: PeerId) -> ConnectError {
        match self {
            Self::Server { words } => ConnectError::Server(ServerError::Told(words)),
            Self::Unavailable => ConnectError::Unavailable(peer),
            Self::Refused { reason } => ConnectError::Refused(reason),
            Self::WrongKey => ConnectError::WrongKey(peer),
            Self::Closed => ConnectError::Closed,
            Self::Other { words } => ConnectError::Told { peer, words },
        }
    }
}

/// A [`ServerChange`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Change {
    #[serde(with = "text")]
    server: RendezvousAddress,
    state: ChangedState,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
enum ChangedState {
    Registered,
    Silent,
    Answers,
    Leaving { seconds: u32 },
    Limited { limit: Limit },
    Lost { words: String },
    Failed { words: String },
}

impl From<ServerChange> for Change {
    fn from(change: ServerChange) -> Self {
        let state = match change.state {
            ServerState::Registered => ChangedState::Registered,
            ServerState::Silent => ChangedState::Silent,
            ServerState::Answers => ChangedState::Answers,
            ServerState::Leaving(seconds) => ChangedState::Leaving { seconds },
            ServerState::Limited(limit) => ChangedState::Limited { limit },
            ServerState::Lost(error) => ChangedState::Lost { words: error.to_string() },
            ServerState::Failed(error) => ChangedState::Failed { words: error.to_string() },
        };
        Self { server: change.server, state }
    }
}

impl From<Change> for ServerChange {
    fn from(change: Change) -> Self {
        let state = match change.state {
            ChangedState::Registered => ServerState::Registered,
            ChangedState::Silent => ServerState::Silent,
            ChangedState::Answers => ServerState::Answers,
            ChangedState::Leaving { seconds } => ServerState::Leaving(seconds),
            ChangedState::Limited { limit } => ServerState::Limited(limit),
            ChangedState::Lost { words } => ServerState::Lost(ServerError::Told(words)),
            ChangedState::Failed { words } => ServerState::Failed(ServerError::Told(words)),
        };
        Self { server: change.server, state }
    }
}

/// Things as their text.
pub(super) mod text {
    use super::{Display, FromStr};
    use serde::{Deserialize as _, Deserializer, Serializer, de};

    pub(in super::super) fn serialize<T: Display, S: Serializer>(
        value: &T,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(in super::super) fn deserialize<'de, T: FromStr<Err: Display>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<T, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// The same, where there may be none.
pub(super) mod maybe_text {
    use super::{Display, FromStr};
    use serde::{Deserialize as _, Deserializer, Serializer, de};

    pub(in super::super) fn serialize<T: Display, S: Serializer>(
        value: &Option<T>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => serializer.collect_str(value),
            None => serializer.serialize_none(),
        }
    }

    pub(in super::super) fn deserialize<'de, T: FromStr<Err: Display>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<T>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        text.map(|text| text.parse().map_err(de::Error::custom)).transpose()
    }
}

/// The same, in lists.
pub(super) mod texts {
    use super::{Display, FromStr};
    use serde::{Deserialize as _, Deserializer, Serializer, de};

    pub(in super::super) fn serialize<T: Display, S: Serializer>(
        values: &[T],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(values.iter().map(ToString::to_string))
    }

    pub(in super::super) fn deserialize<'de, T: FromStr<Err: Display>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<T>, D::Error> {
        let texts = Vec::<String>::deserialize(deserializer)?;
        texts.iter().map(|text| text.parse().map_err(de::Error::custom)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::Rng as _;

    fn id() -> PeerId {
        PeerId::from_bytes([7; 32])
    }

    fn returns<T: Serialize + DeserializeOwned>(message: &T) -> T {
        decode(&encode(message)).unwrap()
    }

    #[test]
    fn what_is_asked_survives_its_bytes() {
        let who = Who { command: "peer forward nas".into(), pid: 7 };
        let wanted = Wanted { files: true, ..Wanted::default() };
        for ask in [
            Ask::Open { peer: id(), who: who.clone() },
            Ask::Serve { wanted, policy: IntroductionPolicy::Only(vec![id()]), who: who.clone() },
            Ask::Policy { policy: IntroductionPolicy::Anyone },
            Ask::Take { arrival: 3, who },
            Ask::Servers,
            Ask::Explain { number: 1 },
            Ask::Deliver { stream: 4 },
            Ask::Status,
            Ask::Reach { peers: vec![id(), id()] },
            Ask::Reload,
            Ask::Down,
        ] {
            assert_eq!(returns(&ask), ask);
        }
    }

    #[test]
    fn paths_and_failures_survive_their_bytes() {
        let relay = "192.0.2.7:3478".parse().unwrap();
        let direct = Path::Direct {
            local: "[::1]:1".parse().unwrap(),
            remote: "198.51.100.1:2".parse().unwrap(),
            kind: CandidateKind::PeerReflexive,
            rung: Rung::Birthday,
            rtt: Duration::from_micros(81_234),
        };
        for path in [direct, Path::Relayed { relay, over: RelayTransport::Proxy }] {
            assert_eq!(Path::from(returns(&Told::from(path))), path);
        }
        let lost = ServerError::Lost { host: "vps".into(), cause: "timed out".into() };
        for error in [
            ConnectError::Server(lost),
            ConnectError::Unavailable(id()),
            ConnectError::Refused(NotIntroduced::Oneself),
            ConnectError::WrongKey(id()),
            ConnectError::Closed,
            ConnectError::TimedOut { peer: id(), stage: "it was slow", limit: Duration::from_secs(15) },
        ] {
            let told = returns(&NotOpened::from(&error)).into_error(id());
            assert_eq!(told.to_string(), error.to_string());
        }
    }

    #[test]
    fn frames_are_bounded_and_garbage_is_no_frame() {
        let frame = header(Kind::Control, 70_000);
        assert_eq!(parse_header(&frame, 70_000), Ok(Some((Kind::Control, 70_000))));
        assert_eq!(parse_header(&frame, 69_999), Err(Malformed));
        assert_eq!(parse_header(&frame[..3], 70_000), Ok(None));
        let packet = header(Kind::Packet, super::super::packets::MAX_PACKET + 1);
        assert_eq!(parse_header(&packet, MAX_CONTROL), Err(Malformed));
        let mut random = rand::rng();
        for _ in 0..20_000 {
            let bytes: Vec<u8> = (0..random.random_range(0..80)).map(|_| random.random()).collect();
            let _ = parse_header(&bytes, MAX_ASK);
            let _ = decode::<Ask>(&bytes);
            let _ = decode::<Hello>(&bytes);
        }
    }

    #[test]
    fn a_hello_of_another_version_is_understood_that_far() {
        let hello: Hello = decode(br#"{"version":9,"pid":3,"novelty":[1,2]}"#).unwrap();
        assert_eq!((hello.version, hello.pid, hello.id), (9, 3, None));
    }
}
