//! Arguments, and what every command shares.

mod bench;
mod chat;
mod connect;
mod doctor;
mod explain;
mod forward;
mod gate;
mod home;
mod known;
mod listen;
mod ping;
mod pipe;
mod receive;
mod report;
mod send;
mod settings;
mod setup;
mod shell;
mod ssh_proxy;
mod status;
mod style;
mod transfers;
mod up;

use std::io::{self, Write as _};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use peer::daemon::DaemonError;
use peer::service::RequestError;
use peer::{BindError, ConnectError, OnlineError, PeerId, identity};
use tokio::signal::unix::{SignalKind, signal};

use home::config::ConfigError;
use home::peers::PeersError;
use report::Report;
use settings::KeyArguments;

pub(crate) use shell::complete;

/// Exit codes, as `--help` states them.
mod exit {
    pub(super) const FAILURE: u8 = 1;
    pub(super) const USAGE: u8 = 2;
    pub(super) const SERVER: u8 = 3;
    pub(super) const UNAVAILABLE: u8 = 4;
    pub(super) const BROKEN: u8 = 5;
    pub(super) const REFUSED: u8 = 6;
    pub(super) const NO_DAEMON: u8 = 7;
    pub(super) const INTERRUPTED: u8 = 130;
}

const AFTER_HELP: &str = "\
Examples:
  peer init rv://ID@vps.example
      Remember the rendezvous server; make this machine's key. Once on each machine.
  peer invite --once --name laptop
      Print a ticket that makes whoever uses it first a trusted peer.
  peer trust TICKET --as nas
      Remember where a ticket leads to, by a name of one's own.
  peer listen --allow-forward localhost:80
      Let trusted peers connect to the web server here.
  peer forward nas -L 8080:localhost:80
      Have it at http://localhost:8080.
  peer listen --echo
      Send back whatever anyone sends.
  peer listen < backup.tar
      Give standard input to the first who connects.
  peer connect nas > backup.tar
      Take it.
  peer receive Downloads
      Take files and folders, once asked.
  peer send photos nas
      Send them; again to go on where it was interrupted.
  peer up
      Stay reachable, and have commands share their sessions; `peer status` shows them.
  peer bench nas
      Measure how fast it is, where `peer listen --bench` runs.
  peer chat nas
      Talk with whoever sits there, where `peer chat --listen` runs.
  peer explain nas
      Say why the path to that peer is direct or relayed.
  peer doctor
      Say what this network's NATs do, and whom one reaches directly from here.

A peer is named by its id, by an alias or by a ticket. Data goes through standard input
and output; words about what happens go to standard error, with --json as one JSON object
a line.

