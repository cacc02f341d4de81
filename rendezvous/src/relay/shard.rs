//! One relay thread: sockets of its own (`SO_REUSEPORT`), a table of its own, nothing shared but the outlets of streams.

use std::collections::HashMap;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::Instant;

use arrayvec::ArrayVec;
use bytes::Bytes;
use quinn::udp::{BATCH_SIZE, EcnCodepoint, RecvMeta, UdpSocketState};
use tokio::io::Interest;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tracing::trace;

use super::origin::Origins;
use super::outbox::{Outbox, Outlets};
use super::reflect::handle_stun;
use super::runs::{Run, runs};
use super::table::{Bound, Change, Flow, StreamId, Table, Via};
use crate::limits::SourceBuckets;
use crate::stream::outlet::Outlet;

/// Bytes of a receive buffer: the most that the kernel coalesces into one.
const BUFFER: usize = 64 * 1024;

/// From buffer to buffer: not a power of two, so that the first bytes of all do not compete for the same lines of the CPU's caches.
const STRIDE: usize = BUFFER + 1_344;

/// Buffers of a batch where datagrams come one by one.
const LEAST_OFFER: usize = 4;

/// Batches taken from one socket before the others get their turn.
const BATCHES: usize = 4;

/// Longest frame that is forwarded: a frame fills an Ethernet packet at most.
const MAX_FRAME: usize = 1_500;

/// What a shard is told.
#[derive(Debug, Clone)]
pub(crate) enum Command {
    /// For its table.
    Change(Change),
    /// A stream has begun: frames for it go here.
    Stream(StreamId, Arc<Outlet>),
    /// A stream has ended.
    StreamGone(StreamId),
    /// The server is going away.
    Stop,
}

/// Frames that came on a stream, in one record.
#[derive(Debug)]
pub(crate) struct StreamFrames {
    pub(crate) from: StreamId,
    pub(crate) bytes: Bytes,
    pub(crate) segment: usize,
}

/// Records of frames that may wait for a shard; streams wait beyond that, and TCP tells their peers.
pub(crate) const INLET: usize = 64;

/// Where a shard tells what it has learnt.
#[derive(Debug, Clone)]
pub(crate) struct Links {
    /// Every other shard.
    pub(crate) shards: Vec<UnboundedSender<Command>>,
    /// The owner of the leases.
    pub(crate) reports: UnboundedSender<Bound>,
}

/// What a shard has done so far.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) forwarded: AtomicU64,
    pub(crate) forwarded_bytes: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) dropped: AtomicU64,
    pub(crate) answered: AtomicU64,
}

/// A relay thread, not yet started.
pub(crate) struct Shard {
    sockets: Vec<Socket>,
    table: Table,
    strangers: SourceBuckets,
    origins: Origins,
    commands: UnboundedReceiver<Command>,
    inlet: mpsc::Receiver<StreamFrames>,
    streams: HashMap<StreamId, Arc<Outlet>>,
    links: Links,
    counters: Arc<Counters>,
    buffers: Vec<u8>,
    outlets: Outlets,
}

/// What a shard wakes up for.
enum Ready {
    Socket(usize),
    Stream(StreamFrames),
}

struct Socket {
    io: tokio::net::UdpSocket,
    /// Receives.
    state: UdpSocketState,
    /// Serves every address of the host, so that what leaves must be told its source.
    anywhere: bool,
    /// Buffers that it takes at a time. Every one that is offered to the kernel costs, used or not.
    offer: usize,
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.io.as_fd()
    }
}

impl Socket {
    fn new(socket: UdpSocket) -> io::Result<Self> {
        let state = UdpSocketState::new((&socket).into())?;
        let anywhere = socket.local_addr()?.ip().is_unspecified();
        // `UdpSocketState` has asked for them.
        if !anywhere {
            rendezvous_batch::without_destinations(&socket)?;
        }
        Ok(Self { io: tokio::net::UdpSocket::from_std(socket)?, state, anywhere, offer: LEAST_OFFER })
    }

