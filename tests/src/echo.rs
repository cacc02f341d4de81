//! A steady echo between two homes, measured in the process that sends, while something happens to the path.

use std::process::ChildStdin;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, ensure};
use netsim::Host;
use serde_json::Value;

use crate::process::Program;
use crate::world::World;

/// Bytes of a message.
pub const MESSAGE: usize = 16;

/// From message to message.
pub const EVERY: Duration = Duration::from_millis(20);

/// How long anything may take that is not what is measured.
pub const PATIENCE: Duration = crate::process::PATIENCE;

/// A point of the system's clock, which the echo's process reads too.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as u64
}

/// The running echo: `echo` on one host, `peer listen --echo` on another.
pub struct Echo {
    sender: Program,
    listener: Program,
    input: Option<ChildStdin>,
}

/// What came of it.
#[derive(Debug)]
pub struct Echoes {
    /// When each came back, and how long it took.
    echoes: Vec<(u64, u64)>,
    /// Every path of the sender's, direct or not, and since when.
    paths: Vec<(u64, bool)>,
    /// Whether each of the listener's paths was direct, one after the other.
    listener_paths: Vec<bool>,
}

impl Echo {
    /// Starts both, a message every so often, and waits until both are direct.
    ///
    /// # Errors
    ///
    /// When that does not happen.
    pub fn start(world: &World, from: &Host, to: &Host, every: Duration) -> anyhow::Result<Self> {
        let mut echo = Self::begin(world, from, to, every, &[])?;
        echo.sender.event(|event| event["direct"] == true, PATIENCE)?;
        echo.listener.event(|event| event["path"] == "direct", PATIENCE)?;
        Ok(echo)
    }

    /// Starts both, each with these servers besides the world's own, and waits until something has come back.
    ///
    /// # Errors
    ///
    /// When that does not happen.
    pub fn begin(
        world: &World,
        from: &Host,
        to: &Host,
        every: Duration,
        servers: &[&str],
    ) -> anyhow::Result<Self> {
        let others: Vec<&str> = servers.iter().flat_map(|server| ["--server", server]).collect();
        let (listener, id) = world.listener(to, "listener", &[&others[..], &["--echo"]].concat())?;
        let every = every.as_millis().to_string();
        let own = ["--server", &world.address, "--every", &every];
        let mut sender = Program::start(from, "echo", &[&own[..], &others, &[&id]].concat(), false)?;
        let input = Some(sender.stdin()?);
        sender.event(|event| event["event"] == "echo", PATIENCE)?;
        Ok(Self { sender, listener, input })
    }

    /// Waits until the listener knows something of a server.
    ///
    /// # Errors
    ///
    /// When that does not happen.
    pub fn listener_hears(&mut self, state: &str) -> anyhow::Result<()> {
        let heard = |event: &Value| event["event"] == "server" && event["state"] == state;
        self.listener.event(heard, PATIENCE)?;
        Ok(())
    }

