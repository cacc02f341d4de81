//! The STUN messages that we use (RFC 8489): Binding requests and their answers, as connectivity checks
//! (RFC 8445, section 7), as bare reflection, and as *bind requests* to the relay.
//!
//! The codec is `stun-rs`. What it leaves to its caller is done here: a message without MESSAGE-INTEGRITY is
//! not taken for an authentic one, trailing bytes are refused, unknown comprehension-required attributes are listed.

pub mod behaviour;

use std::fmt;
use std::net::SocketAddr;

use stun_rs::attributes::ice::{IceControlled, IceControlling, Priority, UseCandidate};
use stun_rs::attributes::stun::{
    ErrorCode, Fingerprint, MessageIntegrity, UnknownAttributes, UserName, XorMappedAddress,
};
use stun_rs::methods::BINDING;
use stun_rs::{
    DecoderContextBuilder, HMACKey, MessageClass, MessageDecoderBuilder, MessageEncoderBuilder,
    StunAttribute, StunMessage, StunMessageBuilder,
};

use crate::message::{RegistrationId, Role};

/// Most bytes of a STUN message that we write.
pub const MAX_STUN: usize = 1280;

/// Most bytes of one that we read: requests of behaviour discovery may be padded to more than a packet of Ethernet (RFC 5780,
/// section 7.6).
pub const MAX_STUN_READ: usize = 2048;

/// The magic cookie (RFC 8489, section 5).
pub const MAGIC_COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];

/// 96 random bits that tie a response to its request.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TransactionId(pub [u8; 12]);

impl fmt::Debug for TransactionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// A short-term password (RFC 8489, section 9.1), prepared once: preparing costs about a microsecond.
#[derive(Clone)]
pub struct Key(HMACKey);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

impl Key {
    /// The key of this password.
    pub fn new(password: &str) -> Result<Self, StunError> {
        HMACKey::new_short_term(password).map(Self).map_err(|_| StunError::Credential)
    }
}

/// Why bytes are no STUN message of ours, or why none could be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StunError {
    /// Not a STUN message, or a malformed one.
    #[error("malformed STUN message")]
    Malformed,
    /// Another method than Binding.
    #[error("not a Binding message")]
    Method,
    /// Longer than [`MAX_STUN`], or than [`MAX_STUN_READ`] where it was read.
    #[error("STUN message too long")]
    TooLong,
    /// A username or password that STUN does not allow.
    #[error("not a valid username or password")]
    Credential,
}

/// The class of a message (RFC 8489, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Wants an answer.
    Request,
    /// Wants none.
    Indication,
    /// A success response.
    Success,
    /// An error response.
    Error,
}

/// The error codes that we send and understand.
pub mod error_code {
    /// Malformed, or credentials missing (RFC 8489, 9.1.3).
    pub const BAD_REQUEST: u16 = 400;
    /// Wrong credentials (RFC 8489, 9.1.3).
    pub const UNAUTHENTICATED: u16 = 401;
    /// A comprehension-required attribute is unknown (RFC 8489, 6.3.1).
    pub const UNKNOWN_ATTRIBUTE: u16 = 420;
    /// Both sides claim the same role (RFC 8445, 7.3.1.1).
    pub const ROLE_CONFLICT: u16 = 487;
}

/// A Binding message as read from the network: well-formed, **not** authenticated until
/// [`verify`](Received::verify) says so.
#[derive(Debug)]
pub struct Received<'a> {
    bytes: &'a [u8],
    message: StunMessage,
}

