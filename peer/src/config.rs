//! QUIC settings of a session.

use std::sync::Arc;
use std::time::Duration;

use quinn::{EndpointConfig, MtuDiscoveryConfig, TransportConfig, VarInt};
use rendezvous_wire::{KeyPair, PeerId, tls};

use crate::socket::{Remote, SwitchAwareConfig};

/// Connection-level receive window: a gigabit per second at 250 ms.
pub(crate) const RECEIVE_WINDOW: u32 = 32 << 20;

/// Stream-level receive window: a gigabit per second at 125 ms, for one stream.
const STREAM_RECEIVE_WINDOW: u32 = 16 << 20;

/// Data that may wait for acknowledgement.
const SEND_WINDOW: u64 = 32 << 20;

/// Largest QUIC datagram: with the relay's header it makes 1,452 bytes, the UDP payload of a 1,500-byte IPv6 packet.
pub(crate) const MAX_MTU: u16 = 1448;

/// How soon a larger MTU is tried again, and how long a black hole is remembered. quinn's defaults (600 s and 60 s) are for paths
/// that do not change under a connection.
const MTU_PROBE_INTERVAL: Duration = Duration::from_secs(20);

/// The round trip that a handshake reckons with before it has measured any; a lost flight is sent again after three times as long. RFC 9002, 6.2.2, has
/// 333 ms where nothing is known. A flight is two or three datagrams here, so a path that is slower costs these twice; on all others a loss
/// costs 300 ms and not a second.
pub(crate) const INITIAL_RTT: Duration = Duration::from_millis(100);

/// A session with nothing coming in for this long is over. A machine that sleeps for ten minutes finds its sessions alive; one that is gone for good is
/// known as such this late, since nobody can tell the two apart.
const IDLE: Duration = Duration::from_mins(15);

/// Keeps a quiet session from being idle.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Streams that the other side may have open at a time: one for each forwarded connection.
const MAX_STREAMS: u32 = 2048;

/// Application close codes of a session.
pub(crate) mod close {
    /// Ended by its owner.
    pub(crate) const DONE: u32 = 0;
    /// Nobody takes incoming sessions fast enough.
    pub(crate) const BUSY: u32 = 0x5e01;
}

/// Why a session could not be configured: never in practice, since the keys are ours.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error(transparent)]
    Tls(#[from] rustls::Error),
    #[error("no usable cipher suite")]
    Cipher(#[from] quinn::crypto::rustls::NoInitialCipherSuite),
}

pub(crate) fn endpoint() -> EndpointConfig {
    let mut config = EndpointConfig::default();
    // The first byte must tell QUIC from STUN and relay frames (RFC 9443; RFC 9287 would make it random).
    config.grease_quic_bit(false);
    // Never fails: 1472 is in the allowed range.
    let _ = config.max_udp_payload_size(1472);
    config
}

fn transport(remote: &Remote) -> Arc<TransportConfig> {
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(MAX_MTU).interval(MTU_PROBE_INTERVAL).black_hole_cooldown(MTU_PROBE_INTERVAL);
    let mut transport = TransportConfig::default();
    transport
        .receive_window(VarInt::from_u32(RECEIVE_WINDOW))
        .stream_receive_window(VarInt::from_u32(STREAM_RECEIVE_WINDOW))
        .send_window(SEND_WINDOW)
        .max_concurrent_bidi_streams(VarInt::from_u32(MAX_STREAMS))
        .max_idle_timeout(IDLE.try_into().ok())
        .keep_alive_interval(Some(KEEP_ALIVE))
        .initial_rtt(INITIAL_RTT)
        .mtu_discovery_config(Some(mtu))
        .congestion_controller_factory(Arc::new(SwitchAwareConfig(remote.epoch.clone())));
    Arc::new(transport)
}

/// For a session that we open with `peer`.
pub(crate) fn client(
    own: &KeyPair,
    peer: PeerId,
    alpn: &[u8],
    remote: &Remote,
) -> Result<quinn::ClientConfig, ConfigError> {
    let tls = tls::client_config(own, peer, alpn)?;
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls)?;
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(transport(remote));
    Ok(config)
}

/// For a session that `peer` opens with us; with no peer, the endpoint's default, which admits nobody in particular and is
/// replaced for each session.
pub(crate) fn server(
    own: &KeyPair,
    alpn: &[u8],
    peer: Option<(PeerId, &Remote)>,
) -> Result<quinn::ServerConfig, ConfigError> {
    let tls = tls::server_config(own, peer.map(|(id, _)| id), alpn)?;
    let crypto = quinn::crypto::rustls::QuicServerConfig::try_from(tls)?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    // Paths change beneath the synthetic address, never the address itself.
    config.migration(false);
    if let Some((_, remote)) = peer {
        config.transport_config(transport(remote));
    }
    Ok(config)
}
