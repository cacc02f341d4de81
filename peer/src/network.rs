//! What this machine is connected to, and when that changes: another network, a cable pulled, the lid closed and opened again.
//!
//! On Linux the kernel says when addresses or routes change (rtnetlink); elsewhere, and should that fail, they are looked at every
//! [`POLL`].

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::mpsc;

use crate::driver::Event;
use crate::gather::is_unlikely;
use crate::socket::{ASLEEP, PathSocket};

/// How often the network is looked at without being told, and whether the machine has slept.
const POLL: Duration = Duration::from_secs(2);

/// An address comes before its routes, and a DHCP client takes its time: after a word from the kernel the network is looked at once more after each
/// of these.
const SETTLING: [Duration; 4] =
    [Duration::ZERO, Duration::from_millis(30), Duration::from_millis(200), Duration::from_millis(1000)];

/// What has happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    /// Addresses or the way to the internet are others; these addresses have been there all along.
    Moved { kept: BTreeSet<IpAddr> },
    /// Nothing ran here for so long.
    Woke(Duration),
}

/// What the machine is connected to, as far as paths depend on it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Network {
    /// Those of container bridges and VPN devices not counted: they come and go with what runs here.
    addresses: BTreeSet<(String, IpAddr)>,
    /// What packets to the internet come from, by family.
    sources: [Option<IpAddr>; 2],
}

impl Network {
    fn now() -> Self {
        let interfaces = if_addrs::get_if_addrs().unwrap_or_default().into_iter();
        let counted = interfaces.filter(|interface| {
            let ip = interface.ip();
            let link_local = matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
            !is_unlikely(&interface.name) && !ip.is_loopback() && !link_local
        });
        Self {
            addresses: counted.map(|interface| (interface.name.clone(), interface.ip())).collect(),
            sources: [
                source(Ipv4Addr::UNSPECIFIED.into(), FAR_V4),
                source(Ipv6Addr::UNSPECIFIED.into(), FAR_V6),
            ],
        }
    }

    fn ips(&self) -> BTreeSet<IpAddr> {
        self.addresses.iter().map(|(_, ip)| *ip).collect()
    }

    fn is_connected(&self) -> bool {
        self.sources.iter().any(Option::is_some)
    }
}

/// Addresses of documentation (RFC 5737, RFC 3849): nothing is sent there, the routing table is asked.
const FAR_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
const FAR_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 1));

/// The address that packets to `far` leave from.
fn source(any: IpAddr, far: IpAddr) -> Option<IpAddr> {
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).ok()?;
    socket.connect(SocketAddr::new(far, 9)).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// Tells sleep from work by two clocks: one that may stand still while the machine sleeps, and one that does not.
#[derive(Debug)]
struct Pulse {
    last: (Instant, SystemTime),
}

impl Pulse {
    fn new(now: Instant, time: SystemTime) -> Self {
        Self { last: (now, time) }
    }

    /// Called at least every [`POLL`]; how long there was nothing, if it was long.
    fn beat(&mut self, now: Instant, time: SystemTime) -> Option<Duration> {
        let (last, last_time) = std::mem::replace(&mut self.last, (now, time));
        let ran = now.saturating_duration_since(last);
        let passed = time.duration_since(last_time).unwrap_or_default().max(ran);
        (passed > ASLEEP).then_some(passed)
    }
}

/// Tells the driver of every change, until it is gone.
pub(crate) async fn watch(socket: Arc<PathSocket>, events: mpsc::Sender<Event>) {
    let mut kernel = Kernel::new();
    let mut network = Network::now();
    let mut pulse = Pulse::new(Instant::now(), SystemTime::now());
    let mut settling = SETTLING.iter();
    // Since the driver was told last.
    let mut kept = network.ips();
    loop {
        let pause = settling.next().map_or(POLL, |pause| (*pause).min(POLL));
        tokio::select! {
            () = kernel.news() => settling = SETTLING.iter(),
            () = tokio::time::sleep(pause) => {}
            () = events.closed() => return,
        }
        let now = Instant::now();
        socket.beat(now);
        if let Some(slept) = pulse.beat(now, SystemTime::now())
            && events.send(Event::NetworkChanged(Change::Woke(slept))).await.is_err()
        {
            return;
        }
        let present = Network::now();
        if present == network {
            continue;
        }
        tracing::debug!(sources = ?present.sources, addresses = present.addresses.len(), "the network has changed");
        let connected = present.is_connected();
        network = present;
        let ips = network.ips();
        kept.retain(|ip| ips.contains(ip));
        // Without any there is nothing to be done until there is one.
        if connected {
            let kept = std::mem::replace(&mut kept, ips);
            if events.send(Event::NetworkChanged(Change::Moved { kept })).await.is_err() {
                return;
            }
        }
    }
}

/// The kernel's word that something about addresses or routes has changed.
struct Kernel {
    #[cfg(target_os = "linux")]
    socket: Option<netlink_sys::TokioSocket>,
}

#[cfg(target_os = "linux")]
impl Kernel {
    fn new() -> Self {
        let socket = Self::open()
            .inspect_err(|error| tracing::debug!(%error, "no word from the kernel when the network changes"))
            .ok();
        Self { socket }
    }

    fn open() -> io::Result<netlink_sys::TokioSocket> {
        use netlink_sys::AsyncSocket as _;
        /// RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_IFADDR, RTMGRP_IPV6_ROUTE (linux/rtnetlink.h).
        const GROUPS: u32 = 0x10 | 0x40 | 0x100 | 0x400;
        let mut socket = netlink_sys::TokioSocket::new(netlink_sys::protocols::NETLINK_ROUTE)?;
        socket.socket_mut().bind(&netlink_sys::SocketAddr::new(0, GROUPS))?;
        Ok(socket)
    }

    /// Waits for it; what exactly has changed is for [`Network::now`] to find out.
    async fn news(&mut self) {
        use netlink_sys::AsyncSocketExt as _;
        let Some(socket) = &mut self.socket else { return std::future::pending().await };
        match socket.recv_from_full().await {
            Ok(_) => {}
            // Too much at once: some of it is lost, and that there was something is known.
            Err(error) if error.raw_os_error() == Some(nix::libc::ENOBUFS) => {}
            Err(error) => {
                tracing::debug!(%error, "no further word from the kernel when the network changes");
                self.socket = None;
            }
        }
    }
}

#[cfg(not(target_os = "linux"))]
impl Kernel {
    fn new() -> Self {
        Self {}
    }

    async fn news(&mut self) {
        std::future::pending().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleep_shows_on_either_clock() {
        let (start, date) = (Instant::now(), SystemTime::now());
        let after = |seconds| Duration::from_secs(seconds);
        let mut pulse = Pulse::new(start, date);
        assert_eq!(pulse.beat(start + after(2), date + after(2)), None);
        // Busy, but awake.
        assert_eq!(pulse.beat(start + after(5), date + after(5)), None);
        // The machine slept, and this clock with it.
        assert_eq!(pulse.beat(start + after(6), date + after(3_600)), Some(after(3_595)));
        // The process was stopped.
        assert_eq!(pulse.beat(start + after(66), date + after(3_660)), Some(after(60)));
        // Somebody has set the date back.
        assert_eq!(pulse.beat(start + after(67), date), None);
    }

    #[test]
    fn a_network_is_the_same_as_long_as_nothing_changes() {
        assert_eq!(Network::now(), Network::now());
        assert!(!Network::default().is_connected());
    }
}
