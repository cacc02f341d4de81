//! Finds, proves, chooses and watches direct paths between two peers that were introduced to each other.
//!
//! An [`Agent`] is one side of one introduction. It speaks ICE (RFC 8445) with consent freshness (RFC 7675) for one
//! component, from UDP sockets bound to the unspecified address, one per family. It does no I/O and has no clock, no
//! lock and no task: datagrams and `now` go in, datagrams, events and the next wake-up come out. The same seed and
//! the same inputs give the same packets.
//!
//! ```
//! # use std::time::Instant;
//! # use peer_agent::{Agent, Config, Event, SocketId};
//! # use rendezvous_wire::{Candidate, message::{Credentials, Role}};
//! # fn send(_: peer_agent::Transmit) {}
//! # fn example(local: Credentials, remote: Credentials, candidates: &[Candidate], theirs: &[Candidate], now: Instant)
//! #     -> Result<(), Box<dyn std::error::Error>> {
//! let mut agent = Agent::new(Config::new(Role::Controlling, local, remote, 7), now)?;
//! agent.add_socket(SocketId(0), "0.0.0.0:4000".parse::<std::net::SocketAddr>()?.into(), candidates, now);
//! for candidate in theirs {
//!     agent.add_remote_candidate(*candidate, now);
//! }
//! // Then, for as long as the introduction lives, with the time of each turn:
//! agent.handle_timeout(now); // or handle_datagram(socket, source, bytes, now)
//! while let Some(transmit) = agent.poll_transmit() {
//!     send(transmit);
//! }
//! while let Some(event) = agent.poll_event() {
//!     if let Event::Selected(selected) = event {
//!         println!("data goes to {}", selected.path);
//!     }
//! }
//! let wake_up = agent.poll_timeout();
//! # Ok(()) }
//! ```
//!
//! # How it goes
//!
//! A *round* gives every pair a *volley* of up to seven checks in four seconds. The controlling side selects the
//! first path that is proven, nominates it, and moves when a clearly better one ([`better`]) is proven within the
//! next second; the controlled side follows. Then the other pairs are given up, and consent checks keep the selected
//! path. When it is lost, or when a round finds nothing, rounds are repeated, ever more rarely, but for ever.
//!
//! At zero loss the first path is proven one round trip after the introduction, which no protocol can beat: the first
//! checks leave at once. When one side hears of the introduction later than the other, its NAT is still closed to
//! the other's first check only if it is later by more than the one-way delay between the two; since both are told
//! at the same moment by one server, the triangle inequality speaks against that. If it happens all the same, the late
//! side's check triggers one that arrives.
//!
//! Two NATs of which one takes a new port for every destination and the other filters by port cannot meet in a round: for
//! these there is [`birthday`] probing, which hands its find over to the agent.
//!
//! # Out of scope
//!
//! The relay (data is there before and after a direct path; it is no candidate here), gathering, more than one
//! component, ICE-lite, and everything of RFC 8838 but that candidates may come at any time.
//!
//! # Where it departs from RFC 8445
//!
//! ## A pair is a socket and a remote address
//!
//! Two local candidates of one unspecified-address socket make the same packets, so they are one pair from the start
//! (6.1.2.4 prunes them later). A mapping that a response reveals (7.2.5.3.1) is reported ([`Event::Mapped`],
//! [`PairReport::mapped`]) and makes no local candidate.
//!
//! ## No foundations, nothing frozen
//!
//! All pairs begin Waiting (6.1.2.6). Freezing saves checks where many components and streams share their fate; there
//! is one component here.
//!
//! ## The first checks go by likelihood
//!
//! Not by priority alone (6.1.4.2): mappings elsewhere and global addresses first, private addresses first only when
//! both sides have the same mapped address. By the book the check that works waits behind every private address of
//! the other site.
//!
//! ## Ta is 10 ms, a burst of four may leave together, and each agent has its own pace
//!
//! 14.2 has 50 ms, no bursts, and one pace for all agents of a host. The average of an agent stays within what 14.2
//! allows at least; triggered, nominating and consent checks may run ahead by eight more, for which the others wait.
//! A host that is introduced to hundreds of peers at once wants a limit of its own around the agents.
//!
//! ## Shorter RTO, and no retransmissions but new transactions
//!
//! 14.3 has an RTO of at least 500 ms. With 200 ms a lost check costs 200 ms; a path slower than that costs a few
//! needless packets. Every check is a transaction of its own, as RFC 7675 has it for consent, and an answer to any
//! proves the pair: the round-trip time is never ambiguous, and a slow path is proven by its first check however many
//! followed. A volley is seven checks, as Rc, and fails after 6 s instead of 39.5 s.
//!
//! ## A triggered check brings the volley forward
//!
//! 7.3.1.4 cancels the transaction in progress and starts another. Here the next check of the volley goes out at
//! once, and the earlier ones can still be answered.
//!
//! ## It never fails
//!
//! 8.1.2 ends in a Failed checklist. Here rounds are repeated 8, 16, 32, 64, 128, 192 ... s after the introduction,
//! at the same moments on both sides: a filtering NAT lets a check in only while the other side is sending as well.
//!
//! ## Renomination
//!
//! 8.1.1 nominates once. Here the controlling side uses the first proven path at once (12.1 allows that) and nominates
//! again when a better one turns up. The controlled side follows the nomination that came last. All checks of the
//! controlling side on its selected path carry USE-CANDIDATE, consent checks too, so an old nomination that was
//! overtaken on its way misleads for one consent interval at most; to make that rare, a nomination waits up to a
//! second for the answer to the one before.
//!
//! ## A restart keeps the credentials
//!
//! [`Agent::restart`] checks all pairs again (section 9 would exchange new credentials through the server first). The
//! selected path stays, but gets one volley to show that it lives, and after three unanswered checks any other proven
//! path takes over. The same doubt befalls it when a new path proves itself out of the blue: the other side has moved.
//!
//! ## Traffic that nothing answers ends a path
//!
//! RFC 7675 waits for 30 s. Here the caller tells of traffic that nothing answers ([`Agent::handle_traffic`]): after three round trips
//! the path is in doubt and the relay carries as well, and after a second of unanswered checks it is given up. A path
//! on which nothing is sent is judged by consent alone. A lost path is asked twice a second, then ever more rarely, whether it is back.
//!
//! ## Silence
//!
//! What is not authentic gets no answer, not even the 400 or 401 of RFC 8489, 9.1.3. FINGERPRINT is sent and, where
//! there is one, verified; it is not demanded.
//!
//! ## Bounds
//!
//! [`MAX_CANDIDATES`](rendezvous_wire::candidate::MAX_CANDIDATES) named and [`MAX_PEER_REFLEXIVE`] learnt candidates,
//! [`MAX_PAIRS`] pairs (6.1.2.5). Addresses that are never a peer's
//! ([`is_probeable`](rendezvous_wire::candidate::is_probeable)) are neither sent to nor heard.

