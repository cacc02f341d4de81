//! Many datagrams to many addresses in one system call.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd as _};
use std::ptr;

use crate::{CONTROL, Control, MOST, Name};

/// What one message of a batch carries: one datagram, or several of one size for one destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Datagram<'a> {
    /// The payload.
    pub bytes: &'a [u8],
    /// Where to.
    pub to: SocketAddr,
    /// From which of our addresses; the kernel chooses where there is none, or where the family is not that of `to`.
    pub from: Option<IpAddr>,
    /// The kernel cuts `bytes` into datagrams of this size, the last one maybe shorter.
    pub segment: Option<u16>,
    /// The two bits of explicit congestion notification (RFC 3168, section 5).
    pub ecn: u8,
}

/// How far a batch has come.
#[derive(Debug)]
pub enum Sent {
    /// All are with the kernel.
    All,
    /// So many are; the next one was refused for this reason, and the rest has not been tried.
    Part(usize, io::Error),
}

/// Buffers for the headers of a batch.
pub struct Batch {
    headers: Box<[MaybeUninit<libc::mmsghdr>; MOST]>,
    parts: Box<[MaybeUninit<libc::iovec>; MOST]>,
    names: Box<[MaybeUninit<Name>; MOST]>,
    control: Box<[Control; MOST]>,
}

// SAFETY: the raw pointers in the headers are written anew in every call before they are used, and mean nothing between calls.
unsafe impl Send for Batch {}

impl Default for Batch {
    fn default() -> Self {
        Self {
            headers: Box::new([const { MaybeUninit::uninit() }; MOST]),
            parts: Box::new([const { MaybeUninit::uninit() }; MOST]),
            names: Box::new([const { MaybeUninit::uninit() }; MOST]),
            control: Box::new([Control::new(); MOST]),
        }
    }
}

impl std::fmt::Debug for Batch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Batch").finish_non_exhaustive()
    }
}

impl Batch {
    /// Sends these datagrams over `socket` in their order, without waiting. More than [`MOST`] take several calls.
    pub fn send<'a>(&mut self, socket: impl AsFd, datagrams: impl IntoIterator<Item = Datagram<'a>>) -> Sent {
        let mut datagrams = datagrams.into_iter();
        let mut sent = 0;
        loop {
            let mut count = 0;
            for datagram in datagrams.by_ref().take(MOST) {
                self.fill(count, &datagram);
                count += 1;
            }
            if count == 0 {
                return Sent::All;
            }
            match self.flush(&socket, count) {
                Sent::All => sent += count,
                Sent::Part(part, error) => return Sent::Part(sent + part, error),
            }
        }
    }

    fn flush(&mut self, socket: &impl AsFd, count: usize) -> Sent {
        let mut sent = 0;
        while sent < count {
            // SAFETY: `fill` has initialised the first `count` headers and all that they point to. The buffers are owned by `self`, and
            // the payloads are borrowed by the datagrams, which outlive this call.
            let done = unsafe {
                libc::sendmmsg(
                    socket.as_fd().as_raw_fd(),
                    self.headers[sent].as_mut_ptr(),
                    (count - sent) as libc::c_uint,
                    libc::MSG_DONTWAIT,
                )
            };
            match usize::try_from(done) {
                // The kernel says 0 only of a batch of none.
                Ok(done) => sent += done.max(1),
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Sent::Part(sent, error);
                    }
                }
            }
        }
        Sent::All
    }

    /// Makes message `place` of a datagram.
    fn fill(&mut self, place: usize, datagram: &Datagram<'_>) {
        let part = self.parts[place].write(libc::iovec {
            iov_base: datagram.bytes.as_ptr().cast_mut().cast(),
            iov_len: datagram.bytes.len(),
        });
        let (name, length) = name(datagram.to);
        let name = self.names[place].write(name);
        // SAFETY: all fields of a `msghdr`, pointers and numbers, may be zero; musl's has private ones.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_name = ptr::from_mut(name).cast();
        header.msg_namelen = length as libc::socklen_t;
        header.msg_iov = part;
        header.msg_iovlen = 1;
        let mut control = Encoder { buffer: &mut self.control[place], length: 0 };
        control.source(datagram);
        control.mark(datagram);
        control.segment(datagram);
        let length = control.length;
        if length > 0 {
            header.msg_control = self.control[place].0.as_mut_ptr().cast();
            header.msg_controllen = length as _;
        }
        self.headers[place].write(libc::mmsghdr { msg_hdr: header, msg_len: 0 });
    }
}

