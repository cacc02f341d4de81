//! One of a relay thread's sockets.

use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsFd, BorrowedFd};

use mio::{Interest, Registry, Token};
use quinn::udp::UdpSocketState;
use rendezvous_batch::{MOST, Receiver};

/// Messages of a batch where datagrams come one by one.
const LEAST_OFFER: usize = 4;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Socket {
    io: mio::net::UdpSocket,
    /// Serves every address of the host, so that what leaves must be told its source.
    pub(super) anywhere: bool,
    /// Something may wait: the kernel tells once, when more comes.
    pub(super) ready: bool,
    /// Messages that it takes at a time. Every one that is offered to the kernel costs, used or not.
    offer: usize,
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.io.as_fd()
    }
}

impl Socket {
    pub(super) fn new(socket: UdpSocket, registry: &Registry, token: Token) -> io::Result<Self> {
        // For its options: coalescing, marks and destinations of what comes, no fragments.
        UdpSocketState::new((&socket).into())?;
        let anywhere = socket.local_addr()?.ip().is_unspecified();
        if !anywhere {
            rendezvous_batch::without_destinations(&socket)?;
        }
        let mut io = mio::net::UdpSocket::from_std(socket);
        registry.register(&mut io, token, Interest::READABLE)?;
        Ok(Self { io, anywhere, ready: false, offer: LEAST_OFFER })
    }

    /// Takes what waits, a batch at most. A batch that is not full was all there was: the kernel tells when there is more, and asking it
    /// again would cost a call.
    pub(super) fn receive(&mut self, receiver: &mut Receiver) -> io::Result<()> {
        let received = receiver.receive(&self.io, self.offer);
        let count = *received.as_ref().unwrap_or(&0);
        self.ready = match &received {
            Ok(count) => *count == self.offer,
            Err(error) => error.kind() != io::ErrorKind::WouldBlock,
        };
        self.offer = match count {
            full if full == self.offer => MOST,
            few if few < self.offer / 8 => (self.offer / 2).max(LEAST_OFFER),
            _ => self.offer,
        };
        received.map(drop)
    }
}
