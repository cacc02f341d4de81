//! The ladder: an agent, and what is tried when its checks find nothing.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rendezvous_wire::candidate::Mapping;
use rendezvous_wire::message::{MAX_DOORS, MeetingNumber};
use rendezvous_wire::stun::{self, Class, Received, StunError, TransactionId};
use rendezvous_wire::{Candidate, CandidateKind};

use crate::agent::Agent;
use crate::birthday::{self, Action, Birthday, Part, Reach, SOCKETS};
use crate::budget::Budget;
use crate::config::Config;
use crate::event::{Event, Selected, Transmit};
use crate::liveness::Traffic;
use crate::meeting::{Act, MAX_SLOTS, Meetings};
use crate::path::{Family, Path, SocketId};
use crate::report::PairReport;
use crate::rung::{Rung, RungReport};

/// Extra sockets are numbered from here; the caller's own stay below.
const FIRST_EXTRA: u32 = 1 << 16;

/// Hop limit of [`Reach::Near`]: past one's own router and a carrier's, and not as far as the other side's.
const KNOCK_TTL: u8 = 3;

/// How long after a selection sockets are kept that have won a path and not the choice. Where none is selected, they are kept for a volley.
const TIDY: Duration = Duration::from_secs(3);

/// Most sockets that are adopted before one is selected: a few may meet at the same moment.
const MAX_ADOPTED: usize = 8;

/// What a ladder needs to know at its start.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Of the agent.
    pub agent: Config,
    /// Our own sockets, numbered below 65,536.
    pub sockets: Vec<(SocketId, Family)>,
    /// Our candidates.
    pub local_candidates: Vec<Candidate>,
    /// Theirs.
    pub remote_candidates: Vec<Candidate>,
    /// How our NAT maps.
    pub local_mapping: Mapping,
    /// How theirs does.
    pub remote_mapping: Mapping,
    /// UDP addresses at which a STUN server tells where a packet came from, at least two of one IPv4 address for ports to be foretold.
    pub reflectors: Vec<SocketAddr>,
}

/// What a caller is to do, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Output {
    /// Open an extra socket: unspecified IPv4 address, any port. Then call [`Ladder::handle_opened`]; if it cannot be opened, do nothing.
    Open(SocketId),
    /// Close an extra socket, whether it was adopted or not, if it is open.
    Close(SocketId),
    /// An extra socket has won a path: it may carry data from now on.
    Adopt(SocketId),
    /// Send a datagram.
    Transmit(Transmit),
    /// Ask the server for a meeting with these doors ([`Meeting`](rendezvous_wire::message::Meeting)).
    Meet(Vec<SocketAddr>),
    /// Tell the server that we are primed ([`Request::Primed`](rendezvous_wire::message::Request::Primed)).
    Primed(MeetingNumber),
    /// Something happened.
    Event(Event),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Meeting(usize),
    Knock(usize),
}

#[derive(Debug)]
struct Extra {
    purpose: Purpose,
    adopted: bool,
}

/// One introduction's whole search for a direct path: plain checks by an [`Agent`], and when these find nothing, meetings (primed checks, predicted
/// ports) and [birthday probing](crate::birthday).
///
/// Like the agent it does no I/O and has no clock. Call [`poll_output`](Self::poll_output) until it is empty after every other call.
#[derive(Debug)]
pub struct Ladder {
    agent: Agent,
    /// Names it in the budget.
    id: u64,
    local_mapped: Vec<SocketAddr>,
    remote_mapping: Mapping,
    meetings: Option<Meetings>,
    birthday: Option<Birthday>,
    target: Option<SocketAddr>,
    broken_off: bool,
    extras: BTreeMap<SocketId, Extra>,
    /// The number of the next meeting's first socket.
    next_extra: u32,
    meeting_base: u32,
    /// The other side's, of the last meeting.
    doors: Vec<SocketAddr>,
    knock_base: Option<u32>,
    tidy: Option<Instant>,
    outputs: VecDeque<Output>,
}

