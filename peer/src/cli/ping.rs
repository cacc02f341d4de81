//! `peer ping`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bytes::BufMut as _;
use clap::Args;
use peer::daemon::Access;
use peer::service::{Hub, Request, RequestError};
use peer::{IntroductionPolicy, Path, Session};
use serde_json::json;

use super::report::{Report, ms};
use super::settings::{self, EndpointArguments, Found, PeerName, Settings};
use super::{Failure, follow_servers, interrupted, print_line};

pub(super) const EXAMPLES: &str = "\
Examples:
  peer ping nas
  peer ping nas --count 100 --interval 0.05 --json

Each probe is one datagram that is not sent again when it is lost. The first go over the relay,
the later ones over the direct path, if there is one.";

/// How long the last answers may take.
const PATIENCE: Duration = Duration::from_secs(3);

#[derive(Debug, Args)]
pub(super) struct PingArguments {
    #[command(flatten)]
    pub(super) endpoint: EndpointArguments,
    /// The peer: an alias, an id or a ticket.
    peer: PeerName,
    /// How many probes.
    #[arg(short, long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    count: u32,
    /// Seconds between them.
    #[arg(short, long, default_value_t = 0.5, value_parser = interval)]
    interval: f64,
}

fn interval(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|seconds| (0.01..=3600.0).contains(seconds))
        .ok_or_else(|| "from 0.01 to 3600".into())
}

pub(super) async fn run(arguments: PingArguments, verbose: bool) -> Result<(), Failure> {
    let settings = arguments.endpoint.settle()?;
    let report = arguments.endpoint.report(&settings);
    let found = settings.find(&arguments.peer)?;
    let (policy, command) = (IntroductionPolicy::Only(vec![found.id]), format!("ping {}", arguments.peer));
    let access = settings.access(policy, Some(&found), &report, &command).await?;
    follow_servers(&access, &report, verbose);
    let outcome = tokio::select! {
        outcome = ping(&access, &settings, &found, &arguments, &report) => outcome,
        () = interrupted() => Err(Failure::interrupted()),
    };
    settings::conclude(&access, outcome).await
}

/// What is known of the probes on one path.
#[derive(Debug, Default)]
struct Tally {
    sent: u32,
    answered: Vec<Duration>,
}

impl Tally {
    fn loss(&self) -> f64 {
        let answered = self.answered.len() as f64;
        if self.sent == 0 { 0.0 } else { 100.0 * (1.0 - answered / f64::from(self.sent)) }
    }

    /// Least, median, greatest.
    fn spread(&self) -> Option<[Duration; 3]> {
        let mut all = self.answered.clone();
        all.sort_unstable();
        Some([*all.first()?, *all.get(all.len() / 2)?, *all.last()?])
    }
}

