//! What came of a run.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde_json::{Value, json};

use super::cause::{Cause, Happening, Stall};
use super::member::Load;
use super::plan::{PEERS, PeerIndex, Place, PlaceId, Settings};
use crate::cell::Way;
use crate::figures::Figures;

/// Stalls that go on for longer after all was over are told one by one, as are those that nothing explains.
const LONG: Duration = Duration::from_secs(3);

/// A stream in one direction, at the end.
#[derive(Debug, Clone)]
pub struct Stream {
    /// Who sends.
    pub from: PeerIndex,
    /// Who is sent to.
    pub to: PeerIndex,
    /// Where they are.
    pub places: [PlaceId; 2],
    /// Blocks that came.
    pub blocks: u64,
    /// Whether the receiver's path is direct.
    pub direct: bool,
}

/// A stall, and what is known of it.
#[derive(Debug, Clone)]
pub struct Judged {
    /// Between whom, and when.
    pub stall: Stall,
    /// What it is put down to.
    pub cause: Cause,
    /// How long it went on after all that left it no way was over, in milliseconds.
    pub own: f64,
}

/// How long the stalls of one cause were, in milliseconds.
#[derive(Debug, Clone, Default)]
pub struct Lengths {
    /// From the last block to the next.
    pub whole: Figures,
    /// See [`Judged::own`].
    pub own: Figures,
}

/// What came of a run.
#[derive(Debug, Clone)]
pub struct Report {
    /// What was asked for.
    pub settings: Settings,
    /// What was sent.
    pub load: Load,
    /// Where peers could be.
    pub places: Vec<Place>,
    /// Microseconds since 1970.
    pub began: u64,
    /// From the beginning to the end.
    pub lasted: Duration,
    /// Whether it was ended early.
    pub stopped: bool,
    /// QUIC connections in all.
    pub connections: usize,
    /// Changes of path, counted at both ends.
    pub path_changes: usize,
    /// Every stream.
    pub streams: Vec<Stream>,
    /// What has happened.
    pub happenings: Vec<Happening>,
    /// Every stall and what it is put down to, in the order of their beginning.
    pub stalls: Vec<Judged>,
    /// What must not be.
    pub faults: Vec<String>,
}

impl Report {
    /// Whether nothing was lost, no connection was made anew and everything flowed at the end.
    pub fn is_good(&self) -> bool {
        self.faults.is_empty()
    }

    /// Stalls in milliseconds by what they are put down to, and whether the path was direct.
    pub fn by_cause(&self) -> BTreeMap<(&Cause, bool), Lengths> {
        let mut causes: BTreeMap<(&Cause, bool), Lengths> = BTreeMap::new();
        for Judged { stall, cause, own } in &self.stalls {
            let lengths = causes.entry((cause, stall.direct)).or_default();
            lengths.whole.push(stall.lasted());
            lengths.own.push(*own);
        }
        causes
    }

    /// Streams that are relayed at the end where the networks allow a direct path.
    pub fn needlessly_relayed(&self) -> Vec<&Stream> {
        let possible = |stream: &&Stream| {
            let [a, b] = stream.places.map(|place| self.places[place].network);
            matches!(Way::of(a, b), Way::AtOnce | Way::Meeting)
        };
        self.streams.iter().filter(|stream| !stream.direct).filter(possible).collect()
    }

    fn seconds(&self, at: u64) -> f64 {
        (at as f64 - self.began as f64) / 1e6
    }

