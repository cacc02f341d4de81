//! Real agents and the real server core over the modelled internet, on virtual time.
//!
//! A run makes a random network from a seed ([`Scenario`]), lets peers register, dial and look for direct paths, and holds what came of it
//! against what the topology alone says ([`oracle`]). Everything follows from the seed: the same one gives the same packets.
//!
//! | module | what |
//! |---|---|
//! | [`scenario`] | random networks |
//! | [`oracle`] | whether a direct path is possible |
//! | `peer`, `server` | the pure cores of both, with the model for a network |
//! | `pipe` | the stream that signalling goes over |
//! | [`run`](mod@run) | one run |
//! | [`tally`] | many |
//! | `log` | what happens, for people |

mod log;
pub mod oracle;
mod peer;
mod pipe;
pub mod run;
pub mod scenario;
mod server;
pub mod tally;

pub use log::Trace;
pub use oracle::Verdict;
pub use run::{Outcome, Pair, Run, run};
pub use scenario::{Handicap, Options, Scenario};
