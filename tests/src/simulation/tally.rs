//! Many runs: counted by what was expected and what came of it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::oracle::Verdict;
use super::run::{Outcome, Pair, Run, run};
use super::scenario::Options;

/// What can come of a pair, in the order of the table.
const OUTCOMES: [&str; 6] = ["plain", "primed", "predicted", "birthday", "relayed", "no session"];

/// Introductions that reach both sides within this time begin their birthday attempts together.
const TOGETHER: Duration = Duration::from_millis(300);

/// The first birthday attempt is over by then.
const FIRST_ATTEMPT: Duration = Duration::from_secs(8);

/// The share of pairs that must agree when packets are lost; at no loss, all must.
const LEAST_AGREEING: f64 = 0.999;

/// The share of pairs that may stay on the relay, of those for whom a path is possible and not sure.
const MOST_MISSED: f64 = 0.01;

/// How many standard deviations a share may be off: with 4, one tally in 16,000 fails by chance.
const DEVIATIONS: f64 = 4.0;

/// A run that is not as it has to be.
#[derive(Debug, Clone, PartialEq)]
pub struct Disagreement {
    /// Its seed.
    pub seed: u64,
    /// What is wrong with it.
    pub why: String,
}

/// What came of birthday attempts, and what the formula says.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Birthdays {
    /// Pairs.
    pub pairs: u64,
    /// Those that met in the first attempt.
    pub met_first: u64,
    /// Those that never met, though they had more attempts than one.
    pub never_met: u64,
    /// How many are expected to meet in the first attempt, least and most: the sums of the probabilities, and of their variances.
    pub first: [Expected; 2],
    /// How many of these are expected at most.
    pub never: Expected,
}

/// A sum of independent events.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Expected {
    /// Its mean.
    pub mean: f64,
    /// Its variance.
    pub variance: f64,
}

impl Expected {
    fn add(&mut self, probability: f64) {
        self.mean += probability;
        self.variance += probability * (1.0 - probability);
    }

    fn merge(&mut self, other: Self) {
        self.mean += other.mean;
        self.variance += other.variance;
    }

    /// How far off it may be.
    fn slack(&self) -> f64 {
        DEVIATIONS * self.variance.sqrt() + 1.0
    }
}

impl Birthdays {
    fn add(&mut self, pair: &Pair) {
        let Some(chance) = pair.chance.filter(|_| pair.apart < TOGETHER) else { return };
        self.pairs += 1;
        let met = matches!(pair.outcome, Outcome::Direct { after, .. } if after < FIRST_ATTEMPT);
        self.met_first += u64::from(met);
        self.first[0].add(chance.first.0);
        self.first[1].add(chance.first.1);
        if chance.attempts > 1 {
            self.never_met += u64::from(pair.outcome == Outcome::Relayed);
            self.never.add(chance.never());
        }
    }

    fn merge(&mut self, other: Self) {
        self.pairs += other.pairs;
        self.met_first += other.met_first;
        self.never_met += other.never_met;
        self.first[0].merge(other.first[0]);
        self.first[1].merge(other.first[1]);
        self.never.merge(other.never);
    }

    /// From how many to how many have to meet in the first attempt, when a packet arrives with this probability.
    fn bounds(&self, arrives: f64) -> (f64, f64) {
        // A knock and the answer to it, or a probe and its answer, may be lost on two lines each, and are not repeated in time.
        let [least, most] = self.first;
        (least.mean * arrives.powi(4) - least.slack(), most.mean + most.slack())
    }

    fn check(&self, options: &Options) -> Result<(), String> {
        let (low, high) = self.bounds(1.0 - options.loss);
        let met = self.met_first as f64;
        if self.pairs > 0 && !(low..=high).contains(&met) {
            let pairs = self.pairs;
            return Err(format!(
                "{met} of {pairs} first birthday attempts met; {low:.0} to {high:.0} have to"
            ));
        }
        let most = self.never.mean + self.never.slack();
        if options.loss == 0.0 && self.never_met as f64 > most {
            return Err(format!("{} never met by birthday probing; {most:.1} may at most", self.never_met));
        }
        Ok(())
    }
}

