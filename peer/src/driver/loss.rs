//! Whether the relay has begun to lose: birthday probing may be what fills a router's table, and then it has to stop. Pure.

use std::time::{Duration, Instant};

/// How long packets are counted before they are judged.
const PERIOD: Duration = Duration::from_millis(500);

/// Fewer packets than this say nothing.
const LEAST_SENT: u64 = 20;

/// A loss beyond this share, and beyond three times what was usual before, is ours to stop: 1 in 10.
const SHARE: u64 = 10;

/// Packets sent and lost since a session began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) sent: u64,
    pub(super) lost: u64,
}

/// Watches one remote's sessions while probing goes on.
#[derive(Debug)]
pub(super) struct LossWatch {
    /// Before probing began.
    before: Counts,
    last: Counts,
    since: Instant,
}

impl LossWatch {
    /// Probing begins.
    pub(super) fn new(counts: Counts, now: Instant) -> Self {
        Self { before: counts, last: counts, since: now }
    }

    /// Whether the relay loses more than it should, and more than it did before.
    pub(super) fn has_begun(&mut self, counts: Counts, now: Instant) -> bool {
        let sent = counts.sent.saturating_sub(self.last.sent);
        if now < self.since + PERIOD || sent < LEAST_SENT {
            return false;
        }
        let lost = counts.lost.saturating_sub(self.last.lost);
        (self.last, self.since) = (counts, now);
        lost * SHARE > sent && lost * self.before.sent.max(1) > 3 * self.before.lost * sent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is said after each further half second.
    fn judge(before: (u64, u64), then: &[(u64, u64)]) -> Vec<bool> {
        let start = Instant::now();
        let mut total = Counts { sent: before.0, lost: before.1 };
        let mut watch = LossWatch::new(total, start);
        let say = |(step, (sent, lost)): (u32, &(u64, u64))| {
            total = Counts { sent: total.sent + sent, lost: total.lost + lost };
            watch.has_begun(total, start + PERIOD * (step + 1))
        };
        (0..).zip(then).map(say).collect()
    }

    #[test]
    fn a_loss_that_was_not_there_before_is_noticed() {
        assert_eq!(judge((1000, 0), &[(100, 0), (100, 5), (100, 30)]), [false, false, true]);
        assert_eq!(judge((0, 0), &[(100, 30)]), [true]);
    }

    #[test]
    fn a_line_that_always_loses_is_no_reason() {
        assert_eq!(judge((1000, 60), &[(100, 12), (100, 15), (100, 40)]), [false, false, true]);
    }

    #[test]
    fn few_packets_say_nothing_and_are_counted_on() {
        assert_eq!(judge((0, 0), &[(5, 5), (5, 5), (15, 15)]), [false, false, true]);
    }
}
