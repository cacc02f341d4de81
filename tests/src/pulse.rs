//! A steady echo over a session of `peer connect` with `peer listen --echo`: what a person hears of an interruption.

use std::io::{Read as _, Write as _};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

use crate::process::Program;

/// From one message to the next.
pub const INTERVAL: Duration = Duration::from_millis(20);

#[derive(Debug, Default)]
struct Record {
    /// When each message was sent, and when its echo came.
    sent: Vec<Instant>,
    heard: Vec<Instant>,
    /// What came instead of the next echo.
    fault: Option<String>,
    stopped: bool,
}

/// A message every [`INTERVAL`], and every echo's time. Each message has a number, so that a lost, doubled or misplaced one is a fault.
pub struct Pulse {
    /// The program that carries it.
    pub peer: Program,
    record: Arc<Mutex<Record>>,
    writer: Option<JoinHandle<()>>,
}

fn lock(record: &Mutex<Record>) -> MutexGuard<'_, Record> {
    record.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pulse {
    /// Begins over a program that sends its standard input to an echo and prints what comes back.
    ///
    /// # Errors
    ///
    /// When its standard input and output are not to be had.
    pub fn start(mut peer: Program) -> anyhow::Result<Self> {
        let (mut stdin, mut stdout) = (peer.stdin()?, peer.stdout()?);
        let record = Arc::<Mutex<Record>>::default();
        let written = record.clone();
        let writer = std::thread::spawn(move || {
            let start = Instant::now();
            for number in 0u64.. {
                let due = start + INTERVAL * u32::try_from(number).unwrap_or(u32::MAX);
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
                {
                    let mut record = lock(&written);
                    if record.stopped || record.fault.is_some() {
                        return;
                    }
                    record.sent.push(Instant::now());
                }
                if stdin.write_all(&number.to_be_bytes()).and_then(|()| stdin.flush()).is_err() {
                    return;
                }
            }
        });
        let read = record.clone();
        std::thread::spawn(move || {
            let mut message = [0; 8];
            for number in 0u64.. {
                let end = stdout.read_exact(&mut message);
                let mut record = lock(&read);
                match end {
                    Ok(()) if u64::from_be_bytes(message) == number => record.heard.push(Instant::now()),
                    Ok(()) => {
                        let came = u64::from_be_bytes(message);
                        record.fault = Some(format!("message {came} came in the place of {number}"));
                        return;
                    }
                    Err(_) if record.stopped && record.sent.len() as u64 == number => return,
                    Err(error) => {
                        record.fault = Some(format!("after {number} echoes: {error}"));
                        return;
                    }
                }
            }
        });
        Ok(Self { peer, record, writer: Some(writer) })
    }

    /// Waits until an echo has come of a message that was sent after `moment`; how long after it the echo came.
    ///
    /// # Errors
    ///
    /// When none comes within `patience`, or something else does.
    pub fn echo_after(&self, moment: Instant, patience: Duration) -> anyhow::Result<Duration> {
        let deadline = Instant::now() + patience;
        loop {
            {
                let record = lock(&self.record);
                if let Some(fault) = &record.fault {
                    bail!("the echo broke: {fault}");
                }
                let first = record.sent.partition_point(|sent| *sent < moment);
                if let Some(heard) = record.heard.get(first) {
                    return Ok(heard.saturating_duration_since(moment));
                }
            }
            ensure!(Instant::now() < deadline, "no echo within {patience:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The first echo that came after `moment`, whenever it was sent; how long after it.
    ///
    /// # Errors
    ///
    /// When none comes within `patience`, or something else does.
    pub fn heard_after(&self, moment: Instant, patience: Duration) -> anyhow::Result<Duration> {
        let deadline = Instant::now() + patience;
        loop {
            {
                let record = lock(&self.record);
                if let Some(fault) = &record.fault {
                    bail!("the echo broke: {fault}");
                }
                let first = record.heard.partition_point(|heard| *heard < moment);
                if let Some(heard) = record.heard.get(first) {
                    return Ok(heard.saturating_duration_since(moment));
                }
            }
            ensure!(Instant::now() < deadline, "no echo within {patience:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The longest time between two echoes since `moment`, the one that was open then and the present one included.
    ///
    /// # Errors
    ///
    /// When something else came than the next echo.
    pub fn longest_gap(&self, moment: Instant) -> anyhow::Result<Duration> {
        let record = lock(&self.record);
        if let Some(fault) = &record.fault {
            bail!("the echo broke: {fault}");
        }
        let first = record.heard.partition_point(|heard| *heard < moment).saturating_sub(1);
        let now = Instant::now();
        let since = record.heard.get(first..).unwrap_or_default();
        let gaps = since.iter().zip(since.iter().skip(1).chain([&now]));
        gaps.map(|(before, after)| after.saturating_duration_since(*before)).max().context("no echo at all")
    }

    /// When, after `moment`, the last gap of more than three intervals was over. Zero: there was none.
    pub fn undisturbed_after(&self, moment: Instant) -> Duration {
        let record = lock(&self.record);
        let first = record.heard.partition_point(|heard| *heard < moment).saturating_sub(1);
        let since = record.heard.get(first..).unwrap_or_default();
        let gaps = since.iter().zip(since.iter().skip(1));
        let last = gaps.rev().find(|(before, after)| **after - **before > INTERVAL * 3);
        last.map_or(Duration::ZERO, |(_, after)| after.saturating_duration_since(moment))
    }

    /// Waits until the program says that its path is direct (or relayed), not counting what it has said before.
    ///
    /// # Errors
    ///
    /// When it does not within `patience`.
    pub fn next_path(&mut self, path: &str, patience: Duration) -> anyhow::Result<Value> {
        self.peer.later(|event| event["event"] == "path" && event["path"] == path, patience)
    }

    /// Sends nothing more and waits for the last echo: everything that was sent has come back, once and in order.
    ///
    /// # Errors
    ///
    /// When it has not within `patience`.
    pub fn finish(mut self, patience: Duration) -> anyhow::Result<Program> {
        lock(&self.record).stopped = true;
        let deadline = Instant::now() + patience;
        if let Some(writer) = self.writer.take() {
            while !writer.is_finished() {
                ensure!(Instant::now() < deadline, "the program takes no more input");
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        loop {
            {
                let record = lock(&self.record);
                if let Some(fault) = &record.fault {
                    bail!("the echo broke: {fault}");
                }
                if record.heard.len() == record.sent.len() {
                    break;
                }
                ensure!(
                    Instant::now() < deadline,
                    "{} of {} messages came back",
                    record.heard.len(),
                    record.sent.len()
                );
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(self.peer)
    }
}
