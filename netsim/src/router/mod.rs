//! What a router does to traffic, in the terms of RFC 4787, and the named presets.

mod iptables;
pub(crate) mod nft;

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;
use std::time::Duration;

use serde::Serialize;

use crate::ipv6::Ipv6;
use crate::namespace::{Namespace, write_sysctl};
use crate::tool::{self, ToolError};

/// Which reflexive port an inside endpoint gets (RFC 4787, section 4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Mapping {
    /// The same for every destination.
    EndpointIndependent,
    /// The same for every port of a destination address. Named for completeness; the lab cannot build it.
    AddressDependent,
    /// A new random one for every destination address and port.
    AddressAndPortDependent,
}

/// Who may send to an inside endpoint that has sent something (RFC 4787, section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Filtering {
    /// Anyone.
    EndpointIndependent,
    /// Addresses it has sent to, from any port.
    AddressDependent,
    /// Exactly the addresses and ports it has sent to.
    AddressAndPortDependent,
}

/// Which port a flow gets where every destination sees another (RFC 4787, section 4.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum PortAllocation {
    /// Any.
    #[default]
    Random,
    /// The next of a sequence that all flows share.
    Sequential {
        /// From one to the next.
        step: u16,
    },
    /// The host's own where no other flow has it, else any.
    Preserving,
}

impl PortAllocation {
    /// The ports of a sequence, in their order. They begin anew after the last, as in routers with a range of their own for NAT.
    pub(crate) fn sequence(step: u16) -> impl ExactSizeIterator<Item = u16> + Clone {
        const FIRST: u16 = 20_480;
        const MOST: u16 = 4096;
        let step = step.max(1);
        let count = MOST.min((u16::MAX - FIRST) / step + 1);
        (0..count).map(move |place| FIRST + place * step)
    }
}

/// What the router does with packets from outside that are for nobody inside: its `INPUT` chain on the WAN side.
///
/// This decides more than courtesy. Where such packets are accepted, the kernel remembers the flow, and an
/// inside host that later sends to that very address gets another source port than it would have had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum InputPolicy {
    /// Silence.
    #[default]
    Drop,
    /// ICMP port unreachable, and no memory of the flow.
    Reject,
    /// The kernel's own default: answered by the router's own stack, and remembered by conntrack.
    Accept,
}

/// What may leave the site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Egress {
    /// Everything.
    #[default]
    All,
    /// Only TCP to ports 80 and 443; the rest vanishes.
    Web,
}

/// One router, described by what it does.
///
/// [`RouterKind`] names the usual ones. Translation applies to IPv4; IPv6 is routed, behind a stateful firewall
/// wherever [`filtering`](Self::filtering) is set, unless the site says otherwise ([`Ipv6`]).
///
/// Endpoint-independent mapping with endpoint-independent or address-dependent filtering is built for UDP; TCP
/// through such a router is filtered by address and port.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Router {
    /// How IPv4 source endpoints are translated; `None` routes them as they are.
    pub mapping: Option<Mapping>,
    /// Who may send in; `None` lets everyone.
    pub filtering: Option<Filtering>,
    /// What may leave.
    pub egress: Egress,
    /// What happens to packets from outside that are for nobody inside. Has no meaning without `filtering`.
    pub input: InputPolicy,
    /// How long a UDP binding outlives its last packet; `None` leaves the kernel's 30 s (120 s once answered).
    pub binding_lifetime: Option<Duration>,
    /// Which port a flow gets with address-and-port-dependent mapping.
    pub allocation: PortAllocation,
    /// Whether its hosts reach each other at their reflexive endpoints (RFC 4787, section 6).
    pub hairpin: bool,
    /// Most flows that it remembers; what would begin another is dropped.
    pub most_flows: Option<usize>,
}

impl Router {
    /// Routes, and neither translates nor filters.
    pub fn transparent() -> Self {
        Self {
            mapping: None,
            filtering: None,
            egress: Egress::All,
            input: InputPolicy::default(),
            binding_lifetime: None,
            allocation: PortAllocation::default(),
            hairpin: false,
            most_flows: None,
        }
    }

