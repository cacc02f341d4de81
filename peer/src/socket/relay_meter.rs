//! What passes over a remote's relay, as far as the driver has to know: whether anything comes back, and on which of its channels.
//!
//! As in [`meter`](super::meter), the packet path takes no lock, and looks at the clock once per batch that it sends.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use crate::driver::{LULL, RelayTraffic};

/// Relayed traffic of one remote. Times are microseconds after `origin` and one more; 0 is never.
#[derive(Debug)]
pub(crate) struct RelayMeter {
    origin: Instant,
    /// When the first datagram left after the last that came on the channel in use, or after a lull.
    unanswered: AtomicU64,
    last_sent: AtomicU64,
    /// Something has come on the channel in use.
    heard: AtomicBool,
    /// Something has come on another.
    elsewhere: AtomicBool,
    /// The driver looks again by itself.
    armed: AtomicBool,
}

impl RelayMeter {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            origin: now,
            unanswered: AtomicU64::new(0),
            last_sent: AtomicU64::new(0),
            heard: AtomicBool::new(false),
            elsewhere: AtomicBool::new(false),
            armed: AtomicBool::new(false),
        }
    }

    fn stamp(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.origin).as_micros() as u64 + 1
    }

    fn moment(&self, stamp: u64) -> Option<Instant> {
        Some(self.origin + Duration::from_micros(stamp.checked_sub(1)?))
    }

    /// Something has left. True when the driver has to be told.
    pub(super) fn note_sent(&self, now: Instant) -> bool {
        let stamp = self.stamp(now);
        let before = self.last_sent.swap(stamp, SeqCst);
        let lull = before != 0 && stamp.saturating_sub(before) >= LULL.as_micros() as u64;
        if lull {
            // What was sent before has needed no answer.
            self.unanswered.store(stamp, SeqCst);
        } else {
            let _ = self.unanswered.compare_exchange(0, stamp, SeqCst, SeqCst);
        }
        !self.armed.swap(true, SeqCst)
    }

    /// Something has come, on the channel in use or not. True when the driver has to be told.
    pub(super) fn note_received(&self, in_use: bool) -> bool {
        if in_use {
            if self.unanswered.load(SeqCst) != 0 {
                self.unanswered.store(0, SeqCst);
            }
            if !self.heard.load(SeqCst) {
                self.heard.store(true, SeqCst);
            }
            return false;
        }
        !self.elsewhere.swap(true, SeqCst)
    }

    /// What there is to tell.
    pub(crate) fn take(&self) -> RelayTraffic {
        RelayTraffic {
            unanswered_since: self.moment(self.unanswered.load(SeqCst)),
            last_sent: self.moment(self.last_sent.load(SeqCst)),
            heard: self.heard.swap(false, SeqCst),
            elsewhere: self.elsewhere.swap(false, SeqCst),
        }
    }

    /// The driver looks no more by itself. True when it has to after all: something has left in the meantime.
    pub(crate) fn disarm(&self, seen: RelayTraffic) -> bool {
        self.armed.store(false, SeqCst);
        let last_sent = self.moment(self.last_sent.load(SeqCst));
        last_sent != seen.last_sent && !self.armed.swap(true, SeqCst)
    }

    /// Another channel is in use.
    pub(crate) fn reset(&self) {
        self.unanswered.store(0, SeqCst);
        self.heard.store(false, SeqCst);
        self.elsewhere.store(false, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_driver_is_told_of_the_first_and_sees_what_is_unanswered() {
        let start = Instant::now();
        let meter = RelayMeter::new(start);
        assert_eq!(meter.take(), RelayTraffic::default());
        assert!(meter.note_sent(start + MS) && !meter.note_sent(start + 2 * MS));
        let seen = meter.take();
        assert_eq!((seen.unanswered_since, seen.last_sent), (Some(start + MS), Some(start + 2 * MS)));
        assert!(!meter.disarm(seen));
        assert!(meter.note_sent(start + 3 * MS), "told again");
        assert!(!meter.note_received(true));
        let seen = meter.take();
        assert!(seen.unanswered_since.is_none() && seen.heard && !seen.elsewhere);
        assert!(!meter.take().heard, "said once");
        meter.note_sent(start + 4 * MS);
        assert!(meter.disarm(seen), "something has left since it looked");
    }

    #[test]
    fn after_a_lull_counting_begins_anew() {
        let start = Instant::now();
        let meter = RelayMeter::new(start);
        meter.note_sent(start);
        meter.note_sent(start + LULL / 2);
        assert_eq!(meter.take().unanswered_since, Some(start));
        meter.note_sent(start + 2 * LULL);
        assert_eq!(meter.take().unanswered_since, Some(start + 2 * LULL));
    }

    #[test]
    fn what_comes_elsewhere_is_told_once_each_time() {
        let start = Instant::now();
        let meter = RelayMeter::new(start);
        meter.note_sent(start);
        assert!(meter.note_received(false) && !meter.note_received(false));
        let seen = meter.take();
        assert!(seen.elsewhere && !seen.heard && seen.unanswered_since == Some(start));
        assert!(meter.note_received(false));
        meter.reset();
        assert!(!meter.take().elsewhere);
    }
}
