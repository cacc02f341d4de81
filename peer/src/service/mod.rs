//! What the two sides of a session want of each other.
//!
//! Each bidirectional stream begins with what it is for: one byte [`PIPE`], for a plain stream of bytes, or one byte [`REQUEST`], a 16-bit big-endian length
//! and a [`Request`] in postcard. A request is answered with two bytes, an [`Answer`]; what follows is the service's own. New
//! requests are appended, never inserted; a side that does not know one refuses it. A refusal gives no reason.
//!
//! Services that need datagrams send them as QUIC datagrams (RFC 9221) that begin with the id of their stream, as a postcard varint.

mod hub;

pub use hub::{Exchange, FlowReceiver, FlowSender, Hub, Incoming, Opening, ReadError};

pub(crate) use hub::{Header, read_answer, read_header};

use rendezvous_wire::InviteSecret;
use serde::{Deserialize, Serialize};

use crate::bench::Order;
use crate::forward::{Bind, Target};

/// First byte of a stream: a plain pipe. It makes the stream visible to the other side before there is data, so that either side may
/// speak first.
pub const PIPE: u8 = 1;

/// First byte of a stream: a request of this version follows.
pub const REQUEST: u8 = 2;

/// Most bytes of a request.
pub const MAX_REQUEST: usize = 1024;

/// Code with which a stream is reset or stopped that was refused.
pub const REFUSED: u32 = 0x5e10;

/// Code with which a stream is reset or stopped whose other end, a connection outside the session, is broken.
pub const BROKEN: u32 = 0x5e11;

/// What a stream is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Request {
    /// Send back every datagram of this flow, until the stream ends. Whoever has a session may ask for it: it tells no more than the
    /// session itself.
    Ping,
    /// Trust me: this is the secret of an invitation.
    Invite(InviteSecret),
    /// Connect to this, and join the stream to the connection. With UDP: datagrams, and on the stream those that are too long for one,
    /// behind a 16-bit big-endian length.
    Connect(Target),
    /// Listen there, for as long as this stream is open, and give me a stream for every connection. The answer is followed by the port, 16 bits.
    Listen(Bind),
    /// A connection to a listener that the receiver has asked for on its stream of this id.
    Connection {
        /// The id of the stream with [`Request::Listen`].
        listener: u64,
    },
    /// Take files; what follows is the transfer's own, see [`transfer`](crate::transfer). Whether they are wanted is said there.
    Files,
    /// Keep this session for as long as this stream is open: several commands of ours share it. Accepted by a daemon, which gives in this
    /// one session all that its side has to give.
    Hold,
    /// Let yourself be measured, see [`bench`](crate::bench).
    Bench(Order),
    /// Talk with whoever is there; what follows is the conversation's own, see [`chat`](crate::chat).
    Chat,
}

/// What becomes of a [`Request`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// It is done, or being done.
    Accepted,
    /// It is not for you, or for nobody.
    Refused,
    /// It is for you, but it did not work.
    Failed(Cause),
}

/// Why something that was allowed did not work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Cause {
    /// Nobody listens there.
    #[error("nobody listens there")]
    ConnectionRefused,
    /// There is no way to it.
    #[error("there is no way to it")]
    Unreachable,
    /// It did not answer in time.
    #[error("it did not answer in time")]
    TimedOut,
    /// There is no host of that name, or no such file.
    #[error("there is nothing of that name")]
    NotFound,
    /// The system does not permit it.
    #[error("the system does not permit it there")]
    PermissionDenied,
    /// The address is in use.
    #[error("the address is in use")]
    InUse,
    /// Too many at once.
    #[error("too many at once")]
    Busy,
    /// Anything else.
    #[error("the system reports another error")]
    Other,
}

impl Cause {
    const ALL: [Self; 8] = [
        Self::Other,
        Self::ConnectionRefused,
        Self::Unreachable,
        Self::TimedOut,
        Self::NotFound,
        Self::PermissionDenied,
        Self::InUse,
        Self::Busy,
    ];

    /// What the other side is told of an error of the system.
    pub fn of(error: &std::io::Error) -> Self {
        use std::io::ErrorKind;
        match error.kind() {
            ErrorKind::ConnectionRefused => Self::ConnectionRefused,
            ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable | ErrorKind::AddrNotAvailable => {
                Self::Unreachable
            }
            ErrorKind::TimedOut => Self::TimedOut,
            ErrorKind::NotFound => Self::NotFound,
            ErrorKind::PermissionDenied => Self::PermissionDenied,
            ErrorKind::AddrInUse | ErrorKind::AlreadyExists => Self::InUse,
            _ => Self::Other,
        }
    }

