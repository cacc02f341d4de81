//! The one task that owns the [`Broker`]: connections and relay threads send it what happens, and it sends out what
//! the broker decides, at once.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use bytes::Bytes;
use quinn::Connection;
use rendezvous_wire::message::{Notice, Register, RegistrationId, Request, close_code, encode};
use rendezvous_wire::{PeerId, message};
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::sync::oneshot;
use tracing::{debug, error};

use crate::broker::{self, Action, Broker, Departure, StreamBinding};
use crate::directory::RegisterError;
use crate::relay::bell::Entrance;
use crate::relay::shard::Command;
use crate::relay::table::Bound;

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
}

/// The connection itself.
#[derive(Debug)]
pub(crate) enum Line {
    /// QUIC.
    Quic(Connection),
    /// A stream, which closes itself with the first code and reason that it hears.
    Stream { remote: SocketAddr, close: UnboundedSender<(u32, &'static str)> },
}

/// The connection's end: what it has to write.
#[derive(Debug)]
pub(crate) struct Outbox {
    notices: UnboundedReceiver<Bytes>,
    queued: Arc<AtomicUsize>,
}

/// A mailbox that holds `most` bytes of notices at a time.
pub(crate) fn mailbox(line: Line, most: usize) -> (Mailbox, Outbox) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let queued = Arc::new(AtomicUsize::new(0));
    let outbox = Outbox { notices: receiver, queued: queued.clone() };
    (Mailbox { line, notices: sender, queued, most }, outbox)
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

    fn close(&self, code: u32, reason: &'static str) {
        match &self.line {
            Line::Quic(connection) => connection.close(code.into(), reason.as_bytes()),
            // One that has ended already needs no word.
            Line::Stream { close, .. } => drop(close.send((code, reason))),
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
}

impl Owner {
    pub(crate) fn new(broker: Broker, shards: Vec<Entrance>) -> Self {
        let (mailboxes, retired) = (HashMap::new(), HashMap::new());
        Self { broker, mailboxes, retired, next_connection: 0, shards }
    }

    /// Runs until nobody can send events any more.
    pub(crate) async fn run(
        mut self,
        mut events: mpsc::Receiver<Event>,
        mut bounds: UnboundedReceiver<Bound>,
    ) {
        loop {
            let wake_up = self.broker.poll_timeout();
            tokio::select! {
                event = events.recv() => match event {
                    Some(event) => self.handle(event),
                    None => return,
                },
                Some(bound) = bounds.recv() => self.broker.handle_bound(bound.registration, bound.at),
                () = sleep_until(wake_up) => self.broker.handle_timeout(Instant::now()),
            }
            self.act();
        }
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
            }
        }
    }

    fn notify(&self, to: RegistrationId, notice: &Notice) {
        let Some((_, mailbox)) = self.mailboxes.get(&to) else { return };
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
