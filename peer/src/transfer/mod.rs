//! Files and folders over a session: verified, resumed after any interruption, never outside of where they belong.
//!
//! [`send`] and [`receive`] meet on one bidirectional stream; who opens it, and what tells it from other streams, is the application's
//! business. The sender offers a [`Manifest`]; the receiver asks for what it does not have, and verifies every file by its BLAKE3 before it gets its name.
//!
//! ```no_run
//! # async fn example(session: peer::Session) -> Result<(), Box<dyn std::error::Error>> {
//! use peer::transfer::{Progress, Source, send};
//!
//! let source = Source::collect(&["photos".into()])?;
//! let (mut writing, reading) = session.open_bi().await?;
//! send(writing, reading, &source, &Progress::default().into()).await?;
//! # Ok(())
//! # }
//! ```
//!
//! Kept: content, names (bytes), permission bits without set-id and sticky, dates of change, empty folders, holes, links that lead to somewhere within
//! the same top folder. Not kept: owners, hard links (each name becomes a file), special files, attributes.
//!
//! # Going on
//!
//! There is no journal. A file that has its name and the offered size is hashed and compared; a part is hashed in groups of 1 MiB and compared with
//! the sender's file group by group, so that no byte counts that is not what the sender has now, and a source that has changed meanwhile is
//! noticed. At most the group that was on its way is sent again. A source that changes while it is read is begun again.
//!
//! # Inside
//!
//! Pure: `manifest` (the rules), `message` (frames), `tree` (BLAKE3 by groups), `arrival` (one file on its way in). Threads at the disk: `reader` and
//! `outbox` where the files are, `plan` and `writer` with `store` where they go. Network and hashing never wait for each other but through
//! queues.

mod arrival;
mod blocks;
mod content;
mod folders;
mod manifest;
mod message;
mod outbox;
mod plan;
mod progress;
mod reader;
mod receiver;
mod sender;
mod source;
mod store;
mod tree;
mod writer;

#[cfg(test)]
mod arrival_tests;
#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
pub(crate) mod transfer_tests;

pub use arrival::ArrivalError;
pub use manifest::{Entry, Kind, MAX_ENTRIES, Manifest, ManifestError, Modified};
pub use message::{FileProblem, ReceiverProblem, Refusal};
pub use progress::{Progress, Standing};
pub use receiver::{Consent, ReceiveError, Received, receive, refuse};
pub use sender::{SendError, Sent, send};
pub use source::{LeftOut, LeftOutReason, Source, SourceError};
pub use store::StoreError;