    /// A short name for programs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ConnectionRefused => "connection_refused",
            Self::Unreachable => "unreachable",
            Self::TimedOut => "timed_out",
            Self::NotFound => "not_found",
            Self::PermissionDenied => "permission_denied",
            Self::InUse => "in_use",
            Self::Busy => "busy",
            Self::Other => "other",
        }
    }
}

/// Why a request led to nothing.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// The other side does not want to.
    #[error("refused")]
    Refused,
    /// The other side wanted to, and could not.
    #[error("the other side could not do it: {0}")]
    Failed(Cause),
    /// The session is over, or the stream broke.
    #[error("the session ended before the answer came")]
    Session,
}

impl Answer {
    fn to_bytes(self) -> [u8; 2] {
        match self {
            Self::Accepted => [0, 0],
            Self::Refused => [1, 0],
            Self::Failed(cause) => {
                let code = Cause::ALL.iter().position(|one| *one == cause).unwrap_or(0);
                [2, u8::try_from(code).unwrap_or(0)]
            }
        }
    }

    /// What is no answer of this version is a refusal.
    fn from_bytes([status, code]: [u8; 2]) -> Self {
        match status {
            0 => Self::Accepted,
            2 => Self::Failed(Cause::ALL.get(usize::from(code)).copied().unwrap_or(Cause::Other)),
            _ => Self::Refused,
        }
    }

    fn into_result(self) -> Result<(), RequestError> {
        match self {
            Self::Accepted => Ok(()),
            Self::Refused => Err(RequestError::Refused),
            Self::Failed(cause) => Err(RequestError::Failed(cause)),
        }
    }
}

impl Request {
    /// With the byte and the length that go before it.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let body = postcard::to_stdvec(self).unwrap_or_default();
        debug_assert!(body.len() <= MAX_REQUEST, "names have bounds");
        let mut bytes = vec![REQUEST];
        bytes.extend(u16::try_from(body.len()).unwrap_or(0).to_be_bytes());
        bytes.extend(body);
        bytes
    }

    /// `None`: nothing that this version knows.
    pub(crate) fn decode(body: &[u8]) -> Option<Self> {
        let (request, rest) = postcard::take_from_bytes::<Self>(body).ok()?;
        let sound = match &request {
            Self::Connect(target) => target.is_sound(),
            Self::Listen(bind) => bind.is_sound(),
            _ => true,
        };
        (sound && rest.is_empty()).then_some(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::Rng as _;

    #[test]
    fn requests_survive_their_bytes() {
        let longest =
            Target::Host { protocol: crate::forward::Protocol::Udp, host: "h".repeat(253), port: u16::MAX };
        for request in [
            Request::Ping,
            Request::Invite(InviteSecret([1; 16])),
            Request::Connect(longest),
            Request::Connect(Target::Unix(format!("/{}", "p".repeat(250)))),
            Request::Listen("udp:[::1]:53".parse().unwrap()),
            Request::Connection { listener: u64::MAX >> 2 },
            Request::Files,
            Request::Hold,
            Request::Bench(Order::Give { millis: u32::MAX }),
            Request::Chat,
        ] {
            let bytes = request.encode();
            assert_eq!(bytes[0], REQUEST);
            assert_eq!(usize::from(u16::from_be_bytes([bytes[1], bytes[2]])), bytes.len() - 3);
            assert!(bytes.len() <= MAX_REQUEST + 3);
            assert_eq!(Request::decode(&bytes[3..]), Some(request));
        }
    }

    #[test]
    fn garbage_is_no_request_and_no_panic() {
        let mut random = rand::rng();
        for _ in 0..20_000 {
            let length = random.random_range(0..64);
            let bytes: Vec<u8> = (0..length).map(|_| random.random()).collect();
            if let Some(Request::Connect(target)) = Request::decode(&bytes) {
                assert!(target.is_sound());
            }
        }
    }

    #[test]
    fn names_that_could_harm_a_terminal_are_no_request() {
        let target =
            Target::Host { protocol: crate::forward::Protocol::Tcp, host: "a\u{1b}[2Jb".into(), port: 80 };
        assert_eq!(Request::decode(&Request::Connect(target).encode()[3..]), None);
        let relative = Request::Connect(Target::Unix("etc".into()));
        assert_eq!(Request::decode(&relative.encode()[3..]), None);
    }

    #[test]
    fn answers_survive_their_bytes_and_unknown_ones_are_refusals() {
        let failures = Cause::ALL.into_iter().map(Answer::Failed);
        for answer in [Answer::Accepted, Answer::Refused].into_iter().chain(failures) {
            assert_eq!(Answer::from_bytes(answer.to_bytes()), answer);
        }
        assert_eq!(Answer::from_bytes([9, 9]), Answer::Refused);
        assert_eq!(Answer::from_bytes([2, 99]), Answer::Failed(Cause::Other));
    }
}
