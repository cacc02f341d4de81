//! The server's judgement in one place: registrations, introductions, leases and quotas. Pure.
//!
//! Requests and events go in through `handle_*`, each with the moment at which it happened; what must be done comes
//! out of [`Broker::poll_action`], in the order in which it must be done. Both notices of an introduction come out
//! of the same request, right behind the opening of its channel.

mod quota;

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::time::{Instant, SystemTime};

use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};
use rendezvous_wire::PeerId;
use rendezvous_wire::message::{
    Introduce, IntroductionId, Limit, NotIntroduced, Notice, Register, Registered, RegistrationId, Request,
};
use rendezvous_wire::stun::Key;

use crate::directory::{Directory, RegisterError, Registration};
use crate::introductions::{Ended, Introductions, PASSWORD_BYTES, Party, secret};
use crate::limits::{Bucket, Limits, PrefixBuckets, Rate, SourceBuckets};
use crate::relay::table::{Bound, Change, StreamId, Via};
use crate::usage::{Month, Usage};

/// Something for the shell to do.
#[derive(Debug)]
pub enum Action {
    /// Tell the relay. Comes before every notice that depends on it.
    Relay(Change),
    /// Send a notice to a peer, now.
    Notify(RegistrationId, Notice),
    /// Close this signalling connection: a newer registration of the same peer has taken its place.
    Evict(RegistrationId),
    /// Close this signalling connection: its peer was banned, for this reason.
    Dismiss(RegistrationId, String),
}

/// The connection over which a peer registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line {
    /// Its source.
    pub observed: SocketAddr,
    /// A stream binds the relay by itself; QUIC does not, and shows where the peer's UDP socket is.
    pub binding: Option<StreamBinding>,
}

/// A binding that a stream makes or renews.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamBinding {
    /// The stream.
    pub stream: StreamId,
    /// Of the same count as the sequence of bind requests.
    pub sequence: u64,
}

impl From<SocketAddr> for Line {
    fn from(observed: SocketAddr) -> Self {
        Self { observed, binding: None }
    }
}

/// How a signalling connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Departure {
    /// The peer said goodbye: everything of it ends at once.
    Goodbye,
    /// It broke. What the relay holds for the peer lives on until its lease lapses, so that relayed sessions survive.
    Lost,
}

/// A second [`Request::Register`] on one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a connection registers once")]
pub struct RegisteredTwice;

/// Owns the directory and the introductions.
#[derive(Debug)]
pub struct Broker {
    limits: Limits,
    reflection_ports: [u16; 2],
    rng: StdRng,
    directory: Directory,
    introductions: Introductions,
    /// Of every registration that the relay knows, online or lost.
    leases: HashMap<RegistrationId, Lease>,
    /// The same by key and [`Register::instance`].
    processes: HashMap<(PeerId, u64), RegistrationId>,
    /// The lost ones, by the end of their lease.
    lapsing: BTreeSet<(Instant, RegistrationId)>,
    introducing_per_source: PrefixBuckets,
    registering: SourceBuckets,
    /// Keys of which there is a lease.
    members: HashMap<PeerId, Member>,
    banned: HashSet<PeerId>,
    usage: Usage,
    /// The server goes away, in so many seconds.
    leaving: Option<u32>,
    actions: VecDeque<Action>,
}

/// What all leases of one key have in common.
#[derive(Debug, Default)]
struct Member {
    leases: usize,
    introducing: Bucket,
    /// Nothing more is carried for it this month.
    exhausted: bool,
    /// When it was last told that a limit holds it back.
    told: Option<Instant>,
}

#[derive(Debug)]
struct Lease {
    process: (PeerId, u64),
    /// Authenticates bind requests.
    password: String,
    until: Instant,
    online: bool,
    meeting: Bucket,
}

impl Broker {
    /// An empty broker. `seed` must be secret and random outside of tests: every key and credential comes from it.
    pub fn new(limits: Limits, reflection_ports: [u16; 2], seed: [u8; 32]) -> Self {
        let mut rng = StdRng::from_seed(seed);
        let keys = [rng.next_u64(), rng.next_u64()];
        Self {
            introducing_per_source: PrefixBuckets::new(introducing(&limits), keys),
            registering: SourceBuckets::new(limits.registering, keys),
            members: HashMap::new(),
            banned: HashSet::new(),
            usage: Usage::new(Month::of(SystemTime::UNIX_EPOCH), []),
            leaving: None,
            limits,
            reflection_ports,
            rng,
            directory: Directory::default(),
            introductions: Introductions::default(),
            leases: HashMap::new(),
            processes: HashMap::new(),
            lapsing: BTreeSet::new(),
            actions: VecDeque::new(),
        }
    }

