//! The few system calls that neither `std` nor `nix` wraps safely.
#![allow(unsafe_code)]

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr;
use std::time::{Duration, SystemTime};

use libc::{c_int, c_void};
use nix::sys::prctl;
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socket, sockopt};

/// Makes the program die when the thread that spawns it ends, and reap orphans without looking at them.
///
/// Both settings survive `execve` of an ordinary program.
pub(crate) fn prepare_init(command: &mut Command) {
    let prepare = || {
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        // SAFETY: `SIG_IGN` runs no code of ours.
        unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) }?;
        Ok::<(), io::Error>(())
    };
    // SAFETY: the closure only calls `prctl` and `signal`, both safe between fork and exec.
    unsafe { command.pre_exec(prepare) };
}

/// Lets the calling thread run before every ordinary one, where the process has that right.
pub(crate) fn prefer_this_thread() -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 1 };
    // SAFETY: the pointer is to a live `sched_param`; 0 is the calling thread.
    check(unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) })
}

/// Makes an interface of the calling thread's namespace hand over packets as they would be on a wire: no longer
/// than the MTU, checksums filled in.
pub(crate) fn disable_offloads(interface: &str) -> io::Result<()> {
    const TX_CHECKSUM: u32 = 0x17;
    const SCATTER_GATHER: u32 = 0x19;
    const TCP_SEGMENTATION: u32 = 0x1f;
    const GENERIC_SEGMENTATION: u32 = 0x24;
    let commands = [TCP_SEGMENTATION, GENERIC_SEGMENTATION, SCATTER_GATHER, TX_CHECKSUM];
    commands.into_iter().try_for_each(|command| ethtool(interface, command))
}

/// Waits until the kernel is done with a change of an interface's carrier that has happened already.
pub(crate) fn settle_carrier(interface: &str) -> io::Result<()> {
    const GET_LINK: u32 = 0x0a;
    ethtool(interface, GET_LINK)
}

/// One `SIOCETHTOOL` with the value 0, on an interface of the calling thread's namespace.
fn ethtool(interface: &str, command: u32) -> io::Result<()> {
    /// `struct ethtool_value`: linux/ethtool.h, where the commands are, too.
    #[repr(C)]
    struct Request {
        command: u32,
        value: u32,
    }
    let control = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut ethtool = Request { command, value: 0 };
    // SAFETY: an all-zero `ifreq` is a valid one.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    // The last byte stays zero.
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_data = (&raw mut ethtool).cast();
    // SAFETY: the request names an interface and points to a live `ethtool_value`.
    check(unsafe { libc::ioctl(control.as_raw_fd(), libc::SIOCETHTOOL as _, &raw mut request) })
}

/// Opens a non-blocking packet socket on an interface of the calling thread's namespace. It sees what the
/// interface receives, with the time it did.
pub(crate) fn packet_socket(interface: &str) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    // No protocol, so that it hears nothing before it is bound.
    let socket = socket(AddressFamily::Packet, SockType::Raw, flags, None)?;
    setsockopt(&socket, sockopt::ReceiveTimestampns, &true)?;
    let buffer = 8 << 20;
    if setsockopt(&socket, sockopt::RcvBufForce, &buffer).is_err() {
        // An ordinary user gets what net.core.rmem_max allows.
        setsockopt(&socket, sockopt::RcvBuf, &buffer)?;
    }
    let on: c_int = 1;
    for option in [libc::PACKET_IGNORE_OUTGOING, libc::PACKET_QDISC_BYPASS] {
        // SAFETY: value and length describe a live `c_int`.
        check(unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                option,
                (&raw const on).cast(),
                mem::size_of::<c_int>() as _,
            )
        })?;
    }
    // SAFETY: an all-zero `sockaddr_ll` is a valid one.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = nix::net::if_::if_nametoindex(interface)?.cast_signed();
    // SAFETY: address and length describe a live `sockaddr_ll`.
    check(unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), mem::size_of_val(&address) as _)
    })?;
    Ok(socket)
}

/// Frames moved per system call.
pub(crate) const BATCH: usize = 64;
/// An Ethernet frame of the usual MTU with a VLAN tag, and room to notice when one is longer.
const FRAME: usize = 2048;
/// Room for one `struct timespec` with its header, aligned as the kernel wants it.
type Control = [u64; 8];

