//! Which of the host's addresses to print when nobody has named one.

use std::cmp::Reverse;
use std::net::{IpAddr, Ipv4Addr};

use crate::ports::Listen;

/// The best address to reach this host at, as far as it can tell by itself; and where that is one of the Internet's and there is one of
/// the other family, too, both.
pub(crate) fn best(listen: &Listen) -> Vec<String> {
    best_of(own(listen)).iter().map(IpAddr::to_string).collect()
}

fn best_of(own: Vec<IpAddr>) -> Vec<IpAddr> {
    let first = choose(own.clone());
    let other = |ip: &IpAddr| is_global(first) && is_global(*ip) && ip.is_ipv4() != first.is_ipv4();
    std::iter::once(first).chain(own.into_iter().find(other)).collect()
}

/// Each alternate address with the one that peers otherwise use: one that they are told if it is of that family and the
/// host's own, else the best.
pub(crate) fn pairs(listen: &Listen, hosts: &[String], alternates: &[IpAddr]) -> Vec<[IpAddr; 2]> {
    let own = own(listen);
    let told: Vec<IpAddr> = hosts.iter().filter_map(|host| host.parse().ok()).collect();
    alternates.iter().filter_map(|alternate| Some([primary(&own, &told, *alternate)?, *alternate])).collect()
}

fn primary(own: &[IpAddr], told: &[IpAddr], alternate: IpAddr) -> Option<IpAddr> {
    let fits = |ip: &&IpAddr| **ip != alternate && ip.is_ipv4() == alternate.is_ipv4();
    let fitting: Vec<IpAddr> = own.iter().filter(fits).copied().collect();
    let told = told.iter().copied().find(|ip| fitting.contains(ip));
    told.or_else(|| (!fitting.is_empty()).then(|| choose(fitting)))
}

/// This host's addresses that are served.
fn own(listen: &Listen) -> Vec<IpAddr> {
    let served = |ip: &IpAddr| match listen {
        Listen::Everywhere => true,
        Listen::Only(ips) => {
            ips.iter().any(|own| own == ip || own.is_unspecified() && own.is_ipv4() == ip.is_ipv4())
        }
    };
    let interfaces = if_addrs::get_if_addrs().unwrap_or_default();
    interfaces.iter().map(if_addrs::Interface::ip).filter(served).collect()
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
    fn the_alternate_address_stands_in_for_the_one_that_peers_are_told() {
        let ips = |list: &[&str]| list.iter().map(|ip| ip.parse().unwrap()).collect::<Vec<IpAddr>>();
        let own = ips(&["127.0.0.1", "10.0.0.5", "203.0.113.10", "203.0.113.11", "5.9.1.2", "2a01:4f8::1"]);
        let primary = |told: &[&str], alternate: &str| {
            primary(&own, &ips(told), alternate.parse().unwrap()).map(|ip| ip.to_string())
        };
        assert_eq!(primary(&["203.0.113.10"], "203.0.113.11").as_deref(), Some("203.0.113.10"));
        assert_eq!(primary(&["2a01:4f8::1", "10.0.0.5"], "203.0.113.11").as_deref(), Some("10.0.0.5"));
        assert_eq!(primary(&[], "203.0.113.11").as_deref(), Some("5.9.1.2"));
        assert_eq!(primary(&["192.0.2.1"], "10.0.0.5").as_deref(), Some("5.9.1.2"));
        assert_eq!(primary(&[], "2a01:4f8::1"), None, "the only one of its family");
    }

    #[test]
    fn both_families_are_told_where_the_internet_has_both() {
        let told = |list: &[&str]| {
            let own = list.iter().map(|ip| ip.parse().unwrap()).collect();
            best_of(own).iter().map(IpAddr::to_string).collect::<Vec<_>>()
        };
        assert_eq!(
            told(&["::1", "2a01:4f8::1", "2a01:4f8::2", "10.0.0.5", "5.9.1.2"]),
            ["5.9.1.2", "2a01:4f8::1"]
        );
        assert_eq!(told(&["fd00::5", "fe80::1", "5.9.1.2"]), ["5.9.1.2"]);
        assert_eq!(told(&["2a01:4f8::1", "10.0.0.5"]), ["2a01:4f8::1"]);
        assert_eq!(told(&["fd00::5", "192.168.1.4"]), ["192.168.1.4"]);
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
