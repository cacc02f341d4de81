//! One rendezvous server as the driver knows it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rendezvous_wire::message::{Register, RegistrationId, Request};
use rendezvous_wire::{RendezvousAddress, Token};
use tokio::sync::{Notify, mpsc, watch};

use crate::backoff;
use crate::keep_alive::{KeepAlive, SAFE};
use crate::reflection::Reflection;
use crate::server_changes::{ServerStanding, Standing};
use crate::session::RelayTransport;
use crate::signalling::ServerError;

use super::roaming::ANSWER;
use super::vigil::{Step, Vigil};
use super::way::{Streams, Way};

/// A rendezvous server.
pub(super) struct Server {
    pub(super) requests: mpsc::Sender<Request>,
    /// Has the signalling task connect anew.
    pub(super) void: Arc<Notify>,
    /// Whether somebody waits for it.
    pub(super) urgent: Arc<AtomicBool>,
    /// Has it try TCP: nothing is answered over UDP.
    pub(super) deaf: watch::Sender<bool>,
    pub(super) address: RendezvousAddress,
    pub(super) state: State,
    /// Whether it answers.
    pub(super) vigil: Vigil,
    /// Reflection clients: the present registration's last, before it those of earlier ones whose introductions still live, since
    /// their relay bindings must not lapse.
    pub(super) reflections: Vec<(RegistrationId, Reflection)>,
    /// How often its bindings are renewed.
    pub(super) keep_alive: KeepAlive,
    /// What was uploaded last.
    pub(super) uploaded: Option<Register>,
    pub(super) streams: Streams,
    /// Of the last binding, other than by a bind request of a present reflection client.
    pub(super) sequence: u64,
    /// The relay is reached over UDP again, and those whom we have sessions with are to hear where we are seen.
    pub(super) renews: bool,
    /// It has said that it goes away.
    pub(super) leaving: bool,
    /// Admits us where the server asks for one.
    pub(super) token: Option<Token>,
    /// Since when, and until when, the relay is to answer.
    pub(super) answer_by: Option<(Instant, Instant)>,
    /// When to connect to it anew: it is there again, and so is everybody else.
    pub(super) return_at: Option<Instant>,
}

/// Whether a server can be used.
pub(super) enum State {
    /// Not yet known.
    Connecting,
    /// Registered.
    Up(Up),
    /// Not at present.
    Down(ServerError),
}

/// A registration in force.
#[derive(Clone)]
pub(super) struct Up {
    pub(super) registration: RegistrationId,
    /// Where relay frames go.
    pub(super) way: Way,
    /// Where the signalling connection goes, when that is QUIC.
    pub(super) signalling: Option<SocketAddr>,
    /// Mappings of the other family are kept up, too.
    pub(super) both: bool,
    /// How long the relay remembers us.
    pub(super) lease: Duration,
}

/// Bind requests that may still leave while a stream makes its binding, which has to be the later one.
const MARGIN: u64 = 16;

impl Server {
    pub(super) fn up(&self) -> Option<&Up> {
        match &self.state {
            State::Up(up) => Some(up),
            State::Connecting | State::Down(_) => None,
        }
    }

    /// How it stands with it, for people.
    pub(super) fn standing(&self) -> ServerStanding {
        let state = match &self.state {
            State::Connecting => Standing::Connecting,
            State::Up(_) if self.is_doubtful() => Standing::Silent,
            State::Up(up) => Standing::Registered(up.way.transport()),
            State::Down(error) => Standing::Down(error.clone()),
        };
        ServerStanding { server: self.address.clone(), state }
    }

    /// How its relay is reached.
    pub(super) fn relay_transport(&self) -> Option<RelayTransport> {
        self.up().map(|up| up.way.transport())
    }

    /// Registered, bound, and everything known that soon will be.
    pub(super) fn is_settled(&self) -> bool {
        match self.up() {
            Some(Up { way: Way::Stream { .. }, .. }) => true,
            Some(_) => self.current().is_some_and(Reflection::is_settled),
            None => false,
        }
    }

    /// A sequence for the next binding that is no bind request of a present reflection client.
    pub(super) fn next_sequence(&mut self) -> u64 {
        let requested = self.reflections.iter().map(|(_, reflection)| reflection.sequence());
        self.sequence = requested.max().unwrap_or(0).max(self.sequence) + MARGIN;
        self.sequence
    }

    pub(super) fn request(&self, request: Request) -> bool {
        self.requests.try_send(request).is_ok()
    }

    pub(super) fn next_wake(&self) -> Option<Instant> {
        let reflections = self.reflections.iter().filter_map(|(_, reflection)| reflection.poll_timeout());
        let measurement = self.up().and_then(|_| self.keep_alive.poll_timeout());
        let answer = self.answer_by.map(|(_, until)| until);
        let others = self
            .streams
            .poll_timeout()
            .into_iter()
            .chain(answer)
            .chain(self.vigil.poll_timeout())
            .chain(self.return_at);
        reflections.chain(measurement).chain(others).min()
    }

