//! How long a NAT keeps a binding that is not used (RFC 5780, section 4.6). Pure.
//!
//! A binding is made, used a second time, left alone for a while, and then the server is asked by another socket to answer to it (RESPONSE-PORT): the
//! answer arrives or it does not. Every length of silence has a socket of its own, so that all run at once and no probe
//! renews what another one waits for.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rendezvous_wire::stun::Received;

use super::exchange::{Ask, ExchangeId, Exchanges, Outcome, Persistence, Socket, Transmit};

/// After this long a binding is used again before it is left alone, as one that is kept alive is. Linux keeps flows that were answered for
/// more than two seconds four times as long as others (`nf_conntrack_udp_timeout_stream`, 120 s instead of 30 s).
const SEASONING: Duration = Duration::from_millis(2_500);

/// What is known of the lifetime of a binding that has been used both ways for some seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BindingLifetime {
    /// It was still there after this long.
    pub at_least: Option<Duration>,
    /// It was gone after this long.
    pub less_than: Option<Duration>,
}

#[derive(Debug, Clone, Copy)]
enum State {
    /// The binding is being made.
    Opening(ExchangeId),
    /// It is used a second time then.
    Seasoning(Instant),
    /// It is being used a second time.
    Reopening(ExchangeId),
    /// Nothing may be sent until then.
    Quiet {
        mapped: SocketAddr,
        until: Instant,
    },
    /// The first asks the server to answer to the binding; the second shows that the server answers at all.
    Asking {
        answer: ExchangeId,
        control: ExchangeId,
        mapped: SocketAddr,
    },
    Alive,
    Gone,
    /// It could not be made, or the server has fallen silent.
    Unknown,
}

#[derive(Debug, Clone, Copy)]
struct Trial {
    socket: Socket,
    silence: Duration,
    state: State,
}

/// A search for the binding lifetime.
#[derive(Debug)]
pub(crate) struct LifetimeSearch {
    exchanges: Exchanges,
    server: SocketAddr,
    /// Asks for the others.
    asker: Socket,
    trials: Vec<Trial>,
}

impl LifetimeSearch {
    /// Tries these silences, shortest first, with the sockets that follow `asker`.
    pub(crate) fn new(
        server: SocketAddr,
        asker: Socket,
        silences: &[Duration],
        seed: u64,
        now: Instant,
    ) -> Self {
        let mut exchanges = Exchanges::new(seed);
        let trial = |(place, silence): (usize, &Duration)| {
            let socket = asker + 1 + place;
            let opening = exchanges.start(Ask::plain(socket, server), Persistence::FIRST, now);
            Trial { socket, silence: *silence, state: State::Opening(opening) }
        };
        let trials = silences.iter().enumerate().map(trial).collect();
        Self { exchanges, server, asker, trials }
    }

    /// What is known so far.
    pub(crate) fn result(&self) -> BindingLifetime {
        let of = |wanted: fn(State) -> bool| {
            self.trials.iter().filter(move |trial| wanted(trial.state)).map(|trial| trial.silence)
        };
        let less_than = of(|state| matches!(state, State::Gone)).min();
        let at_least = of(|state| matches!(state, State::Alive))
            .filter(|alive| less_than.is_none_or(|gone| *alive < gone))
            .max();
        BindingLifetime { at_least, less_than }
    }

    /// Whether there is nothing more to learn.
    pub(crate) fn is_done(&self) -> bool {
        self.trials.iter().all(|trial| matches!(trial.state, State::Alive | State::Gone | State::Unknown))
    }

    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        let quiet = self.trials.iter().filter_map(|trial| match trial.state {
            State::Quiet { until, .. } | State::Seasoning(until) => Some(until),
            _ => None,
        });
        quiet.chain(self.exchanges.poll_timeout()).min()
    }

    pub(crate) fn poll_transmit(&mut self, now: Instant) -> Option<Transmit> {
        self.advance(now);
        let transmit = self.exchanges.poll_transmit(now);
        if transmit.is_none() {
            // Silence may have come to its end just now.
            self.advance(now);
        }
        transmit.or_else(|| self.exchanges.poll_transmit(now))
    }

    pub(crate) fn handle(
        &mut self,
        socket: Socket,
        source: SocketAddr,
        message: &Received<'_>,
        now: Instant,
    ) {
        self.exchanges.handle(socket, source, message, now);
        self.advance(now);
    }

    fn advance(&mut self, now: Instant) {
        for place in 0..self.trials.len() {
            let trial = self.trials[place];
            let state = self.next_state(trial, now);
            self.trials[place].state = state;
            if matches!(state, State::Gone) {
                // It will not come back.
                for longer in &mut self.trials[place + 1..] {
                    if !matches!(longer.state, State::Alive) {
                        longer.state = State::Unknown;
                    }
                }
            }
        }
    }

    fn next_state(&mut self, trial: Trial, now: Instant) -> State {
        match trial.state {
            State::Opening(opening) => match self.exchanges.outcome(opening) {
                Some(Outcome::Answered(answer)) => State::Seasoning(answer.at + SEASONING),
                Some(_) => State::Unknown,
                None => trial.state,
            },
            State::Seasoning(until) if until <= now => {
                let again = Ask::plain(trial.socket, self.server);
                State::Reopening(self.exchanges.start(again, Persistence::FIRST, now))
            }
            State::Reopening(reopening) => match self.exchanges.outcome(reopening) {
                Some(Outcome::Answered(answer)) => {
                    State::Quiet { mapped: answer.mapped, until: answer.at + trial.silence }
                }
                Some(_) => State::Unknown,
                None => trial.state,
            },
            State::Quiet { mapped, until } if until <= now => {
                let knock = Ask {
                    hears: trial.socket,
                    response_port: Some(mapped.port()),
                    ..Ask::plain(self.asker, self.server)
                };
                let answer = self.exchanges.start(knock, Persistence::FIRST, now);
                let control =
                    self.exchanges.start(Ask::plain(self.asker, self.server), Persistence::FIRST, now);
                State::Asking { answer, control, mapped }
            }
            State::Asking { answer, control, mapped } => {
                match (self.exchanges.outcome(answer), self.exchanges.outcome(control)) {
                    (Some(Outcome::Answered(_)), _) => State::Alive,
                    (Some(Outcome::Silent), Some(Outcome::Answered(control)))
                        // A NAT with several addresses may have given the asker another one, and then the wrong door was knocked at.
                        if control.mapped.ip() == mapped.ip() =>
                    {
                        State::Gone
                    }
                    (Some(_), Some(_)) => State::Unknown,
                    _ => trial.state,
                }
            }
            state => state,
        }
    }
}

#[cfg(test)]
#[path = "lifetime_tests.rs"]
mod tests;
