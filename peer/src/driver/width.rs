//! How long a datagram may be on each path of a remote.

use std::time::Instant;

use crate::socket::{Framed, PathSocket, Straight, Width, WidthProbe};

use super::remote::RemoteState;
use super::{Driver, Key};

/// The probes of one remote's paths.
#[derive(Debug, Default)]
pub(super) struct Widths {
    direct: Option<(Straight, WidthProbe)>,
    relay: Option<(Framed, WidthProbe)>,
}

impl Widths {
    /// Data goes straight to an address from now on.
    pub(super) fn direct(&mut self, to: Straight, now: Instant) {
        if self.direct.as_ref().is_none_or(|(known, _)| *known != to) {
            self.direct = Some((to, WidthProbe::new(rand::random(), now)));
        }
    }

    /// Nothing goes straight any more.
    pub(super) fn no_direct(&mut self) {
        self.direct = None;
    }

    /// Data goes through a relay, now or when nothing else is left. True when it is another than before.
    pub(super) fn relay(&mut self, to: Framed, now: Instant) -> bool {
        let new = self.relay.as_ref().is_none_or(|(known, _)| *known != to);
        if new {
            self.relay = Some((to, WidthProbe::new(rand::random(), now)));
        }
        new
    }

    pub(super) fn next_wake(&self) -> Option<Instant> {
        let direct = self.direct.as_ref().and_then(|(_, probe)| probe.poll_timeout());
        let relay = self.relay.as_ref().and_then(|(_, probe)| probe.poll_timeout());
        direct.into_iter().chain(relay).min()
    }

    /// Sends the probes that are due.
    fn drive(&mut self, socket: &PathSocket, now: Instant) {
        if let Some((to, probe)) = &mut self.direct
            && let Some(nonce) = probe.poll(now)
        {
            socket.probe_straight(*to, nonce);
        }
        if let Some((to, probe)) = &mut self.relay
            && let Some(nonce) = probe.poll(now)
        {
            socket.probe_framed(to, nonce);
        }
    }
}

impl RemoteState {
    pub(super) fn probe_widths(&mut self, socket: &PathSocket, now: Instant) {
        self.widths.drive(socket, now);
    }
}

impl Driver {
    /// A probe was answered, or is to be.
    pub(super) fn handle_width(&mut self, key: Key, width: Width) {
        let Some(state) = self.remotes.get_mut(&key) else { return };
        let nonce = match width {
            Width::Answered(nonce) => nonce,
            Width::Asked(nonce) => {
                if let Some((relay, _)) = &state.widths.relay {
                    self.socket.answer_framed(relay, nonce);
                }
                return;
            }
        };
        let answers = |probe: Option<&mut WidthProbe>| probe.is_some_and(|probe| probe.handle_answer(nonce));
        if answers(state.widths.direct.as_mut().map(|(_, probe)| probe)) {
            state.remote.set_wide(true, true);
        } else if answers(state.widths.relay.as_mut().map(|(_, probe)| probe)) {
            state.remote.set_wide(false, true);
        } else {
            return;
        }
        tracing::debug!(peer = %state.peer.short(), "a path carries datagrams of full size");
    }
}
