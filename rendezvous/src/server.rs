//! The running server: its ports, threads and tasks.

use std::io;
use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use quinn::Endpoint;
use rand::RngCore;
use rendezvous_wire::identity::KeyError;
use rendezvous_wire::message::close_code;
use rendezvous_wire::{
    DEFAULT_REFLECTION_PORTS, DEFAULT_SIGNALLING_PORT, KeyPair, PeerId, RendezvousAddress,
};
use tokio::net::TcpListener;
use tokio::sync::mpsc::{self, unbounded_channel};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use crate::admission::gate::Gate;
use crate::broker::Broker;
use crate::config::{Admission, Config, Network};
use crate::control::{self, Desk};
use crate::hosts;
use crate::limits::Limits;
use crate::owner::{Event, Owner};
use crate::ports::{self, BindError, Listen};
use crate::relay::count::RelayCount;
use crate::relay::threads::Relay;
use crate::signalling::{self, Doors, EndpointError, Shared};
use crate::store::{Kept, Store, StoreError};
use crate::stream::{self, StreamError, Streams};
use crate::usage::{Month, Usage};

/// Events of connections on their way to the owner; a connection waits when there are more.
const EVENTS: usize = 1_024;

/// How long the goodbyes of a shutdown may take.
const FAREWELL: Duration = Duration::from_secs(1);

/// The TCP port for peers whose network lets no UDP through, and for HTTPS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TlsPort {
    /// The number of the UDP port of signalling: where peers look for it.
    #[default]
    Same,
    /// Another one, to which something in front of this server forwards; 0 takes a free one.
    Number(u16),
    /// None.
    Off,
}

/// Sets up a [`Server`]. Everything has a default.
#[derive(Debug)]
pub struct Builder {
    key: Option<KeyPair>,
    listen: Vec<IpAddr>,
    alternate: Vec<IpAddr>,
    port: u16,
    tls_port: TlsPort,
    reflection_ports: [u16; 2],
    hosts: Vec<String>,
    relay_threads: Option<NonZeroUsize>,
    limits: Limits,
    admission: Admission,
    state: Option<PathBuf>,
    control: Option<PathBuf>,
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            key: None,
            listen: Vec::new(),
            alternate: Vec::new(),
            port: DEFAULT_SIGNALLING_PORT,
            tls_port: TlsPort::default(),
            reflection_ports: DEFAULT_REFLECTION_PORTS,
            hosts: Vec::new(),
            relay_threads: None,
            limits: Limits::default(),
            admission: Admission::default(),
            state: None,
            control: None,
        }
    }
}

impl Builder {
    /// The server's key. Without one it makes one that nobody keeps.
    pub fn key(mut self, key: KeyPair) -> Self {
        self.key = Some(key);
        self
    }

    /// Listens on this address, and on those of other calls; without any, on every address of the host.
    pub fn listen(mut self, address: IpAddr) -> Self {
        self.listen.push(address);
        self
    }

    /// A second address of this host, of the family of its first: reflection answers from there when asked to (RFC 5780),
    /// so that peers learn how their NAT filters. One per family; the last one counts.
    pub fn alternate(mut self, address: IpAddr) -> Self {
        self.alternate.retain(|other| other.is_ipv4() != address.is_ipv4());
        self.alternate.push(address);
        self
    }

    /// The UDP port of signalling; 0 takes a free one.
    pub fn port(mut self, port: u16) -> Self {
        self.port = port;
        self
    }

    /// The TCP port.
    pub fn tls_port(mut self, port: TlsPort) -> Self {
        self.tls_port = port;
        self
    }

    /// The UDP ports of reflection and relay; 0 takes a free one.
    pub fn reflection_ports(mut self, ports: [u16; 2]) -> Self {
        self.reflection_ports = ports;
        self
    }

    /// A name or address that peers are told, the first one first; without any, the host's own best addresses.
    pub fn host(mut self, host: impl Into<String>) -> Self {
        self.hosts.push(host.into());
        self
    }

    /// Relay threads; without a number, one per core.
    pub fn relay_threads(mut self, threads: NonZeroUsize) -> Self {
        self.relay_threads = Some(threads);
        self
    }

    /// What peers may use.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Who may register.
    pub fn admission(mut self, admission: Admission) -> Self {
        self.admission = admission;
        self
    }

    /// Keeps bans, tokens, admissions and what is used in this directory; without one they are forgotten at the end.
    pub fn state(mut self, directory: impl Into<PathBuf>) -> Self {
        self.state = Some(directory.into());
        self
    }

    /// Answers [`control`] questions at this Unix socket.
    pub fn control(mut self, socket: impl Into<PathBuf>) -> Self {
        self.control = Some(socket.into());
        self
    }

