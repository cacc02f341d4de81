//! The three protocols as the crates speak them: one request, one answer, all of it bounded in time.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::num::NonZeroU16;
use std::time::Duration;

use crab_nat::{
    GatewayAddress, InternetProtocol, PortMappingOptions, PortMappingType, TimeoutConfig, natpmp, pcp,
};
use igd_next::aio::Gateway;
use igd_next::aio::tokio::{Tokio, search_gateway};
use igd_next::{AddAnyPortError, AddPortError, PortMappingProtocol, SearchOptions};
use rand::Rng as _;
use tokio::task::JoinHandle;

use super::schedule::{Failure, Granted};
use super::{Protocol, gateway, is_translated};

/// A request of PCP or NAT-PMP is sent three times in 1.75 s, as RFC 6886, section 3.1 begins. PCP's own 3 s to the first repetition (RFC 6887,
/// section 8.1.1) are for servers far away; ours is on the LAN.
const TIMES: TimeoutConfig =
    TimeoutConfig { initial_timeout: Duration::from_millis(250), max_retries: 2, max_retry_timeout: None };

/// How long a UPnP gateway may take to be found: it may wait for up to the 3 s that the search allows (UPnP Device Architecture, 1.3.2), and
/// then has to hand out its description.
const SEARCH: Duration = Duration::from_secs(5);

/// When the searches are sent. Each is one datagram, and multicast gets lost: it should be sent more than once (UPnP Device Architecture, 1.3.2).
const SEARCHES: [Duration; 3] = [Duration::ZERO, Duration::from_millis(500), Duration::from_millis(1500)];

/// How long it may take for all requests that make one mapping.
const UPNP_PATIENCE: Duration = Duration::from_secs(10);

/// Most entries of its table that are looked at.
const MOST_ENTRIES: u32 = 64;

/// Other external ports that are tried where the one we would like is taken.
const OTHER_PORTS: usize = 4;

/// What the router shows its owner.
const DESCRIPTION: &str = "peer";

/// What is remembered from one request to the next.
pub(super) struct Requests {
    local: SocketAddrV4,
    lease: Duration,
    /// Names our mapping to a PCP gateway; another's request does not match it (RFC 6887, section 11.1).
    nonce: pcp::Nonce,
    /// Begun with each round, so that UPnP has not to wait for the others' silence.
    search: Option<AbortOnDrop>,
    upnp: Option<Gateway<Tokio>>,
}