#![forbid(unsafe_code)]

mod agent;
pub mod birthday;
mod budget;
mod checklist;
mod choice;
mod config;
mod consent;
mod event;
mod inbound;
mod ladder;
mod likelihood;
mod liveness;
mod meeting;
mod pacing;
mod path;
pub mod prediction;
mod report;
mod rounds;
mod rung;
mod schedule;
mod selection;
mod transaction;
mod volley;

pub use agent::Agent;
pub use budget::{Budget, Gate, Permit};
pub use config::{Config, MAX_PAIRS, MAX_PEER_REFLEXIVE, RC, Timers};
pub use event::{DeselectReason, Event, Selected, Transmit};
pub use ladder::{Ladder, Output, Setup};
pub use liveness::Traffic;
pub use meeting::Progress;
pub use path::{Family, Path, SocketId};
pub use report::{CheckError, PairReport, PairState};
pub use rung::{Rung, RungReport};
pub use selection::{CLEARLY_FASTER, CLEARLY_FASTER_PERCENT, KIND_MAY_COST, Measured, better};

#[cfg(test)]
mod tests {
    use std::time::Instant;

    /// The one instant that tests take from the clock: there is no other way to make one.
    #[expect(clippy::disallowed_methods, reason = "an arbitrary origin for a virtual clock")]
    pub(crate) fn origin() -> Instant {
        Instant::now()
    }
}