    /// A stateful firewall that translates nothing.
    pub fn firewall() -> Self {
        Self { filtering: Some(Filtering::AddressAndPortDependent), ..Self::transparent() }
    }

    /// A NAT.
    pub fn nat(mapping: Mapping, filtering: Filtering) -> Self {
        Self { mapping: Some(mapping), filtering: Some(filtering), ..Self::transparent() }
    }

    /// The same router with another [`Egress`].
    #[must_use]
    pub fn with_egress(self, egress: Egress) -> Self {
        Self { egress, ..self }
    }

    /// The same router with another [`PortAllocation`].
    #[must_use]
    pub fn with_allocation(self, allocation: PortAllocation) -> Self {
        Self { allocation, ..self }
    }

    /// Whether the lab knows how to build this combination.
    pub(crate) fn is_buildable(&self) -> bool {
        match (self.mapping, self.filtering) {
            (None, None) => self.egress == Egress::All,
            (Some(_), None) => false,
            (Some(Mapping::EndpointIndependent), Some(_)) => true,
            (Some(Mapping::AddressDependent), _) => false,
            (_, Some(filtering)) => filtering == Filtering::AddressAndPortDependent,
        }
    }

    /// Whether bindings must be kept in nftables maps, since the kernel's own NAT does not behave as described.
    pub(crate) fn needs_binding_maps(&self) -> bool {
        self.mapping == Some(Mapping::EndpointIndependent)
            && self.filtering != Some(Filtering::AddressAndPortDependent)
    }

    /// Loads the rules into the router's namespace, whose interfaces are `wan` and `lan`.
    pub(crate) fn install(&self, namespace: &Namespace, wan: Ipv4Addr, ipv6: Ipv6) -> Result<(), ToolError> {
        if let Some(rules) = iptables::ipv4(self) {
            tool::iptables(namespace, &rules)?;
        }
        if let (Some(rules), Ipv6::Firewall | Ipv6::Only) = (iptables::ipv6(self), ipv6) {
            tool::ip6tables(namespace, &rules)?;
        }
        if ipv6 == Ipv6::Broken {
            tool::nft(namespace, nft::BROKEN_IPV6)?;
        }
        if self.needs_binding_maps() {
            tool::nft(namespace, &nft::bindings(self, wan))?;
        }
        if let Some(rules) = nft::allocation(self, wan) {
            tool::nft(namespace, &rules)?;
        }
        if let Some(most) = self.most_flows {
            tool::nft(namespace, &nft::most_flows(most))?;
        }
        if let Some(lifetime) = self.binding_lifetime {
            set_conntrack_timeouts(namespace, lifetime)
                .map_err(|source| ToolError::Run { command: "sysctl".to_owned(), source })?;
        }
        Ok(())
    }

    /// The transaction that empties what the rules remember beside the kernel's flows.
    pub(crate) fn forget(&self) -> &'static str {
        let preserving = self.allocation == PortAllocation::Preserving;
        match self.mapping {
            _ if self.needs_binding_maps() => nft::FORGET_BINDINGS,
            Some(Mapping::AddressAndPortDependent) if preserving => nft::FORGET_TAKEN,
            _ => "",
        }
    }
}

fn set_conntrack_timeouts(namespace: &Namespace, lifetime: Duration) -> std::io::Result<()> {
    let seconds = lifetime.as_secs().max(1).to_string();
    namespace.run(|| {
        write_sysctl("netfilter/nf_conntrack_udp_timeout", &seconds)?;
        write_sysctl("netfilter/nf_conntrack_udp_timeout_stream", &seconds)
    })?
}

/// The routers that peers are found behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum RouterKind {
    /// Hosts have addresses of the internet and no firewall before them.
    Public,
    /// EIM with EIF.
    EimEif,
    /// EIM with ADF.
    EimAdf,
    /// EIM with APDF: an ordinary Linux home router (`MASQUERADE`).
    EimApdf,
    /// APDM with APDF and random ports (`MASQUERADE --random-fully`).
    Apdm,
    /// APDM with APDF that gives ports one after the other.
    ApdmSequential,
    /// APDM with APDF that keeps the host's port where no other flow has it.
    ApdmPreserving,
    /// A stateful firewall without translation.
    Firewall,
    /// A NAT through which only TCP to ports 80 and 443 leaves.
    UdpBlocked,
    /// A home NAT (EIM, APDF) behind a carrier's NAT of the same kind.
    CarrierEim,
    /// A home NAT (EIM, APDF) behind a carrier's APDM.
    CarrierApdm,
}