struct AbortOnDrop(JoinHandle<Option<Gateway<Tokio>>>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Requests {
    pub(super) fn new(local: SocketAddrV4, lease: Duration) -> Self {
        Self { local, lease, nonce: rand::rng().random(), search: None, upnp: None }
    }

    /// Asks for a mapping, or to have the one at `external_port` longer.
    pub(super) async fn map(
        &mut self,
        protocol: Protocol,
        external_port: u16,
        renews: bool,
    ) -> Result<Granted, Failure> {
        let gateway = gateway::find(*self.local.ip());
        if gateway.is_some_and(|(_, own)| !is_translated(own)) {
            return Err(Failure::Refusal);
        }
        if protocol == Protocol::FIRST && !renews {
            self.upnp = None;
            self.search = Some(AbortOnDrop(tokio::spawn(search(*self.local.ip()))));
        }
        let granted = match protocol {
            Protocol::Pcp => self.pcp(gateway.ok_or(Failure::Silence)?, external_port).await,
            Protocol::NatPmp => self.nat_pmp(gateway.ok_or(Failure::Silence)?.0, external_port).await,
            Protocol::Upnp => {
                let mapped = tokio::time::timeout(UPNP_PATIENCE, self.upnp(external_port, renews)).await;
                mapped.unwrap_or(Err(Failure::Silence))
            }
        };
        if granted.is_ok() || protocol == Protocol::Upnp {
            self.search = None;
        }
        granted
    }

    /// Gives the mapping back. That it does not work out is no loss: the lease ends.
    pub(super) async fn remove(&mut self, protocol: Protocol, external_port: u16) {
        self.search = None;
        let Some(port) = NonZeroU16::new(self.local.port()) else { return };
        let gateway = gateway::find(*self.local.ip());
        match (protocol, gateway) {
            (Protocol::Pcp, Some((gateway, own))) => {
                let range =
                    pcp::DropMappingRange::Single { internal_port: port, protocol: InternetProtocol::Udp };
                let _ =
                    pcp::try_drop_mapping(gateway.into(), own.into(), self.nonce, range, Some(TIMES)).await;
            }
            (Protocol::NatPmp, Some((gateway, _))) => {
                let gateway = GatewayAddress::from(gateway);
                let _ =
                    natpmp::try_drop_mapping(gateway, InternetProtocol::Udp, Some(port), Some(TIMES)).await;
            }
            (Protocol::Upnp, _) => {
                let Some(gateway) = self.upnp.take() else { return };
                let removal = async {
                    let own = own_address(&gateway, self.local)?;
                    // Only if it is still ours: the router may have restarted and given the port to somebody else.
                    let theirs = entries(&gateway)
                        .await
                        .into_iter()
                        .any(|(at, inside)| at == external_port && inside != own);
                    if theirs {
                        None
                    } else {
                        gateway.remove_port(PortMappingProtocol::UDP, external_port).await.ok()
                    }
                };
                let _ = tokio::time::timeout(UPNP_PATIENCE, removal).await;
            }
            (Protocol::Pcp | Protocol::NatPmp, None) => {}
        }
    }

    fn options(&self, external_port: u16) -> PortMappingOptions {
        PortMappingOptions {
            external_port: NonZeroU16::new(external_port),
            lifetime_seconds: Some(self.seconds()),
            timeout_config: Some(TIMES),
        }
    }

    fn seconds(&self) -> u32 {
        // Zero would be a removal to PCP and NAT-PMP, and for ever to UPnP.
        u32::try_from(self.lease.as_secs()).unwrap_or(u32::MAX).max(1)
    }

    async fn pcp(
        &self,
        (gateway, own): (Ipv4Addr, Ipv4Addr),
        external_port: u16,
    ) -> Result<Granted, Failure> {
        let port = NonZeroU16::new(self.local.port()).ok_or(Failure::Refusal)?;
        let request = pcp::BaseMapRequest::new(gateway.into(), own.into(), InternetProtocol::Udp, port);
        let mapping = pcp::port_mapping(request, Some(self.nonce), None, self.options(external_port)).await;
        let mapping = mapping.map_err(|failure| match failure {
            pcp::Failure::Timeout => Failure::Silence,
            _ => Failure::Refusal,
        })?;
        match mapping.mapping_type() {
            PortMappingType::Pcp { external_ip: IpAddr::V4(ip), .. } => Ok(Granted {
                external: SocketAddrV4::new(ip, mapping.external_port().get()),
                lifetime: Duration::from_secs(mapping.lifetime().into()),
            }),
            _ => Err(Failure::Refusal),
        }
    }

    async fn nat_pmp(&self, gateway: Ipv4Addr, external_port: u16) -> Result<Granted, Failure> {
        let port = NonZeroU16::new(self.local.port()).ok_or(Failure::Refusal)?;
        let failed = |failure| match failure {
            natpmp::Failure::Timeout => Failure::Silence,
            _ => Failure::Refusal,
        };
        let gateway = GatewayAddress::from(gateway);
        // First of all: where it is of no use, none is made.
        let ip = natpmp::external_address(gateway, Some(TIMES)).await.map_err(failed)?;
        let options = self.options(external_port);
        let mapping =
            natpmp::port_mapping(gateway, InternetProtocol::Udp, port, options).await.map_err(failed)?;
        Ok(Granted {
            external: SocketAddrV4::new(ip, mapping.external_port().get()),
            lifetime: Duration::from_secs(mapping.lifetime().into()),
        })
    }

    async fn upnp(&mut self, external_port: u16, renews: bool) -> Result<Granted, Failure> {
        if let Some(mut search) = self.search.take() {
            self.upnp = (&mut search.0).await.ok().flatten();
        }
        let gateway = self.upnp.as_ref().ok_or(Failure::Silence)?;
        let own = own_address(gateway, self.local).ok_or(Failure::Silence)?;
        if !is_translated(*own.ip()) {
            return Err(Failure::Refusal);
        }
        let IpAddr::V4(ip) = gateway.get_external_ip().await.map_err(|error| unanswered(&error))? else {
            return Err(Failure::Refusal);
        };
        let others: BTreeSet<u16> = entries(gateway)
            .await
            .into_iter()
            .filter(|(_, inside)| *inside != own)
            .map(|(at, _)| at)
            .collect();
        if renews && others.contains(&external_port) {
            return Err(Failure::Refusal);
        }
        let random = std::iter::repeat_with(|| rand::rng().random_range(32_768..=60_999)).take(OTHER_PORTS);
        let ports = std::iter::once(external_port).chain(random.filter(|_| !renews));
        for port in ports.filter(|port| !others.contains(port)) {
            match gateway
                .add_port(PortMappingProtocol::UDP, port, own.into(), self.seconds(), DESCRIPTION)
                .await
            {
                Ok(()) => return Ok(Granted { external: SocketAddrV4::new(ip, port), lifetime: self.lease }),
                Err(AddPortError::PortInUse) => {}
                Err(error) => return Err(unanswered(&error)),
            }
        }
        if renews {
            return Err(Failure::Refusal);
        }
        let added =
            gateway.add_any_port(PortMappingProtocol::UDP, own.into(), self.seconds(), DESCRIPTION).await;
        let port = added.map_err(|error: AddAnyPortError| unanswered(&error))?;
        Ok(Granted { external: SocketAddrV4::new(ip, port), lifetime: self.lease })
    }
}

/// A UPnP gateway of the LAN; the crate takes descriptions only from the host that answered, and of a bounded size.
async fn search(local: Ipv4Addr) -> Option<Gateway<Tokio>> {
    let attempts = SEARCHES.map(|after| {
        Box::pin(async move {
            tokio::time::sleep(after).await;
            let mut options = SearchOptions::default();
            options.bind_addr = SocketAddr::from((local, 0));
            options.timeout = Some(SEARCH);
            options.single_search_timeout = Some(SEARCH);
            search_gateway(options).await
        })
    });
    let found = futures_util::future::select_ok(attempts).await;
    found.inspect_err(|error| tracing::trace!(%error, "no UPnP gateway")).ok().map(|(gateway, _)| gateway)
}

/// Our socket's address as a UPnP gateway knows it.
fn own_address(gateway: &Gateway<Tokio>, local: SocketAddrV4) -> Option<SocketAddrV4> {
    let socket = std::net::UdpSocket::bind((*local.ip(), 0)).ok()?;
    // Sends nothing: it only chooses.
    socket.connect(gateway.addr).ok()?;
    match socket.local_addr().ok()?.ip() {
        IpAddr::V4(ip) => Some(SocketAddrV4::new(ip, local.port())),
        IpAddr::V6(_) => None,
    }
}

/// The mappings of UDP ports that a gateway has, as far as it tells: port outside, and where it leads.
async fn entries(gateway: &Gateway<Tokio>) -> Vec<(u16, SocketAddrV4)> {
    let mut entries = Vec::new();
    for index in 0..MOST_ENTRIES {
        // The first error is the end of the list.
        let Ok(entry) = gateway.get_generic_port_mapping_entry(index).await else { break };
        if entry.protocol == PortMappingProtocol::UDP {
            // Whoever is not named by an address is not us.
            let client = entry.internal_client.parse().unwrap_or(Ipv4Addr::UNSPECIFIED);
            entries.push((entry.external_port, SocketAddrV4::new(client, entry.internal_port)));
        }
    }
    entries
}

/// Whether a UPnP gateway did not answer, or did not agree.
fn unanswered(error: &(dyn std::error::Error + 'static)) -> Failure {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(igd_next::RequestError::ErrorCode(..)) = error.downcast_ref() {
            return Failure::Refusal;
        }
        if let Some(
            igd_next::RequestError::IoError(_)
            | igd_next::RequestError::HyperError(_)
            | igd_next::RequestError::HyperClientError(_),
        ) = error.downcast_ref()
        {
            return Failure::Silence;
        }
        cause = error.source();
    }
    Failure::Refusal
}
