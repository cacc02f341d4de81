//! What there is in a modelled internet, and where packets go in it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use rustc_hash::FxHashSet;

use super::gateway::Gateway;
use super::packet::Protocol;
use crate::address::{self, SiteAddresses};
use crate::ipv6::Ipv6;
use crate::link::Line;
use crate::router::Router;
use crate::site::SiteConfig;

/// A machine: a server or a host of a site.
#[derive(Debug)]
pub(super) struct Machine {
    /// Those it sends from unless told otherwise come first in their family.
    pub(super) addresses: Vec<IpAddr>,
    /// The router of its LAN; servers are at the core.
    pub(super) router: Option<usize>,
    pub(super) sockets: FxHashSet<(Protocol, SocketAddr)>,
}

impl Machine {
    fn new(addresses: Vec<IpAddr>, router: Option<usize>) -> Self {
        Self { addresses, router, sockets: FxHashSet::default() }
    }
}

/// What a router is attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Uplink {
    /// The access line of this number.
    Line(usize),
    /// A carrier's router.
    Carrier(usize),
}

/// A router in its place.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) gateway: Gateway,
    pub(super) uplink: Uplink,
    pub(super) wan: Ipv4Addr,
    /// Its address on the LAN; the LAN is the /24 around it.
    pub(super) lan: Ipv4Addr,
    /// The /64 of its LAN, where there is one.
    pub(super) lan_v6: Option<Ipv6Addr>,
    /// What it does to IPv6. A carrier's leaves it alone.
    pub(super) ipv6: Ipv6,
    pub(super) hairpin: bool,
    pub(super) machines: Vec<usize>,
    pub(super) customers: Vec<usize>,
}

impl Node {
    /// Whether an address is on its LAN.
    pub(super) fn is_on_lan(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => ip.octets()[..3] == self.lan.octets()[..3],
            IpAddr::V6(ip) => self.lan_v6.is_some_and(|lan| ip.segments()[..4] == lan.segments()[..4]),
        }
    }
}

/// An access line and the provider's edge before it.
#[derive(Debug)]
pub(super) struct Access {
    pub(super) up: Line,
    pub(super) down: Line,
    /// The outermost router behind it.
    pub(super) router: usize,
    pub(super) edge: Ipv4Addr,
    pub(super) edge_v6: Ipv6Addr,
}

/// A site as its owner knows it.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) machines: Vec<usize>,
    pub(super) wan: Ipv4Addr,
    pub(super) outermost: usize,
}

/// Everything there is.
#[derive(Debug, Default)]
pub(super) struct Topology {
    pub(super) machines: Vec<Machine>,
    servers: Vec<usize>,
    pub(super) nodes: Vec<Node>,
    pub(super) lines: Vec<Access>,
    pub(super) places: Vec<Place>,
}

/// Where the core sends a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    Server(usize),
    Line(usize),
    Nowhere,
}

impl Topology {
    pub(super) fn add_server(&mut self) -> usize {
        let index = u8::try_from(self.servers.len()).ok().filter(|index| *index < address::MOST);
        let (v4, v6) = address::server(index.expect("addresses for one more server"));
        let addresses = v4.map(IpAddr::from).into_iter().chain(v6.map(IpAddr::from)).collect();
        self.machines.push(Machine::new(addresses, None));
        self.servers.push(self.machines.len() - 1);
        self.machines.len() - 1
    }

    /// A site on a line of its own.
    pub(super) fn add_site(&mut self, config: &SiteConfig, seed: u64) -> usize {
        let (line, index) = (self.lines.len(), self.next_index());
        let at = SiteAddresses::new(index);
        let outermost = self.nodes.len();
        let seed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(u64::from(index) * 2);
        self.lines.push(Access {
            up: Line::new(config.up.clone(), seed),
            down: Line::new(config.down.clone(), seed + 1),
            router: outermost,
            edge: at.edge_v4(),
            edge_v6: at.edge_v6(),
        });
        let routers = &config.routers;
        assert!(matches!(routers.len(), 1 | 2), "one router or two");
        let mut uplink = Uplink::Line(line);
        if let [_, carrier] = &routers[..] {
            self.nodes.push(carrier_node(carrier, uplink, at));
            uplink = Uplink::Carrier(outermost);
        }
        let wan = if routers.len() == 2 { address::carrier_customer_v4(0) } else { at.wan_v4() };
        self.add_home(config, at, uplink, wan, (at.wan_v4(), outermost))
    }

