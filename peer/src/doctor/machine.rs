//! The machine itself, and the first routers on the way.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use socket2::SockRef;

/// Routers asked for: a home's, a carrier's, and one to spare on each side.
const MOST_HOPS: u32 = 4;

/// How long routers have to say that a packet ended with them.
const HOP_PATIENCE: Duration = Duration::from_millis(700);

/// What the machine gives a peer to work with.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Machine {
    /// Bytes of a UDP socket's receive buffer, as the system accounts for them.
    pub receive_buffer: Option<usize>,
    /// The same of its send buffer.
    pub send_buffer: Option<usize>,
    /// Devices of containers, bridges and VPNs, whose addresses are offered after all others.
    pub unlikely_devices: Vec<String>,
    /// The device through which the server is reached, where that is one of those.
    pub through: Option<String>,
}

/// Looks at the machine. `local` are the addresses from which packets to the server leave.
pub(super) fn look(local: &[IpAddr]) -> Machine {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok();
    let buffers = socket.as_ref().map(SockRef::from);
    let mut machine = Machine {
        receive_buffer: buffers.as_ref().and_then(|socket| socket.recv_buffer_size().ok()),
        send_buffer: buffers.as_ref().and_then(|socket| socket.send_buffer_size().ok()),
        ..Machine::default()
    };
    for interface in if_addrs::get_if_addrs().unwrap_or_default() {
        if !crate::gather::is_unlikely(&interface.name) {
            continue;
        }
        if local.contains(&interface.ip()) {
            machine.through = Some(interface.name.clone());
        }
        if !machine.unlikely_devices.contains(&interface.name) {
            machine.unlikely_devices.push(interface.name);
        }
    }
    machine
}

/// Whether the machine has an IPv6 address with which the Internet could be reached.
pub(super) fn has_global_ipv6() -> bool {
    let interfaces = if_addrs::get_if_addrs().unwrap_or_default();
    interfaces
        .iter()
        .any(|interface| matches!(interface.ip(), IpAddr::V6(ip) if ip.segments()[0] & 0xe000 == 0x2000))
}

/// The address from which packets to `destination` leave; an error where there is no way to it.
pub(super) fn local_address(destination: SocketAddr) -> std::io::Result<IpAddr> {
    let any: SocketAddr = match destination {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any)?;
    // Sends nothing: it only chooses.
    socket.connect(destination)?;
    Ok(socket.local_addr()?.ip())
}

/// Whether an address is of the range between carriers and their customers (RFC 6598).
pub(super) fn is_shared(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V4(ip) if ip.octets()[0] == 100 && ip.octets()[1] & 0xc0 == 64)
}

/// The first routers toward `destination`, those that say so when a packet's TTL ends with them. Needs no privilege; on Linux only.
#[cfg(target_os = "linux")]
pub(super) async fn hops(destination: SocketAddr) -> Vec<IpAddr> {
    use nix::sys::socket::{setsockopt, sockopt};

    if destination.is_ipv6() {
        return Vec::new();
    }
    let probe = |ttl: u32| -> std::io::Result<UdpSocket> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?;
        socket.set_nonblocking(true)?;
        socket.set_ttl(ttl)?;
        socket.send_to(&[0], destination)?;
        Ok(socket)
    };
    let mut probes = tokio::task::JoinSet::new();
    for (place, socket) in (1..=MOST_HOPS).map_while(|ttl| probe(ttl).ok()).enumerate() {
        probes.spawn(async move {
            let socket = tokio::net::UdpSocket::from_std(socket).ok()?;
            let reported = socket.async_io(tokio::io::Interest::ERROR, || reporter(&socket));
            Some((place, tokio::time::timeout(HOP_PATIENCE, reported).await.ok()?.ok()?))
        });
    }
    let mut hops: Vec<(usize, IpAddr)> = probes.join_all().await.into_iter().flatten().collect();
    hops.sort_unstable();
    hops.into_iter().map(|(_, hop)| hop).filter(|hop| *hop != destination.ip()).collect()
}

/// Elsewhere nobody is asked.
#[cfg(not(target_os = "linux"))]
pub(super) async fn hops(_: SocketAddr) -> Vec<IpAddr> {
    Vec::new()
}

/// Who reported by ICMP that a packet of this socket ended on its way.
#[cfg(target_os = "linux")]
fn reporter(socket: &tokio::net::UdpSocket) -> std::io::Result<IpAddr> {
    use std::os::fd::AsRawFd as _;

    use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg};

    // An extended error and the address that goes with it take 48 bytes.
    let mut space = vec![0; 128];
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<SockaddrIn>(socket.as_raw_fd(), &mut [], Some(&mut space), flags)?;
    let offender = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::Ipv4RecvErr(_, Some(offender)) => {
            Some(Ipv4Addr::from(u32::from_be(offender.sin_addr.s_addr)).into())
        }
        _ => None,
    });
    offender.ok_or_else(|| std::io::ErrorKind::WouldBlock.into())
}
