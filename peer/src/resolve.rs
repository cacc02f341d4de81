//! The addresses of a rendezvous server, in the order in which they are tried (RFC 8305, section 4).

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use rendezvous_wire::RendezvousAddress;

use crate::signalling::ServerError;

/// Head start of one address over the next (RFC 8305, section 5: Connection Attempt Delay).
pub(crate) const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// Most addresses of one server that are tried.
const MOST_ADDRESSES: usize = 8;

/// The server's addresses under all its names, likeliest first.
pub(crate) async fn resolve(server: &RendezvousAddress) -> Result<Vec<SocketAddr>, ServerError> {
    let lookups = server.hosts().map(|host| async move {
        let found = tokio::net::lookup_host((host, server.port)).await;
        found
            .map(Iterator::collect::<Vec<_>>)
            .map_err(|error| ServerError::Resolve { host: host.to_owned(), cause: error.to_string() })
    });
    let (mut found, mut failure) = (Vec::new(), None);
    for lookup in futures_util::future::join_all(lookups).await {
        match lookup {
            Ok(addresses) => found.extend(addresses),
            Err(error) => failure = Some(error),
        }
    }
    match failure {
        // One name that leads somewhere is enough.
        Some(error) if found.is_empty() => Err(error),
        _ => Ok(order(&found, has_route)),
    }
}

/// Whether this machine knows a way to an address. Sends nothing.
pub(crate) fn has_route(address: SocketAddr) -> bool {
    let any: SocketAddr =
        if address.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
    UdpSocket::bind(any).is_ok_and(|socket| socket.connect(address).is_ok())
}

/// Each once; those that there is a route to before the others (RFC 6724, section 6, rule 1), the families in turns, IPv6 first.
pub(crate) fn order(addresses: &[SocketAddr], has_route: impl Fn(SocketAddr) -> bool) -> Vec<SocketAddr> {
    let mut ordered: Vec<SocketAddr> = Vec::new();
    for reachable in [true, false] {
        let mut families = [Vec::new(), Vec::new()];
        for address in addresses.iter().filter(|address| has_route(**address) == reachable) {
            let family = &mut families[usize::from(address.is_ipv4())];
            if !family.contains(address) {
                family.push(*address);
            }
        }
        let longest = families.iter().map(Vec::len).max().unwrap_or_default();
        let turns = (0..longest).flat_map(|turn| families.iter().filter_map(move |family| family.get(turn)));
        ordered.extend(turns);
    }
    ordered.truncate(MOST_ADDRESSES);
    ordered
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(list: &[&str]) -> Vec<SocketAddr> {
        list.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn families_take_turns() {
        let mixed = parse(&[
            "192.0.2.1:1",
            "192.0.2.2:1",
            "192.0.2.3:1",
            "[2001:db8::1]:1",
            "[2001:db8::2]:1",
            "192.0.2.1:1",
        ]);
        let expected =
            parse(&["[2001:db8::1]:1", "192.0.2.1:1", "[2001:db8::2]:1", "192.0.2.2:1", "192.0.2.3:1"]);
        assert_eq!(order(&mixed, |_| true), expected);
        assert!(order(&[], |_| true).is_empty());
    }

    #[test]
    fn what_there_is_no_route_to_comes_last() {
        let mixed = parse(&["[2001:db8::1]:1", "192.0.2.1:1", "192.0.2.2:1"]);
        let expected = parse(&["192.0.2.1:1", "192.0.2.2:1", "[2001:db8::1]:1"]);
        assert_eq!(order(&mixed, |address| address.is_ipv4()), expected);
    }

    #[test]
    fn many_addresses_are_bounded() {
        let many: Vec<SocketAddr> = (1..100).map(|last| ([192, 0, 2, last], 1).into()).collect();
        assert_eq!(order(&many, |_| true).len(), MOST_ADDRESSES);
    }

    #[tokio::test]
    async fn all_hosts_of_an_address_are_resolved() {
        let id = rendezvous_wire::PeerId::from_bytes([7; 32]);
        let server = |hosts: &str| format!("rv://{id}@{hosts}:9").parse::<RendezvousAddress>().unwrap();
        let found = resolve(&server("127.0.0.1,127.0.0.2")).await.unwrap();
        assert_eq!(found, parse(&["127.0.0.1:9", "127.0.0.2:9"]));
        let found = resolve(&server("no.such.host.invalid,127.0.0.1")).await.unwrap();
        assert_eq!(found, parse(&["127.0.0.1:9"]), "one that fails is no harm");
        assert!(matches!(resolve(&server("no.such.host.invalid")).await, Err(ServerError::Resolve { .. })));
    }
}
