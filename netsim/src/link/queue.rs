//! What one direction of a line does to frames. Pure: frames, a seed and `now` in; frames and wake-ups out.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// What one direction of a line does to packets. The default, [`Impairment::none`], is nothing.
///
/// In this order, for every packet: it may be lost; it waits for those before it to be sent at `rate`, or is
/// dropped where `queue` bytes wait already; it travels for `delay` plus a random part of `jitter`. It never
/// overtakes another, except one that was chosen to be reordered.
#[derive(Clone, Debug, PartialEq)]
pub struct Impairment {
    delay: Duration,
    jitter: Duration,
    loss: f64,
    duplicate: f64,
    reorder: f64,
    reorder_by: Duration,
    rate: Option<u64>,
    queue: usize,
}

/// How long a reordered packet is held back unless told otherwise.
const REORDER_BY: Duration = Duration::from_millis(5);
/// Room for waiting bytes unless told otherwise: what a home router has.
const QUEUE: usize = 256 * 1024;

impl Default for Impairment {
    fn default() -> Self {
        Self::none()
    }
}

impl Impairment {
    /// Nothing at all.
    pub fn none() -> Self {
        Self {
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            loss: 0.0,
            duplicate: 0.0,
            reorder: 0.0,
            reorder_by: REORDER_BY,
            rate: None,
            queue: QUEUE,
        }
    }

    /// Whether packets pass as they are.
    pub fn is_none(&self) -> bool {
        self.delay.is_zero()
            && self.jitter.is_zero()
            && self.loss == 0.0
            && self.duplicate == 0.0
            && self.reorder == 0.0
            && self.rate.is_none()
    }

    /// Every packet travels for this long.
    #[must_use]
    pub fn delay(self, delay: Duration) -> Self {
        Self { delay, ..self }
    }

    /// Every packet travels for up to this much longer, evenly distributed. Keeps their order.
    #[must_use]
    pub fn jitter(self, jitter: Duration) -> Self {
        Self { jitter, ..self }
    }

    /// The share of packets that is lost.
    ///
    /// # Panics
    ///
    /// When `probability` is not between 0 and 1; so do the other shares.
    #[must_use]
    pub fn loss(self, probability: f64) -> Self {
        Self { loss: checked(probability), ..self }
    }

    /// The share of packets that arrives twice.
    #[must_use]
    pub fn duplicate(self, probability: f64) -> Self {
        Self { duplicate: checked(probability), ..self }
    }

    /// The share of packets that is held back for 5 ms, so that later ones overtake them.
    #[must_use]
    pub fn reorder(self, probability: f64) -> Self {
        Self { reorder: checked(probability), ..self }
    }

    /// How long a reordered packet is held back.
    #[must_use]
    pub fn reorder_by(self, reorder_by: Duration) -> Self {
        Self { reorder_by, ..self }
    }

    /// Bits per second, counted over whole Ethernet frames.
    ///
    /// # Panics
    ///
    /// When it is zero.
    #[must_use]
    pub fn rate(self, bits_per_second: u64) -> Self {
        assert!(bits_per_second > 0, "a line without any rate is a cut: see Site::cut");
        Self { rate: Some(bits_per_second), ..self }
    }

    /// How many bytes may wait for a line with a [`rate`](Self::rate); 256 KiB unless told otherwise.
    #[must_use]
    pub fn queue(self, bytes: usize) -> Self {
        Self { queue: bytes, ..self }
    }
}

fn checked(probability: f64) -> f64 {
    assert!((0.0..=1.0).contains(&probability), "not a probability: {probability}");
    probability
}

/// One direction of a line: frames under way, ordered by when they arrive.
#[derive(Debug)]
pub(crate) struct Queue<F> {
    impairment: Impairment,
    rng: StdRng,
    under_way: BinaryHeap<Reverse<UnderWay<F>>>,
    /// Numbers frames, so that those that arrive at the same time do so in order.
    accepted: u64,
    /// When the last accepted frame has been put on the wire.
    sent_until: Option<Instant>,
    /// When the last frame that keeps its order arrives.
    last_arrival: Option<Instant>,
    dropped: u64,
}

#[derive(Debug)]
struct UnderWay<F> {
    arrival: Instant,
    number: u64,
    frame: F,
}

impl<F> UnderWay<F> {
    fn key(&self) -> (Instant, u64) {
        (self.arrival, self.number)
    }
}

impl<F> PartialEq for UnderWay<F> {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl<F> Eq for UnderWay<F> {}

impl<F> PartialOrd for UnderWay<F> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<F> Ord for UnderWay<F> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

impl<F: Clone + AsRef<[u8]>> Queue<F> {
    pub(crate) fn new(impairment: Impairment, seed: u64) -> Self {
        Self {
            impairment,
            rng: StdRng::seed_from_u64(seed),
            under_way: BinaryHeap::new(),
            accepted: 0,
            sent_until: None,
            last_arrival: None,
            dropped: 0,
        }
    }

    /// Takes a frame that entered the line at `now`.
    pub(crate) fn handle_frame(&mut self, frame: F, now: Instant) {
        if self.chance(self.impairment.loss) {
            self.dropped += 1;
            return;
        }
        let Some(sent) = self.serialize(frame.as_ref().len(), now) else {
            self.dropped += 1;
            return;
        };
        let arrival = sent + self.impairment.delay + self.jitter();
        if self.chance(self.impairment.reorder) {
            self.push(arrival + self.impairment.reorder_by, frame);
            return;
        }
        let arrival = self.last_arrival.map_or(arrival, |last| arrival.max(last));
        self.last_arrival = Some(arrival);
        if self.chance(self.impairment.duplicate) {
            self.push(arrival, frame.clone());
        }
        self.push(arrival, frame);
    }

    /// The next frame that has arrived by `now`.
    pub(crate) fn poll_frame(&mut self, now: Instant) -> Option<F> {
        if self.poll_timeout()? > now {
            return None;
        }
        self.under_way.pop().map(|Reverse(first)| first.frame)
    }

    /// When the next frame arrives.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        self.under_way.peek().map(|Reverse(first)| first.arrival)
    }

    /// Frames lost by chance or for want of room so far.
    pub(crate) fn dropped(&self) -> u64 {
        self.dropped
    }

    /// When the line is done putting a frame on the wire that came at `now`; `None` where there is no room to
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

    fn push(&mut self, arrival: Instant, frame: F) {
        let number = self.accepted;
        self.accepted += 1;
        self.under_way.push(Reverse(UnderWay { arrival, number, frame }));
    }
}

#[cfg(test)]
mod tests;
