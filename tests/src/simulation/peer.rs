//! A peer over the model: what the driver of `peer` does, without QUIC, tasks and sockets of the system.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use netsim::model::{HostId, Network, Packet, Protocol};
use peer::reflection::Reflection;
use peer_agent::{Budget, Config, Event, Family, Ladder, Output, Rung, Selected, Setup, SocketId};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rendezvous_wire::PeerId;
use rendezvous_wire::candidate::{Candidate, CandidateKind, MAX_CANDIDATES, Mapping};
use rendezvous_wire::demux::{Protocol as Kind, classify};
use rendezvous_wire::message::{
    Decoder, Introduce, Introduction, IntroductionId, IntroductionPolicy, Meeting, Notice, Purpose, Register,
    RegistrationId, Request, RequestId, encode,
};
use rendezvous_wire::relay::{Channel, HEADER_LEN};
use rendezvous_wire::stun::{Class, Received, split_username};

use super::log::Log;
use super::pipe::{self, Pipe};
use super::scenario::Handicap;
use super::server::{REFLECTION, SIGNALLING, peer_id};

/// The sockets that everything is done from, as the driver numbers them.
const V4: SocketId = SocketId(0);
const V6: SocketId = SocketId(1);

/// First byte of data on a direct path, one of QUIC's.
const DATA: u8 = 0x41;

/// Until ours is known to have come over the relay, it is repeated.
const RELAY_REPEAT: Duration = Duration::from_millis(500);

/// More extra sockets than any ladder may hold open: birthday probing's, a meeting's, those adopted.
const MOST_EXTRAS: usize = 560;

/// An introduction in force.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) introduction: IntroductionId,
    pub(super) other: PeerId,
    pub(super) since: Instant,
    /// The introduction has told how the other's NAT maps.
    pub(super) knows_mapping: bool,
    /// The path in use, and the rung whose socket it begins at, if that is not one of the ordinary ones.
    pub(super) selected: Option<(Selected, Option<Rung>)>,
    /// Data of the other side has come over the relay.
    pub(super) relayed: bool,
    /// It has said that ours has come, too.
    confirmed: bool,
    ladder: Ladder,
    ufrag: String,
    channel: Channel,
    extras: BTreeMap<SocketId, SocketAddr>,
    next_relay: Instant,
    /// Data that came over a direct path: the mark in it, the socket and the source.
    arrived: Vec<(u32, SocketId, SocketAddr)>,
}

/// A peer.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) number: u64,
    pub(super) host: HostId,
    /// When its process starts.
    pub(super) start: Instant,
    /// How much later than others it hears of introductions.
    pub(super) skew: Duration,
    pub(super) log: Log,
    handicap: Option<Handicap>,
    pub(super) sessions: Vec<Session>,
    pub(super) violations: Vec<String>,
    server: SocketAddr,
    socket_v4: SocketAddr,
    socket_v6: Option<SocketAddr>,
    pipe: Option<Pipe>,
    decoder: Decoder,
    notices: VecDeque<(Instant, Notice)>,
    registration: Option<RegistrationId>,
    reflection: Option<Reflection>,
    uploaded: Option<Register>,
    /// Whom it has asked for.
    dialling: BTreeSet<PeerId>,
    budget: Budget,
    random: StdRng,
}

impl Peer {
    pub(super) fn new(
        number: u64,
        host: HostId,
        server: SocketAddr,
        seed: u64,
        network: &mut Network,
        start: Instant,
    ) -> Self {
        let mut bind = |any: &str| network.bind(host, Protocol::Udp, any.parse().expect("an address")).ok();
        let socket_v4 = bind("0.0.0.0:0").expect("a free port");
        let socket_v6 = bind("[::]:0");
        let has_v6 = network.addresses(host).iter().any(std::net::IpAddr::is_ipv6);
        Self {
            number,
            host,
            start,
            skew: Duration::ZERO,
            log: Log::new(start, None),
            handicap: None,
            sessions: Vec::new(),
            violations: Vec::new(),
            server,
            socket_v4,
            socket_v6: socket_v6.filter(|_| has_v6),
            pipe: None,
            decoder: Decoder::default(),
            notices: VecDeque::new(),
            registration: None,
            reflection: None,
            uploaded: None,
            dialling: BTreeSet::new(),
            budget: Budget::default(),
            random: StdRng::seed_from_u64(seed),
        }
    }

