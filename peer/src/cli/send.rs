//! `peer send`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fs, io};

use clap::Args;
use clap_complete::engine::ArgValueCompleter;
use peer::daemon::Access;
use peer::service::{Hub, Request, RequestError};
use peer::transfer::{self, Progress, SendError, Sent, Source, SourceError};
use peer::{ConnectError, IntroductionPolicy, PeerId, Session};
use serde_json::json;

use super::connect::follow;
use super::report::Report;
use super::settings::{self, EndpointArguments, Found, PeerName, Settings};
use super::transfers::{Meter, files, is_live, size};
use super::{Failure, exit, follow_servers, interrupted};

pub(super) const EXAMPLES: &str = "\
Examples:
  peer send photos report.pdf nas
  peer send --wait 60 big.iso TICKET

The other side runs `peer receive`. Files that it has are compared, not sent; when anything
breaks, the same command goes on where it was. Kept are names, permissions, dates, empty
folders, holes, and links that stay within the folder that is sent.";

/// Between two attempts to reach the other side.
const PAUSE: Duration = Duration::from_secs(2);

/// How long the other side may take to say whether it takes files at all; nobody is asked for that.
const ANSWER: Duration = Duration::from_secs(30);

#[derive(Debug, Args)]
pub(super) struct SendArguments {
    #[command(flatten)]
    pub(super) endpoint: EndpointArguments,
    /// Give up when the other side has not been there for so long [default: wait until interrupted].
    #[arg(long, value_name = "SECONDS")]
    wait: Option<u64>,
    /// Files and folders.
    #[arg(required = true, value_name = "FILE", add = ArgValueCompleter::new(super::shell::file_or_peer))]
    files: Vec<PathBuf>,
    /// The peer to send them to: an alias, an id or a ticket.
    #[arg(required = true)]
    peer: PeerName,
}

pub(super) async fn run(arguments: SendArguments, verbose: bool) -> Result<(), Failure> {
    let settings = arguments.endpoint.settle()?;
    let report = arguments.endpoint.report(&settings);
    let found = settings.find(&arguments.peer)?;
    let paths = arguments.files.clone();
    let collected = tokio::task::spawn_blocking(move || {
        paths.iter().try_for_each(|path| readable(path))?;
        Source::collect(&paths)
    });
    let source = tokio::select! {
        source = collected => source.map_err(Failure::failed)?.map_err(unreadable)?,
        () = interrupted() => return Err(Failure::interrupted()),
    };
    tell_source(&source, &report);
    let policy = IntroductionPolicy::Only(vec![found.id]);
    let command = format!("send {}", arguments.peer);
    let access = settings.access(policy, Some(&found), &report, &command).await?;
    follow_servers(&access, &report, verbose);
    let wait = arguments.wait.map(Duration::from_secs);
    let outcome = tokio::select! {
        outcome = send(&access, &settings, found, wait, &source, &report) => outcome,
        () = interrupted() => {
            let words = "interrupted: what has arrived is kept there, the same command goes on from there";
            Err(Failure { code: exit::INTERRUPTED, error: anyhow::anyhow!(words) })
        }
    };
    settings::conclude(&access, outcome).await
}

/// What is named can be opened: better said now than when the other side has come. What it is may be anything, and is for others to judge.
fn readable(path: &Path) -> Result<(), SourceError> {
    let opened = match fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => fs::File::open(path).map(|_| ()),
        Ok(metadata) if metadata.is_dir() => fs::read_dir(path).map(|_| ()),
        _ => Ok(()),
    };
    opened.map_err(|source| SourceError::Path { path: path.to_owned(), source })
}

/// What was named cannot be sent.
fn unreadable(error: SourceError) -> Failure {
    match &error {
        SourceError::Path { source, .. } if source.kind() == io::ErrorKind::NotFound => Failure {
            code: exit::USAGE,
            error: anyhow::anyhow!("{error}. Files are named first, the peer last: peer send FILE... PEER"),
        },
        SourceError::Path { source, .. } => Failure::of_file(&error, Some(source)),
        _ => Failure::failed(error),
    }
}

