//! Which path the agent takes: nomination, renomination, doubt, and giving up.

use std::time::{Duration, Instant};

use rendezvous_wire::message::Role;
use rendezvous_wire::stun::TransactionId;

use crate::agent::Agent;
use crate::checklist::UNBELIEVABLE;
use crate::consent::Consent;
use crate::event::{DeselectReason, Event, Selected};
use crate::liveness::{Lapsed, Liveness};
use crate::path::Path;
use crate::report::{CheckError, PairState};
use crate::selection::{better, could_beat};
use crate::transaction::Transaction;

/// How many nominations the controlled side remembers, so that a duplicate of an old one is not taken for a new one.
const REMEMBERED_NOMINATIONS: usize = 16;

/// How long the nomination of a path waits for the answer to that of the path before it.
const NOMINATION_PATIENCE: Duration = Duration::from_secs(1);

/// The selected path and how it stands with it.
#[derive(Debug, Clone, Copy)]
struct Current {
    path: Path,
    consent: Consent,
    /// Since when it is in doubt: a volley asks whether it is alive.
    suspect: Option<Instant>,
    liveness: Liveness,
}

/// The controlling side's last nomination.
#[derive(Debug, Clone, Copy)]
struct Nomination {
    path: Path,
    answered: bool,
    since: Instant,
}

/// The choice of a path.
#[derive(Debug, Default)]
pub(crate) struct Choice {
    current: Option<Current>,
    nomination: Option<Nomination>,
    /// Controlled side: the path nominated last.
    nominated: Option<Path>,
    seen: Vec<TransactionId>,
    /// When the pairs that were not selected are given up.
    pub(crate) settle: Option<Instant>,
    /// The path that was lost last, while there is none.
    pub(crate) lapsed: Option<Lapsed>,
}

impl Choice {
    pub(crate) fn path(&self) -> Option<Path> {
        self.current.map(|current| current.path)
    }

    pub(crate) fn consent(&self) -> Option<&Consent> {
        self.current.as_ref().map(|current| &current.consent)
    }

    pub(crate) fn liveness(&self) -> Option<&Liveness> {
        self.current.as_ref().map(|current| &current.liveness)
    }

    pub(crate) fn liveness_mut(&mut self) -> Option<&mut Liveness> {
        self.current.as_mut().map(|current| &mut current.liveness)
    }

    pub(crate) fn consent_mut(&mut self) -> Option<&mut Consent> {
        self.current.as_mut().map(|current| &mut current.consent)
    }
}

impl Agent {
    /// Whether checks on `path` carry USE-CANDIDATE: all of the controlling side's on its selected path do, consent
    /// checks too, so that a controlled side which went astray finds back.
    pub(crate) fn nominates(&self, path: Path) -> bool {
        self.role == Role::Controlling
            && self.choice.path() == Some(path)
            && self.choice.nomination.is_some_and(|nomination| nomination.path == path)
    }

    /// A check was answered; `newly` tells whether its pair was not proven before.
    pub(crate) fn on_answer(&mut self, check: &Transaction, newly: bool, now: Instant) {
        let Transaction { path, volley, nominates: nominating, sent, .. } = *check;
        if self.choice.path() == Some(path) {
            self.note_alive(sent, now);
        }
        if let Some(nomination) = self.choice.nomination.as_mut().filter(|nomination| nomination.path == path)
        {
            nomination.answered |= nominating;
        }
        let nominated = self.choice.nomination.is_none_or(|nomination| nomination.answered);
        if let Some(current) = self.choice.current.as_mut().filter(|current| current.path == path) {
            current.consent.renew(&self.timers, now);
            let pair = self.checklist.get_mut(path);
            if let Some(pair) = pair.filter(|pair| pair.volley.is_some_and(|own| own.id == volley)) {
                if nominated {
                    pair.volley = None;
                    current.consent.schedule(&self.timers, &mut self.rng, now);
                }
                if current.suspect.take().is_some() {
                    self.choice.settle.get_or_insert(now + self.timers.settle);
                }
            }
        } else if let Some(pair) = self.checklist.get_mut(path) {
            pair.volley = None;
        }
        match self.role {
            Role::Controlled if self.choice.nominated == Some(path) => self.select(path, now),
            // A path that appears when all was settled says that something has changed: is the old one still there?
            Role::Controlling if newly && self.rounds.running.is_none() => {
                self.reconsider(now);
                if self.choice.path() != Some(path) {
                    self.suspect(now);
                }
            }
            _ => self.reconsider(now),
        }
    }