    pub(super) fn id(&self) -> PeerId {
        peer_id(self.number)
    }

    /// Registered, bound, and its mapping known as well as it will soon be.
    pub(super) fn is_online(&self) -> bool {
        self.reflection.as_ref().is_some_and(Reflection::is_settled)
    }

    pub(super) fn mapping(&self) -> Mapping {
        self.reflection.as_ref().map(Reflection::mapping).unwrap_or_default()
    }

    pub(super) fn session_with(&self, other: PeerId) -> Option<&Session> {
        self.sessions.iter().find(|session| session.other == other)
    }

    /// Keeps it from something.
    pub(super) fn hinder(&mut self, handicap: Handicap) {
        self.handicap = Some(handicap);
        if handicap == Handicap::NoProbing {
            self.budget = Budget::new(Box::new(|| None));
        }
    }

    /// Asks for an introduction, unless there is one.
    pub(super) fn dial(&mut self, target: PeerId, network: &mut Network, now: Instant) {
        if self.session_with(target).is_some() {
            return;
        }
        self.dialling.insert(target);
        let request = RequestId(self.random.random());
        let first_flight = vec![flight(self.number)];
        self.request(
            &Request::Introduce(Introduce { request, target, purpose: Purpose::Session, first_flight }),
            network,
            now,
        );
    }

    /// Sends a datagram with this mark over the selected path to `other`.
    pub(super) fn send_data(&mut self, other: PeerId, mark: u32, network: &mut Network) {
        let Some(session) = self.session_with(other) else { return };
        let Some((selected, _)) = session.selected else { return };
        let Some(socket) = self.socket(session, selected.path.socket) else { return };
        let mut datagram = vec![DATA];
        datagram.extend(self.number.to_be_bytes());
        datagram.extend(mark.to_be_bytes());
        network.send(self.host, socket, selected.path.remote, None, datagram);
    }

    /// Whether data with this mark came from where `other` is sent to.
    pub(super) fn has_received(&self, other: PeerId, mark: u32) -> bool {
        self.session_with(other).is_some_and(|session| {
            let Some((selected, _)) = session.selected else { return false };
            session.arrived.contains(&(mark, selected.path.socket, selected.path.remote))
        })
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        let Some(pipe) = &self.pipe else { return Some(self.start) };
        let sessions = self.sessions.iter().flat_map(|session| {
            let relay = (!session.confirmed).then_some(session.next_relay);
            session.ladder.poll_timeout().into_iter().chain(relay)
        });
        let reflection = self.reflection.as_ref().and_then(Reflection::poll_timeout);
        let notice = self.notices.front().map(|(at, _)| *at);
        sessions
            .chain(pipe.poll_timeout())
            .chain(reflection)
            .chain(notice)
            .chain(self.budget.poll_timeout())
            .min()
    }

    pub(super) fn handle_timeout(&mut self, network: &mut Network, now: Instant) {
        if self.pipe.is_none() && self.start <= now {
            self.pipe = Some(Pipe::new(self.number, true, now));
            let register = self.register(network);
            self.uploaded = Some(register.clone());
            self.request(&Request::Register(register), network, now);
        }
        if let Some(pipe) = &mut self.pipe {
            pipe.handle_timeout(now);
        }
        self.budget.handle_timeout(now);
        while self.notices.front().is_some_and(|(at, _)| *at <= now) {
            if let Some((_, notice)) = self.notices.pop_front() {
                self.handle_notice(notice, network, now);
            }
        }
        for index in 0..self.sessions.len() {
            let session = &mut self.sessions[index];
            if session.ladder.poll_timeout().is_some_and(|at| at <= now) {
                session.ladder.handle_timeout(&mut self.budget, now);
                self.pump(index, network, now);
            }
            self.send_relayed(index, network, now);
        }
        self.flush(network, now);
    }