Where UDP is blocked everything goes over TLS to the server's TCP port, through the HTTP
proxy that HTTPS_PROXY names, if any (http://user:password@host:port; NO_PROXY excepts).

Files: peer/config.toml in the user's configuration directory ($XDG_CONFIG_HOME), the key
and the known peers in peer/ in the data directory ($XDG_DATA_HOME). A flag goes before an
environment variable, that before the configuration.

Exit codes: 0 done, 1 failed, 2 wrong usage or a name that nobody has, 3 no rendezvous
server could be used, 4 the other side is not online or does not accept you, 5 the session
broke, 6 the other side refused, 7 no daemon runs, 130 interrupted.";

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
    /// Remember the rendezvous server, and make this machine's key.
    #[command(after_help = setup::INIT_EXAMPLES)]
    Init(setup::InitArguments),
    /// Print this machine's id.
    #[command(after_help = "Example:\n  peer id --json")]
    Id(IdArguments),
    /// Print a ticket that leads to this machine, and makes whoever shows it a trusted peer.
    #[command(after_help = setup::INVITE_EXAMPLES)]
    Invite(setup::InviteArguments),
    /// Let a peer use what is served to trusted peers; remember where a ticket leads to.
    #[command(after_help = known::TRUST_EXAMPLES)]
    Trust(known::TrustArguments),
    /// Take that back.
    #[command(after_help = known::UNTRUST_EXAMPLES)]
    Untrust(known::UntrustArguments),
    /// Give a peer a name.
    #[command(after_help = known::ALIAS_EXAMPLES)]
    Alias(known::AliasArguments),
    /// Show the known peers, the last path to each, and the open invitations.
    #[command(after_help = known::LIST_EXAMPLES)]
    List(known::ListArguments),
    /// Wait for sessions: pipe the first one, or echo, or run a command for each, or forward.
    #[command(after_help = listen::EXAMPLES)]
    Listen(listen::ListenArguments),
    /// Open a session with a peer and pipe standard input and output through it.
    #[command(after_help = connect::EXAMPLES)]
    Connect(connect::ConnectArguments),
    /// Forward ports through a session with a peer.
    #[command(after_help = forward::EXAMPLES)]
    Forward(forward::ForwardArguments),
    /// Join standard input and output to a peer's SSH server, for ProxyCommand of ssh.
    #[command(after_help = ssh_proxy::EXAMPLES)]
    SshProxy(ssh_proxy::SshProxyArguments),
    /// Measure the round trip to a peer, on each path.
    #[command(after_help = ping::EXAMPLES)]
    Ping(ping::PingArguments),
    /// Measure what a session with a peer carries: goodput, delay under load, loss.
    #[command(after_help = bench::EXAMPLES)]
    Bench(bench::BenchArguments),
    /// Send files and folders to a peer, verified; goes on after any interruption.
    #[command(after_help = send::EXAMPLES)]
    Send(send::SendArguments),
    /// Take files and folders from a peer.
    #[command(after_help = receive::EXAMPLES)]
    Receive(receive::ReceiveArguments),
    /// Stay registered, serve what the configuration says, and share sessions between commands.
    #[command(after_help = up::EXAMPLES)]
    Up(up::UpArguments),
    /// Show the daemon: its servers, its sessions, who uses them, and what is served.
    #[command(after_help = status::STATUS_EXAMPLES)]
    Status(status::ControlledArguments),
    /// Have the daemon read its configuration again; it does so by itself when the file has changed.
    #[command(after_help = status::RELOAD_EXAMPLES)]
    Reload(status::ControlledArguments),
    /// End the daemon.
    #[command(after_help = status::DOWN_EXAMPLES)]
    Down(status::ControlledArguments),
    /// Talk with whoever sits at a peer, line by line.
    #[command(after_help = chat::EXAMPLES)]
    Chat(chat::ChatArguments),
    /// Find out why a session with a peer is direct, or why it is not.
    #[command(after_help = explain::EXAMPLES)]
    Explain(explain::ExplainArguments),
    /// Find out what this network does to peers, and with whom direct sessions are possible.
    #[command(after_help = doctor::EXAMPLES)]
    Doctor(doctor::DoctorArguments),
    /// Print what a shell needs to complete commands, options and aliases.
    #[command(after_help = shell::COMPLETIONS_EXAMPLES)]
    Completions(shell::CompletionsArguments),
    /// Write the man pages.
    #[command(after_help = shell::MAN_EXAMPLES)]
    Man(shell::ManArguments),
}

#[derive(Debug, Args)]
struct IdArguments {
    #[command(flatten)]
    key: KeyArguments,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
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

    /// What was asked for in a session led to nothing.
    fn request(error: RequestError, what: &str) -> Self {
        let code = match &error {
            RequestError::Refused => exit::REFUSED,
            RequestError::Session => exit::BROKEN,
            _ => exit::FAILURE,
        };
        let hint = match &error {
            RequestError::Refused => {
                ". What a peer serves is named there, with `peer listen --allow-forward` or in its configuration, and to whom"
            }
            _ => "",
        };
        Self { code, error: anyhow::anyhow!("{what}: {error}{hint}") }
    }
}

/// What may be done about an error of the file system.
fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            ". `ls -ld` shows who may do that there; run it as that user, or name another place"
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ". Make room there and try again",
        io::ErrorKind::ReadOnlyFilesystem => ". Nothing can be written there; name another place",
        io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory => {
            ". There is a file where a folder should be, or the other way round; name another place"
        }
        _ => "",
    }
}

