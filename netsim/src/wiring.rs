//! How a site is put together: which namespaces, cables, addresses and routes, in one batch per namespace.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::AtomicU8;
use std::thread;

use crate::address::{self, SiteAddresses};
use crate::host::Host;
use crate::ipv6::Ipv6;
use crate::lab::{BuildError, Lab};
use crate::link::{Link, LinkError};
use crate::namespace::Namespace;
use crate::port_mapping::PortMapper;
use crate::process::Spawner;
use crate::router::Router;
use crate::site::{SiteConfig, SiteState};
use crate::tool;

/// Reverse-path filtering is inherited from the machine and would drop what a lab is there to see.
const ROUTER_V4: [(&str, &str); 6] = [
    ("ipv4/ip_forward", "1"),
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    // What is hairpinned comes back from the router's own address.
    ("ipv4/conf/all/accept_local", "1"),
    // What hosts of one LAN say to each other is bridged and none of the router's business.
    ("bridge/bridge-nf-call-iptables", "0"),
    ("bridge/bridge-nf-call-ip6tables", "0"),
];
/// And lets programs in hosts ping without a raw socket.
const HOST_V4: [(&str, &str); 3] = [ROUTER_V4[1], ROUTER_V4[2], ("ipv4/ping_group_range", "0 0")];
/// Duplicate address detection would hold up every new interface for a second or two.
const HOST_V6: [(&str, &str); 2] = [("ipv6/conf/all/accept_dad", "0"), ("ipv6/conf/default/accept_dad", "0")];
const ROUTER_V6: [(&str, &str); 3] = [("ipv6/conf/all/forwarding", "1"), HOST_V6[0], HOST_V6[1]];
const NO_V6: [(&str, &str); 2] =
    [("ipv6/conf/all/disable_ipv6", "1"), ("ipv6/conf/default/disable_ipv6", "1")];

/// Hardware addresses of the two ends of an access line. Known beforehand, so that no packet is held up by an
/// address resolution across the line's delay.
const EDGE_MAC: &str = "02:00:00:00:00:01";
const WAN_MAC: &str = "02:00:00:00:00:02";

/// The routing table for what hosts send to their router's own address.
const HAIRPIN_TABLE: u32 = 100;

pub(crate) fn router_namespace(ipv6: bool) -> Result<Namespace, BuildError> {
    let family: &[_] = if ipv6 { &ROUTER_V6 } else { &NO_V6 };
    Namespace::new(&[&ROUTER_V4, family].concat()).map_err(BuildError::Namespace)
}

pub(crate) fn host_namespace(ipv6: bool) -> Result<Namespace, BuildError> {
    let family: &[_] = if ipv6 { &HOST_V6 } else { &NO_V6 };
    Namespace::new(&[&HOST_V4, family].concat()).map_err(BuildError::Namespace)
}

/// What a site is to be: its configuration and the addresses that follow from its place in the lab.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) name: String,
    index: u8,
    pub(crate) config: SiteConfig,
    at: SiteAddresses,
    /// The /24 of the hosts.
    lan: Ipv4Addr,
    /// That of a site built before, whose customer this one becomes.
    carrier: Option<Carrier>,
}

/// A carrier that is there already, for one more customer.
#[derive(Clone, Debug)]
pub(crate) struct Carrier {
    line: u8,
    /// Counted from zero.
    customer: u8,
    description: Router,
    edge: Namespace,
    router: Namespace,
    link: Option<Arc<Link>>,
}

impl Carrier {
    /// The outermost router of `site`, which has two.
    pub(crate) fn of(site: &SiteState, customer: u8) -> Self {
        Self {
            line: site.line,
            customer,
            description: site.plan.config.routers[1].clone(),
            edge: site.edge.clone(),
            router: site.routers[1].clone(),
            link: site.link.clone(),
        }
    }
}

struct Namespaces {
    edge: Namespace,
    /// The one nearest to the hosts first.
    routers: Vec<Namespace>,
    hosts: Vec<Namespace>,
}

impl Plan {
    /// `index` is counted from one.
    pub(crate) fn new(name: &str, index: u8, config: SiteConfig) -> Self {
        let at = SiteAddresses::new(index);
        let maps_to_the_internet = config.port_mapping.is_some() && config.routers.len() == 1;
        let at = if maps_to_the_internet { at.unreserved() } else { at };
        let translated = config.routers[0].mapping.is_some();
        let lan = if translated { config.lan } else { at.routed_v4() };
        Self { name: name.to_owned(), index, config, at, lan, carrier: None }
    }

    /// A site that shares the carrier and the line of another.
    pub(crate) fn behind(name: &str, index: u8, mut config: SiteConfig, carrier: Carrier) -> Self {
        config.routers.truncate(1);
        config.routers.push(carrier.description.clone());
        Self { carrier: Some(carrier), ..Self::new(name, index, config) }
    }

