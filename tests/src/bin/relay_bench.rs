//! What reflection and relay cost, against the least that the system calls cost and against coturn, interleaved in one run on
//! loopback. CPU time is that of the program under test alone.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::Duration;

use anyhow::ensure;
use clap::Parser;
use end_to_end::bench::contender::{Contender, Server};
use end_to_end::bench::lanes::{Generator, Lane, Pattern, figures, load_from_cores};
use end_to_end::bench::measure::{self, Effort, Row};
use end_to_end::bench::streams::{self, Kind, StreamLane};
use end_to_end::bench::subject::{Place, be_urgent, stay_on};
use end_to_end::figures::Figures;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::{Value, json};

/// Relay and reflection: CPU per datagram, latency, and what a second thread adds.
#[derive(Debug, Parser)]
struct Arguments {
    /// Measurements of each program under each load.
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Datagrams of a measurement; eight times as many where they come in batches.
    #[arg(long, default_value_t = 16_000)]
    datagrams: usize,
    /// Numbers of flows.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 16, 256])]
    flows: Vec<usize>,
    /// Payloads, multiples of 4.
    #[arg(long, value_delimiter = ',', default_values_t = [64, 1200])]
    payloads: Vec<usize>,
    /// The core on which load and programs run [default: the last].
    #[arg(long)]
    core: Option<usize>,
    /// Only these parts.
    #[arg(long, value_delimiter = ',')]
    only: Vec<Part>,
    /// Leave out coturn.
    #[arg(long)]
    no_coturn: bool,
    /// Little of everything, to see that it works; the figures mean nothing.
    #[arg(long)]
    quick: bool,
    /// Print one JSON object at the end instead of tables.
    #[arg(long)]
    json: bool,
    /// Fail when a bound is missed, not only when something is lost.
    #[arg(long)]
    strict: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    Bulk,
    Single,
    Sparse,
    Stun,
    Streams,
    Latency,
    Threads,
}

const OURS: &str = "rendezvous";
const GSO: &str = "bare GRO/GSO";
const MMSG: &str = "bare mmsg";
const ONE: &str = "one thread";
const TWO: &str = "two threads";
const BARE: &str = "one bare";
const BARE_TWICE: &str = "two bare";
const COTURN: &str = "coturn";

/// Datagrams a second of sparse flows together.
const SPARSE: f64 = 8_000.0;

struct Bench {
    arguments: Arguments,
    effort: Effort,
    core: usize,
    cores: usize,
    generator: Generator,
    rows: Vec<Value>,
    bounds: Vec<(String, f64, f64, bool)>,
    lost: usize,
}

impl Bench {
    fn wants(&self, part: Part) -> bool {
        self.arguments.only.is_empty() || self.arguments.only.contains(&part)
    }

    fn report(&mut self, row: &Row, floor: &str) {
        self.lost += row.lost();
        self.rows.push(row.json());
        if !self.arguments.json {
            row.print(floor);
        }
    }

    fn at_most(&mut self, what: impl Into<String>, value: Option<Figures>, most: f64) {
        let value = value.map_or(f64::NAN, |figures| figures.median());
        self.bounds.push((what.into(), value, most, value <= most));
    }

    fn at_least(&mut self, what: impl Into<String>, value: f64, least: f64) {
        self.bounds.push((what.into(), value, least, value >= least));
    }

    fn run(&mut self) -> anyhow::Result<bool> {
        if [Part::Bulk, Part::Single, Part::Sparse].into_iter().any(|part| self.wants(part)) {
            for flows in self.arguments.flows.clone() {
                self.relay(flows)?;
            }
        }
        if self.wants(Part::Stun) {
            self.stun()?;
        }
        if self.wants(Part::Streams) {
            self.streams()?;
        }
        if self.wants(Part::Latency) && self.cores > 1 {
            self.latency()?;
        }
        if self.wants(Part::Threads) && self.cores > 1 {
            self.threads()?;
        }
        let met = self.bounds.iter().all(|(_, _, _, met)| *met);
        if self.arguments.json {
            let bounds = self.bounds.iter().map(|(what, value, bound, met)| {
                json!({ "what": what, "value": value, "bound": bound, "met": met })
            });
            println!(
                "{}",
                json!({ "loads": self.rows, "bounds": bounds.collect::<Vec<_>>(), "lost": self.lost })
            );
        } else {
            println!();
            for (what, value, bound, met) in &self.bounds {
                println!("  {} {what}: {value:.3} ({bound})", if *met { "ok  " } else { "MISS" });
            }
            println!("  {} datagrams lost", self.lost);
        }
        Ok(self.lost == 0 && (met || !self.arguments.strict))
    }

