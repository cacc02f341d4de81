//! The endpoint: where sessions come from.

use std::collections::HashMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use quinn::ConnectionError;
use rendezvous_wire::message::IntroductionPolicy;
use rendezvous_wire::{KeyPair, PeerId, RendezvousAddress, SESSION_ALPN, Token};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::{Mutex, mpsc, oneshot, watch};

use crate::config;
use crate::driver::{Driver, Event, Online};
use crate::portmap::{self, Mapped, PortMapper};
use crate::server_changes::{ServerChanges, ServerStanding, WeakAnnouncer};
use crate::session::Session;
use crate::signalling::ServerError;
use crate::socket::PathSocket;

/// Incoming sessions that may wait for [`Endpoint::accept`]; more are closed as busy.
const ACCEPT_QUEUE: usize = 64;

/// How long closing waits for the driver, which has a bound of its own.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// How long closing waits for the goodbyes to the servers to leave.
const GOODBYE: Duration = Duration::from_millis(100);

/// Collects the settings of an [`Endpoint`].
#[derive(Debug)]
#[must_use]
pub struct Builder {
    identity: Option<KeyPair>,
    servers: Vec<RendezvousAddress>,
    tokens: HashMap<PeerId, Token>,
    policy: IntroductionPolicy,
    addresses: Vec<SocketAddr>,
    port_mapping: bool,
    port_mapping_lease: Duration,
    alpn: Arc<[u8]>,
}

/// Why an endpoint could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// No rendezvous server was named.
    #[error("no rendezvous server is named: nobody could be found without one")]
    NoServer,
    /// A key could not be made or used.
    #[error("the identity cannot be used: {0}")]
    Identity(String),
    /// No UDP socket could be opened.
    #[error("no UDP socket could be opened: {0}")]
    Socket(#[from] std::io::Error),
}

/// Why [`Endpoint::connect`] gave no session.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// No rendezvous server can be used.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// The other side is not registered at any of our servers, or it does not admit us.
    #[error(
        "{0} is not online at this rendezvous server, or does not accept you. Is `peer listen` running there, with this same server?"
    )]
    Unavailable(PeerId),
    /// The server made no introduction for another reason.
    #[error("the rendezvous server made no introduction: {0}")]
    Refused(rendezvous_wire::message::NotIntroduced),
    /// Nothing came back in time.
    #[error("{peer} was not reached within {} s: {stage}", limit.as_secs())]
    TimedOut {
        /// The other side.
        peer: PeerId,
        /// What did not happen.
        stage: &'static str,
        /// How long we waited.
        limit: Duration,
    },
    /// The QUIC handshake failed.
    #[error("the handshake with {peer} failed: {source}")]
    Handshake {
        /// The other side.
        peer: PeerId,
        /// What QUIC said.
        source: ConnectionError,
    },
    /// Whoever answered does not hold the key that was dialled.
    #[error(
        "whoever answered for {0} does not hold that key; nothing was sent. The rendezvous server may be lying"
    )]
    WrongKey(PeerId),
    /// The daemon was not able to reach it either.
    #[error("{words}")]
    Told {
        /// The other side.
        peer: PeerId,
        /// The daemon's words.
        words: String,
    },
    /// The daemon itself cannot be used.
    #[error(transparent)]
    Daemon(#[from] crate::daemon::DaemonError),
    /// The endpoint was closed.
    #[error("the endpoint is closed")]
    Closed,
}

/// Why [`Endpoint::online`] gave up.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum OnlineError {
    /// Every server failed; this is the last one's failure.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// The endpoint was closed.
    #[error("the endpoint is closed")]
    Closed,
}

impl Builder {
    /// The key that this endpoint is known by. Without one, a new one is made that lasts as long as the endpoint.
    pub fn identity(mut self, key: KeyPair) -> Self {
        self.identity = Some(key);
        self
    }

    /// Adds a rendezvous server to register with. At least one is needed.
    pub fn server(mut self, address: RendezvousAddress) -> Self {
        self.servers.push(address);
        self
    }

    /// A token that the operator of this server has given out, presented when registering there.
    pub fn token(mut self, server: PeerId, token: Token) -> Self {
        self.tokens.insert(server, token);
        self
    }

    /// Who may be introduced to this endpoint; anyone by default.
    pub fn policy(mut self, policy: IntroductionPolicy) -> Self {
        self.policy = policy;
        self
    }

    /// Binds to this address rather than to any free port of every address. At most one of each family.
    pub fn address(mut self, address: SocketAddr) -> Self {
        self.addresses.push(address);
        self
    }

