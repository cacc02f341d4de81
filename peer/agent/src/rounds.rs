//! When rounds of checks are repeated.
//!
//! Filtering NATs let a check in only while the other side is sending too, so two agents that back off on their own
//! would miss each other ever more. Here both compute the same times: an introduction reaches both sides at the
//! same moment, which is point 0 of a grid that they share; rounds begin at points of it, and a longer back-off only
//! skips points (every 2nd, 4th, ...), so that whoever backs off more still meets the other. Jitter comes from the
//! credentials, which both know, and keeps the introductions of one machine apart.

use std::time::{Duration, Instant};

use crate::config::Timers;

/// Least rest between a round and the next.
const REST: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(crate) struct Rounds {
    origin: Instant,
    grid: Duration,
    max_level: u32,
    secret: u64,
    level: u32,
    /// When the running round began.
    pub(crate) running: Option<Instant>,
    /// When the next begins, if nothing happens before.
    pub(crate) next: Option<Instant>,
}

impl Rounds {
    /// The first round begins now.
    pub(crate) fn new(timers: &Timers, ufrags: [&str; 2], now: Instant) -> Self {
        let mut ufrags = ufrags;
        ufrags.sort_unstable();
        let secret = fnv1a(ufrags[1].bytes(), fnv1a(ufrags[0].bytes(), FNV_OFFSET));
        Self {
            origin: now,
            grid: timers.grid.max(Duration::from_millis(100)),
            max_level: timers.max_level.min(16),
            secret,
            level: 0,
            running: Some(now),
            next: None,
        }
    }

    pub(crate) fn begin(&mut self, now: Instant) {
        self.running = Some(now);
        self.next = None;
    }

    /// A path is selected: the next trouble begins with short rests again.
    pub(crate) fn succeeded(&mut self) {
        self.level = 0;
        self.next = None;
    }

    /// The round has ended without a path.
    pub(crate) fn failed(&mut self, now: Instant) {
        self.running = None;
        self.next = Some(self.point_after(now + REST));
        self.level = (self.level + 1).min(self.max_level);
    }

    /// The first point of the present level after `earliest`.
    fn point_after(&self, earliest: Instant) -> Instant {
        let stride = 1u64 << self.level;
        let step = self.grid.as_nanos() * u128::from(stride);
        let elapsed = earliest.saturating_duration_since(self.origin).as_nanos();
        let mut point = (elapsed / step) as u64 * stride;
        loop {
            let at = self.origin + nanos(self.grid, point) + self.jitter(point);
            if at > earliest {
                return at;
            }
            point += stride;
        }
    }

    fn jitter(&self, point: u64) -> Duration {
        // FNV's last bytes hardly reach its high bits, so the low ones are taken.
        let thousandths = fnv1a(point.to_be_bytes(), self.secret) % 1000;
        self.grid / 4 * thousandths as u32 / 1000
    }
}

fn nanos(grid: Duration, points: u64) -> Duration {
    Duration::from_nanos((grid.as_nanos() * u128::from(points)) as u64)
}

const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;

/// FNV-1a. Both sides must compute the same, whatever versions of whatever library they were built with.
fn fnv1a(bytes: impl IntoIterator<Item = u8>, from: u64) -> u64 {
    bytes.into_iter().fold(from, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::origin;

    /// Begin of every round of an agent that finds nothing, in seconds after `origin`.
    fn starts(rounds: &mut Rounds, until: f64) -> Vec<f64> {
        let mut starts = vec![0.0];
        let mut now = rounds.origin;
        loop {
            now += Timers::default().volley();
            rounds.failed(now);
            now = rounds.next.unwrap();
            let at = (now - rounds.origin).as_secs_f64();
            if at > until {
                return starts;
            }
            rounds.begin(now);
            starts.push(at);
        }
    }

    #[test]
    fn rounds_grow_apart_up_to_a_minute() {
        let mut rounds = Rounds::new(&Timers::default(), ["a", "b"], origin());
        let points: Vec<_> = starts(&mut rounds, 300.0).iter().map(|at| (at / 4.0) as u32 * 4).collect();
        assert_eq!(points, [0, 8, 16, 32, 64, 128, 192, 256]);
    }

    #[test]
    fn both_sides_begin_at_the_same_moments() {
        let timers = Timers::default();
        let mut a = Rounds::new(&timers, ["a", "b"], origin());
        let mut b = Rounds::new(&timers, ["b", "a"], origin());
        assert_eq!(starts(&mut a, 1000.0), starts(&mut b, 1000.0));
        let mut other = Rounds::new(&timers, ["a", "c"], origin());
        assert_ne!(starts(&mut a, 1000.0), starts(&mut other, 1000.0));
    }

    #[test]
    fn a_side_in_fresh_trouble_meets_one_that_has_backed_off() {
        let (timers, t0) = (Timers::default(), origin());
        let mut old = Rounds::new(&timers, ["a", "b"], t0);
        let long = starts(&mut old, 2000.0);
        let mut fresh = Rounds::new(&timers, ["a", "b"], t0);
        fresh.failed(t0 + Duration::from_secs(1000));
        let mut met = 0;
        while let Some(next) = fresh.next.filter(|next| *next < t0 + Duration::from_secs(1500)) {
            met += usize::from(long.contains(&(next - t0).as_secs_f64()));
            fresh.begin(next);
            fresh.failed(next + timers.volley());
        }
        assert!(met >= 7, "{met}");
    }
}