    /// A site behind the carrier of another, sharing that one's line.
    pub(super) fn add_site_behind(&mut self, other: usize, config: &SiteConfig) -> usize {
        let carrier = self.places[other].outermost;
        let wan = self.places[other].wan;
        // The home's own number gives it addresses; the line in front is the other's.
        let at = SiteAddresses::new(self.next_index());
        let own = address::carrier_customer_v4(self.nodes[carrier].customers.len() as u8);
        self.add_home(config, at, Uplink::Carrier(carrier), own, (wan, carrier))
    }

    fn add_home(
        &mut self,
        config: &SiteConfig,
        at: SiteAddresses,
        uplink: Uplink,
        wan: Ipv4Addr,
        (outer, outermost): (Ipv4Addr, usize),
    ) -> usize {
        let home = self.nodes.len();
        let router = &config.routers[0];
        let lan = if router.mapping.is_some() { config.lan } else { at.routed_v4() };
        if let Uplink::Carrier(carrier) = uplink {
            self.nodes[carrier].customers.push(home);
        }
        let first = self.machines.len();
        for number in 0..config.hosts {
            let v4 = config.ipv6.leaves_ipv4().then(|| address::lan_host_v4(lan, number).into());
            let v6 = config.ipv6.is_there().then(|| at.host_v6(number).into());
            let addresses = v4.into_iter().chain(v6).collect();
            self.machines.push(Machine::new(addresses, Some(home)));
        }
        let machines: Vec<usize> = (first..self.machines.len()).collect();
        self.nodes.push(Node {
            gateway: Gateway::new(router.clone(), wan),
            uplink,
            wan,
            lan: address::lan_gateway_v4(lan),
            lan_v6: config.ipv6.is_there().then(|| at.lan_v6()),
            ipv6: config.ipv6,
            hairpin: router.hairpin,
            machines: machines.clone(),
            customers: Vec::new(),
        });
        self.places.push(Place { machines, wan: outer, outermost });
        self.places.len() - 1
    }

    fn next_index(&self) -> u8 {
        u8::try_from(self.places.len() + 1).expect("addresses for one more site")
    }

    /// Where the core sends packets for this address.
    pub(super) fn route(&self, ip: IpAddr) -> Route {
        let site = match ip {
            IpAddr::V4(ip) => match ip.octets() {
                [203, 0, 113, _] => return self.server(ip.into()),
                [198, 18 | 19, site, _] => u16::from(site),
                _ => return Route::Nowhere,
            },
            IpAddr::V6(ip) => match ip.segments() {
                [0x2001, 0xdb8, 0, ..] => return self.server(ip.into()),
                [0x2001, 0xdb8, site, ..] => site,
                _ => return Route::Nowhere,
            },
        };
        let place = usize::from(site).checked_sub(1).and_then(|index| self.places.get(index));
        match place.map(|place| self.nodes[place.outermost].uplink) {
            Some(Uplink::Line(line)) => Route::Line(line),
            _ => Route::Nowhere,
        }
    }

    fn server(&self, ip: IpAddr) -> Route {
        let found = self.servers.iter().find(|server| self.machines[**server].addresses.contains(&ip));
        found.map_or(Route::Nowhere, |server| Route::Server(*server))
    }
}

fn carrier_node(router: &Router, uplink: Uplink, at: SiteAddresses) -> Node {
    Node {
        gateway: Gateway::new(router.clone(), at.wan_v4()),
        uplink,
        wan: at.wan_v4(),
        lan: address::CARRIER_GATEWAY_V4,
        lan_v6: None,
        ipv6: Ipv6::Open,
        hairpin: router.hairpin,
        machines: Vec::new(),
        customers: Vec::new(),
    }
}
