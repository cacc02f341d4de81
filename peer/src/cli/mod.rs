//! Arguments, and what every command shares.

mod connect;
mod doctor;
mod explain;
mod listen;
mod pipe;
mod receive;
mod report;
mod send;
mod transfers;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use peer::{
    BindError, ConnectError, Endpoint, IntroductionPolicy, OnlineError, PeerId, RendezvousAddress, identity,
};
use tokio::signal::unix::{SignalKind, signal};

use report::Report;

/// Exit codes, as `--help` states them.
mod exit {
    pub(super) const FAILURE: u8 = 1;
    pub(super) const USAGE: u8 = 2;
    pub(super) const SERVER: u8 = 3;
    pub(super) const UNAVAILABLE: u8 = 4;
    pub(super) const BROKEN: u8 = 5;
    pub(super) const INTERRUPTED: u8 = 130;
}

const AFTER_HELP: &str = "\
Examples:
  peer id
      Print this machine's id; on the first call, make its key.
  peer listen --server rv://ID@vps.example --echo
      Send back whatever anyone sends.
  peer listen --server rv://ID@vps.example < backup.tar
      Give standard input to the first who connects.
  peer connect --server rv://ID@vps.example PEER > backup.tar
      Take it.
  peer receive --server rv://ID@vps.example Downloads
      Take files and folders, once asked.
  peer send --server rv://ID@vps.example photos PEER
      Send them; again to go on where it was interrupted.
  peer explain --server rv://ID@vps.example PEER
      Say why the path to that peer is direct or relayed.
  peer doctor --server rv://ID@vps.example
      Say what this network's NATs do, and whom one reaches directly from here.
  peer listen --server rv://ID@vps.example --allow PEER -- sh -c 'journalctl -n 100'
      Run a command for every session of that one peer.

Data goes through standard input and output; words about what happens go to standard
error, with --json as one JSON object a line.

Where UDP is blocked everything goes over TLS to the server's TCP port, through the HTTP
proxy that HTTPS_PROXY names, if any (http://user:password@host:port; NO_PROXY excepts).

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no rendezvous server could be used,
4 the other side is not online or does not accept you, 5 the session broke,
130 interrupted.";

/// Connects machines behind home routers, directly wherever a direct path is possible.
#[derive(Debug, Parser)]
#[command(name = "peer", version, after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// Say more: -v what happens, -vv every step.
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print this machine's id.
    #[command(after_help = "Example:\n  peer id --json")]
    Id(IdArguments),
    /// Wait for sessions: pipe the first one, or echo, or run a command for each.
    #[command(after_help = listen::EXAMPLES)]
    Listen(listen::ListenArguments),
    /// Open a session with a peer and pipe standard input and output through it.
    #[command(after_help = connect::EXAMPLES)]
    Connect(connect::ConnectArguments),
    /// Send files and folders to a peer, verified; goes on after any interruption.
    #[command(after_help = send::EXAMPLES)]
    Send(send::SendArguments),
    /// Take files and folders from a peer.
    #[command(after_help = receive::EXAMPLES)]
    Receive(receive::ReceiveArguments),
    /// Find out why a session with a peer is direct, or why it is not.
    #[command(after_help = explain::EXAMPLES)]
    Explain(explain::ExplainArguments),
    /// Find out what this network does to peers, and with whom direct sessions are possible.
    #[command(after_help = doctor::EXAMPLES)]
    Doctor(doctor::DoctorArguments),
}

