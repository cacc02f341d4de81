//! The examples of `rendezvous`.

use std::path::Path;

use anyhow::{Context as _, ensure};
use end_to_end::process::binary;
use netsim::{Host, Lab};
use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use super::running::Running;
use super::{commands, examples, help};

/// Every example of `rendezvous --help` and of its commands.
pub(super) fn run_all() -> anyhow::Result<()> {
    let mut all = Vec::new();
    collect(&[], &mut all)?;
    all.sort_unstable();
    all.dedup();
    for example in all {
        run(&example).with_context(|| format!("the example `{example}`"))?;
    }
    Ok(())
}

/// The examples of a command and of those below it. Every one that has none below it has an example of its own.
fn collect(command: &[&str], all: &mut Vec<String>) -> anyhow::Result<()> {
    let help = help("rendezvous", command)?;
    let own = examples(&help);
    all.extend(own.iter().map(|example| (*example).to_owned()));
    if help.contains("Commands:\n") {
        return commands(&help)?
            .into_iter()
            .try_for_each(|below| collect(&[command, &[below]].concat(), all));
    }
    let name = format!("rendezvous {}", command.join(" "));
    ensure!(own.iter().any(|example| example.starts_with(&name)), "`{name} --help` has no example: {own:?}");
    Ok(())
}

/// Starts a line on the server's host, with its state in `folder`.
fn start(host: &Host, folder: &Path, line: &str) -> anyhow::Result<Running> {
    let programs = binary("rendezvous")?;
    let programs = programs.parent().context("a folder of programs")?;
    let mut command = host.command("bash");
    command.args(["--norc", "-c", &format!("exec {line}")]).current_dir(folder);
    command.env("PATH", format!("{}:{}", programs.display(), std::env::var("PATH")?));
    command.env("XDG_DATA_HOME", folder).env_remove("STATE_DIRECTORY").env_remove("RUST_LOG");
    Running::start(command, line)
}

fn run(example: &str) -> anyhow::Result<()> {
    let mut lab = Lab::new(6)?;
    let host = lab.add_server("vps")?;
    let second = host.second_ipv4().context("a second address")?.to_string();
    let folder = TempDir::new()?;
    let start = |line: &str| start(&host, folder.path(), line);
    let id = start("rendezvous id --state-dir somebody")?.done()?.trim().to_owned();
    let line = example.replace("192.0.2.8", &second).replace("/etc/rendezvous.toml", "written.toml");
    let line = line.replace(" ID", &format!(" {id}"));
    start("rendezvous config default > rendezvous.toml")?.done()?;
    let words: Vec<&str> = line.split_whitespace().collect();
    match words[1] {
        "serve" => {
            let running = start(&line)?;
            let printed = running.writes("rv://")?;
            running.stop(Signal::SIGTERM, 0)?;
            if let Some(host) =
                words.iter().position(|word| *word == "--host").and_then(|at| words.get(at + 1))
            {
                let first = host.split(',').next().unwrap_or_default();
                ensure!(printed.contains(first), "{printed}");
            }
        }
        "id" => ensure!(start(&line)?.done()?.trim().len() == 52),
        "check" => ensure!(start(&line)?.done()?.contains("config")),
        "config" if words[2] == "default" => {
            start(&line)?.done()?;
            ensure!(std::fs::read(folder.path().join("written.toml"))?.len() > 1_000, "no file");
        }
        "config" => ensure!(start(&line)?.done()?.contains("network.port = ")),
        "completions" => ensure!(start(&line)?.done()?.contains("RENDEZVOUS_COMPLETE")),
        "man" => {
            start(&line)?.done()?;
            ensure!(folder.path().join("target/man/rendezvous-serve.1").is_file(), "no page");
        }
        command => {
            let server = start("rendezvous serve")?;
            server.writes("rv://")?;
            live(command, &line, &id, &start)?;
            server.stop(Signal::SIGTERM, 0)?;
        }
    }
    Ok(())
}

/// A command to a running server.
fn live(
    command: &str,
    line: &str,
    id: &str,
    start: &dyn Fn(&str) -> anyhow::Result<Running>,
) -> anyhow::Result<()> {
    let done = |line: &str| start(line)?.done();
    let lists = |what: &str, wanted: &str| -> anyhow::Result<bool> {
        Ok(done(&format!("rendezvous {what} --json"))?.contains(wanted))
    };
    match command {
        "admit" => {
            if line.contains("--withdraw") {
                done(&format!("rendezvous admit {id}"))?;
            }
            done(line)?;
            ensure!(lists("admit", id)? == line.contains("--note"), "admitted, or not");
        }
        "ban" => {
            done(line)?;
            ensure!(lists("ban", id)? == line.contains(id), "banned, or not");
        }
        "unban" => {
            done(&format!("rendezvous ban {id}"))?;
            ensure!(lists("ban", id)?, "not banned");
            done(line)?;
            ensure!(!lists("ban", id)?, "banned still");
        }
        "token" if line.contains("withdraw") => {
            for _ in 0..3 {
                done("rendezvous token new")?;
            }
            ensure!(lists("token list", "\"number\":3")?, "not three tokens");
            done(line)?;
            ensure!(!lists("token list", "\"number\":3")?, "three tokens still");
        }
        "token" => {
            let printed = done(line)?;
            let made = line.contains(" new");
            ensure!(!printed.trim().is_empty() || !made, "no token");
            ensure!(lists("token list", "\"number\":1")? == made, "a token, or none");
        }
        "peers" | "sessions" | "stats" => {
            let printed = done(line)?;
            if line.contains("--json") {
                let _: Value = serde_json::from_str(&printed)?;
            } else {
                ensure!(!printed.trim().is_empty(), "it says nothing");
            }
        }
        other => {
            anyhow::bail!("nobody knows how to run `rendezvous {other}`; teach tests/lab/examples/server.rs")
        }
    }
    Ok(())
}