    /// Waits until both have been direct, for the `times`th time.
    ///
    /// # Errors
    ///
    /// When that does not happen within `patience`.
    pub fn direct(&mut self, times: usize, patience: Duration) -> anyhow::Result<()> {
        let deadline = std::time::Instant::now() + patience;
        for (program, wanted) in
            [(&mut self.sender, direct_sender as fn(&Value) -> bool), (&mut self.listener, direct_listener)]
        {
            loop {
                let count = program.said().iter().filter(|event| wanted(event)).count();
                if count >= times {
                    break;
                }
                ensure!(
                    std::time::Instant::now() < deadline,
                    "direct {count} times: {:?}",
                    paths(program.said())
                );
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        Ok(())
    }

    /// Waits until the sender is on the relay, if it was direct.
    ///
    /// # Errors
    ///
    /// When that does not happen within `patience`.
    pub fn relayed(&mut self, patience: Duration) -> anyhow::Result<()> {
        let deadline = std::time::Instant::now() + patience;
        let direct =
            |said: &[Value]| said.iter().rfind(|event| event["event"] == "path").is_some_and(direct_sender);
        while direct(self.sender.said()) {
            ensure!(std::time::Instant::now() < deadline, "the path is cut, and still it is direct");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Ends it: everything must have come back, in order, over one connection.
    ///
    /// # Errors
    ///
    /// When something is missing.
    pub fn finish(mut self) -> anyhow::Result<Echoes> {
        drop(self.input.take());
        let done = self.sender.event(|event| event["event"] == "done", 2 * PATIENCE);
        let done =
            done.map_err(|_| anyhow::anyhow!("not everything came back: {:?}", paths(self.sender.said())))?;
        ensure!(done["sent"] == done["received"] && done["in_order"] == true, "lost or out of order: {done}");
        ensure!(self.sender.wait(PATIENCE)?.success());
        self.listener.named("closed")?;
        let said = self.listener.said();
        let connections = said.iter().filter(|event| event["event"] == "connected").count();
        ensure!(connections == 1, "{connections} connections");
        let listener_paths = said.iter().filter(|event| event["event"] == "path");
        let listener_paths = listener_paths.map(|event| event["path"] == "direct").collect();
        let number = |value: &Value| value.as_u64().context("a number");
        let (mut echoes, mut paths) = (Vec::new(), Vec::new());
        for event in self.sender.said() {
            if event["event"] == "echo" {
                echoes.push((number(&event["at"])?, number(&event["took"])?));
            } else if event["event"] == "path" {
                paths.push((number(&event["at"])?, event["direct"] == true));
            }
        }
        Ok(Echoes { echoes, paths, listener_paths })
    }
}

fn direct_sender(event: &Value) -> bool {
    event["event"] == "path" && event["direct"] == true
}

fn direct_listener(event: &Value) -> bool {
    event["event"] == "path" && event["path"] == "direct"
}

fn paths(said: &[Value]) -> Vec<&Value> {
    said.iter().filter(|event| event["event"] != "echo").collect()
}

impl Echoes {
    /// The longest time between two echoes, of which the later one came within these bounds, in milliseconds.
    pub fn gap(&self, from: u64, to: u64) -> f64 {
        let pairs = self.echoes.windows(2).filter(|pair| (from..=to).contains(&pair[1].0));
        pairs.map(|pair| pair[1].0 - pair[0].0).max().unwrap_or(to - from) as f64 / 1e3
    }

    /// Whether the listener has left a direct path, and taken one again.
    pub fn listener_left(&self) -> bool {
        // The first path that it hears of may be either.
        self.listener_paths.windows(3).any(|paths| paths == [true, false, true])
    }

    /// The slowest echo that came within these bounds, in milliseconds.
    pub fn slowest(&self, from: u64, to: u64) -> f64 {
        let within = self.echoes.iter().filter(|(at, _)| (from..=to).contains(at));
        within.map(|(_, took)| *took).max().unwrap_or(to - from) as f64 / 1e3
    }

    /// When the first echo came after `from`, in milliseconds after it.
    pub fn first_after(&self, from: u64) -> Option<f64> {
        let first = self.echoes.iter().map(|(at, _)| *at).find(|at| *at >= from);
        first.map(|at| (at - from) as f64 / 1e3)
    }

    /// How often the sender's path changed within these bounds.
    pub fn changes(&self, from: u64, to: u64) -> usize {
        self.paths.iter().filter(|(at, _)| (from..=to).contains(at)).count()
    }

    /// Whether the sender was on a direct path then.
    pub fn is_direct(&self, at: u64) -> bool {
        self.paths.iter().rfind(|(since, _)| *since <= at).is_some_and(|(_, direct)| *direct)
    }

    /// When the sender first was on such a path after `from`, in milliseconds after it.
    pub fn path_after(&self, direct: bool, from: u64) -> Option<f64> {
        let found = self.paths.iter().find(|(at, path)| *at >= from && *path == direct);
        found.map(|(at, _)| (at - from) as f64 / 1e3)
    }
}