/// What came of many runs.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    /// Runs.
    pub runs: u64,
    /// Pairs by verdict and outcome.
    pub cells: BTreeMap<(Verdict, &'static str), u64>,
    /// How long it took until both sides had selected, by verdict.
    pub times: BTreeMap<Verdict, Vec<Duration>>,
    /// Pairs that can only meet by chance and began together.
    pub birthdays: Birthdays,
    /// Pairs for which a path is possible and not sure, and those among them that have found none.
    pub unsure: (u64, u64),
    /// Seeds of runs in which two never met for whom a path was possible and not sure.
    pub unlucky: Vec<u64>,
    /// Runs that are not as they have to be, by seed.
    pub disagreements: Vec<Disagreement>,
}

impl Tally {
    /// Runs `count` seeds from `first` on, on so many threads. `progress` hears how many are done, now and then.
    pub fn of(first: u64, count: u64, options: &Options, jobs: usize, progress: impl Fn(u64) + Sync) -> Self {
        let next = AtomicU64::new(0);
        let done = AtomicU64::new(0);
        let total = Mutex::new(Self::default());
        let origin = Instant::now();
        let work = || {
            let mut own = Self::default();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= count {
                    break;
                }
                own.add_seed(first.wrapping_add(index), options, origin);
                progress(done.fetch_add(1, Ordering::Relaxed) + 1);
            }
            if let Ok(mut total) = total.lock() {
                total.merge(own);
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..jobs.max(1) {
                scope.spawn(work);
            }
        });
        let mut total = total.into_inner().unwrap_or_default();
        total.unlucky.sort_unstable();
        total.disagreements.sort_by_key(|disagreement| disagreement.seed);
        total.times.values_mut().for_each(|times| times.sort_unstable());
        total
    }

    fn add_seed(&mut self, seed: u64, options: &Options, origin: Instant) {
        match catch_unwind(AssertUnwindSafe(|| run(seed, options, origin, None))) {
            Ok(run) => self.add(&run),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("a panic");
                self.runs += 1;
                self.disagreements.push(Disagreement { seed, why: format!("panicked: {text}") });
            }
        }
    }

    fn add(&mut self, run: &Run) {
        self.runs += 1;
        for pair in &run.pairs {
            *self.cells.entry((pair.verdict, pair.outcome.name())).or_default() += 1;
            if let Outcome::Direct { after, .. } = pair.outcome {
                self.times.entry(pair.verdict).or_default().push(after);
            }
        }
        let unsure = |pair: &&Pair| {
            pair.bound.is_none() && matches!(pair.verdict, Verdict::Plain | Verdict::Predicted)
        };
        let missed = |pair: &&Pair| pair.outcome == Outcome::Relayed;
        self.unsure.0 += run.pairs.iter().filter(unsure).count() as u64;
        self.unsure.1 += run.pairs.iter().filter(unsure).filter(missed).count() as u64;
        let unlucky = |pair: &Pair| (unsure(&pair) || pair.verdict == Verdict::Chance) && missed(&pair);
        if run.pairs.iter().any(unlucky) {
            self.unlucky.push(run.seed);
        }
        // Where there are more, they share a budget.
        if let [pair] = &run.pairs[..] {
            self.birthdays.add(pair);
        }
        if !run.agrees() {
            self.disagreements.push(Disagreement { seed: run.seed, why: why(run) });
        }
    }

    fn merge(&mut self, other: Self) {
        self.runs += other.runs;
        for (cell, count) in other.cells {
            *self.cells.entry(cell).or_default() += count;
        }
        for (verdict, times) in other.times {
            self.times.entry(verdict).or_default().extend(times);
        }
        self.birthdays.merge(other.birthdays);
        self.unsure.0 += other.unsure.0;
        self.unsure.1 += other.unsure.1;
        self.unlucky.extend(other.unlucky);
        self.disagreements.extend(other.disagreements);
    }

    /// Why the whole is not as it has to be, if it is not.
    ///
    /// # Errors
    ///
    /// In words.
    pub fn check(&self, options: &Options) -> Result<(), String> {
        let agreeing = 1.0 - self.disagreements.len() as f64 / self.runs.max(1) as f64;
        let least = if options.loss == 0.0 { 1.0 } else { LEAST_AGREEING };
        if agreeing < least {
            return Err(format!("{:.3} % of runs agree, {:.1} % have to", agreeing * 100.0, least * 100.0));
        }
        let (unsure, missed) = self.unsure;
        let mut most = Expected::default();
        (0..unsure).for_each(|_| most.add(MOST_MISSED));
        if missed as f64 > most.mean + most.slack() {
            return Err(format!(
                "{missed} of {unsure} for whom a path was possible and not sure have found none"
            ));
        }
        self.birthdays.check(options)
    }

    /// A table for people.
    pub fn table(&self) -> String {
        let mut text = format!("{:<12}{:>9}", "expected", "pairs");
        for outcome in OUTCOMES {
            let _ = write!(text, "{outcome:>12}");
        }
        let _ = writeln!(text, "{:>12}{:>12}", "median", "99 %");
        for verdict in Verdict::ALL {
            let count = |outcome| self.cells.get(&(verdict, outcome)).copied().unwrap_or(0);
            let pairs: u64 = OUTCOMES.iter().map(|outcome| count(outcome)).sum();
            let _ = write!(text, "{:<12}{pairs:>9}", verdict.name());
            for outcome in OUTCOMES {
                let _ = match count(outcome) {
                    0 => write!(text, "{:>12}", "-"),
                    count => write!(text, "{count:>12}"),
                };
            }
            let times = self.times.get(&verdict).map_or(&[][..], Vec::as_slice);
            let at = |share: f64| {
                let place = (times.len() as f64 * share) as usize;
                times.get(place).map_or("-".into(), |time| format!("{:.0} ms", time.as_secs_f64() * 1e3))
            };
            let _ = writeln!(text, "{:>12}{:>12}", at(0.5), at(0.99));
        }
        let Birthdays { pairs, met_first, never_met, first: [least, most], never } = self.birthdays;
        let share = |count: f64| count / pairs.max(1) as f64 * 100.0;
        let _ = writeln!(
            text,
            "birthday attempts begun together: {met_first} of {pairs} met in the first ({:.2} %, by the formula {:.2} to {:.2} %), {never_met} never ({:.1} at most)",
            share(met_first as f64),
            share(least.mean),
            share(most.mean),
            never.mean
        );
        let (unsure, missed) = self.unsure;
        let _ =
            writeln!(text, "{missed} of {unsure} for whom a path was possible and not sure have found none");
        let _ = write!(text, "{} of {} runs disagree", self.disagreements.len(), self.runs);
        text
    }

    /// The same for programs.
    pub fn json(&self, options: &Options) -> Value {
        let cells = self.cells.iter().map(|((verdict, outcome), count)| {
            json!({ "expected": verdict.name(), "outcome": outcome, "pairs": count })
        });
        let disagreements = self.disagreements.iter().map(|it| json!({ "seed": it.seed, "why": it.why }));
        json!({
            "runs": self.runs,
            "loss": options.loss,
            "cells": cells.collect::<Vec<_>>(),
            "birthdays": {
                "pairs": self.birthdays.pairs,
                "met_first": self.birthdays.met_first,
                "expected": self.birthdays.first.map(|expected| expected.mean),
                "never_met": self.birthdays.never_met,
            },
            "unsure": { "pairs": self.unsure.0, "missed": self.unsure.1 },
            "unlucky": self.unlucky,
            "disagreements": disagreements.collect::<Vec<_>>(),
            "failure": self.check(options).err(),
        })
    }
}