    fn relay(&mut self, flows: usize) -> anyhow::Result<()> {
        stay_on(&[self.core])?;
        let place = Place::Yielding(self.core);
        let mut all = vec![
            Contender::ours(place, 1, flows)?,
            Contender::bare(place, true, flows)?,
            Contender::bare(place, false, flows)?,
        ];
        if !self.arguments.no_coturn {
            all.push(Contender::coturn(place, flows)?);
        }
        for payload in self.arguments.payloads.clone() {
            if self.wants(Part::Bulk) {
                self.bulk(&mut all, payload)?;
            }
            if self.wants(Part::Single) {
                let row = self.measure(&mut all, Pattern::Single, payload, MMSG)?;
                let what =
                    format!("single datagrams, {flows} flows, {payload} bytes: CPU of the floor's, at most");
                self.at_most(what, row.ratio(OURS, MMSG), 1.1);
            }
        }
        all.retain(|contender| contender.name != COTURN);
        for payload in self.arguments.payloads.clone() {
            if self.wants(Part::Sparse) {
                let row = self.measure(&mut all, Pattern::Sparse(SPARSE), payload, GSO)?;
                let what = format!("sparse, {flows} flows, {payload} bytes: CPU of the floor's, at most");
                self.at_most(what, row.ratio(OURS, GSO), 1.15);
            }
        }
        Ok(())
    }

    fn bulk(&mut self, all: &mut [Contender], payload: usize) -> anyhow::Result<()> {
        let flows = all.first().map_or(0, |contender| contender.lanes.len());
        let row = self.measure(all, Pattern::Bulk, payload, GSO)?;
        // The bounds are for datagrams that fill a packet.
        if payload < 1200 {
            return Ok(());
        }
        self.at_most(format!("bulk, {flows} flows: CPU of the floor's, at most"), row.ratio(OURS, GSO), 1.25);
        if let Some(ratio) = row.ratio(COTURN, OURS) {
            self.at_least(
                format!("bulk, {flows} flows: coturn's CPU by ours, at least"),
                ratio.median(),
                12.0,
            );
        }
        Ok(())
    }

    fn measure(
        &mut self,
        all: &mut [Contender],
        pattern: Pattern,
        payload: usize,
        floor: &str,
    ) -> anyhow::Result<Row> {
        let mut effort = self.effort;
        if matches!(pattern, Pattern::Sparse(_)) {
            // They come slowly.
            effort.datagrams /= 4;
        }
        let mut contenders: Vec<_> = all.iter_mut().collect();
        let row = measure::relay(&mut self.generator, &mut contenders, pattern, payload, effort)?;
        self.report(&row, floor);
        Ok(row)
    }

    fn stun(&mut self) -> anyhow::Result<()> {
        stay_on(&[self.core])?;
        let place = Place::Yielding(self.core);
        let mut all = vec![Contender::ours(place, 1, 0)?, Contender::responder(place)?];
        if !self.arguments.no_coturn {
            // It keeps a session for every address that asks, which costs far more than the answer. One that asks again and again is
            // what it does best, and what our server does not do: it answers an address 64 times a second.
            let mut coturn = Contender::coturn(place, 0)?;
            coturn.strangers = false;
            all.push(coturn);
            let mut strangers = Contender::coturn(place, 0)?;
            strangers.name = "coturn, new";
            all.push(strangers);
        }
        let mut contenders: Vec<_> = all.iter_mut().collect();
        let row = measure::reflection(&mut self.generator, &mut contenders, self.effort)?;
        self.report(&row, MMSG);
        self.at_most("STUN: CPU of the floor's, at most", row.ratio(OURS, MMSG), 1.1);
        if let Some(ratio) = row.ratio(COTURN, OURS) {
            self.at_least("STUN: coturn's CPU by ours, at least", ratio.median(), 1.4);
        }
        Ok(())
    }

