//! `rendezvous serve`.

use std::io;
use std::net::IpAddr;
use std::num::NonZeroUsize;

use anyhow::{Context, anyhow, bail};
use clap::Args;
use rendezvous::config::{self, Config};
use rendezvous::{BindError, Server, StartError, TlsPort, Transport, hosts, keyfile};
use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{error, info, warn};

use super::{Arguments, State, print};

pub(super) const EXAMPLES: &str = "\
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
  rendezvous serve --config ./rendezvous.toml
  rendezvous serve --listen 127.0.0.1 --port 0 --reflection-ports 0,0 --json

SIGHUP reads the configuration again. SIGTERM tells the peers, and goes on for a while for what is
relayed (drain_seconds); a second one, or SIGINT, ends it at once.";

/// Flags go before the configuration.
#[derive(Debug, Args)]
pub(super) struct Serve {
    #[command(flatten)]
    state: State,
    /// Address to listen on; may be repeated [default: all, IPv4 and IPv6].
    #[arg(long, value_name = "IP", value_delimiter = ',')]
    listen: Vec<IpAddr>,
    /// Second address of this machine, from which STUN answers when asked (RFC 5780): with it `peer doctor` can tell how
    /// a router filters. At most one IPv4 and one IPv6.
    #[arg(long, value_name = "IP", value_delimiter = ',')]
    alternate_ip: Vec<IpAddr>,
    /// UDP port of registration and signalling; 0 takes a free one [default: 443].
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// TCP port for peers whose network blocks UDP, and for HTTPS [default: the number of --port, where peers look for it]. Another number
    /// is for a server behind something that forwards; "off" is for none.
    #[arg(long, value_name = "PORT", value_parser = parse_tls_port)]
    tls_port: Option<TlsPort>,
    /// UDP ports of STUN and of the relay; 0 takes a free one [default: 3478,3479].
    #[arg(long, value_name = "PORT,PORT", value_delimiter = ',', num_args = 1, value_parser = clap::value_parser!(u16))]
    reflection_ports: Vec<u16>,
    /// Names or addresses under which peers find this server, such as its IPv4 and its IPv6 address [default: the machine's own best].
    #[arg(long = "host", value_name = "NAME,...", value_delimiter = ',', value_parser = config::parse_host)]
    hosts: Vec<String>,
    /// Relay threads [default: one per core].
    #[arg(long, value_name = "N")]
    relay_threads: Option<NonZeroUsize>,
    /// Print one JSON object per line.
    #[arg(long)]
    json: bool,
}

impl Serve {
    /// The configuration with the flags in it.
    fn settle(&self) -> anyhow::Result<Config> {
        let (mut config, from) = self.state.read()?;
        if let Some(path) = from {
            info!(path = %path.display(), "configuration");
        }
        let network = &mut config.network;
        match self.reflection_ports[..] {
            [] => {}
            [first, second] if first != second || first == 0 => network.reflection_ports = [first, second],
            [_, _] => usage("--reflection-ports takes two different ports"),
            _ => usage("--reflection-ports takes two ports, as in 3478,3479"),
        }
        network.port = self.port.unwrap_or(network.port);
        network.tls_port = self.tls_port.unwrap_or(network.tls_port);
        network.relay_threads = self.relay_threads.map_or(network.relay_threads, NonZeroUsize::get);
        for (flag, setting) in
            [(&self.listen, &mut network.listen), (&self.alternate_ip, &mut network.alternate_ips)]
        {
            if !flag.is_empty() {
                setting.clone_from(flag);
            }
        }
        if !self.hosts.is_empty() {
            network.hosts.clone_from(&self.hosts);
        }
        Ok(config)
    }

    pub(super) fn run(self) -> anyhow::Result<()> {
        let config = self.settle()?;
        let directory = self.state.directory(&config)?;
        let socket = self.state.socket(&config)?;
        let key = keyfile::load_or_create(&directory)?;
        let builder = Server::builder().key(key).configure(&config).state(directory).control(socket);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .context("the runtime does not start")?;
        runtime.block_on(async {
            let mut signals = Signals::new()?;
            let mut server = builder.start().await.map_err(explain)?;
            announce(&server, self.json)?;
            let end = self.until_told(&mut server, &mut signals, config).await;
            let relay = server.relay_count();
            server.shutdown().await;
            if end == End::Failed {
                bail!("signalling has stopped by itself; the log tells why (--verbose tells more)");
            }
            if self.json {
                let relay = json!({
                    "forwarded": relay.forwarded,
                    "forwarded_bytes": relay.forwarded_bytes,
                    "refused": relay.refused,
                    "dropped": relay.dropped,
                    "limited": relay.limited,
                    "answered": relay.answered,
                    "overflowed": relay.overflowed,
                });
                print(&json!({ "event": "stopped", "relay": relay }).to_string())?;
            }
            Ok(())
        })
    }

    /// Runs until it is told to stop, and has.
    async fn until_told(&self, server: &mut Server, signals: &mut Signals, mut config: Config) -> End {
        loop {
            let drains = tokio::select! {
                _ = signals.hang_up.recv() => {
                    self.reload(server, &mut config).await;
                    continue;
                }
                _ = signals.terminate.recv() => true,
                _ = signals.interrupt.recv() => false,
                () = server.failed() => return End::Failed,
            };
            let seconds = u32::try_from(config.drain_seconds).unwrap_or(u32::MAX);
            if drains && seconds > 0 {
                info!(
                    seconds,
                    "going away: peers are told, and what is relayed goes on for a while; a second signal ends it at once"
                );
                tokio::select! {
                    () = server.drain(seconds) => {}
                    _ = signals.terminate.recv() => {}
                    _ = signals.interrupt.recv() => {}
                }
            }
            return End::Told;
        }
    }

    /// Takes over what can be changed while it runs, and says what cannot.
    async fn reload(&self, server: &Server, config: &mut Config) {
        let new = match self.settle() {
            Ok(new) => new,
            Err(error) => {
                error!(error = format!("{error:#}"), "the configuration stays as it was");
                return;
            }
        };
        let (now, later) = config.changes(&new);
        info!(changed = now.join(", "), "the configuration was read again");
        if !later.is_empty() {
            warn!(waiting = later.join(", "), "these take effect with the next start only");
        }
        if self.json {
            let event = json!({ "event": "reloaded", "changed": now, "waiting": later });
            // Without a reader there is nobody to tell.
            let _ = print(&event.to_string());
        }
        server.reload(new.limits.clone(), new.admission.clone()).await;
        // What waits is said again with the next one.
        (config.limits, config.admission, config.drain_seconds) =
            (new.limits, new.admission, new.drain_seconds);
    }
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Told,
    Failed,
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }
}

fn parse_tls_port(text: &str) -> Result<TlsPort, String> {
    match text {
        "off" => Ok(TlsPort::Off),
        number => number.parse().map(TlsPort::Number).map_err(|_| "neither a port nor \"off\"".to_owned()),
    }
}

fn usage(message: &str) -> ! {
    use clap::CommandFactory;
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
