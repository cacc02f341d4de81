//! What the routers of a host's network have to remember because of it.
//!
//! Every probe to a new address costs the router in front a conntrack entry, and a table that is full stops the whole household. The router is the same for all
//! introductions, so they share one budget, and one at a time probes.

use std::any::Any;
use std::collections::VecDeque;
use std::fmt;
use std::time::{Duration, Instant};

use crate::birthday::{PROBES, Part, SOCKETS};

/// How long Linux remembers a UDP flow that nobody has answered (`nf_conntrack_udp_timeout`).
const ENTRY_LIFETIME: Duration = Duration::from_secs(30);

/// Entries that knocks may cost the hard side's router together, of the 1,024 that a small one can spare: an introduction that is made anew a moment later finds
/// room for nearly as many sockets.
const KNOCKS: usize = 2 * SOCKETS - 64;

/// A hold on the host's probing; dropped when the entries that it has cost are gone.
pub type Permit = Box<dyn Any + Send>;

/// Asks the host whether another of its processes is probing.
pub type Gate = Box<dyn FnMut() -> Option<Permit> + Send>;

/// Bounds what all introductions of a host spend together.
pub struct Budget {
    /// When each entry was made that may still be remembered.
    spent: VecDeque<Instant>,
    /// Who is probing, and until when if it does not say that it has ended.
    holder: Option<(u64, Instant)>,
    gate: Gate,
    permit: Option<Permit>,
}

impl Default for Budget {
    /// A budget of one process, which asks nobody.
    fn default() -> Self {
        Self::new(Box::new(|| Some(Box::new(()))))
    }
}

impl fmt::Debug for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Budget").field("spent", &self.spent.len()).field("holder", &self.holder).finish()
    }
}

impl Budget {
    /// A budget that asks `gate` before anybody begins to probe.
    pub fn new(gate: Gate) -> Self {
        Self { spent: VecDeque::new(), holder: None, gate, permit: None }
    }

    /// `who` wants to probe until `until`. False while another does, in this process or in another of the host.
    pub(crate) fn begin(&mut self, who: u64, until: Instant, now: Instant) -> bool {
        self.handle_timeout(now);
        if self.holder.is_some_and(|(holder, until)| holder != who && now < until) {
            return false;
        }
        if self.permit.is_none() {
            self.permit = (self.gate)();
        }
        if self.permit.is_some() {
            self.holder = Some((who, until));
        }
        self.permit.is_some()
    }

    /// `who` probes no more.
    pub(crate) fn end(&mut self, who: u64) {
        if self.holder.is_some_and(|(holder, _)| holder == who) {
            self.holder = None;
        }
        if self.spent.is_empty() && self.holder.is_none() {
            self.permit = None;
        }
    }

    /// Takes one entry from it, for a probe or a socket that knocks. False when it is used up for the moment.
    pub(crate) fn take(&mut self, part: Part, now: Instant) -> bool {
        self.handle_timeout(now);
        let most = match part {
            Part::Easy => PROBES,
            Part::Hard => KNOCKS,
        };
        let left = self.spent.len() < most;
        if left {
            self.spent.push_back(now);
        }
        left
    }

    /// When [`handle_timeout`](Self::handle_timeout) has something to let go.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let last = self.spent.back().map(|spent| *spent + ENTRY_LIFETIME);
        self.permit.as_ref().and(last)
    }

    /// Forgets what the router has forgotten, and lets other processes probe once that is everything.
    pub fn handle_timeout(&mut self, now: Instant) {
        while self.spent.front().is_some_and(|spent| now.saturating_duration_since(*spent) >= ENTRY_LIFETIME)
        {
            self.spent.pop_front();
        }
        self.holder = self.holder.filter(|(_, until)| now < *until);
        if self.spent.is_empty() && self.holder.is_none() {
            self.permit = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::origin;

    #[test]
    fn it_holds_for_any_thirty_seconds() {
        let start = origin();
        for (part, most) in [(Part::Easy, PROBES), (Part::Hard, KNOCKS)] {
            let mut budget = Budget::default();
            let asked = (0..5000).map(|step| start + Duration::from_millis(4) * step);
            assert_eq!(asked.filter(|now| budget.take(part, *now)).count(), most, "20 s of asking");
            assert!(budget.take(part, start + ENTRY_LIFETIME));
        }
    }

    #[test]
    fn one_probes_at_a_time_and_the_next_once_it_has_ended() {
        let start = origin();
        let until = start + Duration::from_secs(6);
        let mut budget = Budget::default();
        assert!(budget.begin(1, until, start) && budget.begin(1, until, start));
        assert!(!budget.begin(2, until, start));
        budget.end(2);
        assert!(!budget.begin(2, until, start));
        budget.end(1);
        assert!(budget.begin(2, until, start));
        assert!(
            budget.begin(3, until + Duration::from_secs(6), until),
            "one that never said that it has ended"
        );
    }

    #[test]
    fn the_hosts_permit_is_held_until_the_entries_are_gone() {
        use std::sync::{Arc, Mutex};
        let held = Arc::new(Mutex::new(()));
        let weak = Arc::downgrade(&held);
        let mut only = Some(held);
        let mut budget = Budget::new(Box::new(move || only.take().map(|permit| Box::new(permit) as Permit)));
        let start = origin();
        assert!(budget.begin(1, start + Duration::from_secs(6), start) && budget.take(Part::Easy, start));
        budget.end(1);
        budget.handle_timeout(start + Duration::from_secs(29));
        assert!(weak.upgrade().is_some());
        let due = budget.poll_timeout().unwrap();
        budget.handle_timeout(due);
        assert!(weak.upgrade().is_none() && budget.poll_timeout().is_none());
        assert!(!budget.begin(1, due + Duration::from_secs(6), due), "another process has it now");
    }
}