    /// The addresses of its line.
    fn line(&self) -> SiteAddresses {
        self.carrier.as_ref().map_or(self.at, |carrier| SiteAddresses::new(carrier.line))
    }

    /// Its number among the customers of its carrier.
    fn customer(&self) -> u8 {
        self.carrier.as_ref().map_or(0, |carrier| carrier.customer)
    }

    /// Builds the site and attaches it to the core of `lab`.
    pub(crate) fn build(self, lab: &Lab) -> Result<SiteState, BuildError> {
        let namespaces = self.namespaces()?;
        let link = self.join(lab, &namespaces)?;
        self.configure(lab, &namespaces)?;
        let Namespaces { edge, routers, hosts } = &namespaces;
        for namespace in [&lab.core, edge].into_iter().chain(routers).chain(hosts) {
            namespace.wait_for_carrier().map_err(BuildError::Namespace)?;
        }
        let mapper = |offered| PortMapper::new(offered, routers[0].clone(), Arc::clone(&lab.spawner));
        let port_mapper = self.config.port_mapping.map(mapper);
        if let Some(mapper) = &port_mapper {
            mapper.start()?;
        }
        let hosts = (0..).zip(&namespaces.hosts).map(|(number, netns)| {
            let name = if number == 0 { self.name.clone() } else { format!("{}.{number}", self.name) };
            self.host(name, number, netns.clone(), Arc::clone(&lab.spawner))
        });
        Ok(SiteState {
            hosts: hosts.collect(),
            guests: AtomicU8::new(0),
            renumbered: AtomicU8::new(0),
            line: self.carrier.as_ref().map_or(self.index, |carrier| carrier.line),
            wan_ipv4: self.line().wan_v4(),
            wan_ipv6: self.config.ipv6.is_there().then(|| self.line().wan_v6()),
            edge: namespaces.edge,
            routers: namespaces.routers,
            link,
            port_mapper,
            plan: self,
        })
    }

    /// Host number `number` of its LAN, which lives in `netns`.
    pub(crate) fn host(&self, name: String, number: u8, netns: Namespace, spawner: Arc<Spawner>) -> Host {
        let v4 = address::lan_host_v4(self.lan, number);
        let v6 = self.config.ipv6.is_there().then(|| self.at.host_v6(number));
        let translated = self.config.routers[0].mapping.is_some();
        let reflexive = if translated { self.line().wan_v4() } else { v4 };
        let v4 = self.config.ipv6.leaves_ipv4().then_some(v4);
        Host::new(name, (Vec::from_iter(v4), Vec::from_iter(v6)), reflexive, netns, spawner)
    }

    fn namespaces(&self) -> Result<Namespaces, BuildError> {
        let ipv6 = self.config.ipv6.is_there();
        let router = || router_namespace(ipv6);
        let (edge, routers) = match &self.carrier {
            Some(carrier) => (carrier.edge.clone(), vec![router()?, carrier.router.clone()]),
            None => (router()?, self.config.routers.iter().map(|_| router()).collect::<Result<_, _>>()?),
        };
        Ok(Namespaces {
            edge,
            routers,
            hosts: (0..self.config.hosts).map(|_| host_namespace(ipv6)).collect::<Result<_, _>>()?,
        })
    }

    /// Lays every cable of the site, and starts the emulator of its line if there is anything to emulate.
    fn join(&self, lab: &Lab, namespaces: &Namespaces) -> Result<Option<Arc<Link>>, BuildError> {
        let Namespaces { edge, routers, hosts } = namespaces;
        let veth = |a: &str, a_in: &Namespace, b: &str, b_in: &Namespace| {
            let (a_in, b_in) = (a_in.path(), b_in.path());
            format!("link add name {a} netns {a_in} type veth peer name {b} netns {b_in}\n")
        };
        let home = &routers[0];
        let outermost = routers.last().expect("checked by add_site");
        let mut cables = String::new();
        if routers.len() == 2 {
            cables += &veth(&format!("customer{}", self.customer()), outermost, "wan", home);
        }
        for (number, host) in hosts.iter().enumerate() {
            cables += &veth(&format!("host{number}"), home, "eth0", host);
        }
        if let Some(carrier) = &self.carrier {
            tool::ip(&lab.core, &cables)?;
            return Ok(carrier.link.clone());
        }
        cables += &veth(&format!("site{}", self.index), &lab.core, "core", edge);
        let impaired = !(self.config.up.is_none() && self.config.down.is_none());
        if !impaired {
            cables += &veth("site", edge, "wan", outermost);
            tool::ip(&lab.core, &cables)?;
            return Ok(None);
        }
        let line = Namespace::new(&NO_V6).map_err(BuildError::Namespace)?;
        cables += &veth("site", edge, "internet", &line);
        cables += &veth("wan", outermost, "site", &line);
        tool::ip(&lab.core, &cables)?;
        tool::ip(&line, "link set internet up\nlink set site up\n")?;
        edge.run(|| Link::segment_before("site")).map_err(LinkError::Offload)?.map_err(LinkError::Offload)?;
        outermost
            .run(|| Link::segment_before("wan"))
            .map_err(LinkError::Offload)?
            .map_err(LinkError::Offload)?;
        let seed = lab.seed().wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(self.index.into());
        Ok(Some(Arc::new(Link::start(&line, self.config.up.clone(), self.config.down.clone(), seed)?)))
    }

