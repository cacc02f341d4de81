//! Who is bound where, over UDP or a stream, and which channel joins whom. Pure.
//!
//! Every relay thread holds a table of its own. The owner of the introductions sends the same [`Change`]s to all of
//! them; a binding that one thread has learnt goes to the others as [`Change::Bound`]. Bindings are ordered by
//! their sequence, so tables agree in the end whatever the order in which they hear of them.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rendezvous_wire::PeerId;
use rendezvous_wire::message::RegistrationId;
use rendezvous_wire::relay::Channel;
use rendezvous_wire::stun::{BindRequest, Key, Received};

use super::meters::{MeterId, Meters, Shares, Used};
use crate::limits::{Bucket, Rate};

/// Both ends of a flow as one relay thread sees it: the other side's address, and how to reach it so that it
/// recognises the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    /// The other side.
    pub remote: SocketAddr,
    /// Our address that its packets were sent to, where the system tells.
    pub local: Option<IpAddr>,
    /// Our socket that they came in on; the same number is the same port on every thread.
    pub socket: usize,
}

/// A TLS stream's number, the server's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamId(pub u64);

/// How a bound peer is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// In datagrams.
    Udp(Flow),
    /// In records on a stream.
    Stream(StreamId),
}

/// Where a frame came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Sender {
    /// A datagram's source.
    Udp(SocketAddr),
    /// A stream.
    Stream(StreamId),
}

impl From<Flow> for Via {
    fn from(flow: Flow) -> Self {
        Self::Udp(flow)
    }
}

impl From<SocketAddr> for Sender {
    fn from(source: SocketAddr) -> Self {
        Self::Udp(source)
    }
}

impl From<StreamId> for Sender {
    fn from(stream: StreamId) -> Self {
        Self::Stream(stream)
    }
}

impl Via {
    fn is(self, sender: Sender) -> bool {
        match (self, sender) {
            (Self::Udp(flow), Sender::Udp(source)) => flow.remote == source,
            (Self::Stream(own), Sender::Stream(stream)) => own == stream,
            _ => false,
        }
    }
}

/// A binding made or renewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bound {
    /// Whose.
    pub registration: RegistrationId,
    /// Of the bind request, or of the stream's binding: the highest is in force.
    pub sequence: u64,
    /// Where to.
    pub via: Via,
    /// When the bind request came.
    pub at: Instant,
}

/// A change that every table must hear of.
#[derive(Debug, Clone)]
pub enum Change {
    /// This registration may bind.
    Admit {
        /// Its number.
        registration: RegistrationId,
        /// Authenticates its bind requests.
        key: Key,
        /// Whose it is: what it sends is counted under this.
        peer: PeerId,
    },
    /// This registration has ended. Its channels are closed one by one.
    Remove(RegistrationId),
    /// This channel joins these two.
    Open {
        /// Free until now.
        channel: Channel,
        /// Asker and target.
        members: [RegistrationId; 2],
    },
    /// This channel is gone.
    Close(Channel),
    /// Another thread has seen a bind request, or a stream has bound itself.
    Bound(Bound),
    /// Nothing is carried from this key or to it, or it is again.
    Exhausted(PeerId, bool),
}

/// What becomes of a run of frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passage {
    /// It goes there.
    To(Via),
    /// No such channel, or not from its ends, or an end is not bound.
    Nowhere,
    /// The sender is over what it may send.
    Over,
}

