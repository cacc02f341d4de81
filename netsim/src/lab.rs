//! A lab and how it is put together.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;

use crate::address;
use crate::host::Host;
use crate::link::LinkError;
use crate::namespace::Namespace;
use crate::process::Spawner;
use crate::router::Router;
use crate::site::{Site, SiteConfig};
use crate::tool::{self, ToolError};
use crate::wiring::{Carrier, Plan, host_namespace, router_namespace};

/// Why a lab, or a part of it, could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The kernel refused a namespace.
    #[error("could not make a namespace: run as root, or call netsim::enter_user_namespace() first in main")]
    Namespace(#[source] io::Error),
    /// The process that keeps the lab's programs together could not be started.
    #[error("could not start the lab's first process, `sleep infinity`")]
    Process(#[source] io::Error),
    /// A tool is missing or failed.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// The link emulator could not be started.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// Something in the lab has this name already.
    #[error("the lab already has a `{0}`")]
    NameTaken(String),
    /// More sites, servers or hosts than the address ranges hold.
    #[error("no addresses left for `{0}`")]
    Full(String),
    /// A combination of mapping, filtering and routers that the lab cannot build.
    #[error("site `{0}`: this combination of mapping, filtering and routers cannot be built")]
    Unsupported(String),
}

/// An internet with servers and sites, made of network namespaces.
///
/// ```text
/// host -- router (-- carrier) ==line== edge -- core -- servers
/// ```
///
/// Every site has an edge of its own, so that between the routers of two sites there are three routing hops:
/// a packet that leaves a host with a TTL of 2 (of 3 behind a carrier's NAT) passes its own router and dies
/// before it comes near another site. Only customers of [one carrier](Lab::add_site_behind) are nearer.
///
/// A lab lives by file descriptors and leaves nothing behind: dropping it kills the programs in its hosts, and
/// the namespaces go with the last handle to them; if the process dies, in whatever way, so does all of it.
///
/// ```no_run
/// use std::time::Duration;
/// use netsim::{Lab, RouterKind, SiteConfig};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mut lab = Lab::new(1)?;
/// let server = lab.add_server("rv")?;
/// let site = lab.add_site("a", SiteConfig::new(RouterKind::EimApdf).delay(Duration::from_millis(20)))?;
/// let ping = site.host(0).command("ping").args(["-c1", &server.ipv4().to_string()]).status()?;
/// assert!(ping.success());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Lab {
    seed: u64,
    pub(crate) core: Namespace,
    pub(crate) spawner: Arc<Spawner>,
    names: HashSet<String>,
    servers: Vec<Host>,
    sites: Vec<Site>,
}

impl Lab {
    /// An internet with nothing attached. Everything random in it follows from `seed`.
    ///
    /// # Errors
    ///
    /// When the process lacks the rights (see [`enter_user_namespace`](crate::enter_user_namespace)) or a tool
    /// is missing.
    pub fn new(seed: u64) -> Result<Self, BuildError> {
        let core = router_namespace(true)?;
        let spawner = Spawner::new().map_err(BuildError::Process)?;
        let (v4, v6) = (address::SERVERS_GATEWAY_V4, address::SERVERS_GATEWAY_V6);
        tool::ip(
            &core,
            &format!(
                "link set lo up\nlink add name servers type bridge\nlink set servers up\n\
                 address add {v4}/24 dev servers\naddress add {v6}/64 dev servers nodad\n"
            ),
        )?;
        Ok(Self { seed, core, spawner, names: HashSet::new(), servers: Vec::new(), sites: Vec::new() })
    }

    /// The seed it was made from.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The servers, in the order they were added.
    pub fn servers(&self) -> &[Host] {
        &self.servers
    }

    /// The sites, in the order they were added.
    pub fn sites(&self) -> &[Site] {
        &self.sites
    }

    /// The server of this name, or the host of this name: `a` or `a.0` is the first host of site `a`.
    pub fn host(&self, name: &str) -> Option<Host> {
        let hosts = self.sites.iter().flat_map(Site::hosts);
        let name = name.strip_suffix(".0").unwrap_or(name);
        self.servers.iter().chain(hosts).find(|host| host.name() == name).cloned()
    }