    /// Whether the router is asked for a mapping (PCP, NAT-PMP, UPnP), so that peers behind difficult NATs reach this one directly; it is
    /// unless told otherwise. [`Endpoint::close`] gives the mapping back.
    pub fn port_mapping(mut self, wanted: bool) -> Self {
        self.port_mapping = wanted;
        self
    }

    /// For how long the router is asked to keep the mapping, in whole seconds; renewed after half of it. Ten minutes unless told otherwise. How
    /// long the mapping of a process that dies may stay, and a router that has restarted may be without it.
    pub fn port_mapping_lease(mut self, lease: Duration) -> Self {
        self.port_mapping_lease = lease;
        self
    }

    /// The application protocol of its sessions (ALPN, RFC 7301), at most 255 bytes, in place of that of the `peer` command: programs that speak
    /// another never mistake each other, their sessions fail in the handshake.
    pub fn alpn(mut self, protocol: impl Into<Arc<[u8]>>) -> Self {
        self.alpn = protocol.into();
        self
    }

    /// Opens the sockets and begins to register. Must be called inside a tokio runtime. See [`Endpoint::online`].
    pub async fn bind(self) -> Result<Endpoint, BindError> {
        if self.servers.is_empty() {
            return Err(BindError::NoServer);
        }
        let identity = match self.identity {
            Some(key) => key,
            None => KeyPair::generate().map_err(|error| BindError::Identity(error.to_string()))?,
        };
        let identity = Arc::new(identity);
        let (socket, outlets) = PathSocket::new(open_sockets(&self.addresses)?)?;
        let server = config::server(&identity, &self.alpn, None)
            .map_err(|error| BindError::Identity(error.to_string()))?;
        let quinn = quinn::Endpoint::new_with_abstract_socket(
            config::endpoint(),
            Some(server),
            socket.clone(),
            Arc::new(quinn::TokioRuntime),
        )?;
        let (accept, incoming) = mpsc::channel(ACCEPT_QUEUE);
        let (online_tx, online) = watch::channel(Online::default());
        let (alive, held) = watch::channel(());
        let id = identity.id();
        let with_token = |server: RendezvousAddress| {
            let token = self.tokens.get(&server.id).cloned();
            (server, token)
        };
        let servers = self.servers.into_iter().map(with_token).collect();
        let driver = Driver::new(
            identity,
            self.alpn,
            quinn.clone(),
            socket.clone(),
            outlets,
            self.policy,
            servers,
            accept,
            online_tx,
            held,
        );
        let (events, port_mapped, servers) = (driver.events(), driver.port_mapped(), driver.server_changes());
        let task = tokio::spawn(driver.run());
        let mappable = portmap::mappable(socket.local_addresses()).filter(|_| self.port_mapping);
        let mapper = mappable.map(|local| PortMapper::start(local, self.port_mapping_lease, events.clone()));
        Ok(Endpoint {
            inner: Arc::new(Inner {
                id,
                quinn,
                socket,
                events,
                incoming: Mutex::new(incoming),
                online,
                alive,
                task,
                port_mapped,
                servers,
                mapper: std::sync::Mutex::new(mapper),
            }),
        })
    }
}

/// One UDP socket per family: the given ones, or any port of every address.
fn open_sockets(addresses: &[SocketAddr]) -> std::io::Result<Vec<UdpSocket>> {
    if !addresses.is_empty() {
        return addresses.iter().map(|address| open(*address)).collect();
    }
    let v4 = open((Ipv4Addr::UNSPECIFIED, 0).into());
    let v6 = open((Ipv6Addr::UNSPECIFIED, 0).into());
    match (v4, v6) {
        // A machine may have either family switched off.
        (Ok(v4), Ok(v6)) => Ok(vec![v4, v6]),
        (Ok(one), Err(_)) | (Err(_), Ok(one)) => Ok(vec![one]),
        (Err(error), Err(_)) => Err(error),
    }
}

fn open(address: SocketAddr) -> std::io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// A registered peer: dials others and is dialled.
///
/// A cheap handle; all clones are the same endpoint. [`close`](Self::close) ends it in good order.
#[derive(Clone)]
pub struct Endpoint {
    inner: Arc<Inner>,
}

