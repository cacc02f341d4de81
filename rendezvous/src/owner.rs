//! The one task that owns the [`Broker`]: connections and relay threads send it what happens, and it sends out what
//! the broker decides, at once.

mod answers;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use quinn::Connection;
use rendezvous_wire::message::{Notice, Register, RegistrationId, Request, close_code, encode};
use rendezvous_wire::{PeerId, message};
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::sync::{oneshot, watch};
use tracing::{debug, error};

use crate::admission::Write;
use crate::admission::gate::Gate;
use crate::broker::{self, Action, Broker, Departure, StreamBinding};
use crate::control::{PeerRow, SessionRow, Stats};
use crate::directory::RegisterError;
use crate::limits::Limits;
use crate::relay::bell::Entrance;
use crate::relay::meters::{Shares, Used};
use crate::relay::shard::{Command, Report};
use crate::relay::shares::Arbiter;
use crate::usage::Month;

/// How often the relay threads are asked what was used.
const ACCOUNT: Duration = Duration::from_secs(5);

/// The same where it decides who may send how much: a greedy peer has the better of the others for this long.
const JUDGE: Duration = Duration::from_millis(500);

/// How often that is kept: what a kill may lose of it.
const SAVE: Duration = Duration::from_secs(30);

/// What a connection tells the owner.
#[derive(Debug)]
pub(crate) enum Event {
    /// A peer has proved its key and wants to register.
    Register {
        peer: PeerId,
        says: Register,
        mailbox: Mailbox,
        /// Of a stream.
        binding: Option<StreamBinding>,
        answer: oneshot::Sender<Result<Seat, RegisterError>>,
    },
    /// A registered peer asks for something.
    Request(Seat, Request),
    /// A stream binds or renews its binding.
    Bound(Seat, StreamBinding),
    /// A connection has ended.
    Departed(Seat, Departure),
    /// A peer is banned: it has nothing more when `done` is told.
    Ban { peer: PeerId, reason: String, done: oneshot::Sender<()> },
    /// It is not any more.
    Unban(PeerId),
    /// The bounds are others.
    Limits(Box<Limits>),
    /// The server goes away in so many seconds.
    Leave(u32),
    /// Keep what is not kept yet.
    Save(oneshot::Sender<()>),
    /// Who is registered.
    Peers(oneshot::Sender<Vec<PeerRow>>),
    /// Which introductions are in force.
    Sessions(oneshot::Sender<Vec<SessionRow>>),
    /// The broker's numbers.
    Stats(oneshot::Sender<Stats>),
}

/// A registration as one of its connections, the first or a later one, holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seat {
    pub(crate) registration: RegistrationId,
    connection: u64,
}

/// The owner's end of a connection.
#[derive(Debug)]
pub(crate) struct Mailbox {
    line: Line,
    notices: UnboundedSender<Bytes>,
    queued: Arc<AtomicUsize>,
    most: usize,
    /// The peer knows of admission and limits.
    able: bool,
    since: Instant,
}

/// The connection itself.
#[derive(Debug)]
pub(crate) enum Line {
    /// QUIC.
    Quic(Connection),
    /// A stream, which closes itself with the first code and reason that it hears.
    Stream { remote: SocketAddr, close: UnboundedSender<(u32, String)> },
}

/// The connection's end: what it has to write.
#[derive(Debug)]
pub(crate) struct Outbox {
    notices: UnboundedReceiver<Bytes>,
    queued: Arc<AtomicUsize>,
}

/// A mailbox that holds `most` bytes of notices at a time. `able`: the peer has agreed to [`rendezvous_wire::ADMISSION_ALPN`].
pub(crate) fn mailbox(line: Line, most: usize, able: bool) -> (Mailbox, Outbox) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let queued = Arc::new(AtomicUsize::new(0));
    let outbox = Outbox { notices: receiver, queued: queued.clone() };
    (Mailbox { line, notices: sender, queued, most, able, since: Instant::now() }, outbox)
}

