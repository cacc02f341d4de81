//! Known peers and open invitations.
//!
//! Kept in one file that is replaced as a whole: a process that is killed leaves the old content or the new one.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use data_encoding::HEXLOWER;
use peer::{InviteSecret, PeerId, RendezvousAddress, Ticket};
use rand::Rng as _;
use serde::{Deserialize, Serialize};

/// Longest alias.
const MAX_ALIAS: usize = 32;

/// A local name for a peer: letters, digits, `-`, `_` and `.`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(in crate::cli) struct Alias(String);

/// Why a text is no alias.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an alias is 1 to {MAX_ALIAS} letters, digits, `-`, `_` or `.`, and neither `anyone` nor `trusted`")]
pub(in crate::cli) struct NoAlias;

impl FromStr for Alias {
    type Err = NoAlias;

    fn from_str(text: &str) -> Result<Self, NoAlias> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let reserved = text == ANYONE || text == TRUSTED || Ticket::looks_like(text);
        let sound = (1..=MAX_ALIAS).contains(&text.len()) && text.chars().all(plain);
        // A leading dash would be a flag.
        if sound && !reserved && !text.starts_with('-') { Ok(Self(text.to_owned())) } else { Err(NoAlias) }
    }
}

impl TryFrom<String> for Alias {
    type Error = NoAlias;

    fn try_from(text: String) -> Result<Self, NoAlias> {
        text.parse()
    }
}

impl From<Alias> for String {
    fn from(alias: Alias) -> Self {
        alias.0
    }
}

impl fmt::Display for Alias {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

const ANYONE: &str = "anyone";
const TRUSTED: &str = "trusted";

/// Whom something is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::cli) enum Who {
    /// Whoever opens a session.
    Anyone,
    /// Whoever is trusted.
    Trusted,
    /// The peer of this name.
    Alias(Alias),
    /// That peer.
    Id(PeerId),
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anyone => f.write_str(ANYONE),
            Self::Trusted => f.write_str(TRUSTED),
            Self::Alias(alias) => alias.fmt(f),
            Self::Id(id) => id.fmt(f),
        }
    }
}

/// Why a text names nobody.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("neither `anyone`, `trusted`, an alias nor the id of a peer")]
pub(in crate::cli) struct NoWho;

impl FromStr for Who {
    type Err = NoWho;

    fn from_str(text: &str) -> Result<Self, NoWho> {
        match text {
            ANYONE => Ok(Self::Anyone),
            TRUSTED => Ok(Self::Trusted),
            _ => match text.parse() {
                Ok(id) => Ok(Self::Id(id)),
                Err(_) => text.parse().map(Self::Alias).map_err(|_| NoWho),
            },
        }
    }
}

/// A peer that is known.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::cli) struct Known {
    #[serde(with = "text")]
    pub(in crate::cli) id: PeerId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::cli) alias: Option<Alias>,
    /// Whether it may use what is served to trusted peers.
    #[serde(default)]
    pub(in crate::cli) trusted: bool,
    /// Where it registers, when a ticket said so.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    servers: Vec<String>,
    /// The secret of its invitation, in hexadecimal, until it has been shown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    secret: Option<String>,
}

impl Known {
    /// Where it registers, as far as that is known.
    pub(in crate::cli) fn servers(&self) -> Vec<RendezvousAddress> {
        self.servers.iter().filter_map(|server| server.parse().ok()).collect()
    }

    /// The secret to show when we next meet.
    pub(in crate::cli) fn secret(&self) -> Option<InviteSecret> {
        let bytes = HEXLOWER.decode(self.secret.as_ref()?.as_bytes()).ok()?;
        bytes.try_into().ok().map(InviteSecret)
    }
}

/// An invitation that somebody may still show the secret of.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::cli) struct Invite {
    /// SHA-256 of the secret, in hexadecimal: whoever reads this file is not invited.
    hash: String,
    /// Whether it is spent with its first use.
    pub(in crate::cli) once: bool,
    /// Until when it may be used, by RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::cli) expires: Option<String>,
    /// The alias of whoever uses it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::cli) name: Option<Alias>,
}