impl Ladder {
    /// A ladder whose first checks leave `now`.
    ///
    /// # Errors
    ///
    /// When STUN does not allow the credentials.
    pub fn new(setup: Setup, now: Instant) -> Result<Self, StunError> {
        let seed = setup.agent.seed;
        let mut agent = Agent::new(setup.agent, now)?;
        for (socket, family) in &setup.sockets {
            agent.add_socket(*socket, *family, &setup.local_candidates, now);
        }
        for candidate in &setup.remote_candidates {
            agent.add_remote_candidate(*candidate, now);
        }
        let of = |kind| {
            let own = setup.local_candidates.iter().filter(move |candidate| candidate.kind == kind);
            own.map(|candidate| candidate.address)
        };
        let seen = of(CandidateKind::ServerReflexive).chain(of(CandidateKind::Host));
        let public = seen.map(|address| address.ip()).find(IpAddr::is_ipv4);
        let mappings = (setup.local_mapping, setup.remote_mapping);
        let meetings =
            public.and_then(|public| Meetings::new(mappings, public, setup.reflectors, seed ^ 1, now));
        let target = birthday::target(&setup.remote_candidates);
        let part = Part::of(setup.local_mapping, setup.remote_mapping);
        let birthday = part.zip(target).map(|(part, target)| Birthday::new(part, target, seed ^ 2, now));
        let mut ladder = Self {
            agent,
            id: seed,
            local_mapped: of(CandidateKind::PortMapped).collect(),
            remote_mapping: setup.remote_mapping,
            meetings,
            birthday,
            target,
            broken_off: false,
            extras: BTreeMap::new(),
            next_extra: FIRST_EXTRA,
            meeting_base: FIRST_EXTRA,
            doors: Vec::new(),
            knock_base: None,
            tidy: None,
            outputs: VecDeque::new(),
        };
        // All candidates are known: the likeliest go first.
        ladder.agent.handle_timeout(now);
        ladder.drain_agent(now);
        Ok(ladder)
    }

    /// The agent, to look at.
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    /// See [`Agent::add_remote_candidate`].
    pub fn add_remote_candidate(&mut self, candidate: Candidate, now: Instant) {
        self.agent.add_remote_candidate(candidate, now);
        self.drain_agent(now);
    }

    /// See [`Agent::restart`].
    pub fn restart(&mut self, now: Instant) {
        self.agent.restart(now);
        self.drain_agent(now);
    }

    /// See [`Agent::handle_traffic`].
    pub fn handle_traffic(&mut self, traffic: Traffic, now: Instant) {
        self.agent.handle_traffic(traffic, now);
        self.agent.handle_timeout(now);
        self.drain_agent(now);
    }

    /// Whether a response with this transaction id is for this ladder's agent.
    pub fn owns_transaction(&self, transaction: TransactionId) -> bool {
        self.agent.owns_transaction(transaction)
    }

    /// Takes a STUN message that came to one of our sockets or an extra one. True when it was for us.
    pub fn handle_message(
        &mut self,
        socket: SocketId,
        source: SocketAddr,
        message: &Received<'_>,
        now: Instant,
    ) -> bool {
        let waiting = self.extras.get(&socket).filter(|extra| !extra.adopted).map(|extra| extra.purpose);
        let mine = match (waiting, message.class()) {
            (None, _) => self.agent.handle_message(socket, source, message, now),
            (Some(_), Class::Request) => {
                self.agent.is_authentic(message)
                    && self.adopt(socket, source, now)
                    && self.agent.handle_message(socket, source, message, now)
            }
            (Some(Purpose::Meeting(_)), Class::Success) => {
                let mapped = message.mapped_address().zip(self.meetings.as_mut());
                mapped.is_some_and(|(mapped, meetings)| {
                    meetings.handle_mapped(source, message.transaction(), mapped, now)
                })
            }
            _ => false,
        };
        self.drain_agent(now);
        self.drive_meetings(now);
        mine
    }