/// Writes control messages one behind the other.
struct Encoder<'a> {
    buffer: &'a mut Control,
    length: usize,
}

impl Encoder<'_> {
    fn push<T: Copy>(&mut self, level: libc::c_int, kind: libc::c_int, value: T) {
        // SAFETY: both compute with their argument alone.
        let (space, length) =
            unsafe { (libc::CMSG_SPACE(size_of::<T>() as _) as usize, libc::CMSG_LEN(size_of::<T>() as _)) };
        assert!(self.length + space <= CONTROL, "three control messages fit");
        // SAFETY: `space` bytes from here on lie within the buffer, as was just checked. The place is aligned for a `cmsghdr`, since the
        // buffer is and `CMSG_SPACE` is a multiple of its alignment. `CMSG_DATA` points `CMSG_LEN(0)` bytes further, within `space`.
        unsafe {
            let header: *mut libc::cmsghdr = self.buffer.0.as_mut_ptr().add(self.length).cast();
            ptr::write_bytes(header.cast::<u8>(), 0, space);
            (*header).cmsg_level = level;
            (*header).cmsg_type = kind;
            (*header).cmsg_len = length as _;
            libc::CMSG_DATA(header).cast::<T>().write_unaligned(value);
        }
        self.length += space;
    }

    fn source(&mut self, datagram: &Datagram<'_>) {
        match (datagram.from.map(|ip| ip.to_canonical()), datagram.to) {
            (Some(IpAddr::V4(ip)), SocketAddr::V4(_)) => {
                let source = libc::in_addr { s_addr: u32::from(ip).to_be() };
                let info = libc::in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: source,
                    ipi_addr: libc::in_addr { s_addr: 0 },
                };
                self.push(libc::IPPROTO_IP, libc::IP_PKTINFO, info);
            }
            (Some(IpAddr::V6(ip)), SocketAddr::V6(_)) => {
                let source = libc::in6_addr { s6_addr: ip.octets() };
                let info = libc::in6_pktinfo { ipi6_ifindex: 0, ipi6_addr: source };
                self.push(libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, info);
            }
            _ => {}
        }
    }

    fn mark(&mut self, datagram: &Datagram<'_>) {
        let mark = libc::c_int::from(datagram.ecn & 0b11);
        match datagram.to {
            _ if mark == 0 => {}
            SocketAddr::V4(_) => self.push(libc::IPPROTO_IP, libc::IP_TOS, mark),
            SocketAddr::V6(_) => self.push(libc::IPPROTO_IPV6, libc::IPV6_TCLASS, mark),
        }
    }

    fn segment(&mut self, datagram: &Datagram<'_>) {
        if let Some(segment) = datagram.segment.filter(|segment| usize::from(*segment) < datagram.bytes.len())
        {
            self.push(libc::SOL_UDP, libc::UDP_SEGMENT, segment);
        }
    }
}

fn name(address: SocketAddr) -> (Name, usize) {
    match address {
        SocketAddr::V4(address) => {
            let v4 = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: address.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from(*address.ip()).to_be() },
                sin_zero: [0; 8],
            };
            (Name { v4 }, size_of::<libc::sockaddr_in>())
        }
        SocketAddr::V6(address) => {
            let v6 = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: address.port().to_be(),
                sin6_flowinfo: address.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: address.ip().octets() },
                sin6_scope_id: address.scope_id(),
            };
            (Name { v6 }, size_of::<libc::sockaddr_in6>())
        }
    }
}
