//! Judges who wants to register. Pure: time comes in, what is to be written goes out.
//!
//! The banned are refused before all else; whoever is allowed by the configuration, or was admitted before, is let in. Everybody else is a newcomer: works
//! first where there are many of them, and is then judged as the mode says.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant, SystemTime};

use rendezvous_wire::{PeerId, Token};

use super::pressure::{Pressure, Terms};
use super::records::{Ban, Enrolment, Records, Seconds, TokenRecord, Write};
use crate::config::{Admission, Mode};

/// How long a peer that was let in is no newcomer.
const REMEMBERED: Duration = Duration::from_secs(3_600);

/// Peers that are remembered so.
const MOST_REMEMBERED: usize = 1 << 16;

/// Why a peer is not let in. It is told in these words, so they say what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Banned.
    #[error("this peer is banned here{}{}; ask whoever runs the server", until_when(*.until), because(.reason))]
    Banned {
        /// The operator's own words.
        reason: String,
        /// Until when.
        until: Option<Seconds>,
    },
    /// [`Mode::AllowList`], and it is not on the list.
    #[error("this server admits only peers that it knows; ask whoever runs it for `rendezvous admit {0}`")]
    NotListed(PeerId),
    /// [`Mode::Token`], and it presents none.
    #[error(
        "this server admits newcomers with a token only; ask whoever runs it for one, then: peer init rv://...#TOKEN"
    )]
    TokenNeeded,
    /// No such token, or it was withdrawn.
    #[error("this server does not know the token; ask whoever runs it for another one")]
    TokenUnknown,
    /// It has admitted as many as it may.
    #[error("the token is used up; ask whoever runs the server for another one")]
    TokenUsed,
    /// Its time is over.
    #[error("the token has expired; ask whoever runs the server for another one")]
    TokenExpired,
    /// The operator's service says no.
    #[error("this server does not admit this peer{}; ask whoever runs it", because(.0))]
    CalledOut(String),
    /// The operator's service says nothing.
    #[error(
        "this server cannot tell at present whether it admits this peer; try again in a while, or tell whoever runs it"
    )]
    NoAnswer,
    /// Work was asked for, and not done in time, or not right.
    #[error(
        "too many newcomers at present, and the work that was asked for was not done; try again in a while"
    )]
    Work,
    /// Work would be asked for, of a peer that knows nothing of it.
    #[error(
        "too many newcomers at present, and this peer is too old to prove itself by work; try again in a while, or update it"
    )]
    TooOld,
    /// The store cannot be written.
    #[error("the server cannot write to its disk; tell whoever runs it")]
    Store,
}

fn until_when(until: Option<Seconds>) -> String {
    until.map_or_else(String::new, |until| format!(" until {}", until.date()))
}

fn because(reason: &str) -> String {
    if reason.is_empty() { String::new() } else { format!(" ({reason})") }
}

/// What becomes of an applicant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Let it in.
    Admit,
    /// Let it in once this is on disk. If it cannot be: [`Policy::undo`].
    Enrol(Vec<Write>),
    /// The operator's service decides.
    CallOut,
    /// Turn it away.
    Refuse(Refusal),
}

/// Judges.
#[derive(Debug)]
pub struct Policy {
    settings: Admission,
    allowed: HashSet<PeerId>,
    records: Records,
    by_hash: HashMap<[u8; 32], u64>,
    pressure: Pressure,
    remembered: HashMap<PeerId, Instant>,
}

impl Policy {
    /// By these settings, with what was kept.
    pub fn new(settings: Admission, records: Records) -> Self {
        let by_hash = records.tokens.iter().map(|(number, token)| (token.hash, *number)).collect();
        let allowed = settings.allow.iter().copied().collect();
        let (pressure, remembered) = (Pressure::default(), HashMap::new());
        Self { settings, allowed, records, by_hash, pressure, remembered }
    }

    /// By other settings from now on.
    pub fn configure(&mut self, settings: Admission) {
        self.allowed = settings.allow.iter().copied().collect();
        self.settings = settings;
    }

    /// The settings.
    pub fn settings(&self) -> &Admission {
        &self.settings
    }

    /// What is kept.
    pub fn records(&self) -> &Records {
        &self.records
    }

    /// Newcomers a second at present.
    pub fn newcomers(&mut self, now: Instant) -> f64 {
        self.pressure.rate(now)
    }

    /// Why a peer is refused whatever it presents. A ban that is over is none.
    pub fn bar(&self, peer: PeerId, time: SystemTime) -> Option<Refusal> {
        let ban = self.records.bans.get(&peer)?;
        if ban.until.is_some_and(|until| until <= time.into()) {
            return None;
        }
        Some(Refusal::Banned { reason: ban.reason.clone(), until: ban.until })
    }

