//! A signalling connection, over QUIC or over TCP, behind one interface.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::{Connection, ConnectionError, RecvStream, SendStream, VarInt};
use rendezvous_wire::message::{Decoder, Notice, Register, Request, close_code, encode};
use rendezvous_wire::{
    ADMISSION_ALPN, KeyPair, RendezvousAddress, SIGNALLING_ALPN, Token, signalling_alpns, tls,
};

use crate::config::INITIAL_RTT;
use crate::signalling::ServerError;
use crate::tunnel::{Conversation, End, Tunnel};

/// QUIC keep-alive of the signalling connection, under the shortest common binding lifetime of 30 s. A server that was killed and is there again has
/// forgotten us, and by this a peer that waits learns of it: its word is answered with a stateless reset.
const KEEP_ALIVE: Duration = Duration::from_secs(7);

/// The connection is given up after this long without a word (six keep-alives).
const IDLE: Duration = Duration::from_secs(45);

/// Bytes read at a time.
const READ: usize = 16 * 1024;

/// Where a server is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// Where the signalling connection goes.
    pub(crate) signalling: SocketAddr,
    /// An address of the other family, where it has one. That it can be reached is not known.
    pub(crate) other: Option<SocketAddr>,
}

/// What a registration says, and the sequence under which a stream binds the relay.
#[derive(Debug)]
pub(crate) struct Registering {
    pub(crate) register: Register,
    pub(crate) sequence: u64,
    /// To be presented first.
    pub(crate) token: Option<Token>,
}

/// How the relay is reached when a registration is in force.
pub(crate) enum Reached {
    /// Over UDP; bind requests make the binding.
    Udp(Place),
    /// Through the stream, which is the binding.
    Stream(Tunnel),
}

/// A signalling connection.
pub(crate) struct Link {
    address: RendezvousAddress,
    line: Line,
    /// The server knows of tokens and of work.
    able: bool,
}

enum Line {
    Quic { connection: Connection, send: SendStream, receive: RecvStream, decoder: Decoder, place: Place },
    Stream { conversation: Conversation, tunnel: Option<Tunnel> },
}

impl Link {
    /// On a QUIC connection.
    pub(crate) async fn quic(
        address: RendezvousAddress,
        connection: Connection,
        place: Place,
    ) -> Result<Self, ServerError> {
        match connection.open_bi().await {
            Ok((send, receive)) => {
                let decoder = Decoder::default();
                let able = agreed(&connection).as_deref() == Some(ADMISSION_ALPN);
                Ok(Self { address, line: Line::Quic { connection, send, receive, decoder, place }, able })
            }
            Err(error) => Err(lost(&address, &connection, &error.to_string())),
        }
    }

    /// On a stream.
    pub(crate) fn stream(
        address: RendezvousAddress,
        tunnel: Tunnel,
        conversation: Conversation,
        able: bool,
    ) -> Self {
        Self { address, line: Line::Stream { conversation, tunnel: Some(tunnel) }, able }
    }

    /// Presents a token, where the server knows what that is, and registers.
    pub(crate) async fn register(&mut self, registering: Registering) -> Result<(), ServerError> {
        if let Some(token) = registering.token.filter(|_| self.able) {
            self.send(&Request::Present(token)).await?;
        }
        self.send(&Request::Register(registering.register)).await
    }

    pub(crate) const fn is_stream(&self) -> bool {
        matches!(self.line, Line::Stream { .. })
    }

    /// Datagrams sent and received, on QUIC.
    pub(crate) fn traffic(&self) -> Option<(u64, u64)> {
        match &self.line {
            Line::Quic { connection, .. } => {
                let stats = connection.stats();
                Some((stats.udp_tx.datagrams, stats.udp_rx.datagrams))
            }
            Line::Stream { .. } => None,
        }
    }

    /// How the relay is reached over it. Of a stream once, when it has registered.
    pub(crate) fn reached(&mut self) -> Option<Reached> {
        match &mut self.line {
            Line::Quic { place, .. } => Some(Reached::Udp(*place)),
            Line::Stream { tunnel, .. } => tunnel.take().map(Reached::Stream),
        }
    }

