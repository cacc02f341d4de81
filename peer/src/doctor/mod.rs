//! What this network does to peers, measured at a rendezvous server: how its NATs map, filter and forget (RFC 4787, RFC 5780), whether
//! UDP and IPv6 work, and with whom direct sessions are possible.
//!
//! ```no_run
//! # async fn examine() -> Result<(), Box<dyn std::error::Error>> {
//! let server = "rv://aebagbafaydqqcikbmga2dqpcaireeyuculbogazdinryhi6d4qa@vps.example".parse()?;
//! let diagnosis = peer::doctor::Doctor::new(server).examine(|stage| eprintln!("{stage}")).await;
//! println!("{diagnosis}");
//! # Ok(())
//! # }
//! ```
//!
//! A measurement is true of this server at this moment (RFC 5780, section 2): a NAT may treat others differently when it is busy.
//!
//! | module | what |
//! |---|---|
//! | `exchange` | STUN transactions over several sockets. Pure |
//! | `measurement` | mapping, filtering, hairpinning. Pure |
//! | `lifetime` | binding lifetime. Pure |
//! | `finding` | what was found about one family, in the terms of RFC 4787. Pure |
//! | `diagnosis` | all of it, what follows from it, and both in words. Pure |
//! | `drive`, `signal`, `tcp`, `machine` | sockets, clocks, and what the system tells |

mod diagnosis;
pub(crate) mod drive;
pub(crate) mod exchange;
mod finding;
pub(crate) mod lifetime;
mod machine;
mod measurement;
#[cfg(test)]
mod model;
mod signal;
mod tcp;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use rendezvous_wire::{DEFAULT_REFLECTION_PORTS, RendezvousAddress};

pub use diagnosis::{Diagnosis, Family, PortMapping, Reach, Translators};
pub use finding::{Allocation, FamilyFinding, Filtering, Mapping};
pub use lifetime::BindingLifetime;
pub use machine::Machine;
pub use tcp::Tcp;

use crate::portmap::{self, Trial};
use crate::resolve::resolve;
use drive::drive;
use measurement::{Measurement, Plan};

/// How long bindings are left alone unless the whole lifetime is asked for: nearly all that a person will wait. A lifetime of 10 s exists.
const QUICK: [u64; 2] = [3, 6];

/// The same for the whole lifetime, in seconds. RFC 4787 asks for 120 at least and advises 300 (REQ-5).
const WHOLE: [u64; 17] = [3, 6, 10, 15, 20, 25, 30, 40, 50, 60, 75, 90, 105, 120, 150, 180, 300];

/// A router on the way to `destination` that is of the range between carriers and their customers (RFC 6598), where one says so.
pub(crate) async fn carrier(destination: SocketAddr) -> Option<IpAddr> {
    machine::hops(destination).await.into_iter().find(|hop| machine::is_shared(*hop))
}

/// Whether the router opens a port when it is asked to: asks it to, and gives the mapping back.
async fn port_mapping() -> PortMapping {
    // Keeps the port from being anybody else's meanwhile.
    let Ok(socket) = tokio::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await else {
        return PortMapping::NotTested;
    };
    let Ok(SocketAddr::V4(local)) = socket.local_addr() else { return PortMapping::NotTested };
    match portmap::try_once(local).await {
        Trial::Mapped(mapped) => PortMapping::Works(mapped),
        Trial::BehindAnotherNat => PortMapping::BehindAnotherNat,
        Trial::Nothing => PortMapping::Unavailable,
        Trial::NotNeeded => PortMapping::NotNeeded,
    }
}

/// What is being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stage {
    /// Registering with the server.
    Signalling,
    /// Measuring NATs; done after about this long.
    Measuring(Duration),
    /// Nothing has answered: looking for a captive portal.
    Portal,
}

impl Stage {
    /// A short name for programs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Signalling => "signalling",
            Self::Measuring(_) => "measuring",
            Self::Portal => "portal",
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signalling => f.write_str("asking the rendezvous server"),
            Self::Measuring(time) => {
                write!(f, "measuring what the NATs on the way do, up to {} s", time.as_secs())
            }
            Self::Portal => f.write_str("nothing answers; looking for a captive portal"),
        }
    }
}

