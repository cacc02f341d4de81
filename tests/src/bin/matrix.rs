//! Tables of ordered pairs of networks, each cell run many times.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use clap::Parser;
use end_to_end::cell::{self, Expected, Network, Outcome, Table, Way};
use end_to_end::figures::Figures;
use end_to_end::household::Household;
use end_to_end::world::World;
use netsim::{PortAllocation, RouterKind, SiteConfig};

/// Dials from every network of a table to every other and prints what came of it.
#[derive(Debug, Parser)]
struct Arguments {
    /// Runs of each cell.
    #[arg(long, default_value_t = 10)]
    runs: usize,
    /// Runs of each cell that meets by chance.
    #[arg(long, default_value_t = 20)]
    chance_runs: usize,
    /// Which pairs.
    #[arg(long, value_enum, default_value = "usual")]
    table: Table,
    /// Cells that run at the same time.
    #[arg(long, default_value_t = 4)]
    jobs: usize,
    /// Only cells with this network as dialler: a kind, or KIND+POLICY.
    #[arg(long)]
    dialler: Option<Network>,
    /// Only cells with this network as listener.
    #[arg(long)]
    listener: Option<Network>,
    /// Only cells that meet by chance.
    #[arg(long)]
    chance: bool,
    /// The listener is stopped for this long when it is dialled, milliseconds: it hears of the introduction late, when the dialler's checks are there.
    #[arg(long, default_value_t = 0)]
    late: u64,
    /// Another host of each site opens so many new flows a second.
    #[arg(long, default_value_t = 0)]
    busy: u32,
    /// From one port to the next where they are given in sequence.
    #[arg(long, default_value_t = 1)]
    step: u16,
}

impl Arguments {
    fn site(&self, network: Network) -> SiteConfig {
        let site = network.site();
        let site = if network.kind == RouterKind::ApdmSequential {
            site.allocation(PortAllocation::Sequential { step: self.step })
        } else {
            site
        };
        if self.busy > 0 { site.hosts(2) } else { site }
    }
}

/// How long a pair that is to stay relayed has to surprise us: more than a whole round of checks.
const RELAY_PATIENCE: Duration = Duration::from_secs(4);

type Pair = (Network, Network);

#[derive(Debug, Default)]
struct Tally {
    runs: usize,
    direct: usize,
    relayed: usize,
    none: usize,
    failed: Vec<String>,
    first_byte: Figures,
    session_direct: Figures,
    rungs: BTreeMap<String, usize>,
}

impl Tally {
    /// The share of all runs that were direct so soon after the dial, the time that the listener was held up not counted.
    fn share_within(&self, bound: Duration, late: Duration) -> f64 {
        let bound = (bound + late).as_secs_f64() * 1e3;
        self.session_direct.share_up_to(bound) * self.direct as f64 / self.runs as f64
    }

    fn is_as_promised(&self, way: Way, late: Duration) -> bool {
        let as_expected = match way.expected() {
            Expected::Direct if way == Way::Chance => true,
            Expected::Direct => self.direct == self.runs,
            Expected::Relayed | Expected::RelayedOverTcp => self.relayed == self.runs,
        };
        let in_time = way.promise().is_none_or(|(bound, share)| self.share_within(bound, late) >= share);
        as_expected && in_time && self.failed.is_empty()
    }

    fn summary(&self) -> String {
        let parts = [("D", self.direct), ("R", self.relayed), ("-", self.none), ("E", self.failed.len())];
        let parts = parts.iter().filter(|(_, count)| *count > 0);
        let text =
            parts.map(
                |(letter, count)| {
                    if *count == self.runs { (*letter).to_owned() } else { format!("{letter}{count}") }
                },
            );
        text.collect::<Vec<_>>().join(" ")
    }
}

fn run_cell((a, b): Pair, arguments: &Arguments) -> Tally {
    let way = Way::of(a, b);
    let runs = if way == Way::Chance { arguments.chance_runs } else { arguments.runs };
    let mut tally = Tally { runs, ..Tally::default() };
    // What takes more than plain checks leaves its traces in routers for a while, and has budgets: each run in a lab of its own.
    let (labs, runs_each) = match way {
        Way::Chance | Way::Meeting => (runs, 1),
        Way::AtOnce | Way::Never | Way::NoUdp => (1, runs),
    };
    for seed in 0..labs {
        if let Err(error) = run_in_lab(seed as u64, (a, b), runs_each, arguments, &mut tally) {
            tally.failed.push(format!("{error:#}"));
        }
    }
    tally
}

