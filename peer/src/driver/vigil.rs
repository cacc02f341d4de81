//! Whether a rendezvous server still answers: asked when something that it should have answered is unanswered, and for as long as it is away. Pure.
//!
//! A server that is started anew has forgotten us, and a connection that it has forgotten learns of that late or never: by asking it four times a second
//! a session that it relays goes on as soon as it is back. Who has none asks once a second: two thousand peers that wait would else ask eight thousand times.

use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

/// How long questions may go unanswered, in round trips to the server: as with direct paths.
const ROUND_TRIPS: u32 = 3;

/// Bounds of that.
const SILENCE: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(1)];

/// The round trip as long as none was measured.
const UNKNOWN_RTT: Duration = Duration::from_millis(150);

/// Questions within that time: one may be lost, and its loss is no reason for doubt.
const ASKS: u32 = 4;

/// Pause between two questions to a server that is in doubt, for the first minute, where somebody waits for it.
const PAUSE: Duration = Duration::from_millis(250);

/// The same where nobody does, for the first four.
const PATIENT_PAUSE: Duration = Duration::from_secs(1);

/// Later it grows with the time that the server has been away.
const SHARE: u32 = 240;

/// Longest pause.
const LONGEST: Duration = Duration::from_secs(5);

/// Watches one server.
#[derive(Debug)]
pub(super) struct Vigil {
    state: State,
    /// Whether somebody waits for it: a session that it relays, or a dial.
    urgent: bool,
    rtt: Option<Duration>,
    /// Of the first question that is not answered yet, to measure by.
    asked: Option<Instant>,
    random: StdRng,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Trusted,
    /// There was a reason to ask.
    Asked {
        since: Instant,
        asks: u32,
    },
    /// It does not answer, or its connection is gone.
    Doubtful {
        since: Instant,
        next: Instant,
    },
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Ask it.
    Ask,
    /// It has become doubtful; what it relays should go another way as well.
    Doubt,
}

impl Vigil {
    /// `seed` keeps the peers of one server from asking all at once.
    pub(super) fn new(seed: u64) -> Self {
        Self {
            state: State::Trusted,
            urgent: false,
            rtt: None,
            asked: None,
            random: StdRng::seed_from_u64(seed),
        }
    }

    /// Something that it should have answered, or passed on, is unanswered.
    pub(super) fn suspect(&mut self, now: Instant) {
        if self.state == State::Trusted {
            self.state = State::Asked { since: now, asks: 0 };
        }
    }

    /// This machine has slept: what was unanswered says nothing, and it is asked again.
    pub(super) fn wake(&mut self, now: Instant) {
        self.asked = None;
        self.state = State::Asked { since: now, asks: 0 };
    }

    /// Whether somebody waits for it from now on.
    pub(super) fn set_urgent(&mut self, urgent: bool, now: Instant) {
        if urgent
            && !self.urgent
            && let State::Doubtful { since, next } = self.state
        {
            self.state = State::Doubtful { since, next: next.min(now + self.jittered(PAUSE)) };
        }
        self.urgent = urgent;
    }

    fn pause(&self) -> Duration {
        if self.urgent { PAUSE } else { PATIENT_PAUSE }
    }

    /// Its connection is gone. True when it was not in doubt already.
    pub(super) fn lose(&mut self, now: Instant) -> bool {
        let fresh = !self.is_doubtful();
        if fresh {
            // Anywhere within one pause: everybody loses it at the same moment.
            let first = self.pause().mul_f64(self.random.random_range(0.25..1.25));
            self.state = State::Doubtful { since: now, next: now + first };
        }
        fresh
    }

    /// It has answered a question, or has let us register. True when that ends a doubt.
    pub(super) fn handle_answer(&mut self, now: Instant) -> bool {
        if let Some(asked) = self.asked.take() {
            let sample = now.saturating_duration_since(asked);
            // As RFC 6298 smooths, section 2.3.
            self.rtt = Some(self.rtt.map_or(sample, |rtt| (rtt * 7 + sample) / 8));
        }
        let doubtful = self.is_doubtful();
        self.state = State::Trusted;
        doubtful
    }

    pub(super) fn is_doubtful(&self) -> bool {
        matches!(self.state, State::Doubtful { .. })
    }

    /// How long a question may go unanswered.
    pub(super) fn patience(&self) -> Duration {
        (self.rtt.unwrap_or(UNKNOWN_RTT) * ROUND_TRIPS).clamp(SILENCE[0], SILENCE[1])
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        match self.state {
            State::Trusted => None,
            // The last quarter is for the last answer.
            State::Asked { since, asks } => Some(since + self.patience() * asks / ASKS),
            State::Doubtful { next, .. } => Some(next),
        }
    }

    /// What is due.
    pub(super) fn poll(&mut self, now: Instant) -> Option<Step> {
        if self.poll_timeout().is_none_or(|at| now < at) {
            return None;
        }
        match self.state {
            State::Trusted => None,
            State::Asked { since, asks } if asks < ASKS => {
                self.state = State::Asked { since, asks: asks + 1 };
                self.asked.get_or_insert(now);
                Some(Step::Ask)
            }
            State::Asked { since, .. } => {
                self.asked = None;
                self.state = State::Doubtful { since, next: now };
                Some(Step::Doubt)
            }
            State::Doubtful { since, .. } => {
                let away = now.saturating_duration_since(since);
                let pause = (away / SHARE).clamp(self.pause(), LONGEST);
                self.state = State::Doubtful { since, next: now + self.jittered(pause) };
                Some(Step::Ask)
            }
        }
    }

