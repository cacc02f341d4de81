//! `peer ssh-proxy`.

use clap::Args;
use peer::IntroductionPolicy;
use peer::daemon::Access;
use peer::forward::{Protocol, Target};
use peer::service::{Hub, Request, RequestError};

use super::report::Report;
use super::settings::{self, EndpointArguments, Found, PeerName, Settings};
use super::{Failure, follow_servers, interrupted, pipe};

pub(super) const EXAMPLES: &str = "\
Example:
  ssh -o ProxyCommand='peer ssh-proxy %h %p' me@nas
      In ~/.ssh/config, so that `ssh nas` is enough:
        Host nas
          ProxyCommand peer ssh-proxy %h %p

There: peer listen --allow-forward localhost:22";

#[derive(Debug, Args)]
pub(super) struct SshProxyArguments {
    #[command(flatten)]
    pub(super) endpoint: EndpointArguments,
    /// The peer: an alias, an id or a ticket.
    peer: PeerName,
    /// The port of its SSH server.
    #[arg(default_value_t = 22)]
    port: u16,
}

pub(super) async fn run(arguments: SshProxyArguments, verbose: bool) -> Result<(), Failure> {
    let settings = arguments.endpoint.settle()?;
    // ssh shows our standard error: what is no error is told only where it is asked for.
    let report = arguments.endpoint.report(&settings).quiet();
    let found = settings.find(&arguments.peer)?;
    let (policy, command) =
        (IntroductionPolicy::Only(vec![found.id]), format!("ssh-proxy {}", arguments.peer));
    let access = settings.access(policy, Some(&found), &report, &command).await?;
    follow_servers(&access, &report, verbose);
    let outcome = tokio::select! {
        outcome = join(&access, &settings, &found, arguments.port, &report) => outcome,
        () = interrupted() => Err(Failure::interrupted()),
    };
    settings::conclude(&access, outcome).await
}

async fn join(
    access: &Access,
    settings: &Settings,
    found: &Found,
    port: u16,
    report: &Report,
) -> Result<(), Failure> {
    let session = access.connect(found.id).await?;
    report.connected(&session);
    let hub = Hub::new(session.clone());
    settings.show_secret(&hub, found, report).await.map_err(settings::not_invited)?;
    let target = Target::Host { protocol: Protocol::Tcp, host: "localhost".into(), port };
    let failed = |error: RequestError| Failure::request(error, &target.to_string());
    let exchange = hub.ask(&Request::Connect(target.clone())).await.map_err(failed)?;
    let paths = tokio::spawn(super::connect::follow(session.clone(), report.clone()));
    let upload = pipe::upload(tokio::io::stdin(), exchange.send);
    let download = pipe::download(exchange.receive, tokio::io::stdout(), || report.first_byte(&session));
    tokio::pin!(upload);
    tokio::pin!(download);
    // What the server has said last is the end, whether ssh has closed its side or not.
    let outcome = tokio::select! {
        received = &mut download => received,
        sent = &mut upload => match sent {
            Ok(_) => download.await,
            Err(error) => Err(error),
        },
    };
    paths.abort();
    let received = outcome.map_err(Failure::broken)?;
    report.closed(&session, 0, received);
    Ok(())
}
