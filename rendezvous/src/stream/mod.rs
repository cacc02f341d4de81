//! TCP 443: registration, signalling and relay in one TLS stream for peers whose network lets no UDP through, and HTTPS for
//! everybody else.
//!
//! | module | what |
//! |---|---|
//! | `mod` | accepts, and tells peers from others by their ClientHello |
//! | `conversation` | a peer's stream, from its registration to its end |
//! | [`outlet`] | the frames that wait for a stream |
//! | `https` | a page and the health of the server |

mod conversation;
mod https;
pub(crate) mod outlet;

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rendezvous_wire::{ADMISSION_ALPN, KeyPair, SIGNALLING_ALPN, signalling_alpns, tls};
use rustls::ServerConfig;
use rustls::server::Acceptor;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_rustls::LazyConfigAcceptor;
use tracing::{debug, trace, warn};

use crate::limits::Source;
use crate::owner::canonical;
use crate::relay::bell::Entrance;
use crate::signalling::{HANDSHAKE_TIMEOUT, HANDSHAKES, Shared};

/// Connections of one source that have not registered, HTTPS among them.
const UNREGISTERED_PER_SOURCE: usize = 64;

/// Unsent bytes that the kernel takes of a stream (TCP_NOTSENT_LOWAT, tcp(7)): what waits longer is better dropped than late.
#[cfg(target_os = "linux")]
const NOT_SENT: u32 = 64 * 1024;

/// How long data may go unacknowledged before the kernel ends a stream (RFC 5482): as long as a QUIC connection may be idle.
#[cfg(target_os = "linux")]
const USER_TIMEOUT: Duration = Duration::from_secs(45);

/// Pause after the system has refused a connection, for want of file descriptors most likely: it is ready again at once, and would refuse again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What all streams share.
#[derive(Debug)]
pub(crate) struct Streams {
    shared: Arc<Shared>,
    peers: Arc<ServerConfig>,
    others: Arc<ServerConfig>,
    shards: Vec<Entrance>,
    next: AtomicU64,
    /// All connections, and those of each source that have not registered.
    open: Mutex<Open>,
    closing: watch::Receiver<bool>,
}

#[derive(Debug, Default)]
struct Open {
    all: usize,
    unregistered: HashMap<Source, usize>,
}

/// Why TLS cannot be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// The key or the certificate does not make a TLS configuration.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// No certificate could be made for HTTPS.
    #[error("the certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    /// A socket.
    #[error("the socket: {0}")]
    Socket(#[from] io::Error),
}

impl Streams {
    /// `shards` are the relay threads; `closing` becomes true when the server goes away.
    pub(crate) fn new(
        key: &KeyPair,
        host: &str,
        shared: Arc<Shared>,
        shards: Vec<Entrance>,
        closing: watch::Receiver<bool>,
    ) -> Result<Self, StreamError> {
        let mut peers = tls::server_config(key, None, SIGNALLING_ALPN)?;
        // Nobody resumes: a ticket would only cost memory on both sides.
        peers.send_tls13_tickets = 0;
        peers.alpn_protocols = signalling_alpns();
        Ok(Self {
            shared,
            peers: Arc::new(peers),
            others: Arc::new(https::tls_config(host)?),
            shards,
            next: AtomicU64::new(0),
            open: Mutex::default(),
            closing,
        })
    }

    /// Lets a connection in, if its source has not had too many.
    fn admit(self: &Arc<Self>, remote: SocketAddr) -> Option<Admitted> {
        let source = Source::from(remote.ip());
        // TCP's handshake has proved the address.
        let mut doors = self.shared.doors.lock().unwrap_or_else(PoisonError::into_inner);
        if !doors.proven.take(source, Instant::now()) {
            return None;
        }
        drop(doors);
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let of_source = open.unregistered.get(&source).copied().unwrap_or(0);
        let most = self.shared.limits.load().registrations.saturating_add(HANDSHAKES);
        if open.all >= most || of_source >= UNREGISTERED_PER_SOURCE {
            return None;
        }
        open.all += 1;
        open.unregistered.insert(source, of_source + 1);
        Some(Admitted { streams: self.clone(), source: Some(source) })
    }
}

