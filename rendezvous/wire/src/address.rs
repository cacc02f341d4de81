//! `rv://<server-id>@host[,host...][:port]`: where a rendezvous server is and which key it must hold.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use crate::DEFAULT_SIGNALLING_PORT;
use crate::identity::{ParseIdError, PeerId};

/// Most hosts in one address.
const MAX_HOSTS: usize = 8;

/// Longest name in the DNS (RFC 1035, section 2.3.4), as text.
const MAX_NAME: usize = 253;

/// The address of a rendezvous server: its key, its host and its signalling port (UDP).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RendezvousAddress {
    /// The key that the server must prove to hold.
    pub id: PeerId,
    /// A DNS name or an IP address, an IPv6 one without brackets.
    pub host: String,
    /// Further names or addresses of the same server: its IPv6 address beside its IPv4 one, where there is no name for both.
    pub alternatives: Vec<String>,
    /// The UDP port of QUIC signalling.
    pub port: u16,
}

/// Why a text is not a [`RendezvousAddress`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseAddressError {
    /// Another scheme or none.
    #[error("a rendezvous address starts with rv://")]
    Scheme,
    /// No `@`.
    #[error("a rendezvous address has the form rv://<server-id>@host[:port]; there is no @")]
    NoId,
    /// The part before `@`.
    #[error("the server id is wrong: {0}")]
    Id(#[from] ParseIdError),
    /// The part after `@`.
    #[error("the host is missing or malformed; an IPv6 address stands in brackets")]
    Host,
    /// More hosts than anybody needs.
    #[error("there are more than {MAX_HOSTS} hosts")]
    TooManyHosts,
    /// The part after the last colon.
    #[error("the port is not a number from 1 to 65535")]
    Port,
}

impl RendezvousAddress {
    /// Its names and addresses, in the order in which they were written.
    pub fn hosts(&self) -> impl Iterator<Item = &str> {
        std::iter::once(&self.host).chain(&self.alternatives).map(String::as_str)
    }

    /// As a word for a shell: some take brackets for a pattern.
    pub fn quoted(&self) -> String {
        let text = self.to_string();
        if text.contains('[') { format!("'{text}'") } else { text }
    }
}

/// Takes hosts with commas between them as in an address, and gives what comes behind them.
///
/// # Errors
///
/// [`ParseAddressError::Host`] and [`ParseAddressError::TooManyHosts`].
fn parse_hosts(mut text: &str) -> Result<(Vec<String>, &str), ParseAddressError> {
    let mut hosts = Vec::new();
    loop {
        let (host, rest) = parse_host(text)?;
        hosts.push(host.to_owned());
        match rest.strip_prefix(',') {
            Some(_) if hosts.len() == MAX_HOSTS => return Err(ParseAddressError::TooManyHosts),
            Some(rest) => text = rest,
            None => return Ok((hosts, rest)),
        }
    }
}

fn parse_host(text: &str) -> Result<(&str, &str), ParseAddressError> {
    if let Some(bracketed) = text.strip_prefix('[') {
        let (host, rest) = bracketed.split_once(']').ok_or(ParseAddressError::Host)?;
        host.parse::<Ipv6Addr>().map_err(|_| ParseAddressError::Host)?;
        return if rest.is_empty() || rest.starts_with([',', ':']) {
            Ok((host, rest))
        } else {
            Err(ParseAddressError::Host)
        };
    }
    let (host, rest) = text.split_at(text.find([',', ':']).unwrap_or(text.len()));
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    // A second colon: an IPv6 address without its brackets.
    let bare_v6 = rest.starts_with(':') && rest[1..].contains(':');
    if host.is_empty() || host.len() > MAX_NAME || !host.chars().all(plain) || bare_v6 {
        return Err(ParseAddressError::Host);
    }
    Ok((host, rest))
}

impl FromStr for RendezvousAddress {
    type Err = ParseAddressError;

    fn from_str(text: &str) -> Result<Self, ParseAddressError> {
        let rest = text.strip_prefix("rv://").ok_or(ParseAddressError::Scheme)?;
        let (id, place) = rest.trim_end_matches('/').split_once('@').ok_or(ParseAddressError::NoId)?;
        let id = id.parse()?;
        let (mut hosts, rest) = parse_hosts(place)?;
        let port = match rest.strip_prefix(':') {
            None => DEFAULT_SIGNALLING_PORT,
            Some(port) => match port.parse() {
                Ok(0) | Err(_) => return Err(ParseAddressError::Port),
                Ok(port) => port,
            },
        };
        let host = hosts.remove(0);
        Ok(Self { id, host, alternatives: hosts, port })
    }
}

impl fmt::Display for RendezvousAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rv://{}@", self.id)?;
        for (place, host) in self.hosts().enumerate() {
            let comma = if place == 0 { "" } else { "," };
            if host.contains(':') {
                write!(f, "{comma}[{host}]")?;
            } else {
                write!(f, "{comma}{host}")?;
            }
        }
        if self.port != DEFAULT_SIGNALLING_PORT {
            write!(f, ":{}", self.port)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_their_text_form() {
        let id = PeerId::from_bytes([7; 32]);
        for (hosts, port) in [
            (&["vps.example"][..], 443),
            (&["192.0.2.1"], 4433),
            (&["2001:db8::1"], 443),
            (&["::1"], 9),
            (&["192.0.2.1", "2001:db8::1"], 443),
            (&["2001:db8::1", "vps.example", "192.0.2.1"], 4433),
        ] {
            let mut hosts = hosts.iter().map(|host| (*host).to_owned());
            let host = hosts.next().unwrap();
            let address = RendezvousAddress { id, host, alternatives: hosts.collect(), port };
            assert_eq!(address.to_string().parse::<RendezvousAddress>().unwrap(), address);
            let quoted = address.quoted();
            assert_eq!(quoted.starts_with('\'') && quoted.ends_with('\''), quoted.contains('['), "{quoted}");
        }
    }

    #[test]
    fn a_wrong_address_says_what_is_wrong() {
        let id = PeerId::from_bytes([7; 32]);
        let parse = |text: String| text.parse::<RendezvousAddress>().unwrap_err();
        assert_eq!(parse(format!("http://{id}@h")), ParseAddressError::Scheme);
        assert_eq!(parse("rv://host".into()), ParseAddressError::NoId);
        assert!(matches!(parse("rv://abc@host".into()), ParseAddressError::Id(_)));
        for host in
            ["", "[::1", "[::1]x", "2001:db8::1", ",h", "h,", "h,,h", "h o", "[192.0.2.1]", &"h".repeat(254)]
        {
            assert_eq!(parse(format!("rv://{id}@{host}")), ParseAddressError::Host, "{host:?}");
        }
        assert_eq!(parse(format!("rv://{id}@{}", ["h"; 9].join(","))), ParseAddressError::TooManyHosts);
        for port in ["0", "http", "", "1,h"] {
            assert_eq!(parse(format!("rv://{id}@host:{port}")), ParseAddressError::Port, "{port:?}");
        }
    }
}
