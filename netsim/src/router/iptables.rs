//! The part of a router that iptables can say. Pure text.

use super::{Egress, InputPolicy, Mapping, PortAllocation, Router};

/// The interface toward the internet, and the one on which hairpinned packets come back.
const WAN: &str = "wan+";

/// Tables for `iptables-restore`, if the router needs any.
pub(super) fn ipv4(router: &Router) -> Option<String> {
    let mut rules = filter(router, "")?;
    let target = match router.mapping {
        None => None,
        // nftables translates.
        Some(_) if router.needs_binding_maps() => None,
        // Keeps the source port while the resulting flow is unique.
        Some(Mapping::EndpointIndependent) => Some("MASQUERADE"),
        Some(Mapping::AddressDependent) => unreachable!("refused when the site was configured"),
        Some(Mapping::AddressAndPortDependent) => match router.allocation {
            PortAllocation::Random => Some("MASQUERADE --random-fully"),
            PortAllocation::Sequential { .. } | PortAllocation::Preserving => None,
        },
    };
    if let Some(target) = target {
        rules += &format!("*nat\n-A POSTROUTING -o {WAN} -j {target}\nCOMMIT\n");
    }
    Some(rules)
}

/// Tables for `ip6tables-restore`, if the router needs any.
pub(super) fn ipv6(router: &Router) -> Option<String> {
    // Without these two the router is not found by its neighbours.
    filter(
        router,
        "-A INPUT -p icmpv6 --icmpv6-type neighbour-solicitation -j ACCEPT\n\
         -A INPUT -p icmpv6 --icmpv6-type neighbour-advertisement -j ACCEPT\n",
    )
}

fn filter(router: &Router, first: &str) -> Option<String> {
    router.filtering?;
    let mut rules = String::from("*filter\n");
    rules += first;
    let policy = match router.input {
        InputPolicy::Drop => "DROP",
        InputPolicy::Reject => "REJECT",
        InputPolicy::Accept => "ACCEPT",
    };
    rules += &format!(
        "-A INPUT -i {WAN} -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT\n-A INPUT -i {WAN} -j {policy}\n"
    );
    rules += "-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT\n";
    if router.mapping.is_some() {
        // What the binding maps let in, or a mapping that a host has asked for.
        rules += &format!("-A FORWARD -i {WAN} -m conntrack --ctstate DNAT -j ACCEPT\n");
    }
    rules += match router.egress {
        Egress::All => "-A FORWARD -i lan -j ACCEPT\n",
        Egress::Web => "-A FORWARD -i lan -p tcp -m multiport --dports 80,443 -j ACCEPT\n",
    };
    rules += "-A FORWARD -j DROP\nCOMMIT\n";
    Some(rules)
}

#[cfg(test)]
mod tests {
    use super::super::Filtering;
    use super::*;

    #[test]
    fn a_transparent_router_has_no_rules() {
        assert_eq!((ipv4(&Router::transparent()), ipv6(&Router::transparent())), (None, None));
    }

    #[test]
    fn only_the_kernels_own_nat_is_left_to_iptables() {
        use {Filtering as F, Mapping as M};
        let masquerade = |mapping, filtering| ipv4(&Router::nat(mapping, filtering)).unwrap();
        assert!(masquerade(M::EndpointIndependent, F::AddressAndPortDependent).contains("MASQUERADE\n"));
        assert!(
            masquerade(M::AddressAndPortDependent, F::AddressAndPortDependent).contains("--random-fully")
        );
        let sequential = Router::nat(M::AddressAndPortDependent, F::AddressAndPortDependent)
            .with_allocation(PortAllocation::Sequential { step: 1 });
        assert!(!ipv4(&sequential).unwrap().contains("MASQUERADE"));
        assert!(!masquerade(M::EndpointIndependent, F::AddressDependent).contains("MASQUERADE"));
        assert!(
            !ipv6(&Router::nat(M::EndpointIndependent, F::AddressAndPortDependent)).unwrap().contains("*nat")
        );
    }
}
