//! Freshness of the permission to send on the selected path (RFC 7675).

use std::time::{Duration, Instant};

use rand::Rng;

use crate::config::Timers;

/// The consent of one path.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Consent {
    /// When the next check of it is due.
    pub(crate) next_check: Instant,
    /// When it is lost.
    pub(crate) expires: Instant,
}

impl Consent {
    /// Given just now.
    pub(crate) fn given(timers: &Timers, rng: &mut impl Rng, now: Instant) -> Self {
        Self { next_check: now + interval(timers, rng), expires: now + timers.consent_timeout }
    }

    pub(crate) fn renew(&mut self, timers: &Timers, now: Instant) {
        self.expires = now + timers.consent_timeout;
    }

    pub(crate) fn schedule(&mut self, timers: &Timers, rng: &mut impl Rng, now: Instant) {
        self.next_check = now + interval(timers, rng);
    }
}

/// RFC 7675, 5.1: the interval is randomised from 0.8 to 1.2 times its basic value, so that checks do not fall into step.
fn interval(timers: &Timers, rng: &mut impl Rng) -> Duration {
    timers.consent_interval.mul_f64(rng.random_range(0.8..=1.2))
}