fn tell_source(source: &Source, report: &Report) {
    for left in source.left_out() {
        let fields = json!({ "path": left.path, "message": left.reason.to_string() });
        report.say("left_out", fields, &format!("not sent: {} ({})", left.path, left.reason));
    }
    let manifest = source.manifest();
    let words = format!("{}, {}", files(manifest.files()), size(manifest.bytes()));
    let fields = json!({ "files": manifest.files(), "bytes": manifest.bytes() });
    report.say("offering", fields, &words);
}

/// Sends until the other side has it all, however often it has to begin.
async fn send(
    access: &Access,
    settings: &Settings,
    mut found: Found,
    wait: Option<Duration>,
    source: &Source,
    report: &Report,
) -> Result<(), Failure> {
    let progress = Arc::new(Progress::default());
    let mut patience = Patience::new(wait);
    loop {
        let failure = match access.connect(found.id).await {
            Ok(session) => {
                report.connected(&session);
                let start = Instant::now();
                let before = progress.now().carried;
                match over(&session, settings, &mut found, source, &progress, report).await {
                    Ok(sent) => return done(&session, source, &progress, sent, start, report),
                    Err(Trouble::Passing(failure)) => {
                        // It may not know yet that this is over.
                        session.close(1_u8.into(), b"begun again");
                        if progress.now().carried > before {
                            patience.renew();
                        }
                        failure
                    }
                    Err(Trouble::Lasting(failure)) => return Err(failure),
                }
            }
            Err(
                error @ (ConnectError::Unavailable(_)
                | ConnectError::TimedOut { .. }
                | ConnectError::Handshake { .. }
                | ConnectError::Server(_)
                | ConnectError::Told { .. }
                | ConnectError::Daemon(_)),
            ) => error.into(),
            Err(error) => return Err(error.into()),
        };
        let Some(pause) = patience.pause(Instant::now()) else { return Err(failure) };
        patience.tell(&failure, found.id, "peer receive", report);
        tokio::time::sleep(pause).await;
    }
}

/// How long to go on without getting anywhere.
pub(super) struct Patience {
    limit: Option<Duration>,
    since: Instant,
    told: Option<String>,
}

impl Patience {
    pub(super) fn new(limit: Option<Duration>) -> Self {
        Self { limit, since: Instant::now(), told: None }
    }

    /// Something has been achieved.
    pub(super) fn renew(&mut self) {
        self.since = Instant::now();
    }

    /// Whatever was told is told again.
    pub(super) fn forget(&mut self) {
        self.told = None;
    }

    /// How long until the next attempt; `None` when there is to be none.
    pub(super) fn pause(&self, now: Instant) -> Option<Duration> {
        let passed = now.saturating_duration_since(self.since);
        match self.limit {
            Some(limit) if passed >= limit => None,
            Some(limit) => Some(PAUSE.min(limit - passed)),
            None => Some(PAUSE),
        }
    }

    /// Says why it waits for that peer to run a command, once for each reason.
    pub(super) fn tell(&mut self, failure: &Failure, peer: PeerId, command: &str, report: &Report) {
        let message = format!("{:#}", failure.error);
        if self.told.as_ref() != Some(&message) {
            let words = format!("{message}\npeer: waiting for {peer}, where `{command}` must run");
            report.say("waiting", json!({ "message": message, "peer": peer.to_string() }), &words);
            self.told = Some(message);
        }
    }
}

/// Why an attempt led to nothing.
enum Trouble {
    /// The same may do a little later.
    Passing(Failure),
    /// The same would end the same.
    Lasting(Failure),
}

impl Trouble {
    /// The invitation was not taken, or has not been answered yet.
    fn of_invitation(error: RequestError) -> Self {
        match error {
            RequestError::Session => Self::Passing(Failure::broken(error)),
            error => Self::Lasting(settings::not_invited(error)),
        }
    }