    /// The controlling side has nominated `path` (RFC 8445, 7.3.1.5).
    pub(crate) fn on_nomination(&mut self, path: Path, transaction: TransactionId, now: Instant) {
        if self.role != Role::Controlled || self.choice.seen.contains(&transaction) {
            return;
        }
        if self.choice.seen.len() == REMEMBERED_NOMINATIONS {
            self.choice.seen.remove(0);
        }
        self.choice.seen.push(transaction);
        self.choice.nominated = Some(path);
        if self.checklist.get(path).is_some_and(|pair| pair.proven.is_some()) {
            self.select(path, now);
        }
    }

    /// Takes another role (RFC 8445, 7.2.5.1 and 7.3.1.1).
    pub(crate) fn switch_role(&mut self, role: Role, now: Instant) {
        tracing::debug!(?role, "role conflict: ours changes");
        self.role = role;
        self.checklist.set_role(role);
        self.choice.nomination = None;
        self.choice.nominated = None;
        self.reconsider(now);
    }

    /// The controlling side looks for a better path among those proven lately.
    pub(crate) fn reconsider(&mut self, now: Instant) {
        if self.role != Role::Controlling {
            return;
        }
        let current = self.choice.current;
        let suspect = current.and_then(|current| current.suspect);
        // Unanswered traffic says more than a suspicion: no patience then.
        let doubt = current.and_then(|current| current.liveness.doubtful_since());
        if doubt.is_none() && suspect.is_some_and(|since| now < since + self.timers.patience()) {
            return;
        }
        let since = doubt.or(suspect);
        let fresh = |proven: Instant| match since {
            Some(since) => proven >= since,
            None => now <= proven + self.timers.volley(),
        };
        let mut best = match current {
            Some(current) if since.is_none() => self.checklist.get(current.path),
            _ => None,
        };
        for pair in &self.checklist.pairs {
            let other = current.is_none_or(|current| current.path != pair.path);
            let Some(measured) = pair.measured().filter(|_| other && pair.proven.is_some_and(fresh)) else {
                continue;
            };
            let beaten = |best: &crate::checklist::Pair| {
                best.measured().is_none_or(|incumbent| better(&measured, &incumbent))
            };
            if best.is_none_or(beaten) {
                best = Some(pair);
            }
        }
        if let Some(path) = best.map(|pair| pair.path).filter(|path| self.choice.path() != Some(*path)) {
            self.select(path, now);
        }
    }

    /// When [`reconsider`](Self::reconsider) will prefer a path that is known already to the one in doubt.
    pub(crate) fn takeover_at(&self) -> Option<Instant> {
        let current = self.choice.current.filter(|_| self.role == Role::Controlling)?;
        let since = current.suspect?;
        let at = since + self.timers.patience();
        let ready = self
            .checklist
            .pairs
            .iter()
            .any(|pair| pair.path != current.path && pair.proven.is_some_and(|proven| proven >= since));
        ready.then_some(at)
    }

    /// Data uses `path`, which is proven, from now on.
    fn select(&mut self, path: Path, now: Instant) {
        if self.choice.path() == Some(path) {
            return;
        }
        let Some((proven, selected)) = self
            .checklist
            .get(path)
            .and_then(|pair| Some((pair.proven?, Selected { path, rtt: pair.rtt?, remote_kind: pair.kind })))
        else {
            return;
        };
        let mut consent = Consent::given(&self.timers, &mut self.rng, now);
        if now > proven + self.timers.consent_interval || selected.rtt > UNBELIEVABLE {
            consent.next_check = now;
        }
        let liveness = Liveness::new(proven, selected.rtt, now);
        self.choice.current = Some(Current { path, consent, suspect: None, liveness });
        self.choice.lapsed = None;
        self.choice.settle.get_or_insert(now + self.timers.settle);
        self.rounds.succeeded();
        tracing::debug!(%path, rtt = ?selected.rtt, kind = %selected.remote_kind, "selected");
        self.emit(Event::Selected(selected));
    }

