//! Arguments, and what is printed.

use std::io::{self, IsTerminal, Write};
use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::{Context, anyhow, bail};
use clap::{Args, CommandFactory as _, Parser, Subcommand};
use clap_complete::env::{CompleteEnv, Shells};
use rendezvous::{BindError, Server, StartError, TlsPort, Transport, hosts, keyfile};
use rendezvous_wire::address::ParseAddressError;
use rendezvous_wire::{DEFAULT_REFLECTION_PORTS, DEFAULT_SIGNALLING_PORT, PeerId, RendezvousAddress};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

const EXAMPLES: &str = "\
Examples:
  rendezvous serve
      On a VPS, with UDP 443, 3478 and 3479 and TCP 443 open.
  rendezvous serve --host rv.example.org
      Print this name instead of the machine's addresses.
  rendezvous serve --host 192.0.2.7,2001:db8::7
      An address of each family, where there is no name for both.
  rendezvous serve --alternate-ip 192.0.2.8
      Where the machine has a second address: for peer doctor.
  rendezvous serve --port 4433
      Where port 443 may not be bound.
  rendezvous serve --listen 127.0.0.1 --port 0 --reflection-ports 0,0 --json
  rendezvous id
      Print this server's id.";

/// Introduces peers to one another, and relays what they cannot send directly.
#[derive(Debug, Parser)]
#[command(version, after_help = EXAMPLES)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// Log more; twice for everything.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Log warnings and errors only.
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the server until SIGINT or SIGTERM.
    #[command(after_help = EXAMPLES)]
    Serve(Serve),
    /// Print the server's id, making its key if there is none yet.
    #[command(after_help = "Example:\n  rendezvous id --state-dir state")]
    Id(State),
    /// Print what a shell needs to complete commands and options.
    #[command(
        after_help = "Example:\n  rendezvous completions bash\n      In ~/.bashrc: source <(rendezvous completions bash)"
    )]
    Completions {
        /// The shell.
        #[arg(value_parser = ["bash", "elvish", "fish", "powershell", "zsh"])]
        shell: String,
    },
    /// Write the man pages.
    #[command(after_help = "Example:\n  rendezvous man target/man")]
    Man {
        /// The folder for them; made when it does not exist.
        folder: PathBuf,
    },
}

#[derive(Debug, Args)]
struct State {
    /// Where the server keeps its key [default: $STATE_DIRECTORY, or rendezvous in the user's data directory].
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Serve {
    #[command(flatten)]
    state: State,
    /// Address to listen on; may be repeated [default: all, IPv4 and IPv6].
    #[arg(long, value_name = "IP", value_delimiter = ',')]
    listen: Vec<IpAddr>,
    /// Second address of this machine, from which STUN answers when asked (RFC 5780): with it `peer doctor` can tell how
    /// a router filters. At most one IPv4 and one IPv6.
    #[arg(long, value_name = "IP", value_delimiter = ',')]
    alternate_ip: Vec<IpAddr>,
    /// UDP port of registration and signalling; 0 takes a free one.
    #[arg(long, value_name = "PORT", default_value_t = DEFAULT_SIGNALLING_PORT)]
    port: u16,
    /// TCP port for peers whose network blocks UDP, and for HTTPS [default: the number of --port, where peers look for it]. Another number
    /// is for a server behind something that forwards; "off" is for none.
    #[arg(long, value_name = "PORT", value_parser = parse_tls_port)]
    tls_port: Option<TlsPort>,
    /// UDP ports of STUN and of the relay; 0 takes a free one.
    #[arg(
        long,
        value_name = "PORT,PORT",
        value_delimiter = ',',
        num_args = 1,
        value_parser = clap::value_parser!(u16),
        default_values_t = DEFAULT_REFLECTION_PORTS
    )]
    reflection_ports: Vec<u16>,
    /// Names or addresses under which peers find this server, such as its IPv4 and its IPv6 address [default: the machine's own best].
    #[arg(long = "host", value_name = "NAME,...", value_delimiter = ',', value_parser = parse_host)]
    hosts: Vec<String>,
    /// Relay threads [default: one per core].
    #[arg(long, value_name = "N")]
    relay_threads: Option<NonZeroUsize>,
    /// Print one JSON object per line.
    #[arg(long)]
    json: bool,
}

