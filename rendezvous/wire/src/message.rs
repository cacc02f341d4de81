//! Registration and signalling: what travels on the one bidirectional stream of a signalling connection.
//!
//! The peer opens the stream and writes [`Request`]s; the server writes [`Notice`]s. Each message is a
//! postcard body behind a 16-bit big-endian length. New messages are appended to the enums, never inserted; anything
//! else is a new ALPN.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::{Buf, BufMut, BytesMut};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::admission::{Challenge, Solution, Token};
use crate::candidate::{Candidate, MAX_CANDIDATES, Mapping};
use crate::identity::PeerId;
use crate::relay::Channel;

/// Most bytes of one message, its length prefix not counted.
pub const MAX_MESSAGE: usize = 16 * 1024;

/// Most datagrams of a first flight that an introduction carries.
pub const MAX_FIRST_FLIGHT: usize = 4;

/// Most bytes of one datagram of a first flight.
pub const MAX_FLIGHT_DATAGRAM: usize = 1500;

/// Most ids in an [`IntroductionPolicy::Only`].
pub const MAX_POLICY_IDS: usize = 256;

/// Most [`Meeting::doors`].
pub const MAX_DOORS: usize = 24;

/// How long a [`Meeting`] that one side asks for waits at the server for the other side. Whoever asks keeps its doors open a little longer.
pub const OFFER_LIFETIME: Duration = Duration::from_secs(2);

/// A registration's number: names it in bind requests. Not secret.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RegistrationId(pub u64);

/// An introduction's number, unique on its server.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct IntroductionId(pub u64);

/// The asker's own number of an [`Introduce`], repeated in the answer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RequestId(pub u64);

macro_rules! debug_hex {
    ($($name:ident),*) => {$(
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({:016x})", stringify!($name), self.0)
            }
        }
    )*};
}
debug_hex!(RegistrationId, IntroductionId, RequestId);

/// From a peer to its rendezvous server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// The first message on the stream.
    Register(Register),
    /// The candidates, the mapping or the policy have changed.
    Update(Register),
    /// Introduce me to somebody.
    Introduce(Introduce),
    /// The session of this introduction has ended; its channel may go.
    Close(IntroductionId),
    /// Checks have found nothing; here is where we shall be seen next. A newer one takes the place of an older.
    Meet(Meeting),
    /// Our NAT is open toward the other side's doors of this meeting.
    Primed(IntroductionId, MeetingNumber),
    /// Our network has changed: introduce the two sides of this introduction anew, with what each can offer now. Both get a
    /// [`Notice::Introduction`] of the same number, with the same roles and the same channel, so what is relayed goes on. With the round for
    /// [`Purpose::Again`].
    Renew(IntroductionId, u64),
    /// Before [`Request::Register`]: the token that the server's operator has given out. Only where [`crate::ADMISSION_ALPN`] was agreed on.
    Present(Token),
    /// Answers [`Notice::Challenge`].
    Solve(Solution),
}

/// From a rendezvous server to a peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Notice {
    /// Answers [`Request::Register`].
    Registered(Registered),
    /// An introduction, sent to both sides at the same moment.
    Introduction(Introduction),
    /// Answers an [`Introduce`] that led to nothing.
    NotIntroduced(RequestId, NotIntroduced),
    /// The other side has closed the introduction, or lost its registration.
    Closed(IntroductionId),
    /// Both sides have asked to meet: the other side's doors, sent to both at the same moment.
    Meet(MeetingNumber, Meeting),
    /// Both sides of a meeting are primed; sent to both at the same moment.
    Go(IntroductionId, MeetingNumber),
    /// Before [`Notice::Registered`]: the server has much to do, and wants work first. This and the following only where
    /// [`crate::ADMISSION_ALPN`] was agreed on.
    Challenge(Challenge),
    /// A limit holds the peer back; said now and then while it does.
    Limited(Limit),
    /// The server goes away in so many seconds: what goes over its relay is better moved to another server. Until then it introduces nobody.
    Leaving(u32),
}

/// What holds a peer back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
#[non_exhaustive]
pub enum Limit {
    /// It sends more over the relay than one peer may; the rest is dropped. With bytes a second.
    #[error(
        "the relay carries {0} bytes a second for one peer, and drops what is more; a direct path has no such limit"
    )]
    Bandwidth(u64),
    /// The relay is full, and everybody has the same share. With bytes a second.
    #[error(
        "the relay is full: {0} bytes a second is everybody's share at present, and it drops what is more"
    )]
    Share(u64),
    /// What the relay carries for one peer in a month is used up. With bytes.
    #[error(
        "the relay has carried {0} bytes for this peer, which is all for this month (UTC); until it ends only direct paths are left, or another server"
    )]
    Month(u64),
}