    /// Has all reflection clients renew as often as is right now.
    pub(super) fn apply_keep_alive(&mut self, now: Instant) {
        let Some(up) = self.up() else { return };
        let Some(signalling) = up.signalling else { return };
        let mut interval = self.keep_alive.interval(up.lease);
        if up.both {
            // What was measured is true of the relay's family alone.
            interval = interval.min(SAFE);
        }
        tracing::debug!(?interval, "keep-alive");
        for (_, reflection) in &mut self.reflections {
            reflection.set_keep_alive(interval, signalling, now);
        }
    }

    /// The machine is in another network.
    pub(super) fn handle_network_change(&mut self, now: Instant) {
        for (_, reflection) in &mut self.reflections {
            reflection.handle_network_change(now);
        }
        self.answer_by = Some((now, now + ANSWER));
    }

    /// Has the relay asked at once whether it still knows us, and where.
    pub(super) fn ask_anew(&mut self, now: Instant) {
        for (_, reflection) in &mut self.reflections {
            reflection.ask_anew(now);
        }
        self.answer_by = Some((now, now + ANSWER));
    }

    /// The machine has slept: it is in doubt no longer, and asked anew.
    pub(super) fn wake(&mut self, now: Instant) {
        if self.up().is_some() {
            self.vigil.wake(now);
        }
        self.ask_anew(now);
    }

    /// It should have answered something.
    pub(super) fn suspect(&mut self, now: Instant) {
        if self.up().is_some() {
            self.vigil.suspect(now);
        }
    }

    /// Whether another is better used: it does not answer, or goes away.
    pub(super) fn is_doubtful(&self) -> bool {
        self.vigil.is_doubtful() || self.leaving
    }

    /// It goes away.
    pub(super) const fn leave(&mut self) {
        self.leaving = true;
    }

    /// It has answered. True when that ends a doubt.
    pub(super) fn answered(&mut self, now: Instant) -> bool {
        let doubted = self.vigil.handle_answer(now);
        self.tell_deafness();
        doubted
    }

    /// Whether TCP is worth a try: the relay is asked over UDP, and does not answer.
    pub(super) fn tell_deafness(&self) {
        let unanswered = self.vigil.is_doubtful() || self.current().is_some_and(Reflection::is_unanswered);
        let deaf = unanswered && self.current().is_some();
        self.deaf.send_if_modified(|known| std::mem::replace(known, deaf) != deaf);
    }

    /// Asks it whether it is there. True: it is in doubt from now on.
    pub(super) fn keep_vigil(&mut self, now: Instant) -> bool {
        let mut doubted = false;
        while let Some(step) = self.vigil.poll(now) {
            match step {
                Step::Doubt => doubted = true,
                Step::Ask => {
                    self.streams.ask();
                    // Of whatever registration: any answer is one.
                    if let Some((_, reflection)) = self.reflections.last_mut() {
                        reflection.hurry(now);
                    }
                }
            }
        }
        doubted
    }

    pub(super) fn set_urgent(&mut self, urgent: bool, now: Instant) {
        self.urgent.store(urgent, Ordering::Relaxed);
        self.vigil.set_urgent(urgent, now);
    }

    /// Connects to it anew, soon: it is there, and does not know us.
    pub(super) fn come_back(&mut self, urgent: bool, now: Instant) {
        self.set_urgent(urgent, now);
        let at = now + backoff::return_pause(urgent, &mut rand::rng());
        self.return_at = Some(self.return_at.map_or(at, |planned| planned.min(at)));
    }

    /// Makes the signalling connection anew.
    pub(super) fn reconnect(&mut self) {
        self.answer_by = None;
        self.return_at = None;
        self.void.notify_one();
    }

    /// Tells the server what we offer, if it can be told.
    pub(super) fn upload(&mut self, register: &Register) {
        if self.up().is_some() && self.request(Request::Update(register.clone())) {
            self.uploaded = Some(register.clone());
        }
    }

    /// Makes the signalling connection anew if the relay has not answered when it should have.
    pub(super) fn judge_silence(&mut self, now: Instant) {
        let Some((asked, _)) = self.answer_by.filter(|(_, until)| *until <= now) else { return };
        self.answer_by = None;
        if !self.current().is_some_and(|reflection| reflection.has_answered_since(asked)) {
            tracing::debug!("the relay does not answer from this network");
            self.reconnect();
        }
    }

    /// Nothing more is to be learnt from it at present.
    pub(super) fn is_quiet(&self) -> bool {
        self.current().is_none() || self.is_settled()
    }

    pub(super) fn current(&self) -> Option<&Reflection> {
        let up = self.up()?;
        self.reflections.iter().find(|(id, _)| *id == up.registration).map(|(_, reflection)| reflection)
    }
}
