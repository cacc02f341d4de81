//! Routers that make mappings when their hosts ask: `miniupnpd`, as many home routers run it.

use std::fs;
use std::io::{self, BufRead as _, BufReader};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::process::Stdio;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::namespace::Namespace;
use crate::process::{HostChild, HostCommand, Spawner};
use crate::tool::{self, ToolError};

/// By which protocols hosts may ask their router for a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortMapping {
    /// UPnP, Internet Gateway Device 2.
    pub upnp: bool,
    /// NAT-PMP (RFC 6886).
    pub nat_pmp: bool,
    /// PCP (RFC 6887).
    pub pcp: bool,
}

impl PortMapping {
    /// By any of them.
    pub const ALL: Self = Self { upnp: true, nat_pmp: true, pcp: true };
    /// By UPnP only.
    pub const UPNP: Self = Self { upnp: true, nat_pmp: false, pcp: false };
    /// By NAT-PMP only.
    pub const NAT_PMP: Self = Self { upnp: false, nat_pmp: true, pcp: false };
    /// By PCP only.
    pub const PCP: Self = Self { upnp: false, nat_pmp: false, pcp: true };
}

/// A mapping that a router has made at the request of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortMapped {
    /// The port on the router's address toward the internet.
    pub port: u16,
    /// Where packets to it go.
    pub inside: SocketAddrV4,
}

/// The daemon of a site's router that makes mappings.
#[derive(Debug)]
pub struct PortMapper {
    offered: PortMapping,
    router: Namespace,
    spawner: Arc<Spawner>,
    daemon: Mutex<Option<HostChild>>,
}

impl PortMapper {
    /// For a router that has its interfaces, addresses and rules. Runs nothing yet.
    pub(crate) fn new(offered: PortMapping, router: Namespace, spawner: Arc<Spawner>) -> Self {
        Self { offered, router, spawner, daemon: Mutex::new(None) }
    }

