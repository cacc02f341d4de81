//! A place where peers are: a router, the hosts behind it, and the line to the internet.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use crate::address;
use crate::host::Host;
use crate::ipv6::Ipv6;
use crate::link::{Impairment, Link};
use crate::namespace::Namespace;
use crate::port_mapping::{PortMapper, PortMapping};
use crate::router::{InputPolicy, Mapping, PortAllocation, Router, RouterKind};
use crate::wiring::Plan;

/// What a site is like.
///
/// ```
/// use std::time::Duration;
/// use netsim::{InputPolicy, RouterKind, SiteConfig};
///
/// let config = SiteConfig::new(RouterKind::EimApdf)
///     .input(InputPolicy::Accept)
///     .delay(Duration::from_millis(20))
///     .loss(0.01)
///     .hosts(2)
///     .ipv6(true);
/// ```
#[derive(Clone, Debug)]
pub struct SiteConfig {
    pub(crate) kind: Option<RouterKind>,
    pub(crate) routers: Vec<Router>,
    pub(crate) hosts: u8,
    pub(crate) isolated: bool,
    pub(crate) ipv6: Ipv6,
    pub(crate) lan: Ipv4Addr,
    pub(crate) port_mapping: Option<PortMapping>,
    pub(crate) up: Impairment,
    pub(crate) down: Impairment,
}

impl SiteConfig {
    /// One host behind a router of this kind, IPv4 only, on a line without impairment.
    pub fn new(kind: RouterKind) -> Self {
        Self { kind: Some(kind), ..Self::with_routers(kind.routers()) }
    }

    /// One host behind these routers, the one nearest to the host first. One or two of them.
    pub fn with_routers(routers: Vec<Router>) -> Self {
        Self {
            kind: None,
            routers,
            hosts: 1,
            isolated: false,
            ipv6: Ipv6::None,
            lan: Ipv4Addr::new(192, 168, 1, 0),
            port_mapping: None,
            up: Impairment::none(),
            down: Impairment::none(),
        }
    }

    /// What its routers do with packets from outside that are for nobody inside.
    #[must_use]
    pub fn input(mut self, policy: InputPolicy) -> Self {
        self.routers.iter_mut().for_each(|router| router.input = policy);
        self
    }

    /// How long a UDP binding outlives its last packet, in whole seconds.
    #[must_use]
    pub fn binding_lifetime(mut self, lifetime: Duration) -> Self {
        self.routers.iter_mut().for_each(|router| router.binding_lifetime = Some(lifetime));
        self
    }

    /// Which ports its address-and-port-dependent NATs give.
    #[must_use]
    pub fn allocation(mut self, allocation: PortAllocation) -> Self {
        let dependent = |router: &&mut Router| router.mapping == Some(Mapping::AddressAndPortDependent);
        self.routers.iter_mut().filter(dependent).for_each(|router| router.allocation = allocation);
        self
    }

    /// Whether its hosts reach each other at their reflexive endpoints (RFC 4787, section 6); off unless asked for.
    #[must_use]
    pub fn hairpin(mut self, hairpin: bool) -> Self {
        self.routers.iter_mut().for_each(|router| router.hairpin = hairpin);
        self
    }

    /// Most flows that its routers remember for its hosts; what would begin another is dropped.
    #[must_use]
    pub fn most_flows(mut self, most: usize) -> Self {
        self.routers.iter_mut().for_each(|router| router.most_flows = Some(most));
        self
    }

    /// How many hosts share the LAN.
    #[must_use]
    pub fn hosts(self, hosts: u8) -> Self {
        Self { hosts, ..self }
    }

    /// Whether the hosts of the LAN reach the router alone and not each other ("client isolation" of guest networks). The model has no such
    /// thing.
    #[must_use]
    pub fn isolated(self, isolated: bool) -> Self {
        Self { isolated, ..self }
    }

    /// What IPv6 is like at the site; there is none unless asked for. `true` stands for [`Ipv6::Firewall`].
    #[must_use]
    pub fn ipv6(self, ipv6: impl Into<Ipv6>) -> Self {
        Self { ipv6: ipv6.into(), ..self }
    }

    /// The /24 of the LAN behind a NAT; 192.168.1.0 unless told otherwise. Sites may share it.
    #[must_use]
    pub fn lan(self, lan: Ipv4Addr) -> Self {
        Self { lan, ..self }
    }

    /// By which protocols its hosts may ask the router nearest to them for mappings; by none unless told otherwise. Needs `miniupnpd`.
    #[must_use]
    pub fn port_mapping(self, offered: PortMapping) -> Self {
        Self { port_mapping: Some(offered), ..self }
    }

    /// What the line does to packets toward the internet.
    #[must_use]
    pub fn up(self, up: Impairment) -> Self {
        Self { up, ..self }
    }

    /// What the line does to packets from the internet.
    #[must_use]
    pub fn down(self, down: Impairment) -> Self {
        Self { down, ..self }
    }

    /// Delays every packet by this much in each direction.
    #[must_use]
    pub fn delay(self, delay: Duration) -> Self {
        self.both_ways(|direction| direction.delay(delay))
    }

    /// Delays every packet by up to this much more, at random, in each direction. Keeps their order.
    #[must_use]
    pub fn jitter(self, jitter: Duration) -> Self {
        self.both_ways(|direction| direction.jitter(jitter))
    }