    /// An extra socket is open, bound to this port.
    pub fn handle_opened(&mut self, socket: SocketId, port: u16) {
        if let (Some(Extra { purpose: Purpose::Meeting(slot), .. }), Some(meetings)) =
            (self.extras.get(&socket), &mut self.meetings)
        {
            meetings.handle_opened(*slot, port);
        }
    }

    /// The server brings us together: these are the other side's doors.
    pub fn handle_doors(&mut self, number: MeetingNumber, doors: &[SocketAddr], now: Instant) {
        if let Some(meetings) = self.meetings.as_mut().filter(|_| self.agent.selected().is_none()) {
            meetings.handle_doors(number, doors, now);
            self.doors = doors.iter().copied().take(MAX_DOORS).collect();
        }
        self.drive_meetings(now);
    }

    /// Both sides are primed.
    pub fn handle_go(&mut self, number: MeetingNumber, now: Instant) {
        if let Some(meetings) = &mut self.meetings {
            meetings.handle_go(number, now);
        }
        self.drive_meetings(now);
    }

    /// The relay has begun to lose: the probing, which may be the cause, is broken off.
    pub fn handle_relay_loss(&mut self, budget: &mut Budget, now: Instant) {
        if self.is_probing(now) {
            self.broken_off = true;
            self.stop_birthday(now);
            budget.end(self.id);
        }
    }

    /// It is given up for another: whoever comes next may probe at once.
    pub fn leave(&mut self, budget: &mut Budget) {
        budget.end(self.id);
    }

    /// Whether birthday probing is running.
    pub fn is_probing(&self, now: Instant) -> bool {
        self.agent.selected().is_none()
            && self.birthday.as_ref().is_some_and(|birthday| birthday.is_running(now))
    }

    /// Does what is due at `now`.
    pub fn handle_timeout(&mut self, budget: &mut Budget, now: Instant) {
        self.agent.handle_timeout(now);
        self.drain_agent(now);
        self.drive_meetings(now);
        self.drive_birthday(budget, now);
        if self.tidy.is_some_and(|at| at <= now) {
            self.tidy(now);
        }
    }

    /// When to call [`handle_timeout`](Self::handle_timeout) next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let agent = self.agent.poll_timeout().map(|(at, _)| at);
        let unselected = self.agent.selected().is_none();
        let meetings = self.meetings.as_ref().filter(|_| unselected).and_then(Meetings::poll_timeout);
        let birthday = self.birthday.as_ref().filter(|_| unselected).and_then(Birthday::poll_timeout);
        [agent, meetings, birthday, self.tidy].into_iter().flatten().min()
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// The path that data should use, if there is one.
    pub fn selected(&self) -> Option<Selected> {
        self.agent.selected()
    }

    /// Every pair that was tried, best first.
    pub fn report(&self) -> Vec<PairReport> {
        self.agent.report()
    }

    /// What was done beyond plain checks.
    pub fn rungs(&self) -> Vec<RungReport> {
        let meetings = self.meetings.as_ref().map(|meetings| RungReport::Meetings {
            rung: self.meeting_rung(),
            attempts: meetings.attempts(),
            progress: meetings.progress(),
        });
        let birthday = self.birthday.as_ref().map(|birthday| RungReport::Birthday {
            part: birthday.part(),
            sent: birthday.total(),
            broken_off: self.broken_off,
        });
        meetings.into_iter().chain(birthday).collect()
    }

    /// Which rung has led to a path.
    pub fn rung(&self, path: Path) -> Rung {
        match self.extras.get(&path.socket).map(|extra| extra.purpose) {
            Some(Purpose::Meeting(_)) => return self.meeting_rung(),
            Some(Purpose::Knock(_)) => return Rung::Birthday,
            None if self.doors.contains(&path.remote) => return self.meeting_rung(),
            None => {}
        }
        let pair = self.agent.report().into_iter().find(|pair| pair.path == path);
        let mapped = pair.as_ref().and_then(|pair| pair.mapped);
        let kind = pair.map(|pair| pair.remote_kind);
        let probed = self
            .birthday
            .as_ref()
            .is_some_and(|birthday| birthday.part() == Part::Easy && birthday.total() > 0);
        let at_target = self.target.is_some_and(|target| target.ip() == path.remote.ip());
        match kind {
            Some(CandidateKind::PortMapped) => Rung::PortMapped,
            _ if mapped.is_some_and(|mapped| self.local_mapped.contains(&mapped)) => Rung::PortMapped,
            Some(CandidateKind::PeerReflexive) if probed && at_target => Rung::Birthday,
            _ => Rung::Plain,
        }
    }

