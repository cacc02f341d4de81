//! Whether this machine is fit for a configuration: what `rendezvous check` says.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _, UdpSocket};
use std::path::Path;
use std::time::{Duration, SystemTime};

use nix::sys::resource::{Resource, getrlimit};
use rendezvous_wire::stun::{Received, TransactionId, binding_request};
use serde::Serialize;

use crate::config::Config;
use crate::control::{self, Answer, Question};
use crate::hosts;
use crate::keyfile;
use crate::ports::{self, BUFFER_BYTES, BindError, Listen};
use crate::server::TlsPort;
use crate::signalling::HANDSHAKES;
use crate::store::{self, Store};
use crate::usage::Month;

/// How long a datagram to oneself may take: round a provider's NAT, perhaps.
const PATIENCE: Duration = Duration::from_secs(2);

/// Files that a server has open besides a connection each: sockets, wakers, the store, the log.
const OTHER_FILES: u64 = 256;

/// A clock that says less has never been set: this program is younger.
const LEAST_TIME: Duration = Duration::from_secs(1_767_225_600);

/// A clock that is behind files by more than this has gone back.
const SLACK: Duration = Duration::from_secs(300);

/// How grave a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Gravity {
    /// As it should be.
    Fine,
    /// It works, but not as well as it could.
    Doubtful,
    /// It does not work.
    Wrong,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How grave it is.
    pub gravity: Gravity,
    /// What was found.
    pub what: String,
    /// What to do about it; empty where there is nothing to do.
    pub next: String,
}

impl Finding {
    fn fine(what: impl Into<String>) -> Self {
        Self { gravity: Gravity::Fine, what: what.into(), next: String::new() }
    }

    fn doubtful(what: impl Into<String>, next: impl Into<String>) -> Self {
        Self { gravity: Gravity::Doubtful, what: what.into(), next: next.into() }
    }

