//! What `peer send` and `peer receive` share: how far they are, in words and as a live line.

use std::io::IsTerminal as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use peer::Session;
use peer::transfer::{Progress, Standing};
use serde_json::json;

use super::report::Report;

/// How often the line on a terminal is drawn.
const DRAW: Duration = Duration::from_millis(100);

/// How often `--json` tells how far it is.
const TELL: Duration = Duration::from_secs(1);

/// The time that a rate is taken over.
const RATE: f64 = 3.0;

/// Shows how far a transfer is, until dropped: a live line on a terminal, events with `--json`.
pub(super) struct Meter(tokio::task::JoinHandle<()>, Option<ProgressBar>);

impl Drop for Meter {
    fn drop(&mut self) {
        self.0.abort();
        if let Some(bar) = &self.1 {
            bar.finish_and_clear();
        }
    }
}

/// Whether people look at standard error.
pub(super) fn is_live(report: &Report) -> bool {
    !report.is_json() && std::io::stderr().is_terminal()
}

impl Meter {
    pub(super) fn start(report: &Report, session: &Session, progress: &Arc<Progress>) -> Self {
        let (report, session, progress) = (report.clone(), session.clone(), progress.clone());
        if is_live(&report) {
            let bar = ProgressBar::new(0);
            if let Ok(style) = ProgressStyle::with_template("{bar:24} {msg}") {
                bar.set_style(style);
            }
            let drawn = bar.clone();
            let task = tokio::spawn(watch(progress, DRAW, move |standing, rate, _| {
                drawn.set_length(standing.total_bytes.max(1));
                drawn.set_position(standing.bytes);
                drawn.set_message(line(standing, rate, &session));
            }));
            return Self(task, Some(bar));
        }
        let task = tokio::spawn(watch(progress, TELL, move |standing, rate, eta| {
            if !report.is_json() {
                return;
            }
            let fields = json!({
                "files": standing.files, "total_files": standing.total_files,
                "bytes": standing.bytes, "total_bytes": standing.total_bytes, "carried": standing.carried,
                "bytes_per_second": rate.round(), "seconds_left": eta,
                "direct": session.path().map(|path| path.is_direct()),
            });
            report.say("progress", fields, "");
        }));
        Self(task, None)
    }
}

/// Calls `show` every so often, with the rate in bytes per second and the seconds that are left at it.
async fn watch(
    progress: Arc<Progress>,
    every: Duration,
    mut show: impl FnMut(&Standing, f64, Option<u64>) + Send + 'static,
) {
    let mut interval = tokio::time::interval(every);
    let (mut before, mut then, mut rate) = (progress.now().bytes, Instant::now(), 0.0);
    loop {
        interval.tick().await;
        let standing = progress.now();
        let passed = then.elapsed().as_secs_f64();
        if passed > 0.0 {
            let weight = (passed / RATE).min(1.0);
            rate += (standing.bytes.saturating_sub(before) as f64 / passed - rate) * weight;
        }
        (before, then) = (standing.bytes, Instant::now());
        show(&standing, rate, eta(&standing, rate));
    }
}

/// Seconds left; `None` when nothing moves.
fn eta(standing: &Standing, rate: f64) -> Option<u64> {
    let left = standing.total_bytes.saturating_sub(standing.bytes) as f64;
    (rate >= 1.0).then(|| (left / rate).ceil() as u64)
}

fn line(standing: &Standing, rate: f64, session: &Session) -> String {
    let path = match session.path() {
        Some(path) if path.is_direct() => "direct",
        Some(_) => "relayed",
        None => "no path",
    };
    let eta = eta(standing, rate)
        .map_or_else(|| "--:--".to_owned(), |seconds| format!("{}:{:02}", seconds / 60, seconds % 60));
    format!(
        "{} of {}, {} of {} files, {}/s, {eta} left, {path}",
        HumanBytes(standing.bytes),
        HumanBytes(standing.total_bytes),
        standing.files,
        standing.total_files,
        HumanBytes(rate as u64),
    )
}

/// A number of bytes, for people.
pub(super) fn size(bytes: u64) -> String {
    HumanBytes(bytes).to_string()
}

/// `1 file`, `2 files`.
pub(super) fn files(count: u32) -> String {
    if count == 1 { "1 file".to_owned() } else { format!("{count} files") }
}

/// The first of them, and how many more there are.
pub(super) fn some(paths: &[String]) -> String {
    const SHOWN: usize = 5;
    let shown = paths.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    match paths.len().checked_sub(SHOWN) {
        Some(more) if more > 0 => format!("{shown} and {more} more"),
        _ => shown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_names_are_shown() {
        let names: Vec<String> = ["a", "b", "c", "d", "e", "f", "g"].map(str::to_owned).to_vec();
        assert_eq!(some(&names[..2]), "a, b");
        assert_eq!(some(&names[..5]), "a, b, c, d, e");
        assert_eq!(some(&names), "a, b, c, d, e and 2 more");
        assert_eq!((files(1).as_str(), files(0).as_str()), ("1 file", "0 files"));
    }
}