    fn meeting_rung(&self) -> Rung {
        let predicts = self.meetings.as_ref().is_some_and(|meetings| meetings.predicts(self.remote_mapping));
        if predicts { Rung::Predicted } else { Rung::Primed }
    }

    /// A check of the other side has come to an extra socket: what follows is the agent's.
    fn adopt(&mut self, socket: SocketId, source: SocketAddr, now: Instant) -> bool {
        if self.extras.values().filter(|extra| extra.adopted).count() >= MAX_ADOPTED {
            return false;
        }
        let Some(extra) = self.extras.get_mut(&socket) else { return false };
        extra.adopted = true;
        tracing::debug!(%source, purpose = ?extra.purpose, "met");
        if let (Purpose::Knock(_), Some(birthday)) = (extra.purpose, &mut self.birthday) {
            birthday.hold();
        }
        if self.agent.selected().is_none() {
            // By then its checks are over.
            self.tidy = Some(now + self.agent.timers.volley());
        }
        self.outputs.push_back(Output::Adopt(socket));
        self.agent.add_reserved_socket(socket, source.into());
        true
    }

    fn drain_agent(&mut self, now: Instant) {
        while let Some(transmit) = self.agent.poll_transmit() {
            self.outputs.push_back(Output::Transmit(transmit));
        }
        while let Some(event) = self.agent.poll_event() {
            match event {
                Event::Selected(_) => {
                    self.tidy = Some(now + TIDY);
                    self.stop_birthday(now);
                    if let Some(meetings) = &mut self.meetings {
                        meetings.restart(now);
                    }
                    self.pump_meetings();
                }
                Event::Deselected { .. } => {
                    self.tidy = None;
                    if let Some(meetings) = &mut self.meetings {
                        meetings.restart(now);
                    }
                    if let Some(birthday) = &mut self.birthday {
                        birthday.resume(now);
                    }
                    self.pump_meetings();
                }
                _ => {}
            }
            self.outputs.push_back(Output::Event(event));
        }
    }

    fn drive_meetings(&mut self, now: Instant) {
        if self.agent.selected().is_some() {
            return;
        }
        while let Some(act) = self.meetings.as_mut().and_then(|meetings| meetings.poll(now)) {
            self.carry_out(act);
        }
    }

    /// What meetings have to do whether or not there is a path: to close.
    fn pump_meetings(&mut self) {
        while let Some(act) = self.meetings.as_mut().and_then(Meetings::poll_left) {
            self.carry_out(act);
        }
    }

    fn carry_out(&mut self, act: Act) {
        match act {
            Act::Open(slot) => {
                if slot == 0 {
                    self.meeting_base = self.next_extra;
                    self.next_extra += MAX_SLOTS as u32;
                }
                self.open(self.meeting_socket(slot), Purpose::Meeting(slot));
            }
            Act::Ask(slot, to, transaction) => {
                if let Ok(datagram) = stun::binding_request(transaction) {
                    self.transmit(self.meeting_socket(slot), to, datagram, None);
                }
            }
            Act::Offer(doors) => self.outputs.push_back(Output::Meet(doors)),
            Act::Check(slot, to, ttl) => {
                if let Some(check) = self.agent.stray_check() {
                    self.transmit(self.meeting_socket(slot), to, check, ttl);
                }
            }
            Act::Primed(number) => self.outputs.push_back(Output::Primed(number)),
            Act::Close(slot) => self.close(self.meeting_socket(slot)),
        }
    }