    /// The selected path is gone. There is no other that is known to be better, so all are tried again.
    pub(crate) fn deselect(&mut self, reason: DeselectReason, now: Instant) {
        let Some(Current { path, .. }) = self.choice.current.take() else { return };
        tracing::debug!(%path, %reason, "deselected");
        self.choice.nomination = None;
        self.choice.nominated = None;
        self.choice.settle = None;
        self.choice.lapsed = Some(Lapsed::new(path, now));
        if let Some(pair) = self.checklist.get_mut(path) {
            pair.proven = None;
            pair.volley = None;
            pair.state = PairState::Failed;
            pair.error = Some(CheckError::ConsentLost);
        }
        self.emit(Event::Deselected { path, reason });
        if self.rounds.running.is_none() {
            self.begin_round(now);
        }
    }

    /// Puts the selected path in doubt: a volley asks whether it is alive.
    pub(crate) fn suspect(&mut self, now: Instant) {
        let Some(path) = self.choice.path() else { return };
        let volley = self.new_volley(true, now);
        let Some(current) = self.choice.current.as_mut() else { return };
        if current.suspect.is_none() {
            current.suspect = Some(now);
            if let Some(pair) = self.checklist.get_mut(path) {
                pair.volley = Some(volley);
            }
        }
    }

    /// When a nomination that waits for the one before it may go out.
    pub(crate) fn nomination_at(&self) -> Option<Instant> {
        let path = self.choice.path().filter(|_| self.role == Role::Controlling)?;
        let before = self.choice.nomination.filter(|nomination| nomination.path != path)?;
        Some(before.since + NOMINATION_PATIENCE)
    }

    /// Nominates the selected path, once the other side has the nomination before it: else the two could cross on
    /// their way, and the older one would win.
    pub(crate) fn nominate(&mut self, now: Instant) {
        let Some(path) = self.choice.path().filter(|_| self.role == Role::Controlling) else { return };
        match self.choice.nomination {
            Some(nomination) if nomination.path == path => return,
            Some(before) if !before.answered && now < before.since + NOMINATION_PATIENCE => return,
            Some(before) => {
                // No more checks would say otherwise.
                if let Some(pair) = self.checklist.get_mut(before.path) {
                    pair.volley = None;
                }
            }
            None => {}
        }
        self.choice.nomination = Some(Nomination { path, answered: false, since: now });
        let volley = self.new_volley(true, now);
        if let Some(pair) = self.checklist.get_mut(path) {
            pair.volley = Some(volley);
        }
    }

    /// When the pairs that were not selected are given up.
    pub(crate) fn settle_at(&self) -> Option<Instant> {
        self.choice.settle.filter(|_| self.is_sure())
    }

    /// Gives up, some time after a path was selected, all that were not.
    pub(crate) fn settle(&mut self, now: Instant) {
        let Some(path) = self.choice.path() else { return };
        let over = self.settle_at().is_some_and(|at| at <= now);
        let incumbent = self.checklist.get(path).and_then(crate::checklist::Pair::measured);
        let hopeless = self.role == Role::Controlling && self.choice.settle.is_some() && self.is_sure();
        for pair in self.checklist.pairs.iter_mut().filter(|pair| pair.path != path) {
            let could =
                incumbent.is_some_and(|incumbent| could_beat(pair.kind, pair.path.remote, &incumbent));
            if pair.proven.is_none() && pair.volley.is_some() && (over || (hopeless && !could)) {
                pair.volley = None;
                pair.state = PairState::Superseded;
            }
        }
        if over {
            self.choice.settle = None;
        }
    }

    fn is_sure(&self) -> bool {
        self.choice.current.is_some_and(|current| current.suspect.is_none())
    }

    /// Whether a check of the other side on this pair deserves one of ours. Not while a path that is just proven
    /// cannot be beaten by it; later, it may be news of a change.
    pub(crate) fn is_worth_a_check(&self, index: usize) -> bool {
        if self.role == Role::Controlled || self.settle_at().is_none() {
            return true;
        }
        let pair = &self.checklist.pairs[index];
        let incumbent = self.choice.path().and_then(|path| self.checklist.get(path)?.measured());
        incumbent.is_none_or(|incumbent| could_beat(pair.kind, pair.path.remote, &incumbent))
    }
}
