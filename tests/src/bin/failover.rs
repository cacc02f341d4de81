//! How long a session is silent when its direct path dies, and how soon it is direct again.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use end_to_end::failover::{
    MOST_AFTER_IDLING, MOST_GAP, MOST_RETURN, Run, outages, reboots, run, run_idle, run_reboot,
};
use end_to_end::figures::Figures;

/// An echo every 20 ms between two EIM+APDF homes, 80 ms of round trip apart, whose direct path is cut or
/// whose router reboots; and one after a minute of silence, between routers that forget after 10 s. Each run has a lab of its own.
#[derive(Debug, Parser)]
struct Arguments {
    /// Runs of each outage.
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
    end_to_end::program::main("failover", |arguments: Arguments| Ok(failover(&arguments)))
}

/// All runs of one sort.
fn runs<T: Send>(
    one: impl Fn(u64) -> anyhow::Result<T> + Sync,
    arguments: &Arguments,
) -> Vec<anyhow::Result<T>> {
    let seeds: Vec<u64> = (1..=arguments.runs).collect();
    let batches = seeds.chunks(arguments.jobs.max(1)).map(|seeds| {
        std::thread::scope(|scope| {
            let running: Vec<_> = seeds.iter().map(|seed| scope.spawn(|| one(*seed))).collect();
            let ended = running
                .into_iter()
                .map(|running| running.join().unwrap_or_else(|_| anyhow::bail!("it panicked")));
            ended.collect::<Vec<_>>()
        })
    });
    batches.flatten().collect()
}

fn failover(arguments: &Arguments) -> bool {
    println!("{} runs of each; ms: median (least to greatest)", arguments.runs);
    let mut good = true;
    let wanted = |name: &str| name.contains(&arguments.only);
    for outage in outages().into_iter().filter(|outage| wanted(&outage.to_string())) {
        println!("\ncut {outage}");
        let bounds = [Some(MOST_GAP), Some(MOST_GAP), Some(MOST_RETURN)];
        good &= report(runs(|seed| run(seed, outage), arguments), bounds);
    }
    for reboot in reboots().into_iter().filter(|reboot| wanted(&reboot.to_string())) {
        println!("\n{reboot}");
        let bounds = [Some(reboot.most_gap()), None, None];
        good &= report(runs(|seed| run_reboot(seed, reboot), arguments), bounds);
    }
    if wanted(IDLE) {
        println!("\n{IDLE}");
        let mut figures = Figures::default();
        for run in runs(run_idle, arguments) {
            match run {
                Ok(took) => figures.push(took),
                Err(error) => {
                    println!("  {error:#}");
                    good = false;
                }
            }
        }
        println!("  {:<28}{:<28}at most {MOST_AFTER_IDLING}", "first echo", figures.to_string());
        good &= figures.max() <= MOST_AFTER_IDLING;
    }
    good
}

/// A minute without traffic, where a router forgets after 10 s.
const IDLE: &str = "idle_for_60_s";

/// A name, what it shows, its bound, what was measured.
type Column = (&'static str, fn(&Run) -> f64, Option<f64>, Figures);

/// Prints what all runs of one sort gave; whether it is within the bounds of the gap, the slowest echo and the return.
fn report(runs: Vec<anyhow::Result<Run>>, [gap, slowest, back]: [Option<f64>; 3]) -> bool {
    let mut columns: [Column; 5] = [
        ("gap between echoes before", |run| run.control, None, Figures::default()),
        ("slowest echo before", |run| run.control_slowest, None, Figures::default()),
        ("gap between echoes", |run| run.gap, gap, Figures::default()),
        ("slowest echo", |run| run.slowest, slowest, Figures::default()),
        ("direct again after", |run| run.back, back, Figures::default()),
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
    for (name, _, most, figures) in &columns {
        let bound = most.map(|most| format!("at most {most}")).unwrap_or_default();
        println!("  {name:<28}{:<28}{bound}", figures.to_string());
        good &= most.is_none_or(|most| figures.max() <= most);
    }
    good
}