/// Counts a connection until it is dropped.
#[derive(Debug)]
struct Admitted {
    streams: Arc<Streams>,
    /// Until it has registered.
    source: Option<Source>,
}

impl Admitted {
    /// From now on the directory counts it.
    fn registered(&mut self) {
        if let Some(source) = self.source.take() {
            self.streams.open.lock().unwrap_or_else(PoisonError::into_inner).leave(source);
        }
    }
}

impl Open {
    fn leave(&mut self, source: Source) {
        if let Some(count) = self.unregistered.get_mut(&source) {
            *count -= 1;
            if *count == 0 {
                self.unregistered.remove(&source);
            }
        }
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.registered();
        self.streams.open.lock().unwrap_or_else(PoisonError::into_inner).all -= 1;
    }
}

/// Takes connections for as long as the server runs.
pub(crate) async fn accept(listener: TcpListener, streams: Arc<Streams>) {
    let mut told = false;
    loop {
        let (tcp, remote) = match listener.accept().await {
            Ok((tcp, remote)) => (tcp, canonical(remote)),
            Err(error) if is_of_one_connection(&error) => continue,
            Err(error) => {
                if !told {
                    warn!(%error, "TCP connections cannot be taken at present");
                }
                told = true;
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        told = false;
        let Some(admitted) = streams.admit(remote) else {
            trace!(%remote, "too many connections of one source, or in all");
            continue;
        };
        tokio::spawn(async move {
            if let Err(error) = serve(tcp, remote, admitted).await {
                debug!(%remote, %error, "a stream has ended");
            }
        });
    }
}

/// Whether an error of accept(2) is about the connection that was to be accepted.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted)
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the handshake took too long")]
    Handshake,
    #[error(transparent)]
    Conversation(#[from] conversation::ConversationError),
    #[error(transparent)]
    Https(#[from] https::HttpsError),
}

async fn serve(tcp: TcpStream, remote: SocketAddr, admitted: Admitted) -> Result<(), ServeError> {
    let streams = admitted.streams.clone();
    set_options(&tcp);
    let hello = LazyConfigAcceptor::new(Acceptor::default(), tcp);
    let handshake = async {
        let start = hello.await?;
        let is_peer = start.client_hello().alpn().is_some_and(|mut protocols| {
            protocols.any(|protocol| protocol == SIGNALLING_ALPN || protocol == ADMISSION_ALPN)
        });
        let config = if is_peer { &streams.peers } else { &streams.others };
        Ok::<_, io::Error>((is_peer, start.into_stream(config.clone()).await?))
    };
    let (is_peer, stream) =
        timeout(HANDSHAKE_TIMEOUT, handshake).await.map_err(|_| ServeError::Handshake)??;
    if is_peer {
        conversation::serve(stream, remote, admitted).await?;
    } else {
        https::serve(stream).await?;
    }
    Ok(())
}

/// What fails here makes a stream slower, no more.
fn set_options(tcp: &TcpStream) {
    let set = tcp.set_nodelay(true);
    #[cfg(target_os = "linux")]
    let set = set.and_then(|()| {
        let socket = socket2::SockRef::from(tcp);
        socket.set_tcp_notsent_lowat(NOT_SENT)?;
        socket.set_tcp_user_timeout(Some(USER_TIMEOUT))
    });
    if let Err(error) = set {
        debug!(%error, "socket options stay as they are");
    }
}

impl Streams {
    /// A number that no other stream has, and the relay thread that serves it: one alone, so that its frames keep their order.
    fn next(&self) -> (u64, &Entrance) {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        (number, &self.shards[number as usize % self.shards.len()])
    }
}
