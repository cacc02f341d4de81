//! What nftables can say and iptables cannot. Pure text.
//!
//! # Endpoint-independent mapping with weaker filtering than the kernel's
//!
//! The kernel knows flows, not bindings: it filters by address and port, and two inside hosts with the same
//! source port may share a reflexive port as long as their destinations differ. So the bindings are kept beside
//! it. Four dynamic sets, all with a timeout that outbound packets renew:
//!
//! - `outside`: inside endpoint -> reflexive endpoint. Consulted first when a flow leaves, so that every flow of
//!   an endpoint gets the same port.
//! - `inside`: reflexive port -> inside endpoint. Consulted when a flow comes in; tells which ports are taken.
//! - `bindings`: the pairs of both, to tell an owner's packet from another's (a map lookup cannot be compared).
//! - `contacts`: reflexive port and remote address. With address-dependent filtering, who may come in.
//!
//! Which port a new endpoint gets is left to the kernel: its own where it is free, else a random one. The
//! `learn` chain sits behind translation, sees what was chosen, and records it. When the random choice hits a
//! port of another endpoint, the packet is dropped before its flow is confirmed; the next one draws again.

use std::net::Ipv4Addr;
use std::time::Duration;

use super::{Filtering, InputPolicy, Mapping, PortAllocation, Router};

/// RFC 4787, REQ-5: not shorter than two minutes.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(120);

/// The transaction that builds the table.
pub(super) fn bindings(router: &Router, wan: Ipv4Addr) -> String {
    let lifetime = router.binding_lifetime.unwrap_or(DEFAULT_LIFETIME).as_secs().max(1);
    let dynamic = format!("flags dynamic,timeout; timeout {lifetime}s; size 65536;");
    let admitted = match router.filtering {
        Some(Filtering::AddressDependent) => "udp dport . ip saddr @contacts",
        _ => "meta l4proto udp",
    };
    // A packet for a bound port that filtering keeps out must never reach the router's own stack: accepted
    // there, its flow would take the binding's port for that remote endpoint.
    let kept_out = match router.input {
        InputPolicy::Drop => "drop",
        InputPolicy::Reject | InputPolicy::Accept => "reject",
    };
    format!(
        r#"table ip bindings {{
    map outside {{ type ipv4_addr . inet_service : ipv4_addr . inet_service; {dynamic} }}
    map inside {{ type inet_service : ipv4_addr . inet_service; {dynamic} }}
    set bindings {{ type inet_service . ipv4_addr . inet_service; {dynamic} }}
    set contacts {{ type inet_service . ipv4_addr; {dynamic} }}

    chain inbound {{
        type nat hook prerouting priority dstnat;
        iifname "wan*" ip daddr {wan} {admitted} dnat ip to udp dport map @inside
    }}
    chain kept_out {{
        type filter hook input priority filter - 10;
        iifname "wan*" ct state new udp dport @inside {kept_out}
    }}
    chain outbound {{
        type nat hook postrouting priority srcnat;
        oifname "wan*" meta l4proto udp snat ip to ip saddr . udp sport map @outside
        oifname "wan*" udp sport @inside snat to {wan}:1024-65535 fully-random
        oifname "wan*" masquerade
    }}
    chain learn {{
        type filter hook postrouting priority srcnat + 10;
        oifname "wan*" meta l4proto udp ct direction original jump learn_ours
        oifname "wan*" meta l4proto udp ct direction reply jump learn_theirs
    }}
    chain learn_ours {{
        udp sport . ct original ip saddr . ct original proto-src @bindings goto record_ours
        udp sport @inside drop
        goto record_ours
    }}
    chain record_ours {{
        update @bindings {{ udp sport . ct original ip saddr . ct original proto-src }}
        update @inside {{ udp sport : ct original ip saddr . ct original proto-src }}
        meta l4proto udp update @outside {{ ct original ip saddr . ct original proto-src : ip saddr . udp sport }}
        update @contacts {{ udp sport . ip daddr }}
    }}
    chain learn_theirs {{
        update @bindings {{ udp sport . ct reply ip saddr . ct reply proto-src }}
        update @inside {{ udp sport : ct reply ip saddr . ct reply proto-src }}
        meta l4proto udp update @outside {{ ct reply ip saddr . ct reply proto-src : ip saddr . udp sport }}
        update @contacts {{ udp sport . ip daddr }}
    }}
}}
"#
    )
}

