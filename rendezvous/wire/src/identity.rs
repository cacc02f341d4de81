//! Identities: an Ed25519 public key is a name.

use std::fmt;
use std::str::FromStr;

use data_encoding::{BASE32_NOPAD, Encoding, Specification};
use rcgen::PublicKeyData as _;
use serde::{Deserialize, Serialize};

/// The identity of a peer or of a rendezvous server: its Ed25519 public key.
///
/// Written as 52 characters of lower-case base32 (RFC 4648, no padding); read in either case.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PeerId([u8; 32]);

/// Characters in the text form of a [`PeerId`].
pub const PEER_ID_LEN: usize = 52;

fn base32() -> Encoding {
    let mut specification = Specification::new();
    specification.symbols.push_str("abcdefghijklmnopqrstuvwxyz234567");
    specification.translate.from.push_str("ABCDEFGHIJKLMNOPQRSTUVWXYZ");
    specification.translate.to.push_str("abcdefghijklmnopqrstuvwxyz");
    specification.encoding().unwrap_or(BASE32_NOPAD)
}

impl PeerId {
    /// The identity of the owner of this Ed25519 public key.
    pub const fn from_bytes(public_key: [u8; 32]) -> Self {
        Self(public_key)
    }

    /// The Ed25519 public key.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The first ten characters: enough for a log line, not enough to name anyone.
    pub fn short(&self) -> String {
        let mut text = self.to_string();
        text.truncate(10);
        text
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&base32().encode(&self.0))
    }
}

impl fmt::Debug for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.short())
    }
}

/// Why a text is not a [`PeerId`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseIdError {
    /// Wrong number of characters.
    #[error("an id has {PEER_ID_LEN} characters, this has {0}")]
    Length(usize),
    /// A character outside base32.
    #[error("an id is written with a-z and 2-7; character {0} is something else")]
    Character(usize),
    /// The last character carries bits that no id has.
    #[error("the id ends in a character that no id can end in; was it cut or mistyped?")]
    Trailing,
}

impl FromStr for PeerId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let length = text.chars().count();
        if length != PEER_ID_LEN {
            return Err(ParseIdError::Length(length));
        }
        let bytes = base32().decode(text.as_bytes()).map_err(|error| match error.kind {
            data_encoding::DecodeKind::Symbol => ParseIdError::Character(error.position + 1),
            _ => ParseIdError::Trailing,
        })?;
        Ok(Self(bytes.try_into().map_err(|_| ParseIdError::Length(length))?))
    }
}

/// An Ed25519 key pair, kept as PKCS#8 (RFC 8410).
pub struct KeyPair {
    inner: rcgen::KeyPair,
    id: PeerId,
}

impl fmt::Debug for KeyPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("KeyPair").field(&self.id).finish()
    }
}

/// Why a key could not be made or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// Not a PEM block with a PKCS#8 private key.
    #[error("not a PKCS#8 private key in PEM: {0}")]
    Pem(#[source] rcgen::Error),
    /// A key of another kind than Ed25519.
    #[error("the key is not an Ed25519 key")]
    NotEd25519,
    /// The system gave no randomness.
    #[error("no key could be made: {0}")]
    Generate(#[source] rcgen::Error),
}

impl KeyPair {
    /// A new key from the system's randomness.
    pub fn generate() -> Result<Self, KeyError> {
        Self::wrap(rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).map_err(KeyError::Generate)?)
    }

    /// Reads a PKCS#8 private key in PEM.
    pub fn from_pem(pem: &str) -> Result<Self, KeyError> {
        Self::wrap(rcgen::KeyPair::from_pem(pem).map_err(KeyError::Pem)?)
    }

    fn wrap(inner: rcgen::KeyPair) -> Result<Self, KeyError> {
        if inner.algorithm() != &rcgen::PKCS_ED25519 {
            return Err(KeyError::NotEd25519);
        }
        let public = inner.der_bytes().try_into().map_err(|_| KeyError::NotEd25519)?;
        Ok(Self { inner, id: PeerId(public) })
    }

    /// The private key as PKCS#8 in PEM. Keep it secret.
    pub fn to_pem(&self) -> String {
        self.inner.serialize_pem()
    }

    /// The private key as PKCS#8 in DER. Keep it secret.
    pub fn to_der(&self) -> Vec<u8> {
        self.inner.serialize_der()
    }

    /// The public half.
    pub fn id(&self) -> PeerId {
        self.id
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_survives_its_text_form_in_either_case() {
        let id = KeyPair::generate().unwrap().id();
        let text = id.to_string();
        assert_eq!(text.len(), PEER_ID_LEN);
        assert_eq!(text.parse::<PeerId>().unwrap(), id);
        assert_eq!(text.to_uppercase().parse::<PeerId>().unwrap(), id);
    }

    #[test]
    fn a_mistyped_id_is_refused_with_its_place() {
        let text = KeyPair::generate().unwrap().id().to_string();
        assert_eq!("abc".parse::<PeerId>(), Err(ParseIdError::Length(3)));
        let wrong = format!("{}1{}", &text[..6], &text[7..]);
        assert_eq!(wrong.parse::<PeerId>(), Err(ParseIdError::Character(7)));
        let trailing = format!("{}b", &text[..51]);
        assert_eq!(trailing.parse::<PeerId>(), Err(ParseIdError::Trailing));
    }

    #[test]
    fn a_key_survives_its_file_form() {
        let key = KeyPair::generate().unwrap();
        assert_eq!(KeyPair::from_pem(&key.to_pem()).unwrap().id(), key.id());
        assert!(matches!(KeyPair::from_pem("nonsense"), Err(KeyError::Pem(_))));
    }
}
