//! What is kept of admission.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use rendezvous_wire::PeerId;
use serde::{Deserialize, Serialize};

use crate::usage::Month;

/// Seconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Seconds(pub u64);

impl From<SystemTime> for Seconds {
    fn from(time: SystemTime) -> Self {
        Self(time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs()))
    }
}

impl Seconds {
    /// So much later.
    pub fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(duration.as_secs()))
    }

    /// As people write it.
    pub fn date(self) -> String {
        // What humantime can write ends with the year 9999.
        let most = 253_402_300_799;
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(self.0.min(most));
        humantime::format_rfc3339_seconds(time).to_string()
    }
}

/// A peer that may not register.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ban {
    /// What the peer is told.
    pub reason: String,
    /// Since when.
    pub at: Seconds,
    /// Until when; `None`: until it is taken back.
    pub until: Option<Seconds>,
}

/// A peer that may register whatever the mode.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enrolment {
    /// Since when.
    pub at: Seconds,
    /// The token that it has presented; `None`: the operator has admitted it.
    pub token: Option<u64>,
    /// The operator's own words.
    pub note: String,
}

/// A token, of which only the hash is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// [`rendezvous_wire::Token::hash`].
    pub hash: [u8; 32],
    /// How many peers it admits.
    pub uses: u32,
    /// How many it has admitted.
    pub used: u32,
    /// Since when.
    pub at: Seconds,
    /// Until when; `None`: until it is withdrawn.
    pub until: Option<Seconds>,
    /// The operator's own words.
    pub note: String,
}

/// One change of what is kept. Those of one list are kept together or not at all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// A peer is banned.
    Ban(PeerId, Ban),
    /// It is not any more.
    Unban(PeerId),
    /// A peer is admitted.
    Admit(PeerId, Enrolment),
    /// It is not any more.
    Withdraw(PeerId),
    /// A token is made.
    Token(u64, TokenRecord),
    /// It has admitted one peer more. Nothing where it was withdrawn meanwhile.
    Spend(u64),
    /// It is withdrawn.
    NoToken(u64),
    /// What the relay has carried for keys in a month.
    Usage(Month, Vec<(PeerId, u64)>),
}

/// All that is kept of admission, in memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Records {
    /// Who is banned.
    pub bans: HashMap<PeerId, Ban>,
    /// Who was admitted.
    pub admitted: HashMap<PeerId, Enrolment>,
    /// Tokens by their numbers.
    pub tokens: HashMap<u64, TokenRecord>,
    /// Every number up to this one has been a token's.
    pub last_token: u64,
}

impl Records {
    /// Takes a change.
    pub fn apply(&mut self, write: &Write) {
        match write {
            Write::Ban(peer, ban) => drop(self.bans.insert(*peer, ban.clone())),
            Write::Unban(peer) => drop(self.bans.remove(peer)),
            Write::Admit(peer, enrolment) => drop(self.admitted.insert(*peer, enrolment.clone())),
            Write::Withdraw(peer) => drop(self.admitted.remove(peer)),
            Write::Token(number, token) => {
                self.last_token = self.last_token.max(*number);
                self.tokens.insert(*number, token.clone());
            }
            Write::Spend(number) => {
                if let Some(token) = self.tokens.get_mut(number) {
                    token.used += 1;
                }
            }
            Write::NoToken(number) => drop(self.tokens.remove(number)),
            Write::Usage(..) => {}
        }
    }
}