    /// The directory, to look at.
    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    /// The introductions, to look at.
    pub fn introductions(&self) -> &Introductions {
        &self.introductions
    }

    /// A peer that has proved `peer` registers over a connection. One that has a registration keeps it and all that hangs on it; its
    /// former connection is of no more use.
    pub fn handle_register(
        &mut self,
        peer: PeerId,
        line: impl Into<Line>,
        says: Register,
        now: Instant,
    ) -> Result<RegistrationId, RegisterError> {
        let Line { observed, binding } = line.into();
        let process = (peer, says.instance);
        let known = self.processes.get(&process).copied();
        self.check(peer, known.is_some(), &says, now)?;
        // The lost ones count as well, or connecting and vanishing would fill the memory.
        if known.is_none() && self.leases.len() >= self.limits.registrations.saturating_mul(2) {
            return Err(RegisterError::Full);
        }
        if let Some(oldest) = self.directory.admit(peer, observed, known, &self.limits)? {
            self.handle_departure(oldest, Departure::Lost, now);
            self.actions.push_back(Action::Evict(oldest));
        }
        let registration = match known {
            Some(registration) => registration,
            None => self.grant(process, now)?,
        };
        let Some(lease) = self.leases.get_mut(&registration) else { return Err(RegisterError::Full) };
        self.lapsing.remove(&(lease.until, registration));
        lease.online = true;
        lease.until = lease.until.max(now + self.limits.lease);
        let registered = Registered {
            registration,
            key: lease.password.clone(),
            observed,
            reflection_ports: self.reflection_ports,
            lease: u32::try_from(self.limits.lease.as_secs()).unwrap_or(u32::MAX).max(1),
        };
        self.directory.remove(registration);
        self.directory.insert(registration, peer, (observed, binding.is_none()), says);
        if let Some(binding) = binding {
            self.handle_stream_bound(registration, binding, now);
        }
        self.notify(registration, Notice::Registered(registered));
        if let Some(seconds) = self.leaving {
            self.notify(registration, Notice::Leaving(seconds));
        }
        if let Some(most) = self.limits.relay_month().filter(|_| self.is_exhausted(peer)) {
            self.notify(registration, Notice::Limited(Limit::Month(most)));
        }
        Ok(registration)
    }

    fn check(
        &mut self,
        peer: PeerId,
        known: bool,
        says: &Register,
        now: Instant,
    ) -> Result<(), RegisterError> {
        if self.banned.contains(&peer) {
            return Err(RegisterError::Banned);
        }
        if self.leaving.is_some() && !known {
            return Err(RegisterError::Leaving);
        }
        if says.candidates.len() > self.limits.candidates {
            return Err(RegisterError::Candidates(self.limits.candidates));
        }
        if !self.registering.take(peer.into(), now) {
            return Err(RegisterError::TooOften);
        }
        Ok(())
    }

    /// A registration that the relay knows.
    fn grant(&mut self, process: (PeerId, u64), now: Instant) -> Result<RegistrationId, RegisterError> {
        let registration = self.free_id();
        let password = secret::<PASSWORD_BYTES>(&mut self.rng);
        // Base64 is always a valid password.
        let key = Key::new(&password).map_err(|_| RegisterError::Full)?;
        let until = now + self.limits.lease;
        let lease = Lease { process, password, until, online: true, meeting: Bucket::default() };
        self.leases.insert(registration, lease);
        self.processes.insert(process, registration);
        let peer = process.0;
        let exhausted = self.is_exhausted(peer);
        let member = self.members.entry(peer).or_default();
        member.leases += 1;
        member.exhausted = exhausted;
        self.actions.push_back(Action::Relay(Change::Admit { registration, key, peer }));
        if exhausted {
            self.actions.push_back(Action::Relay(Change::Exhausted(peer, true)));
        }
        Ok(registration)
    }

