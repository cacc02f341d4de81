//! What the relay has done, summed up over its threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::shard::Counters;
use crate::overflow::Overflow;

/// What the relay has done since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct RelayCount {
    /// Frames forwarded.
    pub forwarded: u64,
    /// Bytes of these, headers included.
    pub forwarded_bytes: u64,
    /// Runs of frames refused: no such channel, or an end that is not bound.
    pub refused: u64,
    /// Runs of frames dropped: a stream that does not keep up.
    pub dropped: u64,
    /// Runs of frames dropped: a limit.
    pub limited: u64,
    /// STUN answers.
    pub answered: u64,
    /// Datagrams that the kernel dropped before the relay saw them: a socket's buffer was full.
    pub overflowed: u64,
}

/// Where to read that.
#[derive(Debug, Clone, Default)]
pub(crate) struct Meter {
    /// One per thread, so that threads do not contend for a cache line.
    counters: Vec<Arc<Counters>>,
    overflow: Arc<Overflow>,
}

impl Meter {
    pub(crate) fn new(overflow: Arc<Overflow>) -> Self {
        Self { counters: Vec::new(), overflow }
    }

    /// The counters of one thread more.
    pub(crate) fn add(&mut self) -> Arc<Counters> {
        let counters = Arc::new(Counters::default());
        self.counters.push(counters.clone());
        counters
    }

    pub(crate) fn count(&self) -> RelayCount {
        let sum = |counter: fn(&Counters) -> &AtomicU64| {
            self.counters.iter().map(|shard| counter(shard).load(Ordering::Relaxed)).sum()
        };
        RelayCount {
            forwarded: sum(|shard| &shard.forwarded),
            forwarded_bytes: sum(|shard| &shard.forwarded_bytes),
            refused: sum(|shard| &shard.refused),
            dropped: sum(|shard| &shard.dropped),
            limited: sum(|shard| &shard.limited),
            answered: sum(|shard| &shard.answered),
            overflowed: self.overflow.count(),
        }
    }
}
