//! Who the router is.

use std::net::{IpAddr, Ipv4Addr, UdpSocket};

/// The default gateway, and this host's address toward it. `local` is the address that the socket is bound to, or the unspecified one.
///
/// Known on Linux only. Elsewhere nobody is asked by PCP or NAT-PMP; UPnP finds its gateway by itself.
pub(super) fn find(local: Ipv4Addr) -> Option<(Ipv4Addr, Ipv4Addr)> {
    let table = std::fs::read_to_string("/proc/thread-self/net/route").ok()?;
    let gateway = default_gateway(&table)?;
    let socket = UdpSocket::bind((local, 0)).ok()?;
    // Sends nothing: it only chooses.
    socket.connect((gateway, crab_nat::GATEWAY_PORT)).ok()?;
    match socket.local_addr().ok()?.ip() {
        IpAddr::V4(own) => Some((gateway, own)),
        IpAddr::V6(_) => None,
    }
}

/// The gateway of the default route with the least metric. The table is Linux's: `Iface Destination Gateway Flags RefCnt Use Metric Mask`, with
/// addresses as hexadecimal numbers in the machine's byte order.
fn default_gateway(table: &str) -> Option<Ipv4Addr> {
    /// RTF_UP and RTF_GATEWAY (linux/route.h).
    const UP_BY_GATEWAY: u32 = 0x3;
    let routes = table.lines().skip(1).filter_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().take(8).collect();
        let [_, destination, gateway, flags, _, _, metric, mask] = fields[..] else { return None };
        let number = |text| u32::from_str_radix(text, 16).ok();
        let is_default = number(destination)? == 0 && number(mask)? == 0;
        let usable = number(flags)? & UP_BY_GATEWAY == UP_BY_GATEWAY;
        let gateway = Ipv4Addr::from(number(gateway)?.to_ne_bytes());
        (is_default && usable).then_some((metric.parse::<u32>().ok()?, gateway))
    });
    routes.min_by_key(|(metric, _)| *metric).map(|(_, gateway)| gateway)
}

#[cfg(all(test, target_endian = "little"))]
mod tests {
    use super::*;

    const HEAD: &str =
        "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n";

    #[test]
    fn the_default_route_with_the_least_metric_counts() {
        let table = format!(
            "{HEAD}wlan0\t00000000\t0102A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0\n\
             eth0\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n\
             eth0\t0001A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
        );
        assert_eq!(default_gateway(&table), Some(Ipv4Addr::new(192, 168, 1, 1)));
    }

    #[test]
    fn without_a_gateway_there_is_none() {
        // A tunnel has none; a route that is down does not count; the rest is not a table.
        let tunnel = format!("{HEAD}tun0\t00000000\t00000000\t0001\t0\t0\t0\t00000000\t0\t0\t0\n");
        let down = format!("{HEAD}eth0\t00000000\t0101A8C0\t0002\t0\t0\t0\t00000000\t0\t0\t0\n");
        for table in ["", HEAD, &tunnel, &down, "\n\u{0}\nx y z 1 2 3 4 5 6 7 8"] {
            assert_eq!(default_gateway(table), None, "{table:?}");
        }
    }
}
