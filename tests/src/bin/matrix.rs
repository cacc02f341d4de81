//! The table of every ordered pair of router kinds, each cell run many times.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use clap::Parser;
use end_to_end::cell::{self, Expected, Outcome};
use end_to_end::figures::Figures;
use end_to_end::world::World;
use netsim::{InputPolicy, RouterKind};

/// Dials from every kind of router to every kind and prints what came of it.
#[derive(Debug, Parser)]
struct Arguments {
    /// Runs of each cell.
    #[arg(long, default_value_t = 10)]
    runs: usize,
    /// What routers do with packets for nobody inside: drop or reject; both when not given.
    #[arg(long)]
    input: Vec<InputPolicy>,
    /// Cells that run at the same time.
    #[arg(long, default_value_t = 4)]
    jobs: usize,
    /// Only cells with this kind as dialler.
    #[arg(long)]
    dialler: Option<RouterKind>,
    /// Only cells with this kind as listener.
    #[arg(long)]
    listener: Option<RouterKind>,
}

/// How long a pair that is to stay relayed has to surprise us: more than a whole round of checks.
const RELAY_PATIENCE: Duration = Duration::from_secs(4);

#[derive(Debug, Default)]
struct Tally {
    direct: usize,
    relayed: usize,
    none: usize,
    failed: Vec<String>,
    first_byte: Figures,
    session_direct: Figures,
}

fn run_cell(a: RouterKind, b: RouterKind, input: InputPolicy, runs: usize) -> Tally {
    let mut tally = Tally::default();
    if let Err(error) = run_all(a, b, input, runs, &mut tally) {
        tally.failed.push(format!("{error:#}"));
    }
    tally
}

fn run_all(
    a: RouterKind,
    b: RouterKind,
    input: InputPolicy,
    runs: usize,
    tally: &mut Tally,
) -> anyhow::Result<()> {
    // What meets by chance has a budget for the easy side's router, which run after run would use up: each run in a lab of its own.
    let (labs, runs_each) = if cell::is_by_chance(a, b) { (runs, 1) } else { (1, runs) };
    for seed in 0..labs {
        run_in_lab(seed as u64, (a, b, input), runs_each, tally)?;
    }
    Ok(())
}