impl Notice {
    /// Whether it is only for those that have agreed to [`crate::ADMISSION_ALPN`].
    pub const fn is_of_admission(&self) -> bool {
        matches!(self, Self::Challenge(_) | Self::Limited(_) | Self::Leaving(_))
    }
}

/// What a peer says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Register {
    /// A random number of the registering process: tells its registrations from those of another process that
    /// holds the same key. A process that registers again has its registration moved to the new connection, with all
    /// introductions and the relay's binding.
    pub instance: u64,
    /// At most [`MAX_CANDIDATES`].
    pub candidates: Vec<Candidate>,
    /// The mapping behaviour that the peer has measured.
    pub mapping: Mapping,
    /// Who may be introduced to it.
    pub policy: IntroductionPolicy,
}

/// Who may be introduced to a peer.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum IntroductionPolicy {
    /// Whoever asks.
    #[default]
    Anyone,
    /// These and nobody else; at most [`MAX_POLICY_IDS`]. Empty: nobody.
    Only(Vec<PeerId>),
}

impl IntroductionPolicy {
    /// Whether `asker` may be introduced.
    pub fn admits(&self, asker: PeerId) -> bool {
        match self {
            Self::Anyone => true,
            Self::Only(ids) => ids.contains(&asker),
        }
    }
}

/// What an introduction is for. The server passes it on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Purpose {
    /// A new session, which the first flight begins.
    Session,
    /// The sessions that the two sides have already: fresh credentials and candidates, checks begin anew. With the round: one more than
    /// the greatest that the asker has seen between the two. Introductions by several servers may cross each other; the one of the greatest
    /// round counts, and among those of one round the one of the greatest [`IntroductionId`], so both sides take the same one in whatever
    /// order they hear of them.
    Again(u64),
    /// A relay channel for the same sessions, in reserve should another server be lost: no checks.
    Spare,
}

/// Asks for an introduction.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Introduce {
    /// Comes back in the answer.
    pub request: RequestId,
    /// Whom to.
    pub target: PeerId,
    /// What for.
    pub purpose: Purpose,
    /// The first datagrams of the asker's QUIC handshake, delivered with the introduction: at most
    /// [`MAX_FIRST_FLIGHT`] of at most [`MAX_FLIGHT_DATAGRAM`] bytes.
    pub first_flight: Vec<Vec<u8>>,
}

impl fmt::Debug for Introduce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Introduce")
            .field("request", &self.request)
            .field("target", &self.target)
            .field("purpose", &self.purpose)
            .field("first_flight", &self.first_flight.len())
            .finish()
    }
}

/// A registration is in force.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registered {
    /// Its number.
    pub registration: RegistrationId,
    /// Authenticates bind requests ([`crate::stun::BindRequest`]) as the short-term password. Secret.
    pub key: String,
    /// The source of the signalling connection, as the server sees it.
    pub observed: SocketAddr,
    /// UDP ports of reflection at the server's host; the relay's datagrams use the first.
    pub reflection_ports: [u16; 2],
    /// Seconds that a binding lives without a bind request.
    pub lease: u32,
}

impl fmt::Debug for Registered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registered")
            .field("registration", &self.registration)
            .field("observed", &self.observed)
            .field("reflection_ports", &self.reflection_ports)
            .field("lease", &self.lease)
            .finish_non_exhaustive()
    }
}

/// A meeting's number, the server's own; grows within an introduction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MeetingNumber(pub u32);

/// One side's part of a meeting: a round of checks that both sides prepare and the server starts, for NATs that need
/// each of the two to open its own door before the other knocks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meeting {
    /// Which introduction.
    pub introduction: IntroductionId,
    /// Addresses at which the sender's coming flows will be seen, in the order in which it begins them; at most
    /// [`MAX_DOORS`]. One, where all flows are seen at the same address.
    pub doors: Vec<SocketAddr>,
}

/// Who is controlling (RFC 8445, section 6.1.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Role {
    /// Nominates. The asker's role.
    Controlling,
    /// Follows.
    Controlled,
}

impl Role {
    /// The other one.
    pub const fn opposite(self) -> Self {
        match self {
            Self::Controlling => Self::Controlled,
            Self::Controlled => Self::Controlling,
        }
    }
}

/// Short-term credentials of one side of an introduction (RFC 8445, section 5.3).
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// Username fragment, base64.
    pub ufrag: String,
    /// Password, base64. Secret between the two sides and the server.
    pub password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("ufrag", &self.ufrag).finish_non_exhaustive()
    }
}

