//! Many datagrams from many addresses in one system call.

use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd as _};
use std::ptr;

use crate::{Control, MOST, Name};

/// Bytes of a receive buffer: the most that the kernel coalesces into one.
const BUFFER: usize = 64 * 1024;

/// From buffer to buffer: not a power of two, so that the first bytes of all do not compete for the same lines of the CPU's caches.
const STRIDE: usize = BUFFER + 1_344;

/// One message that has come: a datagram, or several of one size from one sender, coalesced by the kernel (GRO).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival<'a> {
    /// The payload.
    pub bytes: &'a [u8],
    /// The sender.
    pub from: SocketAddr,
    /// Which of our addresses it was sent to, where the socket is asked for that.
    pub to: Option<IpAddr>,
    /// The size of each datagram but perhaps the last; at least 1.
    pub segment: usize,
    /// The two bits of explicit congestion notification (RFC 3168, section 5), where the socket is asked for them.
    pub ecn: u8,
}

/// Buffers for a batch. Memory that no batch has reached yet is not resident.
pub struct Receiver {
    buffers: Box<[u8]>,
    headers: Box<[MaybeUninit<libc::mmsghdr>; MOST]>,
    parts: Box<[MaybeUninit<libc::iovec>; MOST]>,
    names: Box<[Name; MOST]>,
    control: Box<[Control; MOST]>,
    /// How many of the headers hold a message.
    count: usize,
}

// SAFETY: the raw pointers in the headers are written anew in every call before they are used, and mean nothing between calls.
unsafe impl Send for Receiver {}

impl Default for Receiver {
    fn default() -> Self {
        // SAFETY: a socket address of zeroes is one; its family is none.
        let name = unsafe { MaybeUninit::<Name>::zeroed().assume_init() };
        Self {
            buffers: vec![0; STRIDE * MOST].into(),
            headers: Box::new([const { MaybeUninit::uninit() }; MOST]),
            parts: Box::new([const { MaybeUninit::uninit() }; MOST]),
            names: Box::new([name; MOST]),
            control: Box::new([Control::new(); MOST]),
            count: 0,
        }
    }
}

impl std::fmt::Debug for Receiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Receiver").field("count", &self.count).finish_non_exhaustive()
    }
}