impl Invite {
    /// Enough of it to name it by.
    pub(in crate::cli) fn short(&self) -> &str {
        self.hash.get(..8).unwrap_or(&self.hash)
    }

    fn is_open(&self, now: SystemTime) -> bool {
        match self.expires.as_deref().map(humantime::parse_rfc3339) {
            None => true,
            Some(Ok(end)) => now < end,
            // What cannot be read admits nobody.
            Some(Err(_)) => false,
        }
    }
}

fn hash(secret: &InviteSecret) -> String {
    HEXLOWER.encode(ring::digest::digest(&ring::digest::SHA256, &secret.0).as_ref())
}

/// What the file says.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(in crate::cli) struct Peers {
    #[serde(rename = "peer", skip_serializing_if = "Vec::is_empty")]
    pub(in crate::cli) known: Vec<Known>,
    #[serde(rename = "invite", skip_serializing_if = "Vec::is_empty")]
    invites: Vec<Invite>,
}

/// Why what is known could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub(in crate::cli) enum PeersError {
    #[error("{path}: {source}", path = path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} is damaged: {message}. Restore it from a backup, or move it away to begin with no known peers",
        path = path.display())]
    Content { path: PathBuf, message: String },
    #[error(
        "the alias {0} is taken by {1}. Choose another, or give that peer another first: `peer alias NAME {1}`"
    )]
    Taken(Alias, PeerId),
    #[error("there is no open invitation {0:?}; `peer list` shows them")]
    NoInvite(String),
}

impl Peers {
    /// Reads the file; what is known when there is none is nothing.
    pub(in crate::cli) fn load(path: &Path) -> Result<Self, PeersError> {
        let text = super::read(path).map_err(|source| PeersError::Io { path: path.to_owned(), source })?;
        toml::from_str(&text.unwrap_or_default())
            .map_err(|error| PeersError::Content { path: path.to_owned(), message: error.to_string() })
    }

    /// Changes the file; whatever `change` says is kept if it succeeds, and nothing if it does not.
    pub(in crate::cli) fn update<T>(
        path: &Path,
        change: impl FnOnce(&mut Self) -> Result<T, PeersError>,
    ) -> Result<T, PeersError> {
        let io = |source| PeersError::Io { path: path.to_owned(), source };
        let _lock = super::Lock::take(path).map_err(io)?;
        let mut peers = Self::load(path)?;
        let outcome = change(&mut peers)?;
        let text = toml::to_string(&peers).map_err(|error| io(io::Error::other(error)))?;
        super::replace(path, &text).map_err(io)?;
        Ok(outcome)
    }

    pub(in crate::cli) fn get(&self, id: PeerId) -> Option<&Known> {
        self.known.iter().find(|known| known.id == id)
    }

    pub(in crate::cli) fn named(&self, alias: &Alias) -> Option<&Known> {
        self.known.iter().find(|known| known.alias.as_ref() == Some(alias))
    }

    pub(in crate::cli) fn is_trusted(&self, id: PeerId) -> bool {
        self.get(id).is_some_and(|known| known.trusted)
    }

    /// Whether `id` is one of those.
    pub(in crate::cli) fn is(&self, id: PeerId, who: &Who) -> bool {
        match who {
            Who::Anyone => true,
            Who::Trusted => self.is_trusted(id),
            Who::Alias(alias) => self.named(alias).is_some_and(|known| known.id == id),
            Who::Id(one) => *one == id,
        }
    }

    fn entry(&mut self, id: PeerId) -> &mut Known {
        let index = self.known.iter().position(|known| known.id == id).unwrap_or_else(|| {
            self.known.push(Known { id, alias: None, trusted: false, servers: Vec::new(), secret: None });
            self.known.len() - 1
        });
        &mut self.known[index]
    }

    /// Lets the peer use what trusted peers may use.
    pub(in crate::cli) fn trust(&mut self, id: PeerId) {
        self.entry(id).trusted = true;
    }

