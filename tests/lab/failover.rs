//! A direct path that dies costs half a second, and is taken again when it is back.

use std::time::Duration;

use anyhow::ensure;
use end_to_end::failover::{Outage, Reboot, outages, reboots, run, run_idle, run_reboot};
use libtest_mimic::Trial;
use netsim::Direction;

use crate::trial;

/// What a busy machine may take for what the figures show to be a matter of milliseconds; without failover it is 15 s and more.
const MOST: f64 = 3_000.0;

/// The long cut is tried both ways alone; `make failover` has them all.
const SHORT: Duration = Duration::from_secs(5);

pub(crate) fn trials() -> Vec<Trial> {
    let outages = outages().into_iter();
    let outages = outages.filter(|outage| outage.lasts == SHORT || outage.direction == Direction::Both);
    let reboots = reboots().into_iter();
    let outages = outages.map(|outage| trial(format!("failover::{outage}"), move || cut(outage)));
    outages
        .chain(reboots.map(|reboot| trial(format!("failover::{reboot}"), move || forgotten(reboot))))
        .chain([trial("failover::a_minute_of_idleness_beyond_a_binding_lifetime_of_10_s", idle)])
        .collect()
}

fn cut(outage: Outage) -> anyhow::Result<()> {
    let run = run(1, outage)?;
    ensure!(run.gap <= MOST, "{run:?}");
    ensure!(run.back <= 2.0 * MOST, "{run:?}");
    Ok(())
}

fn forgotten(reboot: Reboot) -> anyhow::Result<()> {
    let run = run_reboot(1, reboot)?;
    ensure!(run.gap <= MOST, "{run:?}");
    Ok(())
}

fn idle() -> anyhow::Result<()> {
    let took = run_idle(1)?;
    ensure!(took <= MOST, "{took} ms");
    Ok(())
}
