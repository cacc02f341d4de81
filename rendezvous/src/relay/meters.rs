//! What each key sends over one relay thread, and how much of it may pass. Pure: one bucket of bytes a key, reached by a number that every channel's
//! ends hold, so a run of frames costs no look-up for it.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use rendezvous_wire::PeerId;

/// What may come at once, in time at the rate: a QUIC sender's burst should pass where its mean does.
const BURST: Duration = Duration::from_millis(100);

/// What may come at once at any rate: the burst of a QUIC sender that begins, twice.
const LEAST_BURST: u64 = 64 * 1024;

/// A meter's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MeterId(u32);

/// How much a key has used since it was last asked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Used {
    /// Bytes that were carried from it.
    pub sent: u64,
    /// Bytes that were carried to it.
    pub received: u64,
    /// Bytes of its own that were dropped, being more than it may send.
    pub dropped: u64,
    /// Bytes of its own that were dropped since its month is used up, or that of whom they were for.
    pub refused: u64,
}

impl Used {
    /// Bytes carried from it and to it.
    pub fn carried(self) -> u64 {
        self.sent + self.received
    }

    /// One after the other.
    pub fn and(self, other: Self) -> Self {
        Self {
            sent: self.sent + other.sent,
            received: self.received + other.received,
            dropped: self.dropped + other.dropped,
            refused: self.refused + other.refused,
        }
    }
}

/// What keys may send.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Shares {
    /// Bytes a second of each; `None`: as much as they like.
    pub each: Option<u64>,
    /// Of these another rate.
    pub other: HashMap<PeerId, u64>,
}

impl Shares {
    fn of(&self, peer: PeerId) -> Option<u64> {
        self.other.get(&peer).copied().or(self.each)
    }
}

/// The meters of one thread.
#[derive(Debug, Default)]
pub(crate) struct Meters {
    all: Vec<Meter>,
    free: Vec<u32>,
    by_peer: HashMap<PeerId, MeterId>,
    shares: Shares,
    /// Of keys that have gone since they were last asked for.
    gone: Vec<(PeerId, Used)>,
}

#[derive(Debug)]
struct Meter {
    peer: PeerId,
    /// Registrations.
    holders: u32,
    pace: Option<Pace>,
    full_at: Option<Instant>,
    /// Nothing passes, from it or to it.
    exhausted: bool,
    used: Used,
}

/// A rate as it is reckoned with.
#[derive(Debug, Clone, Copy)]
struct Pace {
    picoseconds_a_byte: u64,
    burst: Duration,
}

impl Pace {
    fn new(bytes_a_second: u64) -> Self {
        let picoseconds_a_byte = 1_000_000_000_000 / bytes_a_second.max(1);
        let pace = Self { picoseconds_a_byte, burst: BURST };
        Self { burst: pace.time(LEAST_BURST).max(BURST), ..pace }
    }

    fn time(self, bytes: u64) -> Duration {
        Duration::from_nanos(self.picoseconds_a_byte.saturating_mul(bytes) / 1_000)
    }
}

impl Meters {
    /// The meter of a key, for one registration more.
    pub(crate) fn enter(&mut self, peer: PeerId) -> MeterId {
        if let Some(id) = self.by_peer.get(&peer).copied() {
            self.all[id.0 as usize].holders += 1;
            return id;
        }
        let pace = self.shares.of(peer).map(Pace::new);
        let fresh = Meter { peer, holders: 1, pace, full_at: None, exhausted: false, used: Used::default() };
        let id = match self.free.pop() {
            Some(place) => {
                self.all[place as usize] = fresh;
                MeterId(place)
            }
            None => {
                self.all.push(fresh);
                MeterId(self.all.len() as u32 - 1)
            }
        };
        self.by_peer.insert(peer, id);
        id
    }

    /// One registration less.
    pub(crate) fn leave(&mut self, id: MeterId) {
        let meter = &mut self.all[id.0 as usize];
        meter.holders -= 1;
        if meter.holders == 0 {
            self.by_peer.remove(&meter.peer);
            self.free.push(id.0);
            let used = std::mem::take(&mut meter.used);
            if used != Used::default() {
                self.gone.push((meter.peer, used));
            }
        }
    }

    /// Whether so many bytes may pass now, and counts them.
    pub(crate) fn pass(&mut self, from: MeterId, to: MeterId, bytes: usize, now: Instant) -> bool {
        let bytes = bytes as u64;
        let exhausted = self.all[to.0 as usize].exhausted;
        let sender = &mut self.all[from.0 as usize];
        if exhausted || sender.exhausted {
            sender.used.refused += bytes;
            return false;
        }
        if !sender.take(bytes, now) {
            sender.used.dropped += bytes;
            return false;
        }
        sender.used.sent += bytes;
        self.all[to.0 as usize].used.received += bytes;
        true
    }

