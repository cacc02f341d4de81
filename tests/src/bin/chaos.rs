//! Six peers, a stream between every two of them, and everything that can happen to a network, for as long as one likes.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use end_to_end::chaos::{Load, Manner, Settings, run};
use tokio::signal::unix::{SignalKind, signal};

/// Runs six peers in a lab, with a stream between every two of them, while paths are cut, peers move and sleep, routers reboot, UDP is
/// blocked and servers die. Nothing may be lost and no connection be made anew. Every stall is put down to its cause.
#[derive(Debug, Parser)]
struct Arguments {
    /// What happens, when and to whom follows from it.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How long.
    #[arg(long, default_value_t = 30.0)]
    minutes: f64,
    /// How many disturbances begin in a minute.
    #[arg(long, default_value_t = 8.0)]
    events_per_minute: f64,
    /// Seconds at the end in which nothing is wrong.
    #[arg(long, default_value_t = 30.0)]
    quiet_end: f64,
    /// Rendezvous servers. Of two, one is always up.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2))]
    servers: u8,
    /// Blocks a second from every peer to every other.
    #[arg(long, default_value_t = Load::default().rate)]
    rate: f64,
    /// Bytes of a block.
    #[arg(long, default_value_t = Load::default().block)]
    block: usize,
    /// Milliseconds of silence that count as a stall.
    #[arg(long, default_value_t = Load::default().threshold)]
    threshold: u64,
    /// An existing directory for the peers' logs; LAB_LOG says what is logged, peer=debug for instance.
    #[arg(long)]
    logs: Option<PathBuf>,
    /// Prints the report, every stall and every event as one JSON object, and the report in words on standard error.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    end_to_end::program::main("chaos", chaos)
}

fn chaos(arguments: Arguments) -> anyhow::Result<bool> {
    let settings = Settings {
        seed: arguments.seed,
        lasts: Duration::from_secs_f64(arguments.minutes * 60.0),
        events_per_minute: arguments.events_per_minute,
        quiet_end: Duration::from_secs_f64(arguments.quiet_end),
        servers: arguments.servers.into(),
    };
    let load = Load { rate: arguments.rate, block: arguments.block, threshold: arguments.threshold };
    let manner = Manner { load, logs: arguments.logs, progress: true };
    let report = run(&settings, &manner, &*stop_on_signal()?)?;
    if arguments.json {
        println!("{}", report.json());
        eprintln!("{report}");
    } else {
        println!("{report}");
    }
    Ok(report.is_good())
}

/// Becomes true at the first SIGINT or SIGTERM. At the second the process ends, and the lab with it.
fn stop_on_signal() -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let stopping = stop.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let guard = runtime.enter();
    let mut signals = [SignalKind::interrupt(), SignalKind::terminate()].map(signal).into_iter();
    let mut next = || signals.next().context("two signals")?.context("signals cannot be waited for");
    let (mut interrupt, mut terminate) = (next()?, next()?);
    drop(guard);
    std::thread::spawn(move || {
        runtime.block_on(async {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                if stopping.swap(true, Ordering::Relaxed) {
                    std::process::exit(130);
                }
                eprintln!("chaos: stopping");
            }
        });
    });
    Ok(stop)
}
