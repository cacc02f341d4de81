//! Whether the selected path still carries what is sent on it: judged by traffic that nothing answers, never by silence.
//!
//! QUIC acknowledges within a round trip and 25 ms (`max_ack_delay`, RFC 9000, 18.2), so traffic that nothing follows on the path
//! it took is a reason to ask; only a bare acknowledgement has no answer. Hence two checks about half of the time: their absence is
//! what counts. Three stages, each of which costs more than the one before:
//!
//! 1. *Asked.* Something was sent, and nothing has come for about half of [`Timers::silence`](crate::Timers::silence): one check, then another.
//! 2. *In doubt.* Nothing for the whole of it, the checks included: data goes over the relay as well, checks follow each
//!    other fast. Cheap, so it may be wrong now and then.
//! 3. *Given up.* None of a dozen checks and more is answered for a second: the relay alone, and the path is asked ever more rarely whether it
//!    has come back.
//!
//! # When one direction is dead
//!
//! Who is not heard hears everything, and its own traffic may look answered: by the other side's retransmissions, by its checks. So data that
//! arrives is enough to put off the question, but once in doubt only an answer to a check sent since then ends it: that alone has
//! gone both ways. The deaf side notices by itself, since nothing answers it. The other side learns by the copies that now come over the relay: they
//! mean that the other side is in doubt or has given up, and put the path in doubt here too. Each side finds the same then, since a check needs both directions,
//! whichever is dead. With both directions dead each notices by itself.
//!
//! Copies are in flight when doubt ends, and two sides could put each other in doubt in turn for ever: for
//! a while after a selection and after every doubt copies mean nothing.

use std::time::{Duration, Instant};

use crate::agent::Agent;
use crate::event::{DeselectReason, Event};
use crate::path::Path;

/// Least number of checks that go unanswered before a path in doubt is given up.
const LEAST_CHECKS: u32 = 8;

/// When the two checks ask about unanswered traffic, in twelfths of the patience, which is three round trips: after one and a quarter, so that an
/// acknowledgement may be late by `max_ack_delay`, and while there is time for the second one's answer.
const ASK_AT: [u32; 2] = [5, 7];

/// Least time between two checks on a path in doubt: a quarter of [`Timers::silence`](crate::Timers::silence)'s least, and far slower than Ta.
const LEAST_SPACING: Duration = Duration::from_millis(50);

/// How long copies mean nothing after a selection or a doubt, besides three round trips.
const HOLD_OFF: Duration = Duration::from_millis(500);

/// What the caller has seen of the traffic on the selected path since it was selected.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// When the first datagram was sent on it after the last that came on it; `None` when nothing was.
    pub unanswered_since: Option<Instant>,
    /// Whether data of the other side has come over the relay since this was last told.
    pub relayed: bool,
}

/// Traffic on the selected path that may be unanswered.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Watch {
    since: Option<Instant>,
    /// The checks that asked about it: how many, the first, the last.
    asked: Option<(usize, Instant, Instant)>,
}

/// The selected path is in doubt.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Doubt {
    /// An answer to a check that was sent since then ends it.
    since: Instant,
    began: Instant,
    checks: u32,
    next: Instant,
}

/// How it stands with the selected path.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Liveness {
    watch: Watch,
    doubt: Option<Doubt>,
    /// When the latest check that was answered had been sent.
    alive: Instant,
    /// Copies that come earlier mean nothing.
    copies_from: Instant,
}

impl Liveness {
    /// A path is selected whose last answered check was sent `alive`, of this round-trip time.
    pub(crate) fn new(alive: Instant, rtt: Duration, now: Instant) -> Self {
        Self { watch: Watch::default(), doubt: None, alive, copies_from: now + HOLD_OFF + 3 * rtt }
    }

    /// Whatever has been proven since then is better than the path: it is in doubt, or has been asked about and has not answered yet.
    pub(crate) fn doubtful_since(&self) -> Option<Instant> {
        let asked = self.watch.asked.and(self.watch.since);
        self.doubt.map(|doubt| doubt.since).or(asked)
    }
}

/// A path that was selected until it was lost: it may come back.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lapsed {
    path: Path,
    since: Instant,
    next: Instant,
}

impl Lapsed {
    pub(crate) fn new(path: Path, now: Instant) -> Self {
        let mut lapsed = Self { path, since: now, next: now };
        lapsed.schedule(Duration::MAX, now);
        lapsed
    }

    /// Twice a second to begin with, then with a wait of a sixteenth of what it has been away: a second after 16 s, a minute
    /// after 16 min. RFC 7675, section 5.1, forbids data without consent, not the checks that obtain it anew.
    fn schedule(&mut self, most: Duration, now: Instant) {
        let away = now.saturating_duration_since(self.since);
        self.next = now + (away / 16).max(Duration::from_millis(500)).min(most);
    }
}

impl Agent {
    /// Takes what the caller has seen of the traffic on the selected path. Call it before
    /// [`handle_timeout`](Self::handle_timeout), when the first datagram is sent after the last that came, and when data
    /// comes over the relay while a path is selected.
    pub fn handle_traffic(&mut self, traffic: Traffic, now: Instant) {
        let Some(liveness) = self.choice.liveness_mut() else { return };
        if liveness.watch.since != traffic.unanswered_since {
            liveness.watch = Watch { since: traffic.unanswered_since, asked: None };
        }
        if traffic.relayed && liveness.doubt.is_none() && now >= liveness.copies_from {
            self.begin_doubt(now, "the other side sends over the relay", now);
        }
    }

    /// When the latest answered check on the selected path had been sent: what was sent before needs no other answer.
    pub fn alive(&self) -> Option<Instant> {
        self.choice.liveness().map(|liveness| liveness.alive)
    }