    /// A datagram has come to one of its sockets.
    pub(super) fn handle(
        &mut self,
        socket: SocketAddr,
        packet: &Packet,
        network: &mut Network,
        now: Instant,
    ) {
        if Some(socket) == self.socket_v6 {
            self.handle_main(V6, packet, network, now);
        } else if socket == self.socket_v4 {
            self.handle_main(V4, packet, network, now);
        } else {
            self.handle_extra(socket, packet, network, now);
        }
        self.flush(network, now);
    }

    fn handle_main(&mut self, socket: SocketId, packet: &Packet, network: &mut Network, now: Instant) {
        match classify(&packet.payload) {
            Kind::Stun => self.handle_stun(socket, packet, network, now),
            Kind::Relay => self.handle_relayed(packet),
            Kind::Quic if packet.source == self.server => self.handle_signalling(&packet.payload, now),
            Kind::Quic => self.handle_data(None, socket, packet),
            Kind::Unknown => self.violations.push("a datagram of no protocol".into()),
        }
    }

    fn handle_extra(&mut self, socket: SocketAddr, packet: &Packet, network: &mut Network, now: Instant) {
        let place = self.sessions.iter().enumerate().find_map(|(index, session)| {
            let (id, _) = session.extras.iter().find(|(_, address)| **address == socket)?;
            Some((index, *id))
        });
        let Some((index, id)) = place else { return };
        match classify(&packet.payload) {
            Kind::Stun => {
                let Ok(message) = Received::parse(&packet.payload) else { return };
                self.sessions[index].ladder.handle_message(id, packet.source, &message, now);
                self.pump(index, network, now);
            }
            Kind::Quic => self.handle_data(Some(index), id, packet),
            Kind::Relay | Kind::Unknown => {}
        }
    }

    fn handle_stun(&mut self, socket: SocketId, packet: &Packet, network: &mut Network, now: Instant) {
        let Ok(message) = Received::parse(&packet.payload) else {
            self.violations.push("a STUN message that cannot be read".into());
            return;
        };
        let index = match message.class() {
            Class::Request if self.handicap == Some(Handicap::NoAnswers) => None,
            Class::Request | Class::Indication => {
                let ufrag = message.username().and_then(split_username).map(|(local, _)| local);
                self.sessions.iter().position(|session| Some(session.ufrag.as_str()) == ufrag)
            }
            Class::Success | Class::Error => {
                if self.reflected(packet.source, &message, network, now) {
                    return;
                }
                let transaction = message.transaction();
                self.sessions.iter().position(|session| session.ladder.owns_transaction(transaction))
            }
        };
        if let Some(index) = index {
            self.sessions[index].ladder.handle_message(socket, packet.source, &message, now);
            self.pump(index, network, now);
        }
    }

    fn reflected(
        &mut self,
        source: SocketAddr,
        message: &Received<'_>,
        network: &mut Network,
        now: Instant,
    ) -> bool {
        let Some(reflection) = &mut self.reflection else { return false };
        if !reflection.handle_response(source, message, now) {
            return false;
        }
        if reflection.is_disowned() {
            self.violations.push("the relay does not know the registration".into());
        }
        let register = self.register(network);
        if self.uploaded.as_ref() != Some(&register) {
            self.uploaded = Some(register.clone());
            self.request(&Request::Update(register), network, now);
        }
        true
    }

    fn handle_signalling(&mut self, datagram: &[u8], now: Instant) {
        if pipe::connection(datagram) != Some(self.number) {
            self.violations.push("a datagram of another's signalling".into());
            return;
        }
        let Some(pipe) = &mut self.pipe else { return };
        let bytes = pipe.handle(datagram, now);
        self.decoder.extend(&bytes);
        loop {
            match self.decoder.poll::<Notice>() {
                Ok(None) => return,
                Ok(Some(notice)) => {
                    let late = matches!(notice, Notice::Introduction(_));
                    let at = if late { now + self.skew } else { now };
                    // In order, whatever happens.
                    let at = self.notices.back().map_or(at, |(before, _)| at.max(*before));
                    self.notices.push_back((at, notice));
                }
                Err(error) => return self.violations.push(format!("the server sent no message: {error}")),
            }
        }
    }

    fn note(&self, now: Instant, what: impl FnOnce() -> String) {
        self.log.note(now, &format!("peer {}", self.number), what);
    }