impl Failure {
    /// Something about a file, with what may be done about it.
    fn of_file(error: impl std::fmt::Display, source: Option<&io::Error>) -> Self {
        Self::failed(anyhow::anyhow!("{error}{}", source.map_or("", advice)))
    }
}

impl From<identity::IdentityError> for Failure {
    fn from(error: identity::IdentityError) -> Self {
        let source =
            if let identity::IdentityError::Io { source, .. } = &error { Some(source) } else { None };
        Self::of_file(&error, source)
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        let source = if let ConfigError::Io { source, .. } = &error { Some(source) } else { None };
        Self::of_file(&error, source)
    }
}

impl From<PeersError> for Failure {
    fn from(error: PeersError) -> Self {
        let code = match &error {
            PeersError::Taken(..) | PeersError::NoInvite(_) => exit::USAGE,
            _ => exit::FAILURE,
        };
        let source = if let PeersError::Io { source, .. } = &error { Some(source) } else { None };
        Self { code, ..Self::of_file(&error, source) }
    }
}

impl From<DaemonError> for Failure {
    fn from(error: DaemonError) -> Self {
        let code = match &error {
            DaemonError::NotRunning { .. } => exit::NO_DAEMON,
            DaemonError::Gone { .. } => exit::BROKEN,
            _ => exit::FAILURE,
        };
        Self { code, error: error.into() }
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
            ConnectError::Daemon(_) => exit::BROKEN,
            _ => exit::FAILURE,
        };
        Self { code, error: error.into() }
    }
}

impl Arguments {
    /// Those of the command line. Without them there is an exit code, and what is to be said has been said; as JSON where that is asked for.
    pub(crate) fn of_command_line() -> Result<Self, ExitCode> {
        Self::try_parse().map_err(|error| {
            let json = std::env::args_os().any(|argument| argument == "--json");
            if json && error.use_stderr() {
                let words = error.render().to_string();
                let words = words.trim_end().strip_prefix("error: ").unwrap_or(words.trim_end()).to_owned();
                Report::new(true).failed(&anyhow::Error::msg(words), exit::USAGE);
            } else {
                // Nobody can be told that nothing can be printed.
                let _ = error.print();
            }
            ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(exit::USAGE))
        })
    }
}

/// Runs a command to its end.
pub(crate) async fn run(arguments: Arguments) -> ExitCode {
    start_logging(arguments.verbose);
    let (json, outcome) = match arguments.command {
        Command::Init(command) => (command.json, setup::init(&command)),
        Command::Id(command) => (command.json, print_id(&command)),
        Command::Invite(command) => (command.json, setup::invite(&command)),
        Command::Trust(command) => (command.json, known::trust(&command)),
        Command::Untrust(command) => (command.json, known::untrust(&command)),
        Command::Alias(command) => (command.json, known::alias(&command)),
        Command::List(command) => (command.endpoint.json, known::list(command).await),
        Command::Forward(command) => {
            (command.endpoint.json, forward::run(command, arguments.verbose > 0).await)
        }
        Command::SshProxy(command) => {
            (command.endpoint.json, ssh_proxy::run(command, arguments.verbose > 0).await)
        }
        Command::Ping(command) => (command.endpoint.json, ping::run(command, arguments.verbose > 0).await),
        Command::Bench(command) => (command.endpoint.json, bench::run(command).await),
        Command::Listen(command) => {
            (command.endpoint.json, listen::run(command, arguments.verbose > 0).await)
        }
        Command::Connect(command) => {
            (command.endpoint.json, connect::run(command, arguments.verbose > 0).await)
        }
        Command::Send(command) => (command.endpoint.json, send::run(command, arguments.verbose > 0).await),
        Command::Receive(command) => {
            (command.endpoint.json, receive::run(command, arguments.verbose > 0).await)
        }
        Command::Up(command) => (command.endpoint.json, up::run(command, arguments.verbose > 0).await),
        Command::Status(command) => (command.json, status::status(&command).await),
        Command::Down(command) => (command.json, status::down(&command).await),
        Command::Reload(command) => (command.json, status::reload(&command).await),
        Command::Chat(command) => (command.endpoint.json, chat::run(command, arguments.verbose > 0).await),
        Command::Explain(command) => (command.endpoint.json, explain::run(command).await),
        Command::Completions(command) => (false, shell::completions(&command)),
        Command::Man(command) => (false, shell::man(&command)),
        Command::Doctor(command) => (command.json, doctor::run(command).await),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            Report::new(json).failed(&failure.error, failure.code);
            ExitCode::from(failure.code)
        }
    }
}

