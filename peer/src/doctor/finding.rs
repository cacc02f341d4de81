//! What was found out about one address family, in the terms of RFC 4787. Pure.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use peer_agent::prediction::Sequence;
use rendezvous_wire::candidate::{self, PortAllocation};

use super::lifetime::BindingLifetime;

/// What one address family's NATs and firewalls do.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FamilyFinding {
    /// The address and port of the socket whose mapping was looked at.
    pub local: SocketAddr,
    /// What the server's ports and addresses saw of it, in the order in which they were asked. Empty: no answer at all.
    pub mapped: Vec<SocketAddr>,
    /// To the server and back.
    pub rtt: Option<Duration>,
    /// Which reflexive address a socket gets.
    pub mapping: Mapping,
    /// Who may send to it.
    pub filtering: Filtering,
    /// Whether two sockets behind the NAT reach each other at their mapped addresses (RFC 4787, section 6).
    pub hairpinning: Option<bool>,
    /// How long an unused binding is kept.
    pub lifetime: BindingLifetime,
}

/// Mapping behaviour (RFC 4787, section 4.1), as far as a server with one or two addresses can tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Mapping {
    /// Fewer than two ports of the server have answered.
    Unknown,
    /// No translation.
    None,
    /// The same for every destination.
    EndpointIndependent(Allocation),
    /// The same for every port of a destination; the server has but one address to compare.
    NotByPort(Allocation),
    /// One for each destination address.
    AddressDependent(Allocation),
    /// One for each destination address and port.
    AddressAndPortDependent(Allocation),
}

/// Which port a new mapping gets (RFC 4787, section 4.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Allocation {
    /// The inside port, where it is free.
    Preserving,
    /// The one before and this much.
    Sequential(i32),
    /// Any.
    Random,
}

/// Filtering behaviour (RFC 4787, section 5), as far as a server with one or two addresses can tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Filtering {
    /// The server did not answer.
    Unknown,
    /// Anybody may send.
    EndpointIndependent,
    /// Endpoint-independent or address-dependent; the server has but one address to try from.
    NotByPort,
    /// Addresses that were sent to, from any port.
    AddressDependent,
    /// Exactly the addresses and ports that were sent to.
    AddressAndPortDependent,
}

impl FamilyFinding {
    /// Whether the server answered at all.
    pub fn works(&self) -> bool {
        !self.mapped.is_empty()
    }

    /// Whether addresses are translated, as far as is known.
    pub fn is_translated(&self) -> bool {
        !matches!(self.mapping, Mapping::Unknown | Mapping::None)
    }

    /// Whether several reflexive addresses are in use at once, so that one socket may be seen at different ones (RFC 4787, REQ-2).
    pub fn is_pooled(&self) -> bool {
        self.mapped.windows(2).any(|pair| pair[0].ip() != pair[1].ip())
    }
}

impl Mapping {
    /// A short name for programs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::None => "none",
            Self::EndpointIndependent(_) => "endpoint-independent",
            Self::NotByPort(_) => "endpoint-independent-or-address-dependent",
            Self::AddressDependent(_) => "address-dependent",
            Self::AddressAndPortDependent(_) => "address-and-port-dependent",
        }
    }

    /// How ports are given out, where there is a mapping.
    pub const fn allocation(self) -> Option<Allocation> {
        match self {
            Self::Unknown | Self::None => None,
            Self::EndpointIndependent(allocation)
            | Self::NotByPort(allocation)
            | Self::AddressDependent(allocation)
            | Self::AddressAndPortDependent(allocation) => Some(allocation),
        }
    }

    /// Whether every destination port, or address, sees another mapping.
    pub const fn is_dependent(self) -> bool {
        matches!(self, Self::AddressDependent(_) | Self::AddressAndPortDependent(_))
    }
}

impl Allocation {
    /// A short name for programs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Preserving => "preserving",
            Self::Sequential(_) => "sequential",
            Self::Random => "random",
        }
    }
}

impl fmt::Display for Allocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Preserving => f.write_str("own port where it is free"),
            Self::Sequential(step) => write!(f, "ports in steps of {step}"),
            Self::Random => f.write_str("random ports"),
        }
    }
}

impl fmt::Display for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Unknown => "unknown",
            Self::None => "none",
            Self::EndpointIndependent(_) => "endpoint-independent",
            Self::NotByPort(_) => "endpoint-independent or address-dependent",
            Self::AddressDependent(_) => "address-dependent",
            Self::AddressAndPortDependent(_) => "address-and-port-dependent",
        };
        f.write_str(name)?;
        self.allocation().map_or(Ok(()), |allocation| write!(f, ", {allocation}"))
    }
}

impl Filtering {
    /// A short name for programs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::EndpointIndependent => "endpoint-independent",
            Self::NotByPort => "endpoint-independent-or-address-dependent",
            Self::AddressDependent => "address-dependent",
            Self::AddressAndPortDependent => "address-and-port-dependent",
        }
    }
}

impl fmt::Display for Filtering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotByPort => "endpoint-independent or address-dependent",
            other => other.name(),
        })
    }
}

