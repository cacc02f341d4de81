//! How far a transfer is, for whoever wants to show it.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

/// Counters that a transfer moves and anyone may read. Bytes are those of content.
#[derive(Debug, Default)]
pub struct Progress {
    total_files: AtomicU32,
    total_bytes: AtomicU64,
    files: AtomicU32,
    bytes: AtomicU64,
    carried: AtomicU64,
}

/// Where a transfer stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Standing {
    /// Files in the offer.
    pub total_files: u32,
    /// Bytes in the offer, holes included.
    pub total_bytes: u64,
    /// Files that are dealt with.
    pub files: u32,
    /// Bytes that are dealt with: carried, in holes, or there before.
    pub bytes: u64,
    /// Bytes that were carried over the session. More than the files have when one began again.
    pub carried: u64,
}

impl Progress {
    /// Where it stands now.
    pub fn now(&self) -> Standing {
        Standing {
            total_files: self.total_files.load(Relaxed),
            total_bytes: self.total_bytes.load(Relaxed),
            files: self.files.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            carried: self.carried.load(Relaxed),
        }
    }

    pub(crate) fn begin(&self, files: u32, bytes: u64) {
        self.total_files.store(files, Relaxed);
        self.total_bytes.store(bytes, Relaxed);
        self.files.store(0, Relaxed);
        self.bytes.store(0, Relaxed);
    }

    pub(crate) fn carried(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Relaxed);
        self.carried.fetch_add(bytes, Relaxed);
    }

    pub(crate) fn passed(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Relaxed);
    }

    /// A file began again: what was counted for it counts no more.
    pub(crate) fn took_back(&self, bytes: u64) {
        let _ = self.bytes.fetch_update(Relaxed, Relaxed, |counted| Some(counted.saturating_sub(bytes)));
    }

    pub(crate) fn file(&self) {
        self.files.fetch_add(1, Relaxed);
    }
}
