//! Two relays for every session, where two servers know both sides: the second channel is asked for when the session stands, and costs one message to
//! either side and an entry in two tables, nothing on the way. So when a server is lost nothing has to be asked first.
//!
//! The side that asked for the introduction asks for the spare channel; the other one does when that has not happened.

use std::time::{Duration, Instant};

use rand::Rng as _;
use rendezvous_wire::message::{Introduce, Purpose, Request, RequestId, Role};

use crate::socket::Route;

use super::lanes::Lane;
use super::remote::RemoteState;
use super::server::Server;
use super::{Driver, Key};

/// Channels that a session has, its own included.
const ENOUGH: usize = 2;

/// After an introduction: what matters more comes first.
const SETTLE: Duration = Duration::from_secs(1);

/// How much later the side that did not ask for the introduction asks.
const DEFER: Duration = Duration::from_millis(300);

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(1);

/// The first pause after a refusal: the other side may be on its way back. Doubled each time, up to [`LONGEST`].
const PAUSE: Duration = Duration::from_millis(100);

/// The longest pause.
const LONGEST: Duration = Duration::from_mins(1);

/// When a relayed session whose introduction is gone with its server, and that goes on over another, is introduced anew: after the turmoil.
const CALM: Duration = Duration::from_secs(2);

/// A spare channel that is to be asked for.
#[derive(Debug)]
pub(super) struct Wanting {
    next: Instant,
    attempts: u32,
    asked: Option<RequestId>,
}

impl Wanting {
    fn pause(&mut self, first: Duration, now: Instant) {
        let pause = first.saturating_mul(1 << self.attempts.saturating_sub(1).min(16)).min(LONGEST);
        self.next = now + pause.mul_f64(rand::rng().random_range(0.75..1.25));
    }
}

impl RemoteState {
    pub(super) fn spares_wake(&self) -> Option<Instant> {
        let wanting = self.wanting.values().map(|wanting| wanting.next);
        wanting.chain(self.spares.iter().filter_map(|lane| lane.until)).min()
    }

    /// The servers at which a spare channel would help.
    fn lacking<'a>(&'a self, servers: &'a [Server]) -> impl Iterator<Item = usize> + 'a {
        let in_force = self.lanes().filter(|lane| lane.is_in_force(servers)).count();
        let sound = self.lanes().filter(|lane| lane.is_sound(servers)).count();
        // Without any the introduction itself is made anew, unless there is a direct path that would suffer.
        let stands = self.has_connections() && self.introduction.is_some();
        let helps = stands && in_force < ENOUGH.min(servers.len()) && (sound > 0 || self.selected.is_some());
        let without = move |index: &usize| {
            let known = |server: &Server| server.up().is_some() && !server.is_doubtful();
            servers.get(*index).is_some_and(known)
                && !self.lanes().any(|lane| lane.server == *index && lane.is_in_force(servers))
        };
        (0..servers.len()).filter(move |_| helps).filter(without)
    }

    /// How much later than the other side this one asks for what either can ask for.
    pub(super) fn defers(&self) -> Duration {
        let asked = self.introduction.as_ref().is_none_or(|introduced| introduced.role == Role::Controlling);
        if asked { Duration::ZERO } else { DEFER }
    }
}

impl Driver {
    /// Asks for the spare channels that are wanted and due.
    pub(super) fn pump_spares(&mut self, now: Instant) {
        for key in self.remotes.keys().copied().collect::<Vec<_>>() {
            self.drop_lanes(key, now);
            self.ask_for_spares(key, now);
        }
    }

    fn ask_for_spares(&mut self, key: Key, now: Instant) {
        let Some(state) = self.remotes.get_mut(&key) else { return };
        let lacking: Vec<usize> = state.lacking(&self.servers).collect();
        state.wanting.retain(|server, _| lacking.contains(server));
        for index in lacking {
            let settled = state.introduced_at.map_or(now, |introduced| (introduced + SETTLE).max(now));
            let next = settled + state.defers();
            let fresh = || Wanting { next, attempts: 0, asked: None };
            let wanting = state.wanting.entry(index).or_insert_with(fresh);
            if wanting.next > now {
                continue;
            }
            let request = RequestId(self.next_request);
            self.next_request += 1;
            let (target, purpose) = (state.peer, Purpose::Spare);
            let introduce = Introduce { request, target, purpose, first_flight: Vec::new() };
            let asked =
                self.servers.get(index).is_some_and(|server| server.request(Request::Introduce(introduce)));
            wanting.asked = asked.then_some(request);
            wanting.attempts += 1;
            wanting.pause(PATIENCE, now);
        }
    }

    /// The remote and the server whose spare channel was asked for so.
    pub(super) fn spare_asked(&self, request: RequestId) -> Option<Key> {
        let asks = |state: &RemoteState| state.wanting.values().any(|wanting| wanting.asked == Some(request));
        self.remotes.iter().find(|(_, state)| asks(state)).map(|(key, _)| *key)
    }

    /// The server would not. True when it was about a spare channel.
    pub(super) fn spare_refused(&mut self, request: RequestId, now: Instant) -> bool {
        let mut wanting = self.remotes.values_mut().flat_map(|state| state.wanting.values_mut());
        let Some(wanting) = wanting.find(|wanting| wanting.asked == Some(request)) else { return false };
        wanting.asked = None;
        wanting.pause(PAUSE, now);
        true
    }

    /// Sees to it that a session whose server is lost has an introduction again, and a relay.
    pub(super) fn mend(&mut self, key: Key, now: Instant) {
        self.mend_fall_back(key, now);
        let servers = &self.servers;
        let Some(state) = self.remotes.get_mut(&key) else { return };
        let Some(introduced) = &state.introduction else { return };
        if !state.has_connections() {
            return;
        }
        let sound = introduced.lane.is_sound(servers);
        if !sound && state.selected.is_none() {
            if state.lanes().any(|lane| lane.is_sound(servers)) {
                state.renewal.consider(now + CALM + state.defers() * 4);
            } else {
                state.renewal.want_from(now + state.defers());
            }
        }
    }

    /// Beside a direct path the relay is no more than the fall-back: nothing is to be proven before another one takes its place.
    fn mend_fall_back(&mut self, key: Key, now: Instant) {
        let servers = &self.servers;
        let Some(state) = self.remotes.get_mut(&key) else { return };
        let unsound = state.lane().is_some_and(|lane| !lane.is_sound(servers));
        if !unsound || !state.has_connections() || state.remote.route().direct().is_none() {
            return;
        }
        let Some(spare) = state.spare(servers).map(Lane::named) else { return };
        state.in_use = Some(spare);
        if matches!(**state.remote.route(), Route::Both { .. }) {
            // Its copies have gone where nobody takes them.
            self.route_both_ways(key, now);
        }
    }

    /// The same for all.
    pub(super) fn mend_all(&mut self, now: Instant) {
        for key in self.remotes.keys().copied().collect::<Vec<_>>() {
            self.mend(key, now);
            self.watch_relay(key, now);
        }
        self.pump_spares(now);
    }
}