    /// The other side takes no files, or did not live to say so.
    fn of_request(error: RequestError, peer: PeerId) -> Self {
        match error {
            RequestError::Refused => Self::Lasting(Failure {
                code: exit::REFUSED,
                error: anyhow::anyhow!("{peer} takes no files; `peer receive` must run there"),
            }),
            RequestError::Failed(_) => Self::Lasting(Failure::request(error, "files")),
            _ => Self::Passing(Failure::broken(error)),
        }
    }

    fn of_transfer(error: SendError, peer: PeerId) -> Self {
        match error {
            error if error.is_transient() => Self::Passing(Failure::broken(error)),
            SendError::Refused(reason) => Self::Lasting(Failure {
                code: exit::REFUSED,
                error: anyhow::anyhow!("{peer} did not take it: {reason}"),
            }),
            error => Self::Lasting(Failure::failed(error)),
        }
    }
}

/// One attempt.
async fn over(
    session: &Session,
    settings: &Settings,
    found: &mut Found,
    source: &Source,
    progress: &Arc<Progress>,
    report: &Report,
) -> Result<Sent, Trouble> {
    let hub = Hub::new(session.clone());
    let begun = async {
        settings.show_secret(&hub, found, report).await.map_err(Trouble::of_invitation)?;
        // It has been answered.
        found.secret = None;
        hub.ask(&Request::Files).await.map_err(|error| Trouble::of_request(error, found.id))
    };
    let exchange = tokio::time::timeout(ANSWER, begun).await.unwrap_or_else(|_| {
        let words = format!("no answer within {} s", ANSWER.as_secs());
        Err(Trouble::Passing(Failure::broken(anyhow::anyhow!(words))))
    })?;
    let _meter = Meter::start(report, session, progress);
    // On a terminal the live line shows the path.
    let paths = (!is_live(report)).then(|| tokio::spawn(follow(session.clone(), report.clone())));
    let sent = transfer::send(exchange.send, exchange.receive, source, progress).await;
    if let Some(paths) = paths {
        paths.abort();
    }
    sent.map_err(|error| Trouble::of_transfer(error, session.peer()))
}

fn done(
    session: &Session,
    source: &Source,
    progress: &Progress,
    sent: Sent,
    start: Instant,
    report: &Report,
) -> Result<(), Failure> {
    let (standing, seconds) = (progress.now(), start.elapsed().as_secs_f64());
    let fields = json!({
        "files": source.manifest().files(), "bytes": source.manifest().bytes(), "carried": standing.carried,
        "kept": sent.kept, "failed": sent.failed, "seconds": seconds,
        "direct": session.path().map(|path| path.is_direct()),
    });
    let words = format!(
        "{}, {} in {seconds:.1} s, {}/s; {} were carried",
        files(source.manifest().files()),
        size(standing.bytes),
        size((standing.bytes as f64 / seconds.max(1e-3)) as u64),
        size(standing.carried),
    );
    report.say("sent", fields, &words);
    if sent.kept + sent.failed == 0 {
        return Ok(());
    }
    let mut words = Vec::new();
    if sent.kept > 0 {
        words.push(format!("{} kept others of the same name (it can `peer receive --overwrite`)", sent.kept));
    }
    if sent.failed > 0 {
        words.push(format!("{} could not be read here", sent.failed));
    }
    Err(Failure::failed(anyhow::anyhow!("not all of it arrived: {}", words.join(", "))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_is_counted_from_the_last_progress() {
        let mut patience = Patience::new(Some(Duration::from_secs(5)));
        let start = patience.since;
        assert_eq!(patience.pause(start), Some(PAUSE));
        assert_eq!(patience.pause(start + Duration::from_secs(4)), Some(Duration::from_secs(1)));
        assert_eq!(patience.pause(start + Duration::from_secs(5)), None);
        patience.renew();
        assert!(patience.pause(patience.since).is_some());
        assert_eq!(Patience::new(None).pause(start + Duration::from_secs(1 << 20)), Some(PAUSE));
        assert_eq!(Patience::new(Some(Duration::ZERO)).pause(start), None);
    }
}
