//! Some thousand random networks. `make simulate` runs a hundred times as many.

#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Instant;

use end_to_end::simulation::tally::Tally;
use end_to_end::simulation::{Handicap, Options, Verdict, run};

fn simulate(first: u64, runs: u64, loss: f64) {
    let options = Options { loss, ..Options::default() };
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

/// What a crippled agent does is noticed, each time by what it is that it lacks: an oracle that agreed with everything would be of no use.
#[test]
fn a_crippled_agent_disagrees() {
    let tally = |handicap| {
        let options = Options { handicap: Some(handicap), ..Options::default() };
        let jobs = std::thread::available_parallelism().map_or(1, usize::from);
        let tally = Tally::of(1, 80, &options, jobs, |_| {});
        (tally.check(&options), tally)
    };
    let found = |tally: &Tally, verdict, outcome| tally.cells.get(&(verdict, outcome)).copied().unwrap_or(0);

    let (check, no_meetings) = tally(Handicap::NoMeetings);
    assert!(check.is_err() && found(&no_meetings, Verdict::Predicted, "relayed") > 0);
    assert!(found(&no_meetings, Verdict::Plain, "relayed") > 0, "where a router must be primed");

    let (check, no_probing) = tally(Handicap::NoProbing);
    assert!(check.unwrap_err().contains("birthday"));
    assert_eq!(found(&no_probing, Verdict::Chance, "birthday"), 0);

    let (check, no_data) = tally(Handicap::NoData);
    let apart = |why: &String| why.contains("the two ends do not meet");
    assert!(check.is_err() && no_data.disagreements.iter().any(|it| apart(&it.why)));

    let (check, no_answers) = tally(Handicap::NoAnswers);
    assert!(check.is_err() && found(&no_answers, Verdict::Plain, "plain") == 0);
}

#[test]
fn the_same_seed_gives_the_same_packets() {
    let packets = |seed| {
        let lines = Rc::new(RefCell::new(Vec::new()));
        let seen = lines.clone();
        let trace = Box::new(move |line: &str| seen.borrow_mut().push(line.to_owned()));
        let run = run(seed, &Options { loss: 0.1, ..Options::default() }, Instant::now(), Some(trace));
        (run.pairs, lines.take())
    };
    for seed in 1..10 {
        let (first, second) = (packets(seed), packets(seed));
        assert!(!first.1.is_empty());
        assert_eq!(first, second, "seed {seed}");
    }
}