impl<'a> Received<'a> {
    /// Reads a datagram that is one whole Binding message.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, StunError> {
        if bytes.len() > MAX_STUN_READ {
            return Err(StunError::TooLong);
        }
        if bytes.len() < 20 || bytes[4..8] != MAGIC_COOKIE {
            return Err(StunError::Malformed);
        }
        let (message, length) =
            MessageDecoderBuilder::default().build().decode(bytes).map_err(|_| StunError::Malformed)?;
        if length != bytes.len() {
            return Err(StunError::Malformed);
        }
        if message.method() != BINDING {
            return Err(StunError::Method);
        }
        Ok(Self { bytes, message })
    }

    /// Its class.
    pub fn class(&self) -> Class {
        match self.message.class() {
            MessageClass::Request => Class::Request,
            MessageClass::Indication => Class::Indication,
            MessageClass::SuccessResponse => Class::Success,
            MessageClass::ErrorResponse => Class::Error,
        }
    }

    /// Its transaction.
    pub fn transaction(&self) -> TransactionId {
        TransactionId(*self.message.transaction_id().as_bytes())
    }

    /// USERNAME.
    pub fn username(&self) -> Option<&str> {
        self.attribute::<UserName>()?.as_user_name().ok().map(UserName::as_str)
    }

    /// Whether MESSAGE-INTEGRITY is there at all.
    pub fn has_integrity(&self) -> bool {
        self.attribute::<MessageIntegrity>().is_some()
    }

    /// Whether the message carries a MESSAGE-INTEGRITY that `key` makes, and no wrong FINGERPRINT.
    pub fn verify(&self, key: &Key) -> bool {
        if !self.has_integrity() {
            return false;
        }
        let context = DecoderContextBuilder::default().with_key(key.0.clone()).with_validation().build();
        MessageDecoderBuilder::default().with_context(context).build().decode(self.bytes).is_ok()
    }

    /// XOR-MAPPED-ADDRESS.
    pub fn mapped_address(&self) -> Option<SocketAddr> {
        let attribute = self.attribute::<XorMappedAddress>()?;
        Some(*attribute.as_xor_mapped_address().ok()?.socket_address())
    }

    /// ERROR-CODE.
    pub fn error_code(&self) -> Option<u16> {
        Some(self.attribute::<ErrorCode>()?.as_error_code().ok()?.error_code().error_code())
    }

    /// PRIORITY.
    pub fn priority(&self) -> Option<u32> {
        self.attribute::<Priority>()?.as_priority().ok().map(|priority| *priority.as_ref())
    }

    /// Whether USE-CANDIDATE is there.
    pub fn use_candidate(&self) -> bool {
        self.attribute::<UseCandidate>().is_some()
    }

    /// The sender's role and tie-breaker, from ICE-CONTROLLING or ICE-CONTROLLED.
    pub fn role(&self) -> Option<(Role, u64)> {
        if let Some(attribute) = self.attribute::<IceControlling>() {
            return attribute.as_ice_controlling().ok().map(|value| (Role::Controlling, *value.as_ref()));
        }
        let attribute = self.attribute::<IceControlled>()?;
        attribute.as_ice_controlled().ok().map(|value| (Role::Controlled, *value.as_ref()))
    }

    /// Comprehension-required attributes that nobody here knows; a request with any is answered 420.
    pub fn unknown_required(&self) -> Vec<u16> {
        let unknown = self.message.attributes().iter().filter_map(|attribute| match attribute {
            StunAttribute::Unknown(unknown) => Some(unknown.attribute_type()),
            _ => None,
        });
        unknown
            .filter(stun_rs::AttributeType::is_comprehension_required)
            .map(|kind| kind.as_u16())
            .take(16)
            .collect()
    }

    fn attribute<A: stun_rs::StunAttributeType>(&self) -> Option<&StunAttribute> {
        self.message.get::<A>()
    }
}

/// A connectivity check (RFC 8445, section 7.2.2).
#[derive(Debug, Clone)]
pub struct Check<'a> {
    /// Random.
    pub transaction: TransactionId,
    /// The receiver's ufrag.
    pub remote_ufrag: &'a str,
    /// The sender's ufrag.
    pub local_ufrag: &'a str,
    /// The receiver's password.
    pub key: &'a Key,
    /// The priority that a peer-reflexive candidate learnt from this check would have.
    pub priority: u32,
    /// The sender's role.
    pub role: Role,
    /// The sender's tie-breaker.
    pub tie_breaker: u64,
    /// Nominates the pair (controlling side only).
    pub use_candidate: bool,
}

