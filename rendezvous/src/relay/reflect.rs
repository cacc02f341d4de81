//! Answers to STUN requests (RFC 8489): bare ones with the sender's address, bind requests with a binding. Pure.
//!
//! A bare Binding request, the only one that strangers send in numbers, is answered without the codec and without
//! allocation. Everything unauthenticated is rationed per source, and no answer to it has more than one and a half
//! times the bytes that its request had on the wire. Behaviour discovery (RFC 5780) has other ports and addresses of the
//! server answer, or other ports of the sender's own address be answered, and never anybody else.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use rendezvous_wire::stun::behaviour::{CHANGE_REQUEST, Change, DiscoveryResponse};
use rendezvous_wire::stun::{
    self, BindRequest, Class, MAGIC_COOKIE, MAX_STUN, Received, StunError, TransactionId, error_code,
};

use super::origin::Origins;
use super::table::{Binding, Bound, Flow, Table};
use crate::limits::SourceBuckets;

const HEADER: usize = 20;
const BINDING_REQUEST: [u8; 2] = [0x00, 0x01];
const BINDING_SUCCESS: [u8; 2] = [0x01, 0x01];
const XOR_MAPPED_ADDRESS: [u8; 2] = [0x00, 0x20];
/// Type and length of FINGERPRINT (RFC 8489, section 14.7).
const FINGERPRINT: [u8; 4] = [0x80, 0x28, 0x00, 0x04];
const FINGERPRINT_XOR: u32 = 0x5354_554e;
const FINGERPRINT_LEN: usize = 8;

/// Most bytes of an answer to a bare request: header, an IPv6 XOR-MAPPED-ADDRESS, FINGERPRINT.
const BARE_ANSWER: usize = HEADER + 24 + FINGERPRINT_LEN;

/// What a STUN message leads to.
#[derive(Debug, Default)]
pub struct Reaction {
    /// Goes back the way the message came, unless `over` says otherwise.
    pub answer: Option<Answer>,
    /// Where the answer goes instead.
    pub over: Option<Flow>,
    /// For the other threads, before the answer leaves.
    pub bound: Option<Bound>,
}

impl Reaction {
    fn answer(bytes: Result<Vec<u8>, StunError>) -> Self {
        Self { answer: bytes.ok().map(Answer::Built), ..Self::default() }
    }

    fn bare(transaction: TransactionId, mapped: SocketAddr) -> Self {
        Self { answer: Some(bare_answer(transaction, mapped)), ..Self::default() }
    }
}

/// The bytes of an answer.
#[derive(Debug)]
pub enum Answer {
    /// Of a bare request.
    Bare([u8; BARE_ANSWER], usize),
    /// Of any other.
    Built(Vec<u8>),
}

impl AsRef<[u8]> for Answer {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Bare(bytes, length) => &bytes[..*length],
            Self::Built(bytes) => bytes,
        }
    }
}

/// Handles a datagram that looks like STUN.
pub fn handle_stun(
    table: &mut Table,
    strangers: &mut SourceBuckets,
    origins: &Origins,
    datagram: &[u8],
    flow: Flow,
    now: Instant,
) -> Reaction {
    if !fingerprint_holds(datagram) {
        return Reaction::default();
    }
    let mapped = SocketAddr::new(flow.remote.ip().to_canonical(), flow.remote.port());
    if let Some(transaction) = bare_request(datagram) {
        return match strangers.take(mapped.ip().into(), now) {
            true => Reaction::bare(transaction, mapped),
            false => Reaction::default(),
        };
    }
    let Ok(message) = Received::parse(datagram) else { return Reaction::default() };
    if message.class() != Class::Request {
        return Reaction::default();
    }

    let transaction = message.transaction();
    let mut refuse = |code, unknown: &[u16]| match strangers.take(mapped.ip().into(), now) {
        true => Reaction::answer(stun::binding_error(transaction, code, unknown, None)),
        false => Reaction::default(),
    };
    let unknown = message.unknown_required();
    if !unknown.is_empty() {
        return refuse(error_code::UNKNOWN_ATTRIBUTE, &unknown);
    }
    let username = match (message.username(), message.has_integrity()) {
        (Some(username), true) => username,
        (None, false) => {
            return match strangers.take(mapped.ip().into(), now) {
                true => discover(origins, &message, datagram.len(), flow, mapped),
                false => Reaction::default(),
            };
        }
        _ => return refuse(error_code::BAD_REQUEST, &[]),
    };
    let Some(request) = BindRequest::from_username(username) else {
        return refuse(error_code::UNAUTHENTICATED, &[]);
    };
    match table.bind(request, &message, flow, now) {
        Binding::Bound(bound, key) => Reaction {
            bound: Some(bound),
            ..Reaction::answer(stun::binding_success(transaction, mapped, Some(key)))
        },
        Binding::Repeated(key) => Reaction::answer(stun::binding_success(transaction, mapped, Some(key))),
        Binding::Unauthenticated => refuse(error_code::UNAUTHENTICATED, &[]),
        Binding::Ignored => Reaction::default(),
    }
}

