//! Many peers behind one address come back to a server that was killed and started again.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use netsim::{RouterKind, SiteConfig};
use serde_json::Value;

use crate::echo::now;
use crate::process::Program;
use crate::world::{SITE_DELAY, World};

/// How soon the last must have registered again, in milliseconds after the server listens again.
pub const MOST: f64 = 10_000.0;

/// How long all may take, to begin with and to come back, before it is given up.
const PATIENCE: Duration = Duration::from_secs(120);

/// How often is looked whether all are back: rarely, since looking takes from the same cores.
const LOOK: Duration = Duration::from_millis(500);

/// What is run.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Peers in all.
    pub members: usize,
    /// Processes that they are spread over.
    pub processes: usize,
    /// How long the server is away.
    pub away: Duration,
}

/// What came of it; milliseconds after the server listened again.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    /// When half of all had registered.
    pub half: f64,
    /// When all had.
    pub last: f64,
    /// Attempts to connect that failed after the server listened again.
    pub failures: usize,
    /// CPU time of the server until then.
    pub cpu: f64,
    /// CPU time of all the members from then on until the last had registered.
    pub cpu_of_members: f64,
}

/// One herd in a lab of its own, behind a carrier's one address.
///
/// # Errors
///
/// When not all come back.
pub fn run(settings: &Settings) -> anyhow::Result<Run> {
    let mut world = World::new(1)?;
    let site = world.lab.add_site("a", SiteConfig::new(RouterKind::CarrierEim).delay(SITE_DELAY))?;
    let mut processes = Vec::new();
    for number in 0..settings.processes {
        let share = settings.members / settings.processes
            + usize::from(number < settings.members % settings.processes);
        let share = share.to_string();
        let arguments = ["--member-of", &world.address, "--members", &share];
        processes.push(Program::start(&site.host(0), "herd", &arguments, false)?);
    }
    // Their ends of it: they stop with it.
    let mut inputs = Vec::new();
    for process in &mut processes {
        inputs.push(process.stdin()?);
        process.event(|event| event["event"] == "ready", PATIENCE)?;
    }
    let killed = now();
    world.kill_server()?;
    std::thread::sleep(settings.away);
    world.start_server_again()?;
    let listening = now();
    let before = cpu_times(&processes)?;
    let deadline = Instant::now() + PATIENCE;
    let registered = loop {
        let registered = back(&mut processes, killed)?;
        if registered.len() == settings.members {
            break registered;
        }
        ensure!(Instant::now() < deadline, "only {} of {} are back", registered.len(), settings.members);
        std::thread::sleep(LOOK);
    };
    let cpu = world.server.cpu_time()?;
    let cpu_of_members = cpu_times(&processes)?.saturating_sub(before);
    let mut times: Vec<f64> =
        registered.values().map(|at| at.saturating_sub(listening) as f64 / 1e3).collect();
    times.sort_by(f64::total_cmp);
    let failed = |event: &&Value| event["event"] == "failed" && event["at"].as_u64() > Some(listening);
    let mut failures = 0;
    for process in &mut processes {
        for event in process.said().iter().filter(failed) {
            failures += 1;
            let after = event["at"].as_u64().unwrap_or_default().saturating_sub(listening) / 1_000;
            eprintln!("member {} after {after} ms: {}", event["member"], event["error"]);
        }
    }
    drop(inputs);
    for process in &mut processes {
        process.wait(PATIENCE)?;
    }
    Ok(Run {
        half: times[times.len() / 2],
        last: times.last().copied().unwrap_or_default(),
        failures,
        cpu: cpu.as_secs_f64() * 1e3,
        cpu_of_members: cpu_of_members.as_secs_f64() * 1e3,
    })
}

fn cpu_times(processes: &[Program]) -> anyhow::Result<Duration> {
    processes.iter().map(Program::cpu_time).sum()
}

/// When each has registered first after the server was killed.
fn back(processes: &mut [Program], killed: u64) -> anyhow::Result<BTreeMap<(usize, u64), u64>> {
    let mut registered = BTreeMap::new();
    for (number, process) in processes.iter_mut().enumerate() {
        for event in process.said().iter().filter(|event| event["event"] == "registered") {
            let at = event["at"].as_u64().context("a time")?;
            let member = event["member"].as_u64().context("a number")?;
            if at > killed {
                registered.entry((number, member)).or_insert(at);
            }
        }
    }
    Ok(registered)
}
