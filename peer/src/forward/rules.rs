//! Who may have what forwarded: patterns over [`Target`] and [`Bind`].

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::str::FromStr;

use ipnet::IpNet;

use super::spec::{self, Bind, Protocol, Target};
use crate::service::Request;

/// What one peer may have forwarded. By default nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rules {
    /// Where connections may be made to on its behalf.
    pub forward: Vec<TargetPattern>,
    /// Where it may have us listen.
    pub listen: Vec<BindPattern>,
}

/// How a target stands to the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Allowed, wherever its name leads.
    Allowed,
    /// Allowed at those of its addresses that [`Rules::allows_address`] takes.
    Resolve,
    /// Not allowed, wherever its name leads.
    Refused,
}

impl Rules {
    /// What the rules say of a target, before its name is resolved.
    pub(crate) fn verdict(&self, target: &Target) -> Verdict {
        let Target::Host { protocol, host, port } = target else {
            let allowed = self.forward.iter().any(|pattern| matches!((pattern, target), (TargetPattern::Unix(one), Target::Unix(path)) if one == path));
            return if allowed { Verdict::Allowed } else { Verdict::Refused };
        };
        if let Ok(ip) = host.parse::<IpAddr>() {
            let allowed = self.allows_address(*protocol, SocketAddr::new(ip, *port));
            return if allowed { Verdict::Allowed } else { Verdict::Refused };
        }
        let mut verdict = Verdict::Refused;
        for pattern in &self.forward {
            let TargetPattern::Host { protocol: wanted, host: place, ports } = pattern else { continue };
            if wanted != protocol || !ports.contains(port) {
                continue;
            }
            match place {
                Place::Any => return Verdict::Allowed,
                Place::Name(name) if name.eq_ignore_ascii_case(host) => return Verdict::Allowed,
                Place::Net(_) => verdict = Verdict::Resolve,
                Place::Name(_) => {}
            }
        }
        verdict
    }

    /// Whether this very address is allowed.
    pub(super) fn allows_address(&self, protocol: Protocol, address: SocketAddr) -> bool {
        let ip = address.ip().to_canonical();
        self.forward.iter().any(|pattern| match pattern {
            TargetPattern::Host { protocol: wanted, host, ports } => {
                let there = match host {
                    Place::Any => true,
                    Place::Name(name) => name.eq_ignore_ascii_case("localhost") && ip.is_loopback(),
                    Place::Net(net) => net.contains(&ip),
                };
                *wanted == protocol && ports.contains(&address.port()) && there
            }
            TargetPattern::Unix(_) => false,
        })
    }

    /// Whether a request is for something that they name.
    pub fn names(&self, request: &Request) -> bool {
        match request {
            Request::Connect(target) => self.verdict(target) != Verdict::Refused,
            Request::Listen(bind) => self.allows_listening(bind),
            _ => false,
        }
    }

    /// Whether we may listen there for the peer.
    pub(super) fn allows_listening(&self, bind: &Bind) -> bool {
        self.listen.iter().any(|pattern| match (pattern, bind) {
            (BindPattern::Unix(allowed), Bind::Unix(path)) => allowed == path,
            (BindPattern::Address { protocol, address, ports }, Bind::Address(wanted, at)) => {
                protocol == wanted && ports.contains(&at.port()) && address.is_none_or(|ip| ip == at.ip())
            }
            _ => false,
        })
    }
}

/// Targets: `host:port`, `udp:host:port` or `/path`. The host is a name, an address, a prefix (`192.168.1.0/24`) or `*`; the port a number, a
/// range (`8000-8010`) or `*`. `localhost` stands for the loopback addresses as well; an address or a prefix for names that lead there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetPattern {
    /// Hosts and ports.
    Host {
        /// How they are talked to.
        protocol: Protocol,
        /// Which hosts.
        host: Place,
        /// Which ports.
        ports: RangeInclusive<u16>,
    },
    /// One Unix socket.
    Unix(String),
}

/// Which hosts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// All.
    Any,
    /// The one of this name.
    Name(String),
    /// Those with an address in this prefix.
    Net(IpNet),
}