    /// Gives every namespace its addresses, routes and rules, all at the same time.
    fn configure(&self, lab: &Lab, namespaces: &Namespaces) -> Result<(), BuildError> {
        let Namespaces { edge, routers, hosts } = namespaces;
        thread::scope(|scope| {
            let mut tasks = vec![
                scope.spawn(|| tool::ip(&lab.core, &self.core_batch())),
                scope.spawn(|| tool::ip(edge, &self.edge_batch())),
            ];
            for (position, netns) in routers.iter().enumerate() {
                tasks.push(scope.spawn(move || {
                    if position == 1 && self.carrier.is_some() {
                        // It has all the rest already.
                        return tool::ip(netns, &self.customer_batch());
                    }
                    tool::ip(netns, &self.router_batch(position))?;
                    let wan = self.wan_of(position);
                    // A carrier translates IPv4 and leaves IPv6 alone; the home's firewall is enough.
                    let ipv6 = if position == 0 { self.config.ipv6 } else { Ipv6::None };
                    self.config.routers[position].install(netns, wan, ipv6)
                }));
            }
            for (number, netns) in (0..).zip(hosts) {
                tasks.push(scope.spawn(move || tool::ip(netns, &self.host_batch(number))));
            }
            tasks.into_iter().try_for_each(|task| match task.join() {
                Ok(result) => result.map_err(BuildError::from),
                Err(panic) => std::panic::resume_unwind(panic),
            })
        })
    }

    fn core_batch(&self) -> String {
        let (at, dev) = (self.at, format!("site{}", self.index));
        if self.carrier.is_some() {
            let (edge, line) = (self.line().transit_edge_v6(), self.line().index());
            return self.ipv6_only(format!("route add {}/48 via {edge} dev site{line}\n", at.site_v6()));
        }
        let mut batch = format!(
            "link set {dev} up\naddress add {}/31 dev {dev}\n\
             route add {}/24 via {edge}\nroute add {}/24 via {edge}\n",
            at.transit_core_v4(),
            at.access_v4(),
            at.routed_v4(),
            edge = at.transit_edge_v4(),
        );
        if self.config.ipv6.is_there() {
            let (core, edge, site) = (at.transit_core_v6(), at.transit_edge_v6(), at.site_v6());
            batch +=
                &format!("address add {core}/64 dev {dev} nodad\nroute add {site}/48 via {edge} dev {dev}\n");
        }
        batch
    }

    fn edge_batch(&self) -> String {
        let at = self.at;
        if self.carrier.is_some() {
            let wan = self.line().wan_v6();
            return self.ipv6_only(format!("route add {}/48 via {wan}\n", at.site_v6()));
        }
        let mut batch = format!(
            "link set lo up\nlink set core up\nlink set site address {EDGE_MAC} up\n\
             address add {}/31 dev core\naddress add {}/24 dev site\nroute add default via {}\n\
             route add {}/24 via {wan}\nneighbour replace {wan} lladdr {WAN_MAC} nud permanent dev site\n",
            at.transit_edge_v4(),
            at.edge_v4(),
            at.transit_core_v4(),
            at.routed_v4(),
            wan = at.wan_v4(),
        );
        if self.config.ipv6.is_there() {
            batch += &format!(
                "address add {}/64 dev core nodad\naddress add {}/64 dev site nodad\n\
                 route add ::/0 via {}\nroute add {}/48 via {wan}\n\
                 neighbour replace {wan} lladdr {WAN_MAC} nud permanent dev site\n",
                at.transit_edge_v6(),
                at.edge_v6(),
                at.transit_core_v6(),
                at.site_v6(),
                wan = at.wan_v6(),
            );
        }
        batch
    }

    fn router_batch(&self, position: usize) -> String {
        let home = position == 0;
        let mut batch = String::from("link set lo up\n");
        batch += &if position + 1 == self.config.routers.len() {
            self.wan_batch()
        } else {
            self.behind_carrier_batch()
        };
        batch += &if home { self.lan_batch() } else { self.carrier_lan_batch() };
        if self.config.routers[position].hairpin {
            batch += &hairpin_batch(self.wan_of(position));
        }
        batch
    }

