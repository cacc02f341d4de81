//! One relay thread: sockets of its own (`SO_REUSEPORT`), a table of its own, nothing shared but the outlets of streams.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use bytes::Bytes;
use mio::{Events, Poll, Token};
use rendezvous_batch::Receiver;
use rendezvous_wire::PeerId;
use tokio::sync::mpsc::UnboundedSender;
use tracing::{error, trace};

use super::bell::{Entrance, Inside, entrance};
use super::meters::{Shares, Used};
use super::origin::Origins;
use super::outbox::{Outbox, Outlets};
use super::reflect::handle_stun;
use super::runs::{Run, runs};
use super::socket::Socket;
use super::table::{Bound, Change, Flow, Passage, StreamId, Table, Via};
use crate::limits::{Rate, SourceBuckets};
use crate::stream::outlet::Outlet;

/// Batches taken from one socket before the others get their turn.
const BATCHES: usize = 4;

/// Records taken from streams before the sockets get their turn.
const RECORDS: usize = 64;

/// Longest frame that is forwarded: a frame fills an Ethernet packet at most.
const MAX_FRAME: usize = 1_500;

/// The bell's token; the others are the sockets' places.
const BELL: Token = Token(usize::MAX);

/// What a shard is told.
#[derive(Debug, Clone)]
pub(crate) enum Command {
    /// For its table.
    Change(Change),
    /// A stream has begun: frames for it go here.
    Stream(StreamId, Arc<Outlet>),
    /// A stream has ended.
    StreamGone(StreamId),
    /// Keys may send so much.
    Shares(Shares),
    /// The bounds are others: lease, bind requests, answers to strangers.
    Limits { lease: Duration, binding: Rate, reflecting: Rate },
    /// Tell what was used.
    Account,
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

/// Where a shard tells what it has learnt.
#[derive(Debug, Clone)]
pub(crate) struct Links {
    /// Every other shard.
    pub(crate) shards: Vec<Entrance>,
    /// The owner of the leases.
    pub(crate) reports: UnboundedSender<Report>,
    /// This shard's own number.
    pub(crate) number: usize,
}

/// What the owner of the leases hears of a shard.
#[derive(Debug)]
pub(crate) enum Report {
    /// An authentic bind request has come.
    Bound(Bound),
    /// What keys have used at the shard of this number since it was last asked.
    Used(usize, Vec<(PeerId, Used)>),
}

/// What a shard has done so far.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) forwarded: AtomicU64,
    pub(crate) forwarded_bytes: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) dropped: AtomicU64,
    pub(crate) limited: AtomicU64,
    pub(crate) answered: AtomicU64,
}

/// A relay thread, not yet started.
pub(crate) struct Shard {
    poll: Poll,
    inside: Inside,
    sockets: Vec<Socket>,
    origins: Origins,
    receiver: Receiver,
    outlets: Outlets,
}

/// What a relay thread decides by, and what it tells.
pub(crate) struct Office {
    /// Its own.
    pub(crate) table: Table,
    /// What strangers may have.
    pub(crate) strangers: SourceBuckets,
    /// Where it tells.
    pub(crate) links: Links,
    /// What it counts.
    pub(crate) counters: Arc<Counters>,
}

/// A relay thread at work.
struct Worker {
    shard: Shard,
    office: Office,
    streams: HashMap<StreamId, Arc<Outlet>>,
    /// Frames of streams may wait.
    frames_wait: bool,
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
    /// A thread to be, and the way into it. `sockets` have the same order on every shard; `pairs` are addresses that stand in for each
    /// other.
    pub(crate) fn new(sockets: Vec<UdpSocket>, pairs: Vec<[IpAddr; 2]>) -> io::Result<(Entrance, Self)> {
        let poll = Poll::new()?;
        let (entrance, inside) = entrance(poll.registry(), BELL)?;
        let bound = sockets.iter().map(UdpSocket::local_addr).collect::<io::Result<_>>()?;
        let place = |(place, socket)| Socket::new(socket, poll.registry(), Token(place));
        let sockets = sockets.into_iter().enumerate().map(place).collect::<io::Result<_>>()?;
        let origins = Origins::new(bound, pairs);
        let (receiver, outlets) = (Receiver::default(), Outlets::default());
        Ok((entrance, Self { poll, inside, sockets, origins, receiver, outlets }))
    }

    /// Starts the thread.
    pub(crate) fn spawn(self, number: usize, office: Office) -> io::Result<JoinHandle<()>> {
        let worker = Worker { shard: self, office, streams: HashMap::new(), frames_wait: false };
        std::thread::Builder::new().name(format!("relay-{number}")).spawn(move || worker.run())
    }
}

