//! Channels of our server, by registrations and introductions over the wire.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Connection, Endpoint, EndpointConfig, RecvStream, SendStream, TransportConfig};
use rendezvous_wire::candidate::Mapping;
use rendezvous_wire::message::{
    Decoder, Introduce, Introduction, IntroductionPolicy, Notice, Purpose, Register, Registered, Request,
    RequestId, encode,
};
use rendezvous_wire::stun::{BindRequest, Class, Key, Received, TransactionId};
use rendezvous_wire::{KeyPair, PeerId, RendezvousAddress, SIGNALLING_ALPN, tls};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

use super::lanes::{Lane, Socket};

const PATIENCE: Duration = Duration::from_secs(20);

/// A connection, and what has come on it.
struct Stream {
    send: SendStream,
    receive: RecvStream,
    decoder: Decoder,
    connection: Connection,
}

impl Stream {
    async fn tell(&mut self, request: &Request) -> anyhow::Result<()> {
        Ok(self.send.write_all(&encode(request)?).await?)
    }

    async fn next(&mut self) -> anyhow::Result<Notice> {
        loop {
            if let Some(notice) = self.decoder.poll()? {
                return Ok(notice);
            }
            let chunk = self.receive.read_chunk(65_536, true).await?;
            let Some(chunk) = chunk else { bail!("signalling ended: {}", self.connection.closed().await) };
            self.decoder.extend(&chunk.bytes);
        }
    }

    async fn hear(&mut self) -> anyhow::Result<Notice> {
        tokio::time::timeout(PATIENCE, self.next()).await.context("the server is silent")?
    }
}

/// A registered peer.
pub struct Line {
    stream: Stream,
    id: PeerId,
    registered: Registered,
    asked: u64,
    sequence: u64,
}

impl Line {
    /// Its id.
    pub fn id(&self) -> PeerId {
        self.id
    }

    /// Sends a request.
    ///
    /// # Errors
    ///
    /// When the connection has ended.
    pub async fn tell(&mut self, request: &Request) -> anyhow::Result<()> {
        self.stream.tell(request).await
    }

    /// The next notice.
    ///
    /// # Errors
    ///
    /// When the connection has ended, or is silent for long.
    pub async fn hear(&mut self) -> anyhow::Result<Notice> {
        self.stream.hear().await
    }

    /// Asks for an introduction.
    ///
    /// # Errors
    ///
    /// When the connection has ended.
    pub async fn ask(&mut self, target: PeerId) -> anyhow::Result<()> {
        self.asked += 1;
        let request = RequestId(self.asked);
        self.tell(&Request::Introduce(Introduce {
            request,
            target,
            purpose: Purpose::Session,
            first_flight: Vec::new(),
        }))
        .await
    }

    /// The next notice, however long it takes. Nothing is lost when this is given up.
    ///
    /// # Errors
    ///
    /// When the connection has ended.
    pub async fn next(&mut self) -> anyhow::Result<Notice> {
        self.stream.next().await
    }

    /// The next notice, which must be an introduction.
    ///
    /// # Errors
    ///
    /// When it is something else.
    pub async fn introduction(&mut self) -> anyhow::Result<Introduction> {
        match self.hear().await? {
            Notice::Introduction(introduction) => Ok(introduction),
            other => bail!("{other:?} instead of an introduction"),
        }
    }

    /// Binds the address of `socket`.
    ///
    /// # Errors
    ///
    /// When the server refuses.
    pub fn bind(&mut self, socket: &Socket, relay: SocketAddr) -> anyhow::Result<()> {
        self.sequence += 1;
        let transaction = TransactionId(rand::random());
        let key = Key::new(&self.registered.key)?;
        let request = BindRequest { registration: self.registered.registration, sequence: self.sequence };
        let answer = socket.ask(relay, &request.encode(transaction, &key)?)?;
        let answer = Received::parse(&answer)?;
        ensure!(answer.class() == Class::Success && answer.verify(&key), "the server does not bind");
        Ok(())
    }
}

/// Registers peers at one server.
pub struct Registrar {
    runtime: Runtime,
    server: RendezvousAddress,
    /// Where the relay listens.
    pub relay: SocketAddr,
    endpoints: Vec<Endpoint>,
    per_source: usize,
    registered: usize,
    /// Those that have been registered for lanes; their registrations last as long as these.
    kept: Vec<Line>,
}

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

