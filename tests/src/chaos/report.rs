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
    pub stalls: Vec<(Stall, Cause)>,
    /// What must not be.
    pub faults: Vec<String>,
}

impl Report {
    /// Whether nothing was lost, no connection was made anew and everything flowed at the end.
    pub fn is_good(&self) -> bool {
        self.faults.is_empty()
    }

    /// Stalls in milliseconds by what they are put down to, and whether the path was direct.
    pub fn by_cause(&self) -> BTreeMap<(&Cause, bool), Figures> {
        let mut causes: BTreeMap<(&Cause, bool), Figures> = BTreeMap::new();
        for (stall, cause) in &self.stalls {
            causes.entry((cause, stall.direct)).or_default().push(stall.lasted());
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
            let mut row = figures(all);
            row["cause"] = json!(cause.to_string());
            row["path"] = json!(path(*direct));
            row
        });
        let stalls = self.stalls.iter().map(|(stall, cause)| {
            json!({
                "from": stall.from, "to": stall.to, "at": self.seconds(stall.since), "ms": stall.lasted(),
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
            "\nstalls of {} ms and more, by what was in force at their beginning; ms",
            self.load.threshold
        )?;
        let causes = self.by_cause();
        let width = causes.keys().map(|(cause, _)| cause.to_string().len()).max().unwrap_or(0).max(5);
        writeln!(
            f,
            "  {:<width$}  {:<8}{:>6}{:>9}{:>9}{:>9}",
            "cause", "path", "count", "p50", "p99", "max"
        )?;
        for ((cause, direct), all) in &causes {
            let [p50, p99] = [0.5, 0.99].map(|share| all.quantile(share));
            let (count, max, path) = (all.count(), all.max(), path(*direct));
            let cause = cause.to_string();
            writeln!(f, "  {cause:<width$}  {path:<8}{count:>6}{p50:>9.0}{p99:>9.0}{max:>9.0}")?;
        }
        for (stall, cause) in self.stalls.iter().filter(|(_, cause)| *cause == Cause::Unexplained) {
            let (at, path) = (self.seconds(stall.since), path(stall.direct));
            let (from, to, ms) = (stall.from, stall.to, stall.lasted());
            writeln!(f, "  {cause} at {at:.1} s: {from} -> {to}, {path}, {ms:.0} ms")?;
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
