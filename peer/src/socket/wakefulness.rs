//! Whether this process has run all the time. What came while it did not is stale: an answer so late is measured as a round trip of that length, and
//! quinn, which paces by it for a long time, cannot be told otherwise.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A process that has not run for so long was stopped, or its machine slept.
pub(crate) const ASLEEP: Duration = Duration::from_secs(5);

/// For so long after waking a stream still gives what came before: a full receive buffer is read by then.
const DROWSY: Duration = Duration::from_millis(100);

/// Never but for a process that was just stopped: never has it woken.
const NEVER: u64 = u64::MAX;

/// When it ran.
#[derive(Debug)]
pub(super) struct Wakefulness {
    born: Instant,
    /// When it was last known to run, in milliseconds since `born`.
    beat: AtomicU64,
    /// When it woke last.
    woke: AtomicU64,
    /// Held while the stale is thrown away: whoever finds the process just awake waits for that.
    waking: Mutex<()>,
}

impl Wakefulness {
    pub(super) fn new(now: Instant) -> Self {
        Self { born: now, beat: AtomicU64::new(0), woke: AtomicU64::new(NEVER), waking: Mutex::new(()) }
    }

    fn since_birth(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.born).as_millis() as u64
    }

    /// How long it has not run, if that was long.
    fn asleep(&self, now: u64) -> Option<Duration> {
        let gap = Duration::from_millis(now.saturating_sub(self.beat.load(Ordering::Acquire)));
        (gap >= ASLEEP).then_some(gap)
    }

    /// It runs: to be called at least every [`ASLEEP`] but for when it does not. `forget` is called when it has not.
    pub(super) fn beat(&self, now: Instant, forget: impl FnOnce(Duration)) {
        self.look(now, forget);
        self.beat.fetch_max(self.since_birth(now), Ordering::Release);
    }

    /// Is to be called before anything is read. `forget` is called when it has not run; never twice for one sleep, and nobody returns from here before
    /// it has.
    pub(super) fn look(&self, now: Instant, forget: impl FnOnce(Duration)) {
        let now = self.since_birth(now);
        if self.asleep(now).is_none() {
            return;
        }
        let _waking = self.waking.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gap) = self.asleep(now) {
            forget(gap);
            self.woke.store(now, Ordering::Release);
            self.beat.fetch_max(now, Ordering::Release);
        }
    }

    /// Whether a stream may still give what has waited for long.
    pub(super) fn is_drowsy(&self, now: Instant) -> bool {
        let woke = self.woke.load(Ordering::Acquire);
        woke != NEVER && self.since_birth(now) < woke.saturating_add(DROWSY.as_millis() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_sleep_is_noticed_once_by_whoever_looks_first() {
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        let awake = Wakefulness::new(start);
        awake.beat(after(2_000), |gap| panic!("awake, not {gap:?}"));
        awake.look(after(6_900), |gap| panic!("awake, not {gap:?}"));
        assert!(!awake.is_drowsy(after(6_900)));
        let mut slept = Vec::new();
        // The one that beats is as good as the one that reads.
        awake.beat(after(600_000), |gap| slept.push(gap));
        awake.look(after(600_001), |gap| slept.push(gap));
        awake.beat(after(602_000), |gap| slept.push(gap));
        assert_eq!(slept, [Duration::from_millis(598_000)]);
        assert!(awake.is_drowsy(after(600_099)) && !awake.is_drowsy(after(600_100)));
        awake.look(after(700_000), |gap| slept.push(gap));
        assert_eq!(slept.len(), 2);
        assert!(awake.is_drowsy(after(700_001)));
    }
}