/// Places to listen at: `address:port`, `udp:address:port` or `/path`. The address may be `*`, any; the port as in [`TargetPattern`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BindPattern {
    /// Addresses and ports.
    Address {
        /// What is listened for.
        protocol: Protocol,
        /// At which address; `None`: at any.
        address: Option<IpAddr>,
        /// At which ports.
        ports: RangeInclusive<u16>,
    },
    /// One Unix socket.
    Unix(String),
}

/// Why a text is no pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PatternError {
    /// Another form.
    #[error("expected [udp:]host:port or /path; host may be a prefix or `*`, port a range or `*`")]
    Form,
    /// The host.
    #[error("{0:?} is no name, address, prefix or `*`; IPv6 stands in brackets")]
    Host(String),
    /// The port.
    #[error("{0:?} is no port, range of ports or `*`")]
    Ports(String),
}

fn ports(text: &str) -> Result<RangeInclusive<u16>, PatternError> {
    let wrong = || PatternError::Ports(text.to_owned());
    if text == "*" {
        return Ok(0..=u16::MAX);
    }
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (first.parse().map_err(|_| wrong())?, last.parse().map_err(|_| wrong())?);
    if first <= last { Ok(first..=last) } else { Err(wrong()) }
}

/// Protocol, host without brackets, ports.
fn split(text: &str) -> Result<(Protocol, &str, RangeInclusive<u16>), PatternError> {
    let (protocol, rest) = match text.strip_prefix("udp:") {
        Some(rest) => (Protocol::Udp, rest),
        None => (Protocol::Tcp, text.strip_prefix("tcp:").unwrap_or(text)),
    };
    let (host, port) = rest.rsplit_once(':').ok_or(PatternError::Form)?;
    let bare = match host.strip_prefix('[') {
        Some(bracketed) => bracketed.strip_suffix(']').ok_or(PatternError::Form)?,
        None if host.contains(':') => return Err(PatternError::Host(host.to_owned())),
        None => host,
    };
    Ok((protocol, bare, ports(port)?))
}

impl FromStr for TargetPattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        if text.starts_with('/') {
            return Ok(Self::Unix(text.to_owned()));
        }
        let (protocol, host, ports) = split(text)?;
        let place = if host == "*" {
            Place::Any
        } else if let Ok(net) = host.parse::<IpNet>() {
            Place::Net(net)
        } else if let Ok(ip) = host.parse::<IpAddr>() {
            Place::Net(ip.into())
        } else {
            Place::Name(spec::host(host).map_err(|_| PatternError::Host(host.to_owned()))?)
        };
        Ok(Self::Host { protocol, host: place, ports })
    }
}

impl FromStr for BindPattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        if text.starts_with('/') {
            return Ok(Self::Unix(text.to_owned()));
        }
        let (protocol, host, ports) = split(text)?;
        let address = match host {
            "*" => None,
            "localhost" => Some(std::net::Ipv4Addr::LOCALHOST.into()),
            _ => Some(host.parse().map_err(|_| PatternError::Host(host.to_owned()))?),
        };
        Ok(Self::Address { protocol, address, ports })
    }
}

struct Ports<'a>(&'a RangeInclusive<u16>);

impl fmt::Display for Ports<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (*self.0.start(), *self.0.end()) {
            (0, u16::MAX) => f.write_str("*"),
            (first, last) if first == last => write!(f, "{first}"),
            (first, last) => write!(f, "{first}-{last}"),
        }
    }
}

impl fmt::Display for TargetPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (protocol, place, ports) = match self {
            Self::Unix(path) => return f.write_str(path),
            Self::Host { protocol, host, ports } => (protocol, host, Ports(ports)),
        };
        if *protocol == Protocol::Udp {
            f.write_str("udp:")?;
        }
        match place {
            Place::Any => write!(f, "*:{ports}"),
            Place::Name(name) => write!(f, "{name}:{ports}"),
            Place::Net(IpNet::V6(net)) => write!(f, "[{net}]:{ports}"),
            Place::Net(IpNet::V4(net)) => write!(f, "{net}:{ports}"),
        }
    }
}

