//! The path socket: one UDP socket per family, and those that won a path of their own, under quinn: they carry QUIC for every remote over whatever path is best now,
//! together with STUN and the relay's frames.
//!
//! quinn sends to a remote's synthetic address; the route in the [`Table`] says where that goes. Errors never reach
//! quinn: any but `WouldBlock` would end a connection or the endpoint, and to QUIC a lost datagram is only a lost datagram.

mod congestion;
mod meter;
mod pieces;
mod relay_meter;
mod remote;
mod sending;
mod table;
mod wakefulness;

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::io::{self, ErrorKind, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures_util::task::AtomicWaker;
use quinn::udp::{RecvMeta, Transmit, UdpSocketState};
use quinn::{AsyncUdpSocket, UdpPoller};
use rendezvous_wire::relay::HEADER_LEN;
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;

pub(crate) use congestion::SwitchAwareConfig;
pub(crate) use pieces::WidthProbe;
pub(crate) use remote::{Carried, Carrier, Framed, Remote, Route, SocketIndex, Straight};
pub(crate) use table::Table;
pub(crate) use wakefulness::ASLEEP;

use pieces::Control;
use wakefulness::Wakefulness;

/// STUN messages that may wait for the driver; more are dropped, as a full socket buffer would drop them.
const STUN_QUEUE: usize = 1024;

/// Injected and stray datagrams that may wait for quinn.
const INJECT_QUEUE: usize = 1024;

/// A STUN message from the network, not yet parsed.
#[derive(Debug)]
pub(crate) struct StunDatagram {
    pub(crate) socket: SocketIndex,
    pub(crate) source: SocketAddr,
    pub(crate) bytes: Bytes,
}

/// What the driver hears of probes, by their nonces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Width {
    /// The other side asks, on a stream.
    Asked([u8; 8]),
    /// The other side has answered.
    Answered([u8; 8]),
}

/// Most sockets: as many as [`PathSocket::blocked`] has bits.
const MAX_SOCKETS: usize = 64;

/// More than a socket's buffer holds of the smallest datagrams.
const MOST_STALE: u32 = 100_000;

/// One UDP socket.
struct Inner {
    io: Arc<UdpSocket>,
    state: UdpSocketState,
    local: SocketAddr,
}

impl Inner {
    fn new(io: Arc<UdpSocket>) -> io::Result<Self> {
        let state = UdpSocketState::new((&*io).into())?;
        // Best effort: the system may allow less.
        let _ = state.set_send_buffer_size((&*io).into(), 4 << 20);
        let _ = state.set_recv_buffer_size((&*io).into(), 4 << 20);
        let local = io.local_addr()?;
        Ok(Self { io, state, local })
    }

    fn sockref(&self) -> quinn::udp::UdpSockRef<'_> {
        (&*self.io).into()
    }
}

/// See the module's documentation.
pub(crate) struct PathSocket {
    /// By index; the first ones, one per family, stay for good.
    inners: ArcSwap<Vec<Option<Arc<Inner>>>>,
    /// The addresses of the first ones.
    own: Vec<SocketAddr>,
    table: ArcSwap<Table>,
    /// A bit for each socket that would block.
    blocked: AtomicU64,
    injected: Mutex<VecDeque<(SocketAddr, Bytes)>>,
    injected_waker: AtomicWaker,
    stun: mpsc::Sender<StunDatagram>,
    /// Synthetic addresses of remotes whose first flight was captured.
    flights: mpsc::UnboundedSender<SocketAddr>,
    wakefulness: Wakefulness,
    /// Synthetic addresses of remotes whose traffic the driver has to look at.
    traffic: mpsc::UnboundedSender<SocketAddr>,
    /// Probes to be answered on a stream, and answers.
    widths: mpsc::Sender<(SocketAddr, Width)>,
    /// Which socket is read first, so that a busy one cannot starve the other.
    turn: AtomicU64,
}

/// What the driver reads from the path socket.
pub(crate) struct Outlets {
    pub(crate) stun: mpsc::Receiver<StunDatagram>,
    pub(crate) flights: mpsc::UnboundedReceiver<SocketAddr>,
    pub(crate) traffic: mpsc::UnboundedReceiver<SocketAddr>,
    pub(crate) widths: mpsc::Receiver<(SocketAddr, Width)>,
}

impl fmt::Debug for PathSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.inners.load().iter().flatten().map(|inner| inner.local)).finish()
    }
}

