//! What is forwarded, from where to where, as text and on the wire.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest host name or path, in bytes: a name in the DNS has at most 253 (RFC 1035, 2.3.4), a Unix socket's path 107 (unix(7)).
pub(crate) const MAX_NAME: usize = 253;

/// A transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Protocol {
    /// Streams of bytes.
    Tcp,
    /// Datagrams.
    Udp,
}

/// What is connected to on the far side of a session: `host:port`, `udp:host:port` or `/path/of/a/socket`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Target {
    /// A name or an address, which the far side resolves, and a port.
    Host {
        /// How it is talked to.
        protocol: Protocol,
        /// The name, or the address without brackets.
        host: String,
        /// The port.
        port: u16,
    },
    /// A Unix stream socket, by its absolute path.
    Unix(String),
}

/// Where connections are taken: `[address:]port`, `udp:[address:]port` or `/path/of/a/socket`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Bind {
    /// An address of this machine and a port; port 0 is any free one.
    Address(Protocol, SocketAddr),
    /// A Unix stream socket, by its absolute path; it must not exist.
    Unix(String),
}

/// `[address:]port:host:port` with its variants: from where to where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forwarding {
    /// Where connections are taken.
    pub from: Bind,
    /// What they lead to.
    pub to: Target,
}

/// Why a text names nothing to forward.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SpecError {
    /// Too few or too many parts.
    #[error("expected {0}")]
    Form(&'static str),
    /// A port that is no number from 1 to 65535.
    #[error("{0:?} is no port from 1 to 65535")]
    Port(String),
    /// An address to listen at that is none of a machine.
    #[error("{0:?} is no address to listen at; IPv6 addresses stand in brackets, `*` is every IPv4 address")]
    Address(String),
    /// A name that no host has.
    #[error("{0:?} is no name or address of a host; IPv6 addresses stand in brackets")]
    Host(String),
    /// A path that no socket can have.
    #[error("{0:?} is no absolute path of at most {MAX_NAME} bytes")]
    Path(String),
    /// Datagrams to a stream socket.
    #[error("Unix sockets are forwarded as streams, not with udp:")]
    UdpUnix,
}

const FORWARDING: &str = "[udp:][address:]port:host:port, with /path for address:port on either side";
const BIND: &str = "[udp:][address:]port or /path";
const TARGET: &str = "[udp:]host:port or /path";

fn split_protocol(text: &str) -> (Protocol, &str) {
    match text.strip_prefix("udp:") {
        Some(rest) => (Protocol::Udp, rest),
        None => (Protocol::Tcp, text.strip_prefix("tcp:").unwrap_or(text)),
    }
}

/// Parts between colons; what stands in brackets is one part, without them.
fn parts(text: &str) -> Option<Vec<&str>> {
    let mut parts = Vec::new();
    let mut rest = text;
    loop {
        let (part, tail) = match rest.strip_prefix('[') {
            Some(bracketed) => bracketed.split_once(']')?,
            None => rest.split_at(rest.find(':').unwrap_or(rest.len())),
        };
        parts.push(part);
        match tail.strip_prefix(':') {
            Some(tail) => rest = tail,
            None => return tail.is_empty().then_some(parts),
        }
    }
}

fn port(text: &str, least: u16) -> Result<u16, SpecError> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let port = if digits { text.parse().ok() } else { None };
    port.filter(|port| *port >= least).ok_or_else(|| SpecError::Port(text.to_owned()))
}

fn path(text: &str) -> Result<String, SpecError> {
    let sound = text.starts_with('/') && text.len() <= MAX_NAME && !text.contains('\0');
    if sound { Ok(text.to_owned()) } else { Err(SpecError::Path(text.to_owned())) }
}

/// A name or an address, and nothing that a terminal or a resolver could mistake for anything else.
pub(super) fn host(text: &str) -> Result<String, SpecError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let name = !text.is_empty() && text.len() <= MAX_NAME && text.chars().all(plain);
    if name || text.parse::<IpAddr>().is_ok() {
        Ok(text.to_owned())
    } else {
        Err(SpecError::Host(text.to_owned()))
    }
}

fn address(text: &str) -> Result<IpAddr, SpecError> {
    match text {
        "localhost" => Ok(Ipv4Addr::LOCALHOST.into()),
        "*" => Ok(Ipv4Addr::UNSPECIFIED.into()),
        _ => text.parse().map_err(|_| SpecError::Address(text.to_owned())),
    }
}

/// Takes a place to listen at from the front.
fn take_bind<'a, 'b>(protocol: Protocol, parts: &'b [&'a str]) -> Result<(Bind, &'b [&'a str]), SpecError> {
    match parts {
        [first, rest @ ..] if first.starts_with('/') => {
            if protocol == Protocol::Udp {
                Err(SpecError::UdpUnix)
            } else {
                Ok((Bind::Unix(path(first)?), rest))
            }
        }
        [first, rest @ ..] if first.bytes().all(|byte| byte.is_ascii_digit()) => {
            let address = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port(first, 0)?);
            Ok((Bind::Address(protocol, address), rest))
        }
        [first, second, rest @ ..] => {
            let address = SocketAddr::new(address(first)?, port(second, 0)?);
            Ok((Bind::Address(protocol, address), rest))
        }
        _ => Err(SpecError::Form(BIND)),
    }
}

