//! Interleaved measurements of several programs, and their ratios.

use std::time::Duration;

use serde_json::{Value, json};

use super::contender::Contender;
use super::lanes::{Generator, Outcome, Pattern, Socket};
use super::subject::Subject;
use crate::figures::Figures;

/// What one program needed in the rounds of one load.
#[derive(Debug, Clone, Default)]
pub struct Cost {
    /// CPU µs per datagram.
    pub cpu: Vec<f64>,
    /// Datagrams a second, by the clock on the wall; the load is in that time as well.
    pub rate: Vec<f64>,
    /// Datagrams lost.
    pub lost: usize,
}

/// One load on several programs.
#[derive(Debug, Clone)]
pub struct Row {
    /// What it was.
    pub load: String,
    /// Bytes of a datagram's payload.
    pub payload: usize,
    /// Programs and their costs; rounds of the same place were measured one after the other.
    pub costs: Vec<(&'static str, Cost)>,
}

impl Row {
    /// The cost of a program.
    pub fn cost(&self, name: &str) -> Option<&Cost> {
        self.costs.iter().find(|(other, _)| *other == name).map(|(_, cost)| cost)
    }

    /// CPU of the one by that of the other, round by round.
    pub fn ratio(&self, one: &str, other: &str) -> Option<Figures> {
        let mut ratios = Figures::default();
        let (one, other) = (self.cost(one)?, self.cost(other)?);
        ratios.extend(one.cpu.iter().zip(&other.cpu).map(|(one, other)| one / other));
        Some(ratios)
    }

    /// How many datagrams were lost by all.
    pub fn lost(&self) -> usize {
        self.costs.iter().map(|(_, cost)| cost.lost).sum()
    }

    /// As JSON.
    pub fn json(&self) -> Value {
        let programs = self.costs.iter().map(|(name, cost)| {
            json!({ "program": name, "cpu_us": cost.cpu, "per_second": cost.rate, "lost": cost.lost })
        });
        json!({ "load": self.load, "payload": self.payload, "programs": programs.collect::<Vec<_>>() })
    }

    /// As lines of a table, ratios to `floor`.
    pub fn print(&self, floor: &str) {
        println!("\n{}", self.load);
        println!(
            "  {:<14}{:>26}{:>11}{:>9}{:>9}   ratio to {floor}",
            "", "CPU µs", "k/s a core", "Gbit/s", "k/s run"
        );
        for (name, cost) in &self.costs {
            let (cpu, rate) = (figures(&cost.cpu), figures(&cost.rate));
            let ratio = self.ratio(name, floor).map_or(String::new(), |ratio| format!("{ratio:.3}"));
            let lost = if cost.lost == 0 { String::new() } else { format!("  LOST {}", cost.lost) };
            println!(
                "  {name:<14}{:>26}{:>11.0}{:>9.2}{:>9.0}   {ratio}{lost}",
                format!("{cpu:.3}"),
                1e3 / cpu.median(),
                self.payload as f64 * 8e-3 / cpu.median(),
                rate.median() / 1e3,
            );
        }
    }
}

fn figures(values: &[f64]) -> Figures {
    let mut figures = Figures::default();
    figures.extend(values.iter().copied());
    figures
}

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Measurements of each program.
    pub rounds: usize,
    /// Datagrams of one measurement of a program that takes them one by one.
    pub datagrams: usize,
}

/// Forwards the same load through each program in turn, after one round that does not count.
///
/// # Errors
///
/// The system's, and a program that ends.
pub fn relay(
    generator: &mut Generator,
    contenders: &mut [&mut Contender],
    pattern: Pattern,
    payload: usize,
    effort: Effort,
) -> anyhow::Result<Row> {
    let flows = contenders.first().map_or(0, |contender| contender.lanes.len());
    let load = match pattern {
        Pattern::Bulk => format!("bulk, {flows} flows, {payload} bytes"),
        Pattern::Single => format!("single datagrams, {flows} flows, {payload} bytes"),
        Pattern::Sparse(rate) => format!("sparse, {flows} flows, {payload} bytes, {rate:.0} a second in all"),
    };
    for contender in &mut *contenders {
        contender.set_payload(payload);
    }
    let programs: Vec<_> =
        contenders.iter().map(|contender| (contender.name, vec![&contender.subject])).collect();
    rounds(load, payload, &programs, effort, |place, count| {
        let contender = &contenders[place];
        let many = pattern == Pattern::Bulk && contender.batches();
        let count = if many { count * 8 } else { count };
        generator.load(&contender.lanes, pattern, payload, count)
    })
}

/// Has each program in turn answer Binding requests, after one round that does not count.
///
/// # Errors
///
/// The system's, and a program that ends.
pub fn reflection(
    generator: &mut Generator,
    contenders: &mut [&mut Contender],
    effort: Effort,
) -> anyhow::Result<Row> {
    let socket = Socket::bind([0, 0, 0, 0].into())?;
    let programs: Vec<_> =
        contenders.iter().map(|contender| (contender.name, vec![&contender.subject])).collect();
    rounds("STUN Binding requests".to_owned(), 20, &programs, effort, |place, count| {
        let contender = &contenders[place];
        generator.reflect(&socket, contender.stun, contender.strangers, count)
    })
}

/// Has every program, or several as one, in turn do what `run` is told by its place and a number of datagrams, after one round that does not count.
///
/// # Errors
///
/// Those of `run`, and a program that ends.
pub fn rounds(
    load: String,
    payload: usize,
    programs: &[(&'static str, Vec<&Subject>)],
    effort: Effort,
    mut run: impl FnMut(usize, usize) -> anyhow::Result<Outcome>,
) -> anyhow::Result<Row> {
    let mut costs: Vec<_> = programs.iter().map(|(name, _)| (*name, Cost::default())).collect();
    for round in 0..=effort.rounds {
        for turn in 0..programs.len() {
            // Each is the first in its turn.
            let place = (turn + round) % programs.len();
            let cpu =
                || programs[place].1.iter().map(|subject| subject.cpu()).sum::<anyhow::Result<Duration>>();
            let count = if round == 0 { effort.datagrams / 4 } else { effort.datagrams };
            let before = cpu()?;
            let outcome = run(place, count)?;
            let spent = cpu()? - before;
            let cost = &mut costs[place].1;
            cost.lost += outcome.lost;
            if round > 0 {
                cost.cpu.push(spent.as_secs_f64() * 1e6 / outcome.sent as f64);
                cost.rate.push(outcome.sent as f64 / outcome.took.as_secs_f64());
            }
        }
    }
    Ok(Row { load, payload, costs })
}