    fn handle_notice(&mut self, notice: Notice, network: &mut Network, now: Instant) {
        self.note(now, || match &notice {
            Notice::Registered(registered) => format!("is registered, observed at {}", registered.observed),
            Notice::Introduction(introduction) => {
                let Introduction { role, mapping, candidates, .. } = introduction;
                let addresses: Vec<_> = candidates.iter().map(|candidate| candidate.address).collect();
                format!("is introduced as {role:?} to one with {mapping} at {addresses:?}")
            }
            Notice::NotIntroduced(_, reason) => format!("is not introduced: {reason}"),
            Notice::Closed(_) => "hears that the introduction is over".into(),
            Notice::Meet(_, meeting) => format!("hears of doors {:?}", meeting.doors),
            Notice::Go(..) => "hears go".into(),
            Notice::Challenge(_) | Notice::Limited(_) | Notice::Leaving(_) => format!("hears {notice:?}"),
        });
        match notice {
            Notice::Registered(registered) => {
                let destinations = REFLECTION.map(|port| (0, SocketAddr::new(self.server.ip(), port)));
                let reflection = Reflection::new(
                    registered.registration,
                    &registered.key,
                    (registered.observed, self.socket_v4.port()),
                    &destinations,
                    0,
                    self.random.random(),
                    now,
                );
                self.registration = Some(registered.registration);
                match reflection {
                    Ok(reflection) => self.reflection = Some(reflection),
                    Err(error) => self.violations.push(format!("a key that cannot be used: {error}")),
                }
            }
            Notice::Introduction(introduction) => self.introduced(introduction, network, now),
            Notice::NotIntroduced(_, reason) => self.violations.push(format!("not introduced: {reason}")),
            Notice::Closed(introduction) => {
                self.sessions.retain(|session| session.introduction != introduction);
            }
            Notice::Meet(number, meeting) => {
                self.with_ladder(meeting.introduction, network, now, |ladder| {
                    ladder.handle_doors(number, &meeting.doors, now);
                });
            }
            Notice::Go(introduction, number) => {
                self.with_ladder(introduction, network, now, |ladder| ladder.handle_go(number, now));
            }
            Notice::Challenge(_) | Notice::Limited(_) | Notice::Leaving(_) => {
                self.violations.push(format!("held back in an open server: {notice:?}"));
            }
        }
    }

    fn introduced(&mut self, introduction: Introduction, network: &mut Network, now: Instant) {
        let other = introduction.peer;
        if introduction.request.is_none() {
            if introduction.first_flight.iter().map(Vec::len).sum::<usize>() != FLIGHT {
                self.violations.push("the first flight was lost".into());
            }
            if self.dialling.contains(&other) {
                if self.id() < other {
                    // Both dial at once: the smaller id's session is kept, on both sides.
                    return;
                }
                self.close(other, network, now);
            }
        } else if !self.dialling.contains(&other) {
            // It has yielded to the other side's.
            let request = Request::Close(introduction.introduction);
            self.request(&request, network, now);
            return;
        }
        let agent = Config::new(
            introduction.role,
            introduction.local.clone(),
            introduction.remote.clone(),
            self.random.random(),
        );
        let mut sockets = vec![(V4, Family::V4)];
        sockets.extend(self.socket_v6.map(|_| (V6, Family::V6)));
        let foretells = self.handicap != Some(Handicap::NoMeetings);
        let reflectors = self.reflection.iter().flat_map(Reflection::destinations).filter(|_| foretells);
        let setup = Setup {
            agent,
            sockets,
            local_candidates: self.candidates(network),
            remote_candidates: introduction.candidates,
            local_mapping: self.mapping(),
            remote_mapping: introduction.mapping,
            reflectors: reflectors.collect(),
        };
        let ladder = match Ladder::new(setup, now) {
            Ok(ladder) => ladder,
            Err(error) => return self.violations.push(format!("credentials that cannot be used: {error}")),
        };
        self.sessions.retain(|session| session.other != other);
        self.sessions.push(Session {
            introduction: introduction.introduction,
            other,
            since: now,
            knows_mapping: introduction.mapping != Mapping::Unknown,
            selected: None,
            relayed: false,
            confirmed: false,
            ladder,
            ufrag: introduction.local.ufrag,
            channel: introduction.channel,
            extras: BTreeMap::new(),
            next_relay: now,
            arrived: Vec::new(),
        });
        let index = self.sessions.len() - 1;
        self.pump(index, network, now);
        self.send_relayed(index, network, now);
    }