impl PathSocket {
    /// Takes sockets that are bound and non-blocking. Must be called inside a tokio runtime.
    pub(crate) fn new(sockets: Vec<std::net::UdpSocket>) -> io::Result<(Arc<Self>, Outlets)> {
        let inners = sockets.into_iter().map(|socket| {
            let inner = Inner::new(Arc::new(UdpSocket::from_std(socket)?))?;
            Ok(Some(Arc::new(inner)))
        });
        let inners = inners.collect::<io::Result<Vec<_>>>()?;
        if inners.is_empty() || inners.len() > MAX_SOCKETS {
            return Err(io::Error::new(ErrorKind::InvalidInput, "from 1 to 64 sockets"));
        }
        let own = inners.iter().flatten().map(|inner: &Arc<Inner>| inner.local).collect();
        let (stun, stun_rx) = mpsc::channel(STUN_QUEUE);
        let (flights, flights_rx) = mpsc::unbounded_channel();
        let (traffic, traffic_rx) = mpsc::unbounded_channel();
        let (widths, widths_rx) = mpsc::channel(STUN_QUEUE);
        let socket = Self {
            inners: ArcSwap::from_pointee(inners),
            own,
            table: ArcSwap::default(),
            blocked: AtomicU64::new(0),
            injected: Mutex::default(),
            injected_waker: AtomicWaker::new(),
            stun,
            flights,
            wakefulness: Wakefulness::new(Instant::now()),
            traffic,
            widths,
            turn: AtomicU64::new(0),
        };
        Ok((
            Arc::new(socket),
            Outlets { stun: stun_rx, flights: flights_rx, traffic: traffic_rx, widths: widths_rx },
        ))
    }

    /// The addresses of its own sockets, by index; adopted ones not counted.
    pub(crate) fn local_addresses(&self) -> &[SocketAddr] {
        &self.own
    }

    /// The address of any of its sockets.
    pub(crate) fn local_address(&self, index: SocketIndex) -> Option<SocketAddr> {
        self.inner(index).map(|inner| inner.local)
    }

    /// Takes in a socket that has won a path. `None` when there are as many as there can be. For the driver alone.
    pub(crate) fn adopt(&self, io: Arc<UdpSocket>) -> Option<SocketIndex> {
        let inner = Inner::new(io).ok()?;
        let mut inners = Vec::clone(&self.inners.load());
        let index = inners.iter().position(Option::is_none).unwrap_or(inners.len());
        if index >= MAX_SOCKETS {
            return None;
        }
        inners.resize(inners.len().max(index + 1), None);
        inners[index] = Some(Arc::new(inner));
        self.inners.store(Arc::new(inners));
        // Whoever reads must look at the new one too.
        self.injected_waker.wake();
        Some(index)
    }

    /// Closes an adopted socket. For the driver alone.
    pub(crate) fn release(&self, index: SocketIndex) {
        let mut inners = Vec::clone(&self.inners.load());
        if let Some(slot) = inners.get_mut(index) {
            *slot = None;
        }
        self.inners.store(Arc::new(inners));
        self.blocked.fetch_and(!(1 << index), Ordering::Release);
    }

    fn inner(&self, index: SocketIndex) -> Option<Arc<Inner>> {
        self.inners.load().get(index).cloned().flatten()
    }

    /// The own socket that can send to `address`.
    pub(crate) fn socket_for(&self, address: SocketAddr) -> Option<SocketIndex> {
        self.own.iter().position(|local| local.is_ipv4() == address.is_ipv4())
    }

    /// Changes the table; for the driver alone, its only writer.
    pub(crate) fn update(&self, change: impl FnOnce(&mut Table)) {
        let mut table = Table::clone(&self.table.load());
        change(&mut table);
        self.table.store(Arc::new(table));
    }

    /// The process runs. To be called at least every [`ASLEEP`] but for when it does not.
    pub(crate) fn beat(&self, now: Instant) {
        self.wakefulness.beat(now, |asleep| self.forget_the_stale(asleep));
    }

    /// Throws away what has come while this process did not run.
    fn forget_the_stale(&self, asleep: Duration) {
        let mut buffer = [MaybeUninit::uninit(); 2048];
        let mut stale = 0u32;
        for inner in self.inners.load().iter().flatten() {
            // Not through the runtime, which may not have looked at the socket yet. What the kernel has queued is bounded by its buffer.
            let queue = socket2::SockRef::from(&*inner.io);
            while stale < MOST_STALE && queue.recv(&mut buffer).is_ok() {
                stale += 1;
            }
        }
        tracing::debug!(?asleep, stale, "awake again");
    }

    /// Hands quinn a datagram as if `remote` had sent it.
    pub(crate) fn inject(&self, remote: SocketAddr, datagram: Bytes) {
        let mut injected = self.injected.lock().unwrap_or_else(PoisonError::into_inner);
        if injected.len() < INJECT_QUEUE {
            injected.push_back((remote, datagram));
        }
        drop(injected);
        self.injected_waker.wake();
    }