    /// Whether the selected path is in doubt.
    pub fn is_doubtful(&self) -> bool {
        self.choice.liveness().is_some_and(|liveness| liveness.doubt.is_some())
    }

    /// A check on the selected path, sent at `sent`, was answered.
    pub(crate) fn note_alive(&mut self, sent: Instant, now: Instant) {
        let Some(path) = self.choice.path() else { return };
        let rtt = self.checklist.get(path).and_then(|pair| pair.rtt).unwrap_or_default();
        let Some(liveness) = self.choice.liveness_mut() else { return };
        liveness.alive = liveness.alive.max(sent);
        if liveness.watch.since.is_some_and(|since| sent >= since) {
            liveness.watch = Watch::default();
        }
        if liveness.doubt.is_some_and(|doubt| sent >= doubt.since) {
            liveness.doubt = None;
            liveness.copies_from = now + HOLD_OFF + 3 * rtt;
            tracing::debug!(%path, "no longer in doubt");
            self.emit(Event::Trusted { path });
        }
    }

    /// How long traffic may go unanswered: three round trips within [`silence`](crate::Timers::silence).
    fn patience_with_silence(&self, path: Path) -> Duration {
        let [least, most] = self.timers.silence;
        let rtt = self.checklist.get(path).and_then(|pair| pair.rtt).unwrap_or(least);
        (3 * rtt).max(least).min(most)
    }

    fn answer_time(&self, path: Path) -> Duration {
        self.checklist.get(path).map_or(Duration::ZERO, crate::checklist::Pair::answer_time)
    }

    /// What the watch and the doubt have to do next, and when.
    pub(crate) fn watch_at(&self) -> Option<Instant> {
        let path = self.choice.path()?;
        let liveness = self.choice.liveness()?;
        let ready = self.pacer.ready_at(true);
        if let Some(doubt) = liveness.doubt {
            let check = doubt.next.max(ready);
            return Some(if doubt.checks < LEAST_CHECKS {
                check
            } else {
                check.min(self.doubt_ends(&doubt, path))
            });
        }
        let since = liveness.watch.since?;
        let patience = self.patience_with_silence(path);
        let (asked, first, last) = liveness.watch.asked.unwrap_or((0, since, since));
        Some(match ASK_AT.get(asked) {
            Some(twelfths) => (since + patience * *twelfths / 12).max(ready),
            None => {
                let rtt = self.checklist.get(path).and_then(|pair| pair.rtt).unwrap_or_default();
                (since + patience).max(first + self.answer_time(path)).max(last + rtt)
            }
        })
    }

    fn doubt_ends(&self, doubt: &Doubt, path: Path) -> Instant {
        doubt.began + self.timers.doubt.max(4 * self.answer_time(path))
    }

    /// Asks, doubts, and gives up, each when it is time.
    pub(crate) fn watch(&mut self, now: Instant) {
        if self.watch_at().is_none_or(|at| now < at) {
            return;
        }
        let Some(path) = self.choice.path() else { return };
        let (ready, rtt_spacing) = (self.pacer.ready_at(true) <= now, self.patience_with_silence(path) / 6);
        let Some(Liveness { watch, doubt, .. }) = self.choice.liveness().copied() else { return };
        let (asked, first, _) = watch.asked.unwrap_or((0, now, now));
        match doubt {
            Some(doubt) if doubt.checks >= LEAST_CHECKS && now >= self.doubt_ends(&doubt, path) => {
                self.deselect(DeselectReason::TrafficUnanswered, now);
            }
            Some(doubt) if ready && doubt.next <= now => {
                self.check_selected(path, now);
                if let Some(doubt) = self.choice.liveness_mut().and_then(|liveness| liveness.doubt.as_mut()) {
                    doubt.checks += 1;
                    doubt.next = now + rtt_spacing.max(LEAST_SPACING);
                }
            }
            None if asked < ASK_AT.len() && ready => {
                self.check_selected(path, now);
                if let Some(liveness) = self.choice.liveness_mut() {
                    liveness.watch.asked = Some((asked + 1, first, now));
                }
            }
            None if asked == ASK_AT.len() => {
                self.begin_doubt(watch.since.unwrap_or(now), "traffic is unanswered", now);
                self.watch(now);
            }
            _ => {}
        }
    }

    fn begin_doubt(&mut self, since: Instant, why: &'static str, now: Instant) {
        let Some(path) = self.choice.path() else { return };
        let Some(liveness) = self.choice.liveness_mut() else { return };
        liveness.doubt = Some(Doubt { since, began: now, checks: 0, next: now });
        tracing::debug!(%path, why, "in doubt");
        self.emit(Event::Doubtful { path });
    }

    fn check_selected(&mut self, path: Path, now: Instant) {
        if let Some(index) = self.checklist.position(path) {
            self.send_check(index, None, now);
        }
    }

    /// When the lost path is asked next.
    pub(crate) fn lapsed_at(&self) -> Option<Instant> {
        self.choice.lapsed.map(|lapsed| lapsed.next.max(self.pacer.ready_at(true)))
    }

    /// Asks the lost path whether it is back.
    pub(crate) fn check_lapsed(&mut self, now: Instant) {
        if self.lapsed_at().is_none_or(|at| now < at) {
            return;
        }
        let most = self.timers.grid * (1 << self.timers.max_level.min(16));
        let Some(lapsed) = self.choice.lapsed.as_mut() else { return };
        lapsed.schedule(most, now);
        let path = lapsed.path;
        match self.checklist.position(path) {
            Some(index) => self.send_check(index, None, now),
            None => self.choice.lapsed = None,
        }
    }
}