/// Examines the network at one rendezvous server.
#[derive(Debug, Clone)]
#[must_use]
pub struct Doctor {
    server: RendezvousAddress,
    silences: Vec<Duration>,
}

impl Doctor {
    /// Examines at this server, in about ten seconds.
    pub fn new(server: RendezvousAddress) -> Self {
        Self { server, silences: QUICK.map(Duration::from_secs).to_vec() }
    }

    /// Measures the whole binding lifetime: up to five minutes, and until the first binding is gone.
    pub fn whole_lifetime(mut self) -> Self {
        self.silences = WHOLE.map(Duration::from_secs).to_vec();
        self
    }

    /// Measures. `progress` hears of every stage as it begins. Must be called inside a tokio runtime.
    pub async fn examine(self, mut progress: impl FnMut(Stage)) -> Diagnosis {
        progress(Stage::Signalling);
        let over_udp = async {
            match resolve(&self.server).await {
                Ok(addresses) => {
                    let signalling = signal::register(&self.server, &addresses).await;
                    (addresses, signalling)
                }
                Err(error) => (Vec::new(), Err(error)),
            }
        };
        let ((addresses, signalling), tcp) = tokio::join!(over_udp, tcp::connect(&self.server));
        let ports =
            signalling.as_ref().map_or(DEFAULT_REFLECTION_PORTS, |done| done.registered.reflection_ports);

        let longest = self.silences.last().copied().unwrap_or_default();
        progress(Stage::Measuring(longest + Duration::from_secs(4)));
        let of = |ipv4: bool| addresses.iter().copied().find(|address| address.is_ipv4() == ipv4);
        let first_hops = async {
            match of(true) {
                Some(address) => machine::hops(SocketAddr::new(address.ip(), ports[0])).await,
                None => Vec::new(),
            }
        };
        let (ipv4, ipv6, hops, port_mapping) = tokio::join!(
            self.family(of(true), true, ports),
            self.family(of(false), false, ports),
            first_hops,
            port_mapping(),
        );

        let silent = signalling.is_err() && ipv4.finding().is_none() && ipv6.finding().is_none();
        let mut portal = None;
        if let Some(address) = addresses.first().filter(|_| silent && !tcp.works()) {
            progress(Stage::Portal);
            portal = tcp::portal(address.ip(), &self.server.host).await;
        }
        let used: Vec<_> =
            [&ipv4, &ipv6].into_iter().filter_map(|family| Some(family.finding()?.local.ip())).collect();
        Diagnosis {
            server: self.server,
            signalling: signalling.map(|done| (done.address, done.rtt)),
            ipv4,
            ipv6,
            hops,
            tcp,
            portal,
            port_mapping,
            machine: machine::look(&used),
        }
    }

    async fn family(&self, server: Option<SocketAddr>, ipv4: bool, ports: [u16; 2]) -> Family {
        let Some(server) = server else {
            return Family::NotAtServer { here: ipv4 || machine::has_global_ipv6() };
        };
        let Ok(local) = machine::local_address(server) else { return Family::Absent };
        let sockets = match drive::open(ipv4, Plan::sockets(self.silences.len())).await {
            Ok(sockets) => sockets,
            Err(error) => {
                tracing::debug!(%error, ipv4, "no sockets to measure with");
                return Family::Absent;
            }
        };
        let plan = Plan {
            server: ports.map(|port| SocketAddr::new(server.ip(), port)),
            ports: sockets.iter().filter_map(|socket| Some(socket.local_addr().ok()?.port())).collect(),
            local,
            silences: self.silences.clone(),
        };
        let mut measurement = Measurement::new(plan, rand::random(), Instant::now());
        drive(&mut measurement, sockets, |_| ()).await;
        let finding = measurement.finding();
        if finding.works() { Family::Works(finding) } else { Family::Broken { local } }
    }
}
