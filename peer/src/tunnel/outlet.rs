//! The frames that wait for a stream: QUIC puts them in, the stream's writer takes them out. Never blocks QUIC.

use std::sync::{Mutex, PoisonError};

use bytes::BytesMut;
use rendezvous_wire::stream::Backlog;
use tokio::sync::Notify;

/// Most bytes that wait. A socket that says "try again" would stop every connection of the endpoint, and a queue that never drops lets the congestion
/// window grow without end: QUIC has to hear of a slow stream by losses.
const MOST: usize = 256 * 1024;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Outlet {
    backlog: Mutex<Backlog>,
    filled: Notify,
}

impl Outlet {
    pub(crate) fn new() -> Self {
        Self { backlog: Mutex::new(Backlog::new(MOST)), filled: Notify::new() }
    }

    /// Queues frames, or drops those for which there is no room.
    pub(crate) fn push(&self, frames: &[u8], segment: usize) {
        let kept = self.backlog.lock().unwrap_or_else(PoisonError::into_inner).push_frames(frames, segment);
        if !kept {
            tracing::trace!("frames dropped: the stream does not keep up");
        }
        self.filled.notify_one();
    }

    /// Waits until something is there. For the writer alone.
    pub(super) async fn filled(&self) {
        while self.backlog.lock().unwrap_or_else(PoisonError::into_inner).is_empty() {
            self.filled.notified().await;
        }
    }

    /// Takes everything, in exchange for what was taken before and has been written.
    pub(super) fn take(&self, written: BytesMut) -> BytesMut {
        self.backlog.lock().unwrap_or_else(PoisonError::into_inner).take(written)
    }
}

/// Each is one of a kind.
impl PartialEq for Outlet {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Eq for Outlet {}
