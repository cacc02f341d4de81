//! A session: one QUIC connection to a peer, over the path that is best at the moment.

use std::fmt;
use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::Stream;
use peer_agent::Rung;
use quinn::{Connection, ConnectionError, SendDatagramError, Side, StreamId};
use rendezvous_wire::PeerId;
use rendezvous_wire::candidate::CandidateKind;
use tokio::sync::{mpsc, oneshot, watch};

use crate::daemon::{Explained, Leased};
use crate::doctor;
use crate::driver::{Event, Key};
use crate::explain::Explanation;
use crate::socket::Carried;

/// How a relay is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RelayTransport {
    /// In datagrams.
    Udp,
    /// In a TLS stream: UDP does not get through.
    Tcp,
    /// In a TLS stream through an HTTP proxy.
    Proxy,
}

impl RelayTransport {
    /// A short name for programs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
            Self::Proxy => "proxy",
        }
    }
}

/// The path that carries a session's datagrams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Path {
    /// In frames through the relay of a rendezvous server.
    Relayed {
        /// The relay's address; the proxy's, where there is one in between.
        relay: SocketAddr,
        /// How the relay is reached.
        over: RelayTransport,
    },
    /// Straight to the other side, proven in both directions.
    Direct {
        /// The address that we send from, before any NAT.
        local: SocketAddr,
        /// The address that we send to.
        remote: SocketAddr,
        /// How the remote address was learnt.
        kind: CandidateKind,
        /// What has led to the path.
        rung: Rung,
        /// Round-trip time of the check that proved the path.
        rtt: Duration,
    },
}

impl Path {
    /// Whether no relay is in between.
    pub const fn is_direct(&self) -> bool {
        matches!(self, Self::Direct { .. })
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Relayed { relay, over: RelayTransport::Udp } => write!(f, "relayed over {relay}"),
            Self::Relayed { relay, over: RelayTransport::Tcp } => write!(f, "relayed over {relay}, TCP"),
            Self::Relayed { relay, over: RelayTransport::Proxy } => {
                write!(f, "relayed over TCP, through the proxy {relay}")
            }
            Self::Direct { local, remote, kind, rung, rtt } => {
                write!(f, "direct {local} -> {remote} ({kind}")?;
                if *rung != Rung::Plain {
                    write!(f, ", by {rung}")?;
                }
                write!(f, "), RTT {:.1} ms", rtt.as_secs_f64() * 1e3)
            }
        }
    }
}

/// When the stages of a session were reached, counted from the moment its introduction was asked for (on the accepting
/// side: from the moment it arrived). `None`: not yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Timeline {
    /// The introduction arrived; checks began.
    pub introduced: Option<Duration>,
    /// The QUIC handshake was complete on this side.
    pub connected: Option<Duration>,
    /// A first direct path was proven in both directions by this side's checks.
    pub proven: Option<Duration>,
    /// The session's datagrams went over a direct path for the first time.
    pub direct: Option<Duration>,
}

/// Bytes of QUIC that a session's datagrams were made of, retransmissions and all, since it was introduced; sessions with the same process of a peer
/// share their paths and these counts. What goes over two paths at the same time counts on both.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PathTraffic {
    /// Sent straight to the other side.
    pub direct_sent: u64,
    /// Received straight from it.
    pub direct_received: u64,
    /// Sent over a relay.
    pub relayed_sent: u64,
    /// Received over a relay.
    pub relayed_received: u64,
}

/// The moments that all sessions with one remote endpoint share.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Milestones {
    pub(crate) introduced: Option<Instant>,
    pub(crate) proven: Option<Instant>,
    pub(crate) direct: Option<Instant>,
}

/// What the driver tells all sessions with one remote endpoint.
#[derive(Debug)]
pub(crate) struct PathNews {
    path: watch::Sender<Option<Path>>,
    milestones: Arc<Mutex<Milestones>>,
    /// Whether a round of checks has ended with nothing.
    exhausted: watch::Sender<bool>,
    carried: Arc<Carried>,
    /// Where sessions ask for explanations, and under which name.
    driver: (mpsc::Sender<Event>, Key),
}

impl PathNews {
    pub(crate) fn new(events: mpsc::Sender<Event>, key: Key, carried: Arc<Carried>) -> Self {
        Self {
            path: watch::Sender::new(None),
            milestones: Arc::default(),
            exhausted: watch::Sender::new(false),
            carried,
            driver: (events, key),
        }
    }

    /// Tells whether the latest round of checks has ended with nothing.
    pub(crate) fn set_exhausted(&self, exhausted: bool) {
        self.exhausted.send_replace(exhausted);
    }

    pub(crate) fn is_exhausted(&self) -> bool {
        *self.exhausted.borrow()
    }