    /// A registered peer asks for something.
    pub fn handle_request(
        &mut self,
        from: RegistrationId,
        request: Request,
        now: Instant,
    ) -> Result<(), RegisteredTwice> {
        match request {
            Request::Register(_) => return Err(RegisteredTwice),
            // They belong before the registration, and change nothing after it.
            Request::Present(_) | Request::Solve(_) => {}
            Request::Update(mut says) => {
                says.candidates.truncate(self.limits.candidates);
                if let Some(lease) = self.leases.get(&from) {
                    (_, says.instance) = lease.process;
                }
                self.directory.update(from, says);
            }
            Request::Renew(introduction, round) => self.renew(from, (introduction, round), now),
            Request::Introduce(introduce) => {
                let request = introduce.request;
                if let Err(reason) = self.introduce(from, introduce, now) {
                    self.notify(from, Notice::NotIntroduced(request, reason));
                }
            }
            Request::Close(introduction) => {
                if let Some(ended) = self.introductions.close(introduction, from) {
                    self.announce(ended);
                }
            }
            Request::Meet(meeting) => {
                if self.may_meet(from, now)
                    && let Some(both) = self.introductions.meet(from, meeting, now)
                {
                    for (side, number, meeting) in both {
                        self.notify(side, Notice::Meet(number, meeting));
                    }
                }
            }
            Request::Primed(introduction, number) => {
                if let Some(both) = self.introductions.primed(from, introduction, number) {
                    for side in both {
                        self.notify(side, Notice::Go(introduction, number));
                    }
                }
            }
        }
        Ok(())
    }

    /// The signalling connection of a registration now comes from `observed`.
    pub fn handle_observed(&mut self, registration: RegistrationId, observed: SocketAddr) {
        self.directory.observe(registration, observed);
    }

    /// The relay has seen an authentic bind request at `at`.
    pub fn handle_bound(&mut self, registration: RegistrationId, at: Instant) {
        let Some(lease) = self.leases.get_mut(&registration) else { return };
        let until = lease.until.max(at + self.limits.lease);
        if !lease.online {
            self.lapsing.remove(&(lease.until, registration));
            self.lapsing.insert((until, registration));
        }
        lease.until = until;
    }

    /// A stream binds a registration at the relay, or renews its binding.
    pub fn handle_stream_bound(
        &mut self,
        registration: RegistrationId,
        binding: StreamBinding,
        now: Instant,
    ) {
        let StreamBinding { stream, sequence } = binding;
        let bound = Bound { registration, sequence, via: Via::Stream(stream), at: now };
        self.actions.push_back(Action::Relay(Change::Bound(bound)));
        self.handle_bound(registration, now);
    }

    /// The signalling connection of a registration has ended.
    pub fn handle_departure(&mut self, registration: RegistrationId, how: Departure, now: Instant) {
        if self.directory.remove(registration).is_none() {
            return;
        }
        let Some(lease) = self.leases.get_mut(&registration) else { return };
        let worth_keeping = lease.until > now && self.introductions.has_any(registration);
        if how == Departure::Lost && worth_keeping {
            lease.online = false;
            self.lapsing.insert((lease.until, registration));
        } else {
            self.end(registration);
        }
    }

    /// Ends the lost registrations whose lease has lapsed.
    pub fn handle_timeout(&mut self, now: Instant) {
        while let Some((until, registration)) = self.lapsing.first().copied()
            && until <= now
        {
            self.end(registration);
        }
    }

    /// The bounds are others from now on. What is over them already stays.
    pub fn handle_limits(&mut self, limits: Limits) {
        self.introducing_per_source.set_rates(introducing(&limits));
        self.registering.set_rate(limits.registering);
        self.limits = limits;
        for peer in self.members.keys().copied().collect::<Vec<_>>() {
            self.judge_use(peer);
        }
    }

    /// A key is banned: what it has ends at once, its channels with it, and it may not register again.
    pub fn handle_ban(&mut self, peer: PeerId, reason: &str) {
        self.banned.insert(peer);
        let of_peer = |(id, lease): (&RegistrationId, &Lease)| (lease.process.0 == peer).then_some(*id);
        for registration in self.leases.iter().filter_map(of_peer).collect::<Vec<_>>() {
            self.directory.remove(registration);
            self.end(registration);
            self.actions.push_back(Action::Dismiss(registration, reason.to_owned()));
        }
    }

    /// A key may register again.
    pub fn handle_unban(&mut self, peer: PeerId) {
        self.banned.remove(&peer);
    }

    /// The server goes away in so many seconds: nobody new is registered, nobody introduced, and all are told.
    pub fn handle_leaving(&mut self, seconds: u32) {
        self.leaving = Some(seconds);
        for registration in self.directory.iter().map(|(id, _)| id).collect::<Vec<_>>() {
            self.notify(registration, Notice::Leaving(seconds));
        }
    }

    /// Whose registration this is, online or lost.
    pub fn peer_of(&self, registration: RegistrationId) -> Option<PeerId> {
        self.leases.get(&registration).map(|lease| lease.process.0)
    }

    /// Of how many channels a key is an end.
    pub fn channels_of(&self, peer: PeerId) -> usize {
        self.directory.of(peer).iter().map(|id| self.introductions.count(*id)).sum()
    }

