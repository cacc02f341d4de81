//! TCP: peers that register, are introduced and relayed over one TLS stream, and HTTPS for everybody else.

mod common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use common::*;
use rendezvous::{Limits, Server, TlsPort};
use rendezvous_wire::message::{
    Introduce, Introduction, Notice, Purpose, Register, Registered, Request, RequestId, close_code, decode,
    encode,
};
use rendezvous_wire::stream::{Backlog, Decoder, Record, put_binding, put_message};
use rendezvous_wire::{KeyPair, PeerId, SIGNALLING_ALPN, tls};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// A peer on a stream.
struct StreamPeer {
    key: KeyPair,
    stream: TlsStream<TcpStream>,
    decoder: Decoder,
    registered: Option<Registered>,
}

fn at(server: &Server) -> SocketAddr {
    SocketAddr::new(HERE, server.ports().tls.expect("a TCP port"))
}

async fn dial(server: &Server, key: &KeyPair, id: PeerId) -> std::io::Result<TlsStream<TcpStream>> {
    let config = tls::client_config(key, id, SIGNALLING_ALPN).unwrap();
    let tcp = TcpStream::connect(at(server)).await?;
    let name = ServerName::try_from("rendezvous").unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, tcp).await
}

impl StreamPeer {
    async fn connect(server: &Server, key: KeyPair) -> Self {
        let stream = dial(server, &key, server.id()).await.unwrap();
        Self { key, stream, decoder: Decoder::default(), registered: None }
    }

    async fn register(server: &Server) -> Self {
        let mut peer = Self::connect(server, KeyPair::generate().unwrap()).await;
        peer.begin(1, open()).await;
        peer.registered = Some(peer.registration().await);
        peer
    }

    async fn begin(&mut self, sequence: u64, says: Register) {
        let mut bytes = BytesMut::new();
        put_binding(sequence, &mut bytes);
        put_message(&encode(&Request::Register(says)).unwrap(), &mut bytes);
        self.stream.write_all(&bytes).await.unwrap();
    }

    async fn tell(&mut self, request: &Request) {
        let mut bytes = BytesMut::new();
        put_message(&encode(request).unwrap(), &mut bytes);
        self.stream.write_all(&bytes).await.unwrap();
    }

    async fn send_frames(&mut self, frames: &[u8], segment: usize) {
        let mut backlog = Backlog::new(1 << 20);
        assert!(backlog.push_frames(frames, segment));
        self.stream.write_all(&backlog.take(BytesMut::new())).await.unwrap();
    }

    /// The next record; `None` at the end of the stream.
    async fn record(&mut self) -> Option<Record> {
        let reading = async {
            loop {
                if let Some(record) = self.decoder.poll().unwrap() {
                    return Some(record);
                }
                if self.stream.read_buf(self.decoder.buffer()).await.unwrap_or(0) == 0 {
                    return None;
                }
            }
        };
        tokio::time::timeout(PATIENCE, reading).await.expect("a record")
    }

    async fn notice(&mut self) -> Notice {
        match self.record().await {
            Some(Record::Message(body)) => decode(&body).unwrap(),
            other => panic!("{other:?} where a notice should be"),
        }
    }

    async fn registration(&mut self) -> Registered {
        match self.notice().await {
            Notice::Registered(registered) => registered,
            other => panic!("{other:?}"),
        }
    }

    async fn introduction(&mut self) -> Introduction {
        match self.notice().await {
            Notice::Introduction(introduction) => introduction,
            other => panic!("{other:?}"),
        }
    }

    async fn ask(&mut self, target: PeerId) {
        let introduce =
            Introduce { request: RequestId(1), target, purpose: Purpose::Session, first_flight: Vec::new() };
        self.tell(&Request::Introduce(introduce)).await;
    }

    /// Frames until so many bytes of them have come.
    async fn frames(&mut self, length: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < length {
            match self.record().await {
                Some(Record::Frames { bytes, .. }) => all.extend_from_slice(&bytes),
                other => panic!("{other:?} where frames should be"),
            }
        }
        all
    }

