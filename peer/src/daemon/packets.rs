//! QUIC between a command and the daemon, over their stream socket: a share of a session is a QUIC connection like any other, with its streams, resets,
//! datagrams and flow control, so that whoever uses a session need not know whose it is.
//!
//! The kernel loses and reorders nothing on the way. TLS stays: each side proves the key that the session is under.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, ErrorKind, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use quinn::congestion::NewRenoConfig;
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, EndpointConfig, TransportConfig, UdpPoller, VarInt};
use rendezvous_wire::{KeyPair, tls};
use tokio::sync::Notify;

/// ALPN of this connection.
const ALPN: &[u8] = b"rendezvous-daemon/1";

/// Largest QUIC packet: what is read from a file or a pipe at once takes few of them, and quinn's receive buffer is 32.
pub(super) const MAX_PACKET: usize = 16 * 1024;

/// Bytes of packets that may wait on either side of the socket.
const QUEUE: usize = 512 * 1024;

/// Data that may be on its way: there is no network to be gentle to, flow control is what bounds it.
const WINDOW: u32 = 8 << 20;

/// Of each stream.
const STREAM_WINDOW: u32 = 1 << 20;

/// As many as the session beneath has.
const MAX_STREAMS: u32 = 2048;

/// The socket's end is the end in nearly all cases; this is for streams that are held without their session.
const IDLE: Duration = Duration::from_secs(60);

/// Well within that.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Datagrams that may wait at either end, in bytes.
const DATAGRAMS: usize = 1 << 20;

/// quinn's end: the socket stays open for as long as quinn has this.
pub(super) struct Packets(pub(super) Arc<Queues>);

impl Drop for Packets {
    fn drop(&mut self) {
        lock(&self.0.out).ended = true;
        self.0.leaving.notify_one();
    }
}

/// Packets on their way in and out.
#[derive(Default)]
pub(super) struct Queues {
    out: Mutex<Queue>,
    inward: Mutex<Queue>,
    /// There is something to write.
    pub(super) leaving: Notify,
    /// There is room for what is read.
    room: Notify,
}

#[derive(Default)]
struct Queue {
    packets: VecDeque<Bytes>,
    bytes: usize,
    /// Whoever waits for room in it, or for a packet.
    waiting: Vec<Waker>,
    /// The other end is gone: what is sent is lost, as on any network.
    closed: bool,
    /// Nothing will be sent any more.
    ended: bool,
}

impl Queue {
    fn is_full(&self) -> bool {
        self.bytes >= QUEUE
    }

    fn push(&mut self, packet: Bytes) {
        self.bytes += packet.len();
        self.packets.push_back(packet);
    }

    fn pop(&mut self) -> Option<Bytes> {
        let packet = self.packets.pop_front()?;
        self.bytes -= packet.len();
        Some(packet)
    }

    fn wait(&mut self, waker: &Waker) {
        if !self.waiting.iter().any(|other| other.will_wake(waker)) {
            self.waiting.push(waker.clone());
        }
    }

    fn wake(&mut self) {
        self.waiting.drain(..).for_each(Waker::wake);
    }
}

impl fmt::Debug for Packets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packets").finish_non_exhaustive()
    }
}

fn lock(queue: &Mutex<Queue>) -> MutexGuard<'_, Queue> {
    // Each change leaves it whole.
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Queues {
    /// Everything that is to be written, and whether it is the last.
    pub(super) fn take(&self) -> (VecDeque<Bytes>, bool) {
        let mut out = lock(&self.out);
        out.bytes = 0;
        out.wake();
        (std::mem::take(&mut out.packets), out.ended)
    }

    /// A packet has been read; waits while there are too many that quinn has not taken.
    pub(super) async fn arrived(&self, packet: Bytes) {
        loop {
            let room = self.room.notified();
            {
                let mut inward = lock(&self.inward);
                if !inward.is_full() || inward.closed {
                    inward.push(packet);
                    return inward.wake();
                }
            }
            room.await;
        }
    }

    /// The other end is gone.
    pub(super) fn close(&self) {
        for queue in [&self.out, &self.inward] {
            let mut queue = lock(queue);
            queue.closed = true;
            queue.wake();
        }
        self.room.notify_one();
    }
}

