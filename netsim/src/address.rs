//! Who has which address. Pure arithmetic on reserved test ranges, but for one: `miniupnpd` makes no mappings on a router whose address is of any
//! reserved range. Nothing of it leaves the lab.
//!
//! | range | where |
//! |---|---|
//! | 198.18.*i*.0/24, 2001:db8:*i*::/64 | access line of site *i*: `.1` the provider's edge, `.2` the router |
//! | 198.19.*i*.0/24, 2001:db8:*i*:1::/64 | hosts of site *i* that are routed and not translated |
//! | 198.19.*128+i*.0/31, 2001:db8:ffff:*i*::/64 | between the core and the edge of site *i* |
//! | 11.18.*i*.0/24 | the access line of site *i* instead, where its router makes mappings |
//! | 203.0.113.0/24, 2001:db8:0:1::/64 | servers |
//! | 100.64.0.0/24, 2001:db8:*i*:2::/64 | between a carrier NAT and the homes behind it, the first at every carrier alike |

use std::net::{Ipv4Addr, Ipv6Addr};

/// Most sites, and most servers, that the ranges have room for.
pub(crate) const MOST: u8 = 120;
/// Most hosts of one site.
pub(crate) const MOST_HOSTS: u8 = 200;
const FIRST_HOST: u8 = 10;

/// The core's address among the servers.
pub(crate) const SERVERS_GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
pub(crate) const SERVERS_GATEWAY_V6: Ipv6Addr = v6(0, 1, 1);
pub(crate) const CARRIER_GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 1);

/// Customer number `customer` of a carrier, counted from zero, on the side of the carrier.
pub(crate) fn carrier_customer_v4(customer: u8) -> Ipv4Addr {
    with_last_octet(CARRIER_GATEWAY_V4, 2 + customer)
}

/// The two addresses per family of server `index`, counted from zero.
pub(crate) fn server(index: u8) -> ([Ipv4Addr; 2], [Ipv6Addr; 2]) {
    let first = FIRST_HOST + 2 * index;
    let v4 = |last| Ipv4Addr::new(203, 0, 113, last);
    ([v4(first), v4(first + 1)], [v6(0, 1, first.into()), v6(0, 1, u16::from(first) + 1)])
}

/// Addresses of one site.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SiteAddresses {
    index: u8,
    /// The first octet of the access line.
    access: u8,
}

impl SiteAddresses {
    /// `index` is counted from one.
    pub(crate) fn new(index: u8) -> Self {
        assert!((1..=MOST).contains(&index), "site index {index}");
        Self { index, access: 198 }
    }

    /// The same with an access line that is not of a reserved range.
    pub(crate) fn unreserved(self) -> Self {
        Self { access: 11, ..self }
    }

    /// As it was given.
    pub(crate) fn index(self) -> u8 {
        self.index
    }

    pub(crate) fn edge_v4(self) -> Ipv4Addr {
        Ipv4Addr::new(self.access, 18, self.index, 1)
    }

    pub(crate) fn wan_v4(self) -> Ipv4Addr {
        Ipv4Addr::new(self.access, 18, self.index, 2)
    }

    pub(crate) fn access_v4(self) -> Ipv4Addr {
        Ipv4Addr::new(self.access, 18, self.index, 0)
    }

    pub(crate) fn routed_v4(self) -> Ipv4Addr {
        Ipv4Addr::new(198, 19, self.index, 0)
    }

    pub(crate) fn transit_core_v4(self) -> Ipv4Addr {
        Ipv4Addr::new(198, 19, 128 + self.index, 0)
    }

    pub(crate) fn transit_edge_v4(self) -> Ipv4Addr {
        Ipv4Addr::new(198, 19, 128 + self.index, 1)
    }

    pub(crate) fn edge_v6(self) -> Ipv6Addr {
        v6(self.index.into(), 0, 1)
    }

    pub(crate) fn wan_v6(self) -> Ipv6Addr {
        v6(self.index.into(), 0, 2)
    }

    /// The whole site, a /48.
    pub(crate) fn site_v6(self) -> Ipv6Addr {
        v6(self.index.into(), 0, 0)
    }

    pub(crate) fn lan_gateway_v6(self) -> Ipv6Addr {
        v6(self.index.into(), 1, 1)
    }

    pub(crate) fn lan_v6(self) -> Ipv6Addr {
        v6(self.index.into(), 1, 0)
    }

    pub(crate) fn host_v6(self, host: u8) -> Ipv6Addr {
        v6(self.index.into(), 1, u16::from(FIRST_HOST + host))
    }

    pub(crate) fn carrier_gateway_v6(self) -> Ipv6Addr {
        v6(self.index.into(), 2, 1)
    }

    pub(crate) fn carrier_customer_v6(self) -> Ipv6Addr {
        v6(self.index.into(), 2, 2)
    }

    pub(crate) fn transit_core_v6(self) -> Ipv6Addr {
        v6(0xffff, self.index.into(), 1)
    }

    pub(crate) fn transit_edge_v6(self) -> Ipv6Addr {
        v6(0xffff, self.index.into(), 2)
    }
}

/// The router's address in the /24 that `lan` is in.
pub(crate) fn lan_gateway_v4(lan: Ipv4Addr) -> Ipv4Addr {
    with_last_octet(lan, 1)
}

/// Host number `host`, counted from zero, in the /24 that `lan` is in.
pub(crate) fn lan_host_v4(lan: Ipv4Addr, host: u8) -> Ipv4Addr {
    with_last_octet(lan, FIRST_HOST + host)
}

fn with_last_octet(address: Ipv4Addr, last: u8) -> Ipv4Addr {
    let [a, b, c, _] = address.octets();
    Ipv4Addr::new(a, b, c, last)
}

const fn v6(site: u16, subnet: u16, interface: u16) -> Ipv6Addr {
    Ipv6Addr::new(0x2001, 0xdb8, site, subnet, 0, 0, 0, interface)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_two_sites_or_servers_share_an_address() {
        let mut seen = HashSet::new();
        for index in 1..=MOST {
            let site = SiteAddresses::new(index);
            for address in [
                site.edge_v4(),
                site.wan_v4(),
                site.transit_core_v4(),
                site.transit_edge_v4(),
                lan_host_v4(site.routed_v4(), 0),
                lan_host_v4(site.routed_v4(), MOST_HOSTS - 1),
            ] {
                assert!(seen.insert(address), "{address} of site {index}");
            }
            for address in server(index - 1).0 {
                assert!(seen.insert(address), "{address} of server {}", index - 1);
            }
        }
    }

    #[test]
    fn nothing_on_the_internet_is_private() {
        for index in 1..=MOST {
            let site = SiteAddresses::new(index);
            assert!(!site.wan_v4().is_private() && !lan_host_v4(site.routed_v4(), 0).is_private());
            assert!(!site.host_v6(0).is_unique_local() && !site.host_v6(0).is_unicast_link_local());
        }
    }
}
