use rendezvous_wire::PeerId;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::*;

fn address(id: PeerId, port: u16) -> RendezvousAddress {
    RendezvousAddress { id, host: "127.0.0.1".to_owned(), alternatives: Vec::new(), port }
}

/// What becomes of a connection to a server of this kind.
async fn against(config: rustls::ServerConfig, expected: PeerId) -> Result<Dialled, StreamError> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = address(expected, listener.local_addr().unwrap().port());
    let serving = tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        let _ = TlsAcceptor::from(Arc::new(config)).accept(tcp).await;
    });
    let dialled = secured(&server).await;
    serving.await.unwrap();
    dialled
}

/// As [`dial`], without the environment.
async fn secured(server: &RendezvousAddress) -> Result<Dialled, StreamError> {
    let tcp = straight(server).await?;
    let address = tcp.peer_addr().unwrap();
    let stream = secure(tcp, server, &KeyPair::generate().unwrap()).await?;
    Ok(Dialled { stream, address, through_proxy: false })
}

fn web_server(alpn: &[&[u8]]) -> rustls::ServerConfig {
    let made = rcgen::generate_simple_self_signed(["portal.example".to_owned()]).unwrap();
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let mut config = rustls::ServerConfig::builder_with_provider(tls::provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key.into())
        .unwrap();
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    config
}

#[tokio::test]
async fn a_server_is_known_by_its_key_and_by_nothing_else() {
    let key = KeyPair::generate().unwrap();
    let config = || tls::server_config(&key, None, SIGNALLING_ALPN).unwrap();
    assert!(against(config(), key.id()).await.is_ok());
    let other = PeerId::from_bytes([7; 32]);
    assert!(matches!(against(config(), other).await, Err(StreamError::WrongKey)));
    for alpn in [&[][..], &[&b"http/1.1"[..]], &[SIGNALLING_ALPN]] {
        let failed = against(web_server(alpn), key.id()).await;
        let Err(error @ StreamError::Intercepted(_)) = failed else { panic!("{alpn:?}") };
        let said = error.explain(&address(key.id(), 443)).unwrap().to_string();
        assert!(said.contains("not the rendezvous server") && said.contains("captive portal"), "{said}");
    }
}

#[tokio::test]
async fn what_is_no_tls_is_told_from_nobody() {
    let id = PeerId::from_bytes([7; 32]);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = address(id, listener.local_addr().unwrap().port());
    let answer = async {
        let (mut tcp, _) = listener.accept().await.unwrap();
        let mut hello = [0; 64];
        let _ = tcp.read(&mut hello).await;
        tcp.write_all(b"HTTP/1.1 302 Found\r\nLocation: http://portal.example/\r\n\r\n").await.unwrap();
        let _ = tcp.read_to_end(&mut Vec::new()).await;
    };
    let (dialled, ()) = tokio::join!(secured(&server), answer);
    let Err(StreamError::Intercepted(cause)) = dialled else { panic!("not intercepted") };
    assert!(cause.contains("not TLS"), "{cause}");
    drop(listener);
    assert!(matches!(secured(&server).await, Err(StreamError::Refused)));
}

#[tokio::test]
async fn a_host_name_is_sent_for_whoever_routes_by_it_and_an_address_is_not() {
    for (host, expected) in [("localhost", Some("localhost")), ("127.0.0.1", None)] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server =
            RendezvousAddress { host: host.to_owned(), ..address(PeerId::from_bytes([7; 32]), port) };
        let hello = async {
            let (tcp, _) = listener.accept().await.unwrap();
            let start = tokio_rustls::LazyConfigAcceptor::new(rustls::server::Acceptor::default(), tcp);
            let start = start.await.unwrap();
            let hello = start.client_hello();
            assert!(hello.alpn().unwrap().any(|protocol| protocol == SIGNALLING_ALPN));
            hello.server_name().map(str::to_owned)
        };
        let (dialled, name) = tokio::join!(secured(&server), hello);
        assert!(dialled.is_err());
        assert_eq!(name.as_deref(), expected);
    }
}
