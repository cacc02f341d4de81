//! A direct path that dies costs half a second, and is taken again when it is back.

use anyhow::ensure;
use end_to_end::failover::{
    MOST_AFTER_IDLING, MOST_GAP, MOST_RETURN, Outage, Reboot, outages, reboots, run, run_idle, run_reboot,
};
use libtest_mimic::Trial;

use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    let outages = outages().into_iter();
    let reboots = reboots().into_iter();
    let outages = outages.map(|outage| trial(format!("failover::{outage}"), move || cut(outage)));
    outages
        .chain(reboots.map(|reboot| trial(format!("failover::{reboot}"), move || forgotten(reboot))))
        .chain([trial("failover::a_minute_of_idleness_beyond_a_binding_lifetime_of_10_s", idle)])
        .collect()
}

fn cut(outage: Outage) -> anyhow::Result<()> {
    let run = run(1, outage)?;
    ensure!(run.gap <= MOST_GAP, "{run:?}");
    ensure!(run.back <= MOST_RETURN, "{run:?}");
    Ok(())
}

fn forgotten(reboot: Reboot) -> anyhow::Result<()> {
    let run = run_reboot(1, reboot)?;
    ensure!(run.gap <= reboot.most_gap(), "{run:?}");
    Ok(())
}

fn idle() -> anyhow::Result<()> {
    let took = run_idle(1)?;
    ensure!(took <= MOST_AFTER_IDLING, "{took} ms");
    Ok(())
}
