//! A peer of the run, as the run sees it.

use std::path::Path;
use std::process::{ChildStdin, ExitStatus};
use std::time::Duration;

use anyhow::Context as _;
use netsim::Host;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::cause::{Late, Stall};
use super::plan::{PEERS, PeerIndex};
use crate::process::{PATIENCE, Program};

/// What every peer sends to every other.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Load {
    /// Blocks a second.
    pub rate: f64,
    /// Bytes of a block.
    pub block: usize,
    /// A silence as long as this, in milliseconds, is a stall.
    pub threshold: u64,
}

impl Default for Load {
    fn default() -> Self {
        Self { rate: 50.0, block: 1000, threshold: 300 }
    }
}

/// The stream with one other, as this peer has last told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Flow {
    pub(super) sent: u64,
    pub(super) received: u64,
    /// When the latest block came, in microseconds since 1970, and when that was sent.
    pub(super) heard: u64,
    pub(super) dated: u64,
    pub(super) direct: bool,
}

/// A stream with one other that has been finished both ways.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Done {
    pub(super) sent: (u64, String),
    pub(super) received: (u64, String),
}

/// A running `chaos-peer`.
pub(super) struct Member {
    index: PeerIndex,
    program: Program,
    input: Option<ChildStdin>,
    /// How much of what the program has said has been looked at.
    looked_at: usize,
    pub(super) flows: [Flow; PEERS],
    pub(super) done: [Option<Done>; PEERS],
    /// QUIC connections with each other.
    pub(super) sessions: [usize; PEERS],
    /// Changes of path.
    pub(super) path_changes: usize,
    pub(super) stalls: Vec<Stall>,
    pub(super) late: Vec<Late>,
    pub(super) faults: Vec<String>,
}

impl Member {
    pub(super) fn start(
        host: &Host,
        index: PeerIndex,
        servers: &[&str],
        load: &Load,
        logs: Option<&Path>,
    ) -> anyhow::Result<Self> {
        let number = index.to_string();
        let (rate, block, threshold) =
            (load.rate.to_string(), load.block.to_string(), load.threshold.to_string());
        let mut arguments =
            vec!["--index", &number, "--rate", &rate, "--block", &block, "--threshold", &threshold];
        servers.iter().for_each(|server| arguments.extend(["--server", server]));
        let log = logs.map(|logs| logs.join(format!("peer{index}.log")));
        let log = log.as_deref().map(|log| log.to_str().context("a path in UTF-8")).transpose()?;
        arguments.extend(log.into_iter().flat_map(|log| ["--log", log]));
        let mut program = Program::start(host, "chaos-peer", &arguments, false)?;
        let input = Some(program.stdin()?);
        Ok(Self {
            index,
            program,
            input,
            looked_at: 0,
            flows: Default::default(),
            done: Default::default(),
            sessions: Default::default(),
            path_changes: 0,
            stalls: Vec::new(),
            late: Vec::new(),
            faults: Vec::new(),
        })
    }

    pub(super) fn index(&self) -> PeerIndex {
        self.index
    }

    /// Waits until it is; its id.
    pub(super) fn online(&mut self) -> anyhow::Result<String> {
        Ok(self.program.named("online")?["id"].as_str().context("an id")?.to_owned())
    }

    /// Tells it of the others. Of two, now the one and now the other dials.
    pub(super) fn meet(&mut self, ids: &[String]) -> anyhow::Result<()> {
        let others = ids.iter().enumerate().filter(|(other, _)| *other != self.index);
        let others = others.map(|(other, id)| {
            let lower_dials = (other + self.index) % 2 == 1;
            json!({ "index": other, "id": id, "dial": (self.index < other) == lower_dials })
        });
        let others: Vec<Value> = others.collect();
        self.say(&Value::from(others).to_string())
    }

    /// Tells it to finish or to close.
    pub(super) fn say(&mut self, line: &str) -> anyhow::Result<()> {
        use std::io::Write as _;
        let input = self.input.as_mut().context("its input is closed")?;
        writeln!(input, "{line}")?;
        Ok(input.flush()?)
    }

    pub(super) fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        self.program.signal(signal)
    }

    pub(super) fn wait(&mut self, patience: Duration) -> anyhow::Result<ExitStatus> {
        self.input.take();
        self.program.wait(patience.max(PATIENCE))
    }

    /// Takes in what it has said since the last time.
    pub(super) fn look(&mut self) {
        let said = self.program.said()[self.looked_at..].to_vec();
        self.looked_at += said.len();
        said.iter().for_each(|event| self.take(event));
    }

    fn take(&mut self, event: &Value) {
        let number = |value: &Value| value.as_u64().unwrap_or_default();
        let other = (number(&event["peer"]) as usize).min(PEERS - 1);
        match event["event"].as_str().unwrap_or_default() {
            "progress" => {
                for flow in event["flows"].as_array().into_iter().flatten() {
                    self.flows[(number(&flow["peer"]) as usize).min(PEERS - 1)] = Flow {
                        sent: number(&flow["sent"]),
                        received: number(&flow["received"]),
                        heard: number(&flow["heard"]),
                        dated: number(&flow["dated"]),
                        direct: flow["direct"] == true,
                    };
                }
            }
            "session" => self.sessions[other] += 1,
            "path" => self.path_changes += 1,
            "stall" => self.stalls.push(Stall {
                from: other,
                to: self.index,
                since: number(&event["since"]),
                until: number(&event["until"]),
                direct: event["direct"] == true,
            }),
            "late" => self.late.push(Late { until: number(&event["until"]), by: number(&event["by"]) }),
            "done" => {
                let hash = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                self.done[other] = Some(Done {
                    sent: (number(&event["sent"]), hash(&event["sent_hash"])),
                    received: (number(&event["received"]), hash(&event["received_hash"])),
                });
            }
            "fault" => {
                let what = event["what"].as_str().unwrap_or_default();
                self.faults.push(format!("peer {}, stream with {other}: {what}", self.index));
            }
            _ => {}
        }
    }
}
