//! Lanes through a relay, and loads on them.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use quinn::udp::{BATCH_SIZE, RecvMeta, Transmit, UdpSocketState};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};

use super::subject::stay_on;
use crate::figures::Figures;

/// What waits longer than this has been lost.
const PATIENCE: Duration = Duration::from_secs(2);
/// The most that the kernel coalesces into one.
const COALESCED: usize = 64 * 1024;
/// Segments of one send; `UDP_MAX_SEGMENTS` is at least that.
const SEGMENTS: usize = 50;
/// Datagrams of a step whose datagrams leave one by one, as many as a program takes with one `recvmmsg`.
const SINGLES: usize = 64;
/// Bytes of datagrams in flight in a step of batches.
const IN_FLIGHT: usize = 512 * 1024;

/// A socket that coalesces and segments.
pub struct Socket {
    io: UdpSocket,
    state: UdpSocketState,
}

impl Socket {
    /// A socket on a free port of `ip`, with buffers as the server's.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn bind(ip: IpAddr) -> io::Result<Self> {
        let address = SocketAddr::new(ip, 0);
        let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::DGRAM, None)?;
        socket.set_recv_buffer_size(4 << 20)?;
        socket.set_send_buffer_size(4 << 20)?;
        socket.bind(&address.into())?;
        let io = UdpSocket::from(socket);
        let state = UdpSocketState::new((&io).into())?;
        Ok(Self { io, state })
    }

    /// Where it is bound.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.io.local_addr()
    }

    fn send(
        &self,
        to: SocketAddr,
        from: Option<IpAddr>,
        bytes: &[u8],
        segment: Option<usize>,
    ) -> io::Result<()> {
        let transmit =
            Transmit { destination: to, ecn: None, contents: bytes, segment_size: segment, src_ip: from };
        loop {
            match self.state.try_send((&self.io).into(), &transmit) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    wait(&self.io, PollFlags::POLLOUT)?;
                }
                result => return result,
            }
        }
    }

    /// Sends one datagram.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn tell(&self, to: SocketAddr, datagram: &[u8]) -> io::Result<()> {
        self.send(to, None, datagram, None)
    }

    /// Sends datagrams of this size together, with segmentation offload.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn tell_segments(&self, to: SocketAddr, datagrams: &[u8], size: usize) -> io::Result<()> {
        self.send(to, None, datagrams, (size < datagrams.len()).then_some(size))
    }

    /// How many of the `expected` datagrams have come, all with this payload.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn take(&self, buffers: &mut [u8], expected: usize, payload: Option<usize>) -> anyhow::Result<usize> {
        let mut got = 0;
        let mut metas = [RecvMeta::default(); BATCH_SIZE];
        while got < expected {
            let mut parts = buffers.chunks_exact_mut(COALESCED);
            let mut slices: [IoSliceMut<'_>; BATCH_SIZE] =
                std::array::from_fn(|_| IoSliceMut::new(parts.next().unwrap_or_default()));
            match self.state.recv((&self.io).into(), &mut slices, &mut metas) {
                Ok(received) => {
                    for meta in &metas[..received] {
                        // Programs keep the header or take it off.
                        if let Some(payload) = payload {
                            ensure!(
                                [payload, payload + 4].contains(&meta.stride),
                                "{} bytes came out",
                                meta.stride
                            );
                        }
                        got += meta.len.div_ceil(meta.stride.max(1));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !wait(&self.io, PollFlags::POLLIN)? {
                        break;
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        ensure!(got <= expected, "{got} datagrams came out where {expected} went in");
        Ok(got)
    }

    /// The next datagram that has come, without waiting.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn poll(&self) -> io::Result<Option<Vec<u8>>> {
        let mut buffer = [0; 2048];
        match self.io.recv(&mut buffer) {
            Ok(length) => Ok(Some(buffer[..length].to_vec())),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sends one datagram and gives the next that comes back.
    ///
    /// # Errors
    ///
    /// When none comes.
    pub fn ask(&self, to: SocketAddr, request: &[u8]) -> anyhow::Result<Vec<u8>> {
        self.ask_within(PATIENCE, to, request)
    }

    /// The same, waiting no longer than this.
    ///
    /// # Errors
    ///
    /// When none comes.
    pub fn ask_within(&self, patience: Duration, to: SocketAddr, request: &[u8]) -> anyhow::Result<Vec<u8>> {
        self.send(to, None, request, None)?;
        ensure!(wait_for(&self.io, PollFlags::POLLIN, patience)?, "no answer from {to}");
        let mut buffer = [0; 2048];
        let (length, _) = self.io.recv_from(&mut buffer)?;
        Ok(buffer[..length].to_vec())
    }
}

/// Whether the socket got ready in time.
fn wait(socket: &UdpSocket, what: PollFlags) -> io::Result<bool> {
    wait_for(socket, what, PATIENCE)
}

fn wait_for(socket: &UdpSocket, what: PollFlags, patience: Duration) -> io::Result<bool> {
    let mut sockets = [PollFd::new(socket.as_fd(), what)];
    let patience = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
    Ok(poll(&mut sockets, patience)? > 0)
}

/// One way through the program under test.
pub struct Lane {
    /// Sends.
    pub from: Socket,
    /// To the program.
    pub to: SocketAddr,
    /// What precedes every payload.
    pub header: [u8; 4],
    /// Where it comes out.
    pub into: Socket,
}

/// What is sent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pattern {
    /// Each lane in turn sends a batch with segmentation offload.
    Bulk,
    /// Datagrams leave one by one, from one lane after the other; a step's wait together.
    Single,
    /// Each lane a datagram now and then, at random moments: so many a second from all of them together.
    Sparse(f64),
}

/// What a load led to.
#[derive(Debug, Clone, Copy, Default)]
pub struct Outcome {
    /// Datagrams sent.
    pub sent: usize,
    /// Of these, not arrived.
    pub lost: usize,
    /// The load's duration.
    pub took: Duration,
}

/// Sends loads and takes what comes.
pub struct Generator {
    buffers: Vec<u8>,
    batch: Vec<u8>,
    rng: StdRng,
}

impl Default for Generator {
    fn default() -> Self {
        Self { buffers: vec![0; COALESCED * BATCH_SIZE], batch: Vec::new(), rng: StdRng::seed_from_u64(1) }
    }
}

impl Generator {
    /// Where what comes is put.
    pub fn buffers(&mut self) -> &mut [u8] {
        &mut self.buffers
    }

    /// Sends at least `count` datagrams of `payload` bytes over the lanes.
    ///
    /// # Errors
    ///
    /// The system's. What is lost is counted.
    pub fn load(
        &mut self,
        lanes: &[Lane],
        pattern: Pattern,
        payload: usize,
        count: usize,
    ) -> anyhow::Result<Outcome> {
        let start = Instant::now();
        let mut outcome = match pattern {
            Pattern::Bulk => self.bulk(lanes, payload, count)?,
            Pattern::Single => self.singles(lanes, payload, count)?,
            Pattern::Sparse(rate) => self.sparse(lanes, payload, count, rate)?,
        };
        outcome.took = start.elapsed();
        Ok(outcome)
    }

    fn bulk(&mut self, lanes: &[Lane], payload: usize, count: usize) -> anyhow::Result<Outcome> {
        let segment = payload + 4;
        let segments = SEGMENTS.min(60_000 / segment);
        let batches = (IN_FLIGHT / (segment * segments)).clamp(1, 32);
        let mut outcome = Outcome::default();
        let mut next = 0;
        while outcome.sent < count {
            let step: Vec<usize> = (0..batches).map(|batch| (next + batch) % lanes.len()).collect();
            next = (next + batches) % lanes.len();
            let mut expected = vec![0; lanes.len()];
            for lane in step {
                self.batch.clear();
                for _ in 0..segments {
                    self.batch.extend_from_slice(&lanes[lane].header);
                    self.batch.resize(self.batch.len() + payload, 0x5a);
                }
                lanes[lane].from.send(lanes[lane].to, None, &self.batch, Some(segment))?;
                expected[lane] += segments;
                outcome.sent += segments;
            }
            outcome.lost += self.collect(lanes, expected, payload)?;
        }
        Ok(outcome)
    }

    fn singles(&mut self, lanes: &[Lane], payload: usize, count: usize) -> anyhow::Result<Outcome> {
        let mut outcome = Outcome::default();
        let mut next = 0;
        while outcome.sent < count {
            let mut expected = vec![0; lanes.len()];
            for _ in 0..SINGLES {
                self.one(&lanes[next], payload)?;
                expected[next] += 1;
                next = (next + 1) % lanes.len();
            }
            outcome.sent += SINGLES;
            outcome.lost += self.collect(lanes, expected, payload)?;
        }
        Ok(outcome)
    }

    fn sparse(&mut self, lanes: &[Lane], payload: usize, count: usize, rate: f64) -> anyhow::Result<Outcome> {
        let mut outcome = Outcome::default();
        let mut due = Instant::now();
        while outcome.sent < count {
            let mut expected = vec![0; lanes.len()];
            for _ in 0..SINGLES {
                due += gap(&mut self.rng, rate);
                // A sleep of nothing would still sleep.
                if let Some(left) = due.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
                {
                    std::thread::sleep(left);
                }
                let lane = self.rng.random_range(0..lanes.len());
                self.one(&lanes[lane], payload)?;
                expected[lane] += 1;
            }
            outcome.sent += SINGLES;
            outcome.lost += self.collect(lanes, expected, payload)?;
        }
        Ok(outcome)
    }

    fn one(&mut self, lane: &Lane, payload: usize) -> io::Result<()> {
        self.batch.clear();
        self.batch.extend_from_slice(&lane.header);
        self.batch.resize(4 + payload, 0x5a);
        lane.from.send(lane.to, None, &self.batch, None)
    }

    /// Takes what the lanes have been sent; how many datagrams did not come. The last lane is waited for first: when it has its share
    /// the others have theirs.
    fn collect(&mut self, lanes: &[Lane], expected: Vec<usize>, payload: usize) -> anyhow::Result<usize> {
        let mut lost = 0;
        for (lane, expected) in lanes.iter().zip(expected).rev().filter(|(_, expected)| *expected > 0) {
            lost += expected - lane.into.take(&mut self.buffers, expected, Some(payload))?;
        }
        Ok(lost)
    }

    /// Sends at least `count` Binding requests, each answered by itself; `strangers`: from changing addresses of 127.0.0.0/8, else all
    /// from one.
    ///
    /// # Errors
    ///
    /// The system's, and an answer that is none.
    pub fn reflect(
        &mut self,
        socket: &Socket,
        to: SocketAddr,
        strangers: bool,
        count: usize,
    ) -> anyhow::Result<Outcome> {
        let start = Instant::now();
        let mut outcome = Outcome::default();
        let mut request = *b"\0\x01\0\0\x21\x12\xa4\x42............";
        while outcome.sent < count {
            for _ in 0..SINGLES {
                self.rng.fill(&mut request[8..]);
                let source = IpAddr::from([
                    127,
                    64 + self.rng.random_range(0..64),
                    self.rng.random(),
                    self.rng.random(),
                ]);
                socket.send(to, strangers.then_some(source), &request, None)?;
            }
            outcome.sent += SINGLES;
            outcome.lost += SINGLES - socket.take(&mut self.buffers, SINGLES, None)?;
            ensure!(self.buffers[..2] == [1, 1], "an answer that is no Binding success");
        }
        outcome.took = start.elapsed();
        Ok(outcome)
    }

    /// One-way latencies in µs of `count` datagrams, `rate` a second, sent and awaited by a thread that never sleeps.
    ///
    /// # Errors
    ///
    /// The system's, and a loss.
    pub fn latencies(
        &mut self,
        lanes: &[Lane],
        payload: usize,
        count: usize,
        rate: f64,
        into: &mut Vec<f64>,
    ) -> anyhow::Result<()> {
        let lane = lanes.choose(&mut self.rng).context("a lane")?;
        let (start, mut due) = (Instant::now(), Instant::now());
        let (mut sent, mut got) = (0, 0);
        let mut buffer = [0; 2048];
        while got < count {
            let now = Instant::now();
            if sent < count && now >= due {
                self.batch.clear();
                self.batch.extend_from_slice(&lane.header);
                let stamp = u64::try_from(start.elapsed().as_nanos())?;
                self.batch.extend_from_slice(&stamp.to_be_bytes());
                self.batch.resize(4 + payload, 0);
                lane.from.send(lane.to, None, &self.batch, None)?;
                sent += 1;
                // What a pause of this thread has held up is not sent all at once.
                due = due.max(now) + gap(&mut self.rng, rate);
            }
            match lane.into.io.recv(&mut buffer) {
                Ok(length) => {
                    let arrived = u64::try_from(start.elapsed().as_nanos())?;
                    let at = length - payload;
                    let stamp = u64::from_be_bytes(buffer[at..at + 8].try_into()?);
                    into.push((arrived - stamp) as f64 / 1e3);
                    got += 1;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ensure!(now.saturating_duration_since(due) < PATIENCE, "{} lost", sent - got);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// Sends loads over several sets of lanes at once, from one generator and one core each: at least `count` datagrams together.
///
/// # Errors
///
/// As of [`Generator::load`].
pub fn load_from_cores(
    generators: &mut [Generator],
    sets: &[(usize, &[Lane])],
    pattern: Pattern,
    payload: usize,
    count: usize,
) -> anyhow::Result<Outcome> {
    let start = Instant::now();
    let share = count / sets.len().max(1);
    let outcomes = std::thread::scope(|scope| {
        let load = |(generator, (core, lanes)): (&mut Generator, &(usize, &[Lane]))| {
            stay_on(&[*core])?;
            generator.load(lanes, pattern, payload, share)
        };
        let threads: Vec<_> =
            generators.iter_mut().zip(sets).map(|pair| scope.spawn(move || load(pair))).collect();
        let joined = threads.into_iter().map(|thread| thread.join().expect("a generator does not panic"));
        joined.collect::<anyhow::Result<Vec<_>>>()
    })?;
    let sum = |part: fn(&Outcome) -> usize| outcomes.iter().map(part).sum();
    Ok(Outcome { sent: sum(|one| one.sent), lost: sum(|one| one.lost), took: start.elapsed() })
}

/// Until the next of `rate` a second that come at random.
fn gap(rng: &mut StdRng, rate: f64) -> Duration {
    let share: f64 = rng.random_range(f64::EPSILON..1.0);
    Duration::from_secs_f64(-share.ln() / rate)
}

/// Several figures at once.
pub fn figures(values: &[f64]) -> Figures {
    let mut figures = Figures::default();
    figures.extend(values.iter().copied());
    figures
}
