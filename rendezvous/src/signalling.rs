//! Registration and signalling: QUIC on UDP 443, one connection and one bidirectional stream per registration.

use std::io;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use quinn::crypto::rustls::{HandshakeData, QuicServerConfig};
use quinn::{
    Connection, ConnectionError, Endpoint, EndpointConfig, IdleTimeout, Incoming, ReadError, RecvStream,
    SendStream, TransportConfig, VarInt,
};
use quinn_proto::HashedConnectionIdGenerator;
use rendezvous_wire::admission::Work;
use rendezvous_wire::message::{Decoder, MessageError, Notice, Register, Request, close_code, encode};
use rendezvous_wire::{ADMISSION_ALPN, KeyPair, PeerId, SIGNALLING_ALPN, Token, signalling_alpns, tls};
use ring::hmac;
use rustls::pki_types::CertificateDer;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tracing::debug;

use crate::admission::Refusal;
use crate::admission::gate::{Gate, WORK_TIME};
use crate::broker::Departure;
use crate::directory::RegisterError;
use crate::limits::{Bucket, Limits, PrefixBuckets, Rate};
use crate::owner::{Event, Line, Mailbox, Outbox, Seat, mailbox};

/// A peer keeps its connection alive every 15 s or so; three may be lost.
pub(crate) const IDLE_TIMEOUT: Duration = Duration::from_secs(45);

/// From the first packet to a proven key. No shorter than a peer's patience with a server that has answered: when all come back at once, a handshake that
/// is given up would have to be made once more.
pub(crate) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// From a proven key to the registration. As long, for the same reason.
pub(crate) const REGISTER_TIMEOUT: Duration = Duration::from_secs(10);

/// What a peer may have under way to us: an introduction with a whole first flight, twice.
const RECEIVE_WINDOW: u32 = 16 * 1024;

/// What we may have under way to a peer.
const SEND_WINDOW: u64 = 32 * 1024;

/// Bytes read at a time.
const READ: usize = 4 * 1024;

/// Messages of one connection; what comes faster waits, and QUIC's flow control tells the peer.
pub(crate) const MESSAGES: Rate = Rate::new(256, 64);

/// Connections beyond [`Limits::registrations`] that may be shaking hands.
pub(crate) const HANDSHAKES: usize = 1_024;

/// With so many unregistered connections every new one must prove its address first: a flood from forged addresses
/// then leaves no state here.
const RETRY_ABOVE: usize = 256;

/// Least time between two stateless resets: after a restart a thousand peers a second may need one.
const RESET_INTERVAL: Duration = Duration::from_millis(1);

/// What every connection shares.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) limits: ArcSwap<Limits>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) events: mpsc::Sender<Event>,
    pub(crate) doors: Mutex<Doors>,
    /// Connections that have not registered yet.
    pub(crate) unregistered: AtomicUsize,
}

/// New connections per source ([`Limits::connecting`]), by whether the source has proved its address.
#[derive(Debug)]
pub(crate) struct Doors {
    pub(crate) proven: PrefixBuckets,
    pub(crate) unproven: PrefixBuckets,
}

impl Doors {
    pub(crate) fn new(limits: &Limits, keys: [[u64; 2]; 2]) -> Self {
        let [proven, unproven] = keys.map(|keys| PrefixBuckets::new(Self::rates(limits), keys));
        Self { proven, unproven }
    }

    pub(crate) fn set_limits(&mut self, limits: &Limits) {
        self.proven.set_rates(Self::rates(limits));
        self.unproven.set_rates(Self::rates(limits));
    }

    fn rates(limits: &Limits) -> [Rate; 2] {
        [limits.connecting, limits.connecting_per_prefix]
    }
}

/// Counts a connection among the unregistered ones until it is dropped.
pub(crate) struct Unregistered<'a>(&'a AtomicUsize);

impl<'a> Unregistered<'a> {
    pub(crate) fn count(counter: &'a AtomicUsize) -> Self {
        counter.fetch_add(1, Ordering::Relaxed);
        Self(counter)
    }
}

impl Drop for Unregistered<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Opens an endpoint that proves `key`. Must be called within a runtime.
pub(crate) fn endpoint(key: &KeyPair, socket: UdpSocket) -> Result<Endpoint, EndpointError> {
    let mut tls = tls::server_config(key, None, SIGNALLING_ALPN)?;
    // Nobody resumes: a ticket would only cost memory on both sides.
    tls.send_tls13_tickets = 0;
    tls.alpn_protocols = signalling_alpns();
    let crypto = QuicServerConfig::try_from(tls).map_err(|_| EndpointError::Cipher)?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    config.transport_config(Arc::new(transport()));
    let mut endpoint = resets(key);
    endpoint.grease_quic_bit(false);
    Ok(Endpoint::new(endpoint, Some(config), socket, Arc::new(quinn::TokioRuntime))?)
}