    /// From now on with these shares.
    pub(crate) fn set_shares(&mut self, shares: Shares) {
        for meter in &mut self.all {
            meter.pace = shares.of(meter.peer).map(Pace::new);
        }
        self.shares = shares;
    }

    /// Whether anything passes from a key and to it.
    pub(crate) fn set_exhausted(&mut self, peer: PeerId, exhausted: bool) {
        if let Some(id) = self.by_peer.get(&peer) {
            self.all[id.0 as usize].exhausted = exhausted;
        }
    }

    /// What has been used since this was last asked.
    pub(crate) fn take_used(&mut self) -> Vec<(PeerId, Used)> {
        let mut used = std::mem::take(&mut self.gone);
        let idle = Used::default();
        for meter in self.all.iter_mut().filter(|meter| meter.used != idle) {
            used.push((meter.peer, std::mem::take(&mut meter.used)));
        }
        used
    }
}

impl Meter {
    /// The generic cell rate algorithm, in bytes.
    fn take(&mut self, bytes: u64, now: Instant) -> bool {
        let Some(pace) = self.pace else { return true };
        let full_at = self.full_at.map_or(now, |at| at.max(now)) + pace.time(bytes);
        if full_at - now > pace.burst {
            return false;
        }
        self.full_at = Some(full_at);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(number: u8) -> PeerId {
        PeerId::from_bytes([number; 32])
    }

    /// Bytes that pass of datagrams of 1,000 that come every `every` for ten seconds.
    fn passed(meters: &mut Meters, from: MeterId, to: MeterId, every: Duration) -> u64 {
        let start = Instant::now();
        let count = (Duration::from_secs(10).as_nanos() / every.as_nanos()) as u32;
        (0..count).filter(|n| meters.pass(from, to, 1_000, start + every * *n)).count() as u64 * 1_000
    }

    #[test]
    fn a_rate_holds_in_the_long_run_and_leaves_others_alone() {
        let mut meters = Meters::default();
        meters.set_shares(Shares { each: Some(100_000), other: HashMap::new() });
        let (greedy, modest, sink) = (meters.enter(peer(1)), meters.enter(peer(2)), meters.enter(peer(3)));
        let passed_of_greedy = passed(&mut meters, greedy, sink, Duration::from_micros(100));
        assert!((1_000_000..=1_000_000 + LEAST_BURST).contains(&passed_of_greedy), "{passed_of_greedy}");
        assert_eq!(passed(&mut meters, modest, sink, Duration::from_millis(20)), 500_000);
        let used: HashMap<_, _> = meters.take_used().into_iter().collect();
        assert_eq!(used[&peer(1)].sent + used[&peer(1)].dropped, 100_000_000);
        assert_eq!(used[&peer(2)], Used { sent: 500_000, ..Used::default() });
        assert_eq!(used[&peer(3)].received, used[&peer(1)].sent + 500_000);
        assert!(meters.take_used().is_empty());
    }

    #[test]
    fn a_share_of_ones_own_goes_before_that_of_each() {
        let mut meters = Meters::default();
        let (one, sink) = (meters.enter(peer(1)), meters.enter(peer(2)));
        meters.set_shares(Shares { each: Some(1_000_000), other: HashMap::from([(peer(1), 10_000)]) });
        assert!(passed(&mut meters, one, sink, Duration::from_millis(1)) <= 100_000 + LEAST_BURST);
        meters.set_shares(Shares::default());
        assert_eq!(passed(&mut meters, one, sink, Duration::from_millis(1)), 10_000_000);
    }

    #[test]
    fn nothing_passes_to_or_from_the_exhausted() {
        let mut meters = Meters::default();
        let now = Instant::now();
        let (one, other) = (meters.enter(peer(1)), meters.enter(peer(2)));
        meters.set_exhausted(peer(1), true);
        assert!(!meters.pass(one, other, 5, now) && !meters.pass(other, one, 5, now));
        assert!(meters.take_used().iter().all(|(_, used)| *used == Used { refused: 5, ..Used::default() }));
        meters.set_exhausted(peer(1), false);
        assert!(meters.pass(one, other, 5, now) && meters.pass(other, one, 5, now));
    }

    #[test]
    fn all_registrations_of_a_key_have_one_meter_and_it_goes_with_the_last() {
        let mut meters = Meters::default();
        let (first, second) = (meters.enter(peer(1)), meters.enter(peer(1)));
        assert_eq!(first, second);
        let sink = meters.enter(peer(2));
        assert!(meters.pass(first, sink, 7, Instant::now()));
        meters.leave(first);
        meters.leave(second);
        assert_eq!(meters.enter(peer(3)), first, "its place is free again");
        let used = meters.take_used();
        assert!(used.contains(&(peer(1), Used { sent: 7, ..Used::default() })), "{used:?}");
    }
}