struct Inner {
    id: PeerId,
    quinn: quinn::Endpoint,
    socket: Arc<PathSocket>,
    events: mpsc::Sender<Event>,
    incoming: Mutex<mpsc::Receiver<Session>>,
    online: watch::Receiver<Online>,
    /// Has receivers while the driver lives, and until its streams have said goodbye.
    alive: watch::Sender<()>,
    task: tokio::task::JoinHandle<()>,
    port_mapped: watch::Receiver<Option<Mapped>>,
    servers: WeakAnnouncer,
    /// Until the endpoint is closed.
    mapper: std::sync::Mutex<Option<PortMapper>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint").field("id", &self.inner.id).finish_non_exhaustive()
    }
}

impl Endpoint {
    /// Begins with no server, a key of its own for this run, and anyone admitted.
    pub fn builder() -> Builder {
        Builder {
            identity: None,
            servers: Vec::new(),
            tokens: HashMap::new(),
            policy: IntroductionPolicy::default(),
            addresses: Vec::new(),
            port_mapping: true,
            port_mapping_lease: portmap::LEASE,
            alpn: SESSION_ALPN.into(),
        }
    }

    /// The key that this endpoint is known by.
    pub fn id(&self) -> PeerId {
        self.inner.id
    }

    /// The addresses of its UDP sockets.
    pub fn local_addresses(&self) -> Vec<SocketAddr> {
        self.inner.socket.local_addresses().to_vec()
    }

    /// Waits until it is registered with one server and can be reached over that server's relay, or until every server has failed once.
    /// It goes on trying in any case.
    pub async fn online(&self) -> Result<(), OnlineError> {
        let mut online = self.inner.online.clone();
        let state = online.wait_for(|online| online.ready || online.failed.is_some()).await;
        match state {
            Ok(state) if state.ready => Ok(()),
            Ok(state) => match &state.failed {
                Some(error) => Err(error.clone().into()),
                None => Ok(()),
            },
            Err(_) => Err(OnlineError::Closed),
        }
    }

    /// What becomes of its rendezvous servers from now on.
    pub fn server_changes(&self) -> ServerChanges {
        self.inner.servers.subscribe()
    }

    /// How it stands with its rendezvous servers now, in the order in which they were added.
    pub async fn servers(&self) -> Vec<ServerStanding> {
        let (reply, standing) = oneshot::channel();
        // Fails only when the endpoint is closed.
        let _ = self.inner.events.send(Event::Servers { reply }).await;
        standing.await.unwrap_or_default()
    }

    /// Waits until the router lets in what comes to a port of its own, and tells where ([`Builder::port_mapping`]). Many routers never do: a
    /// mapping is a chance for peers behind difficult NATs, nothing to wait for without a limit. `None` when the endpoint is closed.
    pub async fn port_mapped(&self) -> Option<Mapped> {
        let mut port_mapped = self.inner.port_mapped.clone();
        let mapped = port_mapped.wait_for(Option::is_some).await;
        mapped.ok().and_then(|mapped| *mapped)
    }

    /// Changes who may be introduced to this endpoint ([`Builder::policy`]). Sessions that stand are left alone.
    pub async fn set_policy(&self, policy: IntroductionPolicy) {
        // Fails only when the endpoint is closed.
        let _ = self.inner.events.send(Event::Policy(policy)).await;
    }

    /// Opens a session with the peer that holds the key `target`.
    ///
    /// Returns as soon as data can be sent, over the relay in most cases; the direct path follows by itself. Data written at once may
    /// be refused by the other side until its first answer has come.
    pub async fn connect(&self, target: PeerId) -> Result<Session, ConnectError> {
        let (reply, session) = oneshot::channel();
        let event = Event::Connect { target, reply };
        self.inner.events.send(event).await.map_err(|_| ConnectError::Closed)?;
        session.await.map_err(|_| ConnectError::Closed)?
    }

    /// The next session that a peer has opened with us; `None` when the endpoint is closed.
    pub async fn accept(&self) -> Option<Session> {
        self.inner.incoming.lock().await.recv().await
    }

    /// Closes all sessions, leaves the servers, gives the router's mapping back and waits, for a moment, until the last words have left.
    pub async fn close(&self) {
        let mut mapper = self.inner.mapper.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        if let Some(mapper) = &mut mapper {
            mapper.stop();
        }
        let (reply, done) = oneshot::channel();
        if self.inner.events.send(Event::Shutdown { reply }).await.is_ok() {
            let _ = tokio::time::timeout(CLOSE_TIMEOUT, done).await;
        }
        let idle = async { tokio::join!(self.inner.quinn.wait_idle(), self.inner.alive.closed()) };
        let _ = tokio::time::timeout(GOODBYE, idle).await;
        self.inner.task.abort();
        if let Some(mapper) = mapper {
            mapper.stopped().await;
        }
    }
}