impl Check<'_> {
    /// The datagram.
    pub fn encode(&self) -> Result<Vec<u8>, StunError> {
        let mut message = request(self.transaction)
            .with_attribute(username(&format!("{}:{}", self.remote_ufrag, self.local_ufrag))?)
            .with_attribute(Priority::from(self.priority));
        message = match self.role {
            Role::Controlling => message.with_attribute(IceControlling::from(self.tie_breaker)),
            Role::Controlled => message.with_attribute(IceControlled::from(self.tie_breaker)),
        };
        if self.use_candidate {
            message = message.with_attribute(UseCandidate::default());
        }
        finish(message, Some(self.key))
    }
}

/// Splits the USERNAME of a check into the receiver's and the sender's ufrag.
pub fn split_username(username: &str) -> Option<(&str, &str)> {
    username.split_once(':')
}

/// Binds the source address of the request at the relay, and keeps it bound: a Binding request whose USERNAME is
/// `<registration>:<sequence>`, authenticated by the registration's key.
///
/// The sequence grows with every request of a registration, retransmissions included, so that a captured request
/// cannot bind another address later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BindRequest {
    /// Whose binding.
    pub registration: RegistrationId,
    /// Greater than that of every earlier request.
    pub sequence: u64,
}

impl BindRequest {
    /// The datagram.
    pub fn encode(&self, transaction: TransactionId, key: &Key) -> Result<Vec<u8>, StunError> {
        let name = format!("{:016x}:{}", self.registration.0, self.sequence);
        finish(request(transaction).with_attribute(username(&name)?), Some(key))
    }

    /// Reads the USERNAME of a bind request.
    pub fn from_username(username: &str) -> Option<Self> {
        let (registration, sequence) = split_username(username)?;
        if registration.len() != 16 || sequence.starts_with('+') {
            return None;
        }
        let registration = RegistrationId(u64::from_str_radix(registration, 16).ok()?);
        Some(Self { registration, sequence: sequence.parse().ok()? })
    }
}

/// A bare Binding request: 28 bytes with FINGERPRINT.
pub fn binding_request(transaction: TransactionId) -> Result<Vec<u8>, StunError> {
    finish(request(transaction), None)
}

/// A Binding indication, which nobody answers: it keeps a NAT's binding open (RFC 8445, section 11).
pub fn binding_indication(transaction: TransactionId) -> Result<Vec<u8>, StunError> {
    finish(builder(transaction, MessageClass::Indication), None)
}

/// A success response that tells the sender its address; authenticated when its request was.
pub fn binding_success(
    transaction: TransactionId,
    mapped: SocketAddr,
    key: Option<&Key>,
) -> Result<Vec<u8>, StunError> {
    let message = builder(transaction, MessageClass::SuccessResponse);
    finish(message.with_attribute(XorMappedAddress::from(mapped)), key)
}

/// An error response; `unknown` fills UNKNOWN-ATTRIBUTES of a 420.
pub fn binding_error(
    transaction: TransactionId,
    code: u16,
    unknown: &[u16],
    key: Option<&Key>,
) -> Result<Vec<u8>, StunError> {
    let code = stun_rs::ErrorCode::new(code, "").map_err(|_| StunError::Malformed)?;
    let mut message = builder(transaction, MessageClass::ErrorResponse).with_attribute(ErrorCode::from(code));
    if !unknown.is_empty() {
        let mut attribute = UnknownAttributes::default();
        for kind in unknown {
            attribute.add(*kind);
        }
        message = message.with_attribute(attribute);
    }
    finish(message, key)
}

fn builder(transaction: TransactionId, class: MessageClass) -> StunMessageBuilder {
    StunMessageBuilder::new(BINDING, class).with_transaction_id(transaction.0.into())
}

fn request(transaction: TransactionId) -> StunMessageBuilder {
    builder(transaction, MessageClass::Request)
}

fn username(name: &str) -> Result<UserName, StunError> {
    UserName::new(name).map_err(|_| StunError::Credential)
}

