//! The benchmark of the relay works: every load arrives whole at every program, and all of them are measured.

use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use end_to_end::process::binary;
use libtest_mimic::Trial;
use serde_json::Value;

use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![trial("benchmarks::the_relay_is_measured_and_loses_nothing", relay)]
}

fn relay() -> anyhow::Result<()> {
    // Not in a lab, whose programs have a process namespace of their own: it reads its programs' CPU time from /proc, and loopback is
    // all it needs.
    let mut command = Command::new(binary("relay_bench")?);
    let output = command.args(["--quick", "--json", "--flows", "1,16"]).stdin(Stdio::null()).output()?;
    let (said, complaint) = (String::from_utf8(output.stdout)?, String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{complaint}{said}");
    let report: Value = serde_json::from_str(&said)?;
    ensure!(report["lost"] == 0, "{report}");
    let loads = report["loads"].as_array().context("loads")?;
    for load in ["bulk, 1 flows", "bulk, 16 flows", "single datagrams", "sparse", "STUN"] {
        let found = loads.iter().find(|row| row["load"].as_str().is_some_and(|name| name.starts_with(load)));
        let programs =
            found.and_then(|row| row["programs"].as_array()).with_context(|| format!("no {load}"))?;
        ensure!(programs.len() >= 2, "nothing to compare: {report}");
        for program in programs {
            let measured = program["cpu_us"].as_array().context("figures")?;
            let spent = |cpu: &Value| cpu.as_f64().is_some_and(|cpu| cpu > 0.0 && cpu.is_finite());
            ensure!(!measured.is_empty() && measured.iter().all(spent), "{load}: {program}");
        }
    }
    ensure!(report["bounds"].as_array().is_some_and(|bounds| bounds.len() > 10), "{report}");
    Ok(())
}
