//! Many datagrams to and from many addresses in one system call.
//!
//! `quinn::udp` receives a batch with one `recvmmsg`, and sends with one `sendmsg` for each destination: right for a connection, dear for
//! a server whose every datagram goes elsewhere. [`Batch`] sends with `sendmmsg`, each datagram with its own destination, source address,
//! congestion mark and segment size (GSO). [`Receiver`] takes what waits with `recvmmsg`, coalesced where the socket has GRO, and asks the
//! kernel for no more of each message than the socket's options do.
//!
//! [`drops`] tells what the kernel could not keep for us.
//!
//! The only crate of the server that talks to the kernel by itself. It has no state but its buffers, and every pointer that it hands to the
//! kernel is made in the call that uses it. Linux alone.

#![cfg(target_os = "linux")]
#![expect(unsafe_code, reason = "sendmmsg and recvmmsg with control messages have no safe interface")]

mod receive;
mod send;

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd as _};

pub use receive::{Arrival, Receiver};
pub use send::{Batch, Datagram, Sent};

/// How many datagrams the kernel has dropped at this socket, most likely because its buffer was full; it counts from 0 again after 2^32.
///
/// The same count that `SO_RXQ_OVFL` attaches to every datagram, without the cost of attaching it.
pub fn drops(socket: impl AsFd) -> io::Result<u32> {
    /// `SK_MEMINFO_DROPS` and `SK_MEMINFO_VARS` of the kernel's `sock_diag.h`.
    const DROPS: usize = 8;
    let mut values = [0u32; DROPS + 1];
    let mut length = size_of_val(&values) as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `values`, which has as many, and both live until the call returns.
    let done = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            values.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if done == 0 { Ok(values[DROPS]) } else { Err(io::Error::last_os_error()) }
}

/// Has the kernel attach no destination address to what this socket receives: it is bound to one, and each costs a look at the routes.
pub fn without_destinations(socket: impl AsFd) -> io::Result<()> {
    let off: libc::c_int = 0;
    let set = |level, option| {
        // SAFETY: the option's value is an int, which lives until the call returns.
        let done = unsafe {
            libc::setsockopt(
                socket.as_fd().as_raw_fd(),
                level,
                option,
                (&raw const off).cast(),
                size_of_val(&off) as libc::socklen_t,
            )
        };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // Only one of them is of the socket's family.
    set(libc::IPPROTO_IP, libc::IP_PKTINFO).or_else(|_| set(libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO))?;
    Ok(())
}

/// Most datagrams of one call; `UIO_MAXIOV` of the kernel is 1,024.
pub const MOST: usize = 64;

/// Room for an address of IPv6 or of both families, a mark and a segment size, each with its header.
const CONTROL: usize = 128;

#[repr(C)]
#[derive(Clone, Copy)]
union Name {
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control([MaybeUninit<u8>; CONTROL]);

impl Control {
    const fn new() -> Self {
        Self([MaybeUninit::uninit(); CONTROL])
    }
}