    /// Loses this share of packets (0 to 1) in each direction.
    #[must_use]
    pub fn loss(self, probability: f64) -> Self {
        self.both_ways(|direction| direction.loss(probability))
    }

    /// Limits each direction to this many bits per second.
    #[must_use]
    pub fn rate(self, bits_per_second: u64) -> Self {
        self.both_ways(|direction| direction.rate(bits_per_second))
    }

    fn both_ways(self, f: impl Fn(Impairment) -> Impairment) -> Self {
        Self { up: f(self.up.clone()), down: f(self.down.clone()), ..self }
    }
}

/// A direction of a site's line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the site to the internet.
    Up,
    /// From the internet to the site.
    Down,
    /// Either.
    Both,
}

/// A site of a lab. A cheap handle.
#[derive(Clone, Debug)]
pub struct Site(Arc<SiteState>);

#[derive(Debug)]
pub(crate) struct SiteState {
    pub(crate) plan: Plan,
    /// Whose line it is on: its own number, or that of the first customer of its carrier.
    pub(crate) line: u8,
    pub(crate) wan_ipv4: Ipv4Addr,
    pub(crate) wan_ipv6: Option<Ipv6Addr>,
    pub(crate) hosts: Vec<Host>,
    /// Hosts that have moved in.
    pub(crate) guests: AtomicU8,
    /// Reboots after which ports were others.
    pub(crate) renumbered: AtomicU8,
    pub(crate) edge: Namespace,
    pub(crate) routers: Vec<Namespace>,
    pub(crate) link: Option<Arc<Link>>,
    pub(crate) port_mapper: Option<PortMapper>,
}

impl Site {
    pub(crate) fn new(state: SiteState) -> Self {
        Self(Arc::new(state))
    }

    pub(crate) fn state(&self) -> &SiteState {
        &self.0
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0.plan.name
    }

    /// The kind of its router, unless it was described by hand.
    pub fn kind(&self) -> Option<RouterKind> {
        self.0.plan.config.kind
    }

    /// Its routers as they were described, the one nearest to the hosts first.
    pub fn routers(&self) -> &[Router] {
        &self.0.plan.config.routers
    }

    /// Host number `index`, counted from zero.
    ///
    /// # Panics
    ///
    /// When there is no such host.
    pub fn host(&self, index: usize) -> Host {
        self.0.hosts[index].clone()
    }

    /// All its hosts.
    pub fn hosts(&self) -> &[Host] {
        &self.0.hosts
    }

    /// A number for one more host of its LAN, and what such a host is like; `None` when there is no room.
    pub(crate) fn welcome(&self) -> Option<(u8, &Plan)> {
        let first = self.0.plan.config.hosts;
        let room = |guests: u8| (first + guests < address::MOST_HOSTS).then_some(guests + 1);
        let guests = self.0.guests.fetch_update(Ordering::Relaxed, Ordering::Relaxed, room).ok()?;
        Some((first + guests, &self.0.plan))
    }

    /// Its router nearest to the hosts.
    pub(crate) fn home(&self) -> &Namespace {
        &self.0.routers[0]
    }

    /// The address of its outermost router on the internet.
    pub fn wan_ipv4(&self) -> Ipv4Addr {
        self.0.wan_ipv4
    }

    /// The IPv6 address of its outermost router, where the site has IPv6.
    pub fn wan_ipv6(&self) -> Option<Ipv6Addr> {
        self.0.wan_ipv6
    }

    /// What makes mappings for its hosts, where the site was configured to have it.
    pub fn port_mapper(&self) -> Option<&PortMapper> {
        self.0.port_mapper.as_ref()
    }

    /// Frames that its line has lost, dropped or could not carry so far; zero for a line without impairment.
    pub fn link_losses(&self) -> u64 {
        self.0.link.as_ref().map_or(0, |link| link.losses())
    }

    pub(crate) fn link(&self) -> Option<&Link> {
        self.0.link.as_deref()
    }

    /// A number that changes with every call.
    pub(crate) fn next_range(&self) -> u8 {
        self.0.renumbered.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn edge(&self) -> &Namespace {
        &self.0.edge
    }

    pub(crate) fn home_router(&self) -> (&Namespace, &Router) {
        (&self.0.routers[0], &self.0.plan.config.routers[0])
    }

    pub(crate) fn outermost_router(&self) -> &Namespace {
        self.0.routers.last().expect("a site has a router")
    }

    /// The flows that its outermost router tracks, one line of `/proc/net/nf_conntrack` each.
    ///
    /// # Errors
    ///
    /// When the kernel was built without that file.
    pub fn conntrack(&self) -> io::Result<Vec<String>> {
        let table =
            self.outermost_router().run(|| fs::read_to_string("/proc/thread-self/net/nf_conntrack"))??;
        Ok(table.lines().map(str::to_owned).collect())
    }

    /// How many flows its outermost router tracks.
    ///
    /// # Errors
    ///
    /// When the kernel has no connection tracking.
    pub fn conntrack_count(&self) -> io::Result<usize> {
        let count = self
            .outermost_router()
            .run(|| fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count"))??;
        count.trim().parse().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }
}
