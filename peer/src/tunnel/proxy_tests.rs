use rendezvous_wire::PeerId;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use super::*;

fn server(host: &str) -> RendezvousAddress {
    RendezvousAddress {
        id: PeerId::from_bytes([1; 32]),
        host: host.to_owned(),
        alternatives: Vec::new(),
        port: 443,
    }
}

fn chosen(proxy: &str, no_proxy: &str, host: &str) -> Result<Option<Proxy>, ProxyError> {
    let matcher = Matcher::builder().https(proxy.to_owned()).no(no_proxy.to_owned()).build();
    Proxy::chosen(&matcher, &server(host))
}

#[test]
fn the_environment_names_the_proxy_and_who_needs_none() {
    let name = |proxy, no, host| chosen(proxy, no, host).unwrap().map(|proxy| proxy.name);
    assert_eq!(name("http://proxy.example:3128", "", "rv.example").as_deref(), Some("proxy.example:3128"));
    assert_eq!(name("http://[2001:db8::1]:3128", "", "rv.example").as_deref(), Some("[2001:db8::1]:3128"));
    assert_eq!(name("proxy.example:3128", "", "2001:db8::7").as_deref(), Some("proxy.example:3128"));
    assert_eq!(name("http://proxy.example:3128", "other.example,rv.example", "rv.example"), None);
    assert_eq!(name("http://proxy.example:3128", "203.0.113.0/24", "203.0.113.9"), None);
    assert_eq!(name("", "", "rv.example"), None);
    let unsupported = chosen("socks5://proxy.example:1080", "", "rv.example").unwrap_err();
    assert_eq!(unsupported, ProxyError::Unsupported { proxy: "proxy.example:1080".into() });
}

#[test]
fn user_and_password_are_decoded_and_never_shown() {
    let proxy = chosen("http://us%65r:p%40ss@proxy.example:3128", "", "rv.example").unwrap().unwrap();
    // user:p@ss
    assert_eq!(proxy.authorization.as_ref().unwrap(), "Basic dXNlcjpwQHNz");
    assert!(!format!("{proxy:?}").contains("dXNlcjpwQHNz"), "{proxy:?}");
}

/// A proxy that gives this answer, with what it was asked.
async fn against(answer: &'static [u8]) -> (Result<TcpStream, ProxyError>, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let proxy = chosen(&format!("http://user:secret@127.0.0.1:{port}"), "", "rv.example").unwrap().unwrap();
    let target = server("rv.example");
    let serving = async {
        let (mut tcp, _) = listener.accept().await.unwrap();
        let mut asked = Vec::new();
        while !asked.ends_with(b"\r\n\r\n") {
            assert_ne!(tcp.read_buf(&mut asked).await.unwrap(), 0);
        }
        tcp.write_all(answer).await.unwrap();
        (String::from_utf8(asked).unwrap(), tcp)
    };
    let (connected, (asked, mut tcp)) = tokio::join!(proxy.connect(&target), serving);
    let connected = match connected {
        Ok(mut stream) => {
            stream.write_all(b"through").await.unwrap();
            let mut through = [0; 7];
            tcp.read_exact(&mut through).await.unwrap();
            assert_eq!(&through, b"through");
            Ok(stream)
        }
        Err(error) => Err(error),
    };
    (connected, asked)
}

#[tokio::test]
async fn a_proxy_connects() {
    for answer in
        [&b"HTTP/1.1 200 OK\r\n\r\n"[..], b"HTTP/1.0 200 Connection established\r\nProxy-agent: x\r\n\r\n"]
    {
        let (connected, asked) = against(answer).await;
        connected.unwrap();
        assert!(asked.starts_with("CONNECT rv.example:443 HTTP/1.1\r\n"), "{asked}");
        let asked = asked.to_ascii_lowercase();
        assert!(asked.contains("\r\nhost: rv.example:443\r\n"), "{asked}");
        assert!(asked.contains("\r\nproxy-authorization: basic dxnlcjpzzwnyzxq=\r\n"), "{asked}");
    }
}

#[tokio::test]
async fn every_refusal_names_the_proxy_and_keeps_the_password() {
    for (answer, words) in [
        (
            &b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"[..],
            "user name and a password",
        ),
        (b"HTTP/1.1 403 Filtered\r\nContent-Length: 0\r\n\r\n", "403 Forbidden"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://portal/\r\nContent-Length: 0\r\n\r\n", "302 Found"),
        (b"SSH-2.0-OpenSSH_9.9\r\n\r\n", "does not answer as an HTTP proxy"),
        (b"HTTP/1.1 200 OK\r\n\r\nand more", "data of its own"),
    ] {
        let error = against(answer).await.0.unwrap_err().to_string();
        assert!(error.contains(words) && error.contains("127.0.0.1:"), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }
    let proxy = chosen("http://127.0.0.1:1", "", "rv.example").unwrap().unwrap();
    let error = proxy.connect(&server("rv.example")).await.unwrap_err();
    assert!(matches!(error, ProxyError::Unreachable { .. }), "{error}");
}