    /// Whether a ban of this peer has been over since it was last asked.
    pub fn take_lapsed(&mut self, peer: PeerId, time: SystemTime) -> bool {
        let lapsed = self.records.bans.contains_key(&peer) && self.bar(peer, time).is_none();
        if lapsed {
            self.records.bans.remove(&peer);
        }
        lapsed
    }

    /// Whether the configuration or the operator have let it in for good, or it was let in lately.
    fn is_known(&self, peer: PeerId) -> bool {
        self.allowed.contains(&peer) || self.records.admitted.contains_key(&peer)
    }

    /// Bits of work that are asked of a peer before it is judged; 0: none.
    pub fn work(&mut self, peer: PeerId, now: Instant) -> u8 {
        let lately = |at: &Instant| now.saturating_duration_since(*at) < REMEMBERED;
        if self.is_known(peer) || self.remembered.get(&peer).is_some_and(lately) {
            return 0;
        }
        let Admission { work_above, work_bits, work_most_bits, .. } = self.settings;
        let terms = Terms { above: work_above, bits: work_bits, most: work_most_bits };
        self.pressure.newcomer(terms, now)
    }

    /// It has been let in.
    pub fn remember(&mut self, peer: PeerId, now: Instant) {
        if self.remembered.len() >= MOST_REMEMBERED {
            self.remembered.retain(|_, at| now.saturating_duration_since(*at) < REMEMBERED);
        }
        if self.remembered.len() < MOST_REMEMBERED {
            self.remembered.insert(peer, now);
        }
    }

    /// Judges a peer that has done its work.
    pub fn judge(&mut self, peer: PeerId, token: Option<&Token>, time: SystemTime) -> Verdict {
        if let Some(refusal) = self.bar(peer, time) {
            return Verdict::Refuse(refusal);
        }
        if self.is_known(peer) {
            return Verdict::Admit;
        }
        match self.settings.mode {
            Mode::Open => Verdict::Admit,
            Mode::AllowList => Verdict::Refuse(Refusal::NotListed(peer)),
            Mode::Callout => Verdict::CallOut,
            Mode::Token => match token {
                None => Verdict::Refuse(Refusal::TokenNeeded),
                Some(token) => self.spend(peer, token, time).unwrap_or_else(Verdict::Refuse),
            },
        }
    }

    fn spend(&mut self, peer: PeerId, token: &Token, time: SystemTime) -> Result<Verdict, Refusal> {
        let number = *self.by_hash.get(&token.hash()).ok_or(Refusal::TokenUnknown)?;
        let record = self.records.tokens.get(&number).ok_or(Refusal::TokenUnknown)?;
        if record.until.is_some_and(|until| until <= time.into()) {
            return Err(Refusal::TokenExpired);
        }
        if record.used >= record.uses {
            return Err(Refusal::TokenUsed);
        }
        let enrolment = Enrolment { at: time.into(), token: Some(number), note: record.note.clone() };
        let writes = vec![Write::Spend(number), Write::Admit(peer, enrolment)];
        self.apply(&writes);
        Ok(Verdict::Enrol(writes))
    }

    /// What [`Verdict::Enrol`] said could not be kept: it has not happened.
    pub fn undo(&mut self, writes: &[Write]) {
        for write in writes {
            match write {
                Write::Spend(number) => {
                    if let Some(token) = self.records.tokens.get_mut(number) {
                        token.used = token.used.saturating_sub(1);
                    }
                }
                Write::Admit(peer, _) => drop(self.records.admitted.remove(peer)),
                _ => {}
            }
        }
    }

    /// Takes changes that are on disk.
    pub fn apply(&mut self, writes: &[Write]) {
        for write in writes {
            match write {
                Write::Token(number, token) => drop(self.by_hash.insert(token.hash, *number)),
                Write::NoToken(number) => {
                    if let Some(token) = self.records.tokens.get(number) {
                        self.by_hash.remove(&token.hash);
                    }
                }
                Write::Withdraw(peer) => drop(self.remembered.remove(peer)),
                _ => {}
            }
            self.records.apply(write);
        }
    }

    /// A token to be made.
    pub fn make_token(
        &self,
        token: &Token,
        uses: u32,
        lifetime: Option<Duration>,
        note: String,
        time: SystemTime,
    ) -> (u64, Write) {
        let (number, at) = (self.records.last_token + 1, Seconds::from(time));
        let until = lifetime.map(|lifetime| at.after(lifetime));
        (number, Write::Token(number, TokenRecord { hash: token.hash(), uses, used: 0, at, until, note }))
    }

    /// A ban to be made.
    pub fn make_ban(peer: PeerId, lasts: Option<Duration>, reason: String, time: SystemTime) -> Write {
        let at = Seconds::from(time);
        Write::Ban(peer, Ban { reason, at, until: lasts.map(|lasts| at.after(lasts)) })
    }
}

#[cfg(test)]
#[path = "policy_tests.rs"]
mod tests;
