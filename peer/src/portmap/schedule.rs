//! When to ask whom for what. Pure: `now` comes in, what to do comes out.
//!
//! One mapping is wanted. The protocols are tried in turn, PCP first (RFC 6886, section 1.1 asks for that order); the one that gave the
//! mapping renews it. Where none does, the round is repeated ever more seldom.
//!
//! A gateway that has restarted has forgotten the mapping (RFC 6887, section 8.5). The next renewal makes it again, which is why leases are
//! short: no epoch has to be watched for that.

use std::net::SocketAddrV4;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

use super::{Mapped, Protocol, is_reachable};

/// The lifetime asked for. RFC 6886, section 3.3 recommends two hours for hosts that seldom renew; for us a packet in five minutes is nothing,
/// a crash is forgotten after ten, and after a restart of the gateway the mapping is back within just over six.
pub(crate) const LEASE: Duration = Duration::from_secs(600);

/// A longer lifetime than this is taken for this: RFC 6887, section 15 has gateways grant at most a day.
const LONGEST: Duration = Duration::from_secs(86_400);

/// No renewal follows another in less than this (RFC 6887, section 11.2.1).
const SHORTEST_PAUSE: Duration = Duration::from_secs(4);

/// How long a round without success is followed by silence: twice as long each time, up to [`LONGEST_BACK_OFF`]. A gateway that is only starting
/// is met by the first, one on which somebody switches port mapping on by the last.
const BACK_OFF: Duration = Duration::from_secs(30);

/// See [`BACK_OFF`].
const LONGEST_BACK_OFF: Duration = Duration::from_secs(3600);

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Ask for the mapping, or to have it longer; `external_port` is the port that we have, or would like.
    Map { protocol: Protocol, external_port: u16, renews: bool },
    /// Give the mapping back.
    Remove { protocol: Protocol, external_port: u16 },
}

/// What a gateway has granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Granted {
    /// Where packets from outside are taken.
    pub(crate) external: SocketAddrV4,
    /// From now on.
    pub(crate) lifetime: Duration,
}

/// What came of an [`Action::Map`] instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failure {
    /// Nobody answered. A mapping that we have may still be in force.
    Silence,
    /// No, or not in this way.
    Refusal,
}

/// The wanted mapping and what becomes of it.
#[derive(Debug)]
pub(crate) struct Schedule {
    state: State,
    /// The port inside, asked for outside as well.
    port: u16,
    back_off: Duration,
    /// Of the last round; why there is no mapping.
    behind_another_nat: bool,
    rng: SmallRng,
}

#[derive(Debug, Clone, Copy)]
enum State {
    /// The round begins at this time.
    Waiting(Instant),
    /// This protocol is next, or is being tried.
    Trying(Protocol, Asked),
    Held(Lease, Asked),
    /// To be given back.
    Unwanted(Protocol, u16),
    Closed,
}

/// Whether an action is under way.
type Asked = bool;

#[derive(Debug, Clone, Copy)]
struct Lease {
    protocol: Protocol,
    external: SocketAddrV4,
    expires: Instant,
    renew: Instant,
}

impl Schedule {
    /// Wants a mapping for `port` from `now` on.
    pub(crate) fn new(port: u16, seed: u64, now: Instant) -> Self {
        Self {
            state: State::Waiting(now),
            port,
            back_off: BACK_OFF,
            behind_another_nat: false,
            rng: SmallRng::seed_from_u64(seed),
        }
    }

    /// The mapping in force.
    pub(crate) fn mapped(&self) -> Option<Mapped> {
        match self.state {
            State::Held(lease, _) => Some(Mapped { protocol: lease.protocol, external: lease.external }),
            _ => None,
        }
    }

    /// Whether the gateway would have mapped, but to an address that is itself behind a NAT.
    pub(crate) fn is_behind_another_nat(&self) -> bool {
        self.behind_another_nat
    }