    /// Ends that are TLS streams. The measure is iroh's relay with ten datagrams a frame, which took 0.43 of the bare `recvmmsg` and
    /// `sendmmsg` in one run on a machine like ours.
    fn streams(&mut self) -> anyhow::Result<()> {
        const PAYLOAD: usize = 1200;
        const IROH: f64 = 1.45 / 3.34;
        stay_on(&[self.core])?;
        let place = Place::Yielding(self.core);
        let bare = Contender::bare(place, false, 1)?;
        let kinds = [
            ("TLS to TLS", Kind::Stream, Kind::Stream),
            ("TLS to UDP", Kind::Stream, Kind::Udp),
            ("UDP to TLS", Kind::Udp, Kind::Stream),
        ];
        for lanes in [1, 16] {
            let mut server = Server::start(place, 1)?;
            let mut all = Vec::new();
            for (_, from, into) in kinds {
                let made = (0..lanes).map(|_| StreamLane::new(&mut server, from, into));
                all.push(made.collect::<anyhow::Result<Vec<_>>>()?);
            }
            for together in [1, 10, 50] {
                let mut programs: Vec<_> =
                    kinds.iter().map(|(name, ..)| (*name, vec![&server.subject])).collect();
                programs.push((MMSG, vec![&bare.subject]));
                let load = format!("streams, {lanes} lanes, {PAYLOAD} bytes, {together} together");
                let generator = &mut self.generator;
                let row = measure::rounds(load, PAYLOAD, &programs, self.effort, |place, count| {
                    match all.get_mut(place) {
                        Some(lanes) => streams::load(generator.buffers(), lanes, PAYLOAD, together, count),
                        None => generator.load(&bare.lanes, Pattern::Single, PAYLOAD, count),
                    }
                })?;
                self.report(&row, MMSG);
                for (name, ..) in kinds.iter().filter(|_| together == 10) {
                    let what = format!(
                        "{name}, {lanes} lanes, {together} together: CPU by that of bare mmsg, at most"
                    );
                    self.at_most(what, row.ratio(name, MMSG), 2.0 * IROH);
                }
            }
        }
        Ok(())
    }

    /// At a tenth of what the bare forwarder does, load and program each on a core of its own.
    fn latency(&mut self) -> anyhow::Result<()> {
        let other = (self.core + self.cores - 1) % self.cores;
        stay_on(&[other])?;
        // What else the machine does is none of theirs, where that can be had. A smoke run leaves the machine to others.
        let urgent = !self.arguments.quick && be_urgent(true);
        let place = if urgent { Place::Urgent(self.core) } else { Place::Core(self.core) };
        let all = [Contender::ours(place, 1, 16)?, Contender::bare(place, true, 16)?];
        let count = self.effort.datagrams / 8;
        // 3.4 µs each, one by one, are about 300,000 a second.
        let rate = 30_000.0;
        let mut seen = [Vec::new(), Vec::new()];
        for _ in 0..=self.effort.rounds {
            for (contender, seen) in all.iter().zip(&mut seen) {
                self.generator.latencies(&contender.lanes, 1200, count, rate, seen)?;
            }
        }
        if urgent {
            be_urgent(false);
        }
        let [ours, bare] = seen.map(|seen| figures(&seen));
        let quantiles = |figures: &Figures| [0.5, 0.9, 0.99, 0.999].map(|share| figures.quantile(share));
        let (ours, bare) = (quantiles(&ours), quantiles(&bare));
        self.rows
            .push(json!({ "load": "latency", "quantiles": [0.5, 0.9, 0.99, 0.999], OURS: ours, GSO: bare }));
        if !self.arguments.json {
            println!("\nlatency at {rate:.0} a second, one way through the relay, µs: p50, p90, p99, p99.9");
            for (name, quantiles) in [(OURS, ours), (GSO, bare)] {
                println!("  {name:<14}{}", quantiles.map(|value| format!("{value:>10.1}")).concat());
            }
        }
        for (what, place, most) in [("p50", 0, 60.0), ("p99", 2, 500.0)] {
            let added = figures(&[ours[place] - bare[place]]);
            self.at_most(format!("latency added to the floor's, {what}, µs, at most"), Some(added), most);
        }
        Ok(())
    }

