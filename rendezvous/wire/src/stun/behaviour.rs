//! NAT behaviour discovery (RFC 5780): the attributes by which a client has a Binding request answered from elsewhere,
//! or to another of its ports.
//!
//! Where we differ from RFC 5780, section 6.1: MAPPED-ADDRESS is left out (RFC 8489 has XOR-MAPPED-ADDRESS in its place),
//! and PADDING comes back only as far as the answer stays within its bound. A stranger's request is never answered with
//! much more than it brought, so RESPONSE-ORIGIN and OTHER-ADDRESS are there only where the request left room for them; a
//! client makes room with [`DiscoveryRequest::padded`].

use std::net::SocketAddr;

use stun_rs::attributes::discovery::{
    ChangeRequest, ChangeRequestFlags, OtherAddress, Padding, ResponseOrigin, ResponsePort,
};
use stun_rs::attributes::stun::XorMappedAddress;
use stun_rs::{MessageClass, StunMessageBuilder};

use super::{Received, StunError, TransactionId, builder, finish, request};

/// CHANGE-REQUEST's number, as UNKNOWN-ATTRIBUTES of a 420 names it.
pub const CHANGE_REQUEST: u16 = 0x0003;

/// Bytes of an attribute's type and length.
const ATTRIBUTE_HEADER: usize = 4;

/// Bytes of PADDING that leave room for the largest answer, that to an IPv6 request.
const ROOM: usize = 24;

/// From where a request is to be answered (RFC 5780, section 7.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, PartialOrd, Ord)]
pub struct Change {
    /// From the server's other address.
    pub ip: bool,
    /// From its other port.
    pub port: bool,
}

/// A Binding request for behaviour discovery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiscoveryRequest {
    /// Random.
    pub transaction: TransactionId,
    /// From where to answer.
    pub change: Change,
    /// The port of the sender's address that is to get the answer (RFC 5780, section 7.5).
    pub response_port: Option<u16>,
    /// Adds PADDING, so that the answer has room for RESPONSE-ORIGIN and OTHER-ADDRESS. Not with `response_port`.
    pub padded: bool,
}

impl DiscoveryRequest {
    /// The datagram.
    pub fn encode(&self) -> Result<Vec<u8>, StunError> {
        let mut message = request(self.transaction);
        if self.change != Change::default() {
            let flags = [
                (self.change.ip, ChangeRequestFlags::ChangeIp),
                (self.change.port, ChangeRequestFlags::ChangePort),
            ];
            let flags = flags.into_iter().filter(|(wanted, _)| *wanted).map(|(_, flag)| flag).collect();
            message = message.with_attribute(ChangeRequest::new(Some(flags)));
        }
        if let Some(port) = self.response_port {
            message = message.with_attribute(ResponsePort::from(port));
        }
        if self.padded {
            message = pad(message, ROOM)?;
        }
        finish(message, None)
    }
}

/// A success response to a [`DiscoveryRequest`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiscoveryResponse {
    /// Of the request.
    pub transaction: TransactionId,
    /// Where the request came from.
    pub mapped: SocketAddr,
    /// Where this response comes from, where that is known.
    pub origin: Option<SocketAddr>,
    /// Where it would come from with both changes, where the server has a second address.
    pub other: Option<SocketAddr>,
    /// Whether the request was padded, so that this one is to be as well.
    pub padded: bool,
    /// Most bytes of the response; what does not fit is left out.
    pub limit: usize,
}

impl DiscoveryResponse {
    /// The datagram.
    pub fn encode(&self) -> Result<Vec<u8>, StunError> {
        const HEADER: usize = 20;
        const FINGERPRINT: usize = 8;
        let size = |address: SocketAddr| ATTRIBUTE_HEADER + if address.is_ipv4() { 8 } else { 20 };
        let mut left = self.limit.saturating_sub(HEADER + FINGERPRINT + size(self.mapped));
        let mut fits = |address: &SocketAddr| {
            let fits = size(*address) <= left;
            left -= if fits { size(*address) } else { 0 };
            fits
        };
        let mut message = builder(self.transaction, MessageClass::SuccessResponse)
            .with_attribute(XorMappedAddress::from(self.mapped));
        if let Some(origin) = self.origin.filter(&mut fits) {
            message = message.with_attribute(ResponseOrigin::from(origin));
        }
        if let Some(other) = self.other.filter(&mut fits) {
            message = message.with_attribute(OtherAddress::from(other));
        }
        if let Some(room) = left.checked_sub(ATTRIBUTE_HEADER).filter(|_| self.padded) {
            message = pad(message, room - room % 4)?;
        }
        finish(message, None)
    }
}

