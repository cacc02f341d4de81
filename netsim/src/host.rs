//! A machine in the lab.

use std::ffi::OsStr;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use crate::namespace::Namespace;
use crate::process::{HostCommand, Spawner};

/// A machine in the lab: a server, or a host of a site. A cheap handle.
#[derive(Clone, Debug)]
pub struct Host(Arc<HostState>);

#[derive(Debug)]
struct HostState {
    name: String,
    ipv4: Vec<Ipv4Addr>,
    ipv6: Vec<Ipv6Addr>,
    reflexive_ipv4: Ipv4Addr,
    netns: Namespace,
    spawner: Arc<Spawner>,
}

impl Host {
    pub(crate) fn new(
        name: String,
        (ipv4, ipv6): (Vec<Ipv4Addr>, Vec<Ipv6Addr>),
        reflexive_ipv4: Ipv4Addr,
        netns: Namespace,
        spawner: Arc<Spawner>,
    ) -> Self {
        assert!(!(ipv4.is_empty() && ipv6.is_empty()), "a host has an address");
        Self(Arc::new(HostState { name, ipv4, ipv6, reflexive_ipv4, netns, spawner }))
    }

    /// Its name: that of the server, or that of the site and a number (`a`, `a.1`, ...).
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The address of its own interface.
    ///
    /// # Panics
    ///
    /// When the host has IPv6 only.
    pub fn ipv4(&self) -> Ipv4Addr {
        self.0.ipv4.first().copied().unwrap_or_else(|| panic!("`{}` has IPv6 only", self.0.name))
    }

    /// All its addresses, IPv4 first.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let v4 = self.0.ipv4.iter().copied().map(IpAddr::from);
        v4.chain(self.0.ipv6.iter().copied().map(IpAddr::from)).collect()
    }

    /// Its second IPv4 address; servers have one.
    pub fn second_ipv4(&self) -> Option<Ipv4Addr> {
        self.0.ipv4.get(1).copied()
    }

    /// Its IPv6 address; servers have one, hosts where their site has.
    pub fn ipv6(&self) -> Option<Ipv6Addr> {
        self.0.ipv6.first().copied()
    }

    /// Its second IPv6 address; servers have one.
    pub fn second_ipv6(&self) -> Option<Ipv6Addr> {
        self.0.ipv6.get(1).copied()
    }

    /// The IPv4 address that servers see it come from, if it has IPv4.
    pub fn reflexive_ipv4(&self) -> Ipv4Addr {
        self.0.reflexive_ipv4
    }

    /// Prepares a program to run in this host.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let mut lab = netsim::Lab::new(1)?;
    /// let server = lab.add_server("rv")?;
    /// let addresses = server.command("ip").args(["-brief", "address"]).output()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn command(&self, program: impl AsRef<OsStr>) -> HostCommand {
        HostCommand::new(program.as_ref(), self.0.netns.clone(), Arc::clone(&self.0.spawner))
    }

    /// Runs `f` on a fresh thread of this process inside the host, and waits for it.
    ///
    /// Sockets that it opens stay in the host wherever they are used afterwards.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let mut lab = netsim::Lab::new(1)?;
    /// let server = lab.add_server("rv")?;
    /// let socket = server.run(|| std::net::UdpSocket::bind("0.0.0.0:3478"))?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// When `f` panics, or the kernel refuses the namespace, which it does not do to the process that made it.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        self.0.netns.run(f).expect("the process that made a namespace may enter it")
    }

    /// Moves the calling thread into this host, for good.
    ///
    /// For threads that a library starts, such as the workers of an async runtime:
    ///
    /// ```ignore
    /// let runtime = tokio::runtime::Builder::new_multi_thread()
    ///     .on_thread_start(move || host.enter().unwrap())
    ///     .enable_all()
    ///     .build()?;
    /// ```
    ///
    /// # Errors
    ///
    /// What `setns(2)` says.
    pub fn enter(&self) -> io::Result<()> {
        self.0.netns.enter()
    }

    pub(crate) fn namespace(&self) -> &Namespace {
        &self.0.netns
    }

    /// The host's network namespace, for `setns(2)`.
    pub fn enter_fd(&self) -> BorrowedFd<'_> {
        self.0.netns.as_fd()
    }
}