impl Arguments {
    pub(crate) fn init_logging(&self) {
        let default = match (self.quiet, self.verbose) {
            // quinn-udp warns with addresses, which belong at DEBUG.
            (true, _) => "warn,quinn_udp=error",
            (false, 0) => "info,quinn_udp=error",
            (false, 1) => "info,rendezvous=debug",
            (false, _) => "debug,rendezvous=trace",
        };
        let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
        // https://no-color.org
        let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let ansi = io::stderr().is_terminal() && !refused;
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(ansi).init();
    }

    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self.command {
            Command::Serve(serve) => serve.run(),
            Command::Id(state) => {
                print(&keyfile::load_or_create(&state.directory()?)?.id().to_string())?;
                Ok(())
            }
            Command::Completions { shell } => completions(&shell),
            Command::Man { folder } => std::fs::create_dir_all(&folder)
                .and_then(|()| clap_mangen::generate_to(Self::command(), &folder))
                .with_context(|| format!("the pages cannot be written to {}", folder.display())),
        }
    }
}

/// Set by the scripts when they ask what a word may become.
const COMPLETE: &str = "RENDEZVOUS_COMPLETE";

/// Answers a script that asks what a word may become, and ends then. Before any thread is started.
pub(crate) fn complete() {
    CompleteEnv::with_factory(Arguments::command).var(COMPLETE).complete();
}

fn completions(shell: &str) -> anyhow::Result<()> {
    let shells = Shells::builtins();
    let shell = shells.completer(shell).with_context(|| format!("{shell} is no shell that is known"))?;
    let mut script = Vec::new();
    shell.write_registration(COMPLETE, "rendezvous", "rendezvous", "rendezvous", &mut script)?;
    Ok(io::stdout().write_all(&script)?)
}

impl State {
    fn directory(&self) -> anyhow::Result<PathBuf> {
        if let Some(directory) = &self.state_dir {
            return Ok(directory.clone());
        }
        // systemd separates several with colons; the first is ours.
        if let Some(directories) = std::env::var_os("STATE_DIRECTORY")
            && let Some(first) = std::env::split_paths(&directories).next().filter(|path| path.is_absolute())
        {
            return Ok(first);
        }
        directories::ProjectDirs::from("", "", "rendezvous").map(|own| own.data_dir().to_owned()).ok_or_else(
            || anyhow!("there is no home directory to keep the key in; name one with --state-dir"),
        )
    }
}

impl Serve {
    fn run(self) -> anyhow::Result<()> {
        let key = keyfile::load_or_create(&self.state.directory()?)?;
        let [first, second] = self.reflection_ports[..] else {
            usage("--reflection-ports takes two ports, as in 3478,3479")
        };
        if first == second && first != 0 {
            usage("--reflection-ports takes two different ports");
        }
        let mut builder = Server::builder().key(key).port(self.port).reflection_ports([first, second]);
        builder = builder.tls_port(self.tls_port.unwrap_or_default());
        for address in self.listen {
            builder = builder.listen(address);
        }
        for address in self.alternate_ip {
            builder = builder.alternate(address);
        }
        for host in self.hosts {
            builder = builder.host(host);
        }
        if let Some(threads) = self.relay_threads {
            builder = builder.relay_threads(threads);
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .context("the runtime does not start")?;
        runtime.block_on(async {
            let mut terminate = signal(SignalKind::terminate())?;
            let mut interrupt = signal(SignalKind::interrupt())?;
            let mut server = builder.start().await.map_err(explain)?;
            announce(&server, self.json)?;
            let failed = tokio::select! {
                _ = terminate.recv() => false,
                _ = interrupt.recv() => false,
                () = server.failed() => true,
            };
            let relay = server.relay_count();
            server.shutdown().await;
            if failed {
                bail!("signalling has stopped by itself; the log tells why (--verbose tells more)");
            }
            if self.json {
                let relay = json!({
                    "forwarded": relay.forwarded,
                    "forwarded_bytes": relay.forwarded_bytes,
                    "refused": relay.refused,
                    "dropped": relay.dropped,
                    "answered": relay.answered,
                    "overflowed": relay.overflowed,
                });
                print(&json!({ "event": "stopped", "relay": relay }).to_string())?;
            }
            Ok(())
        })
    }
}

/// A host as an `rv://` address may name it.
fn parse_host(text: &str) -> Result<String, ParseAddressError> {
    let id = PeerId::from_bytes([0; 32]);
    let host = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text).to_owned();
    let port = DEFAULT_SIGNALLING_PORT;
    let address = RendezvousAddress { id, host, alternatives: Vec::new(), port };
    let parsed: RendezvousAddress = address.to_string().parse()?;
    if parsed == address { Ok(address.host) } else { Err(ParseAddressError::Host) }
}

