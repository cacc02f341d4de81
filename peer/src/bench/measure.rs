//! The side that measures.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use bytes::BufMut as _;
use tokio::time::Instant;

use super::{Arrived, Counters, LONGEST, Order, give, take};
use crate::service::{Exchange, Hub, Request, RequestError};
use crate::session::Path;

/// How often the round trip is probed. A probe is one small QUIC datagram: it waits in no stream's queue, but in every queue on its way.
const PROBE: Duration = Duration::from_millis(50);

/// Probes without load.
const IDLE_PROBES: u32 = 10;

/// How long the last answers may take, of probes and of flows.
const PATIENCE: Duration = Duration::from_secs(3);

/// Which way bytes flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Direction {
    /// From here to the other side.
    Up,
    /// From the other side to here.
    Down,
    /// Both at once.
    Both,
}

impl Direction {
    /// A short name for programs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Down => "down",
            Self::Both => "both",
        }
    }

    const fn is_up(self) -> bool {
        matches!(self, Self::Up | Self::Both)
    }

    const fn is_down(self) -> bool {
        matches!(self, Self::Down | Self::Both)
    }
}

/// Why there are no figures.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// The other side does not want to be measured, or cannot.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// Nothing has arrived.
    #[error("nothing arrived in {0:?}")]
    Nothing(Duration),
    /// Longer than the other side would do it.
    #[error("a flow lasts {LONGEST:?} at most, and more than nothing")]
    Time,
}

/// What has arrived where it was to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Flow {
    /// Bytes of content.
    pub bytes: u64,
    /// From the first byte to the last.
    pub time: Duration,
}

impl Flow {
    /// Bits of content per second; 0 where less has arrived than can be timed.
    pub fn goodput(&self) -> f64 {
        let seconds = self.time.as_secs_f64();
        if seconds > 0.0 { self.bytes as f64 * 8.0 / seconds } else { 0.0 }
    }
}

/// What QUIC has sent and counted as lost: all packets of one end of the session, acknowledgements too.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Loss {
    /// Packets sent.
    pub sent: u64,
    /// Those of them that were lost.
    pub lost: u64,
}

impl Loss {
    fn between(before: Counters, after: Counters) -> Self {
        Self { sent: after.sent.saturating_sub(before.sent), lost: after.lost.saturating_sub(before.lost) }
    }

    /// In percent.
    pub fn percent(&self) -> f64 {
        if self.sent == 0 { 0.0 } else { 100.0 * self.lost as f64 / self.sent as f64 }
    }
}

/// Round trips of probes.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Rtts {
    /// Probes that were sent.
    pub sent: u32,
    /// Ascending, of those that were answered.
    pub answered: Vec<Duration>,
}

impl Rtts {
    /// The least one that is not under this share, from 0 to 1, of them all.
    pub fn quantile(&self, share: f64) -> Option<Duration> {
        let rank = (share * self.answered.len() as f64).ceil().max(1.0) as usize;
        self.answered.get(rank - 1).copied()
    }
}

/// One direction of a phase.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Measured {
    /// What has arrived.
    pub flow: Flow,
    /// What the sending side lost on the way.
    pub loss: Loss,
    /// Whether the sending side sent over a direct path, at the beginning and at the end.
    pub direct: (bool, bool),
}

/// What was measured at one time.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Phase {
    /// From here to the other side, where that was measured.
    pub up: Option<Measured>,
    /// From the other side to here, where that was measured.
    pub down: Option<Measured>,
    /// Under this load.
    pub rtt: Rtts,
    /// The path from here, at the end.
    pub path: Option<Path>,
}

/// How far a flow is, for whoever looks on.
#[derive(Debug, Default)]
struct Look(Mutex<Arrived>);

impl Look {
    fn put(&self, arrived: Arrived) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = arrived;
    }

    fn get(&self) -> Flow {
        let arrived = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Flow { bytes: arrived.bytes, time: arrived.time }
    }
}

/// Measures one session.
#[derive(Debug)]
pub struct Bench {
    hub: Hub,
    pings: Exchange,
    up: Look,
    down: Look,
}

impl Bench {
    /// Asks whether the other side lets itself be measured.
    ///
    /// # Errors
    ///
    /// When it does not.
    pub async fn begin(hub: Hub) -> Result<Self, BenchError> {
        let pings = hub.ask(&Request::Ping).await?;
        let bench = Self { hub, pings, up: Look::default(), down: Look::default() };
        bench.count().await?;
        Ok(bench)
    }

    /// What has arrived so far of the present flows: up, and down.
    pub fn so_far(&self) -> (Flow, Flow) {
        (self.up.get(), self.down.get())
    }

