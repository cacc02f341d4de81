//! A small peer, made of quinn and the wire crate.

#![allow(dead_code, reason = "not every test uses all of it")]

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::QuicClientConfig;
use quinn::{
    ClientConfig, Connection, ConnectionError, Endpoint, EndpointConfig, RecvStream, SendStream,
    TransportConfig,
};
use rendezvous::{Builder, Limits, Server};
use rendezvous_wire::candidate::Mapping;
use rendezvous_wire::message::{
    Decoder, Introduce, Introduction, IntroductionPolicy, NotIntroduced, Notice, Purpose, Register,
    Registered, Request, RequestId, encode,
};
use rendezvous_wire::stun::{BindRequest, Class, Key, Received, TransactionId};
use rendezvous_wire::{KeyPair, PeerId, SIGNALLING_ALPN, Token, signalling_alpns, tls};

/// Nothing on loopback takes this long unless it never comes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

pub(crate) fn builder() -> Builder {
    let threads = NonZeroUsize::new(2).unwrap();
    Server::builder().listen(HERE).port(0).reflection_ports([0, 0]).relay_threads(threads)
}

pub(crate) async fn serve() -> Server {
    builder().start().await.unwrap()
}

pub(crate) async fn serve_with(limits: Limits) -> Server {
    builder().limits(limits).start().await.unwrap()
}

pub(crate) fn open() -> Register {
    Register {
        instance: rand::random(),
        candidates: Vec::new(),
        mapping: Mapping::Unknown,
        policy: IntroductionPolicy::Anyone,
    }
}

pub(crate) fn closed() -> Register {
    Register { policy: IntroductionPolicy::Only(Vec::new()), ..open() }
}

/// A signalling connection, before any message.
pub(crate) struct Line {
    pub(crate) endpoint: Endpoint,
    pub(crate) connection: Connection,
    pub(crate) send: SendStream,
    pub(crate) receive: RecvStream,
    pub(crate) decoder: Decoder,
}

pub(crate) async fn connect(server: &Server, key: &KeyPair) -> Line {
    connect_expecting(server, key, server.id()).await.unwrap()
}

pub(crate) async fn connect_expecting(
    server: &Server,
    key: &KeyPair,
    id: PeerId,
) -> Result<Line, ConnectionError> {
    connect_with(server, key, id, TransportConfig::default()).await
}

/// As a peer of today, which knows of admission.
pub(crate) async fn connect_able(server: &Server, key: &KeyPair) -> Line {
    let at = SocketAddr::new(HERE, server.ports().signalling);
    connect_from(HERE, at, key, server.id(), TransportConfig::default(), &signalling_alpns()).await.unwrap()
}

pub(crate) async fn connect_with(
    server: &Server,
    key: &KeyPair,
    id: PeerId,
    transport: TransportConfig,
) -> Result<Line, ConnectionError> {
    let at = SocketAddr::new(HERE, server.ports().signalling);
    connect_from(HERE, at, key, id, transport, &[SIGNALLING_ALPN.to_vec()]).await
}

/// From an address of this machine to a server.
pub(crate) async fn connect_from(
    from: IpAddr,
    at: SocketAddr,
    key: &KeyPair,
    id: PeerId,
    transport: TransportConfig,
    alpns: &[Vec<u8>],
) -> Result<Line, ConnectionError> {
    let mut config = EndpointConfig::default();
    config.grease_quic_bit(false);
    let socket = UdpSocket::bind((from, 0)).unwrap();
    let endpoint = Endpoint::new(config, None, socket, Arc::new(quinn::TokioRuntime)).unwrap();
    let mut tls = tls::client_config(key, id, SIGNALLING_ALPN).unwrap();
    tls.alpn_protocols = alpns.to_vec();
    let mut config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()));
    config.transport_config(Arc::new(transport));
    let connection = endpoint.connect_with(config, at, "rendezvous").unwrap().await?;
    let (send, receive) = connection.open_bi().await?;
    Ok(Line { endpoint, connection, send, receive, decoder: Decoder::default() })
}

impl Line {
    pub(crate) async fn tell(&mut self, request: &Request) {
        self.send.write_all(&encode(request).unwrap()).await.unwrap();
    }

    /// The next notice, or how the connection ended.
    pub(crate) async fn hear(&mut self) -> Result<Notice, ConnectionError> {
        let listening = async {
            loop {
                if let Some(notice) = self.decoder.poll().unwrap() {
                    return Ok(notice);
                }
                match self.receive.read_chunk(65536, true).await {
                    Ok(Some(chunk)) => self.decoder.extend(&chunk.bytes),
                    _ => return Err(self.connection.closed().await),
                }
            }
        };
        tokio::time::timeout(PATIENCE, listening).await.expect("a notice")
    }

    /// What the server said when it closed the connection.
    pub(crate) async fn refusal(&self) -> String {
        let closed = tokio::time::timeout(PATIENCE, self.connection.closed()).await.expect("an end");
        match closed {
            ConnectionError::ApplicationClosed(close)
                if close.error_code == rendezvous_wire::message::close_code::REFUSED.into() =>
            {
                String::from_utf8(close.reason.to_vec()).unwrap()
            }
            other => panic!("{other:?}"),
        }
    }

    /// Presents a token, if there is one, and registers; what the server makes of it.
    pub(crate) async fn register(&mut self, token: Option<&Token>) -> Result<Registered, String> {
        if let Some(token) = token {
            self.tell(&Request::Present(token.clone())).await;
        }
        self.tell(&Request::Register(open())).await;
        match self.hear().await {
            Ok(Notice::Registered(registered)) => Ok(registered),
            Ok(other) => panic!("{other:?}"),
            Err(_) => Err(self.refusal().await),
        }
    }

