//! One relay thread: sockets of its own (`SO_REUSEPORT`), a table of its own, nothing shared but the outlets of streams.

use std::collections::HashMap;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn::udp::{BATCH_SIZE, EcnCodepoint, RecvMeta, Transmit, UdpSocketState};
use tokio::io::Interest;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tracing::trace;

use super::origin::Origins;
use super::reflect::handle_stun;
use super::runs::{Run, runs};
use super::table::{Bound, Change, Flow, StreamId, Table, Via};
use crate::limits::SourceBuckets;
use crate::stream::outlet::Outlet;

/// Bytes of a receive buffer: the most that the kernel coalesces into one.
const BUFFER: usize = 64 * 1024;

/// Batches taken from one socket before the others get their turn.
const BATCHES: usize = 4;

/// Longest frame that is forwarded: a frame fills an Ethernet packet at most.
const MAX_FRAME: usize = 1_500;

/// Longest segment of a coalesced send. Kernels answer EINVAL where a segment does not fit the interface, and
/// `UdpSocketState` takes EINVAL for missing support. Peers send at most this (1,448 + 4).
const MAX_SEGMENT: usize = 1_452;

/// Most bytes of one coalesced send: an IPv4 packet less its headers.
const MAX_SEND: usize = 65_507;

/// `UDP_MAX_SEGMENTS` of the kernel.
const MAX_SEGMENTS: usize = 64;

/// How long a socket that seems to have lost its segmentation offload goes without before it tries again.
const GSO_RETRY: Duration = Duration::from_secs(60);

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
}

/// What a shard wakes up for.
enum Ready {
    Socket(usize),
    Stream(StreamFrames),
}

struct Socket {
    io: tokio::net::UdpSocket,
    /// Receives, and sends what is forwarded.
    frames: UdpSocketState,
    /// Sends answers. Strangers choose where those go, so a send that the kernel refuses must not cost `frames` its
    /// segmentation offload.
    answers: UdpSocketState,
    offload_lost: Option<Instant>,
}

impl Socket {
    fn new(socket: UdpSocket) -> io::Result<Self> {
        let frames = UdpSocketState::new((&socket).into())?;
        let answers = UdpSocketState::new((&socket).into())?;
        Ok(Self { io: tokio::net::UdpSocket::from_std(socket)?, frames, answers, offload_lost: None })
    }

    fn receive(&self, buffers: &mut [u8], metas: &mut [RecvMeta; BATCH_SIZE]) -> io::Result<usize> {
        let mut parts = buffers.chunks_exact_mut(BUFFER);
        let mut slices: [IoSliceMut<'_>; BATCH_SIZE] =
            std::array::from_fn(|_| IoSliceMut::new(parts.next().unwrap_or_default()));
        self.io.try_io(Interest::READABLE, || self.frames.recv((&self.io).into(), &mut slices, metas))
    }

    /// Sends an answer. One that does not leave is as good as lost on the way.
    fn answer(&self, bytes: &[u8], to: Flow) {
        let transmit = transmit(bytes, None, None, to);
        if let Err(error) = self.answers.try_send((&self.io).into(), &transmit) {
            trace!(%error, "an answer did not leave");
        }
    }

    /// Forwards a run of frames, in as few sends as the kernel allows.
    fn forward(&mut self, bytes: &[u8], segment: usize, ecn: Option<EcnCodepoint>, to: Flow, now: Instant) {
        let most = match segment {
            ..=MAX_SEGMENT => self.segments(now).min(MAX_SEND / segment),
            _ => 1,
        };
        for part in bytes.chunks(segment * most.max(1)) {
            let transmit = transmit(part, Some(segment), ecn, to);
            if let Err(error) = self.frames.try_send((&self.io).into(), &transmit) {
                trace!(%error, "frames did not leave");
            }
        }
    }

    /// How many segments one send may have. A refused send makes the state give up offload for good; since an
    /// address that has left the interface is reason enough for a refusal, it gets another chance.
    fn segments(&mut self, now: Instant) -> usize {
        let segments = self.frames.max_gso_segments().min(MAX_SEGMENTS);
        if segments > 1 {
            return segments;
        }
        let lost = *self.offload_lost.get_or_insert(now);
        if now.saturating_duration_since(lost) >= GSO_RETRY {
            self.offload_lost = None;
            if let Ok(fresh) = UdpSocketState::new((&self.io).into()) {
                self.frames = fresh;
            }
        }
        segments
    }
}

fn transmit(
    contents: &[u8],
    segment_size: Option<usize>,
    ecn: Option<EcnCodepoint>,
    to: Flow,
) -> Transmit<'_> {
    Transmit { destination: to.remote, ecn, contents, segment_size, src_ip: to.local }
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
        let buffers = vec![0; BUFFER * BATCH_SIZE];
        let origins = Origins::new(bound, pairs);
        let streams = HashMap::new();
        let shard =
            Self { sockets, table, strangers, origins, commands, inlet, streams, links, counters, buffers };
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
            let received = match self.sockets[index].receive(&mut self.buffers, &mut metas) {
                Ok(received) => received,
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
            let now = Instant::now();
            for (place, meta) in metas[..received].iter().enumerate() {
                self.handle(index, place, meta, now);
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
        let Self { sockets, table, streams, counters, .. } = self;
        for run in runs(&frames.bytes, frames.segment) {
            if let Run::Frames { channel, bytes, segment } = run {
                let to = table.route(channel, frames.from, now);
                forward(sockets, streams, counters, to, (bytes, segment, None), now);
            }
        }
        true
    }

    fn handle(&mut self, index: usize, place: usize, meta: &RecvMeta, now: Instant) {
        if !answerable(meta.addr) {
            return;
        }
        let flow = Flow { remote: meta.addr, local: answer_from(meta.dst_ip), socket: index };
        let Self { sockets, table, strangers, origins, streams, links, counters, buffers, .. } = self;
        let buffer = &buffers[place * BUFFER..][..meta.len.min(BUFFER)];
        for run in runs(buffer, meta.stride) {
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
                        let over = reaction.over.unwrap_or(flow);
                        sockets[over.socket].answer(answer.as_ref(), over);
                        counters.answered.fetch_add(1, Ordering::Relaxed);
                    }
                }
                Run::Frames { channel, bytes, segment } => {
                    let to = table.route(channel, meta.addr, now);
                    // Congestion marked on one leg is for the session to hear of.
                    forward(sockets, streams, counters, to, (bytes, segment, meta.ecn), now);
                }
                Run::Other => {}
            }
        }
    }
}

/// Sends a run of frames, of this segment size and with this mark, where the table says.
fn forward(
    sockets: &mut [Socket],
    streams: &HashMap<StreamId, Arc<Outlet>>,
    counters: &Counters,
    to: Option<Via>,
    (bytes, segment, ecn): (&[u8], usize, Option<EcnCodepoint>),
    now: Instant,
) {
    match to.filter(|_| segment.min(bytes.len()) <= MAX_FRAME) {
        Some(Via::Udp(to)) => sockets[to.socket].forward(bytes, segment, ecn, to, now),
        Some(Via::Stream(to)) => {
            // A stream that has ended takes nothing, and neither does one that does not keep up.
            if !streams.get(&to).is_some_and(|outlet| outlet.push(bytes, segment)) {
                counters.dropped.fetch_add(1, Ordering::Relaxed);
                return;
            }
        }
        None => {
            counters.refused.fetch_add(1, Ordering::Relaxed);
            return;
        }
    }
    counters.forwarded.fetch_add(bytes.len().div_ceil(segment) as u64, Ordering::Relaxed);
    counters.forwarded_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
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