    pub(crate) async fn send(&mut self, request: &Request) -> Result<(), ServerError> {
        let bytes = match encode(request) {
            Ok(bytes) => bytes,
            Err(error) => {
                // Our own message is out of bounds: nothing to send, and no reason to drop the rest.
                tracing::warn!(%error, "message not sent");
                return Ok(());
            }
        };
        match &mut self.line {
            Line::Quic { connection, send, .. } => match send.write_all(&bytes).await {
                Ok(()) => Ok(()),
                Err(error) => Err(lost(&self.address, connection, &error.to_string())),
            },
            Line::Stream { conversation, .. } => {
                if conversation.send(bytes).await {
                    return Ok(());
                }
                // It has ended: what there is to read tells why.
                loop {
                    if let Err(end) = conversation.receive().await {
                        return Err(ended(&self.address, end));
                    }
                }
            }
        }
    }

    /// The next notice. Cancel-safe: bytes that have been read wait in the decoder.
    pub(crate) async fn receive(&mut self) -> Result<Notice, ServerError> {
        let address = &self.address;
        match &mut self.line {
            Line::Quic { connection, receive, decoder, .. } => loop {
                match decoder.poll() {
                    Ok(Some(notice)) => return Ok(notice),
                    Ok(None) => {}
                    Err(error) => {
                        let cause = format!("the server does not speak this protocol: {error}");
                        return Err(lost(address, connection, &cause));
                    }
                }
                match receive.read_chunk(READ, true).await {
                    Ok(Some(chunk)) => decoder.extend(&chunk.bytes),
                    Ok(None) => return Err(lost(address, connection, "the server ended the stream")),
                    Err(error) => return Err(lost(address, connection, &error.to_string())),
                }
            },
            Line::Stream { conversation, .. } => {
                conversation.receive().await.map_err(|end| ended(address, end))
            }
        }
    }

    /// Ends it. A stream goes on relaying until the relay's end of it is dropped.
    pub(crate) fn goodbye(self) {
        if let Line::Quic { connection, .. } = self.line {
            connection.close(close_code::SHUTDOWN.into(), b"");
        }
    }
}

/// The protocol that both sides have agreed on.
fn agreed(connection: &Connection) -> Option<Vec<u8>> {
    connection.handshake_data()?.downcast::<quinn::crypto::rustls::HandshakeData>().ok()?.protocol
}

/// Whether the handshake failed over a key: QUIC carries TLS alerts as 0x100 + alert (RFC 9001, section 4.8), and 42 to 49 are
/// about certificates.
pub(crate) fn is_wrong_key(error: &ConnectionError) -> bool {
    let code = match error {
        ConnectionError::TransportError(error) => error.code,
        ConnectionError::ConnectionClosed(close) => close.error_code,
        _ => return false,
    };
    (0x100 + 42..=0x100 + 49).contains(&u64::from(code))
}

fn lost(address: &RendezvousAddress, connection: &Connection, cause: &str) -> ServerError {
    let host = address.host.clone();
    match connection.close_reason() {
        Some(ConnectionError::ApplicationClosed(close))
            if close.error_code != VarInt::from_u32(close_code::SHUTDOWN) =>
        {
            ServerError::Refused { host, reason: String::from_utf8_lossy(&close.reason).into_owned() }
        }
        Some(ConnectionError::ApplicationClosed(_)) => {
            ServerError::Lost { host, cause: "it shut down".into() }
        }
        Some(error) if is_wrong_key(&error) => ServerError::WrongKey { host, id: address.id },
        Some(error) => ServerError::Lost { host, cause: error.to_string() },
        None => ServerError::Lost { host, cause: cause.to_owned() },
    }
}

fn ended(address: &RendezvousAddress, end: End) -> ServerError {
    let host = address.host.clone();
    match end {
        End::Closed { code: close_code::SHUTDOWN, .. } => {
            ServerError::Lost { host, cause: "it shut down".into() }
        }
        End::Closed { reason, .. } => ServerError::Refused { host, reason },
        End::Broken(cause) => ServerError::Lost { host, cause },
    }
}

/// QUIC for signalling.
pub(crate) fn quic_config(identity: &KeyPair, server: &RendezvousAddress) -> Option<quinn::ClientConfig> {
    let mut tls = tls::client_config(identity, server.id, SIGNALLING_ALPN).ok()?;
    tls.alpn_protocols = signalling_alpns();
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls).ok()?;
    let mut transport = quinn::TransportConfig::default();
    transport.keep_alive_interval(Some(KEEP_ALIVE));
    transport.max_idle_timeout(IDLE.try_into().ok());
    transport.initial_rtt(INITIAL_RTT);
    // One stream of small messages; small packets are all it needs.
    transport.mtu_discovery_config(None);
    transport.max_concurrent_bidi_streams(0u8.into());
    transport.max_concurrent_uni_streams(0u8.into());
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::new(transport));
    Some(config)
}
