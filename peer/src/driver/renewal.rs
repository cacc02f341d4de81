//! When to ask for a new introduction to a remote endpoint that there is a session with: the network has changed, or the introduction
//! is gone with its server. Pure.
//!
//! Both sides may ask, and both may be answered: the server tells both sides of every introduction in the same order, and the last one counts.

use std::time::{Duration, Instant};

use rand::Rng;
use rendezvous_wire::message::RequestId;

/// How long an answer may take before the next server is asked.
const PATIENCE: Duration = Duration::from_secs(1);

/// The first pause after a refusal: the other side may be on its way back to the same server. Doubled each time, up to [`LONGEST`].
const PAUSE: Duration = Duration::from_millis(100);

/// The longest pause.
const LONGEST: Duration = Duration::from_secs(30);

/// Whether one remote endpoint's introduction is to be renewed.
#[derive(Debug, Default)]
pub(super) struct Renewal {
    wanted: Option<Wanted>,
    /// When it may turn out that it is worth while.
    considered: Option<Instant>,
}

#[derive(Debug)]
struct Wanted {
    next: Instant,
    attempts: u32,
    asked: Option<RequestId>,
}

impl Renewal {
    /// It is, at once. What has been asked already is of no more use: it speaks of what was.
    pub(super) fn want(&mut self, now: Instant) {
        self.wanted = Some(Wanted { next: now, attempts: 0, asked: None });
    }

    /// It is, if it is not already.
    pub(super) fn want_still(&mut self, now: Instant) {
        if self.wanted.is_none() {
            self.want(now);
        }
    }

    /// It is from then on, if it is not already.
    pub(super) fn want_from(&mut self, from: Instant) {
        if self.wanted.is_none() {
            self.want(from);
        }
    }

    /// Something has turned up that helps where nothing else does: to be looked at again then.
    pub(super) fn consider(&mut self, at: Instant) {
        self.considered = Some(self.considered.map_or(at, |known| known.min(at)));
    }

    /// Whether that moment has come, once.
    pub(super) fn is_due(&mut self, now: Instant) -> bool {
        self.considered.take_if(|at| *at <= now).is_some()
    }

    /// Somebody is there again who can be asked: at once, if it is wanted.
    pub(super) fn hasten(&mut self, now: Instant) {
        if self.wanted.is_some() {
            self.want(now);
        }
    }

    /// When to ask next.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.wanted.as_ref().map(|wanted| wanted.next).into_iter().chain(self.considered).min()
    }

    /// How often it has been asked for, when it is time to ask once more: the next server each time.
    pub(super) fn poll(&mut self, now: Instant) -> Option<u32> {
        self.wanted.as_ref().filter(|wanted| wanted.next <= now).map(|wanted| wanted.attempts)
    }

    /// It was asked for; `request` is what an answer will name, if it names anything. `None` as well if nobody could be asked.
    pub(super) fn asked(&mut self, request: Option<RequestId>, random: &mut impl Rng, now: Instant) {
        if let Some(wanted) = &mut self.wanted {
            wanted.asked = request;
            let pause = PATIENCE.saturating_mul(1 << wanted.attempts.min(10)).min(LONGEST);
            wanted.next = now + pause.mul_f64(random.random_range(0.75..1.25));
            wanted.attempts += 1;
        }
    }

    /// Whether `request` is ours.
    pub(super) fn awaits(&self, request: RequestId) -> bool {
        self.wanted.as_ref().is_some_and(|wanted| wanted.asked == Some(request))
    }

    /// The server would not.
    pub(super) fn refused(&mut self, random: &mut impl Rng, now: Instant) {
        if let Some(wanted) = &mut self.wanted {
            wanted.asked = None;
            let pause = PAUSE.saturating_mul(1 << wanted.attempts.saturating_sub(1).min(10)).min(LONGEST);
            wanted.next = now + pause.mul_f64(random.random_range(0.75..1.25));
        }
    }

    /// There is a new one.
    pub(super) fn done(&mut self) {
        self.wanted = None;
        self.considered = None;
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    use super::*;

    #[test]
    fn it_is_asked_for_at_once_and_then_ever_more_rarely() {
        let mut random = StdRng::seed_from_u64(1);
        let start = Instant::now();
        let mut renewal = Renewal::default();
        assert_eq!(renewal.poll_timeout(), None);
        renewal.want(start);
        let mut asked = 0;
        while let Some(now) = renewal.poll_timeout().filter(|next| *next < start + Duration::from_mins(10)) {
            assert_eq!(renewal.poll(now), Some(asked));
            renewal.asked(Some(RequestId(asked.into())), &mut random, now);
            assert!(renewal.awaits(RequestId(asked.into())) && renewal.poll(now).is_none());
            asked += 1;
        }
        assert!((20..40).contains(&asked), "{asked}");
        renewal.done();
        assert_eq!(renewal.poll_timeout(), None);
    }

    #[test]
    fn a_refusal_is_followed_by_another_try_soon() {
        let mut random = StdRng::seed_from_u64(1);
        let start = Instant::now();
        let mut renewal = Renewal::default();
        renewal.want(start);
        let mut now = start;
        for _ in 0..4 {
            renewal.asked(Some(RequestId(1)), &mut random, now);
            renewal.refused(&mut random, now);
            assert!(!renewal.awaits(RequestId(1)));
            now = renewal.poll_timeout().unwrap();
        }
        assert!(now - start < Duration::from_secs(3), "{:?}", now - start);
        // News make it urgent again.
        renewal.want(now);
        assert_eq!(renewal.poll(now), Some(0));
    }
}