    /// Everything, for programs. Times are seconds after the beginning, stalls milliseconds.
    pub fn json(&self) -> Value {
        let figures = |figures: &Figures| json!({ "count": figures.count(), "p50": figures.quantile(0.5), "p99": figures.quantile(0.99), "max": figures.max() });
        let causes = self.by_cause();
        let causes = causes.iter().map(|((cause, direct), all)| {
            let mut row = figures(&all.whole);
            row["own"] = figures(&all.own);
            row["cause"] = json!(cause.to_string());
            row["path"] = json!(path(*direct));
            row
        });
        let stalls = self.stalls.iter().map(|Judged { stall, cause, own }| {
            json!({
                "from": stall.from, "to": stall.to, "at": self.seconds(stall.since), "ms": stall.lasted(),
                "own_ms": own,
                "path": path(stall.direct), "cause": cause.to_string(),
            })
        });
        let events = self.happenings.iter().map(|happening| {
            json!({
                "what": happening.what.to_string(), "from": self.seconds(happening.from),
                "until": happening.until.map(|until| self.seconds(until)),
            })
        });
        let places = self.places.iter().map(
            |place| json!({ "network": place.network.to_string(), "delay_ms": place.delay.as_millis() as u64 }),
        );
        let streams = self.streams.iter().map(|stream| {
            json!({
                "from": stream.from, "to": stream.to, "blocks": stream.blocks, "path": path(stream.direct),
                "places": stream.places,
            })
        });
        json!({
            "seed": self.settings.seed, "servers": self.settings.servers,
            "lasted_s": self.lasted.as_secs_f64(), "stopped": self.stopped, "good": self.is_good(),
            "rate": self.load.rate, "block": self.load.block,
            "blocks": self.streams.iter().map(|stream| stream.blocks).sum::<u64>(),
            "connections": self.connections, "path_changes": self.path_changes,
            "places": places.collect::<Vec<_>>(), "streams": streams.collect::<Vec<_>>(),
            "causes": causes.collect::<Vec<_>>(), "stalls": stalls.collect::<Vec<_>>(),
            "events": events.collect::<Vec<_>>(), "faults": self.faults,
            "needlessly_relayed": self.needlessly_relayed().iter().map(|stream| [stream.from, stream.to]).collect::<Vec<_>>(),
        })
    }
}

fn path(direct: bool) -> &'static str {
    if direct { "direct" } else { "relayed" }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let blocks: u64 = self.streams.iter().map(|stream| stream.blocks).sum();
        writeln!(
            f,
            "seed {}: {:.0} s{}, {} events, {} server(s); {} blocks of {} bytes a second on each of {} streams",
            self.settings.seed,
            self.lasted.as_secs_f64(),
            if self.stopped { " (stopped)" } else { "" },
            self.happenings.len(),
            self.settings.servers,
            self.load.rate,
            self.load.block,
            self.streams.len(),
        )?;
        let homes: Vec<String> = self
            .places
            .iter()
            .map(|place| format!("{} {} ms", place.network, place.delay.as_millis()))
            .collect();
        writeln!(f, "homes: {}; elsewhere: {}", homes[..PEERS].join(", "), homes[PEERS..].join(", "))?;
        writeln!(
            f,
            "{blocks} blocks came; {} connections between {} pairs; {} changes of path",
            self.connections,
            PEERS * (PEERS - 1) / 2,
            self.path_changes,
        )?;
        writeln!(
            f,
            "\nstalls of {} ms and more, by what was in force at their beginning; ms, and the part of it in which there was a way",
            self.load.threshold
        )?;
        let causes = self.by_cause();
        let width = causes.keys().map(|(cause, _)| cause.to_string().len()).max().unwrap_or(0).max(5);
        let header = ["p50", "p99", "max", "p50 own", "p99 own", "max own"].map(|name| format!("{name:>9}"));
        writeln!(f, "  {:<width$}  {:<8}{:>6}{}", "cause", "path", "count", header.concat())?;
        for ((cause, direct), Lengths { whole, own }) in &causes {
            let three = |all: &Figures| [all.quantile(0.5), all.quantile(0.99), all.max()];
            let numbers = [three(whole), three(own)].concat();
            let numbers: String = numbers.iter().map(|number| format!("{number:>9.0}")).collect();
            let (cause, count) = (cause.to_string(), whole.count());
            writeln!(f, "  {cause:<width$}  {:<8}{count:>6}{numbers}", path(*direct))?;
        }
        let bad =
            |judged: &&Judged| judged.cause == Cause::Unexplained || judged.own > LONG.as_secs_f64() * 1e3;
        for Judged { stall, cause, own } in self.stalls.iter().filter(bad) {
            let (at, path) = (self.seconds(stall.since), path(stall.direct));
            let (from, to, ms) = (stall.from, stall.to, stall.lasted());
            writeln!(
                f,
                "  at {at:.1} s: {from} -> {to}, {path}, {ms:.0} ms, {own:.0} of them its own; {cause}"
            )?;
        }
        for stream in self.needlessly_relayed() {
            let [a, b] = stream.places.map(|place| self.places[place].network);
            writeln!(f, "  relayed at the end: {} -> {}, {a} and {b}", stream.from, stream.to)?;
        }
        for fault in &self.faults {
            writeln!(f, "  FAULT: {fault}")?;
        }
        write!(
            f,
            "{}",
            if self.is_good() {
                "nothing lost, nothing out of order, no reconnect"
            } else {
                "NOT as it should be"
            }
        )
    }
}
