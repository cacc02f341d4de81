//! The floor of the benchmarks: a forwarder and a STUN responder that do nothing but move datagrams, with plain system calls in one
//! thread. They authenticate nobody, limit nobody and count nothing.
//!
//! `bare relay` learns its channels from standard input, one a line: the number, the address of one end, that of the other. With
//! `--gro` it takes what the kernel coalesced and sends it on with segmentation offload, and waits for either of two ports as the server
//! must; without, one datagram is one message of `recvmmsg` and `sendmmsg` on one blocking socket. `bare stun` answers Binding requests
//! the same way. Both print their port.

#![expect(unsafe_code, reason = "a yardstick of system calls makes them itself")]

use std::collections::HashMap;
use std::io::{BufRead as _, Write as _};
use std::mem::{size_of, zeroed};
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::ptr::null_mut;

use anyhow::{Context as _, bail};
use clap::Parser;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

/// Messages of one system call.
const BATCH: usize = 64;
/// The most that the kernel coalesces into one.
const COALESCED: usize = 64 * 1024;
const SINGLE: usize = 2048;
/// What the server asks for.
const SOCKET_BUFFERS: usize = 4 * 1024 * 1024;
const CONTROL: usize = 64;

/// A bare forwarder or responder on a free port of 127.0.0.1.
#[derive(Debug, Parser)]
enum Arguments {
    /// Forwards frames on the channels that standard input names.
    Relay {
        /// Coalesced in, segmented out.
        #[arg(long)]
        gro: bool,
    },
    /// Answers Binding requests.
    Stun,
}

#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control([u8; CONTROL]);

/// Messages with their buffers; the headers point into the rest, which is never moved or resized.
struct Messages {
    headers: Box<[libc::mmsghdr]>,
    buffers: Box<[u8]>,
    parts: Box<[libc::iovec]>,
    names: Box<[libc::sockaddr_in]>,
    control: Box<[Control]>,
    size: usize,
}

impl Messages {
    fn new(size: usize) -> Self {
        // SAFETY: all of these are plain data for which zeroes are valid.
        let (header, part, name) = unsafe { (zeroed(), zeroed(), zeroed()) };
        Self {
            headers: vec![header; BATCH].into(),
            buffers: vec![0; size * BATCH].into(),
            parts: vec![part; BATCH].into(),
            names: vec![name; BATCH].into(),
            control: vec![Control([0; CONTROL]); BATCH].into(),
            size,
        }
    }

    /// How many messages there are.
    fn receive(&mut self, socket: &UdpSocket, flags: libc::c_int) -> std::io::Result<usize> {
        let coalesced = self.size == COALESCED;
        for place in 0..BATCH {
            self.parts[place] = libc::iovec {
                iov_base: self.buffers[place * self.size..].as_mut_ptr().cast(),
                iov_len: self.size,
            };
            let header = &mut self.headers[place].msg_hdr;
            header.msg_iov = &raw mut self.parts[place];
            header.msg_iovlen = 1;
            header.msg_name = (&raw mut self.names[place]).cast();
            header.msg_namelen = size_of::<libc::sockaddr_in>() as u32;
            header.msg_control =
                if coalesced { self.control[place].0.as_mut_ptr().cast() } else { null_mut() };
            header.msg_controllen = if coalesced { CONTROL } else { 0 };
        }
        loop {
            // SAFETY: every header points to buffers of the lengths it names, all owned by `self`.
            let received = unsafe {
                libc::recvmmsg(socket.as_raw_fd(), self.headers.as_mut_ptr(), BATCH as u32, flags, null_mut())
            };
            match usize::try_from(received) {
                Ok(received) => return Ok(received),
                Err(_) => {
                    let error = std::io::Error::last_os_error();
                    if error.kind() != std::io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
    }

    fn length(&self, place: usize) -> usize {
        self.headers[place].msg_len as usize
    }

    fn bytes(&mut self, place: usize) -> &mut [u8] {
        &mut self.buffers[place * self.size..][..self.size]
    }

    /// The size of the datagrams in a coalesced message.
    fn segment(&self, place: usize) -> Option<u16> {
        let header = &self.headers[place].msg_hdr;
        // SAFETY: the kernel has filled the control buffer, and these walk it within `msg_controllen`.
        unsafe {
            let mut control = libc::CMSG_FIRSTHDR(header);
            while let Some(message) = control.as_ref() {
                if (message.cmsg_level, message.cmsg_type) == (libc::SOL_UDP, libc::UDP_GRO) {
                    return u16::try_from(libc::CMSG_DATA(control).cast::<libc::c_int>().read_unaligned())
                        .ok();
                }
                control = libc::CMSG_NXTHDR(header, control);
            }
        }
        None
    }

    /// Turns message `place` round: `length` of its bytes go to the address in its name, cut to segments if one is given.
    fn address(&mut self, place: usize, length: usize, segment: Option<u16>) {
        self.parts[place].iov_len = length;
        let header = &mut self.headers[place].msg_hdr;
        header.msg_control = null_mut();
        header.msg_controllen = 0;
        let Some(segment) = segment.filter(|segment| usize::from(*segment) < length) else { return };
        header.msg_control = self.control[place].0.as_mut_ptr().cast();
        // SAFETY: one control message of two bytes fits `CONTROL`, and the header points to it.
        unsafe {
            header.msg_controllen = libc::CMSG_SPACE(2) as usize;
            let control = libc::CMSG_FIRSTHDR(header);
            (*control).cmsg_level = libc::SOL_UDP;
            (*control).cmsg_type = libc::UDP_SEGMENT;
            (*control).cmsg_len = libc::CMSG_LEN(2) as usize;
            libc::CMSG_DATA(control).cast::<u16>().write_unaligned(segment);
        }
    }

    fn send(&mut self, socket: &UdpSocket, count: usize) -> std::io::Result<()> {
        let mut sent = 0;
        while sent < count {
            // SAFETY: as in `receive`; `address` has set what is sent.
            let done = unsafe {
                libc::sendmmsg(
                    socket.as_raw_fd(),
                    self.headers[sent..].as_mut_ptr(),
                    (count - sent) as u32,
                    0,
                )
            };
            match usize::try_from(done) {
                Ok(done) => sent += done,
                Err(_) => return Err(std::io::Error::last_os_error()),
            }
        }
        Ok(())
    }
}

fn name(address: SocketAddrV4) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: address.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from(*address.ip()).to_be() },
        sin_zero: [0; 8],
    }
}