    /// Whether the relay carries anything for anybody.
    pub fn is_idle(&self) -> bool {
        self.introductions.is_empty()
    }

    /// When to call [`handle_timeout`](Self::handle_timeout) next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.lapsing.first().map(|(until, _)| *until)
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    fn introduce(
        &mut self,
        from: RegistrationId,
        introduce: Introduce,
        now: Instant,
    ) -> Result<(), NotIntroduced> {
        let Some(asker) = self.directory.get(from) else { return Err(NotIntroduced::Unavailable) };
        let member = self.members.get_mut(&asker.peer).ok_or(NotIntroduced::Unavailable)?;
        let within_quota = member.introducing.take(self.limits.introducing, now)
            && self.introducing_per_source.take(asker.source, now);
        if !within_quota || self.channels_of(asker.peer) >= self.limits.channels_per_peer {
            return Err(NotIntroduced::TooMany);
        }
        if self.leaving.is_some() {
            return Err(NotIntroduced::Full);
        }
        if introduce.target == asker.peer {
            return Err(NotIntroduced::Oneself);
        }
        let found = self.directory.find(introduce.target, asker.peer);
        let (id, target) = found.ok_or(NotIntroduced::Unavailable)?;
        if self.channels_of(target.peer) >= self.limits.channels_per_peer {
            return Err(NotIntroduced::Full);
        }
        let made = self.introductions.make(
            introduce,
            party(from, asker),
            party(id, target),
            &self.limits,
            &mut self.rng,
        )?;
        let channel = made.to_asker.channel;
        self.actions.push_back(Action::Relay(Change::Open { channel, members: [from, id] }));
        self.notify(id, Notice::Introduction(made.to_target));
        self.notify(from, Notice::Introduction(made.to_asker));
        Ok(())
    }

    /// Has what two sides know of each other replaced, at most as often as they may be introduced.
    fn renew(&mut self, from: RegistrationId, (introduction, round): (IntroductionId, u64), now: Instant) {
        let peer = self.leases.get(&from).map(|lease| lease.process.0);
        let member = peer.and_then(|peer| self.members.get_mut(&peer));
        let within_quota = member.is_some_and(|member| member.introducing.take(self.limits.introducing, now));
        if !within_quota {
            return;
        }
        let directory = &self.directory;
        let of = |id| directory.get(id).map(|registration| party(id, registration));
        let Some(sides) = self.introductions.sides(introduction) else { return };
        if let Some(made) = self.introductions.renew((introduction, round), from, of, &mut self.rng) {
            self.notify(sides[1], Notice::Introduction(made.to_target));
            self.notify(sides[0], Notice::Introduction(made.to_asker));
        }
    }

    /// One that is over its rate is not told: its meeting comes to nothing, and it asks for another by and by.
    fn may_meet(&mut self, from: RegistrationId, now: Instant) -> bool {
        self.leases.get_mut(&from).is_some_and(|lease| lease.meeting.take(self.limits.meeting, now))
    }

    fn end(&mut self, registration: RegistrationId) {
        for ended in self.introductions.end_all(registration) {
            self.announce(ended);
        }
        if let Some(lease) = self.leases.remove(&registration) {
            self.lapsing.remove(&(lease.until, registration));
            self.processes.remove(&lease.process);
            let peer = lease.process.0;
            if let Some(member) = self.members.get_mut(&peer) {
                member.leases -= 1;
                if member.leases == 0 {
                    self.members.remove(&peer);
                }
            }
        }
        self.actions.push_back(Action::Relay(Change::Remove(registration)));
    }

    fn announce(&mut self, ended: Ended) {
        self.actions.push_back(Action::Relay(Change::Close(ended.channel)));
        self.notify(ended.other, Notice::Closed(ended.introduction));
    }

    fn notify(&mut self, registration: RegistrationId, notice: Notice) {
        if self.directory.get(registration).is_some() {
            self.actions.push_back(Action::Notify(registration, notice));
        }
    }

    fn free_id(&mut self) -> RegistrationId {
        loop {
            let id = RegistrationId(self.rng.next_u64());
            if !self.leases.contains_key(&id) {
                return id;
            }
        }
    }
}

fn introducing(limits: &Limits) -> [Rate; 2] {
    [limits.introducing_per_source, limits.introducing_per_prefix]
}

fn party(id: RegistrationId, registration: &Registration) -> Party {
    Party {
        registration: id,
        peer: registration.peer,
        instance: registration.instance,
        candidates: registration.candidates(),
        mapping: registration.mapping(),
    }
}

#[cfg(test)]
#[path = "broker_tests.rs"]
mod tests;
