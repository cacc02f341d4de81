//! What becomes of a packet on one direction of a line. Pure: a length and `now` in, a fate out.

use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::queue::Impairment;

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Lost by chance, or for want of room.
    Lost,
    /// It arrives.
    Arrives(Instant),
    /// It arrives, and once more.
    ArrivesTwice(Instant),
}

/// One direction of a line, and what it remembers of the packets before.
#[derive(Debug)]
pub(crate) struct Line {
    impairment: Impairment,
    rng: StdRng,
    /// When the last accepted packet has been put on the wire.
    sent_until: Option<Instant>,
    /// When the last packet that keeps its order arrives.
    last_arrival: Option<Instant>,
}

impl Line {
    pub(crate) fn new(impairment: Impairment, seed: u64) -> Self {
        Self { impairment, rng: StdRng::seed_from_u64(seed), sent_until: None, last_arrival: None }
    }

    /// What it does to packets from now on.
    pub(crate) fn change(&mut self, impairment: Impairment) {
        self.impairment = impairment;
    }

    /// Decides about a packet of this length that enters the line at `now`.
    pub(crate) fn carry(&mut self, length: usize, now: Instant) -> Fate {
        if self.chance(self.impairment.loss) {
            return Fate::Lost;
        }
        let Some(sent) = self.serialize(length, now) else { return Fate::Lost };
        let arrival = sent + self.impairment.delay + self.jitter();
        if self.chance(self.impairment.reorder) {
            return Fate::Arrives(arrival + self.impairment.reorder_by);
        }
        let arrival = self.last_arrival.map_or(arrival, |last| arrival.max(last));
        self.last_arrival = Some(arrival);
        if self.chance(self.impairment.duplicate) {
            Fate::ArrivesTwice(arrival)
        } else {
            Fate::Arrives(arrival)
        }
    }

    /// When the line is done putting a packet on the wire that came at `now`; `None` where there is no room to
    /// wait.
    fn serialize(&mut self, length: usize, now: Instant) -> Option<Instant> {
        let Some(rate) = self.impairment.rate else { return Some(now) };
        let start = self.sent_until.map_or(now, |until| until.max(now));
        let waiting_bits = (start - now).as_nanos() * u128::from(rate) / 1_000_000_000;
        if waiting_bits / 8 + length as u128 > self.impairment.queue as u128 {
            return None;
        }
        let nanoseconds = length as u128 * 8 * 1_000_000_000 / u128::from(rate);
        let until = start + Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        self.sent_until = Some(until);
        Some(until)
    }

    fn jitter(&mut self) -> Duration {
        if self.impairment.jitter.is_zero() {
            return Duration::ZERO;
        }
        self.impairment.jitter.mul_f64(self.rng.random())
    }

    fn chance(&mut self, probability: f64) -> bool {
        probability > 0.0 && self.rng.random_bool(probability)
    }
}
