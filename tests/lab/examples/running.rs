//! A command line as a shell runs it.

use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::process::{ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use netsim::{HostChild, HostCommand};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A transfer, a doctor's whole visit.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// Its lines, with their ends, as they come; read to the end, whether anybody listens or not.
fn lines(from: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        let (mut from, mut line) = (BufReader::new(from), String::new());
        while let Ok(1..) = from.read_line(&mut line) {
            let _ = sender.send(std::mem::take(&mut line));
        }
    });
    lines
}

/// A command line that runs, its words and its data apart.
pub(crate) struct Running {
    child: HostChild,
    input: Option<ChildStdin>,
    words: Receiver<String>,
    data: Receiver<String>,
    line: String,
}

impl Running {
    /// Starts `command`, which is bash with this line.
    pub(super) fn start(mut command: HostCommand, line: &str) -> anyhow::Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let data = lines(child.stdout.take().context("standard output is piped")?);
        let words = lines(child.stderr.take().context("standard error is piped")?);
        let input = child.stdin.take();
        Ok(Self { child, input, words, data, line: line.to_owned() })
    }

    /// Waits until it says this on standard error, after what was waited for before.
    pub(crate) fn says(&self, wanted: &str) -> anyhow::Result<()> {
        self.waits(&self.words, wanted).map(|_| ())
    }

    /// Waits until it writes this to standard output; everything up to the end of that line.
    pub(super) fn writes(&self, wanted: &str) -> anyhow::Result<String> {
        self.waits(&self.data, wanted)
    }

    fn waits(&self, lines: &Receiver<String>, wanted: &str) -> anyhow::Result<String> {
        let (deadline, mut said) = (Instant::now() + PATIENCE, String::new());
        loop {
            match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    said += &line;
                    if line.contains(wanted) {
                        return Ok(said);
                    }
                }
                Err(RecvTimeoutError::Timeout) => bail!("`{}` does not say {wanted:?}: {said}", self.line),
                Err(RecvTimeoutError::Disconnected) => bail!("`{}` ended: {said}", self.line),
            }
        }
    }

    /// Gives it something to read.
    pub(crate) fn types(&mut self, words: &str) -> anyhow::Result<()> {
        Ok(self.input.as_mut().context("an open input")?.write_all(words.as_bytes())?)
    }

    /// There is nothing more to read.
    pub(crate) fn close_input(&mut self) {
        self.input = None;
    }

    fn wait(&mut self, code: i32) -> anyhow::Result<String> {
        self.input = None;
        let (deadline, mut said) = (Instant::now() + PATIENCE, String::new());
        loop {
            match self.words.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => said += &line,
                Err(RecvTimeoutError::Timeout) => bail!("`{}` does not end: {said}", self.line),
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        let status = self.child.wait()?;
        ensure!(status.code() == Some(code), "`{}`: {status}, not {code}: {said}", self.line);
        Ok(self.data.iter().collect())
    }

    /// Waits for its good end; what it has written to standard output.
    pub(crate) fn done(mut self) -> anyhow::Result<String> {
        self.wait(0)
    }

    /// Waits until it ends by itself, with this code.
    pub(crate) fn ends(mut self, code: i32) -> anyhow::Result<()> {
        self.wait(code).map(|_| ())
    }

    /// Sends it a signal; it must end with this code.
    pub(crate) fn stop(mut self, signal: Signal, code: i32) -> anyhow::Result<()> {
        kill(Pid::from_raw(i32::try_from(self.child.id())?), signal)?;
        self.wait(code).map(|_| ())
    }
}
