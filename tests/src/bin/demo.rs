//! The main job, shown: two homes behind NATs, a rendezvous server, a file sent through, and how long each step took beside the
//! least that any system with an introducing server can take.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::Parser;
use end_to_end::data::{consume, produce};
use end_to_end::figures::Figures;
use end_to_end::process::PATIENCE;
use end_to_end::world::{SITE_DELAY, World};
use netsim::{Host, RouterKind, SiteConfig};
use serde_json::{Value, json};

/// Two homes behind NATs, one rendezvous server, a file through a direct QUIC session.
#[derive(Debug, Parser)]
struct Arguments {
    /// Runs; the table gives medians.
    #[arg(long, default_value_t = 11)]
    runs: usize,
    /// Bytes of the file.
    #[arg(long, default_value_t = 20_000_000)]
    bytes: u64,
    /// Print a JSON object instead of a table.
    #[arg(long)]
    json: bool,
    /// Fail when a median is over its bound, not only when a run goes wrong.
    #[arg(long)]
    strict: bool,
}

/// One step of the time line.
struct Step {
    name: &'static str,
    /// The least possible, in milliseconds, and where that comes from.
    limit: f64,
    limit_is: &'static str,
    /// The most that we allow ourselves, as a multiple of the limit.
    allowed: Option<f64>,
    measured: Figures,
}

fn steps() -> Vec<Step> {
    // One way from either home to the server, and from home to home.
    let a = SITE_DELAY.as_secs_f64() * 1e3;
    let (b, d) = (a, 2.0 * a);
    let step = |name, limit, limit_is, allowed| Step {
        name,
        limit,
        limit_is,
        allowed,
        measured: Figures::default(),
    };
    vec![
        step("registered and bound", 6.0 * a, "6a", None),
        step("introduced", 2.0 * a, "2a", None),
        step("first byte echoed", 4.0 * (a + b), "4(a+b)", Some(1.05)),
        step("direct path proven", 2.0 * a + 2.0 * d, "2a+2d", Some(1.15)),
        step("session on it", 4.0 * (a + b), "the larger", Some(1.1)),
    ]
}

/// Sends the file once; the milliseconds of every step, and the path at the end.
fn run(world: &World, home: &Host, target: &str, seed: u64, bytes: u64) -> anyhow::Result<([f64; 5], Value)> {
    let mut peer = world.peer(home, "a", &["connect", target])?;
    let registered = peer.named("registered")?["ms"].as_f64().context("milliseconds")?;
    let (mut input, mut output) = (peer.stdin()?, peer.stdout()?);
    let writer = std::thread::spawn(move || produce(seed, bytes, &mut input));
    let (length, received) = consume(&mut output)?;
    let sent = writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
    ensure!(length == bytes && received == sent, "the file came back altered");
    let first_byte = peer.named("first_byte")?["since_dial_ms"].as_f64().context("milliseconds")?;
    let path = peer.event(|event| event["event"] == "path" && event["path"] == "direct", PATIENCE)?;
    let closed = peer.named("closed")?;
    ensure!(peer.wait(PATIENCE)?.success(), "not a clean end");
    let at = |name: &str| closed["timeline"][name].as_f64().with_context(|| format!("{name} in {closed}"));
    Ok(([registered, at("introduced_ms")?, first_byte, at("proven_ms")?, at("direct_ms")?], path))
}

fn demo(arguments: &Arguments) -> anyhow::Result<bool> {
    let mut world = World::new(1)?;
    let config = || SiteConfig::new(RouterKind::EimApdf).delay(SITE_DELAY);
    let a = world.lab.add_site("a", config())?;
    let b = world.lab.add_site("b", config())?;
    let (_listening, id) = world.listener(&b.host(0), "b", &["--echo"])?;
    if !arguments.json {
        println!(
            "Two homes, each behind a NAT (endpoint-independent mapping, address-and-port-dependent filtering),"
        );
        println!("20 ms from a rendezvous server, 40 ms from each other.\n");
        println!("  home a  {} behind {}", a.host(0).ipv4(), a.wan_ipv4());
        println!("  home b  {} behind {}    peer listen --echo", b.host(0).ipv4(), b.wan_ipv4());
        println!("  server  {}\n", world.address);
        println!("home a runs: peer connect {id}, {} MB through it and back\n", arguments.bytes / 1_000_000);
    }
    let mut steps = steps();
    let mut path = Value::Null;
    for number in 0..arguments.runs {
        let (times, direct) = run(&world, &a.host(0), &id, number as u64, arguments.bytes)?;
        for (step, time) in steps.iter_mut().zip(times) {
            step.measured.push(time);
        }
        path = direct;
    }
    let within =
        |step: &Step| step.allowed.is_none_or(|allowed| step.measured.median() <= allowed * step.limit);
    let good = steps.iter().all(within);
    if arguments.json {
        let steps: Vec<_> = steps
            .iter()
            .map(|step| {
                json!({
                    "step": step.name, "median_ms": step.measured.median(), "min_ms": step.measured.min(),
                    "max_ms": step.measured.max(), "limit_ms": step.limit, "allowed": step.allowed,
                })
            })
            .collect();
        println!("{}", json!({ "runs": arguments.runs, "steps": steps, "within": good }));
        return Ok(good);
    }
    println!(
        "  {:<22} {:>9}  {:>17}  {:>18}  {:>7}",
        "after the dial, ms", "median", "least to greatest", "limit", "ratio"
    );
    for step in &steps {
        let spread = format!("{:.1} to {:.1}", step.measured.min(), step.measured.max());
        let limit = format!("{:.0} = {}", step.limit, step.limit_is);
        let ratio = step.measured.median() / step.limit;
        let verdict = match step.allowed {
            Some(allowed) if within(step) => format!("  (at most {allowed})"),
            Some(allowed) => format!("  OVER {allowed}"),
            None => String::new(),
        };
        println!(
            "  {:<22} {:>9.1}  {spread:>17}  {limit:>18}  {ratio:>7.3}{verdict}",
            step.name,
            step.measured.median()
        );
    }
    println!("\n  (registered: counted from the start of the program; it includes binding at the relay)");
    println!("  path: {} -> {}, {}", path["local"], path["remote"], path["kind"]);
    println!("  {} of {} files came back intact, each over one connection", arguments.runs, arguments.runs);
    Ok(good)
}

fn main() -> ExitCode {
    end_to_end::program::main("demo", |arguments: Arguments| Ok(demo(&arguments)? || !arguments.strict))
}

/// Keeps the unit of [`SITE_DELAY`] honest in the text above.
const _: () = assert!(SITE_DELAY.as_millis() == Duration::from_millis(20).as_millis());
