//! A lab as described on the command line.

use std::net::IpAddr;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use netsim::{Host, Impairment, InputPolicy, Ipv6, Lab, PortMapping, RouterKind, SiteConfig};

use super::units;

/// Sites, servers, and what they have in common.
#[derive(Debug, Args)]
pub(super) struct Topology {
    /// A site: NAME=KIND[,OPTION...].
    #[arg(long = "site", value_name = "SITE")]
    sites: Vec<SiteOption>,
    /// A server on the internet.
    #[arg(long = "server", value_name = "NAME")]
    servers: Vec<String>,
    /// One-way delay of the lines of all sites that do not say otherwise, such as 20ms.
    #[arg(long, value_parser = units::duration)]
    delay: Option<Duration>,
    /// Share of packets lost, each way, such as 1%.
    #[arg(long, value_parser = units::share)]
    loss: Option<f64>,
    /// Bits per second, each way, such as 50mbit.
    #[arg(long, value_parser = units::rate)]
    rate: Option<u64>,
    /// WAN input policy of all sites that do not say otherwise: drop, reject or accept.
    #[arg(long)]
    input: Option<InputPolicy>,
    /// IPv6 of all sites that do not say otherwise: none, firewall (the default with `--ipv6`), open, only, broken.
    #[arg(long, value_name = "IPV6", num_args = 0..=1, require_equals = true, default_missing_value = "firewall")]
    ipv6: Option<Ipv6>,
}

/// A lab to describe.
#[derive(Debug, Args)]
pub(super) struct Print {
    #[command(flatten)]
    topology: Topology,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Debug)]
struct SiteOption {
    name: String,
    kind: RouterKind,
    options: Vec<SiteSetting>,
}

#[derive(Clone, Debug)]
enum SiteSetting {
    Behind(String),
    Hairpin,
    Hosts(u8),
    Ipv6(Ipv6),
    Input(InputPolicy),
    Delay(Duration),
    Jitter(Duration),
    Loss(f64),
    Reorder(f64),
    Duplicate(f64),
    Rate(u64),
    PortMapping,
}

impl FromStr for SiteOption {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, rest) = text.split_once('=').context("a site is written NAME=KIND[,OPTION...]")?;
        let mut parts = rest.split(',');
        let kind = parts.next().unwrap_or_default().parse()?;
        let options = parts.map(str::parse).collect::<Result<_>>()?;
        Ok(Self { name: name.to_owned(), kind, options })
    }
}

impl SiteOption {
    /// The site whose carrier it shares, if any.
    fn carrier(&self) -> Option<&str> {
        self.options.iter().find_map(|option| match option {
            SiteSetting::Behind(other) => Some(other.as_str()),
            _ => None,
        })
    }
}

impl FromStr for SiteSetting {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (key, value) = text.split_once('=').unwrap_or((text, ""));
        Ok(match key {
            "hosts" => Self::Hosts(value.parse().with_context(|| format!("`{text}` is no number of hosts"))?),
            "behind" => Self::Behind(value.to_owned()),
            "hairpin" => Self::Hairpin,
            "ipv6" if value.is_empty() => Self::Ipv6(Ipv6::Firewall),
            "ipv6" => Self::Ipv6(value.parse()?),
            "input" => Self::Input(value.parse()?),
            "delay" => Self::Delay(units::duration(value)?),
            "jitter" => Self::Jitter(units::duration(value)?),
            "loss" => Self::Loss(units::share(value)?),
            "reorder" => Self::Reorder(units::share(value)?),
            "duplicate" => Self::Duplicate(units::share(value)?),
            "port-mapping" => Self::PortMapping,
            "rate" => Self::Rate(units::rate(value)?),
            _ => {
                bail!(
                    "`{key}` is none of: behind, hairpin, hosts, ipv6, input, delay, jitter, loss, reorder, duplicate, rate, port-mapping"
                )
            }
        })
    }
}

impl Topology {
    pub(super) fn build(&self, seed: u64) -> Result<Lab> {
        let mut lab = Lab::new(seed)?;
        for server in &self.servers {
            lab.add_server(server)?;
        }
        for site in &self.sites {
            let config = self.config(site);
            match site.carrier() {
                Some(other) => {
                    let found = lab.sites().iter().find(|built| built.name() == other).cloned();
                    let found = found.with_context(|| {
                        format!("`{}`: there is no site `{other}` before it to be behind", site.name)
                    })?;
                    lab.add_site_behind(&site.name, config, &found)?;
                }
                None => {
                    lab.add_site(&site.name, config)?;
                }
            }
        }
        Ok(lab)
    }