impl Worker {
    /// Waits in one system call for datagrams and for the bell: a thread that does nothing else needs no runtime.
    fn run(mut self) {
        let mut events = Events::with_capacity(16);
        loop {
            let more = self.frames_wait || self.shard.sockets.iter().any(|socket| socket.ready);
            match self.shard.poll.poll(&mut events, more.then_some(Duration::ZERO)) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    error!(%error, "a relay thread cannot wait for datagrams, and ends");
                    return;
                }
                _ => {}
            }
            for event in &events {
                if let Some(socket) = self.shard.sockets.get_mut(event.token().0) {
                    socket.ready = true;
                }
            }
            if !self.obey() {
                return;
            }
            for index in 0..self.shard.sockets.len() {
                if self.shard.sockets[index].ready && !self.serve(index) {
                    return;
                }
            }
            if self.frames_wait {
                self.serve_streams();
            }
        }
    }

    /// Does what it was told meanwhile; `false` once told to stop. A peer may use a channel as soon as its notice has come, and the
    /// notice left after these.
    fn obey(&mut self) -> bool {
        if !self.shard.inside.has_rung() {
            return true;
        }
        self.frames_wait = true;
        while let Some(command) = self.shard.inside.command() {
            match command {
                Command::Change(change) => self.office.table.apply(change),
                Command::Stream(stream, outlet) => drop(self.streams.insert(stream, outlet)),
                Command::StreamGone(stream) => drop(self.streams.remove(&stream)),
                Command::Shares(shares) => self.office.table.set_shares(shares),
                Command::Limits { lease, binding, reflecting } => {
                    self.office.table.set_limits(lease, binding);
                    self.office.strangers.set_rate(reflecting);
                }
                Command::Account => {
                    let used = self.office.table.take_used();
                    let links = &self.office.links;
                    let _ = links.reports.send(Report::Used(links.number, used));
                }
                Command::Stop => return false,
            }
        }
        true
    }

    /// Handles what waits at one socket; `false` once told to stop.
    fn serve(&mut self, index: usize) -> bool {
        for _ in 0..BATCHES {
            let Shard { sockets, receiver, .. } = &mut self.shard;
            match sockets[index].receive(receiver) {
                Ok(()) => {
                    if !self.obey() {
                        return false;
                    }
                    self.handle(index, Instant::now());
                }
                // ICMP errors of earlier sends surface here.
                Err(error) => trace!(%error, "receiving"),
            }
            if !self.shard.sockets[index].ready {
                break;
            }
        }
        true
    }

    /// Handles frames from streams.
    fn serve_streams(&mut self) {
        let Self { shard, office, streams, frames_wait } = self;
        let records: ArrayVec<_, RECORDS> =
            std::iter::from_fn(|| shard.inside.frames()).take(RECORDS).collect();
        *frames_wait = records.is_full();
        let now = Instant::now();
        let mut tally = Tally::default();
        let mut outbox = Outbox::new(&mut shard.outlets, &shard.sockets, now);
        for frames in &records {
            for run in runs(&frames.bytes, frames.segment) {
                if let Run::Frames { channel, bytes, segment } = run {
                    let to = office.table.carry(channel, frames.from, bytes.len(), now);
                    forward(&mut outbox, streams, &mut tally, to, (bytes, segment, 0));
                }
            }
        }
        tally.add_to(&office.counters);
        outbox.flush();
    }

    /// Handles a batch: all that it leads to leaves together at its end.
    fn handle(&mut self, index: usize, now: Instant) {
        let Self { shard, office, streams, .. } = self;
        let Shard { sockets, origins, receiver, outlets, .. } = shard;
        let Office { table, strangers, links, counters } = office;
        let anywhere = sockets[index].anywhere;
        let mut outbox = Outbox::new(outlets, sockets, now);
        let mut tally = Tally::default();
        for arrival in receiver.arrivals() {
            if !answerable(arrival.from) {
                continue;
            }
            let local = answer_from(arrival.to).filter(|_| anywhere);
            let flow = Flow { remote: arrival.from, local, socket: index };
            for run in runs(arrival.bytes, arrival.segment) {
                match run {
                    Run::Stun(datagram) => {
                        let reaction = handle_stun(table, strangers, origins, datagram, flow, now);
                        if let Some(bound) = reaction.bound {
                            for shard in &links.shards {
                                shard.tell(Command::Change(Change::Bound(bound)));
                            }
                            let _ = links.reports.send(Report::Bound(bound));
                        }
                        if let Some(answer) = reaction.answer {
                            outbox.answer(answer, reaction.over.unwrap_or(flow));
                            tally.answered += 1;
                        }
                    }
                    Run::Frames { channel, bytes, segment } => {
                        let to = table.carry(channel, arrival.from, bytes.len(), now);
                        // Congestion marked on one leg is for the session to hear of.
                        forward(&mut outbox, streams, &mut tally, to, (bytes, segment, arrival.ecn));
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
    limited: u64,
    answered: u64,
}

impl Tally {
    fn add_to(self, counters: &Counters) {
        for (counter, count) in [
            (&counters.forwarded, self.forwarded),
            (&counters.forwarded_bytes, self.forwarded_bytes),
            (&counters.refused, self.refused),
            (&counters.dropped, self.dropped),
            (&counters.limited, self.limited),
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
    to: Passage,
    (bytes, segment, ecn): (&'s [u8], usize, u8),
) {
    match to {
        Passage::To(_) if segment.min(bytes.len()) > MAX_FRAME => {
            tally.refused += 1;
            return;
        }
        Passage::To(Via::Udp(to)) => outbox.forward(bytes, segment, ecn, to),
        Passage::To(Via::Stream(to)) => {
            // A stream that has ended takes nothing, and neither does one that does not keep up.
            if !streams.get(&to).is_some_and(|outlet| outlet.push(bytes, segment)) {
                tally.dropped += 1;
                return;
            }
        }
        Passage::Over => {
            tally.limited += 1;
            return;
        }
        Passage::Nowhere => {
            tally.refused += 1;
            return;
        }
    }
    tally.forwarded += bytes.len().div_ceil(segment) as u64;
    tally.forwarded_bytes += bytes.len() as u64;
}