/// What a bind request led to.
#[derive(Debug)]
pub enum Binding<'a> {
    /// Bound; tell the other threads, answer under this key.
    Bound(Bound, &'a Key),
    /// Seen before, from where the binding is: a retransmission. Answer again.
    Repeated(&'a Key),
    /// Not under the registration's key, or the registration is unknown here.
    Unauthenticated,
    /// Replayed from elsewhere, or too often: not worth an answer.
    Ignored,
}

/// The relay's table.
#[derive(Debug)]
pub struct Table {
    lease: Duration,
    binding: Rate,
    registrations: HashMap<RegistrationId, Registration>,
    channels: Channels,
    meters: Meters,
}

type Channels = HashMap<Channel, [End; 2], BuildHasherDefault<NumberHasher>>;

#[derive(Debug)]
struct Registration {
    key: Key,
    meter: MeterId,
    requests: Bucket,
    binding: Option<Bound>,
    channels: Vec<Channel>,
}

/// One member of a channel, with a copy of its binding: a frame is forwarded after one look-up.
#[derive(Debug)]
struct End {
    member: RegistrationId,
    meter: MeterId,
    binding: Option<(Via, Instant)>,
}

impl End {
    fn via(&self, now: Instant) -> Option<Via> {
        self.binding.filter(|(_, until)| *until > now).map(|(via, _)| via)
    }
}

impl Table {
    /// An empty table. Bindings live for `lease`; `binding` bounds the bind requests of one registration.
    pub fn new(lease: Duration, binding: Rate) -> Self {
        let (registrations, channels) = (HashMap::new(), HashMap::default());
        Self { lease, binding, registrations, channels, meters: Meters::default() }
    }

    /// From now on with this lease and this bound of bind requests.
    pub fn set_limits(&mut self, lease: Duration, binding: Rate) {
        (self.lease, self.binding) = (lease, binding);
    }

    /// From now on keys may send so much.
    pub fn set_shares(&mut self, shares: Shares) {
        self.meters.set_shares(shares);
    }

    /// What keys have used since this was last asked.
    pub fn take_used(&mut self) -> Vec<(PeerId, Used)> {
        self.meters.take_used()
    }

    /// How many channels are open.
    pub fn channels(&self) -> usize {
        self.channels.len()
    }

    /// Takes a change from elsewhere.
    pub fn apply(&mut self, change: Change) {
        match change {
            Change::Admit { registration, key, peer } => {
                let (requests, channels) = (Bucket::default(), Vec::new());
                let meter = self.meters.enter(peer);
                let fresh = Registration { key, meter, requests, binding: None, channels };
                if let Some(former) = self.registrations.insert(registration, fresh) {
                    self.meters.leave(former.meter);
                }
            }
            Change::Remove(registration) => {
                if let Some(gone) = self.registrations.remove(&registration) {
                    for channel in gone.channels {
                        self.close(channel);
                    }
                    self.meters.leave(gone.meter);
                }
            }
            Change::Exhausted(peer, exhausted) => self.meters.set_exhausted(peer, exhausted),
            Change::Open { channel, members } => self.open(channel, members),
            Change::Close(channel) => self.close(channel),
            Change::Bound(bound) => self.learn(bound),
        }
    }

    /// Judges a bind request that came over `flow`, and binds.
    pub fn bind(
        &mut self,
        request: BindRequest,
        message: &Received<'_>,
        flow: Flow,
        now: Instant,
    ) -> Binding<'_> {
        let Some(registration) = self.registrations.get_mut(&request.registration) else {
            return Binding::Unauthenticated;
        };
        if !message.verify(&registration.key) {
            return Binding::Unauthenticated;
        }
        if let Some(last) = registration.binding
            && request.sequence <= last.sequence
        {
            let repeated = last.via == flow.into() && now < last.at + self.lease;
            return if repeated { Binding::Repeated(&registration.key) } else { Binding::Ignored };
        }
        // Only fresh requests count: forged and replayed ones must not spend what the peer needs.
        if !registration.requests.take(self.binding, now) {
            return Binding::Ignored;
        }
        let (registration_id, sequence) = (request.registration, request.sequence);
        let bound = Bound { registration: registration_id, sequence, via: flow.into(), at: now };
        registration.bind(bound, self.lease, &mut self.channels);
        Binding::Bound(bound, &registration.key)
    }

    /// Where a frame on `channel` that came from `sender` goes: to the other member's binding, if both are bound and
    /// the sender is one of the two. `None`: nowhere.
    pub fn route(&self, channel: Channel, sender: impl Into<Sender>, now: Instant) -> Option<Via> {
        self.ends(channel, sender.into(), now).map(|(via, _)| via)
    }

    /// The same for a run of frames of so many bytes, which are counted.
    pub fn carry(
        &mut self,
        channel: Channel,
        sender: impl Into<Sender>,
        bytes: usize,
        now: Instant,
    ) -> Passage {
        match self.ends(channel, sender.into(), now) {
            None => Passage::Nowhere,
            Some((via, [from, to])) if self.meters.pass(from, to, bytes, now) => Passage::To(via),
            Some(_) => Passage::Over,
        }
    }

    /// Where to, and the meters of both ends, the sender's first.
    fn ends(&self, channel: Channel, sender: Sender, now: Instant) -> Option<(Via, [MeterId; 2])> {
        let [one, other] = self.channels.get(&channel)?;
        let (own, far) = (one.via(now)?, other.via(now)?);
        match sender {
            sender if own.is(sender) => Some((far, [one.meter, other.meter])),
            sender if far.is(sender) => Some((own, [other.meter, one.meter])),
            _ => None,
        }
    }

    fn open(&mut self, channel: Channel, members: [RegistrationId; 2]) {
        let known = members.map(|member| Some((member, self.registrations.get(&member)?.meter)));
        let [Some(one), Some(other)] = known else { return };
        let ends = [one, other].map(|(member, meter)| {
            let registration = self.registrations.get_mut(&member);
            let binding = registration.and_then(|registration| {
                registration.channels.push(channel);
                registration.binding
            });
            End { member, meter, binding: binding.map(|bound| (bound.via, bound.at + self.lease)) }
        });
        self.channels.insert(channel, ends);
    }

    fn close(&mut self, channel: Channel) {
        let Some(ends) = self.channels.remove(&channel) else { return };
        for end in ends {
            if let Some(registration) = self.registrations.get_mut(&end.member) {
                registration.channels.retain(|other| *other != channel);
            }
        }
    }

    fn learn(&mut self, bound: Bound) {
        let Some(registration) = self.registrations.get_mut(&bound.registration) else { return };
        let is_newer = |last: Bound| match bound.sequence.cmp(&last.sequence) {
            Ordering::Greater => true,
            // A stream renews what it has bound.
            Ordering::Equal => bound.via == last.via && bound.at > last.at,
            Ordering::Less => false,
        };
        if registration.binding.is_none_or(is_newer) {
            registration.bind(bound, self.lease, &mut self.channels);
        }
    }
}

impl Registration {
    /// Takes a binding, also into the channels of this registration.
    fn bind(&mut self, bound: Bound, lease: Duration, channels: &mut Channels) {
        self.binding = Some(bound);
        let copy = Some((bound.via, bound.at + lease));
        for channel in &self.channels {
            let Some(ends) = channels.get_mut(channel) else { continue };
            for end in ends.iter_mut().filter(|end| end.member == bound.registration) {
                end.binding = copy;
            }
        }
    }
}

/// Hashes channel numbers, which are random already and chosen by us: a multiplication spreads them over the bits
/// that the map looks at.
#[derive(Debug, Default)]
struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32(u32::from(*byte));
        }
    }

    fn write_u32(&mut self, number: u32) {
        // 2^64 divided by the golden ratio (Fibonacci hashing).
        self.0 = (self.0.rotate_left(5) ^ u64::from(number)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
