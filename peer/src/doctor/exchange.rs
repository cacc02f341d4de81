//! STUN transactions over several sockets, with their retransmissions (RFC 8489, section 6.2.1). Pure.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::Rng as _;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use rendezvous_wire::stun::behaviour::{Change, DiscoveryRequest};
use rendezvous_wire::stun::{Class, Received, TransactionId};

/// A socket by its place in the list that the shell has opened.
pub(crate) type Socket = usize;

/// A datagram to send.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Transmit {
    pub(crate) socket: Socket,
    pub(crate) destination: SocketAddr,
    pub(crate) datagram: Vec<u8>,
}

/// How often and how long to ask: RTO, Rc and Rm of RFC 8489, section 6.2.1.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Persistence {
    /// Before the first retransmission; doubles with each.
    pub(crate) rto: Duration,
    /// Requests in all.
    pub(crate) requests: u32,
    /// Times the RTO after the last one.
    pub(crate) patience: u32,
}

impl Persistence {
    /// Of the first request to a server whose RTT is not known: 250, 500, 1000, 2000 ms apart, given up after 4.75 s. RFC 8489 has 500 ms
    /// and 39.5 s; a person is waiting, and there are a handful of these packets.
    pub(crate) const FIRST: Self = Self { rto: Duration::from_millis(250), requests: 5, patience: 4 };

    /// Where the RTT is known, and silence is an answer as well.
    pub(crate) fn for_rtt(rtt: Duration) -> Self {
        let rto = (rtt * 2).clamp(Duration::from_millis(100), Duration::from_millis(500));
        Self { rto, requests: 4, patience: 4 }
    }
}

/// A request to make.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ask {
    /// Sends it.
    pub(crate) socket: Socket,
    /// Is to get the answer.
    pub(crate) hears: Socket,
    /// Goes there.
    pub(crate) destination: SocketAddr,
    pub(crate) change: Change,
    pub(crate) response_port: Option<u16>,
}

impl Ask {
    /// A request that is answered the way it came.
    pub(crate) fn plain(socket: Socket, destination: SocketAddr) -> Self {
        Self { socket, hears: socket, destination, change: Change::default(), response_port: None }
    }
}

/// What came of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Answered(Answer),
    /// An error response with this code.
    Refused(u16),
    /// No answer to any copy of it.
    Silent,
}

impl Outcome {
    pub(crate) fn answer(self) -> Option<Answer> {
        match self {
            Self::Answered(answer) => Some(answer),
            Self::Refused(_) | Self::Silent => None,
        }
    }
}

/// A success response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Answer {
    /// Where the request came from, as the server saw it.
    pub(crate) mapped: SocketAddr,
    /// OTHER-ADDRESS.
    pub(crate) other: Option<SocketAddr>,
    /// When it came.
    pub(crate) at: Instant,
    /// Since the first request, if there was but one.
    pub(crate) rtt: Option<Duration>,
}

/// One of the requests of [`Exchanges`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ExchangeId(usize);

#[derive(Debug)]
struct Exchange {
    ask: Ask,
    transaction: TransactionId,
    persistence: Persistence,
    sent: u32,
    began: Instant,
    next: Instant,
    outcome: Option<Outcome>,
}

/// Requests under way.
#[derive(Debug)]
pub(crate) struct Exchanges {
    all: Vec<Exchange>,
    random: StdRng,
}

impl Exchanges {
    pub(crate) fn new(seed: u64) -> Self {
        Self { all: Vec::new(), random: StdRng::seed_from_u64(seed) }
    }

    pub(crate) fn start(&mut self, ask: Ask, persistence: Persistence, now: Instant) -> ExchangeId {
        let transaction = TransactionId(self.random.random());
        let exchange =
            Exchange { ask, transaction, persistence, sent: 0, began: now, next: now, outcome: None };
        self.all.push(exchange);
        ExchangeId(self.all.len() - 1)
    }

    /// What came of it; `None` while it is under way.
    pub(crate) fn outcome(&self, id: ExchangeId) -> Option<Outcome> {
        self.all[id.0].outcome
    }

