//! How long a dial takes over lines that lose packets.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use clap::Parser;
use end_to_end::cell::{Dial, Network, Outcome};
use end_to_end::figures::Figures;
use end_to_end::world::World;
use netsim::RouterKind;

/// Dials from one EIM+APDF home to another, each run in a lab of its own, and prints the quantiles of what it took.
#[derive(Debug, Parser)]
struct Arguments {
    /// Runs.
    #[arg(long, default_value_t = 50)]
    runs: usize,
    /// The share of packets that each home's line loses, in each direction.
    #[arg(long, default_value_t = 0.05)]
    loss: f64,
    /// Runs at the same time.
    #[arg(long, default_value_t = 4)]
    jobs: usize,
}

/// A run that is not direct by then has failed.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Debug, Default)]
struct Tally {
    first_byte: Figures,
    proven: Figures,
    direct: Figures,
    failed: Vec<String>,
}

fn run(seed: u64, loss: f64) -> anyhow::Result<Outcome> {
    let mut world = World::new(seed)?;
    let site = || Network::new(RouterKind::EimApdf).site().loss(loss);
    let dialler = world.lab.add_site("a", site())?;
    let listener = world.lab.add_site("b", site())?;
    let (_listening, id) = world.listener(&listener.host(0), "b", &["--echo"])?;
    Dial::new(&world, &dialler.host(0), "a", &id, PATIENCE).run()
}

fn main() -> ExitCode {
    end_to_end::program::main("lossy", |arguments| Ok(lossy(&arguments)))
}

fn lossy(arguments: &Arguments) -> bool {
    let next = AtomicUsize::new(0);
    let tally = Mutex::new(Tally::default());
    std::thread::scope(|scope| {
        for _ in 0..arguments.jobs.max(1) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= arguments.runs {
                        return;
                    }
                    let outcome = run(seed as u64, arguments.loss);
                    let mut tally = tally.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    match outcome {
                        Ok(Outcome::Direct { first_byte, proven, direct, .. }) => {
                            tally.first_byte.push(first_byte);
                            tally.proven.push(proven);
                            tally.direct.push(direct);
                        }
                        Ok(other) => tally.failed.push(format!("run {seed}: {other:?}")),
                        Err(error) => tally.failed.push(format!("run {seed}: {error:#}")),
                    }
                }
            });
        }
    });
    let tally = tally.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    println!(
        "{} runs, {} % loss each way on both homes' lines, 20 ms each; ms after the dial",
        arguments.runs,
        arguments.loss * 100.0
    );
    println!("{:<24}{:>9}{:>9}{:>9}{:>9}", "", "p50", "p90", "least", "most");
    for (name, figures) in [
        ("first byte echoed", &tally.first_byte),
        ("direct path proven", &tally.proven),
        ("session on it", &tally.direct),
    ] {
        let [p50, p90] = [0.5, 0.9].map(|share| figures.quantile(share));
        println!("{name:<24}{p50:>9.0}{p90:>9.0}{:>9.0}{:>9.0}", figures.min(), figures.max());
    }
    for failure in &tally.failed {
        println!("{failure}");
    }
    tally.failed.is_empty()
}
