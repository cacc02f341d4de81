//! A candidate pair and its transactions.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rendezvous_wire::candidate::CandidateKind;
use rendezvous_wire::message::Role;
use rendezvous_wire::stun::TransactionId;

use crate::agent::Path;
use crate::report::PairState;
use crate::selection::Merit;
use crate::timers::{MAX_OUTSTANDING, RETRANSMIT, TRIGGER_SPACING};

/// A check that may still be answered.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Outstanding {
    pub(crate) transaction: TransactionId,
    pub(crate) sent: Instant,
    pub(crate) nominating: bool,
}

/// A socket of ours and an address of theirs.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) path: Path,
    pub(crate) remote_kind: CandidateKind,
    /// RFC 8445, 6.1.2.3.
    pub(crate) priority: u64,
    /// PRIORITY of our checks: that of a peer-reflexive candidate with this base (7.1.1).
    pub(crate) check_priority: u32,
    pub(crate) state: PairState,
    /// When the next check of this round is due; `None` while there is nothing to send.
    pub(crate) due: Option<Instant>,
    /// A check of the other side asks for ours.
    pub(crate) triggered: bool,
    /// Checks of this round.
    attempts: usize,
    last_sent: Option<Instant>,
    pub(crate) checks_sent: u32,
    pub(crate) outstanding: Vec<Outstanding>,
    pub(crate) rtt: Option<Duration>,
    pub(crate) mapped: Option<SocketAddr>,
    pub(crate) heard_from: bool,
    /// Controlling: we nominate it, and no nomination has been answered yet.
    pub(crate) nominating: bool,
    /// Controlled: the other side has nominated it.
    pub(crate) nominated: bool,
}

impl Pair {
    pub(crate) fn new(path: Path, remote_kind: CandidateKind, check_priority: u32, now: Instant) -> Self {
        Self {
            path,
            remote_kind,
            priority: 0,
            check_priority,
            state: PairState::Waiting,
            due: Some(now),
            triggered: false,
            attempts: 0,
            last_sent: None,
            checks_sent: 0,
            outstanding: Vec::new(),
            rtt: None,
            mapped: None,
            heard_from: false,
            nominating: false,
            nominated: false,
        }
    }

    /// Sets the pair's priority from both candidates' (RFC 8445, 6.1.2.3).
    pub(crate) fn prioritise(&mut self, role: Role, local: u32, remote: u32) {
        let (controlling, controlled) = match role {
            Role::Controlling => (u64::from(local), u64::from(remote)),
            Role::Controlled => (u64::from(remote), u64::from(local)),
        };
        let greater = u64::from(controlling > controlled);
        self.priority = (controlling.min(controlled) << 32) + 2 * controlling.max(controlled) + greater;
    }

    /// Starts a round of checks on it.
    pub(crate) fn begin(&mut self, now: Instant) {
        self.attempts = 0;
        self.due = Some(now);
        if self.state != PairState::Succeeded {
            self.state = PairState::Waiting;
        }
    }

    /// The other side's check asks for one of ours (RFC 8445, 7.3.1.4).
    pub(crate) fn trigger(&mut self, now: Instant) {
        self.begin(now);
        self.triggered = true;
        if let Some(last) = self.last_sent {
            self.due = Some(now.max(last + TRIGGER_SPACING));
        }
    }

    /// Has nothing more to send.
    pub(crate) fn stop(&mut self, state: PairState) {
        self.due = None;
        self.triggered = false;
        self.state = state;
    }

    /// A check is to leave now: true; or the last one of the round has gone unanswered: false, and the pair has failed.
    pub(crate) fn attempt(&mut self) -> bool {
        if self.attempts >= RETRANSMIT.len() {
            self.stop(PairState::Failed);
            return false;
        }
        true
    }

    /// A check of the round has left.
    pub(crate) fn sent(&mut self, check: Outstanding) {
        self.due = Some(check.sent + RETRANSMIT[self.attempts.min(RETRANSMIT.len() - 1)]);
        self.attempts += 1;
        self.triggered = false;
        if self.state != PairState::Succeeded {
            self.state = PairState::InProgress;
        }
        self.note(check);
    }

    /// A check outside any round has left (consent).
    pub(crate) fn note(&mut self, check: Outstanding) {
        self.last_sent = Some(check.sent);
        self.checks_sent += 1;
        if self.outstanding.len() >= MAX_OUTSTANDING {
            self.outstanding.remove(0);
        }
        self.outstanding.push(check);
    }

    pub(crate) fn merit(&self) -> Merit {
        Merit {
            rtt: self.rtt.unwrap_or(Duration::MAX / 4),
            remote_kind: self.remote_kind,
            ipv6: self.path.remote.is_ipv6(),
        }
    }
}
