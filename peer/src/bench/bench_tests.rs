use std::time::Duration;

use super::{Arrived, Counters, Flow, Rtts, give, take};
use crate::transfer::transfer_tests::Line;

/// Long enough for anything that is to happen.
const PATIENCE: Duration = Duration::from_secs(60);

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

/// What is counted is what has come; the flow ends when its time is over, whatever still waits, and both sides know it.
#[tokio::test]
async fn a_flow_ends_with_its_time() {
    let line = Line::new().await;
    let ((mut send, _back), (_there, mut receive)) = line.stream().await;
    let time = Duration::from_millis(300);
    let (start, mut arrived, mut reports) = (std::time::Instant::now(), Arrived::default(), 0);
    let both = async {
        tokio::join!(
            give(&mut send, time),
            take(&mut receive, |so_far| {
                assert!(so_far.bytes > arrived.bytes && so_far.time >= arrived.time);
                (arrived, reports) = (so_far, reports + 1);
            })
        )
    };
    let (in_time, ()) = tokio::time::timeout(PATIENCE, both).await.expect("it ends");
    assert!(in_time && reports > 0 && arrived.bytes > 0);
    assert!(start.elapsed() >= time && arrived.time <= start.elapsed());
}

/// Somebody who asks and does not read costs a flow of its time, and no more.
#[tokio::test]
async fn a_flow_that_nobody_takes_ends_with_its_time() {
    let line = Line::new().await;
    let ((mut send, _back), (_there, mut receive)) = line.stream().await;
    let given = tokio::time::timeout(PATIENCE, give(&mut send, Duration::from_millis(200))).await;
    assert!(given.expect("it ends"));
    // What was sent before is lost with the reset, or counts.
    let taken = tokio::time::timeout(PATIENCE, take(&mut receive, |_| {})).await;
    taken.expect("it ends");
}

#[tokio::test]
async fn a_flow_that_is_stopped_ends_at_once() {
    let line = Line::new().await;
    let ((mut send, _back), (_there, mut receive)) = line.stream().await;
    receive.stop(0_u8.into()).unwrap();
    let given = tokio::time::timeout(PATIENCE, give(&mut send, 10 * PATIENCE)).await;
    assert!(!given.expect("it ends"));
}
