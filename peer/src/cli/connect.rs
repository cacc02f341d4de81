//! `peer connect`.

use clap::Args;
use futures_util::StreamExt as _;
use peer::daemon::Access;
use peer::service::RequestError;
use peer::{IntroductionPolicy, Session};

use super::report::Report;
use super::settings::{self, EndpointArguments, Found, PeerName, Settings};
use super::{Failure, explain, follow_servers, interrupted, pipe};

pub(super) const EXAMPLES: &str = "\
Examples:
  echo hello | peer connect nas
  PEER_SERVER=rv://ID@vps.example peer connect PEER < big.iso";

#[derive(Debug, Args)]
pub(super) struct ConnectArguments {
    #[command(flatten)]
    pub(super) endpoint: EndpointArguments,
    /// The peer to reach: an alias, an id or a ticket.
    peer: PeerName,
}

pub(super) async fn run(arguments: ConnectArguments, verbose: bool) -> Result<(), Failure> {
    let settings = arguments.endpoint.settle()?;
    let report = arguments.endpoint.report(&settings);
    let found = settings.find(&arguments.peer)?;
    // Only the peer that we dial may be introduced to us, and that for the case that both dial at once.
    let policy = IntroductionPolicy::Only(vec![found.id]);
    let command = format!("connect {}", arguments.peer);
    let access = settings.access(policy, Some(&found), &report, &command).await?;
    follow_servers(&access, &report, verbose);
    let outcome = tokio::select! {
        outcome = connect(&access, &settings, &found, &report, verbose) => outcome,
        () = interrupted() => Err(Failure::interrupted()),
    };
    settings::conclude(&access, outcome).await
}

async fn connect(
    access: &Access,
    settings: &Settings,
    found: &Found,
    report: &Report,
    verbose: bool,
) -> Result<(), Failure> {
    let session = access.connect(found.id).await?;
    report.connected(&session);
    settings.introduce_oneself(&session, found, report).await?;
    let outcome = carry(&session, report).await;
    if verbose {
        explain::tell(&session, report).await;
    }
    outcome
}

/// Pipes standard input and output through the session.
async fn carry(session: &Session, report: &Report) -> Result<(), Failure> {
    let paths = tokio::spawn(follow(session.clone(), report.clone()));
    let piped = async {
        let (send, receive) = pipe::meet(session, None).await?;
        let stream = send.id();
        let upload = pipe::upload(tokio::io::stdin(), send);
        let download = pipe::download(receive, tokio::io::stdout(), || report.first_byte(session));
        tokio::pin!(upload);
        tokio::pin!(download);
        let (mut sent, mut received) = (None, None);
        while received.is_none() || sent.is_none() {
            tokio::select! {
                total = &mut upload, if sent.is_none() => sent = Some(total?),
                total = &mut download, if received.is_none() => received = Some(total?),
            }
        }
        session.delivered(stream).await?;
        anyhow::Ok((sent.unwrap_or(0), received.unwrap_or(0)))
    };
    let outcome = piped.await;
    paths.abort();
    let (sent, received) = outcome.map_err(broken)?;
    report.closed(session, sent, received);
    Ok(())
}

/// A pipe that broke: because it was refused, or otherwise.
fn broken(error: anyhow::Error) -> Failure {
    let refused = pipe::is_refused(&error);
    if refused { Failure::request(RequestError::Refused, "a pipe") } else { Failure::broken(error) }
}

/// Tells of every path, the first one included.
pub(super) async fn follow(session: Session, report: Report) {
    let mut changes = session.path_changes();
    while let Some(path) = changes.next().await {
        report.path(&session, &path);
    }
}