#[derive(Debug, Args)]
struct IdArguments {
    #[command(flatten)]
    key: KeyArguments,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct KeyArguments {
    /// The key file; made when it does not exist [default: peer/key.pem in the user's data directory].
    #[arg(long, env = "PEER_KEY", value_name = "FILE")]
    key: Option<PathBuf>,
}

impl KeyArguments {
    fn load(&self) -> Result<peer::KeyPair, Failure> {
        let path = match &self.key {
            Some(path) => path.clone(),
            None => identity::default_path()?,
        };
        Ok(identity::load_or_create(&path)?)
    }
}

/// What listening and connecting have in common.
#[derive(Debug, Args)]
struct EndpointArguments {
    /// The rendezvous server, as it printed its address; may be given more than once.
    #[arg(long, env = "PEER_SERVER", value_name = "RV_ADDRESS", required = true, value_delimiter = ' ')]
    server: Vec<RendezvousAddress>,
    #[command(flatten)]
    key: KeyArguments,
    /// Do not ask the router for a port mapping (PCP, NAT-PMP, UPnP).
    #[arg(long)]
    no_port_mapping: bool,
    /// Seconds that the router is asked to keep it without renewal.
    #[arg(long, value_name = "SECONDS", hide = true)]
    port_mapping_lease: Option<u64>,
    /// Write what happens as JSON objects, one a line, to standard error.
    #[arg(long)]
    json: bool,
}

impl EndpointArguments {
    /// Registers, or says why not. An interruption on the way is a failure.
    async fn open(&self, policy: IntroductionPolicy, report: &Report) -> Result<Endpoint, Failure> {
        let key = self.key.load()?;
        let mut builder =
            Endpoint::builder().identity(key).policy(policy).port_mapping(!self.no_port_mapping);
        if let Some(seconds) = self.port_mapping_lease {
            builder = builder.port_mapping_lease(Duration::from_secs(seconds));
        }
        for server in &self.server {
            builder = builder.server(server.clone());
        }
        let endpoint = builder.bind().await?;
        let online = tokio::select! {
            online = endpoint.online() => online.map_err(Failure::from),
            () = interrupted() => Err(Failure::interrupted()),
        };
        if let Err(failure) = online {
            endpoint.close().await;
            return Err(failure);
        }
        report.registered(endpoint.id());
        Ok(endpoint)
    }
}

/// An error with the exit code that goes with it.
#[derive(Debug)]
struct Failure {
    code: u8,
    error: anyhow::Error,
}

impl Failure {
    fn broken(error: impl Into<anyhow::Error>) -> Self {
        Self { code: exit::BROKEN, error: error.into() }
    }

    fn failed(error: impl Into<anyhow::Error>) -> Self {
        Self { code: exit::FAILURE, error: error.into() }
    }

    fn interrupted() -> Self {
        Self { code: exit::INTERRUPTED, error: anyhow::anyhow!("interrupted") }
    }
}

impl From<identity::IdentityError> for Failure {
    fn from(error: identity::IdentityError) -> Self {
        Self { code: exit::FAILURE, error: error.into() }
    }
}

impl From<BindError> for Failure {
    fn from(error: BindError) -> Self {
        Self { code: exit::FAILURE, error: error.into() }
    }
}

impl From<OnlineError> for Failure {
    fn from(error: OnlineError) -> Self {
        Self { code: exit::SERVER, error: error.into() }
    }
}

impl From<ConnectError> for Failure {
    fn from(error: ConnectError) -> Self {
        let code = match &error {
            ConnectError::Server(_) => exit::SERVER,
            ConnectError::Unavailable(_) => exit::UNAVAILABLE,
            _ => exit::FAILURE,
        };
        Self { code, error: error.into() }
    }
}

/// Runs a command to its end.
pub(crate) async fn run(arguments: Arguments) -> ExitCode {
    start_logging(arguments.verbose);
    let (json, outcome) = match arguments.command {
        Command::Id(command) => (command.json, print_id(&command)),
        Command::Listen(command) => {
            (command.endpoint.json, listen::run(command, arguments.verbose > 0).await)
        }
        Command::Connect(command) => {
            (command.endpoint.json, connect::run(command, arguments.verbose > 0).await)
        }
        Command::Send(command) => (command.endpoint.json, send::run(command).await),
        Command::Receive(command) => (command.endpoint.json, receive::run(command).await),
        Command::Explain(command) => (command.endpoint.json, explain::run(command).await),
        Command::Doctor(command) => (command.json, doctor::run(command).await),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            Report::new(json).failed(&failure.error);
            ExitCode::from(failure.code)
        }
    }
}

fn print_id(arguments: &IdArguments) -> Result<(), Failure> {
    let id: PeerId = arguments.key.load()?.id();
    if arguments.json {
        println!("{}", serde_json::json!({ "id": id.to_string() }));
    } else {
        println!("{id}");
    }
    Ok(())
}

fn start_logging(verbose: u8) {
    let default = match verbose {
        0 => "warn,quinn=error,quinn_proto=error,quinn_udp=error",
        1 => "info,peer=debug,peer_agent=debug,quinn=error,quinn_proto=error",
        _ => "info,peer=trace,peer_agent=trace,rendezvous_wire=trace",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| default.into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).init();
}

/// Tells what becomes of the rendezvous servers.
fn follow_servers(endpoint: &peer::Endpoint, report: &Report, verbose: bool) {
    let (mut changes, report) = (endpoint.server_changes(), report.clone());
    tokio::spawn(async move {
        while let Some(change) = changes.next().await {
            report.server(&change, verbose);
        }
    });
}

/// Resolves on SIGINT or SIGTERM.
async fn interrupted() {
    let mut terminate = signal(SignalKind::terminate()).ok();
    let terminated = async {
        match &mut terminate {
            Some(terminate) => {
                terminate.recv().await;
            }
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        () = terminated => {}
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        super::Arguments::command().debug_assert();
    }
}
