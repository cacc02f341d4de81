//! What the owner knows, for whoever asks.

use std::collections::HashSet;
use std::time::Instant;

use rendezvous_wire::PeerId;

use super::{Line, Owner};
use crate::control::{PeerRow, SessionRow, Stats};

impl Owner {
    pub(super) fn peers(&self, now: Instant) -> Vec<PeerRow> {
        let mut rows = Vec::new();
        for (id, (_, mailbox)) in &self.mailboxes {
            let Some(registration) = self.broker.directory().get(*id) else { continue };
            rows.push(PeerRow {
                peer: registration.peer.to_string(),
                source: mailbox.observed(),
                over: if matches!(mailbox.line, Line::Quic(_)) { "udp" } else { "tcp" }.to_owned(),
                seconds: now.saturating_duration_since(mailbox.since).as_secs(),
                candidates: registration.candidates().len(),
                channels: self.broker.introductions().count(*id),
                relayed_this_month: self.broker.used_by(registration.peer),
            });
        }
        rows.sort_by(|one, other| (&one.peer, one.source).cmp(&(&other.peer, other.source)));
        rows
    }

    pub(super) fn sessions(&self) -> Vec<SessionRow> {
        let peer = |id| self.broker.peer_of(id).map(|peer| peer.to_string()).unwrap_or_default();
        let rows = self.broker.introductions().iter().map(|(_, asker, target, channel)| SessionRow {
            asker: peer(asker),
            target: peer(target),
            channel: channel.number(),
        });
        let mut rows: Vec<_> = rows.collect();
        rows.sort_by(|one, other| {
            (&one.asker, &one.target, one.channel).cmp(&(&other.asker, &other.target, other.channel))
        });
        rows
    }

    pub(super) fn stats(&self) -> Stats {
        let directory = self.broker.directory();
        let peers: HashSet<PeerId> = directory.iter().map(|(_, registration)| registration.peer).collect();
        Stats {
            registrations: directory.len(),
            peers: peers.len(),
            sessions: self.broker.introductions().len(),
            refused: self.refused,
            relay_share: self.accounts.arbiter.level(),
            leaving: self.leaving,
            ..Stats::default()
        }
    }
}