    /// The IPv4 address toward the internet of the router in this position.
    fn wan_of(&self, position: usize) -> Ipv4Addr {
        if position + 1 == self.config.routers.len() {
            self.at.wan_v4()
        } else {
            address::carrier_customer_v4(self.customer())
        }
    }

    fn wan_batch(&self) -> String {
        let at = self.at;
        let mut batch = format!(
            "link set wan address {WAN_MAC} up\naddress add {}/24 dev wan\nroute add default via {edge}\n\
             neighbour replace {edge} lladdr {EDGE_MAC} nud permanent dev wan\n",
            at.wan_v4(),
            edge = at.edge_v4(),
        );
        if self.config.ipv6.is_there() {
            batch += &format!(
                "address add {}/64 dev wan nodad\nroute add ::/0 via {edge}\n\
                 neighbour replace {edge} lladdr {EDGE_MAC} nud permanent dev wan\n",
                at.wan_v6(),
                edge = at.edge_v6(),
            );
        }
        batch
    }

    fn behind_carrier_batch(&self) -> String {
        let (customer, gateway) = (self.wan_of(0), address::CARRIER_GATEWAY_V4);
        let mut batch =
            format!("link set wan up\naddress add {customer}/24 dev wan\nroute add default via {gateway}\n");
        if self.config.ipv6.is_there() {
            let (customer, gateway) = (self.at.carrier_customer_v6(), self.at.carrier_gateway_v6());
            batch += &format!("address add {customer}/64 dev wan nodad\nroute add ::/0 via {gateway}\n");
        }
        batch
    }

    fn carrier_lan_batch(&self) -> String {
        let gateway = address::CARRIER_GATEWAY_V4;
        let batch =
            format!("link add name lan type bridge\nlink set lan up\naddress add {gateway}/24 dev lan\n");
        batch + &self.customer_batch()
    }

    /// What a carrier needs for one more customer.
    fn customer_batch(&self) -> String {
        let mut batch = format!("link set customer{} master lan up\n", self.customer());
        if self.config.ipv6.is_there() {
            let (customer, gateway) = (self.at.carrier_customer_v6(), self.at.carrier_gateway_v6());
            let lan = self.at.lan_v6();
            batch += &format!("address add {gateway}/64 dev lan nodad\nroute add {lan}/64 via {customer}\n");
        }
        batch
    }

    /// `batch` where the site has IPv6, else nothing.
    fn ipv6_only(&self, batch: String) -> String {
        if self.config.ipv6.is_there() { batch } else { String::new() }
    }

    fn lan_batch(&self) -> String {
        let gateway = address::lan_gateway_v4(self.lan);
        let mut batch =
            format!("link add name lan type bridge\nlink set lan up\naddress add {gateway}/24 dev lan\n");
        if self.config.ipv6.is_there() {
            batch += &format!("address add {}/64 dev lan nodad\n", self.at.lan_gateway_v6());
        }
        for number in 0..self.config.hosts {
            batch += &format!("link set host{number} master lan up\n");
            if self.config.isolated {
                batch += &format!("link set host{number} type bridge_slave isolated on\n");
            }
        }
        batch
    }

    pub(crate) fn host_batch(&self, number: u8) -> String {
        let (host, gateway) = (address::lan_host_v4(self.lan, number), address::lan_gateway_v4(self.lan));
        let mut batch = String::from("link set lo up\nlink set eth0 up\n");
        if self.config.ipv6.leaves_ipv4() {
            batch += &format!("address add {host}/24 dev eth0\nroute add default via {gateway}\n");
        }
        if self.config.ipv6.is_there() {
            let (host, gateway) = (self.at.host_v6(number), self.at.lan_gateway_v6());
            batch += &format!("address add {host}/64 dev eth0 nodad\nroute add ::/0 via {gateway}\n");
        }
        batch
    }
}

/// Sends what hosts send to the router's own `wan` address out and in again over a cable from the router to itself, so that it is translated and
/// filtered in both directions like anything else (RFC 4787, REQ-9: hosts see each other's external endpoints).
fn hairpin_batch(wan: Ipv4Addr) -> String {
    format!(
        "link add wanout type veth peer name wanback\nlink set wanback address {WAN_MAC} up\nlink set wanout up\n\
         address add {wan}/32 dev wanout\nneighbour replace {wan} lladdr {WAN_MAC} nud permanent dev wanout\n\
         route add {wan} dev wanout table {HAIRPIN_TABLE}\n\
         rule add pref 20 lookup local\nrule del pref 0\n\
         rule add pref 10 iif lan to {wan} lookup {HAIRPIN_TABLE}\n"
    )
}