fn print_id(arguments: &IdArguments) -> Result<(), Failure> {
    let id: PeerId = arguments.key.load()?.id();
    if arguments.json {
        print_line(serde_json::json!({ "id": id.to_string() }))?;
    } else {
        print_line(id)?;
    }
    Ok(())
}

/// Prints what is asked for as it is.
fn print(data: &[u8]) -> Result<(), Failure> {
    let mut output = std::io::stdout().lock();
    match output.write_all(data).and_then(|()| output.flush()) {
        // Whoever reads has had enough, as `head` has.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written
            .map_err(|error| Failure::failed(anyhow::anyhow!("standard output cannot be written: {error}"))),
    }
}

/// The same with a line.
fn print_line(line: impl std::fmt::Display) -> Result<(), Failure> {
    print(format!("{line}\n").as_bytes())
}

fn start_logging(verbose: u8) {
    let default = match verbose {
        0 => "warn,quinn=error,quinn_proto=error,quinn_udp=error",
        1 => "info,peer=debug,peer_agent=debug,quinn=error,quinn_proto=error",
        _ => "info,peer=trace,peer_agent=trace,rendezvous_wire=trace",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| default.into());
    let ansi = style::wanted(&io::stderr());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(ansi)
        .with_target(false)
        .init();
}

/// Tells what becomes of the rendezvous servers.
fn follow_servers(access: &peer::daemon::Access, report: &Report, verbose: bool) {
    let (mut changes, report) = (access.server_changes(), report.clone());
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
    use clap::{CommandFactory as _, Parser as _};

    use super::Arguments;

    const ID: &str = "aebagbafaydqqcikbmga2dqpcaireeyuculbogazdinryhi6d4qa";

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    /// The words of an example, as a shell would have them: without redirections and what stands behind a pipe or a comment.
    fn words(example: &str) -> Vec<String> {
        let end = [" > ", " < ", " | "].iter().filter_map(|mark| example.find(mark)).min();
        let ticket = peer::Ticket {
            peer: ID.parse().unwrap(),
            servers: vec![format!("rv://{ID}@vps.example").parse().unwrap()],
            secret: None,
        };
        let ticket = ticket.encode().unwrap();
        example[..end.unwrap_or(example.len())]
            .split_whitespace()
            .map(|word| match word {
                "PEER" => ID.to_owned(),
                "TICKET" => ticket.clone(),
                word => word
                    .replace("rv://ID@", &format!("rv://{ID}@"))
                    .replace("#TOKEN", &format!("#{}", peer::Token([7; 16]))),
            })
            .collect()
    }

    #[test]
    fn every_example_of_every_help_is_understood() {
        let command = Arguments::command();
        let mut seen = 0;
        for command in command.get_subcommands().chain([&command]) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            let mut own = 0;
            for line in help.lines().filter(|line| line.starts_with("  ") && !line.starts_with("   ")) {
                let Some(start) = line.find("peer ") else { continue };
                let words = words(&line[start..].replace('\'', " "));
                // The proxy command of an example of ssh.
                let words: Vec<_> =
                    words.iter().map(|word| word.replace("%h", "nas").replace("%p", "22")).collect();
                let words = match words.iter().position(|word| word.contains('@') && !word.contains("rv://"))
                {
                    Some(ssh) => &words[..ssh],
                    None => &words[..],
                };
                if let Err(error) = Arguments::try_parse_from(words) {
                    panic!("{line}\n{error}");
                }
                own += 1;
            }
            assert!(own > 0, "{} has no example", command.get_name());
            seen += own;
        }
        assert!(seen > 30, "{seen} examples were found");
    }
}
