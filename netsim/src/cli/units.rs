//! Durations, shares and rates as people write them.

use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// `20ms`, `1.5s`, `300us`.
pub(super) fn duration(text: &str) -> Result<Duration> {
    let (number, unit) = split(text)?;
    let seconds = match unit {
        "s" => number,
        "ms" => number / 1e3,
        "us" => number / 1e6,
        _ => bail!("`{text}`: a duration needs a unit: s, ms or us"),
    };
    Duration::try_from_secs_f64(seconds).with_context(|| format!("`{text}` is no duration"))
}

/// `1%` or `0.01`.
pub(super) fn share(text: &str) -> Result<f64> {
    let (number, unit) = split(text)?;
    let share = match unit {
        "%" => number / 100.0,
        "" => number,
        _ => bail!("`{text}`: a share is written as 1% or 0.01"),
    };
    if !(0.0..=1.0).contains(&share) {
        bail!("`{text}` is not between 0 and 100 %");
    }
    Ok(share)
}

/// `50mbit`, `1gbit`, `256kbit`: bits per second.
pub(super) fn rate(text: &str) -> Result<u64> {
    let (number, unit) = split(text)?;
    let factor = match unit {
        "bit" => 1.0,
        "kbit" => 1e3,
        "mbit" => 1e6,
        "gbit" => 1e9,
        _ => bail!("`{text}`: a rate needs a unit: bit, kbit, mbit or gbit"),
    };
    let rate = number * factor;
    if !(1.0..=1e12).contains(&rate) {
        bail!("`{text}` is no rate that can be emulated");
    }
    Ok(rate as u64)
}

fn split(text: &str) -> Result<(f64, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let number = f64::from_str(number).with_context(|| format!("`{text}` does not begin with a number"))?;
    Ok((number, unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_write_is_understood() {
        assert_eq!(duration("20ms").unwrap(), Duration::from_millis(20));
        assert_eq!(duration("1.5s").unwrap(), Duration::from_millis(1500));
        assert_eq!(share("1%").unwrap(), 0.01);
        assert_eq!(share("0.25").unwrap(), 0.25);
        assert_eq!(rate("50mbit").unwrap(), 50_000_000);
    }

    #[test]
    fn what_means_nothing_is_refused() {
        assert!(["20", "ms", "-1s", "1h"].iter().all(|text| duration(text).is_err()));
        assert!(["101%", "2", "x", "-1"].iter().all(|text| share(text).is_err()));
        assert!(["0mbit", "5", "5mb"].iter().all(|text| rate(text).is_err()));
    }
}