impl Registrar {
    /// For the server of this address and reflection port on 127.0.0.1. Every `per_source` registrations come from another address:
    /// the server's quotas for one source apply.
    ///
    /// # Errors
    ///
    /// When no runtime can be had.
    pub fn new(server: RendezvousAddress, reflection: u16, per_source: usize) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let relay = SocketAddr::new(HERE, reflection);
        let (endpoints, kept) = (Vec::new(), Vec::new());
        Ok(Self { runtime, server, relay, endpoints, per_source, registered: 0, kept })
    }

    /// Runs a task of signalling.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    /// Registers one more peer.
    ///
    /// # Errors
    ///
    /// When the server refuses.
    pub fn register(&mut self) -> anyhow::Result<Line> {
        let source = self.registered / self.per_source;
        self.registered += 1;
        if self.endpoints.len() <= source {
            let _guard = self.runtime.enter();
            let mut config = EndpointConfig::default();
            config.grease_quic_bit(false);
            let ip = IpAddr::from([127, 1, (source >> 8) as u8, source as u8]);
            let socket = UdpSocket::bind((ip, 0))?;
            self.endpoints.push(Endpoint::new(config, None, socket, Arc::new(quinn::TokioRuntime))?);
        }
        let endpoint = &self.endpoints[source];
        let key = KeyPair::generate()?;
        let tls = tls::client_config(&key, self.server.id, SIGNALLING_ALPN)?;
        let mut config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
        let mut transport = TransportConfig::default();
        transport.keep_alive_interval(Some(Duration::from_secs(10)));
        config.transport_config(Arc::new(transport));
        let at = SocketAddr::new(HERE, self.server.port);
        self.runtime.block_on(async {
            let connecting = endpoint.connect_with(config, at, "rendezvous")?;
            let connection = tokio::time::timeout(PATIENCE, connecting).await??;
            let (send, receive) = connection.open_bi().await?;
            let mut stream = Stream { send, receive, decoder: Decoder::default(), connection };
            let says = Register {
                instance: rand::random(),
                candidates: Vec::new(),
                mapping: Mapping::Unknown,
                policy: IntroductionPolicy::Anyone,
            };
            stream.tell(&Request::Register(says)).await?;
            let Notice::Registered(registered) = stream.hear().await? else { bail!("not registered") };
            let line = Line { stream, id: key.id(), registered, asked: 0, sequence: 0 };
            anyhow::Ok(line)
        })
    }

    /// Starts a task of signalling.
    pub fn spawn(&self, task: impl Future<Output = anyhow::Result<()>> + Send + 'static) -> JoinHandle<()> {
        self.runtime.spawn(async move {
            if let Err(error) = task.await {
                eprintln!("{error:#}");
            }
        })
    }

    /// A lane between two new registrations, which live as long as this does.
    ///
    /// # Errors
    ///
    /// When the server refuses.
    pub fn lane(&mut self) -> anyhow::Result<Lane> {
        let (from, into) = (Socket::bind(HERE)?, Socket::bind(HERE)?);
        let (mut one, mut other) = (self.register()?, self.register()?);
        one.bind(&from, self.relay)?;
        other.bind(&into, self.relay)?;
        let introduction = self.runtime.block_on(async {
            one.ask(other.id).await?;
            one.introduction().await
        })?;
        self.kept.extend([one, other]);
        Ok(Lane { from, to: self.relay, header: introduction.channel.header(), into })
    }

    /// The server's.
    pub fn id(&self) -> PeerId {
        self.server.id
    }

    /// A new registration, bound with this socket, which lives as long as this does: its id.
    ///
    /// # Errors
    ///
    /// When the server refuses.
    pub fn bound(&mut self, socket: &Socket) -> anyhow::Result<PeerId> {
        let mut line = self.register()?;
        line.bind(socket, self.relay)?;
        let id = line.id;
        self.kept.push(line);
        Ok(id)
    }

    /// The same, and introduced to another peer: the header of their channel.
    ///
    /// # Errors
    ///
    /// When the server refuses.
    pub fn introduced(&mut self, socket: &Socket, to: PeerId) -> anyhow::Result<[u8; 4]> {
        self.bound(socket)?;
        let line = self.kept.last_mut().context("a line")?;
        let introduction = self.runtime.block_on(async {
            line.ask(to).await?;
            line.introduction().await
        })?;
        Ok(introduction.channel.header())
    }

    /// Binds again what the lanes were bound with. These must be all lanes, in the order in which they were made, and idle.
    ///
    /// # Errors
    ///
    /// When the server refuses.
    pub fn renew(&mut self, lanes: &[Lane]) -> anyhow::Result<()> {
        let sockets = lanes.iter().flat_map(|lane| [&lane.from, &lane.into]);
        self.kept.iter_mut().zip(sockets).try_for_each(|(line, socket)| line.bind(socket, self.relay))
    }
}