impl fmt::Display for BindPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (protocol, address, ports) = match self {
            Self::Unix(path) => return f.write_str(path),
            Self::Address { protocol, address, ports } => (protocol, address, Ports(ports)),
        };
        if *protocol == Protocol::Udp {
            f.write_str("udp:")?;
        }
        match address {
            None => write!(f, "*:{ports}"),
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:{ports}"),
            Some(IpAddr::V4(address)) => write!(f, "{address}:{ports}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(forward: &[&str], listen: &[&str]) -> Rules {
        Rules {
            forward: forward.iter().map(|text| text.parse().unwrap()).collect(),
            listen: listen.iter().map(|text| text.parse().unwrap()).collect(),
        }
    }

    fn verdict(forward: &[&str], target: &str) -> Verdict {
        rules(forward, &[]).verdict(&target.parse().unwrap())
    }

    #[test]
    fn nothing_is_allowed_by_default() {
        for target in ["localhost:80", "127.0.0.1:80", "udp:localhost:53", "/run/x"] {
            assert_eq!(verdict(&[], target), Verdict::Refused, "{target}");
        }
        assert!(!Rules::default().allows_listening(&"8080".parse().unwrap()));
    }

    #[test]
    fn targets_stand_to_patterns_as_told() {
        use Verdict::{Allowed, Refused, Resolve};
        for (pattern, target, expected) in [
            ("localhost:80", "localhost:80", Allowed),
            ("localhost:80", "LOCALHOST:80", Allowed),
            ("localhost:80", "127.0.0.1:80", Allowed),
            ("localhost:80", "[::1]:80", Allowed),
            ("localhost:80", "localhost:81", Refused),
            ("localhost:80", "udp:localhost:80", Refused),
            ("localhost:80", "nas.lan:80", Refused),
            ("127.0.0.1:80", "localhost:80", Resolve),
            ("192.168.1.0/24:*", "192.168.1.7:9", Allowed),
            ("192.168.1.0/24:*", "192.168.2.7:9", Refused),
            ("192.168.1.0/24:22", "nas.lan:22", Resolve),
            ("192.168.1.0/24:22", "nas.lan:23", Refused),
            ("[2001:db8::/32]:1-9", "[2001:db8::1]:9", Allowed),
            ("10.0.0.1:80", "[::ffff:10.0.0.1]:80", Allowed),
            ("udp:*:53", "udp:any.example:53", Allowed),
            ("udp:*:53", "any.example:53", Refused),
            ("*:*", "/run/x", Refused),
            ("/run/x", "/run/x", Allowed),
            ("/run/x", "/run/y", Refused),
        ] {
            assert_eq!(verdict(&[pattern], target), expected, "{pattern} {target}");
        }
    }

    #[test]
    fn a_resolved_name_is_held_against_addresses() {
        let rules = rules(&["192.168.1.0/24:22"], &[]);
        assert!(rules.allows_address(Protocol::Tcp, "192.168.1.7:22".parse().unwrap()));
        assert!(!rules.allows_address(Protocol::Tcp, "10.0.0.1:22".parse().unwrap()));
        assert!(!rules.allows_address(Protocol::Udp, "192.168.1.7:22".parse().unwrap()));
    }

    #[test]
    fn listening_is_allowed_where_told() {
        let rules = rules(&[], &["127.0.0.1:8000-8010", "udp:*:53", "/run/x"]);
        for (bind, allowed) in [
            ("8000", true),
            ("8011", false),
            ("0", false),
            ("*:8000", false),
            ("udp:*:53", true),
            ("udp:53", true),
            ("/run/x", true),
            ("/run/y", false),
        ] {
            assert_eq!(rules.allows_listening(&bind.parse().unwrap()), allowed, "{bind}");
        }
    }

    #[test]
    fn patterns_survive_their_text_form() {
        for text in ["localhost:80", "udp:*:53", "192.168.1.0/24:1-9", "[2001:db8::/32]:*", "/run/x"] {
            assert_eq!(text.parse::<TargetPattern>().unwrap().to_string(), text);
        }
        for text in ["", "80", "localhost", "a b:1", "::1:80", "x:9-1", "x:http"] {
            assert!(text.parse::<TargetPattern>().is_err(), "{text:?}");
        }
    }
}
