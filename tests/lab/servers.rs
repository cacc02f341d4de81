//! A session outlives its rendezvous server.

use std::time::Duration;

use anyhow::ensure;
use end_to_end::herd;
use end_to_end::servers::{Case, Loss, cases, run};
use libtest_mimic::Trial;

use crate::trial;

/// What a busy machine may take for what the figures show to be less than a second; without it sessions end, or wait for a time-out of 45 s.
const MOST: f64 = 5_000.0;

/// `make servers` has the long ones.
const SHORT: Duration = Duration::from_secs(5);

pub(crate) fn trials() -> Vec<Trial> {
    let short = |case: &Case| !matches!(case.loss, Loss::Restarted(after) if after > SHORT);
    let cases = cases().into_iter().filter(short);
    let trials = cases.map(|case| trial(format!("servers::{case}"), move || outlived(case)));
    trials.chain([trial("servers::two_hundred_come_back", two_hundred_come_back)]).collect()
}

fn outlived(case: Case) -> anyhow::Result<()> {
    let run = run(1, case)?;
    if case.most_gap().is_some() {
        ensure!(run.gap <= MOST, "{run:?}");
    }
    ensure!(run.back <= MOST && run.fallen_back <= MOST, "{run:?}");
    Ok(())
}

fn two_hundred_come_back() -> anyhow::Result<()> {
    let run = herd::run(&herd::Settings { members: 200, processes: 1, away: Duration::from_secs(2) })?;
    ensure!(run.failures == 0, "{run:?}");
    ensure!(run.last <= 20_000.0, "{run:?}");
    Ok(())
}