fn target(protocol: Protocol, parts: &[&str]) -> Result<Target, SpecError> {
    match parts {
        [one] if one.starts_with('/') && protocol == Protocol::Udp => Err(SpecError::UdpUnix),
        [one] if one.starts_with('/') => Ok(Target::Unix(path(one)?)),
        [name, number] => Ok(Target::Host { protocol, host: host(name)?, port: port(number, 1)? }),
        _ => Err(SpecError::Form(TARGET)),
    }
}

impl FromStr for Bind {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let (protocol, rest) = split_protocol(text);
        let parts = parts(rest).ok_or(SpecError::Form(BIND))?;
        match take_bind(protocol, &parts)? {
            (bind, []) => Ok(bind),
            _ => Err(SpecError::Form(BIND)),
        }
    }
}

impl FromStr for Target {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let (protocol, rest) = split_protocol(text);
        target(protocol, &parts(rest).ok_or(SpecError::Form(TARGET))?)
    }
}

impl FromStr for Forwarding {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let (protocol, rest) = split_protocol(text);
        let parts = parts(rest).ok_or(SpecError::Form(FORWARDING))?;
        let (from, rest) = take_bind(protocol, &parts)?;
        if rest.is_empty() {
            return Err(SpecError::Form(FORWARDING));
        }
        Ok(Self { from, to: target(protocol, rest)? })
    }
}

impl Target {
    /// Whether it is what [`FromStr`] would have made: for what comes from the network.
    pub(crate) fn is_sound(&self) -> bool {
        match self {
            Self::Host { host: name, port, .. } => *port > 0 && host(name).is_ok(),
            Self::Unix(text) => path(text).is_ok(),
        }
    }

    /// Whether it takes datagrams.
    pub fn is_udp(&self) -> bool {
        matches!(self, Self::Host { protocol: Protocol::Udp, .. })
    }
}

impl Bind {
    pub(crate) fn is_sound(&self) -> bool {
        match self {
            Self::Address(..) => true,
            Self::Unix(text) => path(text).is_ok(),
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

fn udp(protocol: Protocol) -> &'static str {
    if protocol == Protocol::Udp { "udp:" } else { "" }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host { protocol, host, port } if host.contains(':') => {
                write!(f, "{}[{host}]:{port}", udp(*protocol))
            }
            Self::Host { protocol, host, port } => write!(f, "{}{host}:{port}", udp(*protocol)),
            Self::Unix(path) => f.write_str(path),
        }
    }
}

impl fmt::Display for Bind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(protocol, address) => write!(f, "{}{address}", udp(*protocol)),
            Self::Unix(path) => f.write_str(path),
        }
    }
}

impl fmt::Display for Forwarding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {}", self.from, self.to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwardings_are_understood() {
        for (text, shown) in [
            ("8080:localhost:80", "127.0.0.1:8080 -> localhost:80"),
            ("tcp:8080:localhost:80", "127.0.0.1:8080 -> localhost:80"),
            ("*:8080:nas.lan:80", "0.0.0.0:8080 -> nas.lan:80"),
            ("[::1]:8080:[2001:db8::1]:80", "[::1]:8080 -> [2001:db8::1]:80"),
            ("udp:5353:192.0.2.1:53", "udp:127.0.0.1:5353 -> udp:192.0.2.1:53"),
            ("0:localhost:22", "127.0.0.1:0 -> localhost:22"),
            ("/run/a.sock:localhost:80", "/run/a.sock -> localhost:80"),
            ("8080:/run/b.sock", "127.0.0.1:8080 -> /run/b.sock"),
            ("/run/a.sock:/run/b.sock", "/run/a.sock -> /run/b.sock"),
            ("127.0.0.1:8080:/run/b.sock", "127.0.0.1:8080 -> /run/b.sock"),
        ] {
            let parsed = text.parse::<Forwarding>().unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(parsed.to_string(), shown, "{text}");
            assert!(parsed.to.is_sound() && parsed.from.is_sound());
        }
    }

    #[test]
    fn what_is_no_forwarding_says_why() {
        for (text, word) in [
            ("", "port"),
            ("8080", "expected"),
            ("8080:localhost", "expected"),
            ("8080:localhost:0", "\"0\""),
            ("8080:localhost:http", "\"http\""),
            ("70000:localhost:80", "\"70000\""),
            ("nas:8080:localhost:80", "listen"),
            ("8080:a b:80", "\"a b\""),
            ("8080:local\u{1b}host:80", "name"),
            ("[::1:8080:localhost:80", "expected"),
            ("udp:/run/a.sock:localhost:80", "streams"),
            ("udp:53:/run/a.sock", "streams"),
            ("8080:localhost:80:90", "expected"),
        ] {
            let error = text.parse::<Forwarding>().unwrap_err().to_string();
            assert!(error.contains(word), "{text:?}: {error}");
        }
    }

    #[test]
    fn places_survive_their_text_form() {
        for text in ["127.0.0.1:1", "udp:[::]:53", "/run/x"] {
            assert_eq!(text.parse::<Bind>().unwrap().to_string(), text);
        }
        for text in ["localhost:1", "udp:[::1]:53", "/run/x"] {
            assert_eq!(text.parse::<Target>().unwrap().to_string(), text);
        }
        assert!("8080:x".parse::<Bind>().is_err());
    }
}
