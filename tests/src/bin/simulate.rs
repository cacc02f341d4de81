//! Real agents and the real server core over the modelled internet, by the hundred thousand.

#![forbid(unsafe_code)]

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use end_to_end::simulation::tally::Tally;
use end_to_end::simulation::{Options, Scenario, run};

/// Runs peers in random networks and holds what comes of it against what the topology says.
#[derive(Debug, Parser)]
struct Arguments {
    /// How many networks.
    #[arg(long, default_value_t = 10_000)]
    runs: u64,
    /// The first one's seed; the others follow.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The share of packets that every line loses, 0 to 1.
    #[arg(long, default_value_t = 0.0, value_parser = share)]
    loss: f64,
    /// Threads; one per processor when not given.
    #[arg(long)]
    jobs: Option<usize>,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
    /// Run this seed alone and tell of every packet.
    #[arg(long)]
    replay: Option<u64>,
}

fn share(text: &str) -> Result<f64, String> {
    let share: f64 = text.parse().map_err(|error| format!("{error}"))?;
    if (0.0..=1.0).contains(&share) { Ok(share) } else { Err("a share from 0 to 1".into()) }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let options = Options { loss: arguments.loss, ..Options::default() };
    match arguments.replay {
        Some(seed) => replay(seed, &options),
        None => simulate(&arguments, &options),
    }
}

fn replay(seed: u64, options: &Options) -> ExitCode {
    print!("{}", Scenario::new(seed, options));
    let print = |line: &str| {
        // A reader that has seen enough is no failure.
        let _ = writeln!(std::io::stdout(), "{line}");
    };
    let run = run(seed, options, Instant::now(), Some(Box::new(print)));
    for pair in &run.pairs {
        let (one, other) = pair.peers;
        let verdict = if pair.agrees() { "as expected" } else { "NOT as expected" };
        println!(
            "peers {} and {}: expected {}, found {:?}: {verdict}",
            one + 1,
            other + 1,
            pair.verdict.name(),
            pair.outcome
        );
    }
    for violation in &run.violations {
        println!("violation: {violation}");
    }
    if run.agrees() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn simulate(arguments: &Arguments, options: &Options) -> ExitCode {
    let available = std::thread::available_parallelism().map_or(1, usize::from);
    let jobs = arguments.jobs.unwrap_or(available);
    let started = Instant::now();
    let terminal = std::io::stderr().is_terminal();
    let progress = |done: u64| {
        if terminal && done.is_multiple_of(100) {
            eprint!("\r{done} of {}", arguments.runs);
        }
    };
    let tally = Tally::of(arguments.seed, arguments.runs, options, jobs, progress);
    if terminal {
        eprint!("\r\x1b[K");
    }
    let failure = tally.check(options).err();
    if arguments.json {
        println!("{}", tally.json(options));
    } else {
        println!("{}", tally.table());
        println!(
            "{} runs at {} % loss in {:.1} s",
            tally.runs,
            options.loss * 100.0,
            started.elapsed().as_secs_f64()
        );
        for seed in &tally.unlucky {
            println!("simulate --loss {} --replay {seed}   # never met", options.loss);
        }
        for disagreement in &tally.disagreements {
            println!(
                "simulate --loss {} --replay {}   # {}",
                options.loss, disagreement.seed, disagreement.why
            );
        }
    }
    match failure {
        None => ExitCode::SUCCESS,
        Some(failure) => {
            eprintln!("{failure}");
            ExitCode::FAILURE
        }
    }
}