    /// The path that carries datagrams from now on.
    pub(crate) fn announce(&self, path: Path) {
        self.path.send_if_modified(|present| {
            let changed = *present != Some(path);
            *present = Some(path);
            changed
        });
    }

    /// The path that carries datagrams now.
    pub(crate) fn path(&self) -> Option<Path> {
        *self.path.borrow()
    }

    pub(crate) fn note(&self, change: impl FnOnce(&mut Milestones)) {
        change(&mut self.milestones.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub(crate) fn session(&self, connection: Connection, peer: PeerId, started: Instant) -> Session {
        Session(Arc::new(Inner {
            connection,
            peer,
            path: self.path.subscribe(),
            milestones: self.milestones.clone(),
            exhausted: self.exhausted.subscribe(),
            beneath: Beneath::Driver {
                events: self.driver.0.clone(),
                key: self.driver.1,
                carried: self.carried.clone(),
            },
            started,
            connected: Instant::now(),
        }))
    }
}

/// An end-to-end encrypted QUIC connection to a peer that has proven its key.
///
/// It *is* a [`quinn::Connection`] (by `Deref`): open and accept streams and send datagrams on it as on any other. The path beneath
/// it changes without the connection noticing; [`path`](Self::path) tells the present one and
/// [`path_changes`](Self::path_changes) every change.
///
/// `remote_address()` of the connection is a synthetic address and means nothing outside this endpoint.
#[derive(Clone)]
pub struct Session(Arc<Inner>);

struct Inner {
    connection: Connection,
    peer: PeerId,
    path: watch::Receiver<Option<Path>>,
    milestones: Arc<Mutex<Milestones>>,
    exhausted: watch::Receiver<bool>,
    beneath: Beneath,
    started: Instant,
    connected: Instant,
}

/// Who moves the session's datagrams.
enum Beneath {
    /// The driver of our own endpoint.
    Driver { events: mpsc::Sender<Event>, key: Key, carried: Arc<Carried> },
    /// The daemon, whose session this is a share of; the connection leads to the daemon.
    Daemon(Leased),
}

/// What is told of a share of a daemon's session.
pub(crate) struct ShareNews {
    pub(crate) path: watch::Receiver<Option<Path>>,
    pub(crate) milestones: Arc<Mutex<Milestones>>,
    pub(crate) exhausted: watch::Receiver<bool>,
    pub(crate) started: Instant,
}

/// The driver's view of a session: does not keep it open.
#[derive(Clone)]
pub(crate) struct WeakSession(Weak<Inner>);

impl WeakSession {
    /// The connection, while somebody holds the session.
    pub(crate) fn connection(&self) -> Option<Connection> {
        self.0.upgrade().map(|inner| inner.connection.clone())
    }
}

impl Session {
    pub(crate) fn downgrade(&self) -> WeakSession {
        WeakSession(Arc::downgrade(&self.0))
    }

    /// A share of a daemon's session.
    pub(crate) fn share(connection: Connection, peer: PeerId, news: ShareNews, leased: Leased) -> Self {
        Self(Arc::new(Inner {
            connection,
            peer,
            path: news.path,
            milestones: news.milestones,
            exhausted: news.exhausted,
            beneath: Beneath::Daemon(leased),
            started: news.started,
            connected: Instant::now(),
        }))
    }

    /// The daemon's end, where it is a share of a daemon's session.
    pub(crate) fn leased(&self) -> Option<&Leased> {
        match &self.0.beneath {
            Beneath::Daemon(leased) => Some(leased),
            Beneath::Driver { .. } => None,
        }
    }

    /// Which side of the QUIC handshake this one is. Of a share of a daemon's session: the client, unless the other side has begun
    /// what it is for.
    pub fn side(&self) -> Side {
        self.leased().map_or_else(|| self.0.connection.side(), Leased::side)
    }

    /// What its paths have carried; `None` of a share of a daemon's session, which counts for itself.
    pub fn traffic(&self) -> Option<PathTraffic> {
        let Beneath::Driver { carried, .. } = &self.0.beneath else { return None };
        let [direct_sent, direct_received, relayed_sent, relayed_received] = [
            &carried.direct_sent,
            &carried.direct_received,
            &carried.relayed_sent,
            &carried.relayed_received,
        ]
        .map(|count| count.load(Ordering::Relaxed));
        Some(PathTraffic { direct_sent, direct_received, relayed_sent, relayed_received })
    }

    /// Largest datagram that [`send_datagram`](Self::send_datagram) takes on the present path.
    pub fn max_datagram_size(&self) -> Option<usize> {
        match self.leased() {
            Some(leased) => leased.width(),
            None => self.0.connection.max_datagram_size(),
        }
    }

    /// Sends a datagram that may be lost (RFC 9221).
    ///
    /// # Errors
    ///
    /// As of [`quinn::Connection::send_datagram`].
    pub fn send_datagram(&self, datagram: Bytes) -> Result<(), SendDatagramError> {
        // The way to the daemon is wider than the path behind it.
        if self.leased().and_then(Leased::width).is_some_and(|width| datagram.len() > width) {
            return Err(SendDatagramError::TooLarge);
        }
        self.0.connection.send_datagram(datagram)
    }

    /// Waits until the other side has all that was written to a stream that is finished. On a connection of one's own the stream's
    /// acknowledgement says that, and this returns at once; a daemon acknowledges what it has yet to pass on.
    ///
    /// # Errors
    ///
    /// When the session ended first.
    pub async fn delivered(&self, stream: StreamId) -> Result<(), ConnectionError> {
        match self.leased() {
            Some(leased) if !leased.delivered(stream.into()).await => {
                Err(self.close_reason().unwrap_or(ConnectionError::LocallyClosed))
            }
            _ => Ok(()),
        }
    }

    /// The key that the other side has proven to hold.
    pub fn peer(&self) -> PeerId {
        self.0.peer
    }

    /// The path that carries the session now.
    pub fn path(&self) -> Option<Path> {
        *self.0.path.borrow()
    }

    /// The path that carries the session now, then every change of it. Changes that follow each other faster than
    /// the stream is read are seen as one. Ends soon after the session has.
    pub fn path_changes(&self) -> impl Stream<Item = Path> + Send + Unpin + use<> {
        let mut receiver = self.0.path.clone();
        receiver.mark_changed();
        Box::pin(futures_util::stream::unfold(receiver, |mut receiver| async move {
            loop {
                receiver.changed().await.ok()?;
                let path = *receiver.borrow_and_update();
                if let Some(path) = path {
                    return Some((path, receiver));
                }
            }
        }))
    }

    /// Why it is direct, or why it is not: both NATs, every pair that was tried, and what follows. `None` once the session
    /// has no introduction any more.
    pub async fn explain(&self) -> Option<Explanation> {
        let (reply, explanation) = oneshot::channel();
        let Beneath::Driver { events, key, .. } = &self.0.beneath else { return None };
        events.send(Event::Explain { key: *key, reply }).await.ok()?;
        let mut explanation = explanation.await.ok()??;
        if let (Some(Path::Relayed { relay, .. }), true) = (self.path(), explanation.asks_for_carrier()) {
            explanation.carrier = doctor::carrier(relay).await;
        }
        Some(explanation)
    }

    /// The same of a share of a daemon's session, as the daemon shows it.
    pub async fn explained_by_daemon(&self) -> Option<Explained> {
        self.leased()?.explain().await
    }

    /// UDP datagrams received for it so far; of a share of a daemon's session up to a second ago.
    pub fn heard(&self) -> u64 {
        self.leased().map_or_else(|| self.stats().udp_rx.datagrams, Leased::heard)
    }

    /// Waits until it is direct, or until everything has been tried once in vain (some 6 s after the introduction). True: direct.
    pub async fn settled(&self) -> bool {
        let (mut path, mut exhausted) = (self.0.path.clone(), self.0.exhausted.clone());
        tokio::select! {
            biased;
            direct = path.wait_for(|path| path.is_some_and(|path| path.is_direct())) => direct.is_ok(),
            _ = exhausted.wait_for(|exhausted| *exhausted) => false,
        }
    }

    /// The path that carries it, and whether a round of checks has ended with nothing.
    pub(crate) fn news(&self) -> (watch::Receiver<Option<Path>>, watch::Receiver<bool>) {
        (self.0.path.clone(), self.0.exhausted.clone())
    }

    /// When its stages were reached.
    pub fn timeline(&self) -> Timeline {
        let milestones = *self.0.milestones.lock().unwrap_or_else(PoisonError::into_inner);
        let since =
            |moment: Option<Instant>| moment.map(|moment| moment.saturating_duration_since(self.0.started));
        Timeline {
            introduced: since(milestones.introduced),
            connected: since(Some(self.0.connected)),
            proven: since(milestones.proven),
            direct: since(milestones.direct),
        }
    }

    /// The moment that [`timeline`](Self::timeline) counts from.
    pub fn started(&self) -> Instant {
        self.0.started
    }

    /// The QUIC connection itself.
    pub fn connection(&self) -> &Connection {
        &self.0.connection
    }
}

impl Deref for Session {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.0.connection
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("peer", &self.0.peer)
            .field("path", &self.path())
            .finish_non_exhaustive()
    }
}