    /// What a datagram costs one thread on one core, and two threads on two. The kernel spreads the flows over the threads; each core has a
    /// generator of its own, for the flows that went to the thread there, so every thread finds the batches that the one finds: what the
    /// two threads share is all that is new. Two bare forwarders, which share nothing, tell what the second core is worth on this machine.
    fn threads(&mut self) -> anyhow::Result<()> {
        // Few enough to be made soon, and so many that no thread goes without.
        let flows = if self.arguments.quick { 16 } else { 64 };
        let (core, other) = (self.core, (self.core + self.cores - 1) % self.cores);
        stay_on(&[core])?;
        let mut generators = [Generator::default(), Generator::default()];
        for (pattern, what) in [(Pattern::Bulk, "bulk"), (Pattern::Single, "single datagrams")] {
            let one = Contender::ours(Place::Yielding(core), 1, flows)?;
            let mut two = Contender::ours(Place::YieldingAnywhere, 2, flows)?;
            two.subject.keep_thread_on("relay-0", core)?;
            two.subject.keep_thread_on("relay-1", other)?;
            let first = self.flows_of(&mut two, "relay-0")?;
            let bare = Contender::bare(Place::Yielding(core), true, flows)?;
            let halves = [core, other].map(|core| Contender::bare(Place::Yielding(core), true, flows / 2));
            let [here, there] = halves;
            let (here, there) = (here?, there?);
            let (first, second) = two.lanes.split_at(first);
            ensure!(!first.is_empty() && !second.is_empty(), "one thread has all flows");
            let sets: [&[(usize, &[Lane])]; 4] = [
                &[(core, &one.lanes)],
                &[(core, first), (other, second)],
                &[(core, &bare.lanes)],
                &[(core, &here.lanes), (other, &there.lanes)],
            ];
            let programs = [
                (ONE, vec![&one.subject]),
                (TWO, vec![&two.subject]),
                (BARE, vec![&bare.subject]),
                (BARE_TWICE, vec![&here.subject, &there.subject]),
            ];
            let spent = || -> anyhow::Result<[Duration; 2]> {
                Ok([two.subject.thread("relay-0")?, two.subject.thread("relay-1")?])
            };
            let before = spent()?;
            let load = format!("{what}, {flows} flows, 1200 bytes, a generator on each core");
            let many = if pattern == Pattern::Bulk { 8 } else { 1 };
            let row = measure::rounds(load, 1200, &programs, self.effort, |place, count| {
                let sets = sets[place];
                load_from_cores(&mut generators, sets, pattern, 1200, count * many * sets.len())
            })?;
            let after = spent()?;
            let shares = [0, 1].map(|thread| (after[thread] - before[thread]).as_secs_f64());
            self.report(&row, ONE);
            // The busier thread is the first to be at its limit.
            let busier = shares[0].max(shares[1]) / (shares[0] + shares[1]);
            let dearer = |two, one| row.ratio(two, one).map_or(f64::NAN, |ratio| ratio.median());
            let capacity = 1.0 / (dearer(TWO, ONE) * busier);
            if !self.arguments.json {
                println!(
                    "  {} of {flows} flows went to the first thread; the busier one had {:.0} % of the work; two bare forwarders have {:.2} times the capacity of one",
                    first.len(),
                    busier * 100.0,
                    2.0 / dearer(BARE_TWICE, BARE)
                );
            }
            self.at_least(format!("{what}: capacity of two threads by that of one, at least"), capacity, 1.6);
        }
        Ok(())
    }
}

impl Bench {
    /// Puts the lanes first that this thread serves; how many they are.
    fn flows_of(&mut self, contender: &mut Contender, thread: &str) -> anyhow::Result<usize> {
        let mut served = [Vec::new(), Vec::new()];
        for lane in std::mem::take(&mut contender.lanes) {
            let before = contender.subject.thread(thread)?;
            let load = self.generator.load(std::slice::from_ref(&lane), Pattern::Bulk, 1200, 500)?;
            self.lost += load.lost;
            let others = contender.subject.thread(thread)? == before;
            served[usize::from(others)].push(lane);
        }
        let [own, others] = served;
        let count = own.len();
        contender.lanes = own;
        contender.lanes.extend(others);
        Ok(count)
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let (rounds, datagrams) =
        if arguments.quick { (1, 2_000) } else { (arguments.rounds, arguments.datagrams) };
    let mut bench = Bench {
        core: arguments.core.unwrap_or(cores - 1),
        effort: Effort { rounds, datagrams },
        arguments,
        cores,
        generator: Generator::default(),
        rows: Vec::new(),
        bounds: Vec::new(),
        lost: 0,
    };
    let run = || {
        // Two sockets a lane, four programs.
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
        bench.run()
    };
    match { run }() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("relay_bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
