//! Packets of the modelled internet.

use std::net::SocketAddr;

/// The hop limit that hosts give their packets unless told otherwise: that of Linux.
pub const DEFAULT_TTL: u8 = 64;

/// What a packet is, as far as routers care.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Protocol {
    /// UDP.
    Udp,
    /// TCP, reduced to one packet each way: whether a connection would come about.
    Tcp,
    /// An ICMP echo request. Ports mean nothing.
    Echo,
}

/// A packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// What it is.
    pub protocol: Protocol,
    /// Where it comes from, as far as whoever looks at it can tell.
    pub source: SocketAddr,
    /// Where it goes.
    pub destination: SocketAddr,
    /// Its hop limit.
    pub ttl: u8,
    /// What it carries.
    pub payload: Vec<u8>,
}