    /// The code with which the server ends the stream.
    async fn close_code(&mut self) -> u32 {
        loop {
            match self.record().await.expect("a close record") {
                Record::Close { code, .. } => return code,
                Record::Message(_) | Record::Frames { .. } | Record::Binding(_) => {}
            }
        }
    }
}

#[tokio::test]
async fn a_stream_relays_to_udp_and_back_without_a_bind_request() {
    let server = serve().await;
    let mut a = StreamPeer::register(&server).await;
    let mut b = Peer::register(&server).await;
    b.bind().await;
    a.ask(b.id()).await;
    let introduction = a.introduction().await;
    b.introduction().await;
    assert!(a.registered.as_ref().unwrap().observed.port() != 0);
    let batch = frame(&introduction, &[7; 96]).repeat(20);
    a.send_frames(&batch, 100).await;
    for _ in 0..20 {
        assert_eq!(b.receive().await, frame(&introduction, &[7; 96]));
    }
    for size in [1, 50, 50, 1_448] {
        b.socket.send_to(&frame(&introduction, &vec![9; size]), b.relay).await.unwrap();
    }
    let expected: Vec<u8> =
        [1, 50, 50, 1_448].into_iter().flat_map(|size| frame(&introduction, &vec![9; size])).collect();
    assert_eq!(a.frames(expected.len()).await, expected);
    assert_eq!(server.relay_count().forwarded, 24);
}