    fn wrong(what: impl Into<String>, next: impl Into<String>) -> Self {
        Self { gravity: Gravity::Wrong, what: what.into(), next: next.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = match self.gravity {
            Gravity::Fine => "ok     ",
            Gravity::Doubtful => "better ",
            Gravity::Wrong => "WRONG  ",
        };
        write!(f, "{mark}{}", self.what)?;
        if self.next.is_empty() { Ok(()) } else { write!(f, "\n         -> {}", self.next) }
    }
}

/// Looks at everything. `socket` is where a running server would answer. Blocks for some seconds.
pub fn run(config: &Config, directory: &Path, socket: &Path) -> Vec<Finding> {
    let running = matches!(control::ask(socket, &Question::Stats), Ok(Answer::Stats(_)));
    let mut findings = Vec::new();
    findings.extend(files(directory, running));
    findings.extend(addresses(config));
    findings.extend(if running { running_ports(config) } else { free_ports(config) });
    findings.push(descriptors(config));
    findings.push(buffers());
    findings.push(clock(directory));
    findings
}

/// The key and the store.
fn files(directory: &Path, running: bool) -> Vec<Finding> {
    let key = directory.join(keyfile::FILE_NAME);
    let key = match keyfile::load(&key) {
        Ok(Some(key)) => {
            Finding::fine(format!("the key is in {}; this server is {}", directory.display(), key.id()))
        }
        Ok(None) => match writable(directory) {
            Ok(()) => Finding::fine(format!("the first start will make the key in {}", directory.display())),
            Err(error) => Finding::wrong(
                format!("{} cannot be written: {error}", directory.display()),
                "run this as the server's user, or name another directory: directory in [state], or --state-dir",
            ),
        },
        Err(error) => Finding::wrong(error.to_string(), String::new()),
    };
    let mut findings = vec![key];
    if running {
        findings.push(Finding::fine("a server runs with this state directory, and answers"));
    } else if directory.join(store::FILE_NAME).exists() {
        findings.push(match Store::open(directory, Month::of(SystemTime::now())) {
            Ok((_, kept)) => {
                let records = kept.records;
                let (bans, admitted, tokens) =
                    (records.bans.len(), records.admitted.len(), records.tokens.len());
                Finding::fine(format!(
                    "the store is sound: {bans} bans, {admitted} admitted, {tokens} tokens"
                ))
            }
            Err(error) => Finding::wrong(error.to_string(), String::new()),
        });
    }
    findings
}

fn writable(directory: &Path) -> io::Result<()> {
    let existing = directory.ancestors().find(|path| path.exists()).unwrap_or(directory);
    Ok(nix::unistd::access(existing, nix::unistd::AccessFlags::W_OK)?)
}

fn listen(config: &Config) -> Listen {
    match &config.network.listen[..] {
        [] => Listen::Everywhere,
        ips => Listen::Only(ips.to_vec()),
    }
}

fn told(config: &Config) -> Vec<String> {
    if config.network.hosts.is_empty() { hosts::best(&listen(config)) } else { config.network.hosts.clone() }
}

/// Where peers are to look for it.
fn addresses(config: &Config) -> Vec<Finding> {
    let look = |host: String| match resolve(&host) {
        Ok(ips) if ips.iter().all(|ip| !hosts::is_global(*ip)) => Finding::doubtful(
            format!("peers are told {host}, which is no address of the Internet"),
            "if the machine has one in front of it, name it: hosts in [network]",
        ),
        Ok(ips) => {
            let ips: Vec<String> = ips.iter().map(IpAddr::to_string).collect();
            let shown = ips.join(" and ");
            Finding::fine(if shown == host {
                format!("peers are told {host}")
            } else {
                format!("peers are told {host}: {shown}")
            })
        }
        Err(error) => Finding::wrong(
            format!("peers are told {host}, which cannot be resolved: {error}"),
            "make that name in the DNS, or name an address: hosts in [network]",
        ),
    };
    told(config).into_iter().map(look).collect()
}

fn resolve(host: &str) -> io::Result<Vec<IpAddr>> {
    if let Ok(ip) = host.parse() {
        return Ok(vec![ip]);
    }
    let mut ips: Vec<IpAddr> = (host, 0).to_socket_addrs()?.map(|address| address.ip()).collect();
    ips.sort_unstable();
    ips.dedup();
    if ips.is_empty() { Err(io::ErrorKind::NotFound.into()) } else { Ok(ips) }
}

/// The ports of a server that does not run.
fn free_ports(config: &Config) -> Vec<Finding> {
    let (network, listen) = (&config.network, listen(config));
    let mut findings = Vec::new();
    if let Err(error) = ports::check(&network.alternate_ips) {
        findings.push(wrong_port(&error));
    }
    let mut udp = Vec::new();
    for port in [network.port, network.reflection_ports[0], network.reflection_ports[1]] {
        match ports::bind(&listen, port, 1) {
            Ok(bound) => {
                findings.push(Finding::fine(format!("UDP port {} is free", bound.number)));
                udp.push(bound);
            }
            Err(error) => findings.push(wrong_port(&error)),
        }
    }
    let tcp = match network.tls_port {
        TlsPort::Off => None,
        TlsPort::Same => Some(network.port),
        TlsPort::Number(number) => Some(number),
    };
    match tcp.map(|port| ports::listen(&listen, port)) {
        None => findings.push(Finding::doubtful(
            "there is no TCP port: whoever is in a network that blocks UDP cannot come",
            "tls_port in [network]",
        )),
        Some(Ok(bound)) => findings.push(Finding::fine(format!("TCP port {} is free", bound.number))),
        Some(Err(error)) => findings.push(wrong_port(&error)),
    }
    for host in told(config) {
        if let Some(bound) = udp.first() {
            findings.push(reaches_itself(&host, bound));
        }
    }
    findings
}

fn wrong_port(error: &BindError) -> Finding {
    let port = error.address.port();
    let next = match error.source.kind() {
        io::ErrorKind::AddrInUse => {
            format!("find who has it with `ss -ulpn sport = :{port}` or `ss -tlpn sport = :{port}`, or choose others in [network]")
        }
        io::ErrorKind::PermissionDenied => "ports below 1024 need a permission: run it by systemd as deploy/rendezvous.service has it, or grant the program \
                                            cap_net_bind_service with setcap"
            .to_owned(),
        io::ErrorKind::AddrNotAvailable => "this machine does not have that address; see `ip address`".to_owned(),
        _ => String::new(),
    };
    Finding::wrong(error.to_string(), next)
}

/// Sends a datagram to an address that peers are told, and waits for it.
fn reaches_itself(host: &str, bound: &ports::Port) -> Finding {
    let token: [u8; 16] = rand::random();
    let arrives = |ip: IpAddr| -> io::Result<bool> {
        let fits =
            |socket: &&UdpSocket| socket.local_addr().is_ok_and(|local| local.is_ipv4() == ip.is_ipv4());
        let Some(socket) = bound.sockets.iter().flatten().find(fits) else { return Ok(false) };
        socket.set_nonblocking(false)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        sender(ip)?.send_to(&token, SocketAddr::new(ip, bound.number))?;
        let mut buffer = [0; 64];
        loop {
            match socket.recv(&mut buffer) {
                Ok(length) if buffer[..length] == token => return Ok(true),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
    };
    let ips = resolve(host).unwrap_or_default();
    let missed: Vec<String> =
        ips.iter().filter(|ip| !arrives(**ip).unwrap_or(false)).map(IpAddr::to_string).collect();
    reached(host, bound.number, &missed)
}

fn sender(to: IpAddr) -> io::Result<UdpSocket> {
    let any: SocketAddr = if to.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    UdpSocket::bind(any)
}

fn reached(host: &str, port: u16, missed: &[String]) -> Finding {
    if missed.is_empty() {
        return Finding::fine(format!("this machine reaches UDP {port} of {host}"));
    }
    Finding::doubtful(
        format!("this machine does not reach itself at UDP {port} of {}", missed.join(" and ")),
        "a firewall here, or the provider's: open it. Behind a provider's NAT that does not hairpin this says nothing; `peer doctor` from elsewhere does",
    )
}

/// Whether a running server answers at the addresses that peers are told.
fn running_ports(config: &Config) -> Vec<Finding> {
    let port = config.network.reflection_ports[0];
    let answers = |ip: IpAddr| -> io::Result<bool> {
        let socket = sender(ip)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let transaction = TransactionId(rand::random());
        let Ok(request) = binding_request(transaction) else { return Ok(false) };
        socket.send_to(&request, SocketAddr::new(ip, port))?;
        let mut buffer = [0; 1_500];
        let length = socket.recv(&mut buffer)?;
        Ok(Received::parse(&buffer[..length]).is_ok_and(|answer| answer.transaction() == transaction))
    };
    let look = |host: String| {
        let ips = resolve(&host).unwrap_or_default();
        let silent = ips.iter().filter(|ip| !answers(**ip).unwrap_or(false));
        reached(&host, port, &silent.map(IpAddr::to_string).collect::<Vec<_>>())
    };
    told(config).into_iter().map(look).collect()
}

fn descriptors(config: &Config) -> Finding {
    // Of connections, those over TCP have a file each.
    let wanted = (config.limits.registrations + HANDSHAKES) as u64 + OTHER_FILES;
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((soft, _)) if soft >= wanted => Finding::fine(format!("{soft} files may be open")),
        Ok((soft, _)) => Finding::doubtful(
            format!(
                "{soft} files may be open here; {wanted} are as many as registrations over TCP could need"
            ),
            format!(
                "LimitNOFILE={wanted} in the systemd unit (this shell may have another limit than the unit), or fewer registrations in [limits]"
            ),
        ),
        Err(error) => {
            Finding::doubtful(format!("the limit of open files cannot be read: {error}"), String::new())
        }
    }
}

fn buffers() -> Finding {
    let path = "/proc/sys/net/core/rmem_max";
    let most = std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<usize>().ok());
    match most {
        Some(most) if most >= BUFFER_BYTES => Finding::fine(format!("a socket may buffer {most} bytes")),
        Some(most) => Finding::doubtful(
            format!("a socket may buffer {most} bytes: bursts that fill more are dropped"),
            format!(
                "echo 'net.core.rmem_max = {BUFFER_BYTES}' > /etc/sysctl.d/60-rendezvous.conf && sysctl --system"
            ),
        ),
        None => Finding::doubtful(format!("{path} cannot be read"), String::new()),
    }
}

fn clock(directory: &Path) -> Finding {
    let now = SystemTime::now();
    let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let next = "set it, and keep it set: timedatectl set-ntp true. Tokens and bans that end at a time, and monthly quotas, go by it";
    let shown = humantime::format_rfc3339_seconds(now);
    if since < LEAST_TIME {
        return Finding::wrong(format!("the clock says {shown}"), next);
    }
    let newest = [keyfile::FILE_NAME, store::FILE_NAME].iter().filter_map(|name| {
        std::fs::metadata(directory.join(name)).and_then(|metadata| metadata.modified()).ok()
    });
    if newest.max().is_some_and(|written| written > now + SLACK) {
        return Finding::wrong(
            format!("the clock says {shown}, which is before files of this server were written"),
            next,
        );
    }
    let timesync = Path::new("/run/systemd/timesync");
    if timesync.exists() && !timesync.join("synchronized").exists() {
        return Finding::doubtful(format!("the clock says {shown}, and is not synchronized"), next);
    }
    Finding::fine(format!("the clock says {shown}"))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    /// On ports that are free.
    fn config() -> Config {
        let mut config = Config::default();
        config.network.listen = vec![Ipv4Addr::LOCALHOST.into()];
        (config.network.port, config.network.reflection_ports) = (0, [0, 0]);
        config
    }

    fn check(config: &Config) -> Vec<Finding> {
        let directory = tempfile::tempdir().unwrap();
        run(config, directory.path(), &directory.path().join("control.sock"))
    }

    #[test]
    fn a_machine_in_order_has_nothing_wrong_and_reaches_itself() {
        let findings = check(&config());
        assert!(findings.iter().all(|finding| finding.gravity != Gravity::Wrong), "{findings:?}");
        let reaches = |finding: &Finding| {
            finding.what.starts_with("this machine reaches UDP") && finding.gravity == Gravity::Fine
        };
        assert!(findings.iter().any(reaches), "{findings:?}");
    }

    #[test]
    fn what_is_wrong_comes_with_what_to_do() {
        let taken = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let mut config = config();
        config.network.port = taken.local_addr().unwrap().port();
        config.network.hosts = vec!["no-such-host.invalid".into()];
        config.limits.registrations = 1 << 40;
        let findings = check(&config);
        let said = |word: &str| findings.iter().find(|finding| finding.what.contains(word)).unwrap();
        let port = said(&config.network.port.to_string());
        assert!(port.gravity == Gravity::Wrong && port.next.contains("ss -ulpn"), "{port:?}");
        let host = said("no-such-host.invalid");
        assert!(host.gravity == Gravity::Wrong && host.next.contains("DNS"), "{host:?}");
        assert!(said("files may be open").next.contains("LimitNOFILE"));
    }

    #[test]
    fn a_clock_behind_ones_own_files_has_gone_back() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(clock(directory.path()).gravity.min(Gravity::Doubtful), clock(directory.path()).gravity);
        let file = std::fs::File::create(directory.path().join(store::FILE_NAME)).unwrap();
        file.set_modified(SystemTime::now() + Duration::from_secs(86_400)).unwrap();
        assert_eq!(clock(directory.path()).gravity, Gravity::Wrong);
    }
}
