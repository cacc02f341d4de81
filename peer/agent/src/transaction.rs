//! Checks that wait for their answer.

use std::collections::BTreeMap;
use std::time::Instant;

use rendezvous_wire::message::Role;
use rendezvous_wire::stun::TransactionId;

use crate::path::Path;

/// One check on its way.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Transaction {
    pub(crate) path: Path,
    pub(crate) sent: Instant,
    /// The role that the check claimed; a 487 speaks of this one.
    pub(crate) role: Role,
    /// Whether it carried USE-CANDIDATE.
    pub(crate) nominates: bool,
    /// The volley that it belongs to.
    pub(crate) volley: u32,
    pub(crate) expires: Instant,
}

/// All checks on their way. Every check has a transaction of its own, so that an answer tells exactly which check it
/// answers and the round-trip time has no ambiguity.
#[derive(Debug, Default)]
pub(crate) struct Transactions {
    open: BTreeMap<TransactionId, Transaction>,
}

impl Transactions {
    pub(crate) fn insert(&mut self, id: TransactionId, transaction: Transaction) {
        self.open.insert(id, transaction);
    }

    pub(crate) fn get(&self, id: TransactionId) -> Option<Transaction> {
        self.open.get(&id).copied()
    }

    pub(crate) fn remove(&mut self, id: TransactionId) {
        self.open.remove(&id);
    }

    pub(crate) fn expire(&mut self, now: Instant) {
        self.open.retain(|_, transaction| now < transaction.expires);
    }
}
