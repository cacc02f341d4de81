//! What happens in a run, in lines for people: every packet, and what the peers do.

use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;
use std::time::Instant;

use netsim::model::Network;

/// Whom to tell what happens.
pub type Trace = Box<dyn FnMut(&str)>;

/// Tells, or does not.
#[derive(Clone)]
pub(super) struct Log {
    origin: Instant,
    trace: Option<Rc<RefCell<Trace>>>,
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Log").field("tells", &self.trace.is_some()).finish_non_exhaustive()
    }
}

impl Log {
    pub(super) fn new(origin: Instant, trace: Option<Trace>) -> Self {
        Self { origin, trace: trace.map(|trace| Rc::new(RefCell::new(trace))) }
    }

    /// One line; `what` is not asked when nobody listens.
    pub(super) fn note<T: fmt::Display>(&self, now: Instant, who: &str, what: impl FnOnce() -> T) {
        if let Some(trace) = &self.trace {
            let at = now.saturating_duration_since(self.origin).as_secs_f64();
            trace.borrow_mut()(&format!("{at:10.6} {who:<28} {}", what()));
        }
    }

    /// Tells of every packet.
    pub(super) fn observe(&self, network: &mut Network) {
        if self.trace.is_none() {
            return;
        }
        let log = self.clone();
        network.observe(move |step| {
            log.note(step.at, step.place, || {
                let packet = step.packet;
                let (source, destination) = (packet.source, packet.destination);
                let what = describe(&packet.payload);
                format!("{:<16} {source} -> {destination} ttl {} {what}", step.what, packet.ttl)
            });
        });
    }
}

/// What a datagram is, in a few words.
fn describe(payload: &[u8]) -> String {
    use rendezvous_wire::demux::{Protocol, classify};
    use rendezvous_wire::stun::Received;
    match classify(payload) {
        Protocol::Stun => Received::parse(payload).map_or("STUN?".into(), |message| {
            let nominates = if message.use_candidate() { " USE-CANDIDATE" } else { "" };
            let user = message.username().unwrap_or_default();
            format!("STUN {:?} {:?}{nominates} {user}", message.class(), message.transaction())
        }),
        Protocol::Relay => "relay frame".into(),
        Protocol::Quic if payload[0] == 0x41 => "data".into(),
        Protocol::Quic => "signalling".into(),
        Protocol::Unknown => "?".into(),
    }
}