    /// Sends a STUN message. A failure is a loss: the transaction's timer sees to it.
    ///
    /// Not through quinn's socket state: an address that the kernel refuses would turn segmentation offload off for good.
    pub(crate) fn send_stun(&self, socket: SocketIndex, destination: SocketAddr, datagram: &[u8]) {
        if let Some(inner) = self.inner(socket)
            && let Err(error) = inner.io.try_send_to(datagram, destination)
        {
            tracing::trace!(%destination, %error, "STUN not sent");
        }
    }

    /// Takes frames of `segment` bytes each, but for a shorter last one, that a relay has sent on a stream.
    pub(crate) fn receive_frames(&self, relay: SocketAddr, frames: &Bytes, segment: usize) {
        let now = Instant::now();
        self.wakefulness.look(now, |asleep| self.forget_the_stale(asleep));
        if self.wakefulness.is_drowsy(now) {
            return;
        }
        let table = self.table.load();
        let mut start = 0;
        while start < frames.len() {
            let end = frames.len().min(start.saturating_add(segment.max(1)));
            let frame = &frames[start..end];
            if let Some(remote) = table.framed(relay, frame) {
                self.note_received(&table, remote, relay, true, frame.len() - HEADER_LEN);
                self.inject(remote, frames.slice(start + HEADER_LEN..end));
            } else if let Some(remote) = table.channel(relay, frame)
                && let Some(control) = pieces::parse(&frame[HEADER_LEN..])
            {
                self.control(&table, remote, (relay, None), control);
            }
            start = end;
        }
    }

    /// The other side's path socket has said something from `source`; with the socket and the header that it came with, unless that
    /// was on a stream.
    fn control(
        &self,
        table: &Table,
        remote: SocketAddr,
        (source, back): (SocketAddr, Option<(SocketIndex, &[u8])>),
        control: Control<'_>,
    ) {
        match (control, back) {
            (Control::Piece(piece), _) => {
                let Some(known) = table.remotes.get(&remote) else { return };
                let whole = known.pieces.lock().unwrap_or_else(PoisonError::into_inner).take(piece);
                if let Some(whole) = whole {
                    let relayed = back.is_none() || table.relays.contains(&source);
                    self.note_received(table, remote, source, relayed, whole.len());
                    self.inject(remote, whole);
                }
            }
            // Far shorter than the probe: nothing to amplify with.
            (Control::Probe(nonce), Some((socket, frame))) => {
                self.send_stun(socket, source, &pieces::answer(frame, nonce));
            }
            (Control::Probe(nonce), None) => drop(self.widths.try_send((remote, Width::Asked(nonce)))),
            (Control::Answer(nonce), _) => drop(self.widths.try_send((remote, Width::Answered(nonce)))),
        }
    }

    /// A datagram of `remote` has come from `source`.
    fn note_received(
        &self,
        table: &Table,
        remote: SocketAddr,
        source: SocketAddr,
        relayed: bool,
        length: usize,
    ) {
        let Some(remote) = table.remotes.get(&remote) else { return };
        if remote.note_received(source, relayed, length) {
            let _ = self.traffic.send(remote.synthetic);
        }
    }

    /// Reads one socket into `buffers`; the number of buffers that hold QUIC afterwards, moved to the front.
    fn receive(
        &self,
        socket: SocketIndex,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<usize> {
        let inners = self.inners.load();
        let Some(Some(inner)) = inners.get(socket) else { return Poll::Pending };
        loop {
            match inner.io.poll_recv_ready(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(error)) => {
                    tracing::warn!(%error, "the UDP socket cannot be read");
                    return Poll::Pending;
                }
                Poll::Ready(Ok(())) => {}
            }
            let received =
                inner.io.try_io(Interest::READABLE, || inner.state.recv(inner.sockref(), buffers, meta));
            // An error is WouldBlock, or an ICMP error of some earlier send: neither concerns this read.
            let Ok(count) = received else { continue };
            let table = self.table.load();
            for (buffer, meta) in buffers.iter_mut().zip(meta.iter_mut()).take(count) {
                let source = meta.addr;
                let mut sink = Sorted { owner: self, socket, table: &table, source };
                table::demux(&table, buffer, meta, &mut sink);
                if meta.len > 0 {
                    let relayed = table.relays.contains(&source);
                    self.note_received(&table, meta.addr, source, relayed, meta.len);
                }
            }
            // quinn skips buffers of length 0.
            if meta[..count].iter().any(|meta| meta.len > 0) {
                return Poll::Ready(count);
            }
            // What was put together waits already: it must not pile up.
            if !self.injected.lock().unwrap_or_else(PoisonError::into_inner).is_empty() {
                return Poll::Ready(0);
            }
        }
    }