fn why(run: &Run) -> String {
    let wrong = run.pairs.iter().filter(|pair| !pair.agrees()).map(|pair: &Pair| {
        let (one, other) = pair.peers;
        let (expected, outcome) = (pair.verdict.name(), pair.outcome.name());
        let after = match pair.outcome {
            Outcome::Direct { after, .. } => format!(" after {:.1} s", after.as_secs_f64()),
            _ => String::new(),
        };
        format!("peers {} and {}: expected {expected}, found {outcome}{after}", one + 1, other + 1)
    });
    let all: Vec<String> = wrong.chain(run.violations.iter().cloned()).collect();
    all.join("; ")
}

#[cfg(test)]
mod tests {
    use peer_agent::Rung;

    use super::*;
    use crate::simulation::oracle::Chance;

    fn run(verdict: Verdict, outcome: Outcome) -> Run {
        let pair = Pair {
            peers: (0, 1),
            verdict,
            outcome,
            apart: Duration::ZERO,
            bound: Some(Duration::from_secs(5)),
            chance: (verdict == Verdict::Chance).then_some(Chance { first: (0.966, 0.981), attempts: 3 }),
        };
        Run { seed: 7, pairs: vec![pair], violations: Vec::new() }
    }

    fn met(after: u64) -> Outcome {
        Outcome::Direct { rung: Rung::Birthday, after: Duration::from_secs(after) }
    }

