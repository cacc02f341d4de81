//! Peer-to-peer QUIC sessions.