    /// From three to five quarters.
    fn jittered(&mut self, pause: Duration) -> Duration {
        pause.mul_f64(self.random.random_range(0.75..1.25))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// When it asks until it doubts, after so many milliseconds.
    fn until_doubt(vigil: &mut Vigil, start: Instant) -> (Vec<u128>, u128) {
        let mut asked = Vec::new();
        loop {
            let now = vigil.poll_timeout().unwrap();
            match vigil.poll(now).unwrap() {
                Step::Ask => asked.push((now - start).as_millis()),
                Step::Doubt => return (asked, (now - start).as_millis()),
            }
        }
    }

    #[test]
    fn a_server_that_does_not_answer_is_in_doubt_after_three_round_trips() {
        for (rtt, patience) in [(10, 200), (80, 240), (200, 600), (2_000, 1_000)] {
            let start = Instant::now();
            let mut vigil = Vigil::new(1);
            assert_eq!(vigil.poll_timeout(), None);
            vigil.suspect(start);
            assert_eq!(vigil.poll(start), Some(Step::Ask));
            let answered = start + rtt * MS;
            assert!(!vigil.handle_answer(answered));
            assert_eq!(vigil.poll_timeout(), None, "it has answered");
            vigil.suspect(answered);
            vigil.suspect(answered + MS);
            let (asked, doubt) = until_doubt(&mut vigil, answered);
            assert_eq!((asked.len(), doubt), (4, patience), "{rtt}");
            assert!(vigil.is_doubtful());
        }
    }

    #[test]
    fn questions_from_before_a_sleep_put_nothing_in_doubt() {
        let start = Instant::now();
        let mut vigil = Vigil::new(1);
        vigil.suspect(start);
        assert_eq!(vigil.poll(start), Some(Step::Ask));
        // The timers are looked at before anybody knows of the sleep.
        let awake = start + 20_000 * MS;
        while let Some(Step::Ask) = vigil.poll(awake) {}
        assert!(vigil.is_doubtful());
        vigil.wake(awake);
        assert!(!vigil.is_doubtful());
        let (asked, doubt) = until_doubt(&mut vigil, awake);
        assert_eq!((asked.len(), doubt), (4, 450), "as ever from then on");
    }

    #[test]
    fn it_is_asked_four_times_a_second_for_a_minute_and_less_and_less_often_then() {
        let start = Instant::now();
        let mut vigil = Vigil::new(7);
        vigil.set_urgent(true, start);
        assert!(vigil.lose(start));
        assert!(!vigil.lose(start + MS), "already in doubt");
        let mut times = vec![start];
        while let Some(now) = vigil.poll_timeout().filter(|at| *at < start + Duration::from_hours(1)) {
            assert_eq!(vigil.poll(now), Some(Step::Ask));
            times.push(now);
        }
        for pair in times.windows(2) {
            let (pause, away) = (pair[1] - pair[0], pair[0] - start);
            let most = if away < Duration::from_mins(1) { 313 * MS } else { LONGEST.mul_f64(1.25) };
            let least = if away.is_zero() { 62 * MS } else { 187 * MS };
            assert!(pause >= least && pause <= most, "{pause:?} after {away:?}");
        }
        let first_minute = times.iter().filter(|at| **at < start + Duration::from_mins(1)).count();
        assert!((220..260).contains(&first_minute), "{first_minute}");
        assert!(times.len() < 2_000, "{}", times.len());
        assert!(vigil.handle_answer(start + Duration::from_hours(1)), "back after silence");
        assert!(!vigil.is_doubtful());
    }

    /// What reaches a server from two thousand peers that have all lost it at the same moment.
    #[test]
    fn many_peers_do_not_ask_at_the_same_moment() {
        let start = Instant::now();
        let mut in_slot = [0u32; 50];
        for seed in 0..2_000 {
            let mut vigil = Vigil::new(seed);
            vigil.lose(start);
            while let Some(now) = vigil.poll_timeout().filter(|at| *at < start + 5_000 * MS) {
                vigil.poll(now);
                in_slot[(now - start).as_millis() as usize / 100] += 1;
            }
        }
        // 200 in every tenth of a second, after a moment's pause.
        for (slot, count) in in_slot.iter().enumerate() {
            assert!(*count < 300, "{count} in slot {slot}");
            assert!(slot < 3 || *count > 120, "{count} in slot {slot}");
        }
    }

    #[test]
    fn who_gets_somebody_that_waits_does_not_wait_for_the_patient_question() {
        let start = Instant::now();
        let mut vigil = Vigil::new(3);
        vigil.lose(start);
        assert!(vigil.poll_timeout().unwrap() >= start + 250 * MS);
        vigil.set_urgent(true, start + 100 * MS);
        assert!(vigil.poll_timeout().unwrap() <= start + 413 * MS);
        vigil.set_urgent(true, start + 200 * MS);
        assert!(vigil.poll_timeout().unwrap() <= start + 413 * MS, "put off");
    }
}