fn run_in_lab(
    seed: u64,
    (a, b, input): (RouterKind, RouterKind, InputPolicy),
    runs: usize,
    tally: &mut Tally,
) -> anyhow::Result<()> {
    let mut world = World::new(seed)?;
    let dialler = world.lab.add_site("a", cell::site(a, input))?;
    let listener = world.lab.add_site("b", cell::site(b, input))?;
    let (_listening, id) = match world.listener(&listener.host(0), "b", &["--echo"]) {
        Ok(listening) => listening,
        Err(_) if b == RouterKind::UdpBlocked => {
            tally.none += runs;
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    let patience = match cell::expected(a, b) {
        Expected::Direct => cell::patience(a, b),
        _ => RELAY_PATIENCE,
    };
    for _ in 0..runs {
        match cell::run(&world, &dialler.host(0), "a", &id, patience) {
            Ok(Outcome::Direct { first_byte, direct, .. }) => {
                tally.direct += 1;
                tally.first_byte.push(first_byte);
                tally.session_direct.push(direct);
            }
            Ok(Outcome::Relayed { first_byte }) => {
                tally.relayed += 1;
                tally.first_byte.push(first_byte);
            }
            Ok(Outcome::None { .. }) => tally.none += 1,
            Err(error) => tally.failed.push(format!("{error:#}")),
        }
    }
    Ok(())
}

fn print(
    input: InputPolicy,
    cells: &BTreeMap<(RouterKind, RouterKind), Tally>,
    arguments: &Arguments,
) -> bool {
    let runs = arguments.runs;
    println!(
        "\nWAN INPUT {input}, {runs} runs a cell; rows dial, columns listen. D direct, R relayed, - no session;"
    );
    println!("a number: how many of {runs} runs ended so, when not all; !: not what the kinds allow.\n");
    print!("{:<13}", "");
    for b in RouterKind::ALL {
        print!("{b:>13}");
    }
    println!();
    let (mut good, mut total) = (0, 0);
    let mut direct = Figures::default();
    let mut first = Figures::default();
    for a in RouterKind::ALL {
        print!("{a:<13}");
        for b in RouterKind::ALL {
            let Some(tally) = cells.get(&(a, b)) else {
                print!("{:>13}", "");
                continue;
            };
            let parts =
                [("D", tally.direct), ("R", tally.relayed), ("-", tally.none), ("E", tally.failed.len())];
            let text: Vec<String> = parts
                .iter()
                .filter(|(_, count)| *count > 0)
                .map(
                    |(letter, count)| {
                        if *count == runs { (*letter).to_owned() } else { format!("{letter}{count}") }
                    },
                )
                .collect();
            let as_expected = match cell::expected(a, b) {
                Expected::Direct => tally.direct == runs,
                Expected::Relayed => tally.relayed == runs,
                Expected::RelayedOrNone => tally.direct == 0 && tally.failed.is_empty(),
            };
            total += 1;
            good += usize::from(as_expected);
            let at_once = tally.direct > 0 && !cell::is_by_chance(a, b);
            direct.extend(at_once.then(|| tally.session_direct.median()));
            first.extend((tally.first_byte.count() > 0).then(|| tally.first_byte.median()));
            print!("{:>13}", format!("{}{}", text.join(" "), if as_expected { "" } else { " !" }));
        }
        println!();
    }
    println!("\n{good} of {total} cells as they should be.");
    let by_chance: Vec<_> = cells.iter().filter(|((a, b), _)| cell::is_by_chance(*a, *b)).collect();
    if !by_chance.is_empty() {
        println!("\nMet by birthday probing; ms from the dial to the session on the direct path:");
        for ((a, b), tally) in by_chance {
            let soon = tally.session_direct.share_up_to(8000.0) * 100.0;
            println!("  {a:>12} dials {b:<12} {:.0}, {soon:.0} % within 8 s", tally.session_direct);
        }
        println!();
    }
    println!(
        "Median of a cell, ms: first byte echoed {first:.0}; session on the direct path {direct:.0} (not by chance)"
    );
    for ((a, b), tally) in cells {
        for failure in &tally.failed {
            println!("{a} dials {b}: {failure}");
        }
    }
    good == total
}

fn main() -> ExitCode {
    end_to_end::program::main("matrix", |arguments| Ok(matrix(arguments)))
}

/// Runs what was asked for; whether every cell came out as it should.
fn matrix(mut arguments: Arguments) -> bool {
    if arguments.input.is_empty() {
        arguments.input = vec![InputPolicy::Drop, InputPolicy::Reject];
    }
    let mut all_good = true;
    for input in arguments.input.clone() {
        let wanted = |filter: Option<RouterKind>, kind| filter.is_none_or(|filter| filter == kind);
        let work: Vec<_> = RouterKind::ALL
            .into_iter()
            .flat_map(|a| RouterKind::ALL.into_iter().map(move |b| (a, b)))
            .filter(|(a, b)| wanted(arguments.dialler, *a) && wanted(arguments.listener, *b))
            .collect();
        let next = AtomicUsize::new(0);
        let cells = Mutex::new(BTreeMap::new());
        std::thread::scope(|scope| {
            for _ in 0..arguments.jobs.max(1) {
                scope.spawn(|| {
                    while let Some((a, b)) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let tally = run_cell(*a, *b, input, arguments.runs);
                        let mut cells = cells.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                        cells.insert((*a, *b), tally);
                        eprint!("\r{} of {} cells", cells.len(), work.len());
                    }
                });
            }
        });
        eprintln!();
        let cells = cells.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        all_good &= print(input, &cells, &arguments);
    }
    all_good
}
