//! The sockets of birthday probing ([`peer_agent::birthday`]): opened on the hard side by the hundred, all but the winner closed again.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use peer_agent::SocketId;
use peer_agent::birthday::{Action, Birthday, PROBES, SOCKETS};
use rendezvous_wire::stun::{Class, MAX_STUN, Received};
use tokio::net::UdpSocket;
use tokio::sync::mpsc;

use super::remote::RemoteState;
use super::{AbortOnDrop, Driver, Key};

/// Hop limit of the hard side's knocks: past its own router and a carrier's, and not as far as the other side's. There they could do nothing but
/// harm: a router that takes them for its own traffic gives the other side's probes another port.
const KNOCK_TTL: u32 = 3;

/// How long Linux remembers a UDP flow that nobody has answered (`nf_conntrack_udp_timeout`).
const ENTRY_LIFETIME: Duration = Duration::from_secs(30);

/// Bounds the probes of all remotes together: the router in front is the same.
#[derive(Debug, Default)]
pub(super) struct Budget(VecDeque<Instant>);

impl Budget {
    /// Takes one probe from it. False when it is used up for the moment.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        while self.0.front().is_some_and(|sent| now.saturating_duration_since(*sent) >= ENTRY_LIFETIME) {
            self.0.pop_front();
        }
        let left = self.0.len() < PROBES;
        if left {
            self.0.push_back(now);
        }
        left
    }
}

/// What came to an extra socket.
#[derive(Debug)]
pub(crate) struct Knocked {
    key: Key,
    index: usize,
    source: SocketAddr,
    bytes: Bytes,
}

/// One remote's probing.
pub(super) struct Punch {
    pub(super) birthday: Birthday,
    sockets: Vec<Option<Extra>>,
}

struct Extra {
    io: Arc<UdpSocket>,
    /// The system's own, for when the socket is taken over.
    ttl: u32,
    _reader: AbortOnDrop,
}

impl Punch {
    pub(super) fn new(birthday: Birthday) -> Self {
        Self { birthday, sockets: Vec::new() }
    }

    /// Sends a check from an extra socket, which is opened on its first. A failure is a loss, as with every check.
    pub(super) fn knock(
        &mut self,
        index: usize,
        to: SocketAddr,
        check: &[u8],
        (key, knocked): (Key, &mpsc::Sender<Knocked>),
    ) {
        self.sockets.resize_with(SOCKETS.max(index + 1), || None);
        let sent = match &self.sockets[index] {
            Some(extra) => extra.io.try_send_to(check, to).map(drop),
            None => {
                Extra::open(index, to, check, key, knocked).map(|extra| self.sockets[index] = Some(extra))
            }
        };
        if let Err(error) = sent {
            tracing::trace!(%error, index, "knock not sent");
        }
    }

    pub(super) fn close(&mut self) {
        self.sockets.clear();
    }

    /// Hands over the socket that something came to.
    pub(super) fn take(&mut self, knocked: &Knocked) -> Option<Arc<UdpSocket>> {
        let extra = self.sockets.get_mut(knocked.index)?.take()?;
        extra.io.set_ttl(extra.ttl).ok()?;
        Some(extra.io)
    }

    /// Ends the running attempt.
    pub(super) fn stop(&mut self, now: Instant) {
        if self.birthday.stop(false, now) == Some(Action::Close) {
            self.close();
        }
    }
}

impl Extra {
    fn open(
        index: usize,
        to: SocketAddr,
        check: &[u8],
        key: Key,
        knocked: &mpsc::Sender<Knocked>,
    ) -> std::io::Result<Self> {
        let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.set_nonblocking(true)?;
        let ttl = socket.ttl()?;
        socket.set_ttl(KNOCK_TTL)?;
        socket.send_to(check, to)?;
        let io = Arc::new(UdpSocket::from_std(socket)?);
        let (reading, knocked) = (io.clone(), knocked.clone());
        let reader = tokio::spawn(async move {
            let mut buffer = [0; MAX_STUN];
            loop {
                // An error is an ICMP message about some knock, as is to be expected.
                let Ok((length, source)) = reading.recv_from(&mut buffer).await else { continue };
                let bytes = Bytes::copy_from_slice(&buffer[..length]);
                if knocked.send(Knocked { key, index, source, bytes }).await.is_err() {
                    return;
                }
            }
        });
        Ok(Self { io, ttl, _reader: AbortOnDrop(reader) })
    }
}

impl Driver {
    /// Does what birthday probing has due for a remote. One host probes for one remote at a time: the budget is the router's.
    pub(super) fn punch(&mut self, key: Key, now: Instant) {
        let probing = |state: &RemoteState| {
            state.selected.is_none()
                && state.punch.as_ref().is_some_and(|punch| punch.birthday.is_running(now))
        };
        let busy = self.remotes.iter().any(|(other, state)| *other != key && probing(state));
        let Some(state) = self.remotes.get_mut(&key) else { return };
        let (Some(punch), Some(introduced)) = (&mut state.punch, &mut state.introduction) else { return };
        if state.selected.is_some() {
            return;
        }
        if busy && punch.birthday.poll_timeout().is_some_and(|due| due <= now) {
            punch.stop(now);
            return;
        }
        while let Some(action) = punch.birthday.poll(now) {
            match action {
                Action::Close => punch.close(),
                Action::Probe(to) => {
                    if !self.probes.take(now) {
                        punch.stop(now);
                        return;
                    }
                    if let (Some(check), Some(socket)) =
                        (introduced.agent.stray_check(), self.socket.socket_for(to))
                    {
                        self.socket.send_stun(socket, to, &check);
                    }
                }
                Action::Knock(index, to) => {
                    if let Some(check) = introduced.agent.stray_check() {
                        punch.knock(index, to, &check, (key, &self.knocked_tx));
                    }
                }
            }
        }
    }

    /// Something came to an extra socket. If it is a check of the other side, the two have met: the socket is adopted, and what follows is the
    /// agent's.
    pub(super) fn handle_knock(&mut self, knocked: &Knocked, now: Instant) {
        let Ok(message) = Received::parse(&knocked.bytes) else { return };
        let Some(state) = self.remotes.get_mut(&knocked.key) else { return };
        let (Some(punch), Some(introduced)) = (&mut state.punch, &mut state.introduction) else { return };
        if message.class() != Class::Request || !introduced.agent.is_authentic(&message) {
            return;
        }
        let Some(socket) = punch.take(knocked).and_then(|io| self.socket.adopt(io)) else { return };
        punch.stop(now);
        tracing::debug!(peer = %state.peer.short(), source = %knocked.source, "met by birthday probing");
        state.adopted.push(socket);
        let id = SocketId(socket as u32);
        introduced.agent.add_socket(id, knocked.source.into(), &[], now);
        introduced.agent.handle_message(id, knocked.source, &message, now);
        self.pump(knocked.key, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_holds_for_any_thirty_seconds() {
        let start = Instant::now();
        let mut budget = Budget::default();
        let taken = (0..5000).filter(|step| budget.take(start + Duration::from_millis(4) * *step)).count();
        assert_eq!(taken, PROBES, "20 s of asking");
        assert!(budget.take(start + ENTRY_LIFETIME));
    }
}
