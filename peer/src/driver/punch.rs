//! The sockets of birthday probing ([`peer_agent::birthday`]): opened on the hard side by the hundred, all but the winner closed again.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use peer_agent::birthday::{Action, Birthday, PROBES, SOCKETS};
use rendezvous_wire::stun::MAX_STUN;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;

use super::{AbortOnDrop, Key};

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
    pub(super) key: Key,
    index: usize,
    pub(super) source: SocketAddr,
    pub(super) bytes: Bytes,
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