fn pad(message: StunMessageBuilder, length: usize) -> Result<StunMessageBuilder, StunError> {
    let padding = Padding::new("\0".repeat(length)).map_err(|_| StunError::TooLong)?;
    Ok(message.with_attribute(padding))
}

impl Received<'_> {
    /// CHANGE-REQUEST.
    pub fn change_request(&self) -> Option<Change> {
        let flags = self.attribute::<ChangeRequest>()?.as_change_request().ok()?.flags();
        Some(Change {
            ip: flags.contains(ChangeRequestFlags::ChangeIp),
            port: flags.contains(ChangeRequestFlags::ChangePort),
        })
    }

    /// RESPONSE-PORT.
    pub fn response_port(&self) -> Option<u16> {
        self.attribute::<ResponsePort>()?.as_response_port().ok().map(|port| *port.as_ref())
    }

    /// Whether PADDING is there.
    pub fn is_padded(&self) -> bool {
        self.attribute::<Padding>().is_some()
    }

    /// RESPONSE-ORIGIN.
    pub fn response_origin(&self) -> Option<SocketAddr> {
        Some(*self.attribute::<ResponseOrigin>()?.as_response_origin().ok()?.socket_address())
    }

    /// OTHER-ADDRESS.
    pub fn other_address(&self) -> Option<SocketAddr> {
        Some(*self.attribute::<OtherAddress>()?.as_other_address().ok()?.socket_address())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: TransactionId = TransactionId([7; 12]);

    #[test]
    fn requests_say_what_they_were_told_to() {
        for change in [(false, false), (true, false), (false, true), (true, true)] {
            let change = Change { ip: change.0, port: change.1 };
            let request = DiscoveryRequest { transaction: T, change, response_port: None, padded: true };
            let bytes = request.encode().unwrap();
            let received = Received::parse(&bytes).unwrap();
            assert_eq!(received.change_request().unwrap_or_default(), change);
            assert!(received.is_padded() && received.response_port().is_none());
        }
        let change = Change::default();
        let request = DiscoveryRequest { transaction: T, change, response_port: Some(40_123), padded: false };
        let bytes = request.encode().unwrap();
        let received = Received::parse(&bytes).unwrap();
        assert_eq!((received.response_port(), received.is_padded()), (Some(40_123), false));
    }

    #[test]
    fn responses_hold_what_their_bound_has_room_for() {
        for [mapped, origin, other] in [
            ["192.0.2.1:9", "198.51.100.1:3478", "198.51.100.2:3479"],
            ["[2001:db8::1]:9", "[2001:db8::2]:3478", "[2001:db8::3]:3479"],
        ] {
            let [mapped, origin, other]: [SocketAddr; 3] =
                [mapped, origin, other].map(|text| text.parse().unwrap());
            let least = if mapped.is_ipv4() { 40 } else { 52 };
            for limit in least..200 {
                let response = DiscoveryResponse {
                    transaction: T,
                    mapped,
                    origin: Some(origin),
                    other: Some(other),
                    padded: limit % 2 == 0,
                    limit,
                };
                let bytes = response.encode().unwrap();
                assert!(bytes.len() <= limit, "{} bytes where {limit} are the most", bytes.len());
                let received = Received::parse(&bytes).unwrap();
                assert_eq!(received.mapped_address(), Some(mapped));
                let attribute = least - 28;
                let expect = |count, address| (limit >= least + count * attribute).then_some(address);
                assert_eq!(received.response_origin(), expect(1, origin));
                assert_eq!(received.other_address(), expect(2, other));
                let filled = limit - bytes.len() < 4;
                assert!(filled || limit % 2 == 1 || limit - bytes.len() < attribute, "{limit}");
            }
        }
    }
}
