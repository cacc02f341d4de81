//! A line that delays, loses and reorders, emulated in userspace.

mod line;
mod queue;
mod shell;

pub(crate) use line::{Fate, Line};
pub use queue::Impairment;
pub(crate) use shell::Link;
pub use shell::LinkError;