impl Mailbox {
    /// Queues a notice. When the peer does not read, closes its connection instead.
    fn post(&self, notice: Bytes) {
        let queued = self.queued.fetch_add(notice.len(), Ordering::Relaxed) + notice.len();
        if queued > self.most {
            self.close(close_code::TOO_SLOW, "notices are not read");
        } else {
            // A connection that has just ended reports its end.
            let _ = self.notices.send(notice);
        }
    }

    fn close(&self, code: u32, reason: &str) {
        match &self.line {
            Line::Quic(connection) => connection.close(code.into(), reason.as_bytes()),
            // One that has ended already needs no word.
            Line::Stream { close, .. } => drop(close.send((code, reason.to_owned()))),
        }
    }

    fn observed(&self) -> SocketAddr {
        match &self.line {
            Line::Quic(connection) => canonical(connection.remote_address()),
            Line::Stream { remote, .. } => *remote,
        }
    }
}

impl Outbox {
    /// The next notice to write; `None` when the owner is gone.
    pub(crate) async fn next(&mut self) -> Option<Bytes> {
        self.notices.recv().await
    }

    /// One that waits already.
    pub(crate) fn try_next(&mut self) -> Option<Bytes> {
        self.notices.try_recv().ok()
    }

    /// The notice of this length has been written.
    pub(crate) fn written(&self, length: usize) {
        self.queued.fetch_sub(length, Ordering::Relaxed);
    }
}

/// An IPv4-mapped address as the IPv4 address that it is.
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// The broker with its way out.
#[derive(Debug)]
pub(crate) struct Owner {
    broker: Broker,
    /// With the number of the connection.
    mailboxes: HashMap<RegistrationId, (u64, Mailbox)>,
    /// Streams whose peers have moved on to another connection. They relay until their peer has bound the other one, and closes them;
    /// one of a registration at a time.
    retired: HashMap<RegistrationId, (u64, Mailbox)>,
    next_connection: u64,
    shards: Vec<Entrance>,
    gate: Arc<Gate>,
    accounts: Accounts,
    /// Whether the relay has nothing to carry, for whoever waits for that.
    idle: watch::Sender<bool>,
    leaving: bool,
    refused: u64,
}

/// What keys use, asked of the relay threads again and again.
#[derive(Debug)]
struct Accounts {
    arbiter: Arbiter,
    asked: Instant,
    /// Between the last two questions.
    period: Duration,
    saved: Instant,
}

impl Accounts {
    /// When to ask again.
    fn next(&self) -> Instant {
        self.asked + if self.arbiter.is_needed() { JUDGE } else { ACCOUNT }
    }
}

impl Owner {
    pub(crate) fn new(
        broker: Broker,
        shards: Vec<Entrance>,
        gate: Arc<Gate>,
        limits: &Limits,
        idle: watch::Sender<bool>,
    ) -> Self {
        let (mailboxes, retired) = (HashMap::new(), HashMap::new());
        let arbiter = Arbiter::new(shards.len(), limits.relay_rate(), limits.relay_rate_per_peer());
        let now = Instant::now();
        let accounts = Accounts { arbiter, asked: now, period: ACCOUNT, saved: now };
        let (leaving, refused) = (false, 0);
        Self {
            broker,
            mailboxes,
            retired,
            next_connection: 0,
            shards,
            gate,
            accounts,
            idle,
            leaving,
            refused,
        }
    }

    /// Runs until nobody can send events any more.
    pub(crate) async fn run(
        mut self,
        mut events: mpsc::Receiver<Event>,
        mut reports: UnboundedReceiver<Report>,
    ) {
        self.tell_shares(&self.accounts.arbiter.start());
        loop {
            let wake_up = self.broker.poll_timeout();
            let account = self.accounts.next();
            tokio::select! {
                event = events.recv() => match event {
                    Some(event) => self.handle(event),
                    None => return,
                },
                Some(report) = reports.recv() => match report {
                    Report::Bound(bound) => self.broker.handle_bound(bound.registration, bound.at),
                    Report::Used(shard, used) => self.handle_used(shard, &used),
                },
                () = sleep_until(wake_up) => self.broker.handle_timeout(Instant::now()),
                () = sleep_until(Some(account)) => self.account(),
            }
            self.act();
            self.idle.send_if_modified(|idle| std::mem::replace(idle, self.broker.is_idle()) != *idle);
        }
    }

