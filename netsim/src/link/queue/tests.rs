//! The line on virtual time.

use super::*;

const MS: Duration = Duration::from_millis(1);

struct Line {
    queue: Queue<Vec<u8>>,
    start: Instant,
    now: Instant,
}

impl Line {
    fn new(impairment: Impairment) -> Self {
        let start = Instant::now();
        Self { queue: Queue::new(impairment, 7), start, now: start }
    }

    fn send(&mut self, tag: u32, length: usize) {
        let mut frame = vec![0; length.max(4)];
        frame[..4].copy_from_slice(&tag.to_be_bytes());
        self.queue.handle_frame(frame, self.now);
    }

    /// Everything that still arrives: tag, and when it did.
    fn drain(&mut self) -> Vec<(u32, Duration)> {
        let mut arrived = Vec::new();
        while let Some(at) = self.queue.poll_timeout() {
            assert!(self.queue.poll_frame(at - Duration::from_nanos(1)).is_none(), "early");
            let frame = self.queue.poll_frame(at).expect("its time has come");
            arrived.push((u32::from_be_bytes(frame[..4].try_into().unwrap()), at - self.start));
        }
        arrived
    }
}

fn tags(arrived: &[(u32, Duration)]) -> Vec<u32> {
    arrived.iter().map(|(tag, _)| *tag).collect()
}

#[test]
fn every_frame_arrives_after_the_delay() {
    let mut line = Line::new(Impairment::none().delay(20 * MS));
    for tag in 0..10 {
        line.send(tag, 100);
        line.now += MS;
    }
    let expected: Vec<_> = (0..10).map(|tag| (tag, (20 + tag) * MS)).collect();
    assert_eq!(line.drain(), expected);
}

#[test]
fn jitter_spreads_arrivals_and_keeps_order() {
    let mut line = Line::new(Impairment::none().delay(20 * MS).jitter(10 * MS));
    for tag in 0..1000 {
        line.send(tag, 100);
        line.now += MS;
    }
    let arrived = line.drain();
    assert_eq!(tags(&arrived), (0..1000).collect::<Vec<_>>());
    let travelled = arrived.iter().map(|(tag, at)| *at - *tag * MS);
    assert!(travelled.clone().all(|travelled| (20 * MS..=30 * MS).contains(&travelled)));
    assert!(travelled.clone().max().unwrap() - travelled.min().unwrap() > 8 * MS);
}

#[test]
fn the_lost_share_is_the_configured_one() {
    let mut line = Line::new(Impairment::none().loss(0.1));
    (0..10_000).for_each(|tag| line.send(tag, 100));
    let arrived = line.drain().len();
    assert!((8_800..9_200).contains(&arrived), "{arrived}");
    assert_eq!(line.queue.dropped(), 10_000 - arrived as u64);
}

#[test]
fn a_reordered_frame_is_overtaken() {
    let mut line = Line::new(Impairment::none().delay(MS).reorder(0.1).reorder_by(3 * MS));
    for tag in 0..1000 {
        line.send(tag, 100);
        line.now += MS;
    }
    let mut order = tags(&line.drain());
    let late = order.windows(2).filter(|pair| pair[1] < pair[0]).count();
    assert!((50..150).contains(&late), "{late}");
    order.sort_unstable();
    assert_eq!(order, (0..1000).collect::<Vec<_>>());
}

#[test]
fn duplicates_arrive_together() {
    let mut line = Line::new(Impairment::none().delay(MS).duplicate(0.5));
    (0..1000).for_each(|tag| line.send(tag, 100));
    let order = tags(&line.drain());
    assert!((1_400..1_600).contains(&order.len()), "{}", order.len());
    assert!(order.is_sorted());
}

#[test]
fn frames_are_sent_at_the_rate() {
    // 1 Mbit/s: 1,250 bytes take 10 ms.
    let mut line = Line::new(Impairment::none().rate(1_000_000).delay(5 * MS));
    (0..10).for_each(|tag| line.send(tag, 1_250));
    let expected: Vec<_> = (0..10).map(|tag| (tag, (tag + 1) * 10 * MS + 5 * MS)).collect();
    assert_eq!(line.drain(), expected);
}

#[test]
fn a_full_queue_drops_and_an_emptied_one_accepts_again() {
    let mut line = Line::new(Impairment::none().rate(1_000_000).queue(5_000));
    (0..10).for_each(|tag| line.send(tag, 1_250));
    assert_eq!(line.queue.dropped(), 6);
    line.now += 100 * MS;
    line.send(10, 1_250);
    assert_eq!(tags(&line.drain()), [0, 1, 2, 3, 10]);
}

#[test]
fn the_same_seed_gives_the_same_line() {
    let run = || {
        let mut line = Line::new(Impairment::none().loss(0.3).jitter(MS).reorder(0.2).duplicate(0.2));
        (0..200).for_each(|tag| line.send(tag, 60));
        line.drain()
    };
    assert_eq!(run(), run());
}

#[test]
fn a_line_that_changes_keeps_the_order_of_what_is_under_way() {
    let mut line = Line::new(Impairment::none().delay(50 * MS));
    (0..5).for_each(|tag| line.send(tag, 100));
    line.queue.change(Impairment::none().delay(10 * MS));
    (5..10).for_each(|tag| line.send(tag, 100));
    line.now += 100 * MS;
    line.send(10, 100);
    let arrivals = line.drain();
    assert_eq!(tags(&arrivals), (0..11).collect::<Vec<_>>());
    assert_eq!(arrivals.last(), Some(&(10, 110 * MS)));
}
