//! Programs in the hosts of a lab.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitCode, ExitStatus, Stdio};
use std::str::FromStr;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use clap::Args;
use netsim::{HostChild, Lab};

use super::topology::{self, Topology};

/// Programs, one per host or several.
#[derive(Debug, Args)]
pub(super) struct Run {
    #[command(flatten)]
    topology: Topology,
    /// HOST:COMMAND runs a shell command in a host; HOST&:COMMAND stops it when those without & have ended.
    #[arg(required = true)]
    commands: Vec<HostLine>,
}

/// One host, one program at the terminal.
#[derive(Debug, Args)]
pub(super) struct Shell {
    #[command(flatten)]
    topology: Topology,
    /// The host.
    host: String,
    /// The program with its arguments; $SHELL unless given.
    #[arg(last = true)]
    command: Vec<String>,
}

#[derive(Clone, Debug)]
struct HostLine {
    host: String,
    background: bool,
    command: String,
}

impl FromStr for HostLine {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (host, command) = text.split_once(':').context("a program is written HOST:COMMAND")?;
        let (host, background) = host.strip_suffix('&').map_or((host, false), |host| (host, true));
        Ok(Self { host: host.to_owned(), background, command: command.to_owned() })
    }
}

struct Running {
    child: HostChild,
    output: [JoinHandle<()>; 2],
    background: bool,
}

impl Run {
    pub(super) fn execute(&self, seed: u64) -> Result<ExitCode> {
        let lab = self.topology.build(seed)?;
        let mut running = self.commands.iter().map(|line| line.start(&lab)).collect::<Result<Vec<_>>>()?;
        let mut first_failure = 0;
        for Running { child, .. } in running.iter_mut().filter(|program| !program.background) {
            let code = exit_code(child.wait()?);
            first_failure = if first_failure == 0 { code } else { first_failure };
        }
        // Everything that still holds a pipe ends here, so the readers do too.
        drop(lab);
        for Running { child, output, .. } in running {
            drop(child);
            for reader in output {
                // A reader that panicked could not print; nothing more to print then.
                let _ = reader.join();
            }
        }
        Ok(ExitCode::from(first_failure))
    }
}

impl HostLine {
    fn start(&self, lab: &Lab) -> Result<Running> {
        let host = topology::host(lab, &self.host)?;
        let mut child = host
            .command("sh")
            .args(["-c", &self.command])
            .envs(topology::environment(lab))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("could not start `{}` in {}", self.command, self.host))?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let out = self.prefix(stdout, std::io::stdout());
        let error = self.prefix(stderr, std::io::stderr());
        Ok(Running { child, output: [out, error], background: self.background })
    }

    /// Copies lines with the host's name before each.
    fn prefix(
        &self,
        from: Option<impl Read + Send + 'static>,
        mut to: impl Write + Send + 'static,
    ) -> JoinHandle<()> {
        let host = self.host.clone();
        thread::spawn(move || {
            let Some(from) = from else { return };
            let mut from = BufReader::new(from);
            let mut line = Vec::new();
            while let Ok(1..) = from.read_until(b'\n', &mut line) {
                let text = String::from_utf8_lossy(&line);
                // Nobody to read it is no reason to stop the programs.
                let _ = writeln!(to, "[{host}] {}", text.trim_end_matches('\n'));
                line.clear();
            }
        })
    }
}

impl Shell {
    pub(super) fn execute(&self, seed: u64) -> Result<ExitCode> {
        let lab = self.topology.build(seed)?;
        let host = topology::host(&lab, &self.host)?;
        let default = [std::env::var("SHELL").unwrap_or_else(|_| "/bin/sh".to_owned())];
        let command = if self.command.is_empty() { &default[..] } else { &self.command };
        let status = host
            .command(&command[0])
            .args(&command[1..])
            .envs(topology::environment(&lab))
            .status()
            .with_context(|| format!("could not start `{}`", command[0]))?;
        Ok(ExitCode::from(exit_code(status)))
    }
}

/// As a shell would have it: the program's own, or 128 and the signal that ended it.
fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}