    /// Asks the relay threads what was used.
    fn account(&mut self) {
        let now = Instant::now();
        self.accounts.period = now - self.accounts.asked;
        self.accounts.asked = now;
        for shard in &self.shards {
            shard.tell(Command::Account);
        }
        if now >= self.accounts.saved + SAVE {
            self.save(now);
        }
    }

    fn handle_used(&mut self, shard: usize, used: &[(PeerId, Used)]) {
        let accounts = &mut self.accounts;
        let verdict = accounts.arbiter.handle_report(shard, used, accounts.period);
        if let Some(verdict) = verdict {
            for (entrance, shares) in self.shards.iter().zip(verdict.shares) {
                entrance.tell(Command::Shares(shares));
            }
        }
        let held_back = self.accounts.arbiter.held_back();
        let month = Month::of(SystemTime::now());
        let turned = month > self.broker.usage().month();
        self.broker.handle_used(used, month, held_back, Instant::now());
        if turned {
            self.gate.keep_later(vec![Write::Usage(month, Vec::new())]);
        }
    }

    fn tell_shares(&self, shares: &Shares) {
        for shard in &self.shards {
            shard.tell(Command::Shares(shares.clone()));
        }
    }

    /// Has what was used kept.
    fn save(&mut self, now: Instant) {
        self.accounts.saved = now;
        let usage = self.broker.usage();
        let (month, unsaved) = (usage.month(), usage.take_unsaved());
        if !unsaved.is_empty() {
            self.gate.keep_later(vec![Write::Usage(month, unsaved)]);
        }
    }

    fn limit(&mut self, limits: Limits) {
        let Limits { lease, binding, reflecting, .. } = limits;
        for shard in &self.shards {
            shard.tell(Command::Limits { lease, binding, reflecting });
        }
        let shares = self.accounts.arbiter.set_limits(limits.relay_rate(), limits.relay_rate_per_peer());
        self.tell_shares(&shares);
        self.broker.handle_limits(limits);
    }

    fn handle(&mut self, event: Event) {
        let now = Instant::now();
        match event {
            Event::Register { peer, says, mailbox, binding, answer } => {
                let line = broker::Line { observed: mailbox.observed(), binding };
                let result = self.broker.handle_register(peer, line, says, now);
                let result = result.map(|registration| self.seat(registration, mailbox));
                if let Ok(seat) = result {
                    debug!(peer = %peer.short(), stream = binding.is_some(), "registered");
                    if answer.send(result).is_err() {
                        self.depart(seat, Departure::Lost, now);
                    }
                } else {
                    self.refused += 1;
                    // Whoever is gone does not need to know.
                    let _ = answer.send(result);
                }
            }
            Event::Request(from, _) if !self.holds(from) => {}
            Event::Request(Seat { registration: from, .. }, request) => {
                self.look_again(from, &request);
                if self.broker.handle_request(from, request, now).is_err()
                    && let Some((_, mailbox)) = self.mailboxes.get(&from)
                {
                    mailbox.close(close_code::MALFORMED, "registered twice");
                }
            }
            Event::Bound(from, binding) => {
                let held = |mailboxes: &HashMap<_, (u64, Mailbox)>| {
                    mailboxes.get(&from.registration).is_some_and(|(number, _)| *number == from.connection)
                };
                if held(&self.mailboxes) || held(&self.retired) {
                    self.broker.handle_stream_bound(from.registration, binding, now);
                }
            }
            Event::Departed(seat, how) => self.depart(seat, how, now),
            Event::Ban { peer, reason, done } => {
                self.broker.handle_ban(peer, &reason);
                self.act();
                let _ = done.send(());
            }
            Event::Unban(peer) => self.broker.handle_unban(peer),
            Event::Limits(limits) => self.limit(*limits),
            Event::Leave(seconds) => {
                self.leaving = true;
                self.broker.handle_leaving(seconds);
            }
            Event::Save(done) => {
                self.save(now);
                let _ = done.send(());
            }
            // Whoever does not wait for the answer any more does not need it.
            Event::Peers(reply) => drop(reply.send(self.peers(now))),
            Event::Sessions(reply) => drop(reply.send(self.sessions())),
            Event::Stats(reply) => drop(reply.send(self.stats())),
        }
    }

