//! Data between the two, as QUIC would send it, and what a path socket sees of it.
//!
//! Everything is acknowledged at once over the path of the moment; nothing is sent again.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use peer_agent::{Event, Traffic};

use super::{A, B, Packet, World};

/// First byte of data; not STUN.
const DATA: u8 = 0x40;
/// Asks for an acknowledgement, or is one.
const PING: u8 = 0;
const ACK: u8 = 1;

pub fn is_data(datagram: &[u8]) -> bool {
    datagram.first() == Some(&DATA)
}

/// Where a relay's frames come from.
fn relay() -> SocketAddr {
    "192.0.2.251:3478".parse().unwrap()
}

/// One side's data.
#[derive(Debug, Default)]
pub struct Flow {
    /// When the next ping leaves.
    pub next: Option<Duration>,
    /// Between two.
    pub every: Duration,
    /// Number of the next.
    serial: u32,
    /// Pings on their way, and when they left.
    open: BTreeMap<u32, Duration>,
    /// When each acknowledgement came, and how long it took.
    pub answered: Vec<(Duration, Duration)>,
    /// Over which path data leaves: direct, relay.
    direct: bool,
    doubtful: bool,
    unanswered: Option<Duration>,
    last_sent: Duration,
    relayed: bool,
    /// Datagrams that left over either.
    pub sent: [usize; 2],
}

impl Flow {
    /// Follows the path as a path socket does.
    pub fn note_event(&mut self, event: &Event) {
        match event {
            Event::Selected(_) => (self.direct, self.doubtful, self.unanswered) = (true, false, None),
            Event::Deselected { .. } => self.direct = false,
            Event::Doubtful { .. } => self.doubtful = true,
            Event::Trusted { .. } => self.doubtful = false,
            _ => {}
        }
    }

    /// Over which paths it sends now: direct, relay.
    pub fn uses(&self) -> [bool; 2] {
        [self.direct, !self.direct || self.doubtful]
    }

    /// The longest time without an acknowledgement, within these bounds.
    pub fn gap(&self, from: Duration, to: Duration) -> Duration {
        let within = self.answered.iter().map(|(at, _)| *at).filter(|at| (from..=to).contains(at));
        let mut last = from;
        let gaps = within.chain([to]).map(|at| at - std::mem::replace(&mut last, at));
        gaps.max().unwrap_or_default()
    }
}

impl World {
    /// `side` sends a ping every so often from now on.
    pub fn ping(&mut self, side: usize, every: Duration) {
        let flow = &mut self.peers[side].flow;
        (flow.every, flow.next) = (every, Some(self.now));
    }

    /// One ping.
    pub fn ping_once(&mut self, side: usize) {
        self.ping(side, Duration::from_secs(1));
        self.drive_flow(side);
        self.peers[side].flow.next = None;
    }

    /// What is due of a side's data, then what its agent should know of it.
    pub(super) fn drive_flow(&mut self, side: usize) {
        let now = self.now;
        while let Some(at) = self.peers[side].flow.next.filter(|next| *next <= now) {
            let flow = &mut self.peers[side].flow;
            flow.next = Some(at + flow.every);
            flow.serial += 1;
            let serial = flow.serial;
            flow.open.insert(serial, now);
            self.send_data(side, PING, serial);
        }
        self.tell_agent(side);
    }

    fn tell_agent(&mut self, side: usize) {
        let Some(agent) = &self.peers[side].agent else { return };
        let alive = agent.alive().map(|alive| alive.saturating_duration_since(self.origin));
        let flow = &mut self.peers[side].flow;
        if let (Some(since), Some(alive)) = (flow.unanswered, alive)
            && since <= alive
        {
            flow.unanswered = (flow.last_sent > alive).then_some(self.now);
        }
        let relayed = std::mem::take(&mut flow.relayed);
        let unanswered_since = flow.unanswered;
        let unanswered_since = unanswered_since.map(|since| self.instant(since));
        self.with_agent(side, |agent, now| {
            agent.handle_traffic(Traffic { unanswered_since, relayed }, now);
        });
    }

    fn send_data(&mut self, side: usize, what: u8, serial: u32) {
        let mut data = vec![DATA, what];
        data.extend(serial.to_be_bytes());
        let [direct, relayed] = self.peers[side].flow.uses();
        if let (true, Some(path)) = (direct, self.peers[side].selected()) {
            let now = self.now;
            let peer = &mut self.peers[side];
            peer.flow.sent[0] += 1;
            peer.flow.last_sent = now;
            peer.flow.unanswered.get_or_insert(now);
            let (_, local) = *peer.sockets.iter().find(|(id, _)| *id == path.socket).unwrap();
            self.send(side, local, path.remote, data.clone());
        }
        if relayed {
            self.peers[side].flow.sent[1] += 1;
            let to = self.peers[1 - side].sockets[0].1;
            let delay = self.line.delay[A].max(self.line.delay[B]);
            self.put(delay, Packet { to, from: relay(), data });
        }
    }

    /// Data has come to the inside address `to`.
    pub(super) fn deliver_data(&mut self, from: SocketAddr, to: SocketAddr, data: &[u8]) {
        let owns = |side: &usize| self.peers[*side].sockets.iter().any(|(_, local)| *local == to);
        let Some(side) = [A, B].into_iter().find(owns) else { return };
        let selected = self.peers[side].agent.as_ref().and_then(peer_agent::Agent::selected);
        let now = self.now;
        let flow = &mut self.peers[side].flow;
        if from == relay() {
            flow.relayed |= flow.direct;
        } else if selected.is_some_and(|selected| selected.path.remote == from) {
            flow.unanswered = None;
        }
        let serial = u32::from_be_bytes(data[2..6].try_into().unwrap());
        if data[1] == PING {
            self.send_data(side, ACK, serial);
        } else if let Some(sent) = flow.open.remove(&serial) {
            flow.answered.push((now, now - sent));
        }
        self.tell_agent(side);
    }
}
