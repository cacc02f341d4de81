//! A volley: the checks of one pair until one is answered or all have failed.
//!
//! What RFC 8445 calls a check, one transaction and its retransmissions, is up to [`RC`] transactions here.

use std::time::Instant;

use crate::config::{RC, Timers};

#[derive(Debug, Clone, Copy)]
pub(crate) struct Volley {
    /// Tells this volley's transactions from those of earlier ones.
    pub(crate) id: u32,
    /// Checks sent.
    pub(crate) sent: usize,
    /// When the next check is due; after the last one, when the volley has failed.
    pub(crate) next: Instant,
    /// Goes before the rest, and may overdraw the pace.
    pub(crate) urgent: bool,
    last: Option<Instant>,
}

impl Volley {
    pub(crate) fn new(id: u32, urgent: bool, now: Instant) -> Self {
        Self { id, sent: 0, next: now, urgent, last: None }
    }

    /// Whether there is a check left to send; otherwise [`next`](Self::next) is the end.
    pub(crate) fn has_more(&self) -> bool {
        self.sent < RC
    }

    pub(crate) fn note_sent(&mut self, timers: &Timers, now: Instant) {
        self.next = now + timers.intervals[self.sent.min(RC - 1)];
        self.sent += 1;
        self.last = Some(now);
        self.urgent = false;
    }

    /// Brings the next check forward: the other side's check came through.
    pub(crate) fn trigger(&mut self, timers: &Timers, now: Instant) {
        if self.has_more() {
            let earliest = self.last.map_or(now, |last| last + timers.trigger_spacing).max(now);
            self.next = self.next.min(earliest);
            self.urgent = true;
        }
    }
}
