//! Flows as the kernel's connection tracking remembers them. Pure.

use std::hash::Hash;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rustc_hash::FxHashMap;

use super::packet::{Packet, Protocol};

/// `nf_conntrack_udp_timeout`: a flow that has not been answered, or is young.
const UNREPLIED: Duration = Duration::from_secs(30);
/// `nf_conntrack_udp_timeout_stream`: a flow that is answered, and is used beyond [`STREAM_AGE`].
const REPLIED: Duration = Duration::from_secs(120);
/// Since when an answered flow counts as a stream (`nf_conntrack_udp_packet` in the kernel).
const STREAM_AGE: Duration = Duration::from_secs(2);

/// One direction of a flow: packets as they come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Tuple {
    pub(super) protocol: Protocol,
    pub(super) source: SocketAddr,
    pub(super) destination: SocketAddr,
}

impl Tuple {
    pub(super) fn of(packet: &Packet) -> Self {
        Self { protocol: packet.protocol, source: packet.source, destination: packet.destination }
    }

    pub(super) fn inverse(self) -> Self {
        Self { source: self.destination, destination: self.source, ..self }
    }
}

/// Which way a packet of a flow goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// As the first one.
    Original,
    /// The other way.
    Reply,
}

#[derive(Debug)]
struct Flow {
    original: Tuple,
    reply: Tuple,
    began: Instant,
    expires: Instant,
    replied: bool,
}

/// What a tracked packet turns into when it leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) way: Way,
    pub(super) source: SocketAddr,
    pub(super) destination: SocketAddr,
}

/// The table of one router.
#[derive(Debug)]
pub(super) struct Conntrack {
    unreplied: Duration,
    replied: Duration,
    flows: Vec<Option<Flow>>,
    free: Vec<u32>,
    tuples: FxHashMap<Tuple, (u32, Way)>,
    /// Translated flows of an inside endpoint, the latest last (the kernel's `nf_nat_bysource`).
    sources: FxHashMap<(Protocol, SocketAddr), Vec<u32>>,
    /// Translated flows by reflexive port.
    ports: FxHashMap<(Protocol, u16), Vec<u32>>,
}

impl Conntrack {
    /// `lifetime` takes the place of both of the kernel's timeouts.
    pub(super) fn new(lifetime: Option<Duration>) -> Self {
        Self {
            unreplied: lifetime.unwrap_or(UNREPLIED),
            replied: lifetime.unwrap_or(REPLIED),
            flows: Vec::new(),
            free: Vec::new(),
            tuples: FxHashMap::default(),
            sources: FxHashMap::default(),
            ports: FxHashMap::default(),
        }
    }

    /// The flow that a packet belongs to, kept alive by it.
    pub(super) fn track(&mut self, tuple: Tuple, now: Instant) -> Option<Found> {
        let (id, way) = self.find(tuple, now)?;
        let (unreplied, replied) = (self.unreplied, self.replied);
        let flow = self.flows[id as usize].as_mut()?;
        let answered = flow.replied;
        flow.replied |= way == Way::Reply;
        let is_stream = answered && now > flow.began + STREAM_AGE;
        flow.expires = now + if is_stream { replied } else { unreplied };
        let onward = match way {
            Way::Original => flow.reply.inverse(),
            Way::Reply => flow.original.inverse(),
        };
        Some(Found { way, source: onward.source, destination: onward.destination })
    }

    /// Whether packets with this tuple belong to a flow already.
    pub(super) fn is_used(&mut self, tuple: Tuple, now: Instant) -> bool {
        self.find(tuple, now).is_some()
    }

    /// Remembers a flow; false when either direction is another flow's.
    pub(super) fn insert(&mut self, original: Tuple, reply: Tuple, now: Instant) -> bool {
        if self.is_used(original, now) || self.is_used(reply, now) {
            return false;
        }
        let flow = Flow { original, reply, began: now, expires: now + self.unreplied, replied: false };
        let id = if let Some(id) = self.free.pop() {
            self.flows[id as usize] = Some(flow);
            id
        } else {
            self.flows.push(Some(flow));
            (self.flows.len() - 1) as u32
        };
        self.tuples.insert(original, (id, Way::Original));
        self.tuples.insert(reply, (id, Way::Reply));
        if original.source != reply.destination {
            self.sources.entry((original.protocol, original.source)).or_default().push(id);
            self.ports.entry((original.protocol, reply.destination.port())).or_default().push(id);
        }
        true
    }

