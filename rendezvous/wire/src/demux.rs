//! Which protocol a datagram on a shared socket belongs to (RFC 9443, section 3).

/// The protocol of a datagram, by its first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// First byte 0 to 3.
    Stun,
    /// First byte 16 to 63: a [relay frame](crate::relay). RFC 9443 leaves these to ZRTP and DTLS, which never
    /// appear here.
    Relay,
    /// First byte 64 to 127 or 192 to 255. Since relay frames have bytes of their own, 64 to 79 (TURN
    /// ChannelData in RFC 9443) is QUIC here.
    Quic,
    /// Anything else, and the empty datagram.
    Unknown,
}

/// Tells the protocol of a datagram from its first byte.
///
/// With GRO one buffer holds many datagrams: ask for every segment, not only for the buffer.
pub fn classify(datagram: &[u8]) -> Protocol {
    match datagram.first() {
        Some(0..=3) => Protocol::Stun,
        Some(16..=63) => Protocol::Relay,
        Some(64..=127 | 192..=255) => Protocol::Quic,
        _ => Protocol::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_first_byte_has_one_protocol() {
        assert_eq!(classify(&[]), Protocol::Unknown);
        let count = |protocol| (0..=255u8).filter(|byte| classify(&[*byte]) == protocol).count();
        assert_eq!(count(Protocol::Stun), 4);
        assert_eq!(count(Protocol::Relay), 48);
        assert_eq!(count(Protocol::Quic), 128);
        assert_eq!(count(Protocol::Unknown), 76);
    }
}