/// The mapping behaviour behind what servers saw of one socket, bound to `local`: pairs of the server's address and the mapped one, in the
/// order in which the flows began. `others` are sockets of the same machine with what the first server address saw of them, in the order of
/// their flows.
pub(super) fn mapping(
    local: SocketAddr,
    seen: &[(SocketAddr, SocketAddr)],
    others: &[(SocketAddr, SocketAddr)],
) -> Mapping {
    let Some(((_, first), rest)) = seen.split_first() else { return Mapping::Unknown };
    if seen.iter().all(|(_, mapped)| *mapped == local) {
        return Mapping::None;
    }
    if rest.is_empty() {
        return Mapping::Unknown;
    }
    let alike = |one: &(SocketAddr, SocketAddr), other: &(SocketAddr, SocketAddr)| one.1 == other.1;
    if seen.iter().all(|(_, mapped)| mapped == first) {
        let own: Vec<_> = std::iter::once((local, *first)).chain(others.iter().copied()).collect();
        let allocation = allocation(&own);
        let ips: Vec<IpAddr> = seen.iter().map(|(at, _)| at.ip()).collect();
        return match ips.iter().any(|ip| *ip != ips[0]) {
            true => Mapping::EndpointIndependent(allocation),
            false => Mapping::NotByPort(allocation),
        };
    }
    let by_address = seen
        .iter()
        .all(|one| seen.iter().filter(|other| other.0.ip() == one.0.ip()).all(|other| alike(one, other)));
    let flows: Vec<_> = seen.iter().map(|(_, mapped)| (local, *mapped)).collect();
    let allocation = allocation(&flows);
    if by_address {
        Mapping::AddressDependent(allocation)
    } else {
        Mapping::AddressAndPortDependent(allocation)
    }
}

/// How ports are given out, from flows' own and mapped addresses in the order in which they began.
fn allocation(flows: &[(SocketAddr, SocketAddr)]) -> Allocation {
    let ports: Vec<u16> = flows.iter().map(|(_, mapped)| mapped.port()).collect();
    let kept = flows.iter().any(|(own, mapped)| own.port() == mapped.port());
    if kept {
        return Allocation::Preserving;
    }
    let mut changes = ports.clone();
    changes.dedup();
    let next = Sequence::of(&changes).and_then(|sequence| sequence.coming().next());
    match (next, changes.last()) {
        (Some(next), Some(last)) => Allocation::Sequential(i32::from(next) - i32::from(*last)),
        _ => Allocation::Random,
    }
}

impl From<Mapping> for candidate::Mapping {
    /// What a peer would say of itself.
    fn from(mapping: Mapping) -> Self {
        match mapping {
            Mapping::Unknown => Self::Unknown,
            Mapping::None | Mapping::EndpointIndependent(_) | Mapping::NotByPort(_) => {
                Self::EndpointIndependent
            }
            Mapping::AddressDependent(allocation) | Mapping::AddressAndPortDependent(allocation) => {
                Self::AddressAndPortDependent(match allocation {
                    Allocation::Preserving => PortAllocation::Preserving,
                    Allocation::Sequential(_) => PortAllocation::Sequential,
                    Allocation::Random => PortAllocation::Random,
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    const SERVERS: [&str; 4] =
        ["203.0.113.10:3478", "203.0.113.10:3479", "203.0.113.11:3478", "203.0.113.11:3479"];

    fn found(mapped: &[&str], others: &[(&str, &str)]) -> Mapping {
        let seen: Vec<_> =
            SERVERS.iter().zip(mapped).map(|(server, mapped)| (at(server), at(mapped))).collect();
        let others: Vec<_> = others.iter().map(|(own, mapped)| (at(own), at(mapped))).collect();
        mapping(at("192.168.1.10:4000"), &seen, &others)
    }

    #[test]
    fn mappings_are_told_apart() {
        use Allocation::{Preserving, Random, Sequential};
        let kept = "198.18.1.2:4000";
        let fixed = "198.18.1.2:7000";
        let moved = [("192.168.1.10:4001", "198.18.1.2:7002"), ("192.168.1.10:4002", "198.18.1.2:7004")];
        let anywhere = [("192.168.1.10:4001", "198.18.1.2:61002"), ("192.168.1.10:4002", "198.18.1.2:2004")];
        for (mapped, others, expected) in [
            (&[][..], &[][..], Mapping::Unknown),
            (&[kept], &[], Mapping::Unknown),
            (&["192.168.1.10:4000"; 4], &[], Mapping::None),
            (&[kept; 4], &[], Mapping::EndpointIndependent(Preserving)),
            (&[kept; 2], &[], Mapping::NotByPort(Preserving)),
            (&[fixed; 4], &moved, Mapping::EndpointIndependent(Sequential(2))),
            (&[fixed; 4], &anywhere, Mapping::EndpointIndependent(Random)),
            (
                &["198.18.1.2:7000", "198.18.1.2:7000", "198.18.1.2:7001", "198.18.1.2:7001"],
                &[],
                Mapping::AddressDependent(Sequential(1)),
            ),
            (
                &["198.18.1.2:7000", "198.18.1.2:7001", "198.18.1.2:7002", "198.18.1.2:7003"],
                &[],
                Mapping::AddressAndPortDependent(Sequential(1)),
            ),
            (
                &["198.18.1.2:4000", "198.18.1.2:7001", "198.18.1.2:62002", "198.18.1.2:2003"],
                &[],
                Mapping::AddressAndPortDependent(Preserving),
            ),
            (&["198.18.1.2:60000", "198.18.1.2:7001"], &[], Mapping::AddressAndPortDependent(Random)),
        ] {
            assert_eq!(found(mapped, others), expected, "{mapped:?}");
        }
    }
}
