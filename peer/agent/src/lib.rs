//! Finds a direct path between two introduced peers: candidates, connectivity checks and path choice as one pure state machine
//! after ICE (RFC 8445), for one data stream with one component.
//!
//! # The loop
//!
//! An [`Agent`] does no I/O and reads no clock. Its owner
//!
//! 1. makes one when an introduction arrives, names the sockets and the other side's candidates;
//! 2. hands it every STUN message that is meant for it ([`Agent::handle_message`]);
//! 3. calls [`Agent::handle_timeout`] at the moment that [`Agent::poll_timeout`] names;
//! 4. after each of these sends what [`Agent::poll_transmit`] gives and obeys what [`Agent::poll_event`] tells.
//!
//! The same inputs at the same times and the same seed give the same outputs.
//!
//! # Out of scope
//!
//! Gathering candidates, allocating relays, and the relayed path itself: the session runs over the relay all the while, so
//! the agent knows no relayed candidates.
//!
//! # Where it departs from RFC 8445
//!
//! ## A base is a socket
//!
//! A peer has one socket per address family, bound to every address of the machine; the kernel picks the source address. So a
//! pair is a socket and a remote address ([`Path`]), and local candidates serve only to compute priorities (5.1.2.1).
//!
//! ## No foundations, no freezing (6.1.2.6)
//!
//! With one component there is little to learn from one pair about another. All pairs start in the waiting state.
//!
//! ## Pacing has a depth (14.2)
//!
//! Ta is 5 ms as the standard has it, as a token bucket that holds four: the first four checks leave at once. A private address that
//! happens to rank first does not then delay the pair that works.
//!
//! ## Shorter retransmission timeouts (14.3)
//!
//! The standard's 500 ms protect a network from agents with many components. Here a lost check is repeated after 200 ms: below the RTT of a long path
//! that costs one needless packet of 100 bytes, and at 5 % loss it decides how soon a path is direct. See [`timers`].
//!
//! ## The controlling side selects before it nominates, and may nominate again (8.1.1, 12.1)
//!
//! A pair that is valid may carry data at once (12.1), so the controlling side selects its first valid pair and nominates it in the same moment. When a
//! clearly better pair becomes valid, it nominates that one; the controlled side follows the latest nomination.
//!
//! ## Failure is not final (8.1.2)
//!
//! When every pair has failed, the session is on the relay and nothing is lost; a new round begins after a pause that grows from 2 s to 60 s.
//!
//! ## Binding indications are not used for keep-alive (11)
//!
//! Consent checks on the selected pair (RFC 7675) keep its bindings open.

#![forbid(unsafe_code)]

mod agent;
mod consent;
mod pair;
mod report;
mod selection;
pub mod timers;

pub use agent::{Agent, Config, Deselection, Event, Family, Path, Selected, SocketId, Transmit};
pub use report::{PairReport, PairState};
