//! What passes on a remote's direct route, as far as its agent has to know: whether anything comes back.
//!
//! The packet path takes no lock, and looks at the clock once per batch that it sends.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use peer_agent::Traffic;

/// Traffic of one remote on its direct route. Times are microseconds after `origin`; 0 is never.
#[derive(Debug)]
pub(crate) struct Meter {
    origin: Instant,
    /// When the first datagram left after the last that came.
    unanswered: AtomicU64,
    last_sent: AtomicU64,
    /// Data has come over the relay.
    relayed: AtomicBool,
    /// The driver knows that there is something unanswered.
    armed: AtomicBool,
}

impl Meter {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            origin: now,
            unanswered: AtomicU64::new(0),
            last_sent: AtomicU64::new(0),
            relayed: AtomicBool::new(false),
            armed: AtomicBool::new(false),
        }
    }

    fn stamp(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.origin).as_micros() as u64 + 1
    }

    fn unanswered_since(&self) -> Option<Instant> {
        let stamp = self.unanswered.load(SeqCst).checked_sub(1)?;
        Some(self.origin + Duration::from_micros(stamp))
    }

    /// Something has left. True when the driver has to be told: it sleeps while nothing is unanswered.
    pub(super) fn note_sent(&self, now: Instant) -> bool {
        let now = self.stamp(now);
        self.last_sent.store(now, SeqCst);
        self.unanswered.compare_exchange(0, now, SeqCst, SeqCst).is_ok() && !self.armed.swap(true, SeqCst)
    }

    /// Something has come.
    pub(super) fn note_received(&self) {
        if self.unanswered.load(SeqCst) != 0 {
            self.unanswered.store(0, SeqCst);
        }
    }

    /// Something has come over the relay. True when the driver has to be told.
    pub(super) fn note_copy(&self) -> bool {
        !self.relayed.swap(true, SeqCst)
    }

    /// What there is to tell the agent; the driver is told again of what comes after.
    pub(crate) fn take(&self) -> Traffic {
        let mut unanswered_since = self.unanswered_since();
        if unanswered_since.is_none() {
            self.armed.store(false, SeqCst);
            unanswered_since = self.unanswered_since();
            if unanswered_since.is_some() {
                self.armed.store(true, SeqCst);
            }
        }
        Traffic { unanswered_since, relayed: self.relayed.swap(false, SeqCst) }
    }

    /// A check that was sent at `alive` has been answered: so has all that left before.
    pub(crate) fn settle(&self, alive: Instant, now: Instant) {
        let (alive, now) = (self.stamp(alive), self.stamp(now));
        let since = self.unanswered.load(SeqCst);
        if since != 0 && since <= alive {
            let later = if self.last_sent.load(SeqCst) > alive { now } else { 0 };
            // Otherwise something has come in the meantime.
            let _ = self.unanswered.compare_exchange(since, later, SeqCst, SeqCst);
        }
    }

    /// The route is another.
    pub(super) fn reset(&self) {
        self.unanswered.store(0, SeqCst);
        self.relayed.store(false, SeqCst);
        self.armed.store(false, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_driver_is_told_once_until_it_has_seen_an_answer() {
        let start = Instant::now();
        let meter = Meter::new(start);
        assert_eq!(meter.take(), Traffic::default());
        assert!(meter.note_sent(start + MS));
        assert!(!meter.note_sent(start + 2 * MS));
        assert_eq!(meter.take().unanswered_since, Some(start + MS));
        meter.note_received();
        // Still awake: the next wake-up will see it.
        assert!(!meter.note_sent(start + 3 * MS));
        assert_eq!(meter.take().unanswered_since, Some(start + 3 * MS));
        meter.note_received();
        assert_eq!(meter.take().unanswered_since, None);
        assert!(meter.note_sent(start + 4 * MS));
    }

    #[test]
    fn an_answered_check_settles_what_left_before_it() {
        let start = Instant::now();
        let meter = Meter::new(start);
        meter.note_sent(start + MS);
        meter.settle(start, start + 5 * MS);
        assert_eq!(meter.take().unanswered_since, Some(start + MS), "the check was sent before");
        meter.note_sent(start + 9 * MS);
        meter.settle(start + 8 * MS, start + 20 * MS);
        assert_eq!(meter.take().unanswered_since, Some(start + 20 * MS), "something left after it");
        meter.settle(start + 21 * MS, start + 30 * MS);
        assert_eq!(meter.take().unanswered_since, None);
    }

    #[test]
    fn copies_are_told_once_each_time() {
        let meter = Meter::new(Instant::now());
        assert!(meter.note_copy() && !meter.note_copy());
        assert!(meter.take().relayed && !meter.take().relayed);
        assert!(meter.note_copy());
        meter.reset();
        assert!(!meter.take().relayed);
    }
}