/// Room for a batch of frames.
pub(crate) struct FrameReader {
    frames: Box<[[u8; FRAME]; BATCH]>,
    lengths: [usize; BATCH],
    times: [SystemTime; BATCH],
}

impl FrameReader {
    pub(crate) fn new() -> Self {
        Self {
            frames: vec![[0; FRAME]; BATCH].try_into().expect("the length is BATCH"),
            lengths: [0; BATCH],
            times: [SystemTime::UNIX_EPOCH; BATCH],
        }
    }

    /// Reads the frames that wait at `socket`, and tells when each was received. A frame too long for the room
    /// there is comes as an empty one.
    pub(crate) fn read(
        &mut self,
        socket: &OwnedFd,
    ) -> io::Result<impl ExactSizeIterator<Item = (&[u8], SystemTime)>> {
        let mut controls: [Control; BATCH] = [[0; 8]; BATCH];
        let mut vectors = [libc::iovec { iov_base: ptr::null_mut(), iov_len: FRAME }; BATCH];
        // SAFETY: an all-zero `mmsghdr` is a valid one: no address, no data, no control.
        let mut headers: [libc::mmsghdr; BATCH] = unsafe { mem::zeroed() };
        for index in 0..BATCH {
            vectors[index].iov_base = self.frames[index].as_mut_ptr().cast::<c_void>();
            let header = &mut headers[index].msg_hdr;
            header.msg_iov = &raw mut vectors[index];
            header.msg_iovlen = 1;
            header.msg_control = controls[index].as_mut_ptr().cast();
            header.msg_controllen = mem::size_of::<Control>() as _;
        }
        // SAFETY: every header points to its own buffer, vector and control, which outlive the call.
        let count = unsafe {
            libc::recvmmsg(socket.as_raw_fd(), headers.as_mut_ptr(), BATCH as _, 0, ptr::null_mut())
        };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        for (index, header) in headers.iter().enumerate().take(count) {
            let whole = header.msg_hdr.msg_flags & libc::MSG_TRUNC == 0;
            self.lengths[index] = if whole { header.msg_len as usize } else { 0 };
            // SAFETY: the kernel has filled in this header, and its control buffer is alive.
            self.times[index] = unsafe { received_at(&header.msg_hdr) }.unwrap_or_else(SystemTime::now);
        }
        let read = self.frames.iter().zip(self.lengths).zip(self.times).take(count);
        Ok(read.map(|((frame, length), time)| (&frame[..length], time)))
    }
}

/// The `SCM_TIMESTAMPNS` of a received message.
///
/// # Safety
///
/// The header must have been filled in by the kernel, and its control buffer be alive.
unsafe fn received_at(header: &libc::msghdr) -> Option<SystemTime> {
    // SAFETY: by the contract of this function.
    let control = unsafe { libc::CMSG_FIRSTHDR(header).as_ref() }?;
    if (control.cmsg_level, control.cmsg_type) != (libc::SOL_SOCKET, libc::SCM_TIMESTAMPNS) {
        return None;
    }
    // SAFETY: a message of this type carries a `timespec`.
    let time: libc::timespec = unsafe { ptr::read_unaligned(libc::CMSG_DATA(control).cast()) };
    let seconds = u64::try_from(time.tv_sec).ok()?;
    Some(SystemTime::UNIX_EPOCH + Duration::new(seconds, u32::try_from(time.tv_nsec).ok()?))
}

/// Writes up to [`BATCH`] frames to `socket` and tells how many went.
pub(crate) fn write_frames(socket: &impl AsFd, frames: &[Vec<u8>]) -> io::Result<usize> {
    let count = frames.len().min(BATCH);
    let mut vectors = [libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 }; BATCH];
    // SAFETY: an all-zero `mmsghdr` is a valid one: no address, no data, no control.
    let mut headers: [libc::mmsghdr; BATCH] = unsafe { mem::zeroed() };
    for (index, frame) in frames.iter().enumerate().take(count) {
        vectors[index] =
            libc::iovec { iov_base: frame.as_ptr().cast_mut().cast::<c_void>(), iov_len: frame.len() };
        headers[index].msg_hdr.msg_iov = &raw mut vectors[index];
        headers[index].msg_hdr.msg_iovlen = 1;
    }
    // SAFETY: the first `count` headers point to live frames, which the kernel only reads.
    let sent = unsafe { libc::sendmmsg(socket.as_fd().as_raw_fd(), headers.as_mut_ptr(), count as _, 0) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
