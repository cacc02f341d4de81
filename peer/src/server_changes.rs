//! What becomes of an endpoint's rendezvous servers, for whoever wants to know.

use rendezvous_wire::RendezvousAddress;
use rendezvous_wire::message::Limit;
use tokio::sync::broadcast;

use crate::session::RelayTransport;
use crate::signalling::ServerError;

/// Changes that may wait for a slow listener; the oldest are dropped then.
const QUEUE: usize = 64;

/// How it stands with a rendezvous server.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum ServerState {
    /// It has registered us, for the first time or anew.
    Registered,
    /// It does not answer.
    Silent,
    /// It answers again.
    Answers,
    /// It goes away in so many seconds; another one is used as far as there is one.
    Leaving(u32),
    /// One of its limits holds us back.
    Limited(Limit),
    /// The connection to it is gone. It is tried again until it is back.
    Lost(ServerError),
    /// A connection to it could not be made. It is tried again.
    Failed(ServerError),
}

/// A server's state is another.
#[derive(Debug, Clone)]
pub struct ServerChange {
    /// Which server.
    pub server: RendezvousAddress,
    /// How it stands with it now.
    pub state: ServerState,
}

/// How it stands with a rendezvous server at a moment.
#[derive(Debug, Clone)]
pub struct ServerStanding {
    /// Which server.
    pub server: RendezvousAddress,
    /// How it stands with it.
    pub state: Standing,
}

/// See [`ServerStanding`].
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Standing {
    /// It is being connected to, and has not failed yet.
    Connecting,
    /// It has registered us; its relay, and in most cases the server itself, is reached that way.
    Registered(RelayTransport),
    /// It has registered us, and does not answer.
    Silent,
    /// It cannot be used at present, and is tried again.
    Down(ServerError),
}

/// What changes from now on. See [`Endpoint::server_changes`](crate::Endpoint::server_changes).
#[derive(Debug)]
pub struct ServerChanges(broadcast::Receiver<ServerChange>);

impl ServerChanges {
    /// The next one; `None` when the endpoint is closed.
    pub async fn next(&mut self) -> Option<ServerChange> {
        loop {
            match self.0.recv().await {
                Ok(change) => return Some(change),
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }
}

/// The driver's end.
#[derive(Debug, Clone)]
pub(crate) struct Announcer(broadcast::Sender<ServerChange>);

impl Announcer {
    pub(crate) fn new() -> Self {
        Self(broadcast::Sender::new(QUEUE))
    }

    pub(crate) fn announce(&self, server: &RendezvousAddress, state: ServerState) {
        // Often nobody listens.
        let _ = self.0.send(ServerChange { server: server.clone(), state });
    }

    /// Holds no sender, so that it ends with the driver.
    pub(crate) fn listen(&self) -> WeakAnnouncer {
        WeakAnnouncer(self.0.downgrade())
    }
}

/// Where listeners come from.
#[derive(Debug, Clone)]
pub(crate) struct WeakAnnouncer(broadcast::WeakSender<ServerChange>);

impl WeakAnnouncer {
    pub(crate) fn subscribe(&self) -> ServerChanges {
        let receiver = self.0.upgrade().map_or_else(|| broadcast::channel(1).1, |sender| sender.subscribe());
        ServerChanges(receiver)
    }
}
