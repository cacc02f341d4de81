//! Single packets and what becomes of them.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, recvmsg,
    setsockopt, socket, sockopt,
};

use crate::host::Host;

/// How long to wait for something that has to come.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long to wait for something that must not come. Ways through a lab take well below a millisecond.
const SILENCE: Duration = Duration::from_millis(60);

fn patience(expected: bool) -> Duration {
    if expected { PATIENCE } else { SILENCE }
}

/// A UDP socket in a host that tells its packets from all others.
#[derive(Debug)]
pub(super) struct Endpoint {
    socket: UdpSocket,
    pub(super) address: SocketAddrV4,
}

impl Endpoint {
    /// Binds `port` (0 for any) of one of the host's own addresses.
    pub(super) fn bind(host: &Host, address: Ipv4Addr, port: u16) -> io::Result<Self> {
        let socket = host.run(|| UdpSocket::bind((address, port)))?;
        setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?;
        let SocketAddr::V4(address) = socket.local_addr()? else {
            unreachable!("it was bound to an IPv4 address")
        };
        Ok(Self { socket, address })
    }

    pub(super) fn on(host: &Host) -> io::Result<Self> {
        Self::bind(host, host.ipv4(), 0)
    }

    pub(super) fn port(&self) -> u16 {
        self.address.port()
    }

    pub(super) fn send(&self, tag: &str, to: SocketAddrV4) -> io::Result<()> {
        // An ICMP error for an earlier packet is reported here once, instead of sending.
        self.socket.send_to(tag.as_bytes(), to).or_else(|_| self.socket.send_to(tag.as_bytes(), to))?;
        Ok(())
    }

    pub(super) fn send_with_ttl(&self, tag: &str, to: SocketAddrV4, ttl: u32) -> io::Result<()> {
        self.socket.set_ttl(ttl)?;
        self.send(tag, to)?;
        self.socket.set_ttl(64)
    }

    /// Where the packet with this tag came from, if it comes. What else arrives is thrown away.
    pub(super) fn receive(&self, tag: &str, expected: bool) -> io::Result<Option<SocketAddrV4>> {
        let deadline = Instant::now() + patience(expected);
        let mut buffer = [0; 64];
        while let Some(left) = left_until(deadline) {
            self.socket.set_read_timeout(Some(left))?;
            if let Ok((length, SocketAddr::V4(from))) = self.socket.recv_from(&mut buffer)
                && &buffer[..length] == tag.as_bytes()
            {
                return Ok(Some(from));
            }
        }
        Ok(None)
    }

    /// Who reported by ICMP that a packet did not arrive, if anyone does.
    pub(super) fn icmp_error(&self, expected: bool) -> io::Result<Option<Ipv4Addr>> {
        let deadline = Instant::now() + patience(expected);
        while left_until(deadline).is_some() {
            if let Some(reporter) = error_queue(&self.socket)? {
                return Ok(Some(reporter));
            }
            self.socket.set_read_timeout(Some(Duration::from_millis(5)))?;
            // Returns as soon as there is an error, or after a moment.
            let _ = self.socket.peek_from(&mut [0; 1]);
        }
        Ok(None)
    }
}

fn left_until(deadline: Instant) -> Option<Duration> {
    deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
}

fn error_queue(socket: &UdpSocket) -> io::Result<Option<Ipv4Addr>> {
    let mut space = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in);
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    let message = match recvmsg::<SockaddrIn>(socket.as_raw_fd(), &mut [], Some(&mut space), flags) {
        Ok(message) => message,
        Err(Errno::EAGAIN) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    Ok(message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::Ipv4RecvErr(_, Some(offender)) => {
            Some(Ipv4Addr::from(u32::from_be(offender.sin_addr.s_addr)))
        }
        _ => None,
    }))
}

/// What an ICMP echo request is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Echo {
    Reply,
    Unreachable,
    Silence,
}

/// Pings `target` from `host`.
pub(super) fn ping(host: &Host, target: Ipv4Addr, expected: bool) -> io::Result<Echo> {
    let (family, flags) = (AddressFamily::Inet, SockFlag::SOCK_CLOEXEC);
    let socket = host.run(|| socket(family, SockType::Datagram, flags, SockProtocol::Icmp))?;
    // The calls are the same ones; only the protocol differs.
    let socket = UdpSocket::from(socket);
    socket.connect((target, 0))?;
    socket.set_read_timeout(Some(patience(expected)))?;
    let echo_request = [8, 0, 0, 0, 0, 0, 0, 1];
    socket.send(&echo_request)?;
    Ok(match socket.recv(&mut [0; 64]) {
        Ok(_) => Echo::Reply,
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
            Echo::Silence
        }
        Err(_) => Echo::Unreachable,
    })
}

/// Whether a TCP connection from `from` to `port` of `to` comes about.
pub(super) fn connects(from: &Host, to: &Host, port: u16, expected: bool) -> io::Result<bool> {
    let address = SocketAddr::from((to.ipv4(), port));
    let _listener = to.run(|| TcpListener::bind(address))?;
    Ok(from.run(|| TcpStream::connect_timeout(&address, patience(expected))).is_ok())
}
