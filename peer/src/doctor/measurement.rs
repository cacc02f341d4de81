//! What one address family's NATs and firewalls do, measured at a rendezvous server's reflection ports (RFC 5780, section 4). Pure.
//!
//! One socket is seen from every port and address of the server (mapping); a second has talked to one of them only, and is answered from the
//! others (filtering); a third and a fourth send to each other's mapped address (hairpinning); the rest are left alone for a while
//! (binding lifetime).

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use rendezvous_wire::stun::behaviour::Change;
use rendezvous_wire::stun::{self, Class, Received, TransactionId};

use super::exchange::{Answer, Ask, ExchangeId, Exchanges, Outcome, Persistence, Socket, Transmit};
use super::finding::{FamilyFinding, Filtering, mapping};
use super::lifetime::{BindingLifetime, LifetimeSearch};

const MAPPING: Socket = 0;
const FILTERING: Socket = 1;
const HAIRPIN: [Socket; 2] = [2, 3];
const ASKER: Socket = 4;

/// Once the first of the server's ports has answered, the others have this long before the tests that need them no longer wait.
const STRAGGLERS: Duration = Duration::from_secs(1);

/// Between two packets to our own mapped address, and how many there are.
const HAIRPIN_PACE: Duration = Duration::from_millis(100);
const HAIRPIN_PACKETS: u32 = 4;

/// What to measure, and with what.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// The server's two reflection ports.
    pub(crate) server: [SocketAddr; 2],
    /// The local ports of the sockets: [`Plan::sockets`] of them.
    pub(crate) ports: Vec<u16>,
    /// The address from which packets to the server leave.
    pub(crate) local: IpAddr,
    /// How long bindings are left alone, shortest first.
    pub(crate) silences: Vec<Duration>,
}

impl Plan {
    /// How many sockets a measurement with so many silences needs.
    pub(crate) fn sockets(silences: usize) -> usize {
        ASKER + 1 + silences
    }
}

/// A measurement under way.
#[derive(Debug)]
pub(crate) struct Measurement {
    plan: Plan,
    exchanges: Exchanges,
    random: StdRng,
    /// Of the mapping test, in the order in which they began.
    views: Vec<(SocketAddr, ExchangeId)>,
    asked_alternate: bool,
    /// Of the tests that come after it.
    filtering: Option<FilteringTest>,
    hairpin: Option<Hairpin>,
    lifetime: Option<LifetimeSearch>,
    first_answer: Option<Answer>,
}

#[derive(Debug, Clone, Copy)]
struct FilteringTest {
    plain: ExchangeId,
    /// From another address, and from another port of the same one.
    changed: Option<[ExchangeId; 2]>,
}

#[derive(Debug)]
struct Hairpin {
    openings: [ExchangeId; 2],
    transactions: [TransactionId; 2],
    sent: u32,
    next: Instant,
    heard: bool,
}

impl Measurement {
    pub(crate) fn new(plan: Plan, seed: u64, now: Instant) -> Self {
        let mut exchanges = Exchanges::new(seed);
        let views =
            plan.server.map(|at| (at, exchanges.start(Ask::plain(MAPPING, at), Persistence::FIRST, now)));
        Self {
            plan,
            exchanges,
            random: StdRng::seed_from_u64(seed.wrapping_add(1)),
            views: views.to_vec(),
            asked_alternate: false,
            filtering: None,
            hairpin: None,
            lifetime: None,
            first_answer: None,
        }
    }

