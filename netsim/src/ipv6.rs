//! What IPv6 is like at a site.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use crate::router::UnknownName;

/// What IPv6 is like at a site. It is routed, never translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Ipv6 {
    /// There is none: hosts have IPv4 only.
    #[default]
    None,
    /// Beside IPv4, behind a stateful firewall wherever the home router filters (RFC 6092).
    Firewall,
    /// Beside IPv4, and everyone is let in.
    Open,
    /// Hosts have no IPv4. Behind a stateful firewall as in [`Firewall`](Self::Firewall).
    Only,
    /// Beside IPv4, with addresses and a default route, and what is sent vanishes at the router without a word: what RFC 8305 is for.
    Broken,
}

impl Ipv6 {
    /// Every variant.
    pub const ALL: [Self; 5] = [Self::None, Self::Firewall, Self::Open, Self::Only, Self::Broken];

    /// The name used on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Firewall => "firewall",
            Self::Open => "open",
            Self::Only => "only",
            Self::Broken => "broken",
        }
    }

    /// Whether hosts have addresses of it.
    pub(crate) fn is_there(self) -> bool {
        self != Self::None
    }

    /// Whether hosts have IPv4 beside it.
    pub(crate) fn leaves_ipv4(self) -> bool {
        self != Self::Only
    }
}

impl From<bool> for Ipv6 {
    /// With or without.
    fn from(there: bool) -> Self {
        if there { Self::Firewall } else { Self::None }
    }
}

impl fmt::Display for Ipv6 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Ipv6 {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|variant| variant.name() == name);
        found.ok_or_else(|| UnknownName::new(name, Self::ALL.map(Self::name)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for variant in Ipv6::ALL {
            assert_eq!(variant.to_string().parse(), Ok(variant));
        }
        assert!("nat66".parse::<Ipv6>().unwrap_err().to_string().contains("broken"));
    }
}