    /// The round trip without load.
    pub async fn idle(&self) -> Rtts {
        self.probe(tokio::time::sleep(PROBE * IDLE_PROBES)).await
    }

    /// Loads the session that way for so long.
    ///
    /// # Errors
    ///
    /// When the other side does not do it, and when nothing arrives.
    pub async fn load(&self, direction: Direction, time: Duration) -> Result<Phase, BenchError> {
        if time.is_zero() || time > LONGEST {
            return Err(BenchError::Time);
        }
        self.up.put(Arrived::default());
        self.down.put(Arrived::default());
        let (own, their) = (Counters::of(self.hub.session()), self.count().await?);
        let flows = async {
            let up = async { if direction.is_up() { self.give_up(time).await } else { Ok(()) } };
            let down = async { if direction.is_down() { self.take_down(time).await } else { Ok(()) } };
            tokio::try_join!(up, down)
        };
        let mut loaded = Ok(((), ()));
        let rtt = self.probe(async { loaded = flows.await }).await;
        loaded?;
        let (own_after, their_after) = (Counters::of(self.hub.session()), self.count().await?);
        let measured = |wanted: bool, look: &Look, before: Counters, after: Counters| {
            let flow = look.get();
            let (loss, direct) = (Loss::between(before, after), (before.direct, after.direct));
            match wanted {
                true if flow.time.is_zero() => Err(BenchError::Nothing(time)),
                true => Ok(Some(Measured { flow, loss, direct })),
                false => Ok(None),
            }
        };
        Ok(Phase {
            up: measured(direction.is_up(), &self.up, own, own_after)?,
            down: measured(direction.is_down(), &self.down, their, their_after)?,
            rtt,
            path: self.hub.session().path(),
        })
    }

    async fn count(&self) -> Result<Counters, BenchError> {
        let mut exchange = self.hub.ask(&Request::Bench(Order::Count)).await?;
        let mut bytes = [0; Counters::LENGTH];
        exchange.receive.read_exact(&mut bytes).await.map_err(|_| RequestError::Session)?;
        Ok(Counters::from_bytes(bytes))
    }

    async fn give_up(&self, time: Duration) -> Result<(), BenchError> {
        let mut exchange = self.hub.ask(&Request::Bench(Order::Take)).await?;
        let end = Instant::now() + time + PATIENCE;
        let reports = async {
            let mut bytes = [0; Arrived::LENGTH];
            while exchange.receive.read_exact(&mut bytes).await.is_ok() {
                self.up.put(Arrived::from_bytes(bytes));
            }
        };
        // What was heard last counts where the last word is late.
        let _ = tokio::time::timeout_at(end, async { tokio::join!(give(&mut exchange.send, time), reports) })
            .await;
        Ok(())
    }

    async fn take_down(&self, time: Duration) -> Result<(), BenchError> {
        let millis = u32::try_from(time.as_millis()).map_err(|_| BenchError::Time)?;
        let mut exchange = self.hub.ask(&Request::Bench(Order::Give { millis })).await?;
        let taking = take(&mut exchange.receive, |arrived| self.down.put(arrived));
        let _ = tokio::time::timeout(time + PATIENCE, taking).await;
        Ok(())
    }

    /// Probes the round trip until `over`, and a little longer for the last answers.
    async fn probe(&self, over: impl Future<Output = ()>) -> Rtts {
        let (sender, mut receiver) = self.pings.flow();
        let mut ticks = tokio::time::interval(PROBE);
        let (mut sent, mut rtts): (Vec<Instant>, Rtts) = (Vec::new(), Rtts::default());
        let mut end = None;
        tokio::pin!(over);
        loop {
            if end.is_some() && rtts.answered.len() >= sent.len() {
                break;
            }
            let late = async {
                match end {
                    Some(end) => tokio::time::sleep_until(end).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = &mut over, if end.is_none() => end = Some(Instant::now() + PATIENCE),
                _ = ticks.tick(), if end.is_none() => {
                    let mut buffer = sender.buffer(4);
                    buffer.put_u32(sent.len() as u32);
                    if sender.send(buffer.freeze()).is_ok_and(|fits| fits) {
                        sent.push(Instant::now());
                    }
                }
                payload = receiver.receive() => {
                    let number = payload[..].try_into().map(u32::from_be_bytes);
                    if let Some(at) = number.ok().and_then(|number| sent.get(number as usize)) {
                        rtts.answered.push(at.elapsed());
                    }
                }
                () = late => break,
            }
        }
        rtts.sent = sent.len() as u32;
        // More answers than probes would be the other side's fancy.
        rtts.answered.truncate(sent.len());
        rtts.answered.sort_unstable();
        rtts
    }
}
