//! Gives a pure measurement real sockets and a clock.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use rendezvous_wire::stun::Received;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::exchange::{Socket, Transmit};
use super::lifetime::LifetimeSearch;
use super::measurement::Measurement;

/// Longest datagram that is read; ours are far shorter.
const BUFFER: usize = 1_500;

/// Datagrams that may wait.
const QUEUE: usize = 64;

/// What can be driven.
pub(crate) trait Core {
    /// The next datagram that is due.
    fn poll_transmit(&mut self, now: Instant) -> Option<Transmit>;
    /// When there is something to do next.
    fn poll_timeout(&self) -> Option<Instant>;
    /// Takes a STUN message that `socket` got from `source`.
    fn handle(&mut self, socket: Socket, source: SocketAddr, message: &Received<'_>, now: Instant);
    /// Whether there is nothing more to learn.
    fn is_done(&self) -> bool;
}

macro_rules! core {
    ($kind:ty) => {
        impl Core for $kind {
            fn poll_transmit(&mut self, now: Instant) -> Option<Transmit> {
                self.poll_transmit(now)
            }

            fn poll_timeout(&self) -> Option<Instant> {
                self.poll_timeout()
            }

            fn handle(&mut self, socket: Socket, source: SocketAddr, message: &Received<'_>, now: Instant) {
                self.handle(socket, source, message, now);
            }

            fn is_done(&self) -> bool {
                self.is_done()
            }
        }
    };
}

core!(LifetimeSearch);
core!(Measurement);

/// Sockets of a family, each on a port of its own.
pub(crate) async fn open(ipv4: bool, count: usize) -> io::Result<Vec<UdpSocket>> {
    let any: SocketAddr = match ipv4 {
        true => (Ipv4Addr::UNSPECIFIED, 0).into(),
        false => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let mut sockets = Vec::with_capacity(count);
    for _ in 0..count {
        sockets.push(UdpSocket::bind(any).await?);
    }
    Ok(sockets)
}

/// Runs to the end. `look` sees the core after everything that happens to it.
pub(crate) async fn drive<C: Core>(core: &mut C, sockets: Vec<UdpSocket>, mut look: impl FnMut(&C)) {
    let sockets: Vec<Arc<UdpSocket>> = sockets.into_iter().map(Arc::new).collect();
    let (heard_tx, mut heard) = mpsc::channel(QUEUE);
    let mut readers = JoinSet::new();
    for (place, socket) in sockets.iter().enumerate() {
        readers.spawn(read(place, socket.clone(), heard_tx.clone()));
    }
    loop {
        while let Some(Transmit { socket, destination, datagram }) = core.poll_transmit(Instant::now()) {
            // One that does not leave is as good as lost on the way: it is repeated.
            if let Err(error) = sockets[socket].send_to(&datagram, destination).await {
                tracing::debug!(%destination, %error, "a measuring packet did not leave");
            }
        }
        look(core);
        let wake = core.poll_timeout();
        let Some(wake) = wake.filter(|_| !core.is_done()) else { return };
        tokio::select! {
            Some((socket, source, bytes)) = heard.recv() => {
                if let Ok(message) = Received::parse(&bytes) {
                    core.handle(socket, source, &message, Instant::now());
                }
            }
            () = tokio::time::sleep_until(wake.into()) => {}
        }
    }
}

async fn read(place: Socket, socket: Arc<UdpSocket>, heard: mpsc::Sender<(Socket, SocketAddr, Vec<u8>)>) {
    let mut buffer = [0; BUFFER];
    loop {
        // Errors are those of earlier sends.
        let Ok((length, source)) = socket.recv_from(&mut buffer).await else { continue };
        if heard.send((place, source, buffer[..length].to_vec())).await.is_err() {
            return;
        }
    }
}
