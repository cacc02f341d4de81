//! What is left where UDP does not pass: TLS over TCP, and whether somebody else answers in the server's place.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rendezvous_wire::{KeyPair, RendezvousAddress};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::signalling::ServerError;
use crate::tunnel::dial::{self, Dialled, StreamError};

/// How long a connection or an answer may take.
const PATIENCE: Duration = Duration::from_secs(3);

/// Most bytes of an HTTP answer that are read: the status line and the headers are wanted.
const MOST: usize = 4_096;

/// TLS to the TCP port of the server, which carries signalling and relay where UDP does not pass.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Tcp {
    /// The server has proved its key.
    Works {
        /// What we are connected to: the server, or the proxy that the environment names.
        address: SocketAddr,
        /// Whether it is the proxy.
        through_proxy: bool,
        /// How long that took.
        took: Duration,
    },
    /// The server's host, or somebody in its place, said that nobody listens there: TCP passes.
    Refused,
    /// Nothing came back.
    Silent,
    /// Somebody else answered, or the proxy did not help.
    Failed(ServerError),
}

impl Tcp {
    /// A short name for programs.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Works { through_proxy: false, .. } => "works",
            Self::Works { through_proxy: true, .. } => "works-through-proxy",
            Self::Refused => "refused",
            Self::Silent => "silent",
            Self::Failed(ServerError::WrongKey { .. }) => "another-key",
            Self::Failed(ServerError::Proxy(_)) => "proxy",
            Self::Failed(_) => "intercepted",
        }
    }

    /// Whether peers can do with it.
    pub const fn works(&self) -> bool {
        matches!(self, Self::Works { .. })
    }
}

/// Connects as peers do, through a proxy where the environment names one.
pub(super) async fn connect(server: &RendezvousAddress) -> Tcp {
    let Ok(key) = KeyPair::generate() else { return Tcp::Silent };
    let start = Instant::now();
    match dial::dial(server, &key).await {
        Ok(Dialled { address, through_proxy, .. }) => {
            Tcp::Works { address, through_proxy, took: start.elapsed() }
        }
        Err(StreamError::Refused) => Tcp::Refused,
        Err(error) => error.explain(server).map_or(Tcp::Silent, Tcp::Failed),
    }
}

/// Where plain HTTP to the server's host is sent instead, as a captive portal does it (RFC 8952). Portals answer HTTP in the name of
/// whomever one asks; a rendezvous server has no web site.
pub(super) async fn portal(ip: IpAddr, host: &str) -> Option<String> {
    let ask = async {
        let mut stream = TcpStream::connect((ip, 80)).await.ok()?;
        let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut answer = Vec::new();
        stream.take(MOST as u64).read_to_end(&mut answer).await.ok()?;
        redirect(&String::from_utf8_lossy(&answer), host)
    };
    tokio::time::timeout(PATIENCE, ask).await.ok()?
}

/// The other host that an HTTP answer sends to; for 511 (RFC 6585, section 6) without one, a word for it.
fn redirect(answer: &str, host: &str) -> Option<String> {
    let (status, headers) = answer.split_once("\r\n")?;
    let code = status.strip_prefix("HTTP/1.")?.split(' ').nth(1)?;
    let location = headers.lines().take_while(|line| !line.is_empty()).find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("location").then(|| value.trim())
    });
    let elsewhere = location.filter(|location| {
        let (_, place) = location.split_once("://").unwrap_or_default();
        let named = place.split(['/', ':', '?']).next().unwrap_or_default();
        !named.is_empty() && !named.eq_ignore_ascii_case(host)
    });
    match (code, elsewhere) {
        ("301" | "302" | "303" | "307" | "308" | "511", Some(location)) => Some(printable(location)),
        ("511", None) => Some("a login page".to_owned()),
        _ => None,
    }
}

/// What a stranger wrote, fit for a terminal.
fn printable(text: &str) -> String {
    text.chars().filter(char::is_ascii_graphic).take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn portals_are_told_from_servers() {
        let portal = "HTTP/1.1 302 Found\r\nServer: x\r\nLOCATION: http://login.hotel.example/?to=\u{1b}[2J\r\n\r\nbody";
        assert_eq!(redirect(portal, "rv.example").as_deref(), Some("http://login.hotel.example/?to=[2J"));
        for (answer, expected) in [
            ("HTTP/1.1 511 Network Authentication Required\r\n\r\n", Some("a login page")),
            ("HTTP/1.1 301 Moved\r\nLocation: https://rv.example/\r\n\r\n", None),
            ("HTTP/1.1 301 Moved\r\nLocation: /index.html\r\n\r\n", None),
            ("HTTP/1.1 200 OK\r\nLocation: http://other.example/\r\n\r\n", None),
            ("HTTP/1.1 302 Found\r\n\r\nLocation: http://other.example/", None),
            ("SSH-2.0-OpenSSH\r\n", None),
            ("", None),
        ] {
            assert_eq!(redirect(answer, "rv.example").as_deref(), expected, "{answer:?}");
        }
    }
}