    /// The code with which the server closed the connection.
    pub(crate) async fn close_code(&self) -> u32 {
        let closed = tokio::time::timeout(PATIENCE, self.connection.closed()).await.expect("an end");
        match closed {
            ConnectionError::ApplicationClosed(close) => u64::from(close.error_code).try_into().unwrap(),
            other => panic!("{other}"),
        }
    }
}

/// A registered peer with a socket for STUN and relay frames.
pub(crate) struct Peer {
    pub(crate) key: KeyPair,
    pub(crate) line: Line,
    pub(crate) registered: Registered,
    pub(crate) socket: tokio::net::UdpSocket,
    pub(crate) relay: SocketAddr,
    pub(crate) sequence: u64,
    asked: u64,
}

impl Peer {
    pub(crate) async fn register(server: &Server) -> Self {
        Self::register_as(server, KeyPair::generate().unwrap(), open()).await
    }

    pub(crate) async fn register_as(server: &Server, key: KeyPair, says: Register) -> Self {
        let mut line = connect(server, &key).await;
        line.tell(&Request::Register(says)).await;
        let Ok(Notice::Registered(registered)) = line.hear().await else { panic!("not registered") };
        Self::on(line, key, registered, HERE).await
    }

    /// A peer of today.
    pub(crate) async fn register_able(server: &Server, key: KeyPair) -> Self {
        let mut line = connect_able(server, &key).await;
        let registered = line.register(None).await.expect("registered");
        Self::on(line, key, registered, HERE).await
    }

    /// A peer whose relay socket is of the family of `ip`.
    pub(crate) async fn on(line: Line, key: KeyPair, registered: Registered, ip: IpAddr) -> Self {
        let socket = tokio::net::UdpSocket::bind((ip, 0)).await.unwrap();
        let relay = SocketAddr::new(ip, registered.reflection_ports[0]);
        Self { key, line, registered, socket, relay, sequence: 0, asked: 0 }
    }

    pub(crate) fn id(&self) -> PeerId {
        self.key.id()
    }

    pub(crate) fn stun_key(&self) -> Key {
        Key::new(&self.registered.key).unwrap()
    }

    pub(crate) async fn ask(&mut self, target: PeerId, first_flight: Vec<Vec<u8>>) -> RequestId {
        self.asked += 1;
        let request = RequestId(self.asked);
        let introduce = Introduce { request, target, purpose: Purpose::Session, first_flight };
        self.line.tell(&Request::Introduce(introduce)).await;
        request
    }

    pub(crate) async fn introduction(&mut self) -> Introduction {
        match self.line.hear().await {
            Ok(Notice::Introduction(introduction)) => introduction,
            other => panic!("{other:?} where an introduction should be"),
        }
    }

    pub(crate) async fn refusal(&mut self) -> NotIntroduced {
        match self.line.hear().await {
            Ok(Notice::NotIntroduced(_, reason)) => reason,
            other => panic!("{other:?} where a refusal should be"),
        }
    }

    /// The next bind request of this peer.
    pub(crate) fn bind_request(&mut self) -> (TransactionId, Vec<u8>) {
        self.sequence += 1;
        let transaction = TransactionId(rand::random());
        let request = BindRequest { registration: self.registered.registration, sequence: self.sequence };
        (transaction, request.encode(transaction, &self.stun_key()).unwrap())
    }

    /// Binds, and gives the address that the server saw.
    pub(crate) async fn bind(&mut self) -> SocketAddr {
        let (transaction, request) = self.bind_request();
        self.socket.send_to(&request, self.relay).await.unwrap();
        let bytes = self.receive().await;
        let answer = Received::parse(&bytes).unwrap();
        assert_eq!((answer.class(), answer.transaction()), (Class::Success, transaction));
        assert!(answer.verify(&self.stun_key()), "the answer is authentic");
        answer.mapped_address().unwrap()
    }

    /// The next datagram from the relay.
    pub(crate) async fn receive(&self) -> Vec<u8> {
        receive(&self.socket, self.relay).await
    }

    /// Returns once whatever this socket has sent to the relay before has been dealt with, and makes sure that nothing
    /// has been sent to it: the same thread answers this socket's packets in their order.
    pub(crate) async fn settle(&self) {
        let transaction = TransactionId(rand::random());
        let probe = rendezvous_wire::stun::binding_request(transaction).unwrap();
        self.socket.send_to(&probe, self.relay).await.unwrap();
        let bytes = self.receive().await;
        let answer = Received::parse(&bytes).expect("nothing but the answer");
        assert_eq!(answer.transaction(), transaction);
    }
}

pub(crate) async fn receive(socket: &tokio::net::UdpSocket, from: SocketAddr) -> Vec<u8> {
    let mut buffer = vec![0; 65536];
    let received = tokio::time::timeout(PATIENCE, socket.recv_from(&mut buffer)).await;
    let (length, source) = received.expect("a datagram").unwrap();
    assert_eq!(source, from, "answers come from where the request went");
    buffer.truncate(length);
    buffer
}

/// Introduces `asker` to `target` and gives both notices.
pub(crate) async fn introduce(asker: &mut Peer, target: &mut Peer) -> (Introduction, Introduction) {
    asker.ask(target.id(), Vec::new()).await;
    (asker.introduction().await, target.introduction().await)
}

/// A frame on the introduction's channel.
pub(crate) fn frame(introduction: &Introduction, payload: &[u8]) -> Vec<u8> {
    [&introduction.channel.header()[..], payload].concat()
}
