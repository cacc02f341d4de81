//! The relay's frame: a four-byte header before the datagram that it carries.
//!
//! ```text
//!  0                   1                   2                   3
//!  0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//! +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//! |  kind = 0x20  |            channel number (24 bits)           |
//! +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//! ```
//!
//! The first byte lies in 16..=63 and so clashes neither with STUN nor with QUIC ([`crate::demux`]). Both ends of a
//! channel use the same number, so that the server forwards a frame as it came, and a run of frames that the
//! kernel coalesced (GRO) leaves as one send (GSO).
//! 1,200 bytes of QUIC + 4 + 8 (UDP) + 40 (IPv6) = 1,252, below IPv6's least MTU of 1,280.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes of the header.
pub const HEADER_LEN: usize = 4;

/// First byte of a frame that carries a datagram.
pub const KIND_DATA: u8 = 0x20;

/// The number of a relay channel: 24 bits, unique on its server while the channel lives.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Channel(u32);

impl Channel {
    /// How many channels there are.
    pub const COUNT: u32 = 1 << 24;

    /// The channel of this number; `None` past 24 bits.
    pub const fn new(number: u32) -> Option<Self> {
        if number < Self::COUNT { Some(Self(number)) } else { None }
    }

    /// Its number.
    pub const fn number(self) -> u32 {
        self.0
    }

    /// The header of a data frame on this channel.
    pub const fn header(self) -> [u8; HEADER_LEN] {
        let [_, a, b, c] = self.0.to_be_bytes();
        [KIND_DATA, a, b, c]
    }

    /// The channel of a data frame; `None` when the datagram is none.
    pub fn of(datagram: &[u8]) -> Option<Self> {
        match datagram {
            [KIND_DATA, a, b, c, ..] => Some(Self(u32::from_be_bytes([0, *a, *b, *c]))),
            _ => None,
        }
    }
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "channel {:06x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_names_its_channel() {
        let channel = Channel::new(0x00ab_cdef).unwrap();
        assert_eq!(Channel::of(&channel.header()), Some(channel));
        assert_eq!(crate::demux::classify(&channel.header()), crate::demux::Protocol::Relay);
        assert_eq!(Channel::of(&[KIND_DATA, 1, 2]), None);
        assert_eq!(Channel::of(&[0x21, 1, 2, 3]), None);
        assert_eq!(Channel::new(Channel::COUNT), None);
    }
}