fn finish(mut message: StunMessageBuilder, key: Option<&Key>) -> Result<Vec<u8>, StunError> {
    if let Some(key) = key {
        message = message.with_attribute(MessageIntegrity::new(key.0.clone()));
    }
    let message = message.with_attribute(Fingerprint::default()).build();
    let mut bytes = vec![0; MAX_STUN];
    let length = MessageEncoderBuilder::default()
        .build()
        .encode(&mut bytes, &message)
        .map_err(|_| StunError::TooLong)?;
    bytes.truncate(length);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: TransactionId = TransactionId([9; 12]);

    fn key(password: &str) -> Key {
        Key::new(password).unwrap()
    }

    fn check(key: &Key) -> Vec<u8> {
        let check = Check {
            transaction: T,
            remote_ufrag: "abcd",
            local_ufrag: "efgh",
            key,
            priority: 77,
            role: Role::Controlling,
            tie_breaker: 5,
            use_candidate: true,
        };
        check.encode().unwrap()
    }

    #[test]
    fn a_check_says_what_it_was_told_to() {
        let key = key("0123456789abcdefghijkl");
        let bytes = check(&key);
        let received = Received::parse(&bytes).unwrap();
        assert_eq!(received.class(), Class::Request);
        assert_eq!(received.transaction(), T);
        assert_eq!(received.username().and_then(split_username), Some(("abcd", "efgh")));
        assert_eq!(received.priority(), Some(77));
        assert_eq!(received.role(), Some((Role::Controlling, 5)));
        assert!(received.use_candidate() && received.verify(&key));
    }

    #[test]
    fn only_the_right_key_verifies() {
        let right = key("0123456789abcdefghijkl");
        let mut bytes = check(&right);
        assert!(!Received::parse(&bytes).unwrap().verify(&key("0123456789abcdefghijkX")));
        let bare = binding_request(T).unwrap();
        assert_eq!(bare.len(), 28);
        assert!(!Received::parse(&bare).unwrap().verify(&right));
        bytes[21] ^= 1;
        assert!(
            Received::parse(&bytes).is_err_and(|_| true) || !Received::parse(&bytes).unwrap().verify(&right)
        );
    }

    #[test]
    fn responses_carry_address_or_error() {
        for address in ["192.0.2.1:32853", "[2001:db8::1]:9"] {
            let address = address.parse().unwrap();
            let bytes = binding_success(T, address, None).unwrap();
            assert_eq!(Received::parse(&bytes).unwrap().mapped_address(), Some(address));
        }
        let bytes = binding_error(T, error_code::UNKNOWN_ATTRIBUTE, &[0x7fff], None).unwrap();
        let received = Received::parse(&bytes).unwrap();
        assert_eq!((received.class(), received.error_code()), (Class::Error, Some(420)));
    }

    #[test]
    fn bind_requests_name_their_registration() {
        let key = key("0123456789abcdefghijkl");
        let request = BindRequest { registration: RegistrationId(0xab), sequence: 7 };
        let bytes = request.encode(T, &key).unwrap();
        let received = Received::parse(&bytes).unwrap();
        assert!(received.verify(&key));
        assert_eq!(BindRequest::from_username(received.username().unwrap()), Some(request));
        for bad in ["", ":", "ab:7", "00000000000000ab:", "00000000000000ab:+7", "00000000000000ab:x"] {
            assert_eq!(BindRequest::from_username(bad), None, "{bad}");
        }
    }

    #[test]
    fn trailing_bytes_and_other_methods_are_refused() {
        let mut bytes = binding_request(T).unwrap();
        bytes.push(0);
        assert_eq!(Received::parse(&bytes).unwrap_err(), StunError::Malformed);
        let mut other = binding_request(T).unwrap();
        other[1] = 3;
        assert!(Received::parse(&other).is_err());
    }

    #[test]
    fn unknown_required_attributes_are_listed() {
        // A Binding request with attribute 0x7ffe (required) and 0xfffe (optional), both empty.
        let mut bytes = vec![0, 1, 0, 8];
        bytes.extend_from_slice(&MAGIC_COOKIE);
        bytes.extend_from_slice(&[1; 12]);
        bytes.extend_from_slice(&[0x7f, 0xfe, 0, 0, 0xff, 0xfe, 0, 0]);
        assert_eq!(Received::parse(&bytes).unwrap().unknown_required(), [0x7ffe]);
    }
}
