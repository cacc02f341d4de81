//! Lets a plan come to pass in real time, and watches the streams.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use super::cause::{Happening, Record};
use super::member::{Done, Load};
use super::mesh::Mesh;
use super::plan::{Disturbance, Event, PEERS, Plan, Settings};
use super::report::{Judged, Report, Stream};
use crate::echo::now;
use crate::process::PATIENCE;

/// How often the streams are looked at.
const LOOK: Duration = Duration::from_millis(50);

/// From one line of progress to the next.
const PROGRESS: Duration = Duration::from_secs(10);

/// How long all streams may take to flow, at the beginning, and again when all is well at the end. The second has to hold what piled up over a
/// relay that was away.
const FLOWING: Duration = Duration::from_secs(60);

/// How a run is done, beside what happens in it.
#[derive(Debug, Clone, Default)]
pub struct Manner {
    /// What is sent.
    pub load: Load,
    /// Where every peer writes what the library logs, as `LAB_LOG` asks.
    pub logs: Option<PathBuf>,
    /// Whether progress is told on standard error.
    pub progress: bool,
}

/// A run in a lab of its own. `stop` ends it early; what has been seen until then is reported.
///
/// # Errors
///
/// When the lab cannot be built, or a disturbance cannot be brought about. What the peers do wrong is in the report.
pub fn run(settings: &Settings, manner: &Manner, stop: &AtomicBool) -> anyhow::Result<Report> {
    let plan = Plan::new(settings);
    let mesh = Mesh::new(&plan, settings, &manner.load, manner.logs.as_deref())?;
    let mut conductor = Conductor {
        mesh,
        stop,
        manner,
        settings,
        record: Record { servers: settings.servers, ..Record::default() },
        in_force: Vec::new(),
        start: Instant::now(),
        told: Instant::now(),
        began: now(),
    };
    conductor.begin()?;
    conductor.play(&plan.events)?;
    let faults = conductor.end()?;
    Ok(conductor.report(&plan, faults))
}

struct Conductor<'a> {
    mesh: Mesh,
    stop: &'a AtomicBool,
    manner: &'a Manner,
    settings: &'a Settings,
    record: Record,
    /// With their places in the plan, and in the record.
    in_force: Vec<(Event, usize)>,
    start: Instant,
    told: Instant,
    began: u64,
}

