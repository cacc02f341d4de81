//! When to connect to a rendezvous server again. Pure.

use std::time::Duration;

use rand::Rng;

/// The first try after a connection was lost, or after the server has answered again, by a peer with a session that waits for it: at once, but not with
/// everybody else.
const AT_ONCE: Duration = Duration::from_millis(100);

/// The same by a peer that only waits to be called, after a connection was lost. Most notice that by their next keep-alive, each at a time of its own.
const SOON: Duration = Duration::from_secs(1);

/// The same, after the server has answered again: everybody has asked it, and hears of it within the same second. A handshake costs the server two
/// milliseconds of CPU time with all that belongs to it (measured), so two thousand take a small server four seconds.
const SPREAD: Duration = Duration::from_secs(3);

/// Least and greatest pause between tries after that.
const PAUSE: [Duration; 2] = [Duration::from_millis(250), Duration::from_secs(30)];

/// A pause is this share of the time that the server has been away.
const SHARE: u32 = 120;

/// The pause before the next try. `away`: for how long there has been no connection, `None` when one has just been lost. Each is drawn from half to
/// one and a half times its value, the first from nothing on, so that the peers of a restarted server do not come back all at once.
pub(crate) fn pause(away: Option<Duration>, random: &mut impl Rng) -> Duration {
    match away {
        None => SOON.mul_f64(random.random_range(0.0..1.0)),
        Some(away) => (away / SHARE).clamp(PAUSE[0], PAUSE[1]).mul_f64(random.random_range(0.5..1.5)),
    }
}

/// The pause before a server is connected to that has answered again, or whose connection was lost under a session.
pub(crate) fn return_pause(urgent: bool, random: &mut impl Rng) -> Duration {
    if urgent { AT_ONCE } else { SPREAD }.mul_f64(random.random_range(0.0..1.0))
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    use super::*;

    /// When it is tried, in seconds after the loss, where each try takes `attempt`.
    fn tries(attempt: Duration, until: Duration, seed: u64) -> Vec<Duration> {
        let mut random = StdRng::seed_from_u64(seed);
        let mut now = pause(None, &mut random);
        let mut tries = Vec::new();
        while now < until {
            tries.push(now);
            now += attempt;
            now += pause(Some(now), &mut random);
        }
        tries
    }

    #[test]
    fn it_is_tried_at_once_often_for_half_a_minute_and_then_ever_more_rarely() {
        let refused = tries(Duration::ZERO, Duration::from_hours(2), 3);
        assert!(refused[0] < SOON);
        for pair in refused.windows(2) {
            let pause = pair[1] - pair[0];
            let most = (pair[0] / SHARE).max(PAUSE[0]).mul_f64(1.5);
            assert!(pause <= most && pause <= PAUSE[1].mul_f64(1.5), "{pause:?} after {:?}", pair[0]);
            assert!(pair[0] > Duration::from_secs(30) || pause < Duration::from_millis(800));
        }
        assert!(refused.len() < 1_000, "{}", refused.len());
    }

    #[test]
    fn two_thousand_that_lose_it_together_come_back_apart() {
        let mut slots = [0; 10];
        for seed in 0..2_000 {
            let first = tries(Duration::ZERO, SOON, seed)[0];
            slots[first.as_millis() as usize / 100] += 1;
        }
        assert!(slots.iter().all(|count| (100..300).contains(count)), "{slots:?}");
        let mut slots = [0; 10];
        for seed in 0..2_000 {
            let mut random = StdRng::seed_from_u64(seed);
            slots[return_pause(false, &mut random).as_millis() as usize / 300] += 1;
            assert!(return_pause(true, &mut random) < AT_ONCE);
        }
        assert!(slots.iter().all(|count| (100..300).contains(count)), "{slots:?}");
    }
}
