//! What an agent does by time: rounds, volleys, consent, and the pace of it all.

use std::time::Instant;

use crate::agent::Agent;
use crate::event::{DeselectReason, Event};
use crate::report::{CheckError, PairState};

impl Agent {
    /// Everything that is due: first what has ended, then what follows from it, then the checks.
    pub(crate) fn drive(&mut self, now: Instant) {
        self.transactions.expire(now);
        self.expire_consent(now);
        self.watch(now);
        self.end_volleys(now);
        self.reconsider(now);
        self.settle(now);
        self.end_round(now);
        if self.rounds.next.is_some_and(|next| next <= now) {
            self.begin_round(now);
        }
        self.nominate(now);
        self.send_due(now);
    }

    /// The earliest instant at which [`drive`](Self::drive) has something to do.
    pub(crate) fn next_wake(&self) -> Option<(Instant, &'static str)> {
        let volleys = self.checklist.pairs.iter().filter_map(|pair| pair.volley.as_ref());
        let checks = volleys.map(|volley| {
            if volley.has_more() {
                (volley.next.max(self.pacer.ready_at(volley.urgent)), "a check is due")
            } else {
                (volley.next, "a pair has failed")
            }
        });
        let consent = self.choice.consent().map(|consent| {
            (consent.next_check.max(self.pacer.ready_at(true)).min(consent.expires), "consent")
        });
        let empty = self.rounds.running.filter(|_| self.checklist.pairs.is_empty());
        let others = [
            consent,
            self.rounds.next.map(|at| (at, "a round begins")),
            empty.map(|since| (since + self.timers.volley(), "a round without pairs ends")),
            self.settle_at().map(|at| (at, "other pairs are given up")),
            self.takeover_at().map(|at| (at, "another path takes over")),
            self.nomination_at().map(|at| (at, "a nomination is due")),
            self.watch_at().map(|at| (at, "traffic is unanswered")),
            self.lapsed_at().map(|at| (at, "a lost path may be back")),
        ];
        checks.chain(others.into_iter().flatten()).min_by_key(|(at, _)| *at)
    }

    /// Begins a round: every pair anew.
    pub(crate) fn begin_round(&mut self, now: Instant) {
        self.rounds.begin(now);
        self.choice.settle = None;
        for index in 0..self.checklist.pairs.len() {
            let volley = self.new_volley(false, now);
            let pair = &mut self.checklist.pairs[index];
            pair.state = PairState::Waiting;
            pair.proven = None;
            pair.volley = Some(volley);
        }
    }

    /// Volleys whose last check has been unanswered for long enough.
    fn end_volleys(&mut self, now: Instant) {
        for index in 0..self.checklist.pairs.len() {
            let pair = &mut self.checklist.pairs[index];
            let over = |volley: &mut crate::volley::Volley| !volley.has_more() && volley.next <= now;
            if pair.volley.as_mut().is_some_and(over) {
                let path = pair.path;
                self.fail(index, CheckError::Timeout);
                if self.choice.path() == Some(path) {
                    self.deselect(DeselectReason::Unanswered, now);
                }
            }
        }
    }

    /// Ends a pair's volley without success.
    pub(crate) fn fail(&mut self, index: usize, error: CheckError) {
        let pair = &mut self.checklist.pairs[index];
        pair.volley = None;
        if pair.proven.is_none() {
            pair.state = PairState::Failed;
            pair.error = Some(error);
        }
    }

    /// The running round is over when no pair has a check left.
    fn end_round(&mut self, now: Instant) {
        let Some(since) = self.rounds.running else { return };
        let pairs = &self.checklist.pairs;
        let empty = pairs.is_empty() && now < since + self.timers.volley();
        if empty || pairs.iter().any(|pair| pair.volley.is_some()) {
            return;
        }
        if self.choice.path().is_some() {
            self.rounds.running = None;
            return;
        }
        self.rounds.failed(now);
        if pairs.iter().all(|pair| pair.proven.is_none()) {
            tracing::debug!(pairs = pairs.len(), "no path found in this round");
            self.emit(Event::Exhausted);
        }
    }

    fn expire_consent(&mut self, now: Instant) {
        if self.choice.consent().is_some_and(|consent| consent.expires <= now) {
            self.deselect(DeselectReason::ConsentExpired, now);
        }
    }

    /// Sends what is due, as far as the pace allows: urgent checks first, then by order of likelihood.
    fn send_due(&mut self, now: Instant) {
        self.send_consent_check(now);
        self.check_lapsed(now);
        loop {
            let urgent_ready = self.pacer.ready_at(true) <= now;
            let ready = self.pacer.ready_at(false) <= now;
            let due = self.checklist.pairs.iter().enumerate().filter_map(|(index, pair)| {
                let volley = pair.volley.filter(|volley| volley.has_more() && volley.next <= now)?;
                let may = if volley.urgent { urgent_ready } else { ready };
                may.then_some((!volley.urgent, pair.order, index))
            });
            let Some((.., index)) = due.min() else { return };
            let pair = &mut self.checklist.pairs[index];
            if pair.proven.is_none() {
                pair.state = PairState::InProgress;
            }
            let volley = pair.volley.as_mut().map(|volley| {
                volley.note_sent(&self.timers, now);
                volley.id
            });
            self.send_check(index, volley, now);
        }
    }

    /// RFC 7675, 5.1. A volley that is under way on the selected path serves as well.
    fn send_consent_check(&mut self, now: Instant) {
        let Some(path) = self.choice.path() else { return };
        let due = self.choice.consent().is_some_and(|consent| consent.next_check <= now);
        if !due || self.pacer.ready_at(true) > now {
            return;
        }
        if let Some(consent) = self.choice.consent_mut() {
            consent.schedule(&self.timers, &mut self.rng, now);
        }
        let idle = |index: &usize| self.checklist.pairs[*index].volley.is_none();
        if let Some(index) = self.checklist.position(path).filter(idle) {
            self.send_check(index, None, now);
        }
    }
}
