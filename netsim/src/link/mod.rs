//! A line that delays, loses and reorders, emulated in userspace.

mod queue;
mod shell;

pub use queue::Impairment;
pub(crate) use shell::Link;
pub use shell::LinkError;