    /// Attaches a server with two addresses per family.
    ///
    /// # Errors
    ///
    /// When the name is taken, there are no addresses left, or a tool fails.
    pub fn add_server(&mut self, name: &str) -> Result<Host, BuildError> {
        let index = self.reserve(name, self.servers.len())?;
        let (v4, v6) = address::server(index);
        let netns = host_namespace(true)?;
        tool::ip(
            &self.core,
            &format!(
                "link add name server{index} type veth peer name eth0 netns {}\n\
                 link set server{index} master servers up\n",
                netns.path()
            ),
        )?;
        let addresses = format!(
            "address add {}/24 dev eth0\naddress add {}/24 dev eth0\n\
             address add {}/64 dev eth0 nodad\naddress add {}/64 dev eth0 nodad preferred_lft 0\n",
            v4[0], v4[1], v6[0], v6[1]
        );
        let routes = format!(
            "route add default via {}\nroute add ::/0 via {}\n",
            address::SERVERS_GATEWAY_V4,
            address::SERVERS_GATEWAY_V6
        );
        tool::ip(&netns, &format!("link set lo up\nlink set eth0 up\n{addresses}{routes}"))?;
        [&self.core, &netns]
            .into_iter()
            .try_for_each(Namespace::wait_for_carrier)
            .map_err(BuildError::Namespace)?;
        let addresses = (v4.to_vec(), v6.to_vec());
        let host = Host::new(name.to_owned(), addresses, v4[0], netns, Arc::clone(&self.spawner));
        self.servers.push(host.clone());
        Ok(host)
    }

    /// Attaches a site.
    ///
    /// # Errors
    ///
    /// When the name is taken, the configuration cannot be built, or a tool is missing or fails.
    pub fn add_site(&mut self, name: &str, config: SiteConfig) -> Result<Site, BuildError> {
        let buildable = matches!(config.routers.len(), 1 | 2)
            && config.routers.iter().all(Router::is_buildable)
            && (config.routers.len() == 1 || config.routers.iter().all(|router| router.mapping.is_some()));
        if !buildable {
            return Err(BuildError::Unsupported(name.to_owned()));
        }
        if config.hosts == 0 || config.hosts > address::MOST_HOSTS {
            return Err(BuildError::Full(name.to_owned()));
        }
        let index = self.reserve(name, self.sites.len())? + 1;
        let state = Plan::new(name, index, config).build(self)?;
        let site = Site::new(state);
        self.sites.push(site.clone());
        Ok(site)
    }

    /// Attaches a site behind the carrier of another: one more customer of it. Only its first router counts; its
    /// line is the carrier's. Customers of one carrier reach each other's addresses between home and carrier,
    /// 100.64.0.*x*; at their reflexive endpoints only where the carrier [hairpins](SiteConfig::hairpin).
    ///
    /// # Errors
    ///
    /// When the other site has no carrier, or has no IPv6 where this one is to have it; else as [`add_site`](Self::add_site).
    pub fn add_site_behind(
        &mut self,
        name: &str,
        config: SiteConfig,
        other: &Site,
    ) -> Result<Site, BuildError> {
        let other = other.state();
        let home = &config.routers[..config.routers.len().min(1)];
        let buildable = other.routers.len() == 2
            && home.iter().all(|router| router.is_buildable() && router.mapping.is_some())
            && home.len() == 1
            && (other.plan.config.ipv6.is_there() || !config.ipv6.is_there());
        if !buildable {
            return Err(BuildError::Unsupported(name.to_owned()));
        }
        let customers = self.sites.iter().filter(|site| site.state().line == other.line).count();
        let customer = u8::try_from(customers).ok().filter(|customer| *customer < address::MOST);
        if config.hosts == 0 || config.hosts > address::MOST_HOSTS || customer.is_none() {
            return Err(BuildError::Full(name.to_owned()));
        }
        let index = self.reserve(name, self.sites.len())? + 1;
        let carrier = Carrier::of(other, customer.unwrap_or_default());
        let state = Plan::behind(name, index, config, carrier).build(self)?;
        let site = Site::new(state);
        self.sites.push(site.clone());
        Ok(site)
    }

    fn reserve(&mut self, name: &str, used: usize) -> Result<u8, BuildError> {
        let index = u8::try_from(used).ok().filter(|index| *index < address::MOST);
        let index = index.ok_or_else(|| BuildError::Full(name.to_owned()))?;
        if self.names.insert(name.to_owned()) {
            Ok(index)
        } else {
            Err(BuildError::NameTaken(name.to_owned()))
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.spawner.kill_all();
    }
}
