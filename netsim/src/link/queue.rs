//! Frames on one direction of a line. Pure: frames, a seed and `now` in; frames and wake-ups out.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use super::line::{Fate, Line};

/// What one direction of a line does to packets. The default, [`Impairment::none`], is nothing.
///
/// In this order, for every packet: it may be lost; it waits for those before it to be sent at `rate`, or is
/// dropped where `queue` bytes wait already; it travels for `delay` plus a random part of `jitter`. It never
/// overtakes another, except one that was chosen to be reordered.
#[derive(Clone, Debug, PartialEq)]
pub struct Impairment {
    pub(super) delay: Duration,
    pub(super) jitter: Duration,
    pub(super) loss: f64,
    pub(super) duplicate: f64,
    pub(super) reorder: f64,
    pub(super) reorder_by: Duration,
    pub(super) rate: Option<u64>,
    pub(super) queue: usize,
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
    line: Line,
    under_way: BinaryHeap<Reverse<UnderWay<F>>>,
    /// Numbers frames, so that those that arrive at the same time do so in order.
    accepted: u64,
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
        Self { line: Line::new(impairment, seed), under_way: BinaryHeap::new(), accepted: 0, dropped: 0 }
    }

    /// What happens to frames from now on. Those under way are not touched.
    pub(crate) fn change(&mut self, impairment: Impairment) {
        self.line.change(impairment);
    }

    /// Takes a frame that entered the line at `now`.
    pub(crate) fn handle_frame(&mut self, frame: F, now: Instant) {
        match self.line.carry(frame.as_ref().len(), now) {
            Fate::Lost => self.dropped += 1,
            Fate::Arrives(at) => self.push(at, frame),
            Fate::ArrivesTwice(at) => {
                self.push(at, frame.clone());
                self.push(at, frame);
            }
        }
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

    fn push(&mut self, arrival: Instant, frame: F) {
        let number = self.accepted;
        self.accepted += 1;
        self.under_way.push(Reverse(UnderWay { arrival, number, frame }));
    }
}

#[cfg(test)]
mod tests;