    /// When [`poll_action`](Self::poll_action) has something new; never while an action is under way.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        match self.state {
            State::Waiting(at) => Some(at),
            State::Held(lease, false) => Some(lease.renew.min(lease.expires)),
            _ => None,
        }
    }

    /// What to do now. Each action must be answered by [`granted`](Self::granted), [`failed`](Self::failed) or
    /// [`removed`](Self::removed) before there is another.
    pub(crate) fn poll_action(&mut self, now: Instant) -> Option<Action> {
        if let State::Waiting(at) = self.state
            && at <= now
        {
            self.state = State::Trying(Protocol::FIRST, false);
        }
        if let State::Held(lease, false) = self.state
            && lease.expires <= now
        {
            tracing::debug!(protocol = %lease.protocol, external = %lease.external, "the port mapping has run out");
            self.state = State::Trying(Protocol::FIRST, false);
        }
        match self.state {
            State::Trying(protocol, false) => {
                self.state = State::Trying(protocol, true);
                Some(Action::Map { protocol, external_port: self.port, renews: false })
            }
            State::Held(lease, false) if lease.renew <= now => {
                self.state = State::Held(lease, true);
                let (protocol, external_port) = (lease.protocol, lease.external.port());
                Some(Action::Map { protocol, external_port, renews: true })
            }
            State::Unwanted(protocol, external_port) => Some(Action::Remove { protocol, external_port }),
            _ => None,
        }
    }

    /// The gateway has mapped.
    pub(crate) fn granted(&mut self, granted: Granted, now: Instant) {
        let (State::Trying(protocol, true) | State::Held(Lease { protocol, .. }, true)) = self.state else {
            return;
        };
        let Granted { external, lifetime } = granted;
        self.behind_another_nat = !is_reachable(external);
        if self.behind_another_nat || lifetime.is_zero() {
            tracing::debug!(%protocol, %external, ?lifetime, "a port mapping of no use");
            self.state = State::Unwanted(protocol, external.port());
            return;
        }
        self.back_off = BACK_OFF;
        let lifetime = lifetime.clamp(2 * SHORTEST_PAUSE, LONGEST);
        // Between a half and five eighths (RFC 6887, section 11.2.1).
        let pause = lifetime.mul_f64(self.rng.random_range(0.5..0.625));
        let lease = Lease { protocol, external, expires: now + lifetime, renew: now + pause };
        self.state = State::Held(lease, false);
    }

    /// The gateway has not.
    pub(crate) fn failed(&mut self, failure: Failure, now: Instant) {
        match self.state {
            State::Trying(protocol, true) => match protocol.next() {
                Some(next) => self.state = State::Trying(next, false),
                None => self.rest(now),
            },
            State::Held(lease, true) => match failure {
                Failure::Silence => {
                    // Half of what is left each time (RFC 6887, section 11.2.1).
                    let left = lease.expires.saturating_duration_since(now);
                    let renew = now + (left / 2).max(SHORTEST_PAUSE);
                    self.state = State::Held(Lease { renew, ..lease }, false);
                }
                Failure::Refusal => self.state = State::Trying(Protocol::FIRST, false),
            },
            _ => {}
        }
    }

    /// A removal is over, whatever came of it.
    pub(crate) fn removed(&mut self, now: Instant) {
        if matches!(self.state, State::Unwanted(..)) {
            self.rest(now);
        }
    }

    /// The endpoint is being closed: what there is to give back. Nothing is asked for any more.
    pub(crate) fn close(&mut self) -> Option<Action> {
        let remove = |protocol, external_port| Some(Action::Remove { protocol, external_port });
        match std::mem::replace(&mut self.state, State::Closed) {
            State::Held(lease, _) => remove(lease.protocol, lease.external.port()),
            State::Unwanted(protocol, external_port) => remove(protocol, external_port),
            // It may have been granted, and the answer be on its way.
            State::Trying(protocol, true) => remove(protocol, self.port),
            State::Trying(_, false) | State::Waiting(_) | State::Closed => None,
        }
    }

    fn rest(&mut self, now: Instant) {
        self.state = State::Waiting(now + self.back_off);
        self.back_off = (self.back_off * 2).min(LONGEST_BACK_OFF);
    }
}

#[cfg(test)]
#[path = "schedule_tests.rs"]
mod tests;
