//! What the relay has carried for each key this month. Pure.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::time::SystemTime;

use rendezvous_wire::PeerId;
use serde::{Deserialize, Serialize};

/// Keys whose use is kept beyond their registrations. Each of them has been relayed for this month.
const MOST: usize = 1 << 18;

/// A calendar month of UTC, in months since the beginning of the year 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Month(u32);

impl Month {
    /// The one that this moment is in.
    pub fn of(time: SystemTime) -> Self {
        let text = humantime::format_rfc3339_seconds(time.max(SystemTime::UNIX_EPOCH)).to_string();
        let mut parts = text.splitn(3, '-').map(|part| part.parse().unwrap_or(0));
        let (year, month): (u32, u32) = (parts.next().unwrap_or(0), parts.next().unwrap_or(1));
        Self(year * 12 + month.max(1) - 1)
    }
}

impl fmt::Display for Month {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04}-{:02}", self.0 / 12, self.0 % 12 + 1)
    }
}

/// The use of one month.
#[derive(Debug)]
pub struct Usage {
    month: Month,
    bytes: HashMap<PeerId, u64>,
    unsaved: BTreeSet<PeerId>,
}

impl Usage {
    /// What was known of this month.
    pub fn new(month: Month, known: impl IntoIterator<Item = (PeerId, u64)>) -> Self {
        Self { month, bytes: known.into_iter().collect(), unsaved: BTreeSet::new() }
    }

    /// The month that is counted.
    pub fn month(&self) -> Month {
        self.month
    }

    /// Bytes of a key.
    pub fn of(&self, peer: PeerId) -> u64 {
        self.bytes.get(&peer).copied().unwrap_or(0)
    }

    /// It is this month now. True when that is another one: all begin anew.
    pub fn turn(&mut self, month: Month) -> bool {
        let turned = month > self.month;
        if turned {
            *self = Self::new(month, []);
        }
        turned
    }

    /// So many bytes more of a key; how many it has now.
    pub fn add(&mut self, peer: PeerId, bytes: u64) -> u64 {
        if self.bytes.len() >= MOST && !self.bytes.contains_key(&peer) {
            return bytes;
        }
        let all = self.bytes.entry(peer).or_default();
        *all = all.saturating_add(bytes);
        self.unsaved.insert(peer);
        *all
    }

    /// What has changed since this was last taken.
    pub fn take_unsaved(&mut self) -> Vec<(PeerId, u64)> {
        let unsaved = std::mem::take(&mut self.unsaved);
        unsaved.into_iter().map(|peer| (peer, self.of(peer))).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(text: &str) -> SystemTime {
        humantime::parse_rfc3339(text).unwrap()
    }

    #[test]
    fn months_are_those_of_the_calendar() {
        let month = |text| Month::of(at(text));
        assert_eq!(month("2026-11-30T23:59:59Z").to_string(), "2026-11");
        assert_eq!(month("2026-12-31T23:59:59Z").to_string(), "2026-12");
        assert_eq!(month("2027-01-01T00:00:00Z").to_string(), "2027-01");
        assert!(month("2027-01-01T00:00:00Z") > month("2026-12-31T23:59:59Z"));
        assert_eq!(Month::of(SystemTime::UNIX_EPOCH - Duration::from_secs(9)).to_string(), "1970-01");
    }

    #[test]
    fn a_month_is_counted_and_then_forgotten() {
        let peer = PeerId::from_bytes([1; 32]);
        let november = Month::of(at("2026-11-30T23:59:59Z"));
        let mut usage = Usage::new(november, [(peer, 5)]);
        assert_eq!(usage.add(peer, 3), 8);
        assert_eq!(usage.take_unsaved(), [(peer, 8)]);
        assert!(usage.take_unsaved().is_empty());
        assert!(!usage.turn(november));
        assert!(usage.turn(Month::of(at("2026-12-01T00:00:00Z"))));
        assert_eq!(usage.of(peer), 0);
        assert!(!usage.turn(november), "a clock that goes back takes nothing away");
    }
}
