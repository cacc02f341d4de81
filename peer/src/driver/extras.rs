//! The extra sockets of a ladder ([`peer_agent::Ladder`]): opened by the dozen or by the hundred, all but the winner closed again.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use bytes::Bytes;
use peer_agent::{SocketId, Transmit};
use rendezvous_wire::stun::{MAX_STUN, Received};
use tokio::net::UdpSocket;
use tokio::sync::mpsc;

use crate::socket::{PathSocket, SocketIndex};

use super::{AbortOnDrop, Driver, Key};

/// What came to an extra socket.
#[derive(Debug)]
pub(crate) struct Knocked {
    key: Key,
    id: SocketId,
    source: SocketAddr,
    bytes: Bytes,
}

/// One remote's extra sockets.
#[derive(Default)]
pub(super) struct Extras {
    open: BTreeMap<SocketId, Extra>,
    /// The ones that the path socket has taken in.
    adopted: BTreeMap<SocketId, SocketIndex>,
}

struct Extra {
    io: Arc<UdpSocket>,
    /// The system's own hop limit.
    default_ttl: u32,
    ttl: u32,
    _reader: AbortOnDrop,
}

impl Extras {
    /// Opens one; its port.
    pub(super) fn open(
        &mut self,
        id: SocketId,
        key: Key,
        knocked: &mpsc::Sender<Knocked>,
    ) -> std::io::Result<u16> {
        let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.set_nonblocking(true)?;
        let (port, ttl) = (socket.local_addr()?.port(), socket.ttl()?);
        let io = Arc::new(UdpSocket::from_std(socket)?);
        let (reading, knocked) = (io.clone(), knocked.clone());
        let reader = tokio::spawn(async move {
            let mut buffer = [0; MAX_STUN];
            loop {
                // An error is an ICMP message about some knock, as is to be expected.
                let Ok((length, source)) = reading.recv_from(&mut buffer).await else { continue };
                let bytes = Bytes::copy_from_slice(&buffer[..length]);
                if knocked.send(Knocked { key, id, source, bytes }).await.is_err() {
                    return;
                }
            }
        });
        self.open.insert(id, Extra { io, default_ttl: ttl, ttl, _reader: AbortOnDrop(reader) });
        Ok(port)
    }

    /// Sends from an extra socket that is still one. A failure is a loss, as with every check.
    pub(super) fn send(&mut self, transmit: &Transmit) {
        let Some(extra) = self.open.get_mut(&transmit.path.socket) else { return };
        if let Err(error) = extra.send(transmit) {
            tracing::trace!(%error, remote = %transmit.path.remote, "not sent");
        }
    }

    /// Hands one over to the path socket. If that cannot be, nothing more is sent from it, and no path is proven.
    pub(super) fn adopt(&mut self, id: SocketId, socket: &PathSocket) {
        let Some(extra) = self.open.remove(&id) else { return };
        if let Err(error) = extra.io.set_ttl(extra.default_ttl) {
            tracing::debug!(%error, "an extra socket keeps its hop limit");
            return;
        }
        match socket.adopt(extra.io) {
            Some(index) => drop(self.adopted.insert(id, index)),
            None => tracing::debug!("there is no room for one more socket"),
        }
    }

    /// Closes one.
    pub(super) fn close(&mut self, id: SocketId, socket: &PathSocket) {
        self.open.remove(&id);
        if let Some(index) = self.adopted.remove(&id) {
            socket.release(index);
        }
    }

    /// Closes all.
    pub(super) fn clear(&mut self, socket: &PathSocket) {
        self.open.clear();
        for index in std::mem::take(&mut self.adopted).into_values() {
            socket.release(index);
        }
    }

    /// The path socket's index for an agent's number: the same, but for adopted sockets. `None` for an extra one that was not adopted.
    pub(super) fn index(&self, id: SocketId) -> Option<SocketIndex> {
        if self.open.contains_key(&id) {
            return None;
        }
        Some(self.adopted.get(&id).copied().unwrap_or(id.0 as SocketIndex))
    }

    /// The agent's number for a path socket's index.
    pub(super) fn id(&self, index: SocketIndex) -> SocketId {
        let adopted = self.adopted.iter().find(|(_, own)| **own == index);
        adopted.map_or(SocketId(index as u32), |(id, _)| *id)
    }
}

impl Extra {
    fn send(&mut self, transmit: &Transmit) -> std::io::Result<()> {
        let ttl = transmit.ttl.map_or(self.default_ttl, u32::from);
        if ttl != self.ttl {
            self.io.set_ttl(ttl)?;
            self.ttl = ttl;
        }
        // tokio's own try_send refuses until the socket was first polled.
        let sent =
            socket2::SockRef::from(&*self.io).send_to(&transmit.datagram, &transmit.path.remote.into());
        sent.map(drop)
    }
}

impl Driver {
    /// Something came to an extra socket.
    pub(super) fn handle_knock(&mut self, knocked: &Knocked, now: std::time::Instant) {
        let Ok(message) = Received::parse(&knocked.bytes) else { return };
        let Some(state) = self.remotes.get_mut(&knocked.key) else { return };
        if let Some(introduced) = &mut state.introduction {
            introduced.ladder.handle_message(knocked.id, knocked.source, &message, now);
            self.pump(knocked.key, now);
        }
    }
}