    /// Takes what waits, a batch at most, and whether that may not have been all. A batch that is not full was all there was: the
    /// kernel tells when there is more, and asking it again would cost a call.
    fn receive(
        &mut self,
        buffers: &mut [u8],
        metas: &mut [RecvMeta; BATCH_SIZE],
    ) -> io::Result<(usize, bool)> {
        let mut parts = buffers.chunks_exact_mut(STRIDE).map(|buffer| IoSliceMut::new(&mut buffer[..BUFFER]));
        let mut slices: ArrayVec<IoSliceMut<'_>, BATCH_SIZE> = parts.by_ref().take(self.offer).collect();
        let offer = self.offer;
        let mut count = 0;
        let result = self.io.try_io(Interest::READABLE, || {
            count = self.state.recv((&self.io).into(), &mut slices, &mut metas[..offer])?;
            // This clears the readiness that tokio remembers.
            if count < offer { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        });
        self.offer = match count {
            full if full == offer => BATCH_SIZE,
            few if few < offer / 8 => (offer / 2).max(LEAST_OFFER),
            _ => offer,
        };
        match result {
            Err(error) if count == 0 => Err(error),
            _ => Ok((count, count == offer)),
        }
    }
}

/// Whether anything may be sent to where this packet says it came from.
fn answerable(source: SocketAddr) -> bool {
    let ip = source.ip().to_canonical();
    let broadcast = matches!(ip, IpAddr::V4(ip) if ip.is_broadcast());
    source.port() != 0 && !ip.is_unspecified() && !ip.is_multicast() && !broadcast
}

/// The address to answer from: where the packet went, unless that was a group.
fn answer_from(destination: Option<IpAddr>) -> Option<IpAddr> {
    destination.filter(|ip| {
        let broadcast = matches!(ip, IpAddr::V4(ip) if ip.is_broadcast());
        !broadcast && !ip.is_multicast() && !ip.is_unspecified()
    })
}

impl Shard {
    /// Starts the thread. `sockets` have the same order on every shard; `pairs` are addresses that stand in for each other.
    #[expect(clippy::too_many_arguments, reason = "one call, at the server's start")]
    pub(crate) fn spawn(
        number: usize,
        sockets: Vec<UdpSocket>,
        pairs: Vec<[IpAddr; 2]>,
        table: Table,
        strangers: SourceBuckets,
        commands: UnboundedReceiver<Command>,
        inlet: mpsc::Receiver<StreamFrames>,
        links: Links,
        counters: Arc<Counters>,
    ) -> io::Result<JoinHandle<()>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        let guard = runtime.enter();
        let bound = sockets.iter().map(UdpSocket::local_addr).collect::<io::Result<_>>()?;
        let sockets = sockets.into_iter().map(Socket::new).collect::<io::Result<_>>()?;
        drop(guard);
        let buffers = vec![0; STRIDE * BATCH_SIZE];
        let origins = Origins::new(bound, pairs);
        let streams = HashMap::new();
        let shard = Self {
            sockets,
            table,
            strangers,
            origins,
            commands,
            inlet,
            streams,
            links,
            counters,
            buffers,
            outlets: Outlets::default(),
        };
        let name = format!("relay-{number}");
        std::thread::Builder::new().name(name).spawn(move || runtime.block_on(shard.run()))
    }

    async fn run(mut self) {
        let mut turn = 0;
        loop {
            let Self { sockets, commands, inlet, .. } = &mut self;
            let ready = tokio::select! {
                biased;
                command = commands.recv() => {
                    if !command.is_some_and(|command| self.obey(command)) {
                        return;
                    }
                    continue;
                }
                ready = std::future::poll_fn(|cx| poll_ready(sockets, inlet, turn, cx)) => ready,
            };
            let goes_on = match ready {
                Ready::Socket(index) => {
                    turn = index + 1;
                    self.serve(index)
                }
                Ready::Stream(frames) => {
                    turn = 0;
                    self.serve_stream(&frames)
                }
            };
            if !goes_on {
                return;
            }
        }
    }

    /// Does what it is told; `false` when told to stop.
    fn obey(&mut self, command: Command) -> bool {
        match command {
            Command::Change(change) => self.table.apply(change),
            Command::Stream(stream, outlet) => drop(self.streams.insert(stream, outlet)),
            Command::StreamGone(stream) => drop(self.streams.remove(&stream)),
            Command::Stop => return false,
        }
        true
    }

    /// Does what it was told meanwhile; `false` once told to stop. A peer may use a channel as soon as its notice has come, and the
    /// notice left after these.
    fn obey_all(&mut self) -> bool {
        while let Ok(command) = self.commands.try_recv() {
            if !self.obey(command) {
                return false;
            }
        }
        true
    }

    /// Handles what waits at one socket; `false` once told to stop.
    fn serve(&mut self, index: usize) -> bool {
        let mut metas = [RecvMeta::default(); BATCH_SIZE];
        for _ in 0..BATCHES {
            let (received, more) = match self.sockets[index].receive(&mut self.buffers, &mut metas) {
                Ok(taken) => taken,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Err(error) => {
                    // ICMP errors of earlier sends surface here.
                    trace!(%error, "receiving");
                    continue;
                }
            };
            if !self.obey_all() {
                return false;
            }
            self.handle(index, &metas[..received], Instant::now());
            if !more {
                return true;
            }
        }
        true
    }

