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

use crate::broker::{Action, Broker, Departure};
use crate::directory::RegisterError;
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
        answer: oneshot::Sender<Result<RegistrationId, RegisterError>>,
    },
    /// A registered peer asks for something.
    Request(RegistrationId, Request),
    /// A connection has ended.
    Departed(RegistrationId, Departure),
}

/// The owner's end of a connection.
#[derive(Debug)]
pub(crate) struct Mailbox {
    connection: Connection,
    notices: UnboundedSender<Bytes>,
    queued: Arc<AtomicUsize>,
    most: usize,
}

/// The connection's end: what it has to write.
#[derive(Debug)]
pub(crate) struct Outbox {
    notices: UnboundedReceiver<Bytes>,
    queued: Arc<AtomicUsize>,
}

/// A mailbox that holds `most` bytes of notices at a time.
pub(crate) fn mailbox(connection: Connection, most: usize) -> (Mailbox, Outbox) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let queued = Arc::new(AtomicUsize::new(0));
    let outbox = Outbox { notices: receiver, queued: queued.clone() };
    (Mailbox { connection, notices: sender, queued, most }, outbox)
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
        self.connection.close(code.into(), reason.as_bytes());
    }

    fn observed(&self) -> SocketAddr {
        canonical(self.connection.remote_address())
    }
}

impl Outbox {
    /// The next notice to write; `None` when the owner is gone.
    pub(crate) async fn next(&mut self) -> Option<Bytes> {
        self.notices.recv().await
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
    mailboxes: HashMap<RegistrationId, Mailbox>,
    shards: Vec<UnboundedSender<Command>>,
}

impl Owner {
    pub(crate) fn new(broker: Broker, shards: Vec<UnboundedSender<Command>>) -> Self {
        Self { broker, mailboxes: HashMap::new(), shards }
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
            Event::Register { peer, says, mailbox, answer } => {
                let result = self.broker.handle_register(peer, mailbox.observed(), says, now);
                if let Ok(registration) = result {
                    debug!(peer = %peer.short(), "registered");
                    self.mailboxes.insert(registration, mailbox);
                }
                if answer.send(result).is_err()
                    && let Ok(registration) = result
                {
                    self.depart(registration, Departure::Lost, now);
                }
            }
            Event::Request(from, request) => {
                self.look_again(from, &request);
                if self.broker.handle_request(from, request, now).is_err()
                    && let Some(mailbox) = self.mailboxes.get(&from)
                {
                    mailbox.close(close_code::MALFORMED, "registered twice");
                }
            }
            Event::Departed(registration, how) => self.depart(registration, how, now),
        }
    }

    /// A NAT may have rebound since; what an introduction tells must be what the server sees now.
    fn look_again(&mut self, from: RegistrationId, request: &Request) {
        let target = match request {
            Request::Introduce(introduce) => self.broker.directory().of(introduce.target),
            _ => &[],
        };
        let concerned = target.iter().copied().chain([from]);
        let seen = |id| Some((id, self.mailboxes.get(&id)?.observed()));
        for (id, observed) in concerned.filter_map(seen).collect::<Vec<_>>() {
            self.broker.handle_observed(id, observed);
        }
    }

    fn depart(&mut self, registration: RegistrationId, how: Departure, now: Instant) {
        debug!(?registration, ?how, "departed");
        self.broker.handle_departure(registration, how, now);
        self.mailboxes.remove(&registration);
    }

    fn act(&mut self) {
        while let Some(action) = self.broker.poll_action() {
            match action {
                Action::Relay(change) => {
                    for shard in &self.shards {
                        let _ = shard.send(Command::Change(change.clone()));
                    }
                }
                Action::Notify(to, notice) => self.notify(to, &notice),
                Action::Evict(registration) => {
                    if let Some(mailbox) = self.mailboxes.remove(&registration) {
                        mailbox.close(close_code::REFUSED, "replaced by newer registrations of the same key");
                    }
                }
            }
        }
    }

    fn notify(&self, to: RegistrationId, notice: &Notice) {
        let Some(mailbox) = self.mailboxes.get(&to) else { return };
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