/// The transaction that translates by a port allocation that is not the kernel's own, if the router has one.
pub(super) fn allocation(router: &Router, wan: Ipv4Addr) -> Option<String> {
    if router.mapping != Some(Mapping::AddressAndPortDependent) {
        return None;
    }
    match router.allocation {
        PortAllocation::Random => None,
        PortAllocation::Sequential { step } => Some(sequential(step, wan)),
        PortAllocation::Preserving => {
            let lifetime = router.binding_lifetime.unwrap_or(DEFAULT_LIFETIME);
            Some(preserving(lifetime.as_secs().max(1)))
        }
    }
}

/// Every new flow takes the next port, whichever host begins it. A port that is still taken for the same destination costs the packet.
fn sequential(step: u16, wan: Ipv4Addr) -> String {
    let ports = PortAllocation::sequence(step);
    let elements: Vec<String> =
        ports.clone().enumerate().map(|(place, port)| format!("{place} : {port}")).collect();
    format!(
        r#"table ip allocation {{
    chain outbound {{
        type nat hook postrouting priority srcnat;
        oifname "wan*" meta l4proto {{ tcp, udp }} snat ip to {wan} : numgen inc mod {count} map {{ {elements} }}
        oifname "wan*" masquerade
    }}
}}
"#,
        count = ports.len(),
        elements = elements.join(", "),
    )
}

/// A flow keeps its port unless another flow has it, whatever their destinations; the kernel would let them share it.
fn preserving(lifetime: u64) -> String {
    format!(
        r#"table ip allocation {{
    set taken {{ type inet_service; flags dynamic,timeout; timeout {lifetime}s; size 65536; }}

    chain outbound {{
        type nat hook postrouting priority srcnat;
        oifname "wan*" udp sport @taken masquerade fully-random
        oifname "wan*" masquerade
    }}
    chain learn {{
        type filter hook postrouting priority srcnat + 10;
        oifname "wan*" meta l4proto udp update @taken {{ udp sport }}
    }}
}}
"#
    )
}

/// The transaction that bounds what the router remembers for its hosts. The kernel's own bound (`nf_conntrack_max`) is one for the whole machine.
pub(super) fn most_flows(most: usize) -> String {
    format!(
        r#"table inet most {{
    chain forward {{
        type filter hook forward priority filter - 5;
        iifname "lan" ct state new ct count over {most} drop
    }}
}}
"#
    )
}

/// The transaction that lets IPv6 of the hosts vanish. The router's own, by which hosts find it, is left alone.
pub(super) const BROKEN_IPV6: &str = "\
add table ip6 broken
add chain ip6 broken forward { type filter hook forward priority filter - 10; policy drop; }
";

/// The transaction that empties what [`bindings`] remembers.
pub(super) const FORGET_BINDINGS: &str = "\
flush map ip bindings outside
flush map ip bindings inside
flush set ip bindings bindings
flush set ip bindings contacts
";

/// The transaction that empties what [`PortAllocation::Preserving`] remembers.
pub(super) const FORGET_TAKEN: &str = "flush set ip allocation taken\n";

/// The transaction after which new flows get UDP ports of this one of 60 ranges. Comes before every other translation, which leaves alone what
/// has been translated; without `random` the kernel gives all flows of a host's port the same one.
pub(crate) fn renumber(range: u8) -> String {
    const FIRST: u16 = 1_100;
    // None of them reaches 32768, where hosts take their ports from: a host's own port would be kept.
    const PORTS: u16 = 500;
    let first = FIRST + PORTS * u16::from(range % 60);
    let last = first + PORTS - 1;
    format!(
        "add table ip renumber\ndelete table ip renumber\nadd table ip renumber\n\
         add chain ip renumber outbound {{ type nat hook postrouting priority srcnat - 10; }}\n\
         add rule ip renumber outbound oifname \"wan*\" meta l4proto udp masquerade to :{first}-{last}\n"
    )
}
