//! How often a waiting peer renews its bindings: often enough for the NAT that it is behind, as measured, and no oftener. Pure.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::doctor::BindingLifetime;

/// Until more is known: RFC 8445, section 11, has 15 s, and 30 s is the shortest binding lifetime seen in common home routers.
pub(crate) const SAFE: Duration = Duration::from_secs(15);

/// However long bindings live: RFC 4787, REQ-5, asks NATs for two minutes at least, and a network may change behind our back.
const LONGEST: Duration = Duration::from_secs(100);

/// However short: what is gone sooner cannot be kept open with fair effort.
const SHORTEST: Duration = Duration::from_secs(2);

/// Share of a silence that bindings have survived.
const MARGIN: f64 = 0.8;

/// Keep-alives that fit into a lease of the relay: two may be lost.
const PER_LEASE: u32 = 3;

/// A measurement begins when a peer has waited this long; most that dial are gone by then.
const WARM_UP: Duration = Duration::from_secs(10);

/// The silences that are tried, by doubling: each, less its margin, is a keep-alive interval, the third just the safe one and the last the
/// longest.
pub(crate) const SILENCES: [Duration; 6] = [
    Duration::from_millis(4_750),
    Duration::from_millis(9_500),
    Duration::from_secs(19),
    Duration::from_secs(38),
    Duration::from_secs(76),
    Duration::from_secs(125),
];

/// The interval for what is known of the binding lifetime.
fn interval(lifetime: BindingLifetime) -> Duration {
    let proven = lifetime.at_least.map(|alive| alive.mul_f64(MARGIN));
    match lifetime.less_than {
        // Some silence was too long: only what has been survived is safe.
        Some(gone) => proven.unwrap_or(gone.mul_f64(MARGIN) / 2).clamp(SHORTEST, LONGEST),
        None => proven.unwrap_or(SAFE).clamp(SAFE, LONGEST),
    }
}

/// One measurement, so that another's late result is known as such.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Measurement(u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nobody has seen us yet.
    Idle,
    Due(Instant),
    Running,
    /// The bindings have shown that they do not do what was measured.
    Settled,
}

/// Chooses the interval of one endpoint's keep-alives.
#[derive(Debug)]
pub(crate) struct KeepAlive {
    state: State,
    /// Where the server saw us last.
    mapped: Option<SocketAddr>,
    lifetime: BindingLifetime,
    measurement: u64,
}

impl KeepAlive {
    pub(crate) fn new() -> Self {
        Self { state: State::Idle, mapped: None, lifetime: BindingLifetime::default(), measurement: 0 }
    }

    /// The longest pause between two keep-alives to a relay that forgets after `lease`.
    pub(crate) fn interval(&self, lease: Duration) -> Duration {
        interval(self.lifetime).min((lease / PER_LEASE).max(SHORTEST))
    }

    /// A keep-alive was answered: the server sees us there. True when the interval has changed.
    pub(crate) fn seen(&mut self, mapped: SocketAddr, now: Instant) -> bool {
        let before = self.mapped.replace(mapped);
        match before {
            Some(before) if before == mapped => return false,
            Some(before) if before.ip() == mapped.ip() => {
                if interval(self.lifetime) <= SAFE {
                    return false;
                }
                // The binding was lost in a pause that it was to survive: nothing that was measured holds.
                self.state = State::Settled;
            }
            // Another network.
            _ => self.state = State::Due(now + WARM_UP),
        }
        self.measurement += 1;
        self.lifetime = BindingLifetime::default();
        before.is_some()
    }