/// A server that was killed and started again answers what comes on connections of before with stateless resets (RFC 9000, section 10.3), so that
/// their peers come back at once and not after a time-out. For that the tokens must be the same, and so the keys: both come from the server's own.
fn resets(key: &KeyPair) -> EndpointConfig {
    let derive = |purpose: &str| {
        let secret = hmac::Key::new(hmac::HMAC_SHA256, &key.to_der());
        hmac::sign(&secret, purpose.as_bytes())
    };
    let reset = hmac::Key::new(hmac::HMAC_SHA256, derive("stateless resets").as_ref());
    let mut endpoint = EndpointConfig::new(Arc::new(reset));
    let ids = derive("connection ids");
    let ids = ids.as_ref().first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes));
    endpoint.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(ids)));
    endpoint.min_reset_interval(RESET_INTERVAL);
    endpoint
}

/// An endpoint could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EndpointError {
    /// The key does not make a TLS configuration.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// The provider lacks the cipher suite that QUIC begins with.
    #[error("TLS: no cipher suite for QUIC's first packets")]
    Cipher,
    /// The socket.
    #[error("the socket: {0}")]
    Socket(#[from] io::Error),
}

/// Small windows and few streams: a peer that waits must cost little.
fn transport() -> TransportConfig {
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(RECEIVE_WINDOW))
        .receive_window(VarInt::from_u32(RECEIVE_WINDOW))
        .send_window(SEND_WINDOW)
        .datagram_receive_buffer_size(None)
        .mtu_discovery_config(None)
        .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(IDLE_TIMEOUT.as_millis() as u32))));
    transport
}

/// Takes connections until the endpoint is closed.
pub(crate) async fn accept(endpoint: Endpoint, shared: Arc<Shared>) {
    while let Some(incoming) = endpoint.accept().await {
        if let Some(incoming) = screen(&endpoint, incoming, &shared) {
            let shared = shared.clone();
            tokio::spawn(async move {
                if let Err(error) = serve(incoming, &shared).await {
                    debug!(%error, "a connection has ended");
                }
            });
        }
    }
}

/// Lets an attempt through, makes its source prove its address first, or turns it away.
///
/// Proven and unproven attempts have quotas of their own: whoever forges an address can spend the second, and then
/// its owner takes one round trip more, but is not locked out.
fn screen(endpoint: &Endpoint, incoming: Incoming, shared: &Shared) -> Option<Incoming> {
    let most = shared.limits.load().registrations.saturating_add(HANDSHAKES);
    if endpoint.open_connections() >= most {
        incoming.refuse();
        return None;
    }
    let (source, now) = (incoming.remote_address().ip().into(), Instant::now());
    let mut doors = shared.doors.lock().unwrap_or_else(PoisonError::into_inner);
    if incoming.remote_address_validated() || !incoming.may_retry() {
        if doors.proven.take(source, now) {
            return Some(incoming);
        }
        incoming.refuse();
    } else {
        let quiet = shared.unregistered.load(Ordering::Relaxed) < RETRY_ABOVE;
        if quiet && doors.unproven.take(source, now) {
            return Some(incoming);
        }
        let _ = incoming.retry();
    }
    None
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error("{0}")]
    Connection(#[from] ConnectionError),
    #[error("the handshake took too long")]
    Handshake,
    #[error("no key was proven")]
    Identity,
    #[error("no registration came")]
    NotRegistered,
    #[error("{0}")]
    Message(#[from] MessageError),
    // In these words the peer is told.
    #[error("{0}")]
    Refused(#[from] RegisterError),
    #[error("{0}")]
    NotAdmitted(#[from] Refusal),
    #[error("the stream was reset")]
    Stream,
    #[error("the peer has finished")]
    Finished,
    #[error("the server is stopping")]
    Stopping,
}

impl ServeError {
    /// How the connection is closed, where it still is open.
    fn close_code(&self) -> u32 {
        match self {
            Self::Message(_) | Self::Identity => close_code::MALFORMED,
            Self::NotRegistered | Self::Handshake => close_code::NOT_REGISTERED,
            Self::Refused(_) | Self::NotAdmitted(_) => close_code::REFUSED,
            Self::Connection(_) | Self::Stream | Self::Finished | Self::Stopping => close_code::SHUTDOWN,
        }
    }

    fn departure(&self) -> Departure {
        match self {
            Self::Connection(ConnectionError::ApplicationClosed(close))
                if close.error_code == VarInt::from_u32(close_code::SHUTDOWN) =>
            {
                Departure::Goodbye
            }
            Self::Finished => Departure::Goodbye,
            _ => Departure::Lost,
        }
    }
}

impl From<ReadError> for ServeError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::ConnectionLost(error) => Self::Connection(error),
            _ => Self::Stream,
        }
    }
}

