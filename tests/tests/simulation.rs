//! Some thousand random networks. `make simulate` runs a hundred times as many.

#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Instant;

use end_to_end::simulation::tally::Tally;
use end_to_end::simulation::{Options, run};

fn simulate(first: u64, runs: u64, loss: f64) {
    let options = Options { loss };
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let tally = Tally::of(first, runs, &options, jobs, |_| {});
    let replay = tally.disagreements.iter().map(|it| {
        format!(
            "cargo run -p end-to-end --bin simulate -- --loss {loss} --replay {}   # {}\n",
            it.seed, it.why
        )
    });
    assert_eq!(tally.check(&options), Ok(()), "\n{}\n{}", tally.table(), replay.collect::<String>());
}

#[test]
fn what_can_be_direct_becomes_direct_and_nothing_else() {
    simulate(1, 2000, 0.0);
}

#[test]
fn with_one_packet_in_twenty_lost_nearly_everything_still_does() {
    simulate(1_000_000, 1000, 0.05);
}

#[test]
fn the_same_seed_gives_the_same_packets() {
    let packets = |seed| {
        let lines = Rc::new(RefCell::new(Vec::new()));
        let seen = lines.clone();
        let trace = Box::new(move |line: &str| seen.borrow_mut().push(line.to_owned()));
        let run = run(seed, &Options { loss: 0.1 }, Instant::now(), Some(trace));
        (run.pairs, lines.take())
    };
    for seed in 1..10 {
        let (first, second) = (packets(seed), packets(seed));
        assert!(!first.1.is_empty());
        assert_eq!(first, second, "seed {seed}");
    }
}
