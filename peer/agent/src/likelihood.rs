//! Which addresses are worth the first checks.

use std::net::IpAddr;

use rendezvous_wire::{Candidate, CandidateKind};

use crate::checklist::is_site_local;

/// What both sides' candidates say about where the two are.
#[derive(Debug)]
pub(crate) struct Neighbourhood {
    /// Our own host addresses.
    hosts: Vec<IpAddr>,
    /// Our own mappings.
    mapped: Vec<IpAddr>,
    /// Both sides have a mapping at the same IP address: one site, behind one router.
    same_site: bool,
    /// Both sides have mappings, and none at the same IP address.
    apart: bool,
}

impl Neighbourhood {
    pub(crate) fn new<'a>(local: &[Candidate], remote: impl Iterator<Item = &'a Candidate>) -> Self {
        let mapping = |candidate: &&Candidate| candidate.kind == CandidateKind::ServerReflexive;
        let ip = |candidate: &Candidate| candidate.address.ip();
        let hosts = local.iter().filter(|candidate| candidate.kind == CandidateKind::Host).map(ip).collect();
        let mapped: Vec<_> = local.iter().filter(mapping).map(ip).collect();
        let theirs: Vec<_> = remote.filter(mapping).map(ip).collect();
        let same_site = theirs.iter().any(|ip| mapped.contains(ip));
        let apart = !same_site && !mapped.is_empty() && !theirs.is_empty();
        Self { hosts, mapped, same_site, apart }
    }

    fn shares_link(&self, ip: IpAddr) -> bool {
        self.hosts.iter().any(|own| match (own, ip) {
            (IpAddr::V4(own), IpAddr::V4(ip)) => own.octets()[..3] == ip.octets()[..3],
            (IpAddr::V6(own), IpAddr::V6(ip)) => own.segments()[..4] == ip.segments()[..4],
            _ => false,
        })
    }
}

/// The class of an address in the order of first checks; 0 goes first.
///
/// RFC 8445 goes by priority alone, and so sends to every private address of the other site before it tries the
/// mapping that works.
pub(crate) fn likelihood(kind: CandidateKind, ip: IpAddr, around: &Neighbourhood) -> u8 {
    let hairpin = around.mapped.contains(&ip) && !around.hosts.contains(&ip);
    match (is_site_local(ip), kind) {
        (_, CandidateKind::Predicted) => 4,
        (true, _) if around.same_site => u8::from(!around.shares_link(ip)),
        // Homes like the same numbers: from here this address leads nowhere but back. Not left out, since NATs with a pool of
        // addresses show two of one site at different ones.
        (true, _) if around.apart && around.hosts.contains(&ip) => 4,
        (true, _) if around.shares_link(ip) => 1,
        (true, _) => 3,
        (false, _) if hairpin => 2,
        (false, _) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use CandidateKind::{Host, Predicted, ServerReflexive};

    fn candidate(kind: CandidateKind, ip: &str) -> Candidate {
        Candidate::new(kind, (ip.parse::<IpAddr>().unwrap(), 9).into(), 1)
    }

    #[test]
    fn the_likeliest_addresses_go_first() {
        let local = [
            candidate(Host, "192.168.1.2"),
            candidate(Host, "2001:db8:1::2"),
            candidate(ServerReflexive, "198.51.100.1"),
        ];
        let elsewhere = [candidate(ServerReflexive, "203.0.113.1")];
        let same_site = [candidate(ServerReflexive, "198.51.100.1")];
        let unmapped = [candidate(Host, "192.168.1.2")];
        let table = [
            (ServerReflexive, "203.0.113.1", &elsewhere, 0),
            (Host, "2001:db8:2::2", &elsewhere, 0),
            (Host, "192.168.1.3", &elsewhere, 1),
            (Host, "192.168.1.2", &elsewhere, 4),
            (Host, "192.168.1.2", &same_site, 0),
            (Host, "192.168.1.2", &unmapped, 1),
            (Host, "172.17.0.1", &elsewhere, 3),
            (Host, "100.64.3.4", &elsewhere, 3),
            (Host, "fd00::7", &elsewhere, 3),
            (Predicted, "203.0.113.1", &elsewhere, 4),
            (Host, "192.168.1.3", &same_site, 0),
            (Host, "192.168.2.3", &same_site, 1),
            (ServerReflexive, "198.51.100.1", &same_site, 2),
        ];
        for (kind, ip, remote, class) in table {
            let around = Neighbourhood::new(&local, remote.iter());
            assert_eq!(likelihood(kind, ip.parse().unwrap(), &around), class, "{kind} {ip}");
        }
    }
}