    /// Whether any flow is translated to this port.
    pub(super) fn holds(&mut self, protocol: Protocol, port: u16, now: Instant) -> bool {
        loop {
            let Some(id) = self.ports.get(&(protocol, port)).and_then(|ids| ids.last()).copied() else {
                return false;
            };
            match self.flows[id as usize].as_ref() {
                Some(flow) if flow.expires > now => return true,
                _ => self.remove(id),
            }
        }
    }

    /// What the latest flow of an inside endpoint is translated to.
    pub(super) fn latest(
        &mut self,
        protocol: Protocol,
        inside: SocketAddr,
        now: Instant,
    ) -> Option<SocketAddr> {
        loop {
            let id = *self.sources.get(&(protocol, inside))?.last()?;
            match self.flows[id as usize].as_ref() {
                Some(flow) if flow.expires > now => return Some(flow.reply.destination),
                _ => self.remove(id),
            }
        }
    }

    /// Whether there are as many flows as that.
    pub(super) fn holds_as_many(&mut self, most: usize, now: Instant) -> bool {
        // Those that have expired are counted as well until somebody looks, which takes a while.
        self.flows.len() - self.free.len() >= most && self.count(now) >= most
    }

    /// How many flows are alive.
    pub(super) fn count(&mut self, now: Instant) -> usize {
        let dead = |flow: &Option<Flow>| flow.as_ref().is_some_and(|flow| flow.expires <= now);
        let expired: Vec<u32> =
            (0..).zip(&self.flows).filter(|(_, flow)| dead(flow)).map(|(id, _)| id).collect();
        expired.into_iter().for_each(|id| self.remove(id));
        self.flows.len() - self.free.len()
    }

    fn find(&mut self, tuple: Tuple, now: Instant) -> Option<(u32, Way)> {
        let (id, way) = *self.tuples.get(&tuple)?;
        if self.flows[id as usize].as_ref().is_some_and(|flow| flow.expires > now) {
            return Some((id, way));
        }
        self.remove(id);
        None
    }

    fn remove(&mut self, id: u32) {
        let Some(flow) = self.flows[id as usize].take() else { return };
        self.free.push(id);
        self.tuples.remove(&flow.original);
        self.tuples.remove(&flow.reply);
        let protocol = flow.original.protocol;
        forget(&mut self.sources, (protocol, flow.original.source), id);
        forget(&mut self.ports, (protocol, flow.reply.destination.port()), id);
    }
}

fn forget<K: Hash + Eq>(lists: &mut FxHashMap<K, Vec<u32>>, key: K, id: u32) {
    if let Some(ids) = lists.get_mut(&key) {
        ids.retain(|other| *other != id);
        if ids.is_empty() {
            lists.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuple(source: &str, destination: &str) -> Tuple {
        let [source, destination] = [source, destination].map(|text| text.parse().unwrap());
        Tuple { protocol: Protocol::Udp, source, destination }
    }

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn a_translated_flow_is_found_from_both_ends_and_ends_with_silence() {
        let start = Instant::now();
        let mut table = Conntrack::new(None);
        let out = tuple("192.168.1.2:5", "203.0.113.1:9");
        let back = tuple("203.0.113.1:9", "198.51.100.1:7");
        assert!(table.insert(out, back, start) && !table.insert(out, out.inverse(), start));
        let found = table.track(out, start).unwrap();
        assert_eq!((found.source, found.destination), (back.destination, out.destination));
        let found = table.track(back, start + 29 * S).unwrap();
        assert_eq!((found.way, found.source, found.destination), (Way::Reply, back.source, out.source));
        assert_eq!(table.latest(Protocol::Udp, out.source, start + 29 * S), Some(back.destination));
        assert_eq!(table.count(start + 58 * S), 1);
        assert!(table.holds_as_many(1, start + 58 * S) && !table.holds_as_many(2, start + 58 * S));
        assert!(
            table.track(out, start + 59 * S).is_none()
                && table.latest(Protocol::Udp, out.source, start).is_none()
        );
        assert!(!table.holds_as_many(1, start + 59 * S));
        assert_eq!(table.count(start + 59 * S), 0);
        assert!(table.tuples.is_empty() && table.sources.is_empty() && table.ports.is_empty());
    }

    #[test]
    fn an_answered_flow_lives_longer_once_it_is_a_stream() {
        let start = Instant::now();
        let out = tuple("192.168.1.2:5", "203.0.113.1:9");
        let lives = |use_after: Duration, until: Duration| {
            let mut table = Conntrack::new(None);
            table.insert(out, out.inverse(), start);
            table.track(out.inverse(), start + S);
            table.track(out, start + use_after);
            table.is_used(out, start + until)
        };
        assert!(lives(2 * S, 31 * S) && !lives(2 * S, 33 * S));
        assert!(lives(3 * S, 122 * S) && !lives(3 * S, 124 * S));
    }
}
