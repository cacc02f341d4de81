//! Who may send how much where the relay is full: the share of each is the same, and what somebody does not need goes to those who do (max-min
//! fairness). Pure.
//!
//! Relay threads report what each key sends; now and then this gives the rates at which they let it through. A key that spreads over several threads has
//! its share split among them as it uses them.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use rendezvous_wire::PeerId;
use rendezvous_wire::message::Limit;

use super::meters::{Shares, Used};

/// A key that uses so much of what it may, in percent, would send more if it might.
const CONTENT: u64 = 90;

/// Reports of all threads, and what follows from them.
#[derive(Debug)]
pub struct Arbiter {
    /// Bytes a second: of all, and of each.
    total: Option<u64>,
    each: Option<u64>,
    /// What each key has sent at each thread since the last verdict.
    sent: HashMap<PeerId, Vec<Used>>,
    heard: BTreeSet<usize>,
    threads: usize,
    /// The share of each as it was last given.
    level: Option<u64>,
}

/// The rates for each thread, by its number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Of every thread.
    pub shares: Vec<Shares>,
    /// What everybody may send, where the relay is full.
    pub level: Option<u64>,
}

impl Arbiter {
    /// For so many threads, with bytes a second of all and of each.
    pub fn new(threads: usize, total: Option<u64>, each: Option<u64>) -> Self {
        let (sent, heard) = (HashMap::new(), BTreeSet::new());
        Self { total, each, sent, heard, threads, level: None }
    }

    /// Whether there is anything to decide.
    pub fn is_needed(&self) -> bool {
        self.total.is_some() || self.each.is_some()
    }

    /// The share of each, where the relay is full.
    pub fn level(&self) -> Option<u64> {
        self.level
    }

    /// What it is that holds a key back which sends too much.
    pub fn held_back(&self) -> Option<Limit> {
        match (self.level, self.each) {
            (Some(level), each) if each.is_none_or(|each| level < each) => Some(Limit::Share(level)),
            (_, Some(each)) => Some(Limit::Bandwidth(each)),
            (_, None) => self.total.map(Limit::Share),
        }
    }

    /// From now on with these bounds; what each thread is told at once.
    pub fn set_limits(&mut self, total: Option<u64>, each: Option<u64>) -> Shares {
        (self.total, self.each, self.level) = (total, each, None);
        self.start()
    }

    /// What each thread begins with.
    pub fn start(&self) -> Shares {
        Shares { each: self.most(), other: HashMap::new() }
    }

    /// What one key may send at the most.
    fn most(&self) -> Option<u64> {
        [self.total, self.each].into_iter().flatten().min()
    }

    /// What keys have used at one thread over the `period` that all have been asked after. A verdict once all threads have reported.
    pub fn handle_report(
        &mut self,
        thread: usize,
        used: &[(PeerId, Used)],
        period: Duration,
    ) -> Option<Verdict> {
        if !self.is_needed() || thread >= self.threads {
            return None;
        }
        for (peer, used) in used {
            let at = self.sent.entry(*peer).or_insert_with(|| vec![Used::default(); self.threads]);
            at[thread] = at[thread].and(*used);
        }
        self.heard.insert(thread);
        if self.heard.len() < self.threads {
            return None;
        }
        self.heard.clear();
        Some(self.decide(period))
    }

    fn decide(&mut self, period: Duration) -> Verdict {
        let sent = std::mem::take(&mut self.sent);
        let a_second = |bytes: u64| {
            let nanoseconds = period.as_nanos().max(1);
            u64::try_from(u128::from(bytes) * 1_000_000_000 / nanoseconds).unwrap_or(u64::MAX)
        };
        let most = self.most().unwrap_or(u64::MAX);
        let allowed = self.level.unwrap_or(most);
        let of = |at: &[Used]| at.iter().copied().fold(Used::default(), Used::and);
        let wants = |used: Used| {
            // Whoever is held back would send who knows how much more.
            let held_back = used.dropped > 0 || a_second(used.sent) > allowed / 100 * CONTENT;
            if held_back { most } else { a_second(used.sent) }
        };
        self.level =
            self.total.and_then(|total| level(total, sent.values().map(|at| wants(of(at))).collect()));
        let each = self.level.unwrap_or(most).min(most);
        let mut shares =
            vec![Shares { each: (each < u64::MAX).then_some(each), other: HashMap::new() }; self.threads];
        for (peer, at) in &sent {
            let all = of(at);
            if at.iter().filter(|used| used.sent + used.dropped > 0).count() < 2 {
                continue;
            }
            for (shares, used) in shares.iter_mut().zip(at) {
                let part = u128::from(used.sent + used.dropped) * u128::from(each);
                let part = part / u128::from((all.sent + all.dropped).max(1));
                // What a thread has not seen yet may begin there.
                let least = each / (8 * self.threads as u64);
                shares.other.insert(*peer, u64::try_from(part).unwrap_or(each).max(least));
            }
        }
        Verdict { shares, level: self.level }
    }
}

