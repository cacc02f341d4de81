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
use crate::router::Router;
use crate::site::Site;

/// How long to wait for something that has to come.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long to wait for something that must not come. Ways through a lab take well below a millisecond.
const SILENCE: Duration = Duration::from_millis(60);

fn patience(expected: bool) -> Duration {
    if expected { PATIENCE } else { SILENCE }
}

/// A machine that a probe sends from: one of the lab, or of the [model](crate::model).
pub(super) trait Machine: Sized {
    type Site: Place<Machine = Self>;
    type Socket: std::fmt::Debug;

    fn ipv4(&self) -> Ipv4Addr;
    fn second_ipv4(&self) -> Option<Ipv4Addr>;
    /// Opens a UDP socket at `port` (0 for any) of one of its own addresses.
    fn open(&self, address: Ipv4Addr, port: u16) -> io::Result<(Self::Socket, SocketAddrV4)>;
    fn send(socket: &Self::Socket, payload: &[u8], to: SocketAddrV4, ttl: Option<u32>) -> io::Result<()>;
    /// Where the packet with this tag came from, if it comes. What else arrives is thrown away.
    fn receive(socket: &Self::Socket, tag: &[u8], expected: bool) -> io::Result<Option<SocketAddrV4>>;
    /// Who reported by ICMP that a packet did not arrive, if anyone does.
    fn icmp_error(socket: &Self::Socket, expected: bool) -> io::Result<Option<Ipv4Addr>>;
    fn ping(&self, target: Ipv4Addr, expected: bool) -> io::Result<Echo>;
    /// Whether a TCP connection to `port` of `to` comes about.
    fn connects(&self, to: &Self, port: u16, expected: bool) -> io::Result<bool>;
}

/// A site of either.
pub(super) trait Place {
    type Machine;

    fn host(&self, index: usize) -> Self::Machine;
    fn wan_ipv4(&self) -> Ipv4Addr;
    fn routers(&self) -> &[Router];
}

/// A UDP socket of a machine that tells its packets from all others.
#[derive(Debug)]
pub(super) struct Endpoint<M: Machine> {
    socket: M::Socket,
    pub(super) address: SocketAddrV4,
}

impl<M: Machine> Endpoint<M> {
    /// Binds `port` (0 for any) of one of the host's own addresses.
    pub(super) fn bind(host: &M, address: Ipv4Addr, port: u16) -> io::Result<Self> {
        let (socket, address) = host.open(address, port)?;
        Ok(Self { socket, address })
    }

    pub(super) fn on(host: &M) -> io::Result<Self> {
        Self::bind(host, host.ipv4(), 0)
    }

    pub(super) fn port(&self) -> u16 {
        self.address.port()
    }

    pub(super) fn send(&self, tag: &str, to: SocketAddrV4) -> io::Result<()> {
        M::send(&self.socket, tag.as_bytes(), to, None)
    }

    pub(super) fn send_with_ttl(&self, tag: &str, to: SocketAddrV4, ttl: u32) -> io::Result<()> {
        M::send(&self.socket, tag.as_bytes(), to, Some(ttl))
    }

    /// Where the packet with this tag came from, if it comes. What else arrives is thrown away.
    pub(super) fn receive(&self, tag: &str, expected: bool) -> io::Result<Option<SocketAddrV4>> {
        M::receive(&self.socket, tag.as_bytes(), expected)
    }

    /// Who reported by ICMP that a packet did not arrive, if anyone does.
    pub(super) fn icmp_error(&self, expected: bool) -> io::Result<Option<Ipv4Addr>> {
        M::icmp_error(&self.socket, expected)
    }
}

impl Place for Site {
    type Machine = Host;

    fn host(&self, index: usize) -> Host {
        self.host(index)
    }

    fn wan_ipv4(&self) -> Ipv4Addr {
        self.wan_ipv4()
    }

    fn routers(&self) -> &[Router] {
        self.routers()
    }
}

impl Machine for Host {
    type Site = Site;
    type Socket = UdpSocket;

    fn ipv4(&self) -> Ipv4Addr {
        self.ipv4()
    }

    fn second_ipv4(&self) -> Option<Ipv4Addr> {
        self.second_ipv4()
    }

    fn open(&self, address: Ipv4Addr, port: u16) -> io::Result<(UdpSocket, SocketAddrV4)> {
        let socket = self.run(|| UdpSocket::bind((address, port)))?;
        setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?;
        let SocketAddr::V4(address) = socket.local_addr()? else {
            unreachable!("it was bound to an IPv4 address")
        };
        Ok((socket, address))
    }

    fn send(socket: &UdpSocket, payload: &[u8], to: SocketAddrV4, ttl: Option<u32>) -> io::Result<()> {
        if let Some(ttl) = ttl {
            socket.set_ttl(ttl)?;
        }
        // An ICMP error for an earlier packet is reported here once, instead of sending.
        socket.send_to(payload, to).or_else(|_| socket.send_to(payload, to))?;
        if ttl.is_some() {
            socket.set_ttl(64)?;
        }
        Ok(())
    }

    fn receive(socket: &UdpSocket, tag: &[u8], expected: bool) -> io::Result<Option<SocketAddrV4>> {
        let deadline = Instant::now() + patience(expected);
        let mut buffer = [0; 64];
        while let Some(left) = left_until(deadline) {
            socket.set_read_timeout(Some(left))?;
            if let Ok((length, SocketAddr::V4(from))) = socket.recv_from(&mut buffer)
                && &buffer[..length] == tag
            {
                return Ok(Some(from));
            }
        }
        Ok(None)
    }

    fn icmp_error(socket: &UdpSocket, expected: bool) -> io::Result<Option<Ipv4Addr>> {
        let deadline = Instant::now() + patience(expected);
        while left_until(deadline).is_some() {
            if let Some(reporter) = error_queue(socket)? {
                return Ok(Some(reporter));
            }
            socket.set_read_timeout(Some(Duration::from_millis(5)))?;
            // Returns as soon as there is an error, or after a moment.
            let _ = socket.peek_from(&mut [0; 1]);
        }
        Ok(None)
    }

    fn ping(&self, target: Ipv4Addr, expected: bool) -> io::Result<Echo> {
        let (family, flags) = (AddressFamily::Inet, SockFlag::SOCK_CLOEXEC);
        let socket = self.run(|| socket(family, SockType::Datagram, flags, SockProtocol::Icmp))?;
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

    fn connects(&self, to: &Self, port: u16, expected: bool) -> io::Result<bool> {
        let address = SocketAddr::from((to.ipv4(), port));
        let _listener = to.run(|| TcpListener::bind(address))?;
        Ok(self.run(|| TcpStream::connect_timeout(&address, patience(expected))).is_ok())
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
