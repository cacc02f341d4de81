//! What the relay carries for each key, and what comes of it: the month's quota, and word of the limits that hold a peer back.

use std::time::{Duration, Instant};

use rendezvous_wire::PeerId;
use rendezvous_wire::message::{Limit, Notice};

use super::{Action, Broker};
use crate::relay::meters::Used;
use crate::relay::table::Change;
use crate::usage::{Month, Usage};

/// How often a peer is told that a limit holds it back.
pub(super) const TELL: Duration = Duration::from_secs(30);

impl Broker {
    /// What was used before, this month.
    pub fn set_usage(&mut self, usage: Usage) {
        self.usage = usage;
    }

    /// What is used, to look at and to save.
    pub fn usage(&mut self) -> &mut Usage {
        &mut self.usage
    }

    /// Bytes that the relay has carried for a key this month.
    pub fn used_by(&self, peer: PeerId) -> u64 {
        self.usage.of(peer)
    }

    /// The relay has carried this. `held_back` says which limit it was where something was dropped.
    pub fn handle_used(
        &mut self,
        used: &[(PeerId, Used)],
        month: Month,
        held_back: Option<Limit>,
        now: Instant,
    ) {
        if self.usage.turn(month) {
            for peer in self.members.keys().copied().collect::<Vec<_>>() {
                self.judge_use(peer);
            }
        }
        for (peer, used) in used {
            self.usage.add(*peer, used.carried());
            self.judge_use(*peer);
            let month = self.limits.relay_month().filter(|_| used.refused > 0 && self.is_exhausted(*peer));
            let limit = month.map(Limit::Month).or(held_back.filter(|_| used.dropped > 0));
            if let Some(limit) = limit {
                self.tell_limit(*peer, limit, now);
            }
        }
    }

    pub(super) fn is_exhausted(&self, peer: PeerId) -> bool {
        self.limits.relay_month().is_some_and(|most| self.usage.of(peer) >= most)
    }

    /// Ends or begins what the relay carries for a key.
    pub(super) fn judge_use(&mut self, peer: PeerId) {
        let exhausted = self.is_exhausted(peer);
        let Some(member) = self.members.get_mut(&peer) else { return };
        if std::mem::replace(&mut member.exhausted, exhausted) == exhausted {
            return;
        }
        self.actions.push_back(Action::Relay(Change::Exhausted(peer, exhausted)));
        if let Some(most) = self.limits.relay_month().filter(|_| exhausted) {
            self.tell(peer, Limit::Month(most));
        }
    }

    /// Tells a key which limit holds it back, now and then.
    fn tell_limit(&mut self, peer: PeerId, limit: Limit, now: Instant) {
        let Some(member) = self.members.get_mut(&peer) else { return };
        if member.told.is_none_or(|told| now >= told + TELL) {
            member.told = Some(now);
            self.tell(peer, limit);
        }
    }

    fn tell(&mut self, peer: PeerId, limit: Limit) {
        for registration in self.directory.of(peer).to_vec() {
            self.notify(registration, Notice::Limited(limit));
        }
    }
}