    pub(crate) fn is_done(&self) -> bool {
        let settled = self.views.iter().all(|(_, view)| self.exchanges.outcome(*view).is_some());
        if self.first_answer.is_none() {
            return settled;
        }
        settled
            && self.filtering.is_some_and(|test| self.is_filtering_settled(test))
            && self.hairpin.as_ref().is_some_and(|test| self.is_hairpin_settled(test))
            && self.lifetime.as_ref().is_some_and(LifetimeSearch::is_done)
    }

    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        let stragglers =
            self.first_answer.filter(|_| self.filtering.is_none()).map(|first| first.at + STRAGGLERS);
        let hairpin = self.hairpin.as_ref().filter(|test| self.knocks(test)).map(|test| test.next);
        let lifetime = self.lifetime.as_ref().and_then(LifetimeSearch::poll_timeout);
        self.exchanges.poll_timeout().into_iter().chain(stragglers).chain(hairpin).chain(lifetime).min()
    }

    pub(crate) fn poll_transmit(&mut self, now: Instant) -> Option<Transmit> {
        self.advance(now);
        let transmit = self.exchanges.poll_transmit(now);
        transmit.or_else(|| self.lifetime.as_mut()?.poll_transmit(now)).or_else(|| self.knock(now))
    }

    /// Takes a STUN message that `socket` got from `source`.
    pub(crate) fn handle(
        &mut self,
        socket: Socket,
        source: SocketAddr,
        message: &Received<'_>,
        now: Instant,
    ) {
        match message.class() {
            Class::Request => {
                if let Some(test) = &mut self.hairpin {
                    test.heard |=
                        HAIRPIN.contains(&socket) && test.transactions.contains(&message.transaction());
                }
            }
            _ => {
                self.exchanges.handle(socket, source, message, now);
                if let Some(lifetime) = &mut self.lifetime {
                    lifetime.handle(socket, source, message, now);
                }
            }
        }
        self.advance(now);
    }

    /// Begins what can begin.
    fn advance(&mut self, now: Instant) {
        self.first_answer = self.first_answer.or_else(|| self.exchanges.answer(self.views[0].1));
        let Some(first) = self.first_answer else { return };
        let persistence = Persistence::for_rtt(first.rtt.unwrap_or(Persistence::FIRST.rto));
        if !self.asked_alternate {
            self.asked_alternate = true;
            if let Some(other) = first.other.filter(|other| self.is_alternate(*other)) {
                for port in self.plan.server.map(|at| at.port()) {
                    let at = SocketAddr::new(other.ip(), port);
                    self.views.push((at, self.exchanges.start(Ask::plain(MAPPING, at), persistence, now)));
                }
            }
        }
        let settled = self.views.iter().all(|(_, view)| self.exchanges.outcome(*view).is_some());
        if self.filtering.is_none() && (settled || first.at + STRAGGLERS <= now) {
            self.start_rest(persistence, now);
        }
        if let Some(test) = self.filtering
            && test.changed.is_none()
            && self.exchanges.answer(test.plain).is_some()
        {
            let changed = [Change { ip: true, port: true }, Change { ip: false, port: true }].map(|change| {
                self.exchanges.start(
                    Ask { change, ..Ask::plain(FILTERING, self.plan.server[0]) },
                    persistence,
                    now,
                )
            });
            self.filtering = Some(FilteringTest { changed: Some(changed), ..test });
        }
    }

    fn start_rest(&mut self, persistence: Persistence, now: Instant) {
        let server = self.plan.server[0];
        let mut open = |socket| self.exchanges.start(Ask::plain(socket, server), persistence, now);
        self.filtering = Some(FilteringTest { plain: open(FILTERING), changed: None });
        self.hairpin = Some(Hairpin {
            openings: HAIRPIN.map(open),
            transactions: [(); 2].map(|()| TransactionId(self.random.random())),
            sent: 0,
            next: now,
            heard: false,
        });
        let seed = self.random.random();
        self.lifetime = Some(LifetimeSearch::new(server, ASKER, &self.plan.silences, seed, now));
    }

    /// Whether OTHER-ADDRESS is another address of the same family. Some servers without one give their own.
    fn is_alternate(&self, other: SocketAddr) -> bool {
        let own = self.plan.server[0];
        other.ip() != own.ip() && other.is_ipv4() == own.is_ipv4()
    }

    /// The mapped addresses of the hairpinning sockets.
    fn doors(&self, test: &Hairpin) -> Option<[SocketAddr; 2]> {
        let [one, other] = test.openings.map(|opening| self.exchanges.answer(opening));
        Some([one?.mapped, other?.mapped])
    }

    fn knocks(&self, test: &Hairpin) -> bool {
        !test.heard && test.sent <= HAIRPIN_PACKETS * 2 && self.doors(test).is_some()
    }

    fn is_hairpin_settled(&self, test: &Hairpin) -> bool {
        let opened = test.openings.iter().all(|opening| self.exchanges.outcome(*opening).is_some());
        opened && !self.knocks(test)
    }

    /// The next packet of one hairpinning socket to the other's mapped address: both send, since what comes in may be filtered
    /// until something has gone out.
    fn knock(&mut self, now: Instant) -> Option<Transmit> {
        let test = self.hairpin.as_ref().filter(|test| test.next <= now && self.knocks(test))?;
        let doors = self.doors(test)?;
        let test = self.hairpin.as_mut()?;
        let side = test.sent as usize % 2;
        test.sent += 1;
        if side == 1 || test.sent > HAIRPIN_PACKETS * 2 {
            test.next = now + HAIRPIN_PACE;
        }
        if test.sent > HAIRPIN_PACKETS * 2 {
            // The last one has had its time.
            return None;
        }
        let datagram = stun::binding_request(test.transactions[side]).ok()?;
        Some(Transmit { socket: HAIRPIN[side], destination: doors[1 - side], datagram })
    }

    fn is_filtering_settled(&self, test: FilteringTest) -> bool {
        match test.changed {
            Some(changed) => changed.iter().all(|id| self.exchanges.outcome(*id).is_some()),
            None => self.exchanges.outcome(test.plain).is_some_and(|outcome| outcome.answer().is_none()),
        }
    }

    /// What was found; what is still under way is unknown.
    pub(crate) fn finding(&self) -> FamilyFinding {
        let seen: Vec<(SocketAddr, SocketAddr)> = self
            .views
            .iter()
            .filter_map(|(at, view)| Some((*at, self.exchanges.answer(*view)?.mapped)))
            .collect();
        let local = SocketAddr::new(self.plan.local, self.plan.ports.first().copied().unwrap_or_default());
        let others = [FILTERING, HAIRPIN[0], HAIRPIN[1]].into_iter().zip(self.later_openings());
        let others = others.filter_map(|(socket, id)| {
            let own = SocketAddr::new(self.plan.local, *self.plan.ports.get(socket)?);
            Some((own, self.exchanges.answer(id)?.mapped))
        });
        let alternate = self.views.iter().skip(2).any(|(_, view)| self.exchanges.answer(*view).is_some());
        FamilyFinding {
            local,
            rtt: self.first_answer.and_then(|first| first.rtt),
            mapping: mapping(local, &seen, &others.collect::<Vec<_>>()),
            mapped: seen.iter().map(|(_, mapped)| *mapped).collect(),
            filtering: self.filtering_found(alternate),
            hairpinning: self
                .hairpin
                .as_ref()
                .filter(|test| self.doors(test).is_some())
                .map(|test| test.heard),
            lifetime: self.lifetime.as_ref().map_or(BindingLifetime::default(), LifetimeSearch::result),
        }
    }

    fn later_openings(&self) -> Vec<ExchangeId> {
        let filtering = self.filtering.iter().map(|test| test.plain);
        filtering.chain(self.hairpin.iter().flat_map(|test| test.openings)).collect()
    }

    /// `alternate`: the server's other address has been seen to answer.
    fn filtering_found(&self, alternate: bool) -> Filtering {
        let Some(changed) = self.filtering.and_then(|test| test.changed) else { return Filtering::Unknown };
        match changed.map(|id| self.exchanges.outcome(id)) {
            [Some(Outcome::Answered(_)), _] => Filtering::EndpointIndependent,
            [Some(Outcome::Silent), Some(Outcome::Answered(_))] if alternate => Filtering::AddressDependent,
            [_, Some(Outcome::Answered(_))] => Filtering::NotByPort,
            [Some(_), Some(Outcome::Silent)] => Filtering::AddressAndPortDependent,
            _ => Filtering::Unknown,
        }
    }
}

#[cfg(test)]
#[path = "measurement_tests.rs"]
mod tests;