/// Answers a stranger's request that has attributes, those of behaviour discovery perhaps (RFC 5780, section 6.1).
///
/// With one address the server has no OTHER-ADDRESS, and yet two ports: it answers a change of the port alone, which section
/// 6.1 leaves to servers with two addresses.
fn discover(
    origins: &Origins,
    message: &Received<'_>,
    length: usize,
    flow: Flow,
    mapped: SocketAddr,
) -> Reaction {
    let transaction = message.transaction();
    let mut over = flow;
    let mut origin = origins.of(flow);
    let change = message.change_request().unwrap_or_default();
    if change != Change::default() {
        let Some((changed, from)) = origins.changed(flow, change) else {
            let unknown = [CHANGE_REQUEST];
            return Reaction::answer(stun::binding_error(
                transaction,
                error_code::UNKNOWN_ATTRIBUTE,
                &unknown,
                None,
            ));
        };
        over = changed;
        origin = Some(from);
    }
    if let Some(port) = message.response_port() {
        if message.is_padded() || !may_answer_to(port, mapped) {
            return Reaction::answer(stun::binding_error(transaction, error_code::BAD_REQUEST, &[], None));
        }
        over.remote.set_port(port);
    }
    let response = DiscoveryResponse {
        transaction,
        mapped,
        origin,
        other: origins.other(flow),
        padded: message.is_padded(),
        limit: largest_answer(length, mapped.is_ipv4()).min(MAX_STUN),
    };
    Reaction { over: Some(over), ..Reaction::answer(response.encode()) }
}

/// Whether an answer may go to this port of the sender's address. The services of a host that shares the address, or whose
/// address was forged, are spared.
fn may_answer_to(port: u16, mapped: SocketAddr) -> bool {
    const PRIVILEGED: u16 = 1024;
    port >= PRIVILEGED || port == mapped.port() && port != 0
}

/// Most bytes of an answer to a request of `length` bytes: one and a half times the packet, IP and UDP headers included.
fn largest_answer(length: usize, ipv4: bool) -> usize {
    let headers = if ipv4 { 28 } else { 48 };
    (length + headers) * 3 / 2 - headers
}

/// The transaction of a Binding request without attributes, FINGERPRINT aside.
fn bare_request(datagram: &[u8]) -> Option<TransactionId> {
    let (header, attributes) = datagram.split_first_chunk::<HEADER>()?;
    let bare = attributes.is_empty()
        || (attributes.len() == FINGERPRINT_LEN && attributes[..FINGERPRINT.len()] == FINGERPRINT);
    let length = u16::from_be_bytes([header[2], header[3]]);
    if header[..2] != BINDING_REQUEST
        || header[4..8] != MAGIC_COOKIE
        || usize::from(length) != attributes.len()
        || !bare
    {
        return None;
    }
    Some(TransactionId(header[8..].try_into().ok()?))
}

/// The same bytes as [`stun::binding_success`] without a key.
fn bare_answer(transaction: TransactionId, mapped: SocketAddr) -> Answer {
    let mut bytes = [0; BARE_ANSWER];
    let value = match mapped.ip() {
        IpAddr::V4(_) => 8,
        IpAddr::V6(_) => 20,
    };
    let fingerprint = HEADER + 4 + value;
    let length = fingerprint + FINGERPRINT_LEN;
    bytes[..2].copy_from_slice(&BINDING_SUCCESS);
    bytes[3] = (length - HEADER) as u8;
    bytes[4..8].copy_from_slice(&MAGIC_COOKIE);
    bytes[8..HEADER].copy_from_slice(&transaction.0);

    bytes[20..22].copy_from_slice(&XOR_MAPPED_ADDRESS);
    bytes[23] = value as u8;
    bytes[25] = if mapped.is_ipv4() { 1 } else { 2 };
    bytes[26..28].copy_from_slice(&mapped.port().to_be_bytes());
    match mapped.ip() {
        IpAddr::V4(ip) => bytes[28..32].copy_from_slice(&ip.octets()),
        IpAddr::V6(ip) => bytes[28..44].copy_from_slice(&ip.octets()),
    }
    // Both are XORed with the bytes that begin at the magic cookie: the port with its first two, the address with
    // the cookie and then the transaction (RFC 8489, section 14.2).
    let mask: [u8; 16] = std::array::from_fn(|place| bytes[4 + place]);
    let xor = |field: &mut [u8]| field.iter_mut().zip(mask).for_each(|(byte, mask)| *byte ^= mask);
    xor(&mut bytes[26..28]);
    xor(&mut bytes[28..fingerprint]);

    let crc = crc32fast::hash(&bytes[..fingerprint]) ^ FINGERPRINT_XOR;
    bytes[fingerprint..][..4].copy_from_slice(&FINGERPRINT);
    bytes[fingerprint + 4..length].copy_from_slice(&crc.to_be_bytes());
    Answer::Bare(bytes, length)
}

/// Whether a message that ends in FINGERPRINT ends in the right one. One that does not end in it is let through.
fn fingerprint_holds(datagram: &[u8]) -> bool {
    let Some((covered, attribute)) = datagram.split_last_chunk::<FINGERPRINT_LEN>() else { return true };
    let (kind, value) = attribute.split_at(FINGERPRINT.len());
    kind != FINGERPRINT || value == (crc32fast::hash(covered) ^ FINGERPRINT_XOR).to_be_bytes()
}

#[cfg(test)]
#[path = "reflect_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "differential_tests.rs"]
mod differential_tests;
