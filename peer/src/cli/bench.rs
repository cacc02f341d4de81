//! `peer bench`.

use std::time::Duration;

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use peer::bench::{Bench, BenchError, Direction, Measured, Phase, Rtts};
use peer::service::{Hub, RequestError};
use peer::{Endpoint, IntroductionPolicy, Path};
use serde_json::{Value, json};

use super::report::{Report, ms};
use super::settings::{self, EndpointArguments, Found, PeerName, Settings};
use super::transfers::is_live;
use super::{Failure, exit, interrupted, print_line};

pub(super) const EXAMPLES: &str = "\
Examples:
  peer bench nas
  peer bench nas --seconds 2 --direction down --json

The other side runs `peer listen --bench`. Goodput is counted where the bytes arrive; round trips
are those of small datagrams sent meanwhile, so what they have more under load has waited in
queues (bufferbloat). Measured once a direct path stands, or was sought in vain.";

/// How often the line on a terminal is drawn.
const DRAW: Duration = Duration::from_millis(100);

#[derive(Debug, Args)]
pub(super) struct BenchArguments {
    #[command(flatten)]
    pub(super) endpoint: EndpointArguments,
    /// The peer: an alias, an id or a ticket.
    peer: PeerName,
    /// Seconds for each direction, at most 60.
    #[arg(short, long, default_value_t = 5.0, value_parser = seconds)]
    seconds: f64,
    /// Which way [default: up, down, then both at once].
    #[arg(short, long, value_enum)]
    direction: Option<Way>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Way {
    /// From here to the other side.
    Up,
    /// From the other side to here.
    Down,
    /// Both at once.
    Both,
}

impl From<Way> for Direction {
    fn from(way: Way) -> Self {
        match way {
            Way::Up => Self::Up,
            Way::Down => Self::Down,
            Way::Both => Self::Both,
        }
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    let longest = peer::bench::LONGEST.as_secs_f64();
    let seconds = text.parse().ok().filter(|seconds| (0.1..=longest).contains(seconds));
    seconds.ok_or_else(|| format!("from 0.1 to {longest}"))
}

pub(super) async fn run(arguments: BenchArguments) -> Result<(), Failure> {
    let settings = arguments.endpoint.settle()?;
    let report = arguments.endpoint.report(&settings);
    let found = settings.find(&arguments.peer)?;
    let endpoint = settings.open(IntroductionPolicy::Only(vec![found.id]), Some(&found), &report).await?;
    let outcome = tokio::select! {
        outcome = bench(&endpoint, &settings, &found, &arguments, &report) => outcome,
        () = interrupted() => Err(Failure::interrupted()),
    };
    endpoint.close().await;
    outcome
}

async fn bench(
    endpoint: &Endpoint,
    settings: &Settings,
    found: &Found,
    arguments: &BenchArguments,
    report: &Report,
) -> Result<(), Failure> {
    let session = endpoint.connect(found.id).await?;
    report.connected(&session);
    let hub = Hub::new(session.clone());
    settings.show_secret(&hub, found, report).await.map_err(settings::not_invited)?;
    let bench = Bench::begin(hub).await.map_err(failed)?;
    session.settled().await;
    if let Some(path) = session.path() {
        report.path(&session, &path);
    }
    let over = || Failure::broken(anyhow::anyhow!("the session with {} has ended", found.id));
    let measuring = measure(&bench, arguments, report);
    tokio::select! {
        outcome = measuring => outcome,
        _ = session.closed() => Err(over()),
    }
}

fn failed(error: BenchError) -> Failure {
    match error {
        BenchError::Request(RequestError::Refused) => Failure {
            code: exit::REFUSED,
            error: anyhow::anyhow!(
                "the other side is not to be measured by us. `peer listen --bench` must run there, and this machine be trusted or named with --allow"
            ),
        },
        BenchError::Request(error) => Failure::request(error, "a measurement"),
        BenchError::Time => Failure { code: exit::USAGE, error: error.into() },
        error => Failure::broken(error),
    }
}

async fn measure(bench: &Bench, arguments: &BenchArguments, report: &Report) -> Result<(), Failure> {
    let idle = bench.idle().await;
    if arguments.endpoint.json {
        print_line(json!({ "event": "idle", "rtt": rtt_json(&idle) }))?;
    } else {
        print_line(format_args!("idle  {}", rtt_words(&idle, None)))?;
    }
    let all = [Direction::Up, Direction::Down, Direction::Both];
    let chosen = arguments.direction.map(|way| vec![Direction::from(way)]).unwrap_or(all.to_vec());
    for direction in chosen {
        let phase = watched(bench, direction, arguments, report).await.map_err(failed)?;
        if arguments.endpoint.json {
            print_line(phase_json(direction, &phase, &idle))?;
        } else {
            for line in words(direction, &phase, &idle) {
                print_line(line)?;
            }
        }
    }
    Ok(())
}

/// Measures one direction; on a terminal with a line that lives meanwhile.
async fn watched(
    bench: &Bench,
    direction: Direction,
    arguments: &BenchArguments,
    report: &Report,
) -> Result<Phase, BenchError> {
    let load = bench.load(direction, Duration::from_secs_f64(arguments.seconds));
    if !is_live(report) {
        return load.await;
    }
    let bar = ProgressBar::new((arguments.seconds * 1e3) as u64);
    if let Ok(style) = ProgressStyle::with_template("{bar:24} {msg}") {
        bar.set_style(style);
    }
    let (start, mut ticks) = (tokio::time::Instant::now(), tokio::time::interval(DRAW));
    tokio::pin!(load);
    let phase = loop {
        tokio::select! {
            phase = &mut load => break phase,
            _ = ticks.tick() => {
                let (up, down) = bench.so_far();
                let rates = [("up", up), ("down", down)].map(|(name, flow)| (name, flow.goodput()));
                let told = rates.iter().filter(|(_, rate)| *rate > 0.0);
                let told: Vec<_> = told.map(|(name, rate)| format!("{name} {}", rate_words(*rate))).collect();
                bar.set_position(start.elapsed().as_millis() as u64);
                bar.set_message(told.join(", "));
            }
        }
    };
    bar.finish_and_clear();
    phase
}

/// Three digits that count, in the unit that suits.
fn rate_words(bits: f64) -> String {
    let (value, unit) = match bits {
        bits if bits >= 1e9 => (bits / 1e9, "Gbit/s"),
        bits if bits >= 1e6 => (bits / 1e6, "Mbit/s"),
        bits => (bits / 1e3, "kbit/s"),
    };
    let digits = if value >= 100.0 { 0 } else { usize::from(value < 10.0) + 1 };
    format!("{value:.digits$} {unit}")
}

fn rtt_words(rtts: &Rtts, idle: Option<Duration>) -> String {
    let Some(median) = rtts.quantile(0.5) else {
        return format!("none of {} probes was answered", rtts.sent);
    };
    let shown = |rtt: Duration| format!("{:.1} ms", rtt.as_secs_f64() * 1e3);
    let greatest = rtts.quantile(1.0).unwrap_or(median);
    match idle {
        None => format!("RTT {}, at most {}", shown(median), shown(greatest)),
        Some(idle) => format!(
            "RTT {}, at most {}; {} more than idle",
            shown(median),
            shown(greatest),
            shown(median.saturating_sub(idle))
        ),
    }
}

/// `direct`, `relayed`, or how that has changed.
fn path_words(measured: &Measured) -> &'static str {
    match measured.direct {
        (true, true) => "direct",
        (false, false) => "relayed",
        (false, true) => "relayed, direct at the end",
        (true, false) => "direct, relayed at the end",
    }
}

fn flows(phase: &Phase) -> impl Iterator<Item = (&'static str, &Measured)> {
    [("up", &phase.up), ("down", &phase.down)]
        .into_iter()
        .filter_map(|(name, measured)| measured.as_ref().map(|measured| (name, measured)))
}

fn words(direction: Direction, phase: &Phase, idle: &Rtts) -> Vec<String> {
    let both = if direction == Direction::Both { " at once" } else { "" };
    let mut lines: Vec<String> = flows(phase)
        .map(|(name, measured)| {
            format!(
                "{name:<5} {}{both}, {}, {:.2} % of {} packets lost",
                rate_words(measured.flow.goodput()),
                path_words(measured),
                measured.loss.percent(),
                measured.loss.sent,
            )
        })
        .collect();
    lines.push(format!("      {}", rtt_words(&phase.rtt, idle.quantile(0.5))));
    lines
}

fn rtt_json(rtts: &Rtts) -> Value {
    let [least, median, p90, greatest] = [0.0, 0.5, 0.9, 1.0].map(|share| rtts.quantile(share).map(ms));
    json!({
        "sent": rtts.sent, "answered": rtts.answered.len(),
        "least_ms": least, "median_ms": median, "p90_ms": p90, "greatest_ms": greatest,
    })
}

fn flow_json(measured: &Measured) -> Value {
    let kind = |direct| if direct { "direct" } else { "relayed" };
    json!({
        "bytes": measured.flow.bytes,
        "seconds": measured.flow.time.as_secs_f64(),
        "bits_per_second": measured.flow.goodput().round(),
        "path": kind(measured.direct.1),
        "path_before": kind(measured.direct.0),
        "packets_sent": measured.loss.sent,
        "packets_lost": measured.loss.lost,
    })
}

fn phase_json(direction: Direction, phase: &Phase, idle: &Rtts) -> Value {
    let waiting = phase.rtt.quantile(0.5).zip(idle.quantile(0.5));
    json!({
        "event": "measured",
        "direction": direction.name(),
        "up": phase.up.as_ref().map(flow_json),
        "down": phase.down.as_ref().map(flow_json),
        "rtt": rtt_json(&phase.rtt),
        "more_than_idle_ms": waiting.map(|(loaded, idle)| ms(loaded.saturating_sub(idle))),
        "over": phase.path.as_ref().map(Path::to_string),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_have_three_digits_that_count() {
        let shown = [5.533e9, 123.4e6, 45.67e6, 1.234e6, 999.9, 0.0].map(rate_words);
        let expected =
            ["5.53 Gbit/s", "123 Mbit/s", "45.7 Mbit/s", "1.23 Mbit/s", "1.00 kbit/s", "0.00 kbit/s"];
        assert_eq!(shown, expected);
    }

    #[test]
    fn a_time_has_bounds() {
        assert_eq!(seconds("0.5"), Ok(0.5));
        assert!(["0", "61", "-1", "NaN", "x"].iter().all(|text| seconds(text).is_err()));
    }
}
