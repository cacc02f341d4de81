//! TCP to a rendezvous server, straight or through a proxy, and TLS with its key pinned.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rendezvous_wire::{ADMISSION_ALPN, KeyPair, RendezvousAddress, SIGNALLING_ALPN, signalling_alpns, tls};
use rustls::pki_types::ServerName;
use rustls::{AlertDescription, CertificateError, ClientConfig, Error as TlsError};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::proxy::{Proxy, ProxyError};
use crate::resolve::{ATTEMPT_DELAY, resolve};
use crate::signalling::{HANDSHAKE_TIMEOUT, ServerError};

/// The stream of a tunnel.
pub(crate) type Stream = TlsStream<TcpStream>;

/// Unsent bytes that the kernel takes of the stream (TCP_NOTSENT_LOWAT, tcp(7)): what waits longer is better dropped than late.
#[cfg(target_os = "linux")]
const NOT_SENT: u32 = 64 * 1024;

/// How long what was sent may go unacknowledged before the kernel ends the stream (RFC 5482). QUIC gives up a signalling connection no sooner,
/// but with a stream everything relayed stands still.
#[cfg(target_os = "linux")]
const USER_TIMEOUT: Duration = Duration::from_secs(15);

/// A stream whose other end has proved the server's key.
pub(crate) struct Dialled {
    pub(crate) stream: Stream,
    /// What we are connected to: the server, or the proxy.
    pub(crate) address: SocketAddr,
    pub(crate) through_proxy: bool,
}

impl Dialled {
    /// Whether the server knows of tokens and of work.
    pub(crate) fn is_able(&self) -> bool {
        self.stream.get_ref().1.alpn_protocol() == Some(ADMISSION_ALPN)
    }
}

/// Why there is no stream.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum StreamError {
    /// The host name has no address.
    #[error("the name cannot be resolved: {0}")]
    Resolve(String),
    /// No connection came to be.
    #[error("no connection")]
    Unreachable,
    /// The server's host refused.
    #[error("nobody listens there")]
    Refused,
    /// The proxy.
    #[error("{0}")]
    Proxy(#[from] ProxyError),
    /// The other end has another key.
    #[error("another key")]
    WrongKey,
    /// The other end is no rendezvous server.
    #[error("{0}")]
    Intercepted(String),
}

impl StreamError {
    /// For a person. `None`: TCP has got no further than UDP.
    pub(crate) fn explain(&self, server: &RendezvousAddress) -> Option<ServerError> {
        let host = server.host.clone();
        match self {
            Self::Resolve(_) | Self::Unreachable | Self::Refused => None,
            Self::Proxy(error) => Some(ServerError::Proxy(error.clone())),
            Self::WrongKey => Some(ServerError::WrongKey { host, id: server.id }),
            Self::Intercepted(cause) => {
                Some(ServerError::Intercepted { host, port: server.port, cause: cause.clone() })
            }
        }
    }
}

/// Connects to the server's TCP port, through a proxy where the environment names one.
pub(crate) async fn dial(server: &RendezvousAddress, identity: &KeyPair) -> Result<Dialled, StreamError> {
    let dialling = async {
        let (tcp, through_proxy) = match Proxy::of(server)? {
            Some(proxy) => (proxy.connect(server).await?, true),
            None => (straight(server).await?, false),
        };
        set_options(&tcp);
        let address = tcp.peer_addr().map_err(|_| StreamError::Unreachable)?;
        let stream = secure(tcp, server, identity).await?;
        Ok(Dialled { stream, address, through_proxy })
    };
    timeout(HANDSHAKE_TIMEOUT, dialling).await.unwrap_or(Err(StreamError::Unreachable))
}