    /// Takes that back. False: it was not trusted.
    pub(in crate::cli) fn untrust(&mut self, id: PeerId) -> bool {
        let was = self.is_trusted(id);
        if was {
            self.entry(id).trusted = false;
        }
        was
    }

    /// Keeps where the ticket leads to, and its secret until it has been shown.
    pub(in crate::cli) fn keep(&mut self, ticket: &Ticket) {
        let known = self.entry(ticket.peer);
        known.servers = ticket.servers.iter().map(ToString::to_string).collect();
        known.secret = ticket.secret.as_ref().map(|secret| HEXLOWER.encode(&secret.0));
    }

    /// The secret has been shown, and answered.
    pub(in crate::cli) fn secret_shown(&mut self, id: PeerId, secret: &InviteSecret) {
        if self.get(id).and_then(Known::secret).as_ref() == Some(secret) {
            self.entry(id).secret = None;
        }
    }

    /// Gives the peer a name; it has one at most.
    pub(in crate::cli) fn name(&mut self, id: PeerId, alias: Alias) -> Result<(), PeersError> {
        if let Some(other) = self.named(&alias).filter(|other| other.id != id) {
            return Err(PeersError::Taken(alias, other.id));
        }
        self.entry(id).alias = Some(alias);
        Ok(())
    }

    /// Makes an invitation.
    pub(in crate::cli) fn invite(
        &mut self,
        once: bool,
        lasting: Option<Duration>,
        name: Option<Alias>,
        now: SystemTime,
    ) -> InviteSecret {
        self.invites.retain(|invite| invite.is_open(now));
        let secret = InviteSecret(rand::rng().random());
        let expires = lasting.and_then(|lasting| now.checked_add(lasting));
        let expires = expires.map(|end| humantime::format_rfc3339_millis(end).to_string());
        self.invites.push(Invite { hash: hash(&secret), once, expires, name });
        secret
    }

    /// Invitations that may still be used.
    pub(in crate::cli) fn invites(&self, now: SystemTime) -> impl Iterator<Item = &Invite> {
        self.invites.iter().filter(move |invite| invite.is_open(now))
    }

    /// Takes invitations back: the one that [`Invite::short`] names, or all of `all`. How many.
    pub(in crate::cli) fn withdraw(&mut self, short: &str) -> Result<usize, PeersError> {
        let before = self.invites.len();
        self.invites.retain(|invite| short != "all" && invite.short() != short);
        match before - self.invites.len() {
            0 if short != "all" => Err(PeersError::NoInvite(short.to_owned())),
            withdrawn => Ok(withdrawn),
        }
    }

    /// Whether showing this secret would admit anybody now, or has admitted `id` already.
    pub(in crate::cli) fn would_redeem(&self, id: PeerId, secret: &InviteSecret, now: SystemTime) -> bool {
        let hash = hash(secret);
        self.is_trusted(id) || self.invites(now).any(|invite| invite.hash == hash)
    }

    /// `id` shows a secret: from now on it is trusted. False when the secret is unknown, spent or too old.
    ///
    /// Whoever is trusted already may show one again: the answer to the first time may have been lost.
    pub(in crate::cli) fn redeem(&mut self, id: PeerId, secret: &InviteSecret, now: SystemTime) -> bool {
        if self.is_trusted(id) {
            return true;
        }
        let hash = hash(secret);
        let shown = |invite: &Invite| invite.hash == hash && invite.is_open(now);
        let Some(index) = self.invites.iter().position(shown) else { return false };
        let name = self.invites[index].name.clone();
        if self.invites[index].once {
            self.invites.remove(index);
        }
        self.trust(id);
        // A name that another has taken meanwhile stays with the other.
        if let (Some(name), None) = (name, &self.entry(id).alias) {
            let _ = self.name(id, name);
        }
        true
    }
}

/// Ids as text.
mod text {
    use peer::PeerId;
    use serde::{Deserialize as _, Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(id: &PeerId, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(id)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PeerId, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
#[path = "peers_tests.rs"]
mod tests;
