//! Consent on the selected path (RFC 7675).

use std::time::{Duration, Instant};

use rand::Rng as _;
use rand::rngs::StdRng;

use crate::timers::{CONSENT_EXPIRY, CONSENT_INTERVAL};

/// When the next consent check is due, and until when consent lasts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Consent {
    pub(crate) next_check: Instant,
    last_answer: Instant,
}

impl Consent {
    pub(crate) fn new(now: Instant, random: &mut StdRng) -> Self {
        Self { next_check: now + interval(random), last_answer: now }
    }

    /// A check was answered.
    pub(crate) fn answered(&mut self, now: Instant) {
        self.last_answer = now;
    }

    /// A check was sent.
    pub(crate) fn checked(&mut self, now: Instant, random: &mut StdRng) {
        self.next_check = now + interval(random);
    }

    pub(crate) fn expires(&self) -> Instant {
        self.last_answer + CONSENT_EXPIRY
    }
}

/// Randomised so that the checks of many sessions do not fall together (RFC 7675, 5.1).
fn interval(random: &mut StdRng) -> Duration {
    CONSENT_INTERVAL.mul_f64(random.random_range(0.8..1.2))
}
