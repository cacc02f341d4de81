//! What a session carries: goodput in either direction and in both at once, the round trip without load and under it, and loss.
//!
//! One side measures ([`Bench`]), the other [`Bencher`] serves: it takes what comes and tells how much that was, or sends for as long as it is asked to
//! and never for longer than [`LONGEST`]. Goodput is counted where the bytes arrive, from the first of them to the last.
//!
//! A flow ends with a reset and not with a last byte: what waits in buffers by then would take a slow path minutes, and tells nothing.

mod measure;
mod serve;

#[cfg(test)]
mod bench_tests;

use std::time::Duration;

use bytes::Bytes;
use quinn::{RecvStream, SendStream};
use serde::{Deserialize, Serialize};

pub use measure::{Bench, BenchError, Direction, Flow, Loss, Measured, Phase, Rtts};
pub use serve::Bencher;

/// The longest flow, either way.
pub const LONGEST: Duration = Duration::from_secs(60);

/// Code with which a flow is reset or stopped at the end of its time.
const OVER: u32 = 0x5e14;

/// How often the taking side tells how much has come.
const REPORT: Duration = Duration::from_millis(100);

/// Bytes handed to QUIC at once; it takes no copy of them.
const BLOCK: usize = 1 << 20;

/// What is asked of the other side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Order {
    /// Take what comes on this stream; tell how much that is, and for the last time when the stream is reset.
    Take,
    /// Send on this stream for so many milliseconds, then reset it.
    Give {
        /// At most [`LONGEST`].
        millis: u32,
    },
    /// Tell what your end of the session has sent and lost so far, and over which kind of path it sends.
    Count,
}

/// Bytes that have arrived, and the time since the first of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Arrived {
    bytes: u64,
    time: Duration,
}

impl Arrived {
    /// On the wire: bytes and microseconds, 64 bits each, big-endian.
    const LENGTH: usize = 16;

    fn to_bytes(self) -> [u8; Self::LENGTH] {
        let micros = u64::try_from(self.time.as_micros()).unwrap_or(u64::MAX);
        let mut bytes = [0; Self::LENGTH];
        bytes[..8].copy_from_slice(&self.bytes.to_be_bytes());
        bytes[8..].copy_from_slice(&micros.to_be_bytes());
        bytes
    }

    fn from_bytes(bytes: [u8; Self::LENGTH]) -> Self {
        let (count, micros) = halves(bytes);
        Self { bytes: count, time: Duration::from_micros(micros) }
    }
}

fn halves(bytes: [u8; 16]) -> (u64, u64) {
    let number = u128::from_be_bytes(bytes);
    ((number >> 64) as u64, number as u64)
}

/// What one end of a session has sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Counters {
    sent: u64,
    lost: u64,
    direct: bool,
}

impl Counters {
    /// On the wire: packets sent and lost, 64 bits each, big-endian; 1 where they go over a direct path.
    const LENGTH: usize = 17;

    fn of(session: &crate::Session) -> Self {
        let path = session.stats().path;
        let direct = session.path().is_some_and(|path| path.is_direct());
        Self { sent: path.sent_packets, lost: path.lost_packets, direct }
    }

    fn to_bytes(self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        bytes[..8].copy_from_slice(&self.sent.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.lost.to_be_bytes());
        bytes[16] = self.direct.into();
        bytes
    }

    fn from_bytes(bytes: [u8; Self::LENGTH]) -> Self {
        let mut numbers = [0; 16];
        numbers.copy_from_slice(&bytes[..16]);
        let (sent, lost) = halves(numbers);
        Self { sent, lost, direct: bytes[16] != 0 }
    }
}

/// Sends for so long, then resets the stream. False when the other side has stopped listening, or the session is over.
async fn give(send: &mut SendStream, time: Duration) -> bool {
    let block = Bytes::from(vec![0; BLOCK]);
    let sending = async { while send.write_chunk(block.clone()).await.is_ok() {} };
    let in_time = tokio::time::timeout(time, sending).await.is_err();
    let _ = send.reset(OVER.into());
    in_time
}

/// Takes what comes until the stream ends or is reset, and says how much there has been after every read.
async fn take(receive: &mut RecvStream, mut told: impl FnMut(Arrived)) {
    let mut first = None;
    let mut arrived = Arrived::default();
    let mut pieces = [const { Bytes::new() }; 64];
    while let Ok(Some(count)) = receive.read_chunks(&mut pieces).await {
        let now = tokio::time::Instant::now();
        arrived.bytes +=
            pieces[..count].iter_mut().map(|piece| std::mem::take(piece).len() as u64).sum::<u64>();
        arrived.time = now - *first.get_or_insert(now);
        told(arrived);
    }
}