fn alike(one: &libc::sockaddr_in, other: &libc::sockaddr_in) -> bool {
    (one.sin_port, one.sin_addr.s_addr) == (other.sin_port, other.sin_addr.s_addr)
}

fn relay(socket: &UdpSocket, gro: bool) -> anyhow::Result<()> {
    let mut channels: HashMap<u32, [libc::sockaddr_in; 2]> = HashMap::new();
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let mut words = line.split(' ');
        let mut word = || words.next().context("a channel is a number and two addresses");
        let number = word()?.parse()?;
        channels.insert(number, [name(word()?.parse()?), name(word()?.parse()?)]);
    }
    // Numbers index a table: the floor hashes nothing.
    let most = channels.keys().max().map_or(0, |most| *most as usize + 1);
    let mut table = vec![None; most];
    for (number, ends) in channels {
        table[number as usize] = Some(ends);
    }
    if gro {
        set_option(socket, libc::SOL_UDP, libc::UDP_GRO)?;
    }
    // Whoever wrote the channels waits for this.
    writeln!(std::io::stdout(), "ready")?;
    let mut messages = Messages::new(if gro { COALESCED } else { SINGLE });
    let other = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let sockets = [socket, &other];
    let epoll = Epoll::new(EpollCreateFlags::empty())?;
    for (number, socket) in sockets.iter().enumerate().filter(|_| gro) {
        epoll.add(socket, EpollEvent::new(EpollFlags::EPOLLIN, number as u64))?;
    }
    let mut events = [EpollEvent::empty(); 2];
    loop {
        if !gro {
            forward(socket, &mut messages, &table, gro)?;
            continue;
        }
        let ready = epoll.wait(&mut events, EpollTimeout::NONE)?;
        for event in &events[..ready] {
            forward(sockets[event.data() as usize], &mut messages, &table, gro)?;
        }
    }
}

fn forward(
    socket: &UdpSocket,
    messages: &mut Messages,
    table: &[Option<[libc::sockaddr_in; 2]>],
    gro: bool,
) -> anyhow::Result<()> {
    let received = messages.receive(socket, if gro { libc::MSG_DONTWAIT } else { libc::MSG_WAITFORONE })?;
    for place in 0..received {
        let [_, a, b, c] = *messages.bytes(place).first_chunk().context("a buffer")?;
        let number = u32::from_be_bytes([0, a, b, c]);
        let Some(Some([one, other])) = table.get(number as usize) else { bail!("channel {number}") };
        let source = messages.names[place];
        messages.names[place] = if alike(&source, one) { *other } else { *one };
        let segment = if gro { messages.segment(place) } else { None };
        messages.address(place, messages.length(place), segment);
    }
    Ok(messages.send(socket, received)?)
}

fn stun(socket: &UdpSocket) -> anyhow::Result<()> {
    const COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];
    let mut messages = Messages::new(SINGLE);
    loop {
        let received = messages.receive(socket, libc::MSG_WAITFORONE)?;
        for place in 0..received {
            let length = messages.length(place);
            let from = messages.names[place];
            let bytes = messages.bytes(place);
            if length < 20 || bytes[..2] != [0, 1] || bytes[4..8] != COOKIE {
                bail!("no Binding request");
            }
            bytes[..4].copy_from_slice(&[1, 1, 0, 12]);
            bytes[20..26].copy_from_slice(&[0, 0x20, 0, 8, 0, 1]);
            let (port, ip) = (from.sin_port.to_ne_bytes(), from.sin_addr.s_addr.to_ne_bytes());
            for index in 0..2 {
                bytes[26 + index] = port[index] ^ COOKIE[index];
            }
            for index in 0..4 {
                bytes[28 + index] = ip[index] ^ COOKIE[index];
            }
            messages.address(place, 32, None);
        }
        messages.send(socket, received)?;
    }
}

fn set_option(socket: &UdpSocket, level: i32, option: i32) -> std::io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the option's value is an int, which lives until the call returns.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as u32,
        )
    };
    if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None)?;
    socket.set_recv_buffer_size(SOCKET_BUFFERS)?;
    socket.set_send_buffer_size(SOCKET_BUFFERS)?;
    socket.bind(&SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0).into())?;
    let socket = UdpSocket::from(socket);
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", socket.local_addr()?.port())?;
    out.flush()?;
    drop(out);
    match arguments {
        Arguments::Relay { gro } => relay(&socket, gro),
        Arguments::Stun => stun(&socket),
    }
}
