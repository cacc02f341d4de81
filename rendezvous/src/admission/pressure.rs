//! How much work newcomers have to do before they may register: none on most days, and the more the more of them come. Pure.

use std::time::{Duration, Instant};

/// Newcomers are counted over about this long (an exponentially weighted mean), so that the peers of a home or of a small firm that all come
/// back at the same moment do not count as a flood.
const WINDOW: Duration = Duration::from_secs(10);

/// Bits more for every doubling: the work to be done grows with the square of the number of those who come.
const PER_DOUBLING: u32 = 2;

/// From when on work is asked for, and how much.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// Newcomers a second; 0: never.
    pub above: u32,
    /// Bits when that is reached.
    pub bits: u8,
    /// The most bits.
    pub most: u8,
}

/// Counts newcomers.
#[derive(Debug, Default)]
pub struct Pressure {
    /// Newcomers a second.
    rate: f64,
    last: Option<Instant>,
}

impl Pressure {
    /// One has come: bits of work that are asked of it; 0: none.
    pub fn newcomer(&mut self, terms: Terms, now: Instant) -> u8 {
        self.decay(now);
        self.rate += 1.0 / WINDOW.as_secs_f64();
        let over = self.rate / f64::from(terms.above);
        if terms.above == 0 || over < 1.0 {
            return 0;
        }
        // `over` is finite and at least 1.
        let doublings = over.log2().floor().min(64.0) as u32;
        let more = u8::try_from(doublings * PER_DOUBLING).unwrap_or(u8::MAX);
        terms.bits.saturating_add(more).min(terms.most)
    }

    /// Newcomers a second at present.
    pub fn rate(&mut self, now: Instant) -> f64 {
        self.decay(now);
        self.rate
    }

    fn decay(&mut self, now: Instant) {
        let since = self.last.map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        self.rate *= (-since.as_secs_f64() / WINDOW.as_secs_f64()).exp();
        self.last = Some(self.last.map_or(now, |last| last.max(now)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERMS: Terms = Terms { above: 100, bits: 14, most: 20 };

    /// The bits after newcomers at this rate for a minute.
    fn bits_at(rate: u32) -> u8 {
        let (mut pressure, start) = (Pressure::default(), Instant::now());
        let every = Duration::from_secs(1) / rate;
        (0..rate * 60).map(|n| pressure.newcomer(TERMS, start + every * n)).last().unwrap()
    }

    #[test]
    fn work_grows_with_the_flood_up_to_its_bound() {
        assert_eq!([bits_at(50), bits_at(120), bits_at(250), bits_at(500)], [0, 14, 16, 18]);
        assert_eq!([bits_at(1_000), bits_at(20_000)], [20, 20]);
    }

    #[test]
    fn a_crowd_that_comes_once_is_no_flood() {
        let (mut pressure, now) = (Pressure::default(), Instant::now());
        assert!((0..900).all(|_| pressure.newcomer(TERMS, now) == 0));
        assert!((0..200).map(|_| pressure.newcomer(TERMS, now)).any(|bits| bits > 0), "a larger one is");
        assert_eq!(pressure.newcomer(TERMS, now + Duration::from_secs(60)), 0, "and it passes");
    }

    #[test]
    fn it_can_be_turned_off() {
        let (mut pressure, now) = (Pressure::default(), Instant::now());
        let never = Terms { above: 0, ..TERMS };
        assert!((0..100_000).all(|_| pressure.newcomer(never, now) == 0));
    }
}
