//! Our programs as a person runs them, with their `--json` events.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use netsim::{Host, HostChild, HostCommand};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// How long anything may take that is not what is measured.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The path of one of our binaries, beside the running one.
///
/// # Errors
///
/// When it has not been built.
pub fn binary(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let places = own.ancestors().skip(1).take(2).map(|directory| directory.join(name));
    let found = places.into_iter().find(|path| path.is_file());
    found.with_context(|| {
        format!("{name} is not built: run `cargo build --workspace` with the same profile first")
    })
}

/// A program of ours that tells what happens as one JSON object a line.
pub struct Program {
    name: String,
    child: HostChild,
    events: Receiver<Value>,
    seen: Vec<Value>,
}

impl Program {
    /// Starts `name` in `host`. Its events come from standard error if `events_on_stderr`, else from standard output.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn start(
        host: &Host,
        name: &str,
        arguments: &[&str],
        events_on_stderr: bool,
    ) -> anyhow::Result<Self> {
        Self::start_in(host, name, arguments, events_on_stderr, &[])
    }

    /// The same with these variables in its environment.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn start_in(
        host: &Host,
        name: &str,
        arguments: &[&str],
        events_on_stderr: bool,
        environment: &[(&str, &str)],
    ) -> anyhow::Result<Self> {
        let mut command = host.command(binary(name)?);
        command.args(arguments);
        // A proxy of whoever runs the tests is none of the lab's.
        for variable in ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"] {
            command.env_remove(variable);
        }
        for (name, value) in environment {
            command.env(name, value);
        }
        Self::spawn(command, &format!("{name} {}", arguments.first().unwrap_or(&"")), events_on_stderr)
    }

    /// The same in a place of its own where `hosts` is `/etc/hosts`.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn start_with_hosts(
        host: &Host,
        hosts: &Path,
        name: &str,
        arguments: &[&str],
        events_on_stderr: bool,
    ) -> anyhow::Result<Self> {
        const MOUNT: &str = "mount --bind \"$0\" /etc/hosts && exec \"$@\"";
        let mut command = host.command("unshare");
        command.args(["--mount", "sh", "-c", MOUNT]).arg(hosts).arg(binary(name)?).args(arguments);
        Self::spawn(command, &format!("{name} {}", arguments.first().unwrap_or(&"")), events_on_stderr)
    }

    /// A command that ends up as one of our programs, with its events on standard error.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn of_command(command: HostCommand, label: &str) -> anyhow::Result<Self> {
        Self::spawn(command, label, true)
    }

    fn spawn(mut command: HostCommand, label: &str, events_on_stderr: bool) -> anyhow::Result<Self> {
        command.env_remove("RUST_LOG");
        if let Ok(filter) = std::env::var("LAB_LOG") {
            command.env("RUST_LOG", filter);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(if events_on_stderr { Stdio::piped() } else { Stdio::inherit() });
        let mut child = command.spawn().with_context(|| format!("{label} cannot be started"))?;
        let (sender, events) = channel();
        let source: Box<dyn std::io::Read + Send> = if events_on_stderr {
            Box::new(child.stderr.take().context("standard error is piped")?)
        } else {
            Box::new(child.stdout.take().context("standard output is piped")?)
        };
        let shown = label.to_owned();
        std::thread::spawn(move || {
            for line in BufReader::new(source).lines().map_while(Result::ok) {
                match serde_json::from_str(&line) {
                    Ok(event) => {
                        if sender.send(event).is_err() {
                            return;
                        }
                    }
                    // A log line: for whoever looks at a failure.
                    Err(_) => eprintln!("[{shown}] {line}"),
                }
            }
        });
        Ok(Self { name: label.to_owned(), child, events, seen: Vec::new() })
    }

    /// The first event, already seen or still to come, that `wanted` takes.
    ///
    /// # Errors
    ///
    /// When it does not come in time or the program ends first.
    pub fn event(&mut self, wanted: impl Fn(&Value) -> bool, patience: Duration) -> anyhow::Result<Value> {
        if let Some(event) = self.seen.iter().find(|event| wanted(event)) {
            return Ok(event.clone());
        }
        let deadline = Instant::now() + patience;
        loop {
            match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(event) => {
                    self.seen.push(event.clone());
                    if wanted(&event) {
                        return Ok(event);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    bail!("{}: not in {patience:?}; it said {:?}", self.name, self.seen)
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("{}: ended first; it said {:?}", self.name, self.seen)
                }
            }
        }
    }

    /// The first event that `wanted` takes of those that are still to come.
    ///
    /// # Errors
    ///
    /// As [`event`](Self::event).
    pub fn later(&mut self, wanted: impl Fn(&Value) -> bool, patience: Duration) -> anyhow::Result<Value> {
        let seen = std::mem::take(&mut self.seen);
        let event = self.event(wanted, patience);
        self.seen.splice(0..0, seen);
        event
    }

    /// The first event of this name.
    ///
    /// # Errors
    ///
    /// As [`event`](Self::event).
    pub fn named(&mut self, name: &str) -> anyhow::Result<Value> {
        self.event(|event| event["event"] == name, PATIENCE)
            .map_err(|error| anyhow!("waiting for {name}: {error}"))
    }

    /// Everything that it has said so far.
    pub fn said(&mut self) -> &[Value] {
        self.seen.extend(self.events.try_iter());
        &self.seen
    }

    /// Its standard input, once.
    ///
    /// # Errors
    ///
    /// When it was taken before.
    pub fn stdin(&mut self) -> anyhow::Result<ChildStdin> {
        self.child.stdin.take().context("standard input was taken")
    }

    /// Its standard output, once.
    ///
    /// # Errors
    ///
    /// When it was taken before, or is where the events come from.
    pub fn stdout(&mut self) -> anyhow::Result<ChildStdout> {
        self.child.stdout.take().context("standard output was taken")
    }

    /// Sends it a signal.
    ///
    /// # Errors
    ///
    /// When it is gone.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        Ok(kill(Pid::from_raw(i32::try_from(self.child.id())?), signal)?)
    }

    /// The CPU time that it has used so far.
    ///
    /// # Errors
    ///
    /// When it is gone.
    pub fn cpu_time(&self) -> anyhow::Result<Duration> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        // Behind the name, which may have anything in it: the 12th and 13th field (proc(5)), in hundredths of a second.
        let (_, fields) = stat.rsplit_once(')').context("a name in parentheses")?;
        let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<u64>);
        Ok(Duration::from_millis(10 * ticks.sum::<Result<u64, _>>()?))
    }

    /// Waits for its end, and for its last event.
    ///
    /// # Errors
    ///
    /// When it does not end within `patience`.
    pub fn wait(&mut self, patience: Duration) -> anyhow::Result<ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(event) => self.seen.push(event),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    bail!("{}: still running; it said {:?}", self.name, self.seen)
                }
            }
        }
        Ok(self.child.wait()?)
    }
}