    /// All that a configuration says, but for its files.
    pub fn configure(self, config: &Config) -> Self {
        let Network { listen, port, tls_port, reflection_ports, hosts, alternate_ips, .. } = &config.network;
        let mut builder = self
            .port(*port)
            .tls_port(*tls_port)
            .reflection_ports(*reflection_ports)
            .limits(config.limits.clone())
            .admission(config.admission.clone());
        builder.listen.clone_from(listen);
        builder.hosts.clone_from(hosts);
        builder.relay_threads = config.network.threads();
        for address in alternate_ips {
            builder = builder.alternate(*address);
        }
        builder
    }

    /// Binds the ports and begins to serve. Must be called within a tokio runtime.
    pub async fn start(self) -> Result<Server, StartError> {
        let key = match self.key {
            Some(key) => key,
            None => KeyPair::generate()?,
        };
        let listen = if self.listen.is_empty() { Listen::Everywhere } else { Listen::Only(self.listen) };
        let threads = self.relay_threads.or_else(|| std::thread::available_parallelism().ok());
        let threads = threads.map_or(1, NonZeroUsize::get);

        let (signalling, tls) = bind_signalling(&listen, self.port, self.tls_port)?;
        let reflecting = listen.with(&self.alternate);
        ports::check(&self.alternate)?;
        let relay = [
            ports::bind(&reflecting, self.reflection_ports[0], threads)?,
            ports::bind(&reflecting, self.reflection_ports[1], threads)?,
        ];
        let pairs = hosts::pairs(&listen, &self.hosts, &self.alternate);
        let reflection_ports = [relay[0].number, relay[1].number];

        let mut hosts = if self.hosts.is_empty() { hosts::best(&listen) } else { self.hosts };
        let host = hosts.remove(0);
        let address = RendezvousAddress { id: key.id(), host, alternatives: hosts, port: signalling.number };

        let month = Month::of(SystemTime::now());
        let (store, kept) = match &self.state {
            Some(directory) => {
                let (store, kept) = Store::open(directory, month)?;
                (Some(Arc::new(store)), kept)
            }
            None => (None, Kept::default()),
        };
        // From here on the directory is ours alone, and the socket in it.
        let control = self.control.map(|path| {
            let listener = control::listen(&path);
            listener.map_err(|source| StartError::Control { path, source })
        });
        let control = control.transpose()?;

        let (reports, reported) = unbounded_channel();
        let relay = Relay::start(relay, pairs, threads, &self.limits, reports)?;
        let overflow = relay.overflow.clone();
        let mut broker = Broker::new(self.limits.clone(), reflection_ports, random());
        broker.set_usage(Usage::new(month, kept.usage));
        for peer in kept.records.bans.keys() {
            broker.handle_ban(*peer, "");
        }
        let gate = Arc::new(Gate::new(key.id(), self.admission, kept.records, store));
        let (events, inbox) = mpsc::channel(EVENTS);
        let mut tasks = JoinSet::new();
        let (idle, is_idle) = watch::channel(true);
        let owner = Owner::new(broker, relay.shards.clone(), gate.clone(), &self.limits, idle);
        tasks.spawn(owner.run(inbox, reported));

        tasks.spawn(async move {
            overflow.watch().await;
        });
        let doors = Mutex::new(Doors::new(&self.limits, [keys(), keys()]));
        let unregistered = AtomicUsize::new(0);
        let limits = ArcSwap::from_pointee(self.limits);
        let shared = Arc::new(Shared { limits, gate, events, doors, unregistered });
        if let Some(listener) = control {
            let (address, meter, since) = (address.clone(), relay.meter.clone(), Instant::now());
            tasks.spawn(Desk { shared: shared.clone(), address, meter, since }.serve(listener));
        }
        let mut endpoints = Vec::new();
        for socket in signalling.sockets.into_iter().flatten() {
            let endpoint = signalling::endpoint(&key, socket)?;
            tasks.spawn(signalling::accept(endpoint.clone(), shared.clone()));
            endpoints.push(endpoint);
        }
        let closing = watch::Sender::new(false);
        let tls_port = tls.as_ref().map(|listening| listening.number);
        if let Some(listening) = tls {
            let shards = relay.shards.clone();
            let streams = Streams::new(&key, &address.host, shared.clone(), shards, closing.subscribe())?;
            let streams = Arc::new(streams);
            for listener in listening.sockets {
                let listener = TcpListener::from_std(listener).map_err(StreamError::from)?;
                tasks.spawn(stream::accept(listener, streams.clone()));
            }
        }
        Ok(Server { address, tls_port, reflection_ports, endpoints, closing, shared, is_idle, tasks, relay })
    }
}

/// Binds the two ports of signalling. Where both may be any, they have one number.
fn bind_signalling(
    listen: &Listen,
    port: u16,
    tls_port: TlsPort,
) -> Result<(ports::Port, Option<ports::Listening>), BindError> {
    for attempt in 0.. {
        let signalling = ports::bind(listen, port, 1)?;
        let number = match tls_port {
            TlsPort::Off => return Ok((signalling, None)),
            TlsPort::Number(number) => number,
            TlsPort::Same => signalling.number,
        };
        match ports::listen(listen, number) {
            Ok(tls) => return Ok((signalling, Some(tls))),
            Err(error)
                if port == 0
                    && tls_port == TlsPort::Same
                    && attempt < ports::ATTEMPTS
                    && error.source.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(error),
        }
    }
    unreachable!("every attempt but the last ends the loop or tries again")
}

