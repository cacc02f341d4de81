//! Binds the server's sockets.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};

use socket2::{Domain, Protocol, Socket, Type};
use tracing::{debug, info};

/// Socket buffers asked for: 40 ms at 1 Gbit/s. The kernel grants what `net.core.rmem_max` allows.
pub(crate) const BUFFER_BYTES: usize = 4 * 1024 * 1024;

/// Tries to find a port that is free on every address, when any will do.
pub(crate) const ATTEMPTS: usize = 16;

/// The protocol of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// Datagrams.
    Udp,
    /// Streams.
    Tcp,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Udp => "UDP",
            Self::Tcp => "TCP",
        })
    }
}

/// A socket could not be bound.
#[derive(Debug, thiserror::Error)]
#[error("{protocol} port {} of {}: {source}", address.port(), address.ip())]
pub struct BindError {
    /// UDP or TCP.
    pub protocol: Transport,
    /// Where.
    pub address: SocketAddr,
    /// Why.
    pub source: io::Error,
}

/// The addresses to listen on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Listen {
    /// Every address of the host, IPv4 alone where IPv6 is missing.
    Everywhere,
    /// These, all of them.
    Only(Vec<IpAddr>),
}

impl Listen {
    fn ips(&self) -> &[IpAddr] {
        const BOTH: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
        match self {
            Self::Everywhere => &BOTH,
            Self::Only(ips) => ips,
        }
    }

    /// The same and these.
    pub(crate) fn with(&self, more: &[IpAddr]) -> Self {
        match self {
            Self::Everywhere => Self::Everywhere,
            Self::Only(ips) => {
                let missing = more.iter().filter(|ip| !ips.contains(ip));
                Self::Only(ips.iter().chain(missing).copied().collect())
            }
        }
    }
}

/// Whether these are addresses of this host.
pub(crate) fn check(ips: &[IpAddr]) -> Result<(), BindError> {
    ips.iter().try_for_each(|ip| bind_address(*ip, 0, 1).map(|_| ()))
}

/// The sockets of one port: one a family or address, `copies` of each.
#[derive(Debug)]
pub(crate) struct Port {
    pub(crate) number: u16,
    /// Per address, in the same order; each has `copies` sockets.
    pub(crate) sockets: Vec<Vec<UdpSocket>>,
}

/// Binds one port on every address; with `port` 0 one that is free on all of them.
pub(crate) fn bind(listen: &Listen, port: u16, copies: usize) -> Result<Port, BindError> {
    let mut attempt = 0;
    loop {
        match bind_once(listen, port, copies) {
            Err(error)
                if port == 0 && attempt < ATTEMPTS && error.source.kind() == io::ErrorKind::AddrInUse =>
            {
                attempt += 1;
            }
            result => return result,
        }
    }
}

/// A TCP port: a socket per family or address.
#[derive(Debug)]
pub(crate) struct Listening {
    pub(crate) number: u16,
    pub(crate) sockets: Vec<TcpListener>,
}

/// Listens on one TCP port of every address.
pub(crate) fn listen(listen: &Listen, port: u16) -> Result<Listening, BindError> {
    let mut number = port;
    let mut sockets = Vec::new();
    for ip in listen.ips() {
        let address = SocketAddr::new(*ip, number);
        match listener(address) {
            Ok(listener) => {
                number = listener.local_addr().map_or(number, |bound| bound.port());
                sockets.push(listener);
            }
            Err(error) if *listen == Listen::Everywhere && ip.is_ipv6() && is_unavailable(&error) => {}
            Err(source) => return Err(BindError { protocol: Transport::Tcp, address, source }),
        }
    }
    Ok(Listening { number, sockets })
}

/// Connections that may wait to be accepted: what Linux allows at most unless told otherwise (`net.core.somaxconn`).
const BACKLOG: i32 = 4_096;

fn listener(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    // A restarted server must not wait for connections of the last one to time out.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

fn bind_once(listen: &Listen, port: u16, copies: usize) -> Result<Port, BindError> {
    let mut number = port;
    let mut sockets = Vec::new();
    for ip in listen.ips() {
        match bind_address(*ip, number, copies) {
            Ok((bound, copies)) => {
                number = bound;
                sockets.push(copies);
            }
            Err(error) if *listen == Listen::Everywhere && ip.is_ipv6() && is_unavailable(&error.source) => {
                info!("no IPv6 on this host; serving IPv4 alone");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(Port { number, sockets })
}

fn is_unavailable(error: &io::Error) -> bool {
    /// EAFNOSUPPORT of Linux, which std does not name.
    const NO_FAMILY: i32 = 97;
    error.kind() == io::ErrorKind::AddrNotAvailable || error.raw_os_error() == Some(NO_FAMILY)
}

fn bind_address(ip: IpAddr, port: u16, copies: usize) -> Result<(u16, Vec<UdpSocket>), BindError> {
    let at = |address| move |source| BindError { protocol: Transport::Udp, address, source };
    let mut address = SocketAddr::new(ip, port);
    // Sockets that share their port would also share it with those of another server of the same user, and take half
    // of its packets: so find out first whether the port is free.
    let sole = socket(address, false).map_err(at(address))?;
    address.set_port(sole.local_addr().map_err(at(address))?.port());
    if copies == 1 {
        return Ok((address.port(), vec![sole]));
    }
    drop(sole);
    let shared =
        (0..copies).map(|_| socket(address, true)).collect::<io::Result<_>>().map_err(at(address))?;
    Ok((address.port(), shared))
}

fn socket(address: SocketAddr, shared: bool) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if shared {
        socket.set_reuse_port(true)?;
    }
    socket.bind(&address.into())?;
    socket.set_nonblocking(true)?;
    let buffers =
        socket.set_recv_buffer_size(BUFFER_BYTES).and_then(|()| socket.set_send_buffer_size(BUFFER_BYTES));
    if let Err(error) = buffers {
        debug!(%error, "socket buffers stay as they are");
    }
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    #[test]
    fn a_port_in_use_is_refused_even_by_sockets_that_share() {
        let listen = Listen::Only(vec![HERE]);
        let first = bind(&listen, 0, 2).unwrap();
        assert_eq!((first.sockets.len(), first.sockets[0].len()), (1, 2));
        let error = bind(&listen, first.number, 2).unwrap_err();
        assert_eq!(error.source.kind(), io::ErrorKind::AddrInUse);
        assert_eq!(error.address.port(), first.number);
    }

    #[test]
    fn every_address_has_the_same_port() {
        let port = bind(&Listen::Everywhere, 0, 1).unwrap();
        assert!(port.sockets.iter().flatten().all(|s| s.local_addr().unwrap().port() == port.number));
    }

    #[test]
    fn an_address_of_another_host_is_an_error() {
        let listen = Listen::Only(vec![HERE, "192.0.2.77".parse().unwrap()]);
        assert_eq!(bind(&listen, 0, 1).unwrap_err().address.ip().to_string(), "192.0.2.77");
    }
}