    fn config(&self, site: &SiteOption) -> SiteConfig {
        let mut config = SiteConfig::new(site.kind);
        let mut line = Impairment::none();
        let common = [
            self.delay.map(SiteSetting::Delay),
            self.loss.map(SiteSetting::Loss),
            self.rate.map(SiteSetting::Rate),
            self.input.map(SiteSetting::Input),
            self.ipv6.map(SiteSetting::Ipv6),
        ];
        for setting in common.into_iter().flatten().chain(site.options.iter().cloned()) {
            match setting {
                // Says where the site is, not what it is like.
                SiteSetting::Behind(_) => {}
                SiteSetting::Hairpin => config = config.hairpin(true),
                SiteSetting::Hosts(hosts) => config = config.hosts(hosts),
                SiteSetting::Ipv6(ipv6) => config = config.ipv6(ipv6),
                SiteSetting::Input(input) => config = config.input(input),
                SiteSetting::Delay(delay) => line = line.delay(delay),
                SiteSetting::Jitter(jitter) => line = line.jitter(jitter),
                SiteSetting::Loss(share) => line = line.loss(share),
                SiteSetting::Reorder(share) => line = line.reorder(share),
                SiteSetting::Duplicate(share) => line = line.duplicate(share),
                SiteSetting::PortMapping => config = config.port_mapping(PortMapping::ALL),
                SiteSetting::Rate(rate) => line = line.rate(rate),
            }
        }
        config.up(line.clone()).down(line)
    }
}

impl Print {
    pub(super) fn execute(&self, seed: u64) -> Result<ExitCode> {
        let lab = self.topology.build(seed)?;
        if self.json {
            println!("{}", serde_json::to_string_pretty(&as_json(&lab))?);
            return Ok(ExitCode::SUCCESS);
        }
        for server in lab.servers() {
            println!("{:<12} server          {}", server.name(), addresses(server));
        }
        for site in lab.sites() {
            let kind = site.kind().map_or("described", RouterKind::name);
            for host in site.hosts() {
                let seen =
                    ipv4(host).map(|_| format!(" seen as {}", host.reflexive_ipv4())).unwrap_or_default();
                println!("{:<12} {kind:<15} {}{seen}", host.name(), addresses(host));
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn addresses(host: &Host) -> String {
    host.addresses().iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

/// Its IPv4 address, if it has any.
fn ipv4(host: &Host) -> Option<IpAddr> {
    host.addresses().into_iter().find(IpAddr::is_ipv4)
}

fn as_json(lab: &Lab) -> serde_json::Value {
    let host = |host: &Host| {
        serde_json::json!({
            "name": host.name(),
            "ipv4": ipv4(host),
            "second_ipv4": host.second_ipv4(),
            "ipv6": host.ipv6(),
            "second_ipv6": host.second_ipv6(),
            "reflexive_ipv4": ipv4(host).map(|_| host.reflexive_ipv4()),
        })
    };
    let site = |site: &netsim::Site| {
        serde_json::json!({
            "name": site.name(),
            "kind": site.kind(),
            "wan_ipv4": site.wan_ipv4(),
            "wan_ipv6": site.wan_ipv6(),
            "hosts": site.hosts().iter().map(host).collect::<Vec<_>>(),
        })
    };
    serde_json::json!({
        "servers": lab.servers().iter().map(host).collect::<Vec<_>>(),
        "sites": lab.sites().iter().map(site).collect::<Vec<_>>(),
    })
}

/// The host of this name, or an error that lists those there are.
pub(super) fn host(lab: &Lab, name: &str) -> Result<Host> {
    lab.host(name).ok_or_else(|| {
        let hosts = lab.servers().iter().chain(lab.sites().iter().flat_map(netsim::Site::hosts));
        let names = hosts.map(Host::name).collect::<Vec<_>>().join(", ");
        anyhow!("there is no host `{name}` in this lab; there are: {names}")
    })
}

/// The variables by which programs in the lab learn everyone's addresses.
pub(super) fn environment(lab: &Lab) -> Vec<(String, String)> {
    let hosts = lab.servers().iter().chain(lab.sites().iter().flat_map(netsim::Site::hosts));
    let variables = hosts.flat_map(|host| {
        let name = host.name().to_uppercase().replace(|c: char| !c.is_ascii_alphanumeric(), "_");
        let ipv6 = host.ipv6().map(|address| (format!("NETSIM_{name}_IPV6"), address.to_string()));
        let ipv4 = ipv4(host).map(|address| (format!("NETSIM_{name}"), address.to_string()));
        [ipv4, ipv6].into_iter().flatten()
    });
    variables.collect()
}
