//! The relay channels to one remote endpoint: its introduction's own, and spare ones at other servers. What comes on any of them is heard; one is
//! in use.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rendezvous_wire::message::{Introduction, IntroductionId, RegistrationId};
use rendezvous_wire::relay::Channel;

use crate::socket::Framed;

use super::remote::RemoteState;
use super::server::Server;
use super::way::Way;
use super::{Driver, Key};

/// How long a channel that another has taken the place of is still heard: the other side may not know yet, and what it has sent is under way.
const LINGER: Duration = Duration::from_secs(5);

/// A relay channel to the other side.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) id: IntroductionId,
    pub(super) server: usize,
    pub(super) registration: RegistrationId,
    pub(super) way: Way,
    /// Addresses under which the channel was known before.
    pub(super) former: Vec<SocketAddr>,
    pub(super) channel: Channel,
    /// The other side has left it, or is gone.
    pub(super) closed: bool,
    /// Another has taken its place: it goes then.
    pub(super) until: Option<Instant>,
}

impl Lane {
    pub(super) fn new(
        introduction: &Introduction,
        server: usize,
        (registration, way): (RegistrationId, Way),
    ) -> Self {
        Self {
            id: introduction.introduction,
            server,
            registration,
            way,
            former: Vec::new(),
            channel: introduction.channel,
            closed: false,
            until: None,
        }
    }

    pub(super) fn framed(&self) -> Framed {
        self.way.framed(self.channel)
    }

    /// Under what the channel is known.
    pub(super) fn names(&self) -> impl Iterator<Item = (SocketAddr, Channel)> + '_ {
        self.former.iter().copied().chain([self.way.relay()]).map(|relay| (relay, self.channel))
    }

    pub(super) fn named(&self) -> (usize, IntroductionId) {
        (self.server, self.id)
    }

    /// Whether it belongs to the server's present registration, and is there to stay.
    pub(super) fn is_in_force(&self, servers: &[Server]) -> bool {
        let up = servers.get(self.server).and_then(Server::up);
        !self.closed && self.until.is_none() && up.is_some_and(|up| up.registration == self.registration)
    }

    /// Whether, besides, the server is not in doubt.
    pub(super) fn is_sound(&self, servers: &[Server]) -> bool {
        self.is_in_force(servers) && servers.get(self.server).is_some_and(|server| !server.is_doubtful())
    }
}

impl RemoteState {
    /// All of them, the introduction's own first.
    pub(super) fn lanes(&self) -> impl Iterator<Item = &Lane> {
        self.introduction.iter().map(|introduced| &introduced.lane).chain(&self.spares)
    }

    pub(super) fn lanes_mut(&mut self) -> impl Iterator<Item = &mut Lane> {
        self.introduction.iter_mut().map(|introduced| &mut introduced.lane).chain(&mut self.spares)
    }

    /// The one in use.
    pub(super) fn lane(&self) -> Option<&Lane> {
        let chosen = self.lanes().find(|lane| Some(lane.named()) == self.in_use);
        chosen.or_else(|| self.lanes().next())
    }

    /// Another that could carry.
    pub(super) fn spare(&self, servers: &[Server]) -> Option<&Lane> {
        let in_use = self.lane().map(Lane::named);
        self.lanes().find(|lane| Some(lane.named()) != in_use && lane.is_sound(servers))
    }
}

impl Driver {
    /// A channel in reserve. Of two at one server the one of the greater number stays, on both sides; the other is heard for a while.
    pub(super) fn add_spare(&mut self, key: Key, server: usize, introduction: &Introduction, now: Instant) {
        let Some(up) = self.servers.get(server).and_then(Server::up) else { return };
        let lane = Lane::new(introduction, server, (up.registration, up.way.clone()));
        let Some(state) = self.remotes.get_mut(&key) else { return };
        tracing::debug!(peer = %state.peer.short(), server, relay = %lane.way.relay(), "a spare relay");
        state.wanting.remove(&server);
        self.socket.update(|table| table.channels.extend(lane.names().map(|name| (name, key))));
        state.spares.retain(|other| other.named() != lane.named());
        state.spares.push(lane);
        self.retire_surplus(key, now);
        self.mend(key, now);
    }

    /// One channel at a server is enough: the introduction's own, else the one of the greatest number.
    fn retire_surplus(&mut self, key: Key, now: Instant) {
        let servers = &self.servers;
        let Some(state) = self.remotes.get_mut(&key) else { return };
        for server in 0..servers.len() {
            let here = |lane: &&Lane| lane.server == server && lane.is_in_force(servers);
            let own = state.introduction.as_ref().map(|introduced| &introduced.lane).filter(here);
            let best = own.or_else(|| state.spares.iter().filter(here).max_by_key(|lane| lane.id));
            let Some(best) = best.map(Lane::named) else { continue };
            let mut leaves = false;
            for lane in &mut state.spares {
                if lane.server == server && lane.named() != best && lane.until.is_none() {
                    lane.until = Some(now + LINGER);
                    leaves |= state.in_use == Some(lane.named());
                }
            }
            if leaves {
                state.in_use = Some(best);
            }
        }
    }

    /// Keeps the channel of an introduction that another has taken the place of.
    pub(super) fn keep_lane(&mut self, key: Key, lane: Lane, now: Instant) {
        if let Some(state) = self.remotes.get_mut(&key) {
            state.spares.push(lane);
            self.retire_surplus(key, now);
        }
    }

    /// Drops the channels whose time is over, or whose server has forgotten them.
    pub(super) fn drop_lanes(&mut self, key: Key, now: Instant) {
        let servers = &self.servers;
        let Some(state) = self.remotes.get_mut(&key) else { return };
        let forgotten = |lane: &Lane| {
            let up = servers.get(lane.server).and_then(Server::up);
            up.is_some_and(|up| up.registration != lane.registration)
        };
        let over =
            |lane: &mut Lane| lane.until.is_some_and(|until| until <= now) || lane.closed || forgotten(lane);
        let gone: Vec<Lane> = state.spares.extract_if(.., over).collect();
        state.in_use.take_if(|in_use| gone.iter().any(|lane| lane.named() == *in_use));
        for lane in &gone {
            self.forget_lane(lane);
        }
    }

    /// Takes a channel out of the table, and tells the server where it may not know.
    pub(super) fn forget_lane(&self, lane: &Lane) {
        self.socket.update(|table| {
            for name in lane.names() {
                table.channels.remove(&name);
            }
        });
        let server = self.servers.get(lane.server);
        if !lane.closed && server.and_then(Server::up).is_some_and(|up| up.registration == lane.registration)
        {
            self.request_close(lane.named());
        }
    }
}
