//! Host candidates: the addresses of this machine at which the path socket may be reached (RFC 8445, section 5.1.1.1).

use std::net::{IpAddr, SocketAddr};

use rendezvous_wire::candidate::{Candidate, CandidateKind, is_probeable};

/// Most host candidates that are offered; the rest of [`rendezvous_wire::candidate::MAX_CANDIDATES`] is for what is learnt.
const MAX_HOST: usize = 16;

/// Interface name prefixes of container bridges and VPN devices. Their addresses are hardly ever reachable from
/// elsewhere, so they are offered after all others.
const UNLIKELY_DEVICES: [&str; 10] =
    ["docker", "br-", "veth", "virbr", "lxc", "cni", "wg", "tun", "tailscale", "zt"];

/// Whether a device is a container bridge's or a VPN's.
pub(crate) fn is_unlikely(device: &str) -> bool {
    UNLIKELY_DEVICES.iter().any(|prefix| device.starts_with(prefix))
}

/// The machine's interface addresses as host candidates for sockets bound to the given addresses, likeliest first.
pub(crate) fn host_candidates(sockets: &[SocketAddr]) -> Vec<Candidate> {
    let interfaces = if_addrs::get_if_addrs().unwrap_or_else(|error| {
        tracing::warn!(%error, "the interface addresses cannot be listed: no host candidates");
        Vec::new()
    });
    let addresses = interfaces.into_iter().map(|interface| (interface.name.clone(), interface.ip()));
    candidates(addresses, sockets)
}

fn candidates(addresses: impl Iterator<Item = (String, IpAddr)>, sockets: &[SocketAddr]) -> Vec<Candidate> {
    let mut offered: Vec<(bool, bool, SocketAddr)> = Vec::new();
    for (name, ip) in addresses {
        let unlikely = is_unlikely(&name);
        for socket in sockets {
            let bound_here = socket.ip().is_unspecified() || socket.ip() == ip;
            let address = SocketAddr::new(ip, socket.port());
            let loopback = ip.is_loopback() && socket.ip() == ip;
            if socket.is_ipv4() == ip.is_ipv4() && bound_here && (is_probeable(address) || loopback) {
                // IPv6 before IPv4 (RFC 8421, section 4).
                offered.push((unlikely, ip.is_ipv4(), address));
            }
        }
    }
    offered.sort_unstable();
    offered.dedup();
    let ranked = offered.into_iter().take(MAX_HOST).enumerate();
    ranked
        .map(|(rank, (_, _, address))| Candidate::new(CandidateKind::Host, address, u16::MAX - rank as u16))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn likely_devices_come_first_and_useless_addresses_not_at_all() {
        let addresses = [
            ("docker0", "172.17.0.1"),
            ("eth0", "192.168.1.2"),
            ("lo", "127.0.0.1"),
            ("eth0", "fe80::1"),
            ("eth0", "2001:db8::2"),
        ];
        let addresses = addresses.map(|(name, ip)| (name.to_owned(), ip.parse().unwrap()));
        let sockets = ["0.0.0.0:7".parse().unwrap(), "[::]:8".parse().unwrap()];
        let found = candidates(addresses.into_iter(), &sockets);
        let found: Vec<_> = found.iter().map(|candidate| candidate.address.to_string()).collect();
        assert_eq!(found, ["[2001:db8::2]:8", "192.168.1.2:7", "172.17.0.1:7"]);
    }

    #[test]
    fn a_socket_bound_to_one_address_offers_that_one() {
        let addresses = [("eth0", "192.168.1.2"), ("eth1", "192.168.2.2")];
        let addresses = addresses.map(|(name, ip)| (name.to_owned(), ip.parse().unwrap()));
        let found = candidates(addresses.into_iter(), &["192.168.2.2:7".parse().unwrap()]);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].address.to_string(), "192.168.2.2:7");
    }
}
