use std::time::Duration;

use super::{Arrived, Counters, Flow, Rtts};

#[test]
fn what_is_told_survives_its_bytes() {
    let arrived = Arrived { bytes: u64::MAX - 7, time: Duration::from_micros(1_234_567) };
    assert_eq!(Arrived::from_bytes(arrived.to_bytes()), arrived);
    for direct in [false, true] {
        let counters = Counters { sent: 1 << 40, lost: 3, direct };
        assert_eq!(Counters::from_bytes(counters.to_bytes()), counters);
    }
}

#[test]
fn goodput_is_bits_over_time_and_never_infinite() {
    let flow = |bytes, micros| Flow { bytes, time: Duration::from_micros(micros) };
    assert!((flow(125_000_000, 1_000_000).goodput() - 1e9).abs() < 1.0);
    assert!(flow(5, 0).goodput().abs() < f64::EPSILON);
}

#[test]
fn quantiles_are_of_what_was_answered() {
    let answered: Vec<_> = (1..=10).map(Duration::from_millis).collect();
    let rtts = Rtts { sent: 12, answered };
    let [least, median, greatest] = [0.0, 0.5, 1.0].map(|share| rtts.quantile(share));
    assert_eq!([least, median, greatest], [1, 5, 10].map(|ms| Some(Duration::from_millis(ms))));
    assert_eq!(Rtts::default().quantile(0.5), None);
}