    /// Handles frames from a stream; `false` once told to stop.
    fn serve_stream(&mut self, frames: &StreamFrames) -> bool {
        if !self.obey_all() {
            return false;
        }
        let now = Instant::now();
        let Self { sockets, table, streams, counters, outlets, .. } = self;
        let mut outbox = Outbox::new(outlets, sockets, now);
        let mut tally = Tally::default();
        for run in runs(&frames.bytes, frames.segment) {
            if let Run::Frames { channel, bytes, segment } = run {
                let to = table.route(channel, frames.from, now);
                forward(&mut outbox, streams, &mut tally, to, (bytes, segment, None));
            }
        }
        tally.add_to(counters);
        outbox.flush();
        true
    }

    /// Handles a batch: all that it leads to leaves together at its end.
    fn handle(&mut self, index: usize, metas: &[RecvMeta], now: Instant) {
        let Self { sockets, table, strangers, origins, streams, links, counters, buffers, outlets, .. } =
            self;
        let anywhere = sockets[index].anywhere;
        let mut outbox = Outbox::new(outlets, sockets, now);
        let mut tally = Tally::default();
        for (meta, buffer) in metas.iter().zip(buffers.chunks_exact(STRIDE)) {
            if !answerable(meta.addr) {
                continue;
            }
            let local = answer_from(meta.dst_ip).filter(|_| anywhere);
            let flow = Flow { remote: meta.addr, local, socket: index };
            for run in runs(&buffer[..meta.len.min(BUFFER)], meta.stride) {
                match run {
                    Run::Stun(datagram) => {
                        let reaction = handle_stun(table, strangers, origins, datagram, flow, now);
                        if let Some(bound) = reaction.bound {
                            for shard in &links.shards {
                                let _ = shard.send(Command::Change(Change::Bound(bound)));
                            }
                            let _ = links.reports.send(bound);
                        }
                        if let Some(answer) = reaction.answer {
                            outbox.answer(answer, reaction.over.unwrap_or(flow));
                            tally.answered += 1;
                        }
                    }
                    Run::Frames { channel, bytes, segment } => {
                        let to = table.route(channel, meta.addr, now);
                        // Congestion marked on one leg is for the session to hear of.
                        forward(&mut outbox, streams, &mut tally, to, (bytes, segment, meta.ecn));
                    }
                    Run::Other => {}
                }
            }
        }
        // Whoever has been answered finds himself counted.
        tally.add_to(counters);
        outbox.flush();
    }
}

/// What a batch has come to.
#[derive(Debug, Default)]
struct Tally {
    forwarded: u64,
    forwarded_bytes: u64,
    refused: u64,
    dropped: u64,
    answered: u64,
}

impl Tally {
    fn add_to(self, counters: &Counters) {
        for (counter, count) in [
            (&counters.forwarded, self.forwarded),
            (&counters.forwarded_bytes, self.forwarded_bytes),
            (&counters.refused, self.refused),
            (&counters.dropped, self.dropped),
            (&counters.answered, self.answered),
        ] {
            if count > 0 {
                counter.fetch_add(count, Ordering::Relaxed);
            }
        }
    }
}

/// Sends a run of frames, of this segment size and with this mark, where the table says.
fn forward<'s>(
    outbox: &mut Outbox<'_, 's, Socket>,
    streams: &HashMap<StreamId, Arc<Outlet>>,
    tally: &mut Tally,
    to: Option<Via>,
    (bytes, segment, ecn): (&'s [u8], usize, Option<EcnCodepoint>),
) {
    match to.filter(|_| segment.min(bytes.len()) <= MAX_FRAME) {
        Some(Via::Udp(to)) => outbox.forward(bytes, segment, ecn, to),
        Some(Via::Stream(to)) => {
            // A stream that has ended takes nothing, and neither does one that does not keep up.
            if !streams.get(&to).is_some_and(|outlet| outlet.push(bytes, segment)) {
                tally.dropped += 1;
                return;
            }
        }
        None => {
            tally.refused += 1;
            return;
        }
    }
    tally.forwarded += bytes.len().div_ceil(segment) as u64;
    tally.forwarded_bytes += bytes.len() as u64;
}

/// What there is to do. Place `turn` is asked first; the places are those of the sockets and, behind them, that of the streams.
fn poll_ready(
    sockets: &[Socket],
    inlet: &mut mpsc::Receiver<StreamFrames>,
    turn: usize,
    cx: &mut Context<'_>,
) -> Poll<Ready> {
    let places = sockets.len() + 1;
    for place in (turn..turn + places).map(|place| place % places) {
        match sockets.get(place) {
            Some(socket) if socket.io.poll_recv_ready(cx).is_ready() => {
                return Poll::Ready(Ready::Socket(place));
            }
            Some(_) => {}
            // Without a sender there will be no frames.
            None => {
                if let Poll::Ready(Some(frames)) = inlet.poll_recv(cx) {
                    return Poll::Ready(Ready::Stream(frames));
                }
            }
        }
    }
    Poll::Pending
}
