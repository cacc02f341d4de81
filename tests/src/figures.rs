//! Medians and spreads.

use std::fmt;

/// Several measurements of one thing.
#[derive(Debug, Clone, Default)]
pub struct Figures(Vec<f64>);

impl Figures {
    /// Adds one.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
        self.0.sort_unstable_by(f64::total_cmp);
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The middle one; the mean of the middle two; NaN when there is none.
    pub fn median(&self) -> f64 {
        let count = self.0.len();
        match count {
            0 => f64::NAN,
            odd if odd % 2 == 1 => self.0[odd / 2],
            even => f64::midpoint(self.0[even / 2 - 1], self.0[even / 2]),
        }
    }

    /// The least one that is not under this share, from 0 to 1, of them all; NaN when there is none.
    pub fn quantile(&self, share: f64) -> f64 {
        let rank = (share * self.0.len() as f64).ceil().max(1.0) as usize;
        self.0.get(rank - 1).copied().unwrap_or(f64::NAN)
    }

    /// The share of them, from 0 to 1, that are not over `bound`; NaN when there is none.
    pub fn share_up_to(&self, bound: f64) -> f64 {
        self.0.iter().filter(|value| **value <= bound).count() as f64 / self.0.len() as f64
    }

    /// The least; NaN when there is none.
    pub fn min(&self) -> f64 {
        self.0.first().copied().unwrap_or(f64::NAN)
    }

    /// The greatest; NaN when there is none.
    pub fn max(&self) -> f64 {
        self.0.last().copied().unwrap_or(f64::NAN)
    }
}

impl Extend<f64> for Figures {
    fn extend<I: IntoIterator<Item = f64>>(&mut self, values: I) {
        for value in values {
            self.push(value);
        }
    }
}

/// Median, then least and greatest.
impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = f.precision().unwrap_or(1);
        write!(f, "{:.digits$} ({:.digits$} to {:.digits$})", self.median(), self.min(), self.max())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        let mut figures = Figures::default();
        figures.extend([3.0, 1.0, 2.0]);
        assert_eq!((figures.median(), figures.min(), figures.max()), (2.0, 1.0, 3.0));
        assert_eq!((figures.quantile(0.5), figures.quantile(0.9), figures.quantile(0.0)), (2.0, 3.0, 1.0));
        figures.push(10.0);
        assert_eq!(figures.share_up_to(2.0), 0.5);
        assert_eq!(figures.median(), 2.5);
        assert_eq!(figures.to_string(), "2.5 (1.0 to 10.0)");
    }
}
