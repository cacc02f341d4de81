//! The pace of checks (RFC 8445, section 14.2) as a leaky bucket, in the form of the generic cell rate algorithm: one
//! instant, no timer.

use std::time::{Duration, Instant};

/// The least that RFC 8445, 14.2, allows.
const LEAST_TA: Duration = Duration::from_millis(5);

/// How far urgent checks may run ahead of the pace, in checks.
const URGENT_AHEAD: u32 = 8;

#[derive(Debug)]
pub(crate) struct Pacer {
    ta: Duration,
    burst: u32,
    /// The agent's start: no check is due before.
    start: Instant,
    /// When the next check would leave if there were no bursts.
    next: Instant,
}

impl Pacer {
    pub(crate) fn new(ta: Duration, burst: u32, now: Instant) -> Self {
        Self { ta: ta.max(LEAST_TA), burst: burst.clamp(1, 16), start: now, next: now }
    }

    /// When a check may leave. Urgent ones (triggered, nominating, consent) may overdraw; what they spend, the others
    /// wait for.
    pub(crate) fn ready_at(&self, urgent: bool) -> Instant {
        let ahead = self.burst - 1 + if urgent { URGENT_AHEAD } else { 0 };
        self.next.checked_sub(self.ta * ahead).map_or(self.start, |at| at.max(self.start))
    }

    pub(crate) fn spend(&mut self, now: Instant) {
        self.next = self.next.max(now) + self.ta;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::origin;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_burst_then_one_check_per_interval() {
        let t0 = origin();
        let mut pacer = Pacer::new(10 * MS, 4, t0);
        let mut sent = [0; 10];
        for slot in 0..100 {
            let now = t0 + slot * MS;
            while pacer.ready_at(false) <= now {
                pacer.spend(now);
                sent[slot as usize / 10] += 1;
            }
        }
        assert_eq!(sent, [4, 1, 1, 1, 1, 1, 1, 1, 1, 1]);
    }

    #[test]
    fn urgent_checks_overdraw_and_the_rest_wait_for_it() {
        let t0 = origin();
        let mut pacer = Pacer::new(10 * MS, 4, t0);
        let mut urgent = 0;
        while pacer.ready_at(true) <= t0 {
            pacer.spend(t0);
            urgent += 1;
        }
        assert_eq!(urgent, 12);
        assert_eq!(pacer.ready_at(false), t0 + 90 * MS);
    }

    #[test]
    fn no_pace_is_faster_than_the_standard_allows() {
        let t0 = origin();
        let mut pacer = Pacer::new(Duration::ZERO, 1, t0);
        pacer.spend(t0);
        assert_eq!(pacer.ready_at(false), t0 + 5 * MS);
    }
}
