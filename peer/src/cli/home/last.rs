//! The last path to each peer, for `peer list`. Nothing depends on it.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::time::SystemTime;

use peer::PeerId;
use serde::{Deserialize, Serialize};

/// Peers that are remembered; the longest unseen is forgotten first.
const MOST: usize = 1000;

/// A path and when it was taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::cli) struct Last {
    /// Whether no relay was in between.
    pub(in crate::cli) direct: bool,
    /// Where it led, in words.
    pub(in crate::cli) path: String,
    /// When, by RFC 3339.
    pub(in crate::cli) at: String,
}

/// By id.
pub(in crate::cli) type LastPaths = BTreeMap<String, Last>;

/// What is known; nothing where there is nothing readable.
pub(in crate::cli) fn load(file: &Path) -> LastPaths {
    super::read(file).ok().flatten().and_then(|text| toml::from_str(&text).ok()).unwrap_or_default()
}

/// Notes the path that a session takes now.
pub(in crate::cli) fn note(file: &Path, peer: PeerId, path: &peer::Path) -> io::Result<()> {
    let _lock = super::Lock::take(file)?;
    let mut all = load(file);
    let at = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
    all.insert(peer.to_string(), Last { direct: path.is_direct(), path: path.to_string(), at });
    while all.len() > MOST {
        let Some(oldest) = all.iter().min_by_key(|(_, last)| &last.at).map(|(id, _)| id.clone()) else {
            break;
        };
        all.remove(&oldest);
    }
    super::replace(file, &toml::to_string(&all).map_err(io::Error::other)?)
}
