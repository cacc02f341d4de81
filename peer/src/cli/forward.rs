//! `peer forward`.

use clap::Args;
use peer::IntroductionPolicy;
use peer::daemon::Access;
use peer::forward::{Bind, ForwardError, Forwarder, Forwarding, Plan, Protocol};

use super::report::Report;
use super::settings::{self, EndpointArguments, Found, PeerName, Settings};
use super::{Failure, exit, follow_servers, interrupted, listen};

pub(super) const EXAMPLES: &str = "\
Examples:
  peer forward nas -L 8080:localhost:80
      http://localhost:8080 here is the web server there.
  peer forward nas -L 5432:db.lan:5432 -L udp:5353:192.168.1.1:53 -L 2375:/run/docker.sock
      Several at once: another host there, DNS, a Unix socket.
  peer forward nas -R 9000:localhost:3000
      Port 9000 there is port 3000 here; there: peer listen --allow-listen 127.0.0.1:9000
  peer forward nas -D 1080
      curl --proxy socks5h://localhost:1080 http://router.lan/ goes out there.

There: peer listen --allow-forward HOST:PORT, with the names that are used here. The session is
opened again whenever it ends. Port 0 is any free one; the port is told on standard error.";

#[derive(Debug, Args)]
pub(super) struct ForwardArguments {
    #[command(flatten)]
    pub(super) endpoint: EndpointArguments,
    /// The peer to forward to: an alias, an id or a ticket.
    peer: PeerName,
    /// From here to there: [udp:][ADDRESS:]PORT:HOST:PORT, with /PATH of a Unix socket for ADDRESS:PORT or HOST:PORT. The address is 127.0.0.1
    /// unless named; `*` is any.
    #[arg(short = 'L', long = "local", value_name = "FORWARD")]
    local: Vec<Forwarding>,
    /// From there to here, where the other side allows it: the same form, with the place there first.
    #[arg(short = 'R', long = "remote", value_name = "FORWARD")]
    remote: Vec<Forwarding>,
    /// Speak SOCKS5 here, at [ADDRESS:]PORT; the other side resolves names.
    #[arg(short = 'D', long = "socks", value_name = "PLACE", value_parser = socks)]
    socks: Vec<Bind>,
}

fn socks(text: &str) -> Result<Bind, String> {
    match text.parse().map_err(|error: peer::forward::SpecError| error.to_string())? {
        bind @ Bind::Address(Protocol::Tcp, _) => Ok(bind),
        _ => Err("SOCKS5 is spoken at a TCP port: [address:]port".into()),
    }
}

pub(super) async fn run(arguments: ForwardArguments, verbose: bool) -> Result<(), Failure> {
    let plan = Plan { local: arguments.local, remote: arguments.remote, socks: arguments.socks };
    if plan.local.is_empty() && plan.remote.is_empty() && plan.socks.is_empty() {
        let error = anyhow::anyhow!(
            "there is nothing to forward; name it with -L, -R or -D, for instance -L 8080:localhost:80"
        );
        return Err(Failure { code: exit::USAGE, error });
    }
    let settings = arguments.endpoint.settle()?;
    let report = arguments.endpoint.report(&settings);
    let found = settings.find(&arguments.peer)?;
    let (policy, command) = (IntroductionPolicy::Only(vec![found.id]), format!("forward {}", arguments.peer));
    let access = settings.access(policy, Some(&found), &report, &command).await?;
    follow_servers(&access, &report, verbose);
    let outcome = tokio::select! {
        outcome = forward(&access, &settings, &found, plan, &report) => outcome,
        // Stopping it is how it ends.
        () = interrupted() => Ok(()),
    };
    settings::conclude(&access, outcome).await
}

async fn forward(
    access: &Access,
    settings: &Settings,
    found: &Found,
    plan: Plan,
    report: &Report,
) -> Result<(), Failure> {
    let forwarder = Forwarder::bind(access.clone(), found.id, plan, listen::observer(report)).await?;
    let shown = std::cell::Cell::new(false);
    let prologue = async |hub: &peer::service::Hub| {
        if !shown.replace(true) {
            settings.show_secret(hub, found, report).await?;
        }
        Ok(())
    };
    Ok(forwarder.run(prologue).await?)
}

impl From<ForwardError> for Failure {
    fn from(error: ForwardError) -> Self {
        match error {
            ForwardError::Connect(error) => error.into(),
            ForwardError::Prologue(error) => settings::not_invited(error),
            ForwardError::Remote { at, source } => {
                Self::request(source, &format!("the other side does not listen at {at}"))
            }
            error => Self { code: exit::FAILURE, error: error.into() },
        }
    }
}