    fn meeting_socket(&self, slot: usize) -> SocketId {
        SocketId(self.meeting_base + slot as u32)
    }

    fn drive_birthday(&mut self, budget: &mut Budget, now: Instant) {
        if self.agent.selected().is_some() {
            budget.end(self.id);
            return;
        }
        let Some(birthday) = &self.birthday else { return };
        let due = birthday.poll_timeout().is_some_and(|at| at <= now);
        if due && !budget.begin(self.id, birthday.attempt_ends(), now) {
            tracing::debug!("another one is probing");
            self.stop_birthday(now);
            return;
        }
        while let Some(action) = self.birthday.as_mut().and_then(|birthday| birthday.poll(now)) {
            match action {
                Action::Close => self.close_knocks(),
                Action::Probe(to) => {
                    if !budget.take(Part::Easy, now) {
                        self.stop_birthday(now);
                        budget.end(self.id);
                        return;
                    }
                    let family = Family::from(to);
                    if let (Some(check), Some(socket)) =
                        (self.agent.stray_check(), self.agent.socket_of(family))
                    {
                        self.transmit(socket, to, check, None);
                    }
                }
                Action::Knock(index, to, reach) => self.knock(index, (to, reach), budget, now),
            }
        }
        if !self.is_probing(now) {
            budget.end(self.id);
        }
    }

    fn knock(&mut self, index: usize, (to, reach): (SocketAddr, Reach), budget: &mut Budget, now: Instant) {
        let base = *self.knock_base.get_or_insert_with(|| {
            self.next_extra += SOCKETS as u32;
            self.next_extra - SOCKETS as u32
        });
        let socket = SocketId(base + index as u32);
        let is_new = !self.extras.contains_key(&socket);
        if is_new && !budget.take(Part::Hard, now) {
            return;
        }
        if is_new {
            self.open(socket, Purpose::Knock(index));
        }
        if let Some(check) = self.agent.stray_check() {
            let ttl = (reach == Reach::Near).then_some(KNOCK_TTL);
            self.transmit(socket, to, check, ttl);
        }
    }

    /// Ends the running attempt.
    fn stop_birthday(&mut self, now: Instant) {
        if let Some(birthday) = &mut self.birthday
            && birthday.stop(false, now) == Some(Action::Close)
        {
            self.close_knocks();
        }
    }

    fn close_knocks(&mut self) {
        let knocks = self.extras.iter().filter(|(_, extra)| matches!(extra.purpose, Purpose::Knock(_)));
        let knocks: Vec<SocketId> = knocks.map(|(socket, _)| *socket).collect();
        for socket in knocks {
            self.close(socket);
        }
        self.knock_base = None;
    }

    fn open(&mut self, socket: SocketId, purpose: Purpose) {
        self.extras.insert(socket, Extra { purpose, adopted: false });
        self.outputs.push_back(Output::Open(socket));
    }

    /// Closes an extra socket that was not adopted.
    fn close(&mut self, socket: SocketId) {
        if self.extras.get(&socket).is_some_and(|extra| !extra.adopted) {
            self.extras.remove(&socket);
            self.outputs.push_back(Output::Close(socket));
        }
    }

    fn transmit(&mut self, socket: SocketId, remote: SocketAddr, datagram: Vec<u8>, ttl: Option<u8>) {
        let path = Path { socket, remote };
        self.outputs.push_back(Output::Transmit(Transmit { path, datagram, ttl }));
    }

    /// Gives up the adopted sockets that were not selected: they make room for the next ones.
    fn tidy(&mut self, now: Instant) {
        self.tidy = None;
        for socket in self.extras.keys().copied().collect::<Vec<_>>() {
            if self.extras[&socket].adopted && self.agent.remove_socket(socket) {
                self.extras.remove(&socket);
                self.outputs.push_back(Output::Close(socket));
            }
        }
        self.drain_agent(now);
    }
}

#[cfg(test)]
#[path = "ladder_tests.rs"]
mod tests;
