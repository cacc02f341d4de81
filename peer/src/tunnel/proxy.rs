//! HTTP CONNECT (RFC 9110, section 9.3.6) through the proxy that the environment names.

use std::net::Ipv6Addr;

use bytes::Bytes;
use http_body_util::Empty;
use hyper::client::conn::http1;
use hyper::header::{HOST, HeaderValue, PROXY_AUTHORIZATION};
use hyper::{Method, Request, StatusCode, Uri};
use hyper_util::client::proxy::matcher::Matcher;
use hyper_util::rt::TokioIo;
use rendezvous_wire::RendezvousAddress;
use tokio::net::TcpStream;

use super::dial::race;
use crate::resolve::{has_route, order};

/// The port of a proxy whose address has none: the one of plain HTTP.
const DEFAULT_PORT: u16 = 80;

/// A proxy that does not do what it is there for. Every error names it, without user name and password.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProxyError {
    /// It is of a kind that is not supported.
    #[error(
        "the environment names {proxy} as the proxy, of a kind that is not supported; name an HTTP proxy, as in HTTPS_PROXY=http://host:port, \
         or set NO_PROXY to the server's host"
    )]
    Unsupported {
        /// Its address.
        proxy: String,
    },
    /// No connection came to be.
    #[error("the proxy {proxy} does not answer: {cause}. Check HTTPS_PROXY, and whether the proxy runs")]
    Unreachable {
        /// Its address.
        proxy: String,
        /// What the system said.
        cause: String,
    },
    /// It wants to know who we are (407).
    #[error(
        "the proxy {proxy} wants a user name and a password, or others than it was given; set HTTPS_PROXY=http://user:password@host:port (Basic \
         authentication, special characters as %XX)"
    )]
    Authentication {
        /// Its address.
        proxy: String,
    },
    /// It does not let us through.
    #[error(
        "the proxy {proxy} does not connect to {target}: it answers {status}. Whoever runs it may have to allow that host and port"
    )]
    Refused {
        /// Its address.
        proxy: String,
        /// Where it was to connect to.
        target: String,
        /// Its answer.
        status: String,
    },
    /// It does not speak HTTP.
    #[error("the proxy {proxy} does not answer as an HTTP proxy does: {cause}. Check HTTPS_PROXY")]
    Protocol {
        /// Its address.
        proxy: String,
        /// What was wrong.
        cause: String,
    },
}

/// An HTTP proxy.
#[derive(Debug)]
pub(crate) struct Proxy {
    host: String,
    port: u16,
    /// Host and port, as errors name it.
    name: String,
    authorization: Option<HeaderValue>,
}

impl Proxy {
    /// The one that HTTPS_PROXY, or ALL_PROXY, names for this server, unless NO_PROXY excepts it; in capitals or not.
    pub(crate) fn of(server: &RendezvousAddress) -> Result<Option<Self>, ProxyError> {
        Self::chosen(&Matcher::from_env(), server)
    }

    fn chosen(matcher: &Matcher, server: &RendezvousAddress) -> Result<Option<Self>, ProxyError> {
        let Ok(target) = format!("https://{}", authority(&server.host, server.port)).parse::<Uri>() else {
            return Ok(None);
        };
        let Some(chosen) = matcher.intercept(&target) else { return Ok(None) };
        let uri = chosen.uri();
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        let port = uri.port_u16().unwrap_or(DEFAULT_PORT);
        let name = authority(&host, port);
        if uri.scheme_str() != Some("http") || host.is_empty() {
            return Err(ProxyError::Unsupported { proxy: name });
        }
        Ok(Some(Self { host, port, name, authorization: chosen.basic_auth().cloned() }))
    }

    /// Has it connect to the server: under the first of its names with which that works.
    pub(crate) async fn connect(&self, server: &RendezvousAddress) -> Result<TcpStream, ProxyError> {
        let mut result = self.connect_to(authority(&server.host, server.port)).await;
        for host in &server.alternatives {
            // Another name of the server is no help with the proxy itself.
            if matches!(result, Err(ProxyError::Refused { .. })) {
                result = self.connect_to(authority(host, server.port)).await;
            }
        }
        result
    }

    async fn connect_to(&self, target: String) -> Result<TcpStream, ProxyError> {
        let proxy = || self.name.clone();
        let unreachable =
            |error: std::io::Error| ProxyError::Unreachable { proxy: proxy(), cause: error.to_string() };
        let addresses =
            tokio::net::lookup_host((self.host.as_str(), self.port)).await.map_err(unreachable)?;
        let tcp = race(&order(&addresses.collect::<Vec<_>>(), has_route)).await.map_err(unreachable)?;
        let protocol = |cause: String| ProxyError::Protocol { proxy: proxy(), cause };
        let http = |error: hyper::Error| protocol(error.to_string());

        let (mut sender, connection) = http1::handshake(TokioIo::new(tcp)).await.map_err(http)?;
        let _running = AbortOnDrop(tokio::spawn(connection.with_upgrades()));
        let mut request = Request::builder()
            .method(Method::CONNECT)
            .uri(&target)
            .header(HOST, &target)
            .body(Empty::<Bytes>::new())
            .map_err(|error| protocol(error.to_string()))?;
        if let Some(authorization) = &self.authorization {
            request.headers_mut().insert(PROXY_AUTHORIZATION, authorization.clone());
        }
        let response = sender.send_request(request).await.map_err(http)?;
        match response.status() {
            // 401 is what tinyproxy has for a wrong password.
            StatusCode::PROXY_AUTHENTICATION_REQUIRED | StatusCode::UNAUTHORIZED => {
                return Err(ProxyError::Authentication { proxy: proxy() });
            }
            status if !status.is_success() => {
                return Err(ProxyError::Refused { proxy: proxy(), target, status: status.to_string() });
            }
            _ => {}
        }
        let upgraded = hyper::upgrade::on(response).await.map_err(http)?;
        let parts = upgraded.downcast::<TokioIo<TcpStream>>();
        let parts = parts.map_err(|_| protocol("the connection is lost".to_owned()))?;
        if !parts.read_buf.is_empty() {
            // The server says nothing before we do.
            return Err(protocol("it sends data of its own".to_owned()));
        }
        Ok(parts.io.into_inner())
    }
}

/// `host:port`, an IPv6 address in brackets.
fn authority(host: &str, port: u16) -> String {
    match host.parse::<Ipv6Addr>() {
        Ok(ip) => format!("[{ip}]:{port}"),
        Err(_) => format!("{host}:{port}"),
    }
}

/// Ends the task that drives the HTTP connection, should it still run.
struct AbortOnDrop(tokio::task::JoinHandle<Result<(), hyper::Error>>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
#[path = "proxy_tests.rs"]
mod tests;
