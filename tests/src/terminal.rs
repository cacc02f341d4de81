//! A program at a terminal, as a person sees it: a pseudo-terminal by `script` of util-linux.

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::Stdio;
use std::sync::mpsc::{Receiver, channel};
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
}

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
        let line = format!("{} {}", program.display(), arguments.join(" "));
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
        Ok(Self { child, output, seen: String::new(), read: 0 })
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
                Ok(more) => self.seen.push_str(&String::from_utf8_lossy(&more)),
                Err(error) => bail!("no {words:?} ({error}) in {:?}", self.seen),
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