async fn ping(
    access: &Access,
    settings: &Settings,
    found: &Found,
    arguments: &PingArguments,
    report: &Report,
) -> Result<(), Failure> {
    let session = access.connect(found.id).await?;
    report.connected(&session);
    let hub = Hub::new(session.clone());
    settings.show_secret(&hub, found, report).await.map_err(settings::not_invited)?;
    let failed = |error: RequestError| Failure::request(error, "ping");
    let exchange = hub.ask(&Request::Ping).await.map_err(failed)?;
    let (sender, mut receiver) = exchange.flow();
    let mut ticks = tokio::time::interval(Duration::from_secs_f64(arguments.interval));
    // When each was sent, and over which path; `None` once it was answered.
    let mut sent: Vec<Option<(Instant, String)>> = Vec::new();
    let mut tallies: BTreeMap<String, Tally> = BTreeMap::new();
    let mut end = None;
    while sent.iter().any(Option::is_some) || sent.len() < arguments.count as usize {
        let late = async {
            match end {
                Some(end) => tokio::time::sleep_until(end).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = ticks.tick(), if sent.len() < arguments.count as usize => {
                let path = shown(&session);
                let mut buffer = sender.buffer(8);
                buffer.put_u32(sent.len() as u32);
                buffer.put_u32(!(sent.len() as u32));
                let now = Instant::now();
                sender.send(buffer.freeze()).map_err(failed)?;
                tallies.entry(path.clone()).or_default().sent += 1;
                sent.push(Some((now, path)));
                if sent.len() == arguments.count as usize {
                    end = Some(tokio::time::Instant::now() + PATIENCE);
                }
            }
            payload = receiver.receive() => {
                let Some((number, rtt, path)) = answer(&payload, &mut sent) else { continue };
                told(arguments, number, rtt, &path)?;
                tallies.entry(path).or_default().answered.push(rtt);
            }
            _ = session.closed() => return Err(Failure::broken(anyhow::anyhow!("the session with {} has ended", found.id))),
            () = late => break,
        }
    }
    if let Some(path) = session.path() {
        report.path(&session, &path);
    }
    summary(arguments, &tallies)?;
    if tallies.values().all(|tally| tally.answered.is_empty()) {
        return Err(Failure::broken(anyhow::anyhow!("none of {} probes was answered", sent.len())));
    }
    Ok(())
}

/// The probe that this answers.
fn answer(payload: &[u8], sent: &mut [Option<(Instant, String)>]) -> Option<(u32, Duration, String)> {
    let bytes: [u8; 8] = payload.try_into().ok()?;
    let number = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    let (at, path) = sent.get_mut(number as usize)?.take()?;
    Some((number, at.elapsed(), path))
}

fn shown(session: &Session) -> String {
    match session.path() {
        Some(Path::Direct { remote, .. }) => format!("direct {remote}"),
        Some(path) => path.to_string(),
        None => "no path yet".into(),
    }
}

fn told(arguments: &PingArguments, number: u32, rtt: Duration, path: &str) -> Result<(), Failure> {
    if arguments.endpoint.json {
        print_line(json!({ "event": "pong", "number": number, "rtt_ms": ms(rtt), "path": path }))
    } else {
        print_line(format_args!("{number}: {:.1} ms, {path}", rtt.as_secs_f64() * 1e3))
    }
}

fn summary(arguments: &PingArguments, tallies: &BTreeMap<String, Tally>) -> Result<(), Failure> {
    for (path, tally) in tallies {
        let spread = tally.spread();
        if arguments.endpoint.json {
            let fields = json!({
                "event": "summary",
                "path": path,
                "sent": tally.sent,
                "answered": tally.answered.len(),
                "loss_percent": tally.loss(),
                "rtt_ms": spread.map(|all| all.map(ms)),
            });
            print_line(fields)?;
        } else {
            let rtt = spread.map_or_else(String::new, |[least, median, greatest]| {
                let [least, median, greatest] = [least, median, greatest].map(|rtt| rtt.as_secs_f64() * 1e3);
                format!(", RTT {least:.1} / {median:.1} / {greatest:.1} ms (least, median, greatest)")
            });
            print_line(format_args!(
                "{path}: {} of {} answered, {:.0} % lost{rtt}",
                tally.answered.len(),
                tally.sent,
                tally.loss()
            ))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_counts_once_and_garbage_never() {
        let mut sent = vec![Some((Instant::now(), "relayed".to_owned()))];
        let good = [0, 0, 0, 0, 255, 255, 255, 255];
        assert!(answer(&[0, 0, 0, 1, 0, 0, 0, 0], &mut sent).is_none());
        assert!(answer(&good[..4], &mut sent).is_none());
        assert_eq!(answer(&good, &mut sent).unwrap().0, 0);
        assert!(answer(&good, &mut sent).is_none());
    }

    #[test]
    fn losses_and_spreads_are_what_they_say() {
        let answered = [30, 10, 20].map(Duration::from_millis).to_vec();
        let tally = Tally { sent: 4, answered };
        assert!((tally.loss() - 25.0).abs() < 1e-9);
        assert_eq!(tally.spread(), Some([10, 20, 30].map(Duration::from_millis)));
        assert_eq!(Tally::default().spread(), None);
    }
}
