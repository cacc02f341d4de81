//! Candidates: transport addresses at which a peer may be reached (RFC 8445, section 5.1).

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

/// Most candidates that one peer may offer. RFC 8445 bounds the checklist at 100 pairs (6.1.2.5); with one
/// base per address family on our side this keeps us far below, and bounds what a peer can have others probe.
pub const MAX_CANDIDATES: usize = 24;

/// What kind of transport address a candidate is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CandidateKind {
    /// An address of one of the host's own interfaces.
    Host,
    /// Learnt from the source of a check (RFC 8445, 7.2.5.3.1).
    PeerReflexive,
    /// The mapping that a server saw.
    ServerReflexive,
    /// A mapping asked of the router (PCP, NAT-PMP, UPnP).
    PortMapped,
    /// A mapping that a NAT is expected to make next.
    Predicted,
}

impl CandidateKind {
    /// The type preference (RFC 8445, 5.1.2.2: 126 for host, 110 for peer-reflexive, 100 for
    /// server-reflexive). A port-mapped address ranks just under a server-reflexive one, a guess last.
    pub const fn type_preference(self) -> u32 {
        match self {
            Self::Host => 126,
            Self::PeerReflexive => 110,
            Self::ServerReflexive => 100,
            Self::PortMapped => 90,
            Self::Predicted => 10,
        }
    }

    /// The priority of a candidate of this kind (RFC 8445, 5.1.2.1), component 1.
    pub const fn priority(self, local_preference: u16) -> u32 {
        (self.type_preference() << 24) | ((local_preference as u32) << 8) | 255
    }

    /// The field's name for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::PeerReflexive => "peer-reflexive",
            Self::ServerReflexive => "server-reflexive",
            Self::PortMapped => "port-mapped",
            Self::Predicted => "predicted",
        }
    }
}

impl fmt::Display for CandidateKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A transport address that a peer offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Candidate {
    /// How it was learnt.
    pub kind: CandidateKind,
    /// Where to send.
    pub address: SocketAddr,
    /// RFC 8445, 5.1.2.1.
    pub priority: u32,
}

impl Candidate {
    /// A candidate with the priority that its kind and `local_preference` give.
    pub const fn new(kind: CandidateKind, address: SocketAddr, local_preference: u16) -> Self {
        Self { kind, address, priority: kind.priority(local_preference) }
    }
}

/// Whether a check may be sent to this address at all.
///
/// Candidates are chosen by the other side: loopback, multicast, unspecified, broadcast and port 0 are
/// never worth a packet and can only be an attack or a mistake (RFC 8445, 19.5.1; port 0 also makes the
/// kernel refuse the send). IPv4-mapped IPv6 must be made canonical before it gets here. Link-local IPv6
/// is refused as well, since it means nothing without a zone.
pub fn is_probeable(address: SocketAddr) -> bool {
    if address.port() == 0 {
        return false;
    }
    match address.ip() {
        IpAddr::V4(ip) => {
            !(ip.is_unspecified()
                || ip.octets()[0] == 0
                || ip.is_loopback()
                || ip.is_multicast()
                || ip.is_broadcast()
                || ip.is_link_local()
                || ip.octets()[0] >= 240)
        }
        IpAddr::V6(ip) => {
            !(ip.is_unspecified()
                || ip.is_loopback()
                || ip.is_multicast()
                || ip.is_unicast_link_local()
                || ip.to_ipv4_mapped().is_some())
        }
    }
}

/// A NAT's mapping behaviour (RFC 4787, section 4.1), as far as it is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mapping {
    /// Not yet measured.
    #[default]
    Unknown,
    /// The same mapping whatever the destination (EIM), or no NAT at all.
    EndpointIndependent,
    /// A mapping per destination address and port (APDM).
    AddressAndPortDependent(PortAllocation),
}

/// Which port a NAT gives a new mapping, as far as it can be foretold (RFC 4787, section 4.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PortAllocation {
    /// Any; nobody can foretell it.
    #[default]
    Random,
    /// A small step from the one before.
    Sequential,
    /// The inside port while no other mapping has it, else any.
    Preserving,
}

impl Mapping {
    /// A short name for programs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::EndpointIndependent => "endpoint-independent",
            Self::AddressAndPortDependent(PortAllocation::Random) => "address-and-port-dependent",
            Self::AddressAndPortDependent(PortAllocation::Sequential) => {
                "address-and-port-dependent-sequential"
            }
            Self::AddressAndPortDependent(PortAllocation::Preserving) => {
                "address-and-port-dependent-preserving"
            }
        }
    }

    /// Whether every destination sees another port.
    pub const fn is_port_dependent(self) -> bool {
        matches!(self, Self::AddressAndPortDependent(_))
    }

    /// Whether the port that a new destination will see can be known beforehand; assumed where nothing is known.
    pub const fn is_predictable(self) -> bool {
        !matches!(self, Self::AddressAndPortDependent(PortAllocation::Random))
    }
}

impl fmt::Display for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unknown => "unknown mapping",
            Self::EndpointIndependent => "endpoint-independent mapping",
            Self::AddressAndPortDependent(PortAllocation::Random) => {
                "address-and-port-dependent mapping, random ports"
            }
            Self::AddressAndPortDependent(PortAllocation::Sequential) => {
                "address-and-port-dependent mapping, sequential ports"
            }
            Self::AddressAndPortDependent(PortAllocation::Preserving) => {
                "address-and-port-dependent mapping, own port where it is free"
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn priorities_follow_the_formula() {
        assert_eq!(CandidateKind::Host.priority(65535), (126 << 24) + (65535 << 8) + 255);
        assert!(CandidateKind::Host.priority(0) > CandidateKind::PeerReflexive.priority(65535));
    }

    #[test]
    fn addresses_that_only_an_attacker_names_are_not_probed() {
        for bad in [
            "0.0.0.0:1",
            "0.1.2.3:1",
            "127.0.0.1:1",
            "224.0.0.1:1",
            "255.255.255.255:1",
            "169.254.169.254:80",
            "192.0.2.1:0",
            "250.0.0.1:1",
            "[::]:1",
            "[::1]:1",
            "[ff02::1]:1",
            "[fe80::1]:1",
            "[::ffff:127.0.0.1]:1",
        ] {
            assert!(!is_probeable(bad.parse().unwrap()), "{bad}");
        }
        for good in [
            "192.168.1.2:1",
            "10.0.0.1:9",
            "198.18.0.1:65535",
            "100.64.0.1:3",
            "[2001:db8::1]:1",
            "[fd00::1]:7",
        ] {
            assert!(is_probeable(good.parse().unwrap()), "{good}");
        }
    }
}
