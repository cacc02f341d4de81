//! What a sleep leaves behind in QUIC, and how it is made good.
//!
//! What was under way when one side fell asleep is acknowledged when it wakes, and is taken for a round trip of that length: the smoothed round-trip time
//! is then an eighth of the sleep (RFC 9002, section 5.3), and so are the probe time-outs that everything lost would wait for. Every further sample takes
//! an eighth of the error away, and every acknowledged packet is a sample. So both sides send small packets for a while, until the estimate is believable. Pure.

use std::time::{Duration, Instant};

/// No path has this round-trip time.
const UNBELIEVABLE: Duration = Duration::from_secs(1);

/// From one packet to the next. An eighth off each time: ten minutes of sleep are forgotten after 32.
const SPACING: Duration = Duration::from_millis(20);

/// For so long after an introduction or a sleep: the late acknowledgement comes in the first round trip.
const LASTS: Duration = Duration::from_secs(5);

/// Whether packets are wanted of one remote endpoint's sessions.
#[derive(Debug, Default)]
pub(super) struct Convalescence {
    /// When to look next, and until when.
    watch: Option<(Instant, Instant)>,
}

impl Convalescence {
    /// One of the sides may have slept.
    pub(super) fn begin(&mut self, now: Instant) {
        self.watch = Some((now + SPACING, now + LASTS));
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.watch.map(|(next, _)| next)
    }

    /// Whether a packet is due, given the round-trip time that QUIC believes in.
    pub(super) fn poll(&mut self, now: Instant, believed: impl FnOnce() -> Option<Duration>) -> bool {
        let Some((_, until)) = self.watch.filter(|(next, _)| *next <= now) else { return false };
        let ill = believed().is_some_and(|rtt| rtt > UNBELIEVABLE);
        self.watch = (now < until).then_some((now + SPACING, until));
        ill
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_minutes_of_sleep_are_forgotten_within_a_second() {
        let start = Instant::now();
        let mut convalescence = Convalescence::default();
        assert!(!convalescence.poll(start, || Some(Duration::from_secs(75))), "nobody has slept");
        convalescence.begin(start);
        let (mut believed, mut packets) = (Duration::from_millis(80), 0);
        while let Some(now) = convalescence.poll_timeout() {
            if now - start == Duration::from_millis(100) {
                believed = Duration::from_secs(75);
            }
            if convalescence.poll(now, || Some(believed)) {
                believed = believed * 7 / 8 + Duration::from_millis(80) / 8;
                packets += 1;
                assert!(now - start < Duration::from_millis(1_100), "{believed:?}");
            }
        }
        assert!((30..50).contains(&packets), "{packets}");
        assert!(believed < UNBELIEVABLE);
    }
}