async fn serve(incoming: Incoming, shared: &Shared) -> Result<(), ServeError> {
    let unregistered = Unregistered::count(&shared.unregistered);
    let connecting = incoming.accept()?;
    let connection = timeout(HANDSHAKE_TIMEOUT, connecting).await.map_err(|_| ServeError::Handshake)??;
    let result = register_and_serve(&connection, shared, unregistered).await;
    if let Err(error) = &result {
        connection.close(error.close_code().into(), error.to_string().as_bytes());
    }
    result
}

async fn register_and_serve(
    connection: &Connection,
    shared: &Shared,
    unregistered: Unregistered<'_>,
) -> Result<(), ServeError> {
    let peer = proven_peer(connection).ok_or(ServeError::Identity)?;
    let able = agreed(connection).as_deref() == Some(ADMISSION_ALPN);
    let first = timeout(REGISTER_TIMEOUT, first_message(connection)).await;
    let (mut conversation, token, says) = first.map_err(|_| ServeError::NotRegistered)??;
    if let Some(work) = shared.gate.work(peer, able)? {
        conversation.challenge(work).await?;
    }
    if shared.gate.take_lapsed(peer) {
        shared.events.send(Event::Unban(peer)).await.map_err(|_| ServeError::Stopping)?;
    }
    let source = connection.remote_address().ip();
    shared.gate.judge(peer, source, token.as_ref()).await?;

    let most = shared.limits.load().queued_bytes;
    let (mailbox, outbox): (Mailbox, Outbox) = mailbox(Line::Quic(connection.clone()), most, able);
    let (answer, registered) = oneshot::channel();
    let event = Event::Register { peer, says, mailbox, binding: None, answer };
    shared.events.send(event).await.map_err(|_| ServeError::Stopping)?;
    let seat = registered.await.map_err(|_| ServeError::Stopping)??;
    drop(unregistered);

    let Err(error) = conversation.run(seat, outbox, shared).await;
    let _ = shared.events.send(Event::Departed(seat, error.departure())).await;
    Err(error)
}

fn proven_peer(connection: &Connection) -> Option<PeerId> {
    let identity = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    tls::proven_identity(&identity)
}

/// The protocol that both sides have agreed on.
fn agreed(connection: &Connection) -> Option<Vec<u8>> {
    connection.handshake_data()?.downcast::<HandshakeData>().ok()?.protocol
}

/// The registration, and the token that may come before it.
async fn first_message(
    connection: &Connection,
) -> Result<(Conversation, Option<Token>, Register), ServeError> {
    let (send, receive) = connection.accept_bi().await?;
    let mut conversation = Conversation { send, receive, decoder: Decoder::default() };
    let mut token = None;
    let mut first = conversation.read().await?;
    if let Request::Present(presented) = first {
        token = Some(presented);
        first = conversation.read().await?;
    }
    match first {
        Request::Register(says) => Ok((conversation, token, says)),
        _ => Err(ServeError::NotRegistered),
    }
}

/// The one stream of a connection.
struct Conversation {
    send: SendStream,
    receive: RecvStream,
    decoder: Decoder,
}

/// Nothing: a conversation only ever ends with an error.
enum Never {}

impl Conversation {
    /// Cancel-safe: bytes that have been read wait in the decoder.
    async fn read(&mut self) -> Result<Request, ServeError> {
        loop {
            if let Some(request) = self.decoder.poll()? {
                return Ok(request);
            }
            match self.receive.read_chunk(READ, true).await? {
                Some(chunk) => self.decoder.extend(&chunk.bytes),
                None => return Err(ServeError::Finished),
            }
        }
    }

    /// Has the peer work.
    async fn challenge(&mut self, work: Work) -> Result<(), ServeError> {
        let notice = encode(&Notice::Challenge(work.challenge))?;
        self.send.write_all(&notice).await.map_err(|_| ServeError::Stream)?;
        let answer = timeout(WORK_TIME, self.read()).await.map_err(|_| Refusal::Work)??;
        match answer {
            Request::Solve(solution) if work.is_done_by(solution) => Ok(()),
            _ => Err(Refusal::Work.into()),
        }
    }

    async fn run(&mut self, seat: Seat, mut outbox: Outbox, shared: &Shared) -> Result<Never, ServeError> {
        let mut pace = Bucket::default();
        loop {
            tokio::select! {
                notice = outbox.next() => {
                    let notice = notice.ok_or(ServeError::Stopping)?;
                    let length = notice.len();
                    // Not written: the peer has stopped the stream, or is gone. Reading tells which.
                    self.send.write_chunk(notice).await.map_err(|_| ServeError::Stream)?;
                    outbox.written(length);
                }
                request = self.read() => {
                    let request = request?;
                    while !pace.take(MESSAGES, Instant::now()) {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                    let event = Event::Request(seat, request);
                    shared.events.send(event).await.map_err(|_| ServeError::Stopping)?;
                }
            }
        }
    }
}