    /// Ours is given up for the other side's.
    fn close(&mut self, other: PeerId, network: &mut Network, now: Instant) {
        self.dialling.remove(&other);
        if let Some(session) = self.session_with(other) {
            let request = Request::Close(session.introduction);
            self.request(&request, network, now);
        }
    }

    fn with_ladder(
        &mut self,
        introduction: IntroductionId,
        network: &mut Network,
        now: Instant,
        call: impl FnOnce(&mut Ladder),
    ) {
        let mut sessions = self.sessions.iter_mut();
        if let Some(index) = sessions.position(|session| session.introduction == introduction) {
            call(&mut self.sessions[index].ladder);
            self.pump(index, network, now);
        }
    }

    /// Carries out what a ladder wants.
    fn pump(&mut self, index: usize, network: &mut Network, now: Instant) {
        while let Some(output) = self.sessions[index].ladder.poll_output() {
            self.note_output(&output, now);
            let session = &mut self.sessions[index];
            let introduction = session.introduction;
            match output {
                Output::Open(id) => {
                    let any = SocketAddr::new(std::net::Ipv4Addr::UNSPECIFIED.into(), 0);
                    if let Ok(socket) = network.bind(self.host, Protocol::Udp, any) {
                        session.extras.insert(id, socket);
                        session.ladder.handle_opened(id, socket.port());
                    }
                    if session.extras.len() > MOST_EXTRAS {
                        self.violations.push(format!("{} extra sockets", session.extras.len()));
                    }
                }
                Output::Close(id) => {
                    if let Some(socket) = session.extras.remove(&id) {
                        network.close(self.host, Protocol::Udp, socket);
                    }
                }
                Output::Transmit(transmit) => {
                    let session = &self.sessions[index];
                    if let Some(socket) = self.socket(session, transmit.path.socket) {
                        network.send(
                            self.host,
                            socket,
                            transmit.path.remote,
                            transmit.ttl,
                            transmit.datagram,
                        );
                    }
                }
                Output::Meet(doors) => {
                    self.request(&Request::Meet(Meeting { introduction, doors }), network, now);
                }
                Output::Primed(number) => self.request(&Request::Primed(introduction, number), network, now),
                Output::Event(Event::Selected(selected)) => {
                    let extra = session.extras.contains_key(&selected.path.socket);
                    session.selected = Some((selected, extra.then(|| session.ladder.rung(selected.path))));
                    session.arrived.clear();
                }
                Output::Event(Event::Deselected { .. }) => session.selected = None,
                _ => {}
            }
        }
    }

    fn note_output(&self, output: &Output, now: Instant) {
        match output {
            Output::Meet(doors) => self.note(now, || format!("offers doors {doors:?}")),
            Output::Primed(_) => self.note(now, || "is primed".into()),
            Output::Adopt(socket) => self.note(now, || format!("adopts socket {}", socket.0)),
            Output::Event(event) => self.note(now, || format!("{event:?}")),
            _ => {}
        }
    }

    fn socket(&self, session: &Session, id: SocketId) -> Option<SocketAddr> {
        match id {
            V4 => Some(self.socket_v4),
            V6 => self.socket_v6,
            id => session.extras.get(&id).copied(),
        }
    }

    fn send_relayed(&mut self, index: usize, network: &mut Network, now: Instant) {
        let session = &mut self.sessions[index];
        if session.confirmed || session.next_relay > now {
            return;
        }
        session.next_relay = now + RELAY_REPEAT;
        let mut frame = session.channel.header().to_vec();
        frame.extend(flight(self.number));
        frame.push(u8::from(session.relayed));
        let relay = SocketAddr::new(self.server.ip(), REFLECTION[0]);
        network.send(self.host, self.socket_v4, relay, None, frame);
    }