    fn tally(runs: impl IntoIterator<Item = Run>) -> Tally {
        let mut tally = Tally::default();
        runs.into_iter().for_each(|run| tally.add(&run));
        tally
    }

    #[test]
    fn whatever_is_not_as_it_has_to_be_is_noticed() {
        let (lossless, lossy) = (Options::default(), Options { loss: 0.05, ..Options::default() });
        let good = || std::iter::repeat_n(run(Verdict::Plain, met(1)), 2000);
        assert_eq!(tally(good()).check(&lossless), Ok(()));
        for bad in [
            run(Verdict::Plain, Outcome::Relayed),
            run(Verdict::Plain, met(6)),
            run(Verdict::Never, met(1)),
            run(Verdict::Predicted, Outcome::NoSession),
            Run { violations: vec!["relayed for a stranger".into()], ..run(Verdict::Plain, met(1)) },
        ] {
            let one = tally(good().chain([bad.clone()]));
            assert_eq!(one.disagreements.len(), 1);
            assert!(one.check(&lossless).is_err() && one.check(&lossy).is_ok());
            assert!(tally(good().chain(std::iter::repeat_n(bad, 3))).check(&lossy).is_err());
        }
    }

    #[test]
    fn the_first_birthday_attempts_go_by_the_formula() {
        let share = |met_at_once: usize| {
            let first = std::iter::repeat_n(run(Verdict::Chance, met(2)), met_at_once);
            let later = std::iter::repeat_n(run(Verdict::Chance, met(42)), 1000 - met_at_once);
            tally(first.chain(later)).check(&Options::default())
        };
        assert!(share(975).is_ok());
        assert!(share(930).is_err() && share(1000).is_err());
        let never = |count| {
            let met = std::iter::repeat_n(run(Verdict::Chance, met(2)), 975);
            let missed = std::iter::repeat_n(run(Verdict::Chance, Outcome::Relayed), count);
            let later = std::iter::repeat_n(
                run(
                    Verdict::Chance,
                    Outcome::Direct { rung: Rung::Birthday, after: Duration::from_secs(42) },
                ),
                25 - count,
            );
            tally(met.chain(missed).chain(later)).check(&Options::default())
        };
        assert!(never(1).is_ok() && never(3).is_err());
    }
}
