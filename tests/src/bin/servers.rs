//! How long a session is silent when a rendezvous server is lost, and how soon it is heard again when the only one is back.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use end_to_end::figures::Figures;
use end_to_end::servers::{Case, Pair, Run, cases, run};

/// An echo every 20 ms between two homes, 80 ms of round trip apart, whose rendezvous server is killed, or vanishes without a word:
/// one of two, or the only one. Each run has a lab of its own.
#[derive(Debug, Parser)]
struct Arguments {
    /// Runs of each loss.
    #[arg(long, default_value_t = 20)]
    runs: u64,
    /// Runs at the same time.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Only those whose name contains this.
    #[arg(default_value = "")]
    only: String,
}

fn main() -> ExitCode {
    end_to_end::program::main("servers", |arguments: Arguments| Ok(servers(&arguments)))
}

fn servers(arguments: &Arguments) -> bool {
    println!("{} runs of each; ms: median (least to greatest)", arguments.runs);
    let mut good = true;
    for case in cases().into_iter().filter(|case| case.to_string().contains(&arguments.only)) {
        println!("\n{case}");
        good &= report(case, runs(case, arguments));
    }
    good
}

fn runs(case: Case, arguments: &Arguments) -> Vec<anyhow::Result<Run>> {
    let seeds: Vec<u64> = (1..=arguments.runs).collect();
    let batches = seeds.chunks(arguments.jobs.max(1)).map(|seeds| {
        std::thread::scope(|scope| {
            let running: Vec<_> = seeds.iter().map(|seed| scope.spawn(|| run(*seed, case))).collect();
            let ended = running
                .into_iter()
                .map(|running| running.join().unwrap_or_else(|_| anyhow::bail!("it panicked")));
            ended.collect::<Vec<_>>()
        })
    });
    batches.flatten().collect()
}

/// A name, what it shows, its bound, what was measured.
type Column = (&'static str, fn(&Run) -> f64, Option<f64>, Figures);

/// Prints what all runs of one loss gave; whether it is within its bounds.
fn report(case: Case, runs: Vec<anyhow::Result<Run>>) -> bool {
    let mut columns: [Column; 4] = [
        ("gap between echoes before", |run| run.control, None, Figures::default()),
        ("gap between echoes", |run| run.gap, case.most_gap(), Figures::default()),
        ("echo after the return", |run| run.back, case.most_back(), Figures::default()),
        ("gap at a cut afterwards", |run| run.fallen_back, None, Figures::default()),
    ];
    let mut good = true;
    for (number, run) in (1..).zip(runs) {
        match run {
            Ok(run) => columns.iter_mut().for_each(|column| column.3.push((column.1)(&run))),
            Err(error) => {
                println!("  run {number}: {error:#}");
                good = false;
            }
        }
    }
    for (name, _, most, figures) in columns.iter().filter(|column| column.3.max() > 0.0) {
        let bound = most.map(|most| format!("at most {most}")).unwrap_or_default();
        println!("  {name:<28}{:<28}{bound}", figures.to_string());
        // What is to notice nothing is measured by what was before.
        let allowance = if case.pair == Pair::Direct { 2.0 * columns[0].3.max() } else { 0.0 };
        good &= most.is_none_or(|most| figures.max() <= most.max(allowance));
    }
    good
}
