//! What an agent does with datagrams: checks of the other side, and answers to its own.

use std::net::SocketAddr;
use std::time::Instant;

use rendezvous_wire::candidate::is_probeable;
use rendezvous_wire::message::Role;
use rendezvous_wire::stun::{self, Class, Received, StunError, TransactionId, error_code};

use crate::agent::Agent;
use crate::event::Event;
use crate::path::{Path, SocketId, canonical};
use crate::report::{CheckError, PairState};
use crate::transaction::Transaction;

impl Agent {
    /// As [`handle_datagram`](Self::handle_datagram), for a message that was parsed to find the agent.
    pub fn handle_message(
        &mut self,
        socket: SocketId,
        source: SocketAddr,
        message: &Received<'_>,
        now: Instant,
    ) -> bool {
        let path = Path { socket, remote: canonical(source) };
        if self.checklist.family(socket) != Some(path.remote.into()) || !is_probeable(path.remote) {
            return false;
        }
        let mine = match message.class() {
            Class::Request => self.handle_request(path, message, now),
            Class::Success | Class::Error => self.handle_response(path, message, now),
            Class::Indication => false,
        };
        if mine {
            self.drive(now);
        }
        mine
    }

    /// RFC 8445, 7.3. What is not authentic gets no answer, not even an error: whoever holds the password makes no
    /// such mistakes, and nobody else needs to know that we are here.
    fn handle_request(&mut self, path: Path, message: &Received<'_>, now: Instant) -> bool {
        if message.username() != Some(self.username.as_str()) || !message.verify(&self.local_key) {
            return false;
        }
        let transaction = message.transaction();
        let unknown = message.unknown_required();
        if !unknown.is_empty() {
            self.refuse(path, transaction, error_code::UNKNOWN_ATTRIBUTE, &unknown);
            return true;
        }
        let (Some(priority), Some((role, tie_breaker))) = (message.priority(), message.role()) else {
            self.refuse(path, transaction, error_code::BAD_REQUEST, &[]);
            return true;
        };
        if role == self.role && !self.yields(tie_breaker, now) {
            self.refuse(path, transaction, error_code::ROLE_CONFLICT, &[]);
            return true;
        }
        // Without room for the pair there is no answer: it would prove a path whose traffic we should not know again.
        let Some(index) = self.checklist.learn(path, priority, self.choice.path(), now) else { return true };
        let answer = stun::binding_success(transaction, path.remote, Some(&self.local_key));
        self.answer(path, answer);
        self.note_request(index, path, now);
        if message.use_candidate() {
            self.on_nomination(path, transaction, now);
        }
        true
    }

    /// RFC 8445, 7.3.1.1: both sides claim our role. Whether we are the one to change; the other side is told to
    /// otherwise.
    fn yields(&mut self, tie_breaker: u64, now: Instant) -> bool {
        let yields = match self.role {
            Role::Controlling => self.tie_breaker < tie_breaker,
            Role::Controlled => self.tie_breaker >= tie_breaker,
        };
        if yields {
            self.switch_role(self.role.opposite(), now);
        }
        yields
    }

    /// A check has come on this pair: it triggers one of ours (RFC 8445, 7.3.1.4) unless the pair is proven.
    fn note_request(&mut self, index: usize, path: Path, now: Instant) {
        let worth = self.is_worth_a_check(index);
        let in_use = self.choice.path() == Some(path);
        let volley = self.new_volley(true, now);
        let pair = &mut self.checklist.pairs[index];
        pair.requests += 1;
        let news = !std::mem::replace(&mut pair.source_known, true);
        if !in_use && pair.proven.is_some_and(|proven| now > proven + self.timers.volley()) {
            // An old proof says little, and the other side has a reason to ask.
            pair.proven = None;
            pair.state = PairState::Waiting;
        }
        if pair.proven.is_none() && worth {
            match &mut pair.volley {
                Some(volley) => volley.trigger(&self.timers, now),
                None => {
                    pair.state = PairState::Waiting;
                    pair.volley = Some(volley);
                }
            }
        } else if pair.state == PairState::Waiting && pair.volley.is_none() {
            pair.state = PairState::Superseded;
        }
        // A peer-reflexive candidate makes a pair with each socket of its family.
        self.start_new_pairs(now);
        if news {
            self.emit(Event::SourceKnown(path));
        }
    }

    fn handle_response(&mut self, path: Path, message: &Received<'_>, now: Instant) -> bool {
        let id = message.transaction();
        let Some(transaction) = self.transactions.get(id) else { return false };
        if now >= transaction.expires || !message.verify(&self.remote_key) {
            return false;
        }
        self.transactions.remove(id);
        let Some(index) = self.checklist.position(transaction.path) else { return true };
        match (message.class(), message.error_code(), message.mapped_address()) {
            _ if path != transaction.path => self.refused(index, CheckError::NotSymmetric),
            (Class::Success, _, Some(mapped)) => self.succeed(index, &transaction, canonical(mapped), now),
            (Class::Error, Some(error_code::ROLE_CONFLICT), _) => self.conflict(index, &transaction, now),
            (_, code, _) => self.refused(index, CheckError::Refused(code.unwrap_or(error_code::BAD_REQUEST))),
        }
        true
    }

    /// RFC 8445, 7.2.5.3: the path works both ways.
    fn succeed(&mut self, index: usize, transaction: &Transaction, mapped: SocketAddr, now: Instant) {
        let rtt = now.saturating_duration_since(transaction.sent);
        let pair = &mut self.checklist.pairs[index];
        let newly = pair.proven.is_none();
        pair.answered += 1;
        pair.note_rtt(rtt);
        pair.proven = Some(now);
        pair.state = PairState::Succeeded;
        pair.error = None;
        let (path, remote_kind) = (pair.path, pair.kind);
        let moved = pair.mapped.replace(mapped) != Some(mapped);
        if moved && !self.checklist.is_local(mapped) {
            self.emit(Event::Mapped { path, mapped });
        }
        if newly {
            tracing::debug!(%path, ?rtt, kind = %remote_kind, "proven");
            self.emit(Event::Proven { path, rtt, remote_kind });
        }
        self.on_answer(transaction, newly, now);
    }

    /// RFC 8445, 7.2.5.1: the other side keeps the role that our check claimed.
    fn conflict(&mut self, index: usize, transaction: &Transaction, now: Instant) {
        if self.role == transaction.role {
            self.switch_role(self.role.opposite(), now);
        }
        let volley = self.new_volley(true, now);
        let pair = &mut self.checklist.pairs[index];
        if pair.proven.is_none() {
            match &mut pair.volley {
                Some(volley) => volley.trigger(&self.timers, now),
                None => pair.volley = Some(volley),
            }
        }
    }

    /// A check that was answered, but not as it should have been. What is proven stays so: consent has its own end.
    fn refused(&mut self, index: usize, error: CheckError) {
        if self.checklist.pairs[index].proven.is_none() {
            self.fail(index, error);
        }
    }

    fn refuse(&mut self, path: Path, transaction: TransactionId, code: u16, unknown: &[u16]) {
        self.answer(path, stun::binding_error(transaction, code, unknown, Some(&self.local_key)));
    }

    fn answer(&mut self, path: Path, datagram: Result<Vec<u8>, StunError>) {
        // Nothing that we answer with is too long to be encoded.
        if let Ok(datagram) = datagram {
            self.transmit(path, datagram);
        }
    }
}
