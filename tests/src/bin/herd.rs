//! How soon 2,000 peers behind one address are registered again when their server was killed and is there again.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use end_to_end::echo::now;
use end_to_end::herd::{MOST, Settings, run};
use peer::{Endpoint, RendezvousAddress, ServerState};
use serde_json::json;
use tokio::io::AsyncReadExt as _;

/// Peers that wait to be called, all behind one address of a carrier's, 20 ms from their server: it is killed, and started again.
#[derive(Debug, Parser)]
struct Arguments {
    /// Peers in all.
    #[arg(long, default_value_t = 2_000)]
    members: usize,
    /// Processes that they are spread over.
    #[arg(long, default_value_t = 4)]
    processes: usize,
    /// Seconds that the server is away; several are tried one after the other.
    #[arg(long, value_delimiter = ',', default_value = "0,5,30")]
    away: Vec<u64>,
    /// Be the peers, of this server.
    #[arg(long, hide = true)]
    member_of: Option<RendezvousAddress>,
}

/// Peers of one process that register at the same time, to begin with.
const AT_ONCE: usize = 8;

fn main() -> ExitCode {
    end_to_end::program::main("herd", |arguments: Arguments| match arguments.member_of.clone() {
        Some(server) => members(&server, arguments.members).map(|()| true),
        None => herd(&arguments),
    })
}

fn herd(arguments: &Arguments) -> anyhow::Result<bool> {
    let Arguments { members, processes, .. } = *arguments;
    println!("{members} peers; ms after the server listens again");
    let mut good = true;
    for away in arguments.away.iter().copied().map(Duration::from_secs) {
        let run = run(&Settings { members, processes, away })?;
        println!(
            "  away for {:>2} s: half {:.0}, all {:.0} (at most {MOST}); {} failed attempts; CPU: server {:.0} ms, peers {:.0} ms",
            away.as_secs(),
            run.half,
            run.last,
            run.failures,
            run.cpu,
            run.cpu_of_members
        );
        good &= run.last <= MOST && run.failures == 0;
    }
    Ok(good)
}

/// Registers so many peers, and tells on standard output what becomes of them, until standard input ends.
fn members(server: &RendezvousAddress, count: usize) -> anyhow::Result<()> {
    if std::env::var_os("RUST_LOG").is_some() {
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut endpoints = Vec::new();
        for member in 0..count {
            let endpoint = Endpoint::builder().server(server.clone()).port_mapping(false).bind().await?;
            let mut changes = endpoint.server_changes();
            tokio::spawn(async move {
                while let Some(change) = changes.next().await {
                    match change.state {
                        ServerState::Registered => {
                            println!("{}", json!({ "event": "registered", "member": member, "at": now() }));
                        }
                        ServerState::Failed(error) => {
                            let error = error.to_string();
                            println!(
                                "{}",
                                json!({ "event": "failed", "member": member, "at": now(), "error": error })
                            );
                        }
                        _ => {}
                    }
                }
            });
            endpoints.push(endpoint);
            // A few at a time: it is the second time that counts.
            if let Some(earlier) = member.checked_sub(AT_ONCE) {
                endpoints[earlier].online().await?;
            }
        }
        for endpoint in &endpoints {
            endpoint.online().await?;
        }
        println!("{}", json!({ "event": "ready" }));
        tokio::io::stdin().read_to_end(&mut Vec::new()).await?;
        anyhow::Ok(())
    })
}