    fn handle_relayed(&mut self, packet: &Packet) {
        let relay = SocketAddr::new(self.server.ip(), REFLECTION[0]);
        if packet.source != relay {
            return;
        }
        let channel = Channel::of(&packet.payload);
        let payload = &packet.payload[HEADER_LEN.min(packet.payload.len())..];
        if let Some(session) = self.sessions.iter_mut().find(|session| Some(session.channel) == channel) {
            let number = u64::from(session.other.as_bytes()[0]);
            let Some((confirms, payload)) = payload.split_last() else { return };
            session.confirmed |= *confirms == 1;
            if payload == flight(number) {
                session.relayed = true;
            } else {
                self.violations.push("the relay brought what the other side has not sent".into());
            }
        }
    }

    fn handle_data(&mut self, index: Option<usize>, socket: SocketId, packet: &Packet) {
        let [DATA, rest @ ..] = &packet.payload[..] else { return };
        if self.handicap == Some(Handicap::NoData) {
            return;
        }
        let Some((number, mark)) = rest.split_first_chunk::<8>() else { return };
        let Ok(mark) = mark.try_into().map(u32::from_be_bytes) else { return };
        let other = peer_id(u64::from_be_bytes(*number));
        let session = match index {
            Some(index) => self.sessions.get_mut(index),
            None => self.sessions.iter_mut().find(|session| session.other == other),
        };
        if let Some(session) = session {
            session.arrived.push((mark, socket, packet.source));
        }
    }

    fn register(&self, network: &Network) -> Register {
        let mut candidates = self.candidates(network);
        candidates.truncate(MAX_CANDIDATES);
        Register {
            instance: self.number,
            candidates,
            mapping: self.mapping(),
            policy: IntroductionPolicy::Anyone,
        }
    }

    /// Host candidates, IPv6 first, then the server-reflexive one.
    fn candidates(&self, network: &Network) -> Vec<Candidate> {
        let addresses = network.addresses(self.host);
        let v6 = addresses
            .iter()
            .filter(|ip| ip.is_ipv6())
            .zip(self.socket_v6)
            .map(|(ip, socket)| (ip, socket.port()));
        let v4 = addresses.iter().filter(|ip| ip.is_ipv4()).map(|ip| (ip, self.socket_v4.port()));
        let mut candidates: Vec<Candidate> = Vec::new();
        for (rank, (ip, port)) in (0..).zip(v6.chain(v4)) {
            let address = SocketAddr::new(*ip, port);
            candidates.push(Candidate::new(CandidateKind::Host, address, u16::MAX - rank));
        }
        for (rank, (_, address)) in (0..).zip(self.reflection.iter().flat_map(Reflection::mapped)) {
            if !candidates.iter().any(|candidate| candidate.address == address) {
                candidates.push(Candidate::new(CandidateKind::ServerReflexive, address, u16::MAX - rank));
            }
        }
        candidates
    }

    fn request(&mut self, request: &Request, network: &mut Network, now: Instant) {
        match (encode(request), &mut self.pipe) {
            (Ok(bytes), Some(pipe)) => pipe.send(bytes, now),
            (Err(error), _) => self.violations.push(format!("a message of ours is out of bounds: {error}")),
            (_, None) => {}
        }
        self.flush(network, now);
    }

    fn flush(&mut self, network: &mut Network, now: Instant) {
        while let Some(datagram) = self.pipe.as_mut().and_then(Pipe::poll_transmit) {
            debug_assert_eq!(self.server.port(), SIGNALLING);
            network.send(self.host, self.socket_v4, self.server, None, datagram);
        }
        if let Some(reflection) = &mut self.reflection {
            while let Some(transmit) = reflection.poll_transmit(now) {
                network.send(self.host, self.socket_v4, transmit.destination, None, transmit.datagram);
            }
        }
    }
}

/// Bytes of a first flight.
const FLIGHT: usize = 1200;

/// What the peer of this number sends first; one of QUIC's first bytes.
fn flight(number: u64) -> Vec<u8> {
    let mut bytes = vec![0xc0; FLIGHT];
    bytes[1..9].copy_from_slice(&number.to_be_bytes());
    bytes
}