    /// Gives a registration to its newest connection.
    fn seat(&mut self, registration: RegistrationId, mailbox: Mailbox) -> Seat {
        self.next_connection += 1;
        let connection = self.next_connection;
        let former = self.mailboxes.insert(registration, (connection, mailbox));
        if let Some((number, former)) = former {
            self.close_retired(registration);
            let moves_from_stream_to_quic = matches!(former.line, Line::Stream { .. })
                && self
                    .mailboxes
                    .get(&registration)
                    .is_some_and(|(_, now)| matches!(now.line, Line::Quic(_)));
            if moves_from_stream_to_quic {
                self.retired.insert(registration, (number, former));
            } else {
                former.close(close_code::SHUTDOWN, "the peer has registered over another connection");
            }
        }
        Seat { registration, connection }
    }

    fn close_retired(&mut self, registration: RegistrationId) {
        if let Some((_, mailbox)) = self.retired.remove(&registration) {
            mailbox.close(close_code::SHUTDOWN, "the peer has registered over another connection");
        }
    }

    /// Whether this connection is the registration's present one.
    fn holds(&self, seat: Seat) -> bool {
        self.mailboxes.get(&seat.registration).is_some_and(|(number, _)| *number == seat.connection)
    }

    /// A NAT may have rebound since; what an introduction tells must be what the server sees now.
    fn look_again(&mut self, from: RegistrationId, request: &Request) {
        let target = match request {
            Request::Introduce(introduce) => self.broker.directory().of(introduce.target),
            _ => &[],
        };
        let concerned = target.iter().copied().chain([from]);
        let seen = |id| Some((id, self.mailboxes.get(&id)?.1.observed()));
        for (id, observed) in concerned.filter_map(seen).collect::<Vec<_>>() {
            self.broker.handle_observed(id, observed);
        }
    }

    fn depart(&mut self, seat: Seat, how: Departure, now: Instant) {
        let registration = seat.registration;
        if !self.holds(seat) {
            self.retired.retain(|id, (number, _)| *id != registration || *number != seat.connection);
            return;
        }
        debug!(?registration, ?how, "departed");
        self.broker.handle_departure(registration, how, now);
        self.mailboxes.remove(&registration);
        self.close_retired(registration);
    }

    fn act(&mut self) {
        while let Some(action) = self.broker.poll_action() {
            match action {
                Action::Relay(change) => {
                    for shard in &self.shards {
                        shard.tell(Command::Change(change.clone()));
                    }
                }
                Action::Notify(to, notice) => self.notify(to, &notice),
                Action::Evict(registration) => {
                    if let Some((_, mailbox)) = self.mailboxes.remove(&registration) {
                        mailbox.close(close_code::REFUSED, "replaced by newer registrations of the same key");
                    }
                    self.close_retired(registration);
                }
                Action::Dismiss(registration, reason) => {
                    if let Some((_, mailbox)) = self.mailboxes.remove(&registration) {
                        mailbox.close(close_code::REFUSED, &reason);
                    }
                    if let Some((_, mailbox)) = self.retired.remove(&registration) {
                        mailbox.close(close_code::REFUSED, &reason);
                    }
                }
            }
        }
    }

    fn notify(&self, to: RegistrationId, notice: &Notice) {
        let Some((_, mailbox)) = self.mailboxes.get(&to) else { return };
        if notice.is_of_admission() && !mailbox.able {
            return;
        }
        match encode(notice) {
            Ok(bytes) => mailbox.post(bytes.into()),
            Err(message::MessageError::TooLong(length)) => error!(length, "a notice exceeds its bound"),
            Err(error) => error!(%error, "a notice exceeds its bounds"),
        }
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
