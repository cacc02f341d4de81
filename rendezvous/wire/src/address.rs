//! `rv://<server-id>@host[:port]`: where a rendezvous server is and which key it must hold.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use crate::DEFAULT_SIGNALLING_PORT;
use crate::identity::{ParseIdError, PeerId};

/// The address of a rendezvous server: its key, its host and its signalling port (UDP).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RendezvousAddress {
    /// The key that the server must prove to hold.
    pub id: PeerId,
    /// A DNS name or an IP address, an IPv6 one without brackets.
    pub host: String,
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
    #[error("the host is missing or malformed")]
    Host,
    /// The part after the last colon.
    #[error("the port is not a number from 1 to 65535")]
    Port,
}

impl FromStr for RendezvousAddress {
    type Err = ParseAddressError;

    fn from_str(text: &str) -> Result<Self, ParseAddressError> {
        let rest = text.strip_prefix("rv://").ok_or(ParseAddressError::Scheme)?;
        let (id, place) = rest.trim_end_matches('/').split_once('@').ok_or(ParseAddressError::NoId)?;
        let id = id.parse()?;
        let (host, port) = match place.strip_prefix('[') {
            Some(bracketed) => {
                let (host, after) = bracketed.split_once(']').ok_or(ParseAddressError::Host)?;
                host.parse::<Ipv6Addr>().map_err(|_| ParseAddressError::Host)?;
                match after {
                    "" => (host, None),
                    _ => (host, Some(after.strip_prefix(':').ok_or(ParseAddressError::Host)?)),
                }
            }
            None => match place.rsplit_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (place, None),
            },
        };
        let port = match port {
            None => DEFAULT_SIGNALLING_PORT,
            Some(port) => match port.parse() {
                Ok(0) | Err(_) => return Err(ParseAddressError::Port),
                Ok(port) => port,
            },
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':');
        let bare_v6 = host.contains(':') && host.parse::<Ipv6Addr>().is_err();
        if host.is_empty() || host.len() > 253 || !host.chars().all(plain) || bare_v6 {
            return Err(ParseAddressError::Host);
        }
        Ok(Self { id, host: host.to_owned(), port })
    }
}

impl fmt::Display for RendezvousAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rv://{}@", self.id)?;
        if self.host.contains(':') {
            write!(f, "[{}]", self.host)?;
        } else {
            f.write_str(&self.host)?;
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
        for (host, port) in [("vps.example", 443), ("192.0.2.1", 4433), ("2001:db8::1", 443), ("::1", 9)] {
            let address = RendezvousAddress { id, host: host.to_owned(), port };
            assert_eq!(address.to_string().parse::<RendezvousAddress>().unwrap(), address);
        }
    }

    #[test]
    fn a_wrong_address_says_what_is_wrong() {
        let id = PeerId::from_bytes([7; 32]);
        let parse = |text: String| text.parse::<RendezvousAddress>().unwrap_err();
        assert_eq!(parse(format!("http://{id}@h")), ParseAddressError::Scheme);
        assert_eq!(parse("rv://host".into()), ParseAddressError::NoId);
        assert!(matches!(parse("rv://abc@host".into()), ParseAddressError::Id(_)));
        assert_eq!(parse(format!("rv://{id}@")), ParseAddressError::Host);
        assert_eq!(parse(format!("rv://{id}@[::1")), ParseAddressError::Host);
        assert_eq!(parse(format!("rv://{id}@host:0")), ParseAddressError::Port);
        assert_eq!(parse(format!("rv://{id}@host:http")), ParseAddressError::Port);
    }
}
