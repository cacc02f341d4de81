//! The examples of `rendezvous`.

use anyhow::{Context as _, ensure};
use end_to_end::process::binary;
use netsim::Lab;
use nix::sys::signal::Signal;
use tempfile::TempDir;

use super::running::Running;
use super::{commands, examples, help};

/// Every example of `rendezvous --help` and of its commands.
pub(super) fn run_all() -> anyhow::Result<()> {
    let top = help("rendezvous", &[])?;
    let mut all: Vec<String> = examples(&top).into_iter().map(str::to_owned).collect();
    for command in commands(&top)? {
        let help = help("rendezvous", &[command])?;
        let own = examples(&help);
        ensure!(!own.is_empty(), "`rendezvous {command} --help` has no example");
        ensure!(own.iter().any(|example| example.starts_with(&format!("rendezvous {command}"))), "{own:?}");
        all.extend(own.into_iter().map(str::to_owned));
    }
    all.sort_unstable();
    all.dedup();
    for example in all {
        run(&example).with_context(|| format!("the example `{example}`"))?;
    }
    Ok(())
}

fn run(example: &str) -> anyhow::Result<()> {
    let mut lab = Lab::new(6)?;
    let host = lab.add_server("vps")?;
    let second = host.second_ipv4().context("a second address")?.to_string();
    let line = example.replace("192.0.2.8", &second);
    let folder = TempDir::new()?;
    let programs = binary("rendezvous")?;
    let programs = programs.parent().context("a folder of programs")?;
    let mut command = host.command("bash");
    command.args(["--norc", "-c", &format!("exec {line}")]).current_dir(folder.path());
    command.env("PATH", format!("{}:{}", programs.display(), std::env::var("PATH")?));
    command.env("XDG_DATA_HOME", folder.path()).env_remove("STATE_DIRECTORY").env_remove("RUST_LOG");
    let running = Running::start(command, &line)?;
    let words: Vec<&str> = line.split_whitespace().collect();
    match words[1] {
        "serve" => {
            let printed = running.writes("rv://")?;
            running.stop(Signal::SIGTERM, 0)?;
            if let Some(host) =
                words.iter().position(|word| *word == "--host").and_then(|at| words.get(at + 1))
            {
                let first = host.split(',').next().unwrap_or_default();
                ensure!(printed.contains(first), "{printed}");
            }
        }
        "id" => ensure!(running.done()?.trim().len() == 52),
        "completions" => ensure!(running.done()?.contains("RENDEZVOUS_COMPLETE")),
        "man" => {
            running.done()?;
            ensure!(folder.path().join("target/man/rendezvous-serve.1").is_file(), "no page");
        }
        other => {
            anyhow::bail!("nobody knows how to run `rendezvous {other}`; teach tests/lab/examples/server.rs")
        }
    }
    Ok(())
}