/// The server itself: its addresses with a head start of one over the next (RFC 8305, section 5).
async fn straight(server: &RendezvousAddress) -> Result<TcpStream, StreamError> {
    let addresses = resolve(server).await.map_err(|error| StreamError::Resolve(error.to_string()))?;
    race(&addresses).await.map_err(|error| match error.kind() {
        io::ErrorKind::ConnectionRefused => StreamError::Refused,
        _ => StreamError::Unreachable,
    })
}

/// The first connection that comes to be; the last failure if none does.
pub(super) async fn race(addresses: &[SocketAddr]) -> io::Result<TcpStream> {
    let mut attempts = JoinSet::new();
    for (order, address) in addresses.iter().copied().enumerate() {
        attempts.spawn(async move {
            tokio::time::sleep(ATTEMPT_DELAY * order as u32).await;
            TcpStream::connect(address).await
        });
    }
    let mut failure = io::ErrorKind::NotFound.into();
    while let Some(attempt) = attempts.join_next().await {
        match attempt {
            Ok(Ok(tcp)) => return Ok(tcp),
            Ok(Err(error)) => failure = error,
            Err(_) => {}
        }
    }
    Err(failure)
}

async fn secure(
    tcp: TcpStream,
    server: &RendezvousAddress,
    identity: &KeyPair,
) -> Result<Stream, StreamError> {
    let config = client_config(server, identity);
    let config = config.map_err(|error| StreamError::Intercepted(error.to_string()))?;
    // A proxy in front of the server may look at the name; the server does not.
    let mut names = server.hosts().filter_map(|host| ServerName::try_from(host.to_owned()).ok());
    let named = names.find(|name| matches!(name, ServerName::DnsName(_)));
    let name = named.map_or_else(|| ServerName::try_from("0.0.0.0"), Ok);
    let name = name.map_err(|_| StreamError::Unreachable)?;
    let handshake = TlsConnector::from(Arc::new(config)).connect(name, tcp).await;
    handshake.map_err(|error| judge(&error))
}

fn client_config(server: &RendezvousAddress, identity: &KeyPair) -> Result<ClientConfig, TlsError> {
    let mut config = tls::client_config(identity, server.id, SIGNALLING_ALPN)?;
    config.alpn_protocols = signalling_alpns();
    // Sent where it is a name, not where it is an address (RFC 6066, section 3).
    config.enable_sni = true;
    Ok(config)
}

/// What a failed handshake says of whoever is at the other end.
fn judge(error: &io::Error) -> StreamError {
    let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<TlsError>()) else {
        // The connection broke in the middle: some filters do that to what they cannot read.
        return StreamError::Intercepted(format!("the handshake broke off: {error}"));
    };
    match tls {
        TlsError::InvalidCertificate(CertificateError::ApplicationVerificationFailure) => {
            StreamError::WrongKey
        }
        TlsError::InvalidCertificate(_)
        | TlsError::PeerIncompatible(_)
        | TlsError::NoCertificatesPresented
        | TlsError::UnsupportedNameType => {
            StreamError::Intercepted("it shows a certificate that is not the server's key".to_owned())
        }
        TlsError::InvalidMessage(_) => StreamError::Intercepted("its answer is not TLS".to_owned()),
        TlsError::AlertReceived(AlertDescription::NoApplicationProtocol) => {
            StreamError::Intercepted("it is a web server of another kind".to_owned())
        }
        other => StreamError::Intercepted(other.to_string()),
    }
}

/// What fails here makes the stream slower, no more.
fn set_options(tcp: &TcpStream) {
    let set = tcp.set_nodelay(true);
    #[cfg(target_os = "linux")]
    let set = set.and_then(|()| {
        let socket = socket2::SockRef::from(tcp);
        socket.set_tcp_notsent_lowat(NOT_SENT)?;
        socket.set_tcp_user_timeout(Some(USER_TIMEOUT))
    });
    if let Err(error) = set {
        tracing::debug!(%error, "socket options stay as they are");
    }
}

#[cfg(test)]
#[path = "dial_tests.rs"]
mod tests;
