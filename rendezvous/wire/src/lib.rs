//! What peers and rendezvous servers say to each other.
//!
//! Pure: bytes in, values out. No clock, no socket, no runtime. Everything here that reads bytes from
//! the network returns an error on bad input; none of it panics or allocates past a stated bound.
//!
//! | module | what |
//! |---|---|
//! | [`identity`] | [`PeerId`], [`KeyPair`] |
//! | [`tls`] | TLS 1.3 with raw public keys (RFC 7250), pinned on both sides |
//! | [`admission`] | what a server may ask of those who register |
//! | [`address`] | `rv://<server-id>@host[:port]` |
//! | [`candidate`] | candidates, their kinds and priorities (RFC 8445) |
//! | [`message`] | registration and signalling messages, and their framing on a QUIC stream |
//! | [`stream`] | messages and the relay's frames on one TLS stream |
//! | [`stun`] | the STUN messages that we use (RFC 8489, RFC 8445) |
//! | [`relay`] | the relay's four-byte header |
//! | [`demux`] | which protocol a datagram belongs to, by its first byte (RFC 9443) |

#![forbid(unsafe_code)]

pub mod address;
pub mod admission;
pub mod candidate;
pub mod demux;
pub mod identity;
pub mod message;
pub mod relay;
pub mod stream;
pub mod stun;
pub mod ticket;
pub mod tls;

pub use address::RendezvousAddress;
pub use admission::Token;
pub use candidate::{Candidate, CandidateKind};
pub use identity::{KeyPair, PeerId};
pub use ticket::{InviteSecret, Ticket};

/// ALPN of the signalling connection between a peer and a rendezvous server.
pub const SIGNALLING_ALPN: &[u8] = b"rendezvous/1";

/// ALPN of one whose peer knows the messages of admission, of limits and of a server that goes away, too:
/// [`Request::Present`](message::Request::Present), [`Request::Solve`](message::Request::Solve), [`Notice::Challenge`](message::Notice::Challenge),
/// [`Notice::Limited`](message::Notice::Limited) and [`Notice::Leaving`](message::Notice::Leaving). Where either side offers only
/// [`SIGNALLING_ALPN`], none of them is sent.
pub const ADMISSION_ALPN: &[u8] = b"rendezvous/2";

/// What both sides of a signalling connection offer, the better first.
pub fn signalling_alpns() -> Vec<Vec<u8>> {
    vec![ADMISSION_ALPN.to_vec(), SIGNALLING_ALPN.to_vec()]
}

/// ALPN of the session between two peers.
pub const SESSION_ALPN: &[u8] = b"rendezvous-session/1";

/// Default UDP port of registration and signalling (QUIC).
pub const DEFAULT_SIGNALLING_PORT: u16 = 443;

/// Default UDP ports of STUN reflection and of the relay. The first carries the relay's datagrams;
/// the second exists so that a peer can see whether its mapping depends on the destination's port.
pub const DEFAULT_REFLECTION_PORTS: [u16; 2] = [3478, 3479];
