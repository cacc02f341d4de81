//! Ports forwarded through a session: TCP and UDP ports and Unix sockets, in both directions, and a SOCKS5 listener.
//!
//! The near side is a [`Forwarder`]: it takes connections and keeps a session with the peer, through its ends. The far side answers with [`serve`], by
//! [`Rules`] that allow nothing unless told. A connection's first bytes travel with its request, so a forwarded connection costs no round trip
//! more than a plain one.

mod connect;
mod datagrams;
mod link;
mod listen;
mod rules;
mod socks;
mod spec;
mod streams;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

pub use connect::{Listeners, serve};
pub use link::{ForwardError, Forwarder, Plan};
pub use rules::{BindPattern, PatternError, Place, Rules, TargetPattern};
pub use spec::{Bind, Forwarding, Protocol, SpecError, Target};

use rendezvous_wire::PeerId;

use crate::endpoint::ConnectError;
use crate::service::{Cause, RequestError};
use crate::session::Session;

/// Something that whoever runs this may want to know.
#[derive(Debug)]
#[non_exhaustive]
pub enum Notice {
    /// Connections are taken here.
    Listening {
        /// Where.
        at: Bind,
        /// What they lead to; `None`: whatever they ask for by SOCKS5.
        to: Option<Target>,
        /// Whether it is the other side that listens.
        remote: bool,
    },
    /// A session with the peer stands.
    Connected(Session),
    /// The session has ended; a new one is being opened.
    Lost {
        /// With whom.
        peer: PeerId,
    },
    /// No session could be opened; it will be tried again.
    Retry {
        /// Why.
        error: ConnectError,
        /// In how long.
        after: Duration,
    },
    /// A connection led to nothing.
    NotForwarded {
        /// What it was to lead to.
        to: String,
        /// Why.
        error: RequestError,
    },
    /// For a peer, something has been connected to or listened for.
    Served {
        /// Who.
        peer: PeerId,
        /// What.
        what: String,
    },
    /// A peer wanted what it may not have.
    Denied {
        /// Who.
        peer: PeerId,
        /// What.
        what: String,
    },
    /// A peer wanted what it may have, and it did not work.
    Failed {
        /// Who.
        peer: PeerId,
        /// What.
        what: String,
        /// Why.
        cause: Cause,
    },
}

/// Whom notices go to. A cheap handle.
#[derive(Clone)]
pub struct Observer(Arc<dyn Fn(Notice) + Send + Sync>);

impl Observer {
    /// Calls `tell` with every notice; it must not block.
    pub fn new(tell: impl Fn(Notice) + Send + Sync + 'static) -> Self {
        Self(Arc::new(tell))
    }

    /// Tells of it.
    pub fn notice(&self, notice: Notice) {
        (self.0)(notice);
    }
}

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Observer")
    }
}
