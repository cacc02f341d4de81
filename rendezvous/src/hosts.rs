//! Which of the host's addresses to print when nobody has named one.

use std::cmp::Reverse;
use std::net::{IpAddr, Ipv4Addr};

use crate::ports::Listen;

/// The best address to reach this host at, as far as it can tell by itself.
pub(crate) fn best(listen: &Listen) -> String {
    let served = |ip: &IpAddr| match listen {
        Listen::Everywhere => true,
        Listen::Only(ips) => {
            ips.iter().any(|own| own == ip || own.is_unspecified() && own.is_ipv4() == ip.is_ipv4())
        }
    };
    let interfaces = if_addrs::get_if_addrs().unwrap_or_default();
    let own = interfaces.iter().map(if_addrs::Interface::ip).filter(served).collect();
    choose(own).to_string()
}

/// Whether packets from the whole Internet can come to this address.
pub fn is_global(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => {
            let [a, b, ..] = ip.octets();
            let shared = a == 100 && (64..128).contains(&b);
            let benchmark = a == 198 && (18..20).contains(&b);
            !(ip.is_private()
                || ip.is_loopback()
                || ip.is_link_local()
                || ip.is_unspecified()
                || ip.is_documentation()
                || ip.is_multicast()
                || shared
                || benchmark
                || a == 0
                || a >= 240)
        }
        IpAddr::V6(ip) => ip.segments()[0] & 0xe000 == 0x2000 && ip.segments()[..2] != [0x2001, 0x0db8],
    }
}

/// Global before private before loopback, and IPv4 before IPv6 since more networks have it.
fn choose(own: Vec<IpAddr>) -> IpAddr {
    let worth = |ip: &IpAddr| (is_global(*ip), !is_local(*ip), ip.is_ipv4());
    own.into_iter().min_by_key(|ip| Reverse(worth(ip))).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
}

fn is_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_loopback() || ip.is_link_local() || ip.is_unspecified(),
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_unicast_link_local() || ip.is_unspecified(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(list: &[&str]) -> String {
        choose(list.iter().map(|ip| ip.parse().unwrap()).collect()).to_string()
    }

    #[test]
    fn a_global_address_is_better_than_any_other() {
        assert_eq!(chosen(&["127.0.0.1", "10.0.0.5", "2a01:4f8::1", "fe80::1"]), "2a01:4f8::1");
        assert_eq!(chosen(&["2a01:4f8::1", "5.9.1.2", "100.64.0.9"]), "5.9.1.2");
        assert_eq!(chosen(&["127.0.0.1", "::1", "fd00::5", "192.168.1.4"]), "192.168.1.4");
        assert_eq!(chosen(&["127.0.0.1"]), "127.0.0.1");
        assert_eq!(chosen(&[]), "127.0.0.1");
    }
}
