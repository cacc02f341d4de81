//! Stalls, and what they are put down to.

use std::collections::BTreeSet;
use std::fmt;

use super::plan::{Disturbance, Kind, PeerIndex, PlaceId};

/// A packet that has left before something begins is heard up to so much later, in microseconds: lines take a quarter of a second at most.
const IN_FLIGHT: u64 = 300_000;

/// What has ended is looked at for so long, in microseconds: the time in which paths are tried and taken again.
const AFTERMATH: u64 = 6_000_000;

/// By then a session has left a path that is cut, in microseconds. A stall over the relay that begins later has another cause.
const LEFT: u64 = 3_000_000;

/// A silence in a stream in one direction. Times are microseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stall {
    /// Who sends.
    pub from: PeerIndex,
    /// Who has waited.
    pub to: PeerIndex,
    /// When the last block before it came.
    pub since: u64,
    /// When the next one came; where none did, when it was looked for.
    pub until: u64,
    /// Whether the receiver's path was direct at its beginning.
    pub direct: bool,
}

impl Stall {
    /// How long it was, in milliseconds.
    pub fn lasted(&self) -> f64 {
        (self.until.saturating_sub(self.since)) as f64 / 1e3
    }
}

/// A disturbance as it has come to pass. Times are microseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Happening {
    /// What it is.
    pub what: Disturbance,
    /// When it began.
    pub from: u64,
    /// When it ended, if it has.
    pub until: Option<u64>,
}

/// Where peers are, and since when.
#[derive(Debug, Clone, Default)]
pub struct Whereabouts(Vec<(u64, PeerIndex, PlaceId)>);

impl Whereabouts {
    /// A peer is at this place from `at` on.
    pub fn note(&mut self, at: u64, peer: PeerIndex, place: PlaceId) {
        self.0.push((at, peer, place));
    }

    /// Where a peer was at that time.
    pub fn at(&self, peer: PeerIndex, time: u64) -> Option<PlaceId> {
        let mut moves = self.0.iter().rev().filter(|(_, who, _)| *who == peer);
        moves.find(|(at, ..)| *at <= time).map(|(_, _, place)| *place)
    }
}

/// A process that wanted to run and could not until then, in microseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Late {
    /// When it ran again.
    pub until: u64,
    /// For how long it did not.
    pub by: u64,
}

/// What a stall is put down to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cause {
    /// These were in force when it began.
    During(BTreeSet<Kind>),
    /// This was over a few seconds before.
    After(Kind),
    /// One of the two processes could not run.
    Machine,
    /// Nothing that is known.
    Unexplained,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::During(kinds) => {
                let names: Vec<&str> = kinds.iter().map(|kind| kind.name()).collect();
                f.pad(&names.join(" + "))
            }
            Self::After(kind) => f.pad(&format!("after: {}", kind.name())),
            Self::Machine => f.pad("machine busy"),
            Self::Unexplained => f.pad("unexplained"),
        }
    }
}

/// Everything that stalls may be put down to.
#[derive(Debug, Clone, Default)]
pub struct Record {
    /// What has happened, in the order of its beginning.
    pub happenings: Vec<Happening>,
    /// Where everybody was.
    pub whereabouts: Whereabouts,
    /// When a peer's process could not run.
    pub late: Vec<(PeerIndex, Late)>,
    /// How many servers there are.
    pub servers: usize,
}