/// The rate at which everybody who wants more is cut off, so that all get `total` together. `None`: nobody has to be.
pub fn level(total: u64, mut wants: Vec<u64>) -> Option<u64> {
    wants.sort_unstable();
    let mut left = total;
    for (served, want) in wants.iter().enumerate() {
        let share = left / (wants.len() - served) as u64;
        if *want > share {
            return Some(share);
        }
        left -= want;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(number: u8) -> PeerId {
        PeerId::from_bytes([number; 32])
    }

    fn sent(bytes: u64) -> Used {
        Used { sent: bytes, ..Used::default() }
    }

    #[test]
    fn the_modest_get_what_they_want_and_the_greedy_share_the_rest() {
        assert_eq!(level(100, vec![]), None);
        assert_eq!(level(100, vec![50, 50]), None);
        assert_eq!(level(100, vec![10, 1_000]), Some(90));
        assert_eq!(level(100, vec![1_000, 10, 1_000]), Some(45));
        assert_eq!(level(90, vec![50, 50, 50]), Some(30));
        assert_eq!(level(0, vec![1]), Some(0));
    }

    #[test]
    fn one_greedy_key_leaves_the_others_what_they_need() {
        let mut arbiter = Arbiter::new(1, Some(1_000_000), None);
        let second = Duration::from_secs(1);
        let greedy = Used { sent: 900_000, dropped: 5_000_000, ..Used::default() };
        let mut used = vec![(peer(1), greedy)];
        used.extend((2..7).map(|number| (peer(number), sent(50_000))));
        let verdict = arbiter.handle_report(0, &used, second).unwrap();
        assert_eq!((verdict.level, verdict.shares[0].each), (Some(750_000), Some(750_000)));
        // One that may not send at all takes nothing away.
        used.push((peer(8), Used { refused: 9_000_000, ..Used::default() }));
        assert_eq!(arbiter.handle_report(0, &used, second).unwrap().level, Some(750_000));
        // A second one comes.
        used.push((peer(9), greedy));
        assert_eq!(arbiter.handle_report(0, &used, second).unwrap().level, Some(375_000));
        // Both have gone.
        used.retain(|(_, used)| used.dropped == 0);
        let verdict = arbiter.handle_report(0, &used, second).unwrap();
        assert_eq!((verdict.level, verdict.shares[0].each), (None, Some(1_000_000)));
    }

    #[test]
    fn a_key_at_several_threads_has_one_share() {
        let mut arbiter = Arbiter::new(2, None, Some(100_000));
        let used = Used { sent: 100_000, dropped: 300_000, ..Used::default() };
        let less = sent(100_000);
        assert_eq!(arbiter.handle_report(0, &[(peer(1), used)], Duration::from_secs(1)), None);
        let verdict = arbiter.handle_report(1, &[(peer(1), less)], Duration::from_secs(1)).unwrap();
        let of = |thread: usize| verdict.shares[thread].other[&peer(1)];
        assert_eq!((of(0), of(1)), (80_000, 20_000));
        assert_eq!(verdict.shares[0].each, Some(100_000));
    }

    /// Whatever they want, the rates never give more than there is, nor leave anything over that somebody wants.
    #[test]
    fn shares_fill_the_relay_and_no_more() {
        use rand::rngs::StdRng;
        use rand::{Rng as _, SeedableRng as _};
        let mut random = StdRng::seed_from_u64(5);
        for _ in 0..2_000 {
            let total = random.random_range(1_000..1_000_000u64);
            let count = random.random_range(1..30);
            let wants: Vec<u64> = (0..count).map(|_| random.random_range(0..200_000)).collect();
            match level(total, wants.clone()) {
                None => assert!(wants.iter().sum::<u64>() <= total),
                Some(level) => {
                    let given: u64 = wants.iter().map(|want| (*want).min(level)).sum();
                    assert!(given <= total && given + count as u64 >= total, "{given} of {total}");
                }
            }
        }
    }
}
