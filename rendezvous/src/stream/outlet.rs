//! The frames that wait for one stream: relay threads put them in, its writer takes them out.

use std::sync::{Mutex, PoisonError};

use bytes::BytesMut;
use rendezvous_wire::stream::Backlog;
use tokio::sync::Notify;

/// Most bytes that wait. A queue that never drops would only fill with what is late (bufferbloat), and QUIC's congestion control
/// needs to hear of a slow stream by losses.
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

    /// Queues frames; false when some were dropped, since the stream does not keep up.
    pub(crate) fn push(&self, frames: &[u8], segment: usize) -> bool {
        let kept = self.backlog.lock().unwrap_or_else(PoisonError::into_inner).push_frames(frames, segment);
        self.filled.notify_one();
        kept
    }

    /// Waits until something is there. For the writer alone.
    pub(crate) async fn filled(&self) {
        while self.backlog.lock().unwrap_or_else(PoisonError::into_inner).is_empty() {
            self.filled.notified().await;
        }
    }

    /// Takes everything, in exchange for what was taken before and has been written.
    pub(crate) fn take(&self, written: BytesMut) -> BytesMut {
        self.backlog.lock().unwrap_or_else(PoisonError::into_inner).take(written)
    }
}