impl RouterKind {
    /// Every kind, in the order of the tables.
    pub const ALL: [Self; 11] = [
        Self::Public,
        Self::EimEif,
        Self::EimAdf,
        Self::EimApdf,
        Self::Apdm,
        Self::ApdmSequential,
        Self::ApdmPreserving,
        Self::Firewall,
        Self::UdpBlocked,
        Self::CarrierEim,
        Self::CarrierApdm,
    ];

    /// The name used in tables and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Public => "public",
            Self::EimEif => "eim-eif",
            Self::EimAdf => "eim-adf",
            Self::EimApdf => "eim-apdf",
            Self::Apdm => "apdm",
            Self::ApdmSequential => "apdm-sequential",
            Self::ApdmPreserving => "apdm-preserving",
            Self::Firewall => "firewall",
            Self::UdpBlocked => "udp-blocked",
            Self::CarrierEim => "carrier-eim",
            Self::CarrierApdm => "carrier-apdm",
        }
    }

    /// The routers of this kind, the one nearest to the hosts first.
    pub fn routers(self) -> Vec<Router> {
        use Filtering as F;
        use Mapping as M;
        let home = Router::nat(M::EndpointIndependent, F::AddressAndPortDependent);
        let apdm = Router::nat(M::AddressAndPortDependent, F::AddressAndPortDependent);
        match self {
            Self::Public => vec![Router::transparent()],
            Self::EimEif => vec![Router::nat(M::EndpointIndependent, F::EndpointIndependent)],
            Self::EimAdf => vec![Router::nat(M::EndpointIndependent, F::AddressDependent)],
            Self::EimApdf => vec![home],
            Self::Apdm => vec![apdm],
            Self::ApdmSequential => vec![apdm.with_allocation(PortAllocation::Sequential { step: 1 })],
            Self::ApdmPreserving => vec![apdm.with_allocation(PortAllocation::Preserving)],
            Self::Firewall => vec![Router::firewall()],
            Self::UdpBlocked => vec![home.with_egress(Egress::Web)],
            Self::CarrierEim => vec![home.clone(), home],
            Self::CarrierApdm => vec![home, apdm],
        }
    }
}

impl fmt::Display for RouterKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Serialize for RouterKind {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// A name that [`RouterKind`], [`InputPolicy`] or [`Ipv6`] does not know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` is none of: {known}")]
pub struct UnknownName {
    name: String,
    known: String,
}

impl UnknownName {
    pub(crate) fn new(name: &str, known: impl IntoIterator<Item = &'static str>) -> Self {
        Self { name: name.to_owned(), known: known.into_iter().collect::<Vec<_>>().join(", ") }
    }
}

impl FromStr for RouterKind {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|kind| kind.name() == name);
        found.ok_or_else(|| UnknownName::new(name, Self::ALL.map(Self::name)))
    }
}

impl InputPolicy {
    /// Every policy.
    pub const ALL: [Self; 3] = [Self::Drop, Self::Reject, Self::Accept];

    /// The name used in tables and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Drop => "drop",
            Self::Reject => "reject",
            Self::Accept => "accept",
        }
    }
}

impl fmt::Display for InputPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for InputPolicy {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|policy| policy.name() == name);
        found.ok_or_else(|| UnknownName::new(name, Self::ALL.map(Self::name)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for kind in RouterKind::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        for policy in InputPolicy::ALL {
            assert_eq!(policy.to_string().parse(), Ok(policy));
        }
        assert!("full-cone".parse::<RouterKind>().unwrap_err().to_string().contains("eim-eif"));
    }

    #[test]
    fn every_preset_can_be_built() {
        assert!(RouterKind::ALL.iter().flat_map(|kind| kind.routers()).all(|router| router.is_buildable()));
        assert!(
            !Router::nat(Mapping::AddressAndPortDependent, Filtering::EndpointIndependent).is_buildable()
        );
    }
}