#[tokio::test]
async fn two_streams_are_relayed_to_each_other_and_a_third_is_not() {
    let server = serve().await;
    let mut a = StreamPeer::register(&server).await;
    let mut b = StreamPeer::register(&server).await;
    let mut c = StreamPeer::register(&server).await;
    a.ask(b.key.id()).await;
    let introduction = a.introduction().await;
    assert_eq!(b.introduction().await.channel, introduction.channel);
    c.send_frames(&frame(&introduction, b"not a member"), 1_500).await;
    c.tell(&Request::Close(introduction.introduction)).await;
    a.send_frames(&frame(&introduction, b"there"), 1_500).await;
    assert_eq!(b.frames(9).await, frame(&introduction, b"there"));
    b.send_frames(&frame(&introduction, b"and back"), 1_500).await;
    assert_eq!(a.frames(12).await, frame(&introduction, b"and back"));
    // A stream that has ended takes nothing, and harms nobody.
    drop(b);
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while server.relay_count().dropped == 0 {
        assert!(tokio::time::Instant::now() < deadline, "frames for a stream that has ended are dropped");
        a.send_frames(&frame(&introduction, b"anybody"), 1_500).await;
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_registration_moves_from_udp_to_a_stream_and_back_with_its_introductions() {
    let server = serve().await;
    let mut a = Peer::register(&server).await;
    a.bind().await;
    let says = open();
    let mut b = Peer::register_as(&server, KeyPair::generate().unwrap(), says.clone()).await;
    b.bind().await;
    let (introduction, _) = introduce(&mut a, &mut b).await;

    let pem = b.key.to_pem();
    let key = || KeyPair::from_pem(&pem).unwrap();
    let mut stream = StreamPeer::connect(&server, key()).await;
    stream.begin(b.sequence + 1, says.clone()).await;
    let moved = stream.registration().await;
    assert_eq!((moved.registration, &moved.key), (b.registered.registration, &b.registered.key));
    assert_eq!(b.line.close_code().await, close_code::SHUTDOWN, "one connection at a time");
    a.socket.send_to(&frame(&introduction, b"over TCP"), a.relay).await.unwrap();
    assert_eq!(stream.frames(12).await, frame(&introduction, b"over TCP"));
    // A bind request from before the move changes nothing.
    let (_, late) = b.bind_request();
    b.socket.send_to(&late, b.relay).await.unwrap();
    stream.send_frames(&frame(&introduction, b"from TCP"), 1_500).await;
    assert_eq!(a.receive().await, frame(&introduction, b"from TCP"));

    // Back: signalling first, and the stream relays until the new binding stands.
    let sequence = b.sequence + 1;
    let mut back = Peer::register_as(&server, key(), says).await;
    assert_eq!(back.registered.registration, moved.registration);
    stream.send_frames(&frame(&introduction, b"still TCP"), 1_500).await;
    assert_eq!(a.receive().await, frame(&introduction, b"still TCP"));
    back.sequence = sequence;
    back.bind().await;
    a.socket.send_to(&frame(&introduction, b"UDP again"), a.relay).await.unwrap();
    assert_eq!(back.receive().await, frame(&introduction, b"UDP again"));
    drop(stream);
    // The end of the former stream is not that of the registration.
    a.ask(back.id(), Vec::new()).await;
    a.introduction().await;
}

#[tokio::test]
async fn a_stream_is_confirmed_what_it_binds() {
    let server = serve().await;
    let mut a = StreamPeer::register(&server).await;
    for sequence in [1, 5, 3] {
        let mut bytes = BytesMut::new();
        put_binding(sequence, &mut bytes);
        a.stream.write_all(&bytes).await.unwrap();
        assert_eq!(a.record().await, Some(Record::Binding(sequence.max(if sequence == 3 { 5 } else { 0 }))));
    }
}

#[tokio::test]
async fn a_reader_that_does_not_read_costs_a_bounded_queue_and_nobody_else() {
    let server = serve().await;
    let mut a = Peer::register(&server).await;
    a.bind().await;
    let mut stalled = StreamPeer::register(&server).await;
    a.ask(stalled.key.id(), Vec::new()).await;
    let to_stalled = a.introduction().await;
    let mut c = Peer::register(&server).await;
    c.bind().await;
    let (to_c, _) = introduce(&mut a, &mut c).await;
    // Kernel buffers take some megabytes before anything waits.
    let deadline = tokio::time::Instant::now() + 3 * PATIENCE;
    while server.relay_count().dropped == 0 {
        assert!(tokio::time::Instant::now() < deadline, "nothing is ever dropped");
        for _ in 0..64 {
            a.socket.send_to(&frame(&to_stalled, &[1; 1_400]), a.relay).await.unwrap();
        }
        a.socket.send_to(&frame(&to_c, b"on time"), a.relay).await.unwrap();
        assert_eq!(c.receive().await, frame(&to_c, b"on time"));
    }
    stalled.introduction().await;
    stalled.frames(1_404).await;
}

#[tokio::test]
async fn what_is_no_registration_is_told_so() {
    let limits = Limits { registrations: 1, ..Limits::default() };
    let server = serve_with(limits).await;
    let key = || KeyPair::generate().unwrap();
    let mut nonsense = StreamPeer::connect(&server, key()).await;
    nonsense.stream.write_all(&[9, 9, 9, 9]).await.unwrap();
    assert_eq!(nonsense.close_code().await, close_code::MALFORMED);
    let mut unbound = StreamPeer::connect(&server, key()).await;
    unbound.tell(&Request::Register(open())).await;
    assert_eq!(unbound.close_code().await, close_code::NOT_REGISTERED);
    let mut first = StreamPeer::register(&server).await;
    let mut second = StreamPeer::connect(&server, key()).await;
    second.begin(1, open()).await;
    assert_eq!(second.close_code().await, close_code::REFUSED);
    first.tell(&Request::Register(open())).await;
    assert_eq!(first.close_code().await, close_code::MALFORMED);
    let mut third = StreamPeer::connect(&server, key()).await;
    third.begin(1, open()).await;
    third.registration().await;
    server.shutdown().await;
    assert_eq!(third.close_code().await, close_code::SHUTDOWN);
}

#[tokio::test]
async fn a_stream_pins_the_servers_key() {
    let server = serve().await;
    let error = dial(&server, &KeyPair::generate().unwrap(), PeerId::from_bytes([3; 32])).await.unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");
}

/// A client that asks for no raw public key and believes every certificate.
async fn https(server: &Server, request: &[u8]) -> String {
    #[derive(Debug)]
    struct Believer;
    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::pki_types::{CertificateDer, UnixTime};
    impl ServerCertVerifier for Believer {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, rustls::Error> {
            Ok(ServerCertVerified::assertion())
        }
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &rustls::DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Err(rustls::Error::General("TLS 1.3 only".into()))
        }
        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &rustls::DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Ok(HandshakeSignatureValid::assertion())
        }
        fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
            tls::provider().signature_verification_algorithms.supported_schemes()
        }
    }
    let config = rustls::ClientConfig::builder_with_provider(tls::provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Believer))
        .with_no_client_auth();
    let tcp = TcpStream::connect(at(server)).await.unwrap();
    let name = ServerName::try_from("anything.example").unwrap();
    let mut stream = TlsConnector::from(Arc::new(config)).connect(name, tcp).await.unwrap();
    stream.write_all(request).await.unwrap();
    let mut answer = Vec::new();
    let reading = stream.read_to_end(&mut answer);
    // An end without TLS's own is one as well.
    let _ = tokio::time::timeout(PATIENCE, reading).await.expect("an end");
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn others_get_https_and_what_is_no_http_is_closed() {
    let server = serve().await;
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").into_bytes();
    let health = https(&server, &get("/healthz")).await;
    assert!(health.starts_with("HTTP/1.1 200 ") && health.ends_with("\r\n\r\nok\n"), "{health}");
    assert!(https(&server, &get("/")).await.contains("rendezvous server"));
    assert!(https(&server, &get("/etc/passwd")).await.starts_with("HTTP/1.1 404 "));
    assert!(!https(&server, b"\x00\x01\x02\x03\r\n\r\n").await.contains(" 200 "));
    let long = [&b"GET / HTTP/1.1\r\nX: "[..], &[b'a'; 20_000], b"\r\n\r\n"].concat();
    assert!(!https(&server, &long).await.contains(" 200 "), "headers are bounded");
    // Not even TLS.
    let mut plain = TcpStream::connect(at(&server)).await.unwrap();
    plain.write_all(&get("/")).await.unwrap();
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(PATIENCE, plain.read_to_end(&mut answer)).await.expect("an end");
    assert!(!answer.starts_with(b"HTTP"));
}

