//! Benchmarks work: of the relay, every load arrives whole at every program, and all of them are measured; `peer bench` measures what a session carries.

use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use end_to_end::process::{PATIENCE, binary};
use end_to_end::world::World;
use libtest_mimic::Trial;
use netsim::{Host, Impairment, RouterKind, SiteConfig};
use serde_json::Value;

use crate::setup::{befriend, friends, listen};
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("benchmarks::the_relay_is_measured_and_loses_nothing", relay),
        trial("benchmarks::a_session_is_measured_both_ways", a_session),
        trial("benchmarks::a_slow_line_is_measured_with_its_queue", a_slow_line),
        trial("benchmarks::nobody_is_measured_unasked", nobody_unasked),
    ]
}

/// What `peer bench nas` prints, a line each.
fn measured(world: &World, host: &Host, arguments: &[&str]) -> anyhow::Result<Vec<Value>> {
    let said = world.done(host, "laptop", &[&["bench", "nas", "--json"], arguments].concat())?;
    Ok(said.lines().map(serde_json::from_str).collect::<Result<_, _>>()?)
}

fn number(value: &Value, pointer: &str) -> anyhow::Result<f64> {
    value.pointer(pointer).and_then(Value::as_f64).with_context(|| format!("{pointer} in {value}"))
}

fn a_session() -> anyhow::Result<()> {
    let (world, a, b) = friends()?;
    let _listener = listen(&world, &b, &["--bench"])?;
    let all = measured(&world, &a, &["--seconds", "0.5"])?;
    let [idle, up, down, both] = &all[..] else { anyhow::bail!("{all:?}") };
    ensure!(idle["event"] == "idle" && number(idle, "/rtt/answered")? > 0.0, "{idle}");
    for (one, name, other) in [(up, "up", "down"), (down, "down", "up")] {
        ensure!(one["direction"] == name && one[other].is_null(), "{one}");
    }
    for (one, name) in [(up, "up"), (down, "down"), (both, "up"), (both, "down")] {
        let flow = &one[name];
        ensure!(flow["path"] == "direct" && number(flow, "/bits_per_second")? > 0.0, "{one}");
        ensure!(number(flow, "/packets_sent")? * 1500.0 > number(flow, "/bytes")?, "{one}");
        ensure!(number(one, "/rtt/answered")? > 0.0, "{one}");
    }
    // In words, one direction alone.
    let words = world.done(&a, "laptop", &["bench", "nas", "--seconds", "0.3", "--direction", "down"])?;
    ensure!(words.contains("down ") && words.contains("bit/s, direct") && !words.contains("up "), "{words}");
    Ok(())
}

/// 20 Mbit/s up, with a queue of 200 ms.
fn a_slow_line() -> anyhow::Result<()> {
    const RATE: f64 = 20e6;
    let mut world = World::new(7)?;
    let line = Impairment::none().rate(RATE as u64).queue((RATE / 8.0 * 0.2) as usize);
    let a = world.lab.add_site("a", SiteConfig::new(RouterKind::EimApdf).up(line))?.host(0);
    let b = world.lab.add_site("b", SiteConfig::new(RouterKind::EimApdf))?.host(0);
    befriend(&world, &a, &b)?;
    let _listener = listen(&world, &b, &["--bench"])?;
    let all = measured(&world, &a, &["--seconds", "2", "--direction", "up"])?;
    let up = all.last().context("figures")?;
    let rate = number(up, "/up/bits_per_second")?;
    ensure!((RATE / 2.0..RATE * 1.02).contains(&rate), "{rate:.0} bit/s of {RATE:.0}: {up}");
    let waiting = number(up, "/more_than_idle_ms")?;
    ensure!(waiting > 10.0, "a full queue that delays nothing: {up}");
    Ok(())
}

/// Nothing is measured but by those who may.
fn nobody_unasked() -> anyhow::Result<()> {
    let (world, a, b) = friends()?;
    let mut listener = listen(&world, &b, &["--echo"])?;
    let refused = world.run(&a, "laptop", &["bench", "nas", "--seconds", "0.3"])?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(
        refused.status.code() == Some(6) && said.contains("peer listen --bench"),
        "{}: {said}",
        refused.status
    );
    listener.event(|event| event["event"] == "denied", PATIENCE)?;
    Ok(())
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
