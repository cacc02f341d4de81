//! Whether the relay that carries a session still does, where another one could: judged by traffic that nothing answers, by what comes
//! over the other one, and by whether the server itself answers ([`Vigil`](super::vigil::Vigil)). Pure.
//!
//! Each side has a channel at every server that both are registered at, hears on all of them, and chooses by itself on which one it sends. In doubt it
//! sends on two. The other side hears that on its spare channel, and takes it for a reason to do the same: so both try both, and each stays with the one
//! on which it hears the other, if its own server answers. Neither has to agree with the other on anything.

use std::time::{Duration, Instant};

/// How long traffic may go unanswered, in round trips, and the bounds of that: as with direct paths.
const ROUND_TRIPS: u32 = 3;
const SILENCE: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(1)];

/// Nothing was sent for so long: what was sent before has needed no answer, or QUIC's probes would have followed sooner (RFC 9002, section 6.2.1).
pub(crate) const LULL: Duration = Duration::from_secs(1);

/// How long what comes over the other relay means nothing after a doubt, besides three round trips: it is still under way.
const HOLD_OFF: Duration = Duration::from_millis(500);

/// What has been seen of the traffic since this was last told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct RelayTraffic {
    /// When the first datagram was sent after the last that came on the channel in use.
    pub(crate) unanswered_since: Option<Instant>,
    /// When the last one was sent.
    pub(crate) last_sent: Option<Instant>,
    /// Something has come on the channel in use.
    pub(crate) heard: bool,
    /// Something has come on another.
    pub(crate) elsewhere: bool,
}

/// What else counts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Circumstances {
    /// The server in use does not answer, or has forgotten the channel.
    pub(super) doubtful: bool,
    /// There is another one that can carry.
    pub(super) spare: bool,
    /// Of the session.
    pub(super) rtt: Option<Duration>,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Ask the server whether it is there.
    Ask,
    /// Send over both.
    Doubt,
    /// Send over the one in use alone.
    Keep,
    /// Send over the other alone, which is the one in use from now on.
    Move,
}

/// Watches one remote endpoint's relayed traffic.
#[derive(Debug, Default)]
pub(super) struct RelayWatch {
    doubt: Option<Doubt>,
    /// The unanswered traffic that the server was asked about.
    asked: Option<Instant>,
    elsewhere_from: Option<Instant>,
    next: Option<Instant>,
    /// Since when nothing has come, though what was sent wants an answer.
    silent: Option<Instant>,
    /// Something has come after a long silence.
    revived: bool,
}

/// Sending over both, and what has been heard since.
#[derive(Debug, Clone, Copy)]
struct Doubt {
    window: Instant,
    heard: bool,
    elsewhere: bool,
}

impl RelayWatch {
    pub(super) fn is_doubtful(&self) -> bool {
        self.doubt.is_some()
    }

    /// Another channel is in use, or none.
    pub(super) fn reset(&mut self) {
        let elsewhere_from = self.elsewhere_from;
        *self = Self { elsewhere_from, ..Self::default() };
    }

    /// Whether what was sent lately has had no answer, and wants one.
    pub(super) fn is_silent(&self) -> bool {
        self.silent.is_some()
    }

    /// Whether something has come after a long silence, once: what was sent before is lost, and QUIC would find that out late.
    pub(super) fn take_revival(&mut self) -> bool {
        std::mem::take(&mut self.revived)
    }

    /// Something has left since it was looked.
    pub(super) fn look_again(&mut self, now: Instant) {
        self.next = Some(now);
    }

    /// When to look again at the latest.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.next
    }

    /// Looks at what was seen; call it when something has changed, and when it is time.
    pub(super) fn poll(
        &mut self,
        traffic: RelayTraffic,
        about: Circumstances,
        now: Instant,
    ) -> Option<Verdict> {
        let rtt = about.rtt.unwrap_or(SILENCE[0]);
        let patience = (rtt * ROUND_TRIPS).clamp(SILENCE[0], SILENCE[1]);
        self.note_silence(traffic, patience, now);
        self.next = None;
        let verdict = match self.doubt {
            Some(doubt) => self.judge(doubt, traffic, about, patience, now),
            None => self.watch(traffic, about, patience, now),
        };
        match verdict {
            Some(Verdict::Doubt) => {
                self.doubt = Some(Doubt { window: now, heard: false, elsewhere: traffic.elsewhere });
                self.next = Some(now + patience);
            }
            Some(Verdict::Keep | Verdict::Move) => {
                self.doubt = None;
                self.asked = None;
                self.elsewhere_from = Some(now + HOLD_OFF + patience);
                self.next = None;
            }
            Some(Verdict::Ask) | None => {}
        }
        verdict
    }

    fn note_silence(&mut self, traffic: RelayTraffic, patience: Duration, now: Instant) {
        if traffic.heard {
            self.revived |= self.silent.take().is_some_and(|since| now >= since + LULL);
        } else if let (Some(since), Some(last_sent)) = (traffic.unanswered_since, traffic.last_sent)
            && now >= since + patience
            // A bare acknowledgement is not answered, and nothing follows it.
            && last_sent >= since + patience / ROUND_TRIPS
        {
            self.silent.get_or_insert(since);
        }
    }

    fn watch(
        &mut self,
        traffic: RelayTraffic,
        about: Circumstances,
        patience: Duration,
        now: Instant,
    ) -> Option<Verdict> {
        let elsewhere = traffic.elsewhere && self.elsewhere_from.is_none_or(|from| now >= from);
        if about.spare && (about.doubtful || elsewhere) {
            return Some(Verdict::Doubt);
        }
        let since = traffic.unanswered_since?;
        let last_sent = traffic.last_sent.unwrap_or(since);
        if self.asked != Some(since) {
            let ask_at = since + patience / 2;
            if now < ask_at {
                self.next = Some(ask_at);
                return None;
            }
            self.asked = Some(since);
            self.next = Some((since + patience).max(now + patience / 2));
            return Some(Verdict::Ask);
        }
        if now < since + patience {
            self.next = Some(since + patience);
            return None;
        }
        // A bare acknowledgement is not answered, and nothing follows it.
        if about.spare && last_sent >= since + patience / ROUND_TRIPS {
            return Some(Verdict::Doubt);
        }
        if now < last_sent + LULL {
            self.next = Some(now + patience / 2);
        }
        None
    }

    fn judge(
        &mut self,
        mut doubt: Doubt,
        traffic: RelayTraffic,
        about: Circumstances,
        patience: Duration,
        now: Instant,
    ) -> Option<Verdict> {
        doubt.heard |= traffic.heard;
        doubt.elsewhere |= traffic.elsewhere;
        if !about.spare || (doubt.heard && !about.doubtful) {
            return Some(Verdict::Keep);
        }
        let ends = doubt.window + patience;
        self.doubt = Some(doubt);
        if now < ends {
            self.next = Some(ends);
            return None;
        }
        if about.doubtful || doubt.elsewhere {
            return Some(Verdict::Move);
        }
        if traffic.last_sent.is_none_or(|sent| sent + LULL <= now) {
            return Some(Verdict::Keep);
        }
        self.doubt = Some(Doubt { window: now, heard: false, elsewhere: false });
        self.next = Some(now + patience);
        None
    }
}

#[cfg(test)]
#[path = "relay_watch_tests.rs"]
mod tests;