impl Record {
    /// What `stall` is put down to: all that concerned either end and was in force at its beginning; else what was over last.
    pub fn cause(&self, stall: &Stall) -> Cause {
        let concerning = || self.happenings.iter().filter(|happening| self.concerns(happening, stall));
        let during: BTreeSet<Kind> = concerning()
            .filter(|happening| {
                happening.from <= stall.since + IN_FLIGHT
                    && happening.until.is_none_or(|until| until + IN_FLIGHT >= stall.since)
            })
            .map(|happening| happening.what.kind())
            .collect();
        if !during.is_empty() {
            return Cause::During(during);
        }
        let ended = concerning().filter_map(|happening| Some((happening.until?, happening.what.kind())));
        let recent = ended.filter(|(until, _)| (*until..*until + AFTERMATH).contains(&stall.since));
        if let Some((_, kind)) = recent.max() {
            return Cause::After(kind);
        }
        let busy = self.late.iter().any(|(peer, late)| {
            [stall.from, stall.to].contains(peer)
                && late.until >= stall.since
                && late.until.saturating_sub(late.by) <= stall.until
        });
        if busy { Cause::Machine } else { Cause::Unexplained }
    }

    /// How long `stall` went on after the last of all that left it no way was over, in milliseconds; after its own beginning where nothing did. A
    /// peer that sleeps cannot be heard, and the only relay carries nothing while it is down, but this part of a stall is the programs' own.
    pub fn own(&self, stall: &Stall) -> f64 {
        let concerning = self.happenings.iter().filter(|happening| {
            happening.from <= stall.until
                && happening.until.is_none_or(|until| until + IN_FLIGHT >= stall.since)
                && self.concerns(happening, stall)
                && self.leaves_no_way(happening)
        });
        let ends = concerning.map(|happening| happening.until.unwrap_or(stall.until));
        let over = ends.max().unwrap_or(stall.since).max(stall.since);
        stall.until.saturating_sub(over) as f64 / 1e3
    }

    /// Whether nothing could get through. What spares the relay, or TCP, or another server, leaves a way.
    fn leaves_no_way(&self, happening: &Happening) -> bool {
        match happening.what {
            Disturbance::Cut { .. } | Disturbance::Narrow { .. } | Disturbance::NoUdp { .. } => false,
            Disturbance::KillServer { .. } => self.servers < 2,
            Disturbance::Reboot { .. }
            | Disturbance::Loss { .. }
            | Disturbance::Slow { .. }
            | Disturbance::Move { .. }
            | Disturbance::MoveBoth { .. }
            | Disturbance::Sleep { .. }
            | Disturbance::SleepBoth { .. } => true,
        }
    }

