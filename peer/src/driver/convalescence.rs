//! What a sleep or an outage leaves behind in QUIC, and how it is made good.
//!
//! What was lost is sent again when something later is acknowledged (RFC 9002, section 6.1.1), or else after probe time-outs that have doubled all the while
//! (section 6.2.1). One packet over the new way would do, but it may come too soon: before the other side knows the channel, or is bound at the relay. So there
//! are a few.
//!
//! What was under way when one side fell asleep is acknowledged when it wakes, and is taken for a round trip of that length: the smoothed round-trip time
//! is then an eighth of the sleep (RFC 9002, section 5.3), and so are the probe time-outs that everything lost would wait for. Every further sample takes
//! an eighth of the error away, and every acknowledged packet is a sample. So both sides send small packets for a while, until the estimate is believable. Pure.

use std::time::{Duration, Instant};

/// No path has this round-trip time.
const UNBELIEVABLE: Duration = Duration::from_secs(1);

/// From one packet to the next. An eighth off each time: ten minutes of sleep are forgotten after 32.
const SPACING: Duration = Duration::from_millis(20);

/// When a packet is sent whatever QUIC believes, after an introduction, a sleep or an outage. Half a second is enough for every side to be there.
const REPEATS: [Duration; 4] = [
    Duration::from_millis(50),
    Duration::from_millis(120),
    Duration::from_millis(250),
    Duration::from_millis(500),
];

/// For so long after an introduction or a sleep: the late acknowledgement comes in the first round trip.
const LASTS: Duration = Duration::from_secs(5);

/// Whether packets are wanted of one remote endpoint's sessions.
#[derive(Debug, Default)]
pub(super) struct Convalescence {
    /// When to look next, and since when.
    watch: Option<(Instant, Instant)>,
    /// How many of [`REPEATS`] are sent.
    repeated: usize,
}

impl Convalescence {
    /// One of the sides may have been away.
    pub(super) fn begin(&mut self, now: Instant) {
        *self = Self { watch: Some((now + SPACING, now)), repeated: 0 };
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.watch.map(|(next, _)| next)
    }

    /// Whether a packet is due, given the round-trip time that QUIC believes in.
    pub(super) fn poll(&mut self, now: Instant, believed: impl FnOnce() -> Option<Duration>) -> bool {
        let Some((_, since)) = self.watch.filter(|(next, _)| *next <= now) else { return false };
        let ill = believed().is_some_and(|rtt| rtt > UNBELIEVABLE);
        self.watch = (now < since + LASTS).then_some((now + SPACING, since));
        let repeat = REPEATS.get(self.repeated).is_some_and(|after| since + *after <= now);
        self.repeated += usize::from(repeat);
        ill || repeat
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
        assert!((30..55).contains(&packets), "{packets}");
        assert!(believed < UNBELIEVABLE);
    }

    #[test]
    fn what_comes_too_soon_is_repeated_for_half_a_second() {
        let start = Instant::now();
        let mut convalescence = Convalescence::default();
        convalescence.begin(start);
        let mut sent = Vec::new();
        while let Some(now) = convalescence.poll_timeout() {
            if convalescence.poll(now, || Some(Duration::from_millis(80))) {
                sent.push((now - start).as_millis());
            }
        }
        assert_eq!(sent, [60, 120, 260, 500]);
    }
}