fn run_in_lab(
    seed: u64,
    (a, b): Pair,
    runs: usize,
    arguments: &Arguments,
    tally: &mut Tally,
) -> anyhow::Result<()> {
    let way = Way::of(a, b);
    let mut world = World::new(seed)?;
    let dialler = world.lab.add_site("a", arguments.site(a))?;
    let listener = world.lab.add_site("b", arguments.site(b))?;
    let mut households = Vec::new();
    if arguments.busy > 0 {
        let target = (world.server_host.ipv4(), 9).into();
        for site in [&dialler, &listener] {
            households.push(Household::start(&site.host(1), target, arguments.busy)?);
        }
    }
    let (listening, id) = world.listener(&listener.host(0), "b", &["--echo"])?;
    let patience = if way.expected() == Expected::Direct { way.patience() } else { RELAY_PATIENCE };
    let host = dialler.host(0);
    for _ in 0..runs {
        let mut dial = cell::Dial::new(&world, &host, "a", &id, patience);
        if arguments.late > 0 {
            dial = dial.held_up(&listening, Duration::from_millis(arguments.late));
        }
        match dial.run() {
            Ok(Outcome::Direct { first_byte, direct, rung, .. }) => {
                tally.direct += 1;
                tally.first_byte.push(first_byte);
                tally.session_direct.push(direct);
                *tally.rungs.entry(rung).or_default() += 1;
            }
            Ok(Outcome::Relayed { first_byte, .. }) => {
                tally.relayed += 1;
                tally.first_byte.push(first_byte);
            }
            Ok(Outcome::None { .. }) => tally.none += 1,
            Err(error) => tally.failed.push(format!("{error:#}")),
        }
    }
    Ok(())
}

/// The table as a grid, where it is one.
fn print_grid(cells: &BTreeMap<Pair, Tally>, late: Duration) {
    let mut columns: Vec<Network> = Vec::new();
    let mut rows: Vec<Network> = Vec::new();
    for (a, b) in cells.keys() {
        if !rows.contains(a) {
            rows.push(*a);
        }
        if !columns.contains(b) {
            columns.push(*b);
        }
    }
    columns.sort_unstable();
    let width = columns.iter().map(|network| network.to_string().len()).max().unwrap_or(0).max(8) + 2;
    print!("{:<20}", "");
    for b in &columns {
        print!("{b:>width$}");
    }
    println!();
    for a in rows {
        print!("{a:<20}");
        for b in &columns {
            let text = cells.get(&(a, *b)).map(|tally| {
                let good = tally.is_as_promised(Way::of(a, *b), late);
                format!("{}{}", tally.summary(), if good { "" } else { " !" })
            });
            print!("{:>width$}", text.unwrap_or_default());
        }
        println!();
    }
}

fn print(cells: &BTreeMap<Pair, Tally>, arguments: &Arguments) -> bool {
    let late = Duration::from_millis(arguments.late);
    let runs = arguments.runs;
    println!(
        "\n{runs} runs a cell, {} where the two meet by chance; rows dial, columns listen.",
        arguments.chance_runs
    );
    println!(
        "D direct, R relayed, - no session; a number: how many runs ended so, when not all; !: not as promised.\n"
    );
    print_grid(cells, late);
    let good = cells.iter().filter(|((a, b), tally)| tally.is_as_promised(Way::of(*a, *b), late)).count();
    let direct = cells.values().filter(|tally| tally.direct * 20 >= tally.runs * 19).count();
    println!("\n{good} of {} cells as promised; {direct} direct.", cells.len());
    for (way, words) in [
        (Way::AtOnce, "at once"),
        (Way::Meeting, "by primed checks or predicted ports, if not at once"),
        (Way::Chance, "by birthday probing"),
    ] {
        let of_way = cells.iter().filter(|((a, b), tally)| Way::of(*a, *b) == way && tally.direct > 0);
        let of_way: Vec<_> = of_way.collect();
        let Some((bound, _)) = way.promise().filter(|_| !of_way.is_empty()) else { continue };
        let mut medians = Figures::default();
        medians.extend(of_way.iter().map(|(_, tally)| tally.session_direct.median()));
        println!(
            "\nDirect {words}; ms from the dial to the session on the direct path, medians of cells {medians:.0}:"
        );
        for ((a, b), tally) in of_way {
            let share = tally.share_within(bound, late) * 100.0;
            if way != Way::AtOnce {
                let rungs: Vec<_> =
                    tally.rungs.iter().map(|(rung, count)| format!("{count} {rung}")).collect();
                println!(
                    "  {a:>18} dials {b:<18} {:.0}, {share:.0} % within {} s: {}",
                    tally.session_direct,
                    bound.as_secs(),
                    rungs.join(", ")
                );
            }
        }
    }
    let mut first = Figures::default();
    first.extend(
        cells.values().filter(|tally| tally.first_byte.count() > 0).map(|tally| tally.first_byte.median()),
    );
    println!("\nFirst byte echoed, medians of cells, ms: {first:.0}");
    for ((a, b), tally) in cells {
        for failure in &tally.failed {
            println!("{a} dials {b}: {failure}");
        }
    }
    good == cells.len()
}

fn main() -> ExitCode {
    end_to_end::program::main("matrix", |arguments| Ok(matrix(&arguments)))
}

/// Runs what was asked for; whether every cell came out as promised.
fn matrix(arguments: &Arguments) -> bool {
    let wanted = |filter: Option<Network>, network| filter.is_none_or(|filter| filter == network);
    let mut work = arguments.table.pairs();
    work.retain(|(a, b)| wanted(arguments.dialler, *a) && wanted(arguments.listener, *b));
    work.retain(|(a, b)| !arguments.chance || Way::of(*a, *b) == Way::Chance);
    let next = AtomicUsize::new(0);
    let cells = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..arguments.jobs.max(1) {
            scope.spawn(|| {
                while let Some(pair) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let tally = run_cell(*pair, arguments);
                    let mut cells = cells.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    cells.insert(*pair, tally);
                    eprint!("\r{} of {} cells", cells.len(), work.len());
                }
            });
        }
    });
    eprintln!();
    let cells = cells.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    print(&cells, arguments)
}