    fn concerns(&self, happening: &Happening, stall: &Stall) -> bool {
        let ends = [stall.from, stall.to];
        let at = |peer| {
            // Where it was, and where a move takes it to at this moment.
            [stall.since, stall.since + IN_FLIGHT].map(|time| self.whereabouts.at(peer, time))
        };
        let is_at = |place: PlaceId| ends.iter().any(|peer| at(*peer).contains(&Some(place)));
        match happening.what {
            Disturbance::Cut { between: [a, b], .. } => {
                let between = |one: PlaceId, other: PlaceId| {
                    at(ends[0]).contains(&Some(one)) && at(ends[1]).contains(&Some(other))
                };
                let left = !stall.direct
                    && stall.since > happening.from + LEFT
                    && happening.until.is_none_or(|until| stall.since < until);
                (between(a, b) || between(b, a)) && !left
            }
            Disturbance::Narrow { between: [a, b], .. } => is_at(a) && is_at(b),
            Disturbance::Reboot { place, .. }
            | Disturbance::NoUdp { place }
            | Disturbance::Loss { place, .. }
            | Disturbance::Slow { place, .. } => is_at(place),
            Disturbance::KillServer { .. } => true,
            Disturbance::Move { .. }
            | Disturbance::MoveBoth { .. }
            | Disturbance::Sleep { .. }
            | Disturbance::SleepBoth { .. } => happening.what.peers().iter().any(|peer| ends.contains(peer)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::plan::Way;
    use super::*;

    const S: u64 = 1_000_000;

    fn record(happenings: &[(Disturbance, u64, u64)]) -> Record {
        let mut record = Record::default();
        (0..6).for_each(|peer| record.whereabouts.note(0, peer, peer));
        record.happenings = happenings
            .iter()
            .map(|(what, from, until)| Happening { what: *what, from: *from, until: Some(*until) })
            .collect();
        record
    }

    fn stall(from: PeerIndex, to: PeerIndex, since: u64) -> Stall {
        Stall { from, to, since, until: since + S, direct: true }
    }

    #[test]
    fn a_cut_is_the_cause_of_what_goes_between_its_ends_and_of_nothing_else() {
        let cut = Disturbance::Cut { between: [1, 2], way: Way::Both };
        let record = record(&[(cut, 10 * S, 20 * S)]);
        assert_eq!(record.cause(&stall(2, 1, 10 * S - 5_000)).to_string(), "cut both ways");
        assert_eq!(record.cause(&stall(2, 1, 9 * S)), Cause::Unexplained);
        assert_eq!(record.cause(&stall(2, 3, 11 * S)), Cause::Unexplained);
        assert_eq!(record.cause(&stall(1, 2, 22 * S)), Cause::After(Kind::CutBoth));
        assert_eq!(record.cause(&stall(1, 2, 30 * S)), Cause::Unexplained);
        let relayed = Stall { direct: false, ..stall(1, 2, 15 * S) };
        assert_eq!(record.cause(&relayed), Cause::Unexplained);
    }

    #[test]
    fn what_is_in_force_together_is_named_together() {
        let sleep = Disturbance::Sleep { peer: 3 };
        let killed = Disturbance::KillServer { server: 0 };
        let record = record(&[(sleep, 5 * S, 30 * S), (killed, 10 * S, 15 * S)]);
        assert_eq!(record.cause(&stall(3, 0, 11 * S)).to_string(), "sleep + server killed");
        assert_eq!(record.cause(&stall(1, 0, 11 * S)).to_string(), "server killed");
        assert_eq!(record.cause(&stall(0, 3, 20 * S)).to_string(), "sleep");
    }

    #[test]
    fn a_place_concerns_who_is_there_at_that_time() {
        let blocked = Disturbance::NoUdp { place: 7 };
        let mut record = record(&[(blocked, 10 * S, 20 * S)]);
        assert_eq!(record.cause(&stall(4, 0, 12 * S)), Cause::Unexplained);
        record.whereabouts.note(11 * S, 4, 7);
        assert_eq!(record.cause(&stall(4, 0, 12 * S)).to_string(), "no UDP");
    }

    #[test]
    fn the_own_part_of_a_stall_begins_when_all_else_is_over() {
        let sleep = Disturbance::Sleep { peer: 3 };
        let record = record(&[(sleep, 5 * S, 30 * S)]);
        let long = Stall { until: 31 * S, ..stall(3, 0, 5 * S) };
        assert_eq!(record.own(&long), 1e3);
        assert_eq!(record.own(&Stall { until: 20 * S, ..long }), 0.0);
        assert_eq!(record.own(&stall(1, 0, 5 * S)), 1e3);
    }

    #[test]
    fn what_leaves_another_way_excuses_nothing() {
        let blocked = Disturbance::NoUdp { place: 3 };
        let cut = Disturbance::Cut { between: [3, 0], way: Way::Both };
        let killed = Disturbance::KillServer { server: 0 };
        for (what, servers, own) in
            [(blocked, 1, 1e3), (cut, 1, 1e3), (killed, 2, 1e3), (killed, 1, 0.0), (killed, 0, 0.0)]
        {
            let record = Record { servers, ..record(&[(what, 5 * S, 30 * S)]) };
            assert_eq!(record.own(&stall(3, 0, 5 * S)), own, "{what} with {servers}");
        }
    }

    #[test]
    fn a_process_that_does_not_run_explains_what_nothing_else_does() {
        let mut record = record(&[]);
        record.late.push((2, Late { until: 10 * S, by: S / 2 }));
        assert_eq!(record.cause(&stall(2, 0, 9 * S)), Cause::Machine);
        assert_eq!(record.cause(&stall(1, 0, 9 * S)), Cause::Unexplained);
    }
}