/// Why a server did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// A port.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// No key could be made.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The signalling endpoint.
    #[error("signalling: {0}")]
    Endpoint(#[from] EndpointError),
    /// TLS on the TCP port.
    #[error("the TCP port: {0}")]
    Stream(#[from] StreamError),
    /// A relay thread.
    #[error("relay thread: {0}")]
    Relay(#[from] io::Error),
    /// What is kept on disk.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The socket of the live commands.
    #[error("the socket of the live commands, {}: {source}; name another place with control_socket in [state]", path.display())]
    Control {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The ports that a server listens on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    /// Registration and signalling, UDP.
    pub signalling: u16,
    /// The same and the relay in one stream, and HTTPS, TCP.
    pub tls: Option<u16>,
    /// Reflection and relay, UDP.
    pub reflection: [u16; 2],
}

/// A running rendezvous server. Dropped without [`shutdown`](Server::shutdown), it stops without a word to its peers.
#[derive(Debug)]
pub struct Server {
    address: RendezvousAddress,
    tls_port: Option<u16>,
    reflection_ports: [u16; 2],
    endpoints: Vec<Endpoint>,
    /// Tells streams that the server goes away. Each of them listens, so none is left when nobody does.
    closing: watch::Sender<bool>,
    shared: Arc<Shared>,
    /// Whether the relay has nothing to carry.
    is_idle: watch::Receiver<bool>,
    /// The owner of the broker, who accepts at each endpoint, and who watches for drops. None of them ends by itself.
    tasks: JoinSet<()>,
    relay: Relay,
}

impl Server {
    /// Sets up a server.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Its key.
    pub fn id(&self) -> PeerId {
        self.address.id
    }

    /// What peers are given to find it.
    pub fn address(&self) -> &RendezvousAddress {
        &self.address
    }

    /// Its ports; where 0 was asked for, the ones that were free.
    pub fn ports(&self) -> Ports {
        Ports { signalling: self.address.port, tls: self.tls_port, reflection: self.reflection_ports }
    }

    /// What its relay has done so far.
    pub fn relay_count(&self) -> RelayCount {
        self.relay.meter.count()
    }

    /// From now on with these limits and this admission. Who is here already stays.
    pub async fn reload(&self, limits: Limits, admission: Admission) {
        let Shared { gate, events, doors, .. } = &*self.shared;
        gate.configure(admission);
        doors.lock().unwrap_or_else(PoisonError::into_inner).set_limits(&limits);
        self.shared.limits.store(Arc::new(limits.clone()));
        // Without an owner the server has failed.
        let _ = events.send(Event::Limits(Box::new(limits))).await;
    }

    /// Tells every peer that the server goes away in so many seconds, takes nobody new, and returns when the relay has nothing more to carry, after
    /// that time at the latest. Peers that know another server move what is relayed there.
    pub async fn drain(&mut self, seconds: u32) {
        if self.shared.events.send(Event::Leave(seconds)).await.is_err() {
            return;
        }
        let idle = self.is_idle.wait_for(|idle| *idle);
        let _ = tokio::time::timeout(Duration::from_secs(seconds.into()), idle).await;
    }

    /// Resolves if signalling fails while the server runs: a socket has broken for good. What is left to do then is
    /// to [shut down](Server::shutdown) and start again.
    pub async fn failed(&mut self) {
        self.tasks.join_next().await;
    }

    /// Tells every peer goodbye and stops.
    pub async fn shutdown(mut self) {
        for endpoint in &self.endpoints {
            endpoint.close(close_code::SHUTDOWN.into(), b"the server is going away");
        }
        self.closing.send_replace(true);
        let (saved, is_saved) = oneshot::channel();
        let idle = async {
            if self.shared.events.send(Event::Save(saved)).await.is_ok() {
                let _ = is_saved.await;
            }
            for endpoint in &self.endpoints {
                endpoint.wait_idle().await;
            }
            // Who accepts listens as well.
            self.tasks.shutdown().await;
            self.closing.closed().await;
        };
        let _ = tokio::time::timeout(FAREWELL, idle).await;
        let mut relay = std::mem::take(&mut self.relay);
        relay.stop();
        let _ = tokio::task::spawn_blocking(move || relay.join()).await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for endpoint in &self.endpoints {
            endpoint.close(close_code::SHUTDOWN.into(), b"the server is going away");
        }
    }
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    rand::rng().fill_bytes(&mut bytes);
    bytes
}

/// Keys of a table of buckets.
pub(crate) fn keys() -> [u64; 2] {
    let mut rng = rand::rng();
    [rng.next_u64(), rng.next_u64()]
}
