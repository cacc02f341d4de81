//! `peer connect`.

use clap::Args;
use futures_util::StreamExt as _;
use peer::{Endpoint, IntroductionPolicy, PeerId, Session};

use super::report::Report;
use super::{EndpointArguments, Failure, explain, follow_servers, interrupted, pipe};

pub(super) const EXAMPLES: &str = "\
Examples:
  echo hello | peer connect --server rv://ID@vps.example PEER
  PEER_SERVER=rv://ID@vps.example peer connect PEER < big.iso";

#[derive(Debug, Args)]
pub(super) struct ConnectArguments {
    #[command(flatten)]
    pub(super) endpoint: EndpointArguments,
    /// The id of the peer to reach.
    peer: PeerId,
}

pub(super) async fn run(arguments: ConnectArguments, verbose: bool) -> Result<(), Failure> {
    let report = Report::new(arguments.endpoint.json);
    // Only the peer that we dial may be introduced to us, and that for the case that both dial at once.
    let policy = IntroductionPolicy::Only(vec![arguments.peer]);
    let endpoint = arguments.endpoint.open(policy, &report).await?;
    follow_servers(&endpoint, &report, verbose);
    let outcome = tokio::select! {
        outcome = connect(&endpoint, arguments.peer, &report, verbose) => outcome,
        () = interrupted() => Err(Failure::interrupted()),
    };
    endpoint.close().await;
    outcome
}

async fn connect(endpoint: &Endpoint, target: PeerId, report: &Report, verbose: bool) -> Result<(), Failure> {
    let session = endpoint.connect(target).await?;
    let outcome = carry(&session, report).await.map_err(Failure::broken);
    if verbose {
        explain::tell(&session, report).await;
    }
    outcome
}

/// Pipes standard input and output through the session.
async fn carry(session: &Session, report: &Report) -> anyhow::Result<()> {
    report.connected(session);
    let paths = tokio::spawn(follow(session.clone(), report.clone()));
    let piped = async {
        let (send, receive) = pipe::meet(session).await?;
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
        anyhow::Ok((sent.unwrap_or(0), received.unwrap_or(0)))
    };
    let outcome = piped.await;
    paths.abort();
    let (sent, received) = outcome?;
    report.closed(session, sent, received);
    Ok(())
}

/// Tells of every path, the first one included.
pub(super) async fn follow(session: Session, report: Report) {
    let mut changes = session.path_changes();
    while let Some(path) = changes.next().await {
        report.path(&session, &path);
    }
}