impl AsyncUdpSocket for Packets {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Poller(self.0.clone()))
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let mut out = lock(&self.0.out);
        if out.closed {
            return Ok(());
        }
        if out.is_full() {
            return Err(ErrorKind::WouldBlock.into());
        }
        let size = transmit.segment_size.unwrap_or(transmit.contents.len()).max(1);
        for packet in transmit.contents.chunks(size) {
            out.push(Bytes::copy_from_slice(packet));
        }
        self.0.leaving.notify_one();
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut inward = lock(&self.0.inward);
        let mut count = 0;
        for (buffer, meta) in buffers.iter_mut().zip(meta.iter_mut()) {
            let Some(packet) = inward.pop() else { break };
            let length = packet.len().min(buffer.len());
            buffer[..length].copy_from_slice(&packet[..length]);
            *meta = RecvMeta { addr: OTHER, len: length, stride: length, ecn: None, dst_ip: None };
            count += 1;
        }
        if count == 0 {
            inward.wait(cx.waker());
            return Poll::Pending;
        }
        drop(inward);
        self.0.room.notify_one();
        Poll::Ready(Ok(count))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(OWN)
    }

    fn may_fragment(&self) -> bool {
        false
    }
}

/// What quinn takes for the addresses of this end and of the other. They mean nothing.
const OWN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 1);
const OTHER: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 2);

struct Poller(Arc<Queues>);

impl fmt::Debug for Poller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Poller").finish_non_exhaustive()
    }
}

impl UdpPoller for Poller {
    fn poll_writable(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut out = lock(&self.0.out);
        if out.closed || !out.is_full() {
            return Poll::Ready(Ok(()));
        }
        out.wait(cx.waker());
        Poll::Pending
    }
}

/// Why the two ends found no connection: never in practice, since the key is one and the same.
#[derive(Debug, thiserror::Error)]
pub(super) enum PacketsError {
    #[error(transparent)]
    Tls(#[from] rustls::Error),
    #[error(transparent)]
    Cipher(#[from] quinn::crypto::rustls::NoInitialCipherSuite),
    #[error(transparent)]
    Socket(#[from] io::Error),
    #[error(transparent)]
    Connect(#[from] quinn::ConnectError),
    #[error(transparent)]
    Connection(#[from] quinn::ConnectionError),
    #[error("the other end is gone")]
    Gone,
}

fn transport() -> Arc<TransportConfig> {
    let mut congestion = NewRenoConfig::default();
    congestion.initial_window(u64::from(WINDOW));
    let mut transport = TransportConfig::default();
    transport
        .receive_window(VarInt::from_u32(WINDOW))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .send_window(WINDOW.into())
        .max_concurrent_bidi_streams(VarInt::from_u32(MAX_STREAMS))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .max_idle_timeout(IDLE.try_into().ok())
        .keep_alive_interval(Some(KEEP_ALIVE))
        .initial_mtu(MAX_PACKET as u16)
        .min_mtu(MAX_PACKET as u16)
        .mtu_discovery_config(None)
        .datagram_receive_buffer_size(Some(DATAGRAMS))
        .datagram_send_buffer_size(DATAGRAMS)
        .congestion_controller_factory(Arc::new(congestion));
    Arc::new(transport)
}

fn endpoint(packets: Packets, server: Option<quinn::ServerConfig>) -> io::Result<quinn::Endpoint> {
    let mut config = EndpointConfig::default();
    // Never fails: it is in the allowed range.
    let _ = config.max_udp_payload_size(MAX_PACKET as u16);
    quinn::Endpoint::new_with_abstract_socket(
        config,
        server,
        Arc::new(packets),
        Arc::new(quinn::TokioRuntime),
    )
}

/// The command's end.
pub(super) async fn connect(packets: Packets, key: &KeyPair) -> Result<quinn::Connection, PacketsError> {
    let tls = tls::client_config(key, key.id(), ALPN)?;
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls)?;
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(transport());
    Ok(endpoint(packets, None)?.connect_with(config, OTHER, "daemon")?.await?)
}

/// The daemon's end.
pub(super) async fn accept(packets: Packets, key: &KeyPair) -> Result<quinn::Connection, PacketsError> {
    let tls = tls::server_config(key, Some(key.id()), ALPN)?;
    let crypto = quinn::crypto::rustls::QuicServerConfig::try_from(tls)?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    config.migration(false).transport_config(transport());
    let incoming = endpoint(packets, Some(config))?.accept().await.ok_or(PacketsError::Gone)?;
    Ok(incoming.await?)
}