/// Two peers may now reach each other.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Introduction {
    /// Its number, the same for both sides.
    pub introduction: IntroductionId,
    /// The request that it answers; `None` for the side that was asked for.
    pub request: Option<RequestId>,
    /// The other side.
    pub peer: PeerId,
    /// The other side's [`Register::instance`].
    pub instance: u64,
    /// What the asker has said that it is for.
    pub purpose: Purpose,
    /// The role of the side that gets this message.
    pub role: Role,
    /// Credentials of the side that gets this message.
    pub local: Credentials,
    /// Credentials of the other side.
    pub remote: Credentials,
    /// The other side's candidates, the one that the server observed among them.
    pub candidates: Vec<Candidate>,
    /// The other side's mapping behaviour.
    pub mapping: Mapping,
    /// The relay channel between the two.
    pub channel: Channel,
    /// The asker's first flight; empty for the asker itself.
    pub first_flight: Vec<Vec<u8>>,
}

impl fmt::Debug for Introduction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Introduction")
            .field("introduction", &self.introduction)
            .field("request", &self.request)
            .field("peer", &self.peer)
            .field("purpose", &self.purpose)
            .field("role", &self.role)
            .field("candidates", &self.candidates)
            .field("mapping", &self.mapping)
            .field("channel", &self.channel)
            .field("first_flight", &self.first_flight.len())
            .finish_non_exhaustive()
    }
}

/// Why an introduction was not made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
#[non_exhaustive]
pub enum NotIntroduced {
    /// Nobody of that id is registered here, or it does not admit the asker. The two look the same on purpose.
    #[error("not registered at this server, or not open to you")]
    Unavailable,
    /// The asker has asked too often.
    #[error("too many introductions asked for; try again in a while")]
    TooMany,
    /// The server has no free channel.
    #[error("the rendezvous server is full")]
    Full,
    /// A peer that asks for itself.
    #[error("a peer cannot be introduced to itself")]
    Oneself,
}

/// QUIC application error codes with which a signalling connection is closed.
pub mod close_code {
    /// The peer or the server is going away.
    pub const SHUTDOWN: u32 = 0;
    /// A message could not be read, or broke a bound of this module.
    pub const MALFORMED: u32 = 1;
    /// The first message was not a registration, or it did not come in time.
    pub const NOT_REGISTERED: u32 = 2;
    /// The server admits no more registrations, or not this one.
    pub const REFUSED: u32 = 3;
    /// The peer does not read what it is sent.
    pub const TOO_SLOW: u32 = 4;
}

/// Why bytes are no message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MessageError {
    /// Longer than [`MAX_MESSAGE`].
    #[error("a message of {0} bytes; {MAX_MESSAGE} are the most")]
    TooLong(usize),
    /// No message of this protocol.
    #[error("not a message of this protocol")]
    Malformed,
    /// A list longer than its bound.
    #[error("too many {0} in a message")]
    TooMany(&'static str),
}

/// A message that knows its own bounds.
pub trait Message: Serialize + DeserializeOwned {
    /// Whether every list is within its bound.
    fn validate(&self) -> Result<(), MessageError>;
}

fn bounded<T>(list: &[T], most: usize, what: &'static str) -> Result<(), MessageError> {
    if list.len() > most { Err(MessageError::TooMany(what)) } else { Ok(()) }
}

fn bounded_flight(flight: &[Vec<u8>]) -> Result<(), MessageError> {
    bounded(flight, MAX_FIRST_FLIGHT, "datagrams")?;
    flight.iter().try_for_each(|datagram| bounded(datagram, MAX_FLIGHT_DATAGRAM, "bytes in a datagram"))
}

impl Message for Request {
    fn validate(&self) -> Result<(), MessageError> {
        match self {
            Self::Register(register) | Self::Update(register) => {
                bounded(&register.candidates, MAX_CANDIDATES, "candidates")?;
                match &register.policy {
                    IntroductionPolicy::Anyone => Ok(()),
                    IntroductionPolicy::Only(ids) => bounded(ids, MAX_POLICY_IDS, "ids"),
                }
            }
            Self::Introduce(introduce) => bounded_flight(&introduce.first_flight),
            Self::Meet(meeting) => bounded(&meeting.doors, MAX_DOORS, "doors"),
            Self::Close(_) | Self::Primed(..) | Self::Renew(..) | Self::Present(_) | Self::Solve(_) => Ok(()),
        }
    }
}

impl Message for Notice {
    fn validate(&self) -> Result<(), MessageError> {
        match self {
            Self::Introduction(introduction) => {
                // The server adds the address that it observed.
                bounded(&introduction.candidates, MAX_CANDIDATES + 1, "candidates")?;
                bounded_flight(&introduction.first_flight)
            }
            Self::Meet(_, meeting) => bounded(&meeting.doors, MAX_DOORS, "doors"),
            Self::Registered(_) | Self::NotIntroduced(..) | Self::Closed(_) | Self::Go(..) => Ok(()),
            Self::Challenge(_) | Self::Limited(_) | Self::Leaving(_) => Ok(()),
        }
    }
}

