//! A program at a terminal, as a person sees it: a pseudo-terminal by `script` of util-linux.

use std::io::{Read as _, Write as _};
use std::num::NonZeroU16;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use netsim::{Host, HostChild};

/// What is on the screen, and a keyboard.
pub struct Terminal {
    child: HostChild,
    output: Receiver<Vec<u8>>,
    seen: String,
    /// Up to where of it [`wait_for`](Self::wait_for) has looked.
    read: usize,
    screen: vt100::Parser,
}

/// Rows and columns.
const SIZE: (NonZeroU16, NonZeroU16) = (NonZeroU16::new(40).unwrap(), NonZeroU16::new(100).unwrap());

impl Terminal {
    /// Starts a program in `host`. Its arguments must need no quoting.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn start(host: &Host, program: &Path, arguments: &[&str]) -> anyhow::Result<Self> {
        Self::start_in(host, program, arguments, &[])
    }

    /// The same with these variables in its environment.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn start_in(
        host: &Host,
        program: &Path,
        arguments: &[&str],
        environment: &[(&str, String)],
    ) -> anyhow::Result<Self> {
        let (rows, columns) = SIZE;
        let size = format!("stty rows {rows} columns {columns}");
        let line = format!("{size}; exec {} {}", program.display(), arguments.join(" "));
        let mut command = host.command("script");
        command.args(["--quiet", "--flush", "--return", "--command", &line, "/dev/null"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        command.env("TERM", "xterm").env_remove("RUST_LOG").env_remove("PEER_SERVER").env_remove("PEER_KEY");
        command.envs(environment.iter().map(|(name, value)| (name, value)));
        let mut child = command.spawn().context("script of util-linux cannot be started")?;
        let mut stdout = child.stdout.take().context("standard output is piped")?;
        let (sender, output) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = stdout.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        let screen = vt100::Parser::new(SIZE.0, SIZE.1, 0);
        Ok(Self { child, output, seen: String::new(), read: 0, screen })
    }

    /// Waits until this is said, after what was waited for before.
    ///
    /// # Errors
    ///
    /// When it is not said in time.
    pub fn wait_for(&mut self, words: &str, patience: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(at) = self.seen[self.read..].find(words) {
                self.read += at + words.len();
                return Ok(());
            }
            match self.output.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(more) => self.saw(&more),
                Err(error) => bail!("no {words:?} ({error}) in {:?}", self.seen),
            }
        }
    }

    fn saw(&mut self, more: &[u8]) {
        self.screen.process(more);
        self.seen.push_str(&String::from_utf8_lossy(more));
    }

    /// Waits until the screen shows what `wanted` takes, row by row without the empty ones at the end.
    ///
    /// # Errors
    ///
    /// When it does not in time, or the program ends first.
    pub fn shows(&mut self, wanted: impl Fn(&[String]) -> bool, patience: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            let screen = self.screen.screen().contents();
            let rows: Vec<String> = screen.trim_end().lines().map(|row| row.trim_end().to_owned()).collect();
            if wanted(&rows) {
                return Ok(());
            }
            match self.output.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(more) => self.saw(&more),
                Err(error) => bail!("not shown ({error}); the screen:\n{}", rows.join("\n")),
            }
        }
    }

    /// Everything that has come to the terminal so far, control sequences included.
    pub fn raw(&self) -> &str {
        &self.seen
    }

    /// Presses these keys.
    ///
    /// # Errors
    ///
    /// When the program is gone.
    pub fn press(&mut self, keys: &str) -> anyhow::Result<()> {
        let keyboard = self.child.stdin.as_mut().context("standard input is piped")?;
        Ok(keyboard.write_all(keys.as_bytes())?)
    }

    /// Waits for its end.
    ///
    /// # Errors
    ///
    /// When it does not end in time.
    pub fn wait(&mut self, patience: Duration) -> anyhow::Result<ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            match self.output.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(more) => self.saw(&more),
                Err(RecvTimeoutError::Disconnected) => return Ok(self.child.wait()?),
                Err(RecvTimeoutError::Timeout) => bail!("still running; it said {:?}", self.seen),
            }
        }
    }

    /// Types this, and return.
    ///
    /// # Errors
    ///
    /// When the program is gone.
    pub fn answer(&mut self, words: &str) -> anyhow::Result<()> {
        let keyboard = self.child.stdin.as_mut().context("standard input is piped")?;
        Ok(writeln!(keyboard, "{words}")?)
    }
}
