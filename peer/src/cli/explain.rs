//! `peer explain`, and the end of `peer connect -v`.

use std::time::Duration;

use clap::Args;
use peer::daemon::Access;
use peer::{IntroductionPolicy, PeerId, Session};

use super::report::Report;
use super::settings::{self, EndpointArguments, PeerName};
use super::{Failure, interrupted};

pub(super) const EXAMPLES: &str = "\
Examples:
  peer explain nas
  peer explain --server rv://ID@vps.example PEER";

/// A direct path or the end of the first round of checks comes well within this.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Debug, Args)]
pub(super) struct ExplainArguments {
    #[command(flatten)]
    pub(super) endpoint: EndpointArguments,
    /// The peer to reach: an alias, an id or a ticket.
    peer: PeerName,
}

pub(super) async fn run(arguments: ExplainArguments) -> Result<(), Failure> {
    let settings = arguments.endpoint.settle()?;
    let report = arguments.endpoint.report(&settings);
    let found = settings.find(&arguments.peer)?;
    let command = format!("explain {}", arguments.peer);
    let access =
        settings.access(IntroductionPolicy::Only(Vec::new()), Some(&found), &report, &command).await?;
    let outcome = tokio::select! {
        outcome = explain(&access, found.id, &report) => outcome,
        () = interrupted() => Err(Failure::interrupted()),
    };
    settings::conclude(&access, outcome).await
}

async fn explain(access: &Access, target: PeerId, report: &Report) -> Result<(), Failure> {
    let session = access.connect(target).await?;
    report.connected(&session);
    report.seeking();
    // In either case what is known by now is told.
    let _ = tokio::time::timeout(PATIENCE, session.settled()).await;
    tell(&session, report).await;
    Ok(())
}

/// Tells why the session's path is what it is.
pub(super) async fn tell(session: &Session, report: &Report) {
    if let Some(explanation) = session.explain().await {
        report.explained(&explanation);
    } else if let Some(explained) = session.explained_by_daemon().await {
        report.explained_as(explained);
    }
}