/// One message as the bytes that go on the stream, length prefix first.
pub fn encode(message: &impl Message) -> Result<Vec<u8>, MessageError> {
    message.validate()?;
    let body = postcard::to_stdvec(message).map_err(|_| MessageError::Malformed)?;
    let length = u16::try_from(body.len()).ok().filter(|length| usize::from(*length) <= MAX_MESSAGE);
    let length = length.ok_or(MessageError::TooLong(body.len()))?;
    let mut bytes = Vec::with_capacity(2 + body.len());
    bytes.put_u16(length);
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

/// Reads the body of a message, which must be all of `body`.
pub fn decode<M: Message>(body: &[u8]) -> Result<M, MessageError> {
    let (message, rest) = postcard::take_from_bytes::<M>(body).map_err(|_| MessageError::Malformed)?;
    if !rest.is_empty() {
        return Err(MessageError::Malformed);
    }
    message.validate()?;
    Ok(message)
}

/// Cuts a byte stream into messages. Holds at most one message.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: BytesMut,
}

impl Decoder {
    /// Takes bytes as they come off the stream.
    pub fn extend(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message; `None` until more bytes have come. After an error the stream is of no more use.
    pub fn poll<M: Message>(&mut self) -> Result<Option<M>, MessageError> {
        let [high, low, ..] = self.buffer[..] else { return Ok(None) };
        let length = usize::from(u16::from_be_bytes([high, low]));
        if length > MAX_MESSAGE {
            return Err(MessageError::TooLong(length));
        }
        if self.buffer.len() < 2 + length {
            return Ok(None);
        }
        self.buffer.advance(2);
        let body = self.buffer.split_to(length);
        decode(&body).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::candidate::CandidateKind;

    fn request() -> Request {
        Request::Register(Register {
            instance: 1,
            candidates: vec![Candidate::new(CandidateKind::Host, "192.0.2.1:9".parse().unwrap(), 1)],
            mapping: Mapping::Unknown,
            policy: IntroductionPolicy::Only(vec![PeerId::from_bytes([1; 32])]),
        })
    }

    #[test]
    fn messages_survive_being_cut_anywhere() {
        let bytes =
            [encode(&request()).unwrap(), encode(&Request::Close(IntroductionId(5))).unwrap()].concat();
        for cut in 0..bytes.len() {
            let mut decoder = Decoder::default();
            let mut seen = Vec::new();
            for part in [&bytes[..cut], &bytes[cut..]] {
                decoder.extend(part);
                while let Some(message) = decoder.poll::<Request>().unwrap() {
                    seen.push(message);
                }
            }
            assert_eq!(seen, [request(), Request::Close(IntroductionId(5))]);
        }
    }

    #[test]
    fn bounds_are_kept_on_both_sides() {
        let candidate = Candidate::new(CandidateKind::Host, "192.0.2.1:9".parse().unwrap(), 1);
        let message = Request::Update(Register {
            instance: 1,
            candidates: vec![candidate; MAX_CANDIDATES + 1],
            mapping: Mapping::Unknown,
            policy: IntroductionPolicy::Anyone,
        });
        assert_eq!(encode(&message), Err(MessageError::TooMany("candidates")));
        let body = postcard::to_stdvec(&message).unwrap();
        let mut decoder = Decoder::default();
        decoder.extend(&u16::try_from(body.len()).unwrap().to_be_bytes());
        decoder.extend(&body);
        assert_eq!(decoder.poll::<Request>(), Err(MessageError::TooMany("candidates")));
    }

    #[test]
    fn nonsense_is_an_error_not_a_panic() {
        let mut decoder = Decoder::default();
        decoder.extend(&[0xff, 0xff, 0]);
        assert_eq!(decoder.poll::<Request>(), Err(MessageError::TooLong(0xffff)));
        for byte in 0..=255u8 {
            let mut decoder = Decoder::default();
            decoder.extend(&[0, 9, byte, byte, byte, byte, byte, byte, byte, byte, byte]);
            let _ = decoder.poll::<Request>();
            let _ = decoder.poll::<Notice>();
        }
    }

    #[test]
    fn an_empty_policy_admits_nobody() {
        let id = PeerId::from_bytes([1; 32]);
        assert!(IntroductionPolicy::Anyone.admits(id));
        assert!(IntroductionPolicy::Only(vec![id]).admits(id));
        assert!(!IntroductionPolicy::Only(vec![]).admits(id));
    }
}
