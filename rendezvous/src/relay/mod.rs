//! Reflection and relay on UDP 3478 and 3479.
//!
//! | module | what |
//! |---|---|
//! | [`table`] | who is bound where, and which channel joins whom. Pure |
//! | [`meters`] | what each key sends, and how much of it may pass. Pure |
//! | [`shares`] | who may send how much where the relay is full. Pure |
//! | [`reflect`] | answers to STUN requests, bind requests among them. Pure |
//! | [`origin`] | from which of the server's addresses and ports an answer leaves. Pure |
//! | [`runs`] | cuts a buffer that the kernel coalesced into runs that can be forwarded as one. Pure |
//! | `count` | what all threads have done |
//! | `bell` | the way into a relay thread for the rest of the server |
//! | `socket` | one of its sockets |
//! | `outbox` | what leaves of a batch, in one call a socket |
//! | `threads` | all of them |
//! | `shard` | a thread with sockets of its own that does all this |

pub(crate) mod bell;
pub(crate) mod count;
pub mod meters;
pub mod origin;
mod outbox;
pub mod reflect;
pub mod runs;
pub(crate) mod shard;
pub mod shares;
mod socket;
pub mod table;
pub(crate) mod threads;