impl Receiver {
    /// Takes what waits at `socket`, at most `most` messages and [`MOST`], without waiting; how many there were. What was taken before is
    /// forgotten. Every message that is offered a buffer costs a little, used or not.
    ///
    /// # Errors
    ///
    /// The system's; [`WouldBlock`](io::ErrorKind::WouldBlock) when nothing waits.
    pub fn receive(&mut self, socket: impl AsFd, most: usize) -> io::Result<usize> {
        self.count = 0;
        let most = most.min(MOST);
        let buffers = self.buffers.chunks_exact_mut(STRIDE).take(most).enumerate();
        for (place, buffer) in buffers {
            let part = self.parts[place]
                .write(libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: BUFFER });
            // SAFETY: all fields of a `msghdr`, pointers and numbers, may be zero; musl's has private ones.
            let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
            header.msg_name = ptr::from_mut(&mut self.names[place]).cast();
            header.msg_namelen = size_of::<Name>() as libc::socklen_t;
            header.msg_iov = part;
            header.msg_iovlen = 1;
            header.msg_control = self.control[place].0.as_mut_ptr().cast();
            header.msg_controllen = size_of::<Control>() as _;
            self.headers[place].write(libc::mmsghdr { msg_hdr: header, msg_len: 0 });
        }
        loop {
            // SAFETY: the first `most` headers have just been written, and what they point to is owned by `self`, has the lengths that they
            // name, and is not touched by anybody else during the call.
            let received = unsafe {
                libc::recvmmsg(
                    socket.as_fd().as_raw_fd(),
                    self.headers[0].as_mut_ptr(),
                    most as libc::c_uint,
                    libc::MSG_DONTWAIT,
                    ptr::null_mut(),
                )
            };
            match usize::try_from(received) {
                Ok(received) => {
                    self.count = received.min(most);
                    return Ok(self.count);
                }
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// What the last call took. Messages whose sender has no address are left out.
    pub fn arrivals(&self) -> impl Iterator<Item = Arrival<'_>> {
        self.buffers.chunks_exact(STRIDE).take(self.count).enumerate().filter_map(|(place, buffer)| {
            // SAFETY: the last call has initialised the first `count` headers.
            let message = unsafe { self.headers[place].assume_init_ref() };
            let bytes = &buffer[..(message.msg_len as usize).min(BUFFER)];
            let from = address(&self.names[place])?;
            let whole = Arrival { bytes, from, to: None, segment: bytes.len().max(1), ecn: 0 };
            Some(self.control[place].decode(&message.msg_hdr, whole))
        })
    }
}

/// The address in a name of either family.
fn address(name: &Name) -> Option<SocketAddr> {
    // SAFETY: both families begin with theirs, every bit pattern of either is an address, and all bytes were zeroed at first.
    unsafe {
        match libc::c_int::from(name.v4.sin_family) {
            libc::AF_INET => {
                let ip = u32::from_be(name.v4.sin_addr.s_addr).to_be_bytes();
                Some(SocketAddr::new(IpAddr::from(ip), u16::from_be(name.v4.sin_port)))
            }
            libc::AF_INET6 => {
                let v6 = &name.v6;
                let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
                let port = u16::from_be(v6.sin6_port);
                Some(SocketAddrV6::new(ip, port, v6.sin6_flowinfo, v6.sin6_scope_id).into())
            }
            _ => None,
        }
    }
}

impl Control {
    /// Adds what the kernel tells beside the payload.
    #[allow(clippy::unnecessary_cast, reason = "the lengths have other types with musl")]
    fn decode<'a>(&self, header: &libc::msghdr, mut arrival: Arrival<'a>) -> Arrival<'a> {
        let mut rest = header.msg_controllen as usize;
        if rest > size_of::<Self>() {
            return arrival;
        }
        let mut at = self.0.as_ptr().cast::<u8>();
        // SAFETY: both compute with their argument alone.
        let (start, unit) =
            unsafe { (libc::CMSG_LEN(0) as usize, libc::CMSG_SPACE(1) - libc::CMSG_SPACE(0)) };
        while rest >= start {
            // SAFETY: the kernel has written `rest` bytes from here on, the header of a control message first. The place is aligned, as the
            // buffer is and every step is a multiple of `unit`.
            let message = unsafe { at.cast::<libc::cmsghdr>().read() };
            let length = message.cmsg_len as usize;
            if !(start..=rest).contains(&length) {
                break;
            }
            // SAFETY: `length` bytes are there, so `length - start` follow the header.
            let value = unsafe { std::slice::from_raw_parts(at.add(start), length - start) };
            arrival.learn(message.cmsg_level, message.cmsg_type, value);
            let step = length.next_multiple_of(unit as usize).min(rest);
            rest -= step;
            // SAFETY: at most `rest` bytes further, at the end of what the kernel has written.
            at = unsafe { at.add(step) };
        }
        arrival
    }
}

impl Arrival<'_> {
    fn learn(&mut self, level: libc::c_int, kind: libc::c_int, value: &[u8]) {
        let int = || value.first_chunk().map(|bytes| libc::c_int::from_ne_bytes(*bytes));
        match (level, kind) {
            (libc::SOL_UDP, libc::UDP_GRO) => {
                let segment = int().and_then(|segment| usize::try_from(segment).ok());
                self.segment = segment.filter(|segment| *segment > 0).unwrap_or(self.segment);
            }
            // One byte of IPv4, though some systems have sent an int.
            (libc::IPPROTO_IP, libc::IP_TOS) => self.ecn = value.first().map_or(0, |tos| tos & 0b11),
            (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => self.ecn = int().map_or(0, |class| class as u8 & 0b11),
            (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                // `in_pktinfo`: the interface, the local address, the address in the packet's header.
                let to = value.get(8..12).and_then(<[u8]>::first_chunk::<4>);
                self.to = to.map(|ip| IpAddr::from(*ip));
            }
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                self.to = value.first_chunk::<16>().map(|ip| IpAddr::from(*ip));
            }
            _ => {}
        }
    }
}