    /// The success response, if one has come.
    pub(crate) fn answer(&self, id: ExchangeId) -> Option<Answer> {
        self.outcome(id)?.answer()
    }

    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        self.all.iter().filter(|exchange| exchange.outcome.is_none()).map(|exchange| exchange.next).min()
    }

    pub(crate) fn poll_transmit(&mut self, now: Instant) -> Option<Transmit> {
        for exchange in self.all.iter_mut().filter(|exchange| exchange.outcome.is_none()) {
            if exchange.next > now {
                continue;
            }
            let Persistence { rto, requests, patience } = exchange.persistence;
            if exchange.sent >= requests {
                exchange.outcome = Some(Outcome::Silent);
                continue;
            }
            exchange.next =
                now + if exchange.sent + 1 == requests { rto * patience } else { rto * (1 << exchange.sent) };
            if exchange.sent == 0 {
                exchange.began = now;
            }
            exchange.sent += 1;
            let Ask { socket, destination, change, response_port, .. } = exchange.ask;
            let padded = response_port.is_none();
            let request =
                DiscoveryRequest { transaction: exchange.transaction, change, response_port, padded };
            if let Ok(datagram) = request.encode() {
                return Some(Transmit { socket, destination, datagram });
            }
        }
        None
    }

    /// Takes a response that `socket` got from `source`.
    pub(crate) fn handle(
        &mut self,
        socket: Socket,
        source: SocketAddr,
        message: &Received<'_>,
        now: Instant,
    ) {
        let transaction = message.transaction();
        let Some(exchange) = self.all.iter_mut().find(|exchange| exchange.transaction == transaction) else {
            return;
        };
        if exchange.outcome.is_some() {
            return;
        }
        let ask = &exchange.ask;
        match message.class() {
            // A refusal comes the way the request went, whatever it asked for.
            Class::Error if socket == ask.socket && source == ask.destination => {
                exchange.outcome = message.error_code().map(Outcome::Refused);
            }
            Class::Success if socket == ask.hears => {
                // An answer from where it was not asked for proves nothing about filtering.
                let Change { ip, port } = ask.change;
                let changed = (source.ip() != ask.destination.ip()) == ip
                    && (source.port() != ask.destination.port()) == port;
                let Some(mapped) = message.mapped_address().filter(|_| changed) else { return };
                let rtt = (exchange.sent == 1).then(|| now.saturating_duration_since(exchange.began));
                let answer = Answer { mapped, other: message.other_address(), at: now, rtt };
                exchange.outcome = Some(Outcome::Answered(answer));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rendezvous_wire::stun;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn server() -> SocketAddr {
        at("203.0.113.10:3478")
    }

    /// All that is sent until nothing is left to do, with the time since the start.
    fn run_out(exchanges: &mut Exchanges, start: Instant) -> Vec<Duration> {
        let mut sent = Vec::new();
        while let Some(now) = exchanges.poll_timeout() {
            while exchanges.poll_transmit(now).is_some() {
                sent.push(now - start);
            }
        }
        sent
    }

    #[test]
    fn an_unanswered_request_is_repeated_and_given_up() {
        let start = Instant::now();
        let mut exchanges = Exchanges::new(1);
        let id = exchanges.start(Ask::plain(0, server()), Persistence::FIRST, start);
        let sent = run_out(&mut exchanges, start);
        assert_eq!(sent.iter().map(Duration::as_millis).collect::<Vec<_>>(), [0, 250, 750, 1750, 3750]);
        assert_eq!(exchanges.outcome(id), Some(Outcome::Silent));
    }

    #[test]
    fn an_answer_counts_only_where_and_whence_it_was_asked_for() {
        let now = Instant::now();
        let change = Change { ip: true, port: true };
        let mut exchanges = Exchanges::new(1);
        let ask = Ask { change, ..Ask::plain(3, server()) };
        let id = exchanges.start(ask, Persistence::FIRST, now);
        let transmit = exchanges.poll_transmit(now).unwrap();
        let transaction = Received::parse(&transmit.datagram).unwrap().transaction();
        let answer = stun::binding_success(transaction, at("198.18.0.1:9"), None).unwrap();
        let answer = Received::parse(&answer).unwrap();
        for (socket, source) in [
            (3, "203.0.113.10:3478"),
            (3, "203.0.113.10:3479"),
            (3, "203.0.113.11:3478"),
            (2, "203.0.113.11:3479"),
        ] {
            exchanges.handle(socket, at(source), &answer, now);
            assert_eq!(exchanges.outcome(id), None, "{socket} from {source}");
        }
        let later = now + Duration::from_millis(40);
        exchanges.handle(3, at("203.0.113.11:3479"), &answer, later);
        let answer = exchanges.answer(id).unwrap();
        assert_eq!((answer.mapped, answer.rtt), (at("198.18.0.1:9"), Some(Duration::from_millis(40))));
        assert!(exchanges.poll_timeout().is_none());
    }

    #[test]
    fn a_refusal_ends_it() {
        let now = Instant::now();
        let mut exchanges = Exchanges::new(1);
        let id = exchanges.start(
            Ask { response_port: Some(80), hears: 1, ..Ask::plain(0, server()) },
            Persistence::FIRST,
            now,
        );
        let transmit = exchanges.poll_transmit(now).unwrap();
        let transaction = Received::parse(&transmit.datagram).unwrap().transaction();
        let error = stun::binding_error(transaction, 400, &[], None).unwrap();
        exchanges.handle(0, server(), &Received::parse(&error).unwrap(), now);
        assert_eq!(exchanges.outcome(id), Some(Outcome::Refused(400)));
    }
}