#[tokio::test]
async fn a_silent_connection_is_closed_and_one_source_has_only_so_many() {
    let server = serve().await;
    let mut silent = Vec::new();
    for _ in 0..80 {
        silent.push(TcpStream::connect(at(&server)).await.unwrap());
    }
    // The first ones are served, the last ones closed at once; and with the handshake's time all are gone.
    let started = tokio::time::Instant::now();
    let mut byte = [0];
    for stream in silent.iter_mut().rev() {
        let end = tokio::time::timeout(3 * PATIENCE, stream.read(&mut byte)).await.expect("an end");
        assert!(end.unwrap_or(0) == 0);
        if started.elapsed() > Duration::from_secs(2) {
            break;
        }
    }
    assert!(started.elapsed() > Duration::from_secs(2), "none was given the time for a handshake");
    StreamPeer::register(&server).await;
}

#[tokio::test]
async fn tcp_can_be_switched_off_or_moved() {
    let server = builder().tls_port(TlsPort::Off).start().await.unwrap();
    assert_eq!(server.ports().tls, None);
    let same = serve().await;
    assert_eq!(same.ports().tls, Some(same.ports().signalling));
    let taken = builder().tls_port(TlsPort::Number(same.ports().signalling)).start().await.unwrap_err();
    assert!(taken.to_string().starts_with("TCP port "), "{taken}");
    let other = builder().tls_port(TlsPort::Number(0)).start().await.unwrap();
    assert!(other.ports().tls.is_some_and(|port| port != 0));
}