    /// When a measurement is to begin.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        match self.state {
            State::Due(at) => Some(at),
            _ => None,
        }
    }

    /// The measurement that is due, if one is.
    pub(crate) fn poll_measurement(&mut self, now: Instant) -> Option<Measurement> {
        let due = matches!(self.state, State::Due(at) if at <= now);
        due.then(|| {
            self.state = State::Running;
            Measurement(self.measurement)
        })
    }

    /// A measurement has learnt something. True when the interval has changed.
    pub(crate) fn learnt(&mut self, measurement: Measurement, lifetime: BindingLifetime) -> bool {
        if measurement != Measurement(self.measurement) || self.state != State::Running {
            return false;
        }
        let before = interval(self.lifetime);
        self.lifetime = lifetime;
        interval(lifetime) != before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    fn lifetime(at_least: Option<f64>, less_than: Option<f64>) -> BindingLifetime {
        BindingLifetime { at_least: at_least.map(seconds), less_than: less_than.map(seconds) }
    }

    const LEASE: Duration = Duration::from_secs(300);

    #[test]
    fn intervals_stay_under_what_was_survived() {
        for (at_least, less_than, expected) in [
            (None, None, 15.0),
            (Some(4.75), None, 15.0),
            (Some(19.0), None, 15.2),
            (Some(76.0), None, 60.8),
            (Some(125.0), None, 100.0),
            (Some(600.0), None, 100.0),
            (Some(9.5), Some(19.0), 7.6),
            (Some(19.0), Some(38.0), 15.2),
            (None, Some(4.75), 2.0),
        ] {
            let lifetime = lifetime(at_least, less_than);
            let interval = interval(lifetime);
            assert_eq!(interval, seconds(expected), "{lifetime:?}");
            if let (Some(alive), Some(_)) = (lifetime.at_least, lifetime.less_than) {
                assert!(interval < alive);
            }
        }
    }

    fn mapped(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    /// A keep-alive whose measurement is under way.
    fn measuring(start: Instant) -> (KeepAlive, Measurement) {
        let mut keep_alive = KeepAlive::new();
        assert_eq!(keep_alive.poll_timeout(), None);
        keep_alive.seen(mapped("203.0.113.5:1000"), start);
        assert_eq!(keep_alive.poll_measurement(start), None, "those that dial are gone before");
        assert_eq!(keep_alive.poll_timeout(), Some(start + WARM_UP));
        let measurement = keep_alive.poll_measurement(start + WARM_UP).unwrap();
        assert_eq!(keep_alive.poll_measurement(start + WARM_UP), None, "one at a time");
        (keep_alive, measurement)
    }

    #[test]
    fn the_interval_grows_with_what_is_measured_up_to_its_share_of_the_lease() {
        let (mut keep_alive, measurement) = measuring(Instant::now());
        assert_eq!(keep_alive.interval(LEASE), SAFE);
        assert!(!keep_alive.learnt(measurement, lifetime(Some(9.5), None)), "nothing new for the safe one");
        assert!(keep_alive.learnt(measurement, lifetime(Some(76.0), None)));
        assert_eq!(keep_alive.interval(LEASE), seconds(60.8));
        assert_eq!(keep_alive.interval(Duration::from_secs(60)), Duration::from_secs(20));
    }

    #[test]
    fn a_lost_binding_brings_the_safe_interval_back_for_good() {
        let start = Instant::now();
        let (mut keep_alive, measurement) = measuring(start);
        keep_alive.learnt(measurement, lifetime(Some(125.0), None));
        assert!(!keep_alive.seen(mapped("203.0.113.5:1000"), start));
        assert!(keep_alive.seen(mapped("203.0.113.5:2000"), start));
        assert_eq!((keep_alive.interval(LEASE), keep_alive.poll_timeout()), (SAFE, None));
        assert!(!keep_alive.learnt(measurement, lifetime(Some(125.0), None)));
        assert_eq!(keep_alive.interval(LEASE), SAFE);
    }

    #[test]
    fn a_binding_lost_before_its_lifetime_was_known_proves_nothing() {
        let start = Instant::now();
        let (mut keep_alive, measurement) = measuring(start);
        assert!(!keep_alive.seen(mapped("203.0.113.5:2000"), start));
        assert!(keep_alive.learnt(measurement, lifetime(Some(9.5), Some(19.0))));
        assert!(!keep_alive.seen(mapped("203.0.113.5:3000"), start), "lost in the pause before");
        assert_eq!(keep_alive.interval(LEASE), seconds(7.6));
    }

    #[test]
    fn another_network_is_measured_anew() {
        let start = Instant::now();
        let (mut keep_alive, old) = measuring(start);
        keep_alive.learnt(old, lifetime(Some(9.5), Some(19.0)));
        let moved = start + Duration::from_secs(500);
        assert!(keep_alive.seen(mapped("198.51.100.1:1000"), moved));
        assert_eq!(keep_alive.interval(LEASE), SAFE);
        assert!(!keep_alive.learnt(old, lifetime(Some(4.75), Some(9.5))), "of the old network");
        let measurement = keep_alive.poll_measurement(moved + WARM_UP).unwrap();
        assert!(keep_alive.learnt(measurement, lifetime(Some(38.0), None)));
    }
}