    fn take_injected(&self, buffers: &mut [IoSliceMut<'_>], meta: &mut [RecvMeta]) -> usize {
        let mut injected = self.injected.lock().unwrap_or_else(PoisonError::into_inner);
        let mut count = 0;
        for (buffer, meta) in buffers.iter_mut().zip(meta.iter_mut()) {
            let Some((remote, datagram)) = injected.pop_front() else { break };
            let length = datagram.len().min(buffer.len());
            buffer[..length].copy_from_slice(&datagram[..length]);
            *meta = RecvMeta { addr: remote, len: length, stride: length, ecn: None, dst_ip: None };
            count += 1;
        }
        count
    }
}

struct Sorted<'a> {
    owner: &'a PathSocket,
    socket: SocketIndex,
    table: &'a Table,
    source: SocketAddr,
}

impl table::Sink for Sorted<'_> {
    fn stun(&mut self, source: SocketAddr, datagram: &[u8]) {
        let bytes = Bytes::copy_from_slice(datagram);
        // Full: dropped, as the kernel drops when its buffer is full.
        let _ = self.owner.stun.try_send(StunDatagram { socket: self.socket, source, bytes });
    }

    fn stray(&mut self, remote: SocketAddr, datagram: Bytes) {
        let relayed = self.table.relays.contains(&self.source);
        self.owner.note_received(self.table, remote, self.source, relayed, datagram.len());
        self.owner.inject(remote, datagram);
    }

    fn control(&mut self, remote: SocketAddr, frame: &[u8], control: Control<'_>) {
        let back = Some((self.socket, frame));
        self.owner.control(self.table, remote, (self.source, back), control);
    }
}

impl AsyncUdpSocket for PathSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Poller { socket: self, waiting: None })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        match self.table.load().remotes.get(&transmit.destination) {
            Some(remote) => self.send(remote, transmit),
            // A remote that is gone; its last connections drain.
            None => Ok(()),
        }
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.injected_waker.register(cx.waker());
        self.wakefulness.look(Instant::now(), |asleep| self.forget_the_stale(asleep));
        let injected = self.take_injected(buffers, meta);
        if injected > 0 {
            return Poll::Ready(Ok(injected));
        }
        let count = self.inners.load().len();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) as usize;
        for offset in 0..count {
            if let Poll::Ready(filled) = self.receive((turn + offset) % count, cx, buffers, meta) {
                let filled = if filled > 0 { filled } else { self.take_injected(buffers, meta) };
                return Poll::Ready(Ok(filled));
            }
        }
        Poll::Pending
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        // Must be IPv6, since synthetic addresses are.
        Ok(SocketAddr::new(std::net::Ipv6Addr::UNSPECIFIED.into(), self.own[0].port()))
    }

    fn max_transmit_segments(&self) -> usize {
        self.inners.load().iter().flatten().map(|inner| inner.state.max_gso_segments()).min().unwrap_or(1)
    }

    fn max_receive_segments(&self) -> usize {
        self.inners.load().iter().flatten().map(|inner| inner.state.gro_segments()).max().unwrap_or(1)
    }

    fn may_fragment(&self) -> bool {
        self.inners.load().iter().flatten().any(|inner| inner.state.may_fragment())
    }
}

/// Waits until no socket blocks. Each has a future of its own, since a socket's own readiness knows one task only.
struct Poller {
    socket: Arc<PathSocket>,
    waiting: Option<Pin<Box<dyn Future<Output = ()> + Send + Sync>>>,
}

impl fmt::Debug for Poller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Poller").field("waiting", &self.waiting.is_some()).finish()
    }
}

impl UdpPoller for Poller {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            if let Some(waiting) = &mut self.waiting {
                std::task::ready!(waiting.as_mut().poll(cx));
                self.waiting = None;
            }
            let blocked = self.socket.blocked.load(Ordering::Acquire);
            if blocked == 0 {
                return Poll::Ready(Ok(()));
            }
            let socket = self.socket.clone();
            self.waiting = Some(Box::pin(async move {
                for index in (0..MAX_SOCKETS).filter(|index| blocked & (1 << index) != 0) {
                    if let Some(inner) = socket.inner(index) {
                        // A socket that cannot even wait is not one to wait for.
                        let _ = inner.io.writable().await;
                    }
                    socket.blocked.fetch_and(!(1 << index), Ordering::Release);
                }
            }));
        }
    }
}

#[cfg(test)]
#[path = "socket_tests.rs"]
mod tests;