    /// Starts the daemon, with no mappings, in place of the one that may be running, and waits until it listens.
    ///
    /// # Errors
    ///
    /// When it is not installed, or ends instead.
    pub fn start(&self) -> Result<(), ToolError> {
        let mut running = self.daemon();
        running.take();
        tool::nft(&self.router, &self.rules())?;
        let configuration = self.configuration();
        let command = format!("{PROGRAM} -d");
        let failed = |source| ToolError::Run { command: command.clone(), source };
        // It reads and writes its files once, as it starts.
        let directory = TempDir::new().map_err(failed)?;
        let path = directory.path().join("miniupnpd.conf");
        fs::write(&path, &configuration).map_err(failed)?;
        let mut daemon = HostCommand::new(PROGRAM.as_ref(), self.router.clone(), Arc::clone(&self.spawner))
            .arg("-d")
            .arg("-f")
            .arg(&path)
            .arg("-P")
            .arg(directory.path().join("miniupnpd.pid"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| match source.kind() {
                io::ErrorKind::NotFound => {
                    ToolError::Missing { tool: PROGRAM, package: "miniupnpd-nftables" }
                }
                _ => failed(source),
            })?;
        let (sender, lines) = mpsc::channel();
        if let Some(log) = daemon.stderr.take() {
            // Reads on until the daemon ends, so that it is never held up by a full pipe.
            thread::spawn(move || {
                for line in BufReader::new(log).lines().map_while(Result::ok) {
                    let _ = sender.send(line);
                }
            });
        }
        let mut awaited = self.ready_lines();
        let (mut said, deadline) = (String::new(), Instant::now() + PATIENCE);
        while !awaited.is_empty() {
            match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    awaited.retain(|part| !line.contains(part));
                    said += &line;
                    said.push('\n');
                }
                Err(RecvTimeoutError::Disconnected | RecvTimeoutError::Timeout) => {
                    return Err(ToolError::Failed { command, stderr: said, input: configuration });
                }
            }
        }
        // It says nothing of the socket that hears searches.
        while self.offered.upnp && !self.hears_searches().map_err(failed)? {
            if Instant::now() > deadline {
                return Err(ToolError::Failed { command, stderr: said, input: configuration });
            }
            thread::sleep(Duration::from_millis(1));
        }
        *running = Some(daemon);
        Ok(())
    }

    /// Whether the router has joined the group of UPnP's searches, 239.255.255.250. The kernel shows it in network byte order, as a number of this
    /// machine's.
    fn hears_searches(&self) -> io::Result<bool> {
        let group = format!("{:08X}", u32::from_ne_bytes([239, 255, 255, 250]));
        let groups = self.router.run(|| fs::read_to_string("/proc/thread-self/net/igmp"))??;
        Ok(groups.contains(&group))
    }

    /// Kills the daemon without a word. Its mappings stay in force until [`start`](Self::start).
    pub fn kill(&self) {
        self.daemon().take();
    }

    /// The mappings of UDP ports in force, read from the router's rules.
    ///
    /// # Errors
    ///
    /// When nftables does not tell.
    pub fn mappings(&self) -> Result<Vec<PortMapped>, ToolError> {
        let listing = tool::nft_list(&self.router, "chain inet miniupnpd prerouting_miniupnpd")?;
        let mut mappings: Vec<_> = listing.lines().filter_map(mapping).collect();
        mappings.sort_unstable();
        Ok(mappings)
    }

    fn daemon(&self) -> MutexGuard<'_, Option<HostChild>> {
        // Replaced as a whole, so it is sound even after a panic.
        self.daemon.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The chains that the daemon fills, before those of the router's own NAT. What it translates is let through by the router's
    /// forward rules.
    fn rules(&self) -> String {
        let refused = match self.offered {
            PortMapping { nat_pmp: true, pcp: false, .. } => "udp dport 5351 @th,64,8 2 drop",
            PortMapping { nat_pmp: false, pcp: true, .. } => "udp dport 5351 @th,64,8 0 drop",
            _ => "",
        };
        format!(
            "add table inet miniupnpd\ndelete table inet miniupnpd\n\
             table inet miniupnpd {{\n\
             chain miniupnpd {{ }}\nchain prerouting_miniupnpd {{ }}\nchain postrouting_miniupnpd {{ }}\n\
             chain forward {{ type filter hook forward priority filter - 5; jump miniupnpd; }}\n\
             chain prerouting {{ type nat hook prerouting priority dstnat - 5; jump prerouting_miniupnpd; }}\n\
             chain postrouting {{ type nat hook postrouting priority srcnat - 5; jump postrouting_miniupnpd; }}\n\
             chain refused {{ type filter hook input priority filter - 5; {refused}; }}\n\
             }}\n"
        )
    }

    /// The daemon has one switch for NAT-PMP and PCP; the router's rules keep out the one that is not offered.
    fn configuration(&self) -> String {
        let yes = |on: bool| if on { "yes" } else { "no" };
        format!(
            "ext_ifname=wan\nlistening_ip=lan\nipv6_disable=yes\nenable_upnp={}\nenable_natpmp={}\n\
             secure_mode=yes\nsystem_uptime=no\nmin_lifetime=120\nmax_lifetime=86400\n\
             upnp_table_name=miniupnpd\nupnp_nat_table_name=miniupnpd\n\
             uuid=6b0e3f1c-7c0c-4f6e-9a52-0d6d3f3b5d11\nallow 1024-65535 0.0.0.0/0 1024-65535\n\
             deny 0-65535 0.0.0.0/0 0-65535\n",
            yes(self.offered.upnp),
            yes(self.offered.nat_pmp || self.offered.pcp),
        )
    }

    /// What it says, for each socket, once that is open.
    fn ready_lines(&self) -> Vec<&'static str> {
        let upnp = self.offered.upnp.then_some("HTTP listening on port");
        let others = (self.offered.nat_pmp || self.offered.pcp).then_some("Listening for NAT-PMP/PCP");
        upnp.into_iter().chain(others).collect()
    }
}

const PROGRAM: &str = "miniupnpd";

/// It takes a fraction of a second.
const PATIENCE: Duration = Duration::from_secs(20);

/// One rule of the daemon for UDP. It compares the byte of the IP header that holds the protocol, so that is what nftables shows.
fn mapping(rule: &str) -> Option<PortMapped> {
    let after = |key: &str| rule.split_once(key)?.1.split_whitespace().next();
    let port = after("@nh,72,8 0x11 th dport ")?.parse().ok()?;
    let inside = after("dnat ip to ")?;
    let (ip, inside_port) = inside.split_once(':')?;
    let inside = SocketAddrV4::new(ip.parse::<Ipv4Addr>().ok()?, inside_port.parse().ok()?);
    Some(PortMapped { port, inside })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_tells_its_mapping() {
        let rule = r#"iif "wan" @nh,72,8 0x11 th dport 40000 dnat ip to 192.168.1.10:5000"#;
        let inside = "192.168.1.10:5000".parse().unwrap();
        assert_eq!(mapping(rule), Some(PortMapped { port: 40_000, inside }));
        assert_eq!(mapping("chain prerouting_miniupnpd {"), None);
        assert_eq!(mapping(r#"iif "wan" @nh,72,8 0x6 th dport 1 dnat ip to 192.168.1.10:5000"#), None);
    }
}