impl Conductor<'_> {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Waits until every stream flows both ways.
    fn begin(&mut self) -> anyhow::Result<()> {
        let since = now();
        ensure!(self.flowing(since)? || self.stopped(), "not all streams flow: {:?}", self.silent(since));
        for peer in 0..PEERS {
            self.record.whereabouts.note(0, peer, peer);
        }
        (self.start, self.began) = (Instant::now(), now());
        Ok(())
    }

    /// Whether in every stream something has come that was sent after `since`, within bounds.
    fn flowing(&mut self, since: u64) -> anyhow::Result<bool> {
        let deadline = Instant::now() + FLOWING;
        while !self.stopped() && Instant::now() < deadline {
            self.look();
            if self.silent(since).is_empty() {
                return Ok(true);
            }
            std::thread::sleep(LOOK);
        }
        Ok(self.silent(since).is_empty())
    }

    /// Streams, by who sends and who is sent to, in which nothing has come that was sent after `since`.
    fn silent(&self, since: u64) -> Vec<(usize, usize)> {
        streams().filter(|(from, to)| self.mesh.members[*to].flows[*from].dated <= since).collect()
    }

    fn look(&mut self) {
        for member in &mut self.mesh.members {
            member.look();
        }
        if self.manner.progress && self.told.elapsed() >= PROGRESS {
            self.told = Instant::now();
            self.tell();
        }
    }

    fn tell(&self) {
        let members = &self.mesh.members;
        let received: u64 = members.iter().flat_map(|member| &member.flows).map(|flow| flow.received).sum();
        let direct = streams().filter(|(from, to)| members[*to].flows[*from].direct).count();
        let stalls: usize = members.iter().map(|member| member.stalls.len()).sum();
        let faults: usize = members.iter().map(|member| member.faults.len()).sum();
        let quiet = now().saturating_sub(2_500_000);
        let silent = streams().filter(|(from, to)| members[*to].flows[*from].heard < quiet).count();
        let names: Vec<String> = self.in_force.iter().map(|(event, _)| event.what.to_string()).collect();
        eprintln!(
            "chaos: {:>4.0} s: {received} blocks, {direct} of 30 direct, {silent} silent, {stalls} stalls, {faults} faults; now: {}",
            self.start.elapsed().as_secs_f64(),
            if names.is_empty() { "nothing".to_owned() } else { names.join("; ") }
        );
    }

    fn disturbances(&self) -> Vec<Disturbance> {
        self.in_force.iter().map(|(event, _)| event.what).collect()
    }

    fn play(&mut self, events: &[Event]) -> anyhow::Result<()> {
        let mut events = events.iter().copied().peekable();
        loop {
            let elapsed = self.start.elapsed();
            // Ends before beginnings: a peer that sleeps again has been awake.
            while let Some(place) = self.in_force.iter().position(|(event, _)| event.until() <= elapsed) {
                self.end_one(place)?;
            }
            while let Some(event) = events.next_if(|event| event.at <= elapsed) {
                self.begin_one(event)?;
            }
            if self.stopped() {
                break;
            }
            if events.peek().is_none() && self.in_force.is_empty() && elapsed >= self.settings.lasts {
                return Ok(());
            }
            self.look();
            let ends = self.in_force.iter().map(|(event, _)| event.until());
            let next = ends.chain(events.peek().map(|event| event.at)).min().unwrap_or(Duration::MAX);
            std::thread::sleep(LOOK.min(next.saturating_sub(self.start.elapsed())));
        }
        while !self.in_force.is_empty() {
            self.end_one(0)?;
        }
        Ok(())
    }

    fn begin_one(&mut self, event: Event) -> anyhow::Result<()> {
        let what = event.what;
        let place = self.record.happenings.len();
        self.record.happenings.push(Happening { what, from: now(), until: None });
        self.in_force.push((event, place));
        let moves = match what {
            Disturbance::Move { peer, to } => vec![(peer, to)],
            Disturbance::MoveBoth { peers, to } => vec![(peers[0], to[0]), (peers[1], to[1])],
            _ => Vec::new(),
        };
        for (peer, to) in moves {
            self.record.whereabouts.note(now(), peer, to);
        }
        let in_force = self.disturbances();
        self.mesh.begin(&what, &in_force).with_context(|| format!("{what} did not begin"))
    }

    fn end_one(&mut self, place: usize) -> anyhow::Result<()> {
        let (event, number) = self.in_force.remove(place);
        let in_force = self.disturbances();
        self.mesh.end(&event.what, &in_force).with_context(|| format!("{} did not end", event.what))?;
        self.record.happenings[number].until = Some(now());
        Ok(())
    }

    /// All is well by now: everything must flow, and arrive. What does not.
    fn end(&mut self) -> anyhow::Result<Vec<String>> {
        let mut faults = Vec::new();
        let healed = now();
        if !self.stopped() && !self.flowing(healed)? {
            let silent = self.silent(healed);
            faults
                .push(format!("streams that do not flow {} s after the end: {silent:?}", FLOWING.as_secs()));
        }
        self.note_silence();
        self.mesh.members.iter_mut().for_each(|member| drop(member.say("finish")));
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline
            && streams().any(|(from, to)| self.mesh.members[to].done[from].is_none())
        {
            self.look();
            std::thread::sleep(LOOK);
        }
        for member in &self.mesh.members {
            faults.extend(member.faults.iter().cloned());
        }
        faults.extend(streams().filter_map(|(from, to)| self.difference(from, to)));
        self.mesh.members.iter_mut().for_each(|member| drop(member.say("close")));
        if let Err(error) = self.mesh.wait_for_members(PATIENCE) {
            faults.push(format!("{error:#}"));
        }
        Ok(faults)
    }

    /// Silence that goes on is a stall too.
    fn note_silence(&mut self) {
        let (now, threshold) = (now(), self.manner.load.threshold * 1000);
        for (from, to) in streams() {
            let member = &mut self.mesh.members[to];
            let flow = member.flows[from];
            // Progress is up to a second old.
            if flow.heard != 0 && now.saturating_sub(flow.heard) > threshold + 2_000_000 {
                member.stalls.push(super::cause::Stall {
                    from,
                    to,
                    since: flow.heard,
                    until: now,
                    direct: flow.direct,
                });
            }
        }
    }

    /// How what was sent differs from what came.
    fn difference(&self, from: usize, to: usize) -> Option<String> {
        let members = &self.mesh.members;
        let sessions = members[to].sessions[from];
        if sessions != 1 {
            return Some(format!("{sessions} connections between {from} and {to}, seen by {to}"));
        }
        let (Some(Done { sent, .. }), Some(Done { received, .. })) =
            (&members[from].done[to], &members[to].done[from])
        else {
            return Some(format!("the stream from {from} to {to} has not come to its end"));
        };
        (sent != received).then(|| format!("from {from} to {to}: sent {sent:?}, came {received:?}"))
    }

    fn report(mut self, plan: &Plan, faults: Vec<String>) -> Report {
        for member in &self.mesh.members {
            self.record.late.extend(member.late.iter().map(|late| (member.index(), *late)));
        }
        let end = now();
        let members = &self.mesh.members;
        let stream = |(from, to): (usize, usize)| {
            let done = members[to].done[from].as_ref();
            Stream {
                from,
                to,
                places: [from, to].map(|peer| self.record.whereabouts.at(peer, end).unwrap_or(peer)),
                blocks: done.map_or(members[to].flows[from].received, |done| done.received.0),
                direct: members[to].flows[from].direct,
            }
        };
        let began = self.began;
        let stalls = members.iter().flat_map(|member| &member.stalls).filter(|stall| stall.until > began);
        let judged = |stall: &super::cause::Stall| Judged {
            stall: *stall,
            cause: self.record.cause(stall),
            own: self.record.own(stall),
        };
        let mut stalls: Vec<_> = stalls.map(judged).collect();
        stalls.sort_by_key(|judged| judged.stall.since);
        Report {
            settings: *self.settings,
            load: self.manner.load,
            places: plan.places.clone(),
            began,
            lasted: self.start.elapsed(),
            stopped: self.stopped(),
            connections: members.iter().map(|member| member.sessions.iter().sum::<usize>()).sum::<usize>()
                / 2,
            path_changes: members.iter().map(|member| member.path_changes).sum(),
            streams: streams().map(stream).collect(),
            happenings: self.record.happenings.clone(),
            stalls,
            faults,
        }
    }
}

/// Every stream in one direction: who sends, who is sent to.
fn streams() -> impl Iterator<Item = (usize, usize)> {
    let pairs = (0..PEERS).flat_map(|from| (0..PEERS).map(move |to| (from, to)));
    pairs.filter(|(from, to)| from != to)
}