fn parse_tls_port(text: &str) -> Result<TlsPort, String> {
    match text {
        "off" => Ok(TlsPort::Off),
        number => number.parse().map(TlsPort::Number).map_err(|_| "neither a port nor \"off\"".to_owned()),
    }
}

fn usage(message: &str) -> ! {
    Arguments::command().error(clap::error::ErrorKind::ValueValidation, message).exit()
}

/// The error with what to do about it.
fn explain(error: StartError) -> anyhow::Error {
    let next = match &error {
        StartError::Bind(BindError { protocol, address, source, .. }) => match source.kind() {
            io::ErrorKind::AddrInUse if *protocol == Transport::Tcp => format!(
                "another program has this port, a web server perhaps; find it with `ss -tlpn sport = :{port}`, or choose another port \
                 with --port, or leave networks that block UDP without a way in with --tls-port off",
                port = address.port()
            ),
            io::ErrorKind::AddrInUse => format!(
                "another program has this port; find it with `ss -ulpn sport = :{}`, or choose other ports with \
                 --port and --reflection-ports",
                address.port()
            ),
            io::ErrorKind::PermissionDenied => format!(
                "ports below 1024 need a permission; grant it with `sudo setcap cap_net_bind_service=+ep {}`, or \
                 choose another port with --port",
                std::env::current_exe()
                    .map_or_else(|_| "rendezvous".into(), |path| path.display().to_string())
            ),
            io::ErrorKind::AddrNotAvailable => {
                "this machine does not have that address; see `ip address`, or leave out the option that names it".to_owned()
            }
            _ => return error.into(),
        },
        _ => return error.into(),
    };
    anyhow!("{error}: {next}")
}

fn announce(server: &Server, json: bool) -> io::Result<()> {
    let address = server.address();
    let ports = server.ports();
    if json {
        let ready = json!({
            "event": "ready",
            "id": server.id().to_string(),
            "address": address.to_string(),
            "signalling_port": ports.signalling,
            "tls_port": ports.tls,
            "reflection_ports": ports.reflection,
        });
        return print(&ready.to_string());
    }
    let [first, second] = ports.reflection;
    let quoted = address.quoted();
    let tcp = ports.tls.map_or_else(String::new, |port| format!(", and TCP {port},"));
    let mut text = format!(
        "{address}\n\nOpen UDP {}, {first} and {second}{tcp} in the firewall. Then, on the machine to be reached:\n\n    \
         peer listen --server {quoted}\n\nand on the one that wants to reach it, with the id that the first prints:\n\n    \
         peer connect --server {quoted} <id>\n",
        ports.signalling
    );
    if address.hosts().all(|host| host.parse().is_ok_and(|ip: IpAddr| !hosts::is_global(ip))) {
        text.push_str(
            "\nThis address is not one of the Internet's. If the machine has one in front of it, name it with --host.\n",
        );
    }
    print(&text)
}

/// Prints and flushes: whoever waits for the line reads a pipe.
fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")?;
    out.flush()
}
