//! Which of two proven paths is better: a pure function and its constants.

use std::net::SocketAddr;
use std::time::Duration;

use rendezvous_wire::CandidateKind;

/// A path must be faster by more than this, and by [`CLEARLY_FASTER_PERCENT`], to replace another on speed alone:
/// less is noise of one measurement.
pub const CLEARLY_FASTER: Duration = Duration::from_millis(10);

/// See [`CLEARLY_FASTER`].
pub const CLEARLY_FASTER_PERCENT: u32 = 20;

/// A path of a better kind replaces another unless it is slower by more than this. Half of [`CLEARLY_FASTER`], so
/// that no two paths can replace each other in turn.
pub const KIND_MAY_COST: Duration = Duration::from_millis(5);

/// What the choice of a path goes by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measured {
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// The kind of the remote candidate.
    pub remote_kind: CandidateKind,
    /// The remote address.
    pub remote: SocketAddr,
}

impl Measured {
    /// Orders what speed does not: a host candidate (the same network, or no NAT at all) before any mapping (perhaps
    /// a hairpin through the router); then IPv6 before IPv4 (RFC 8421, section 4: no NAT whose binding could go).
    fn kind_rank(&self) -> (u8, bool) {
        let class = match self.remote_kind {
            CandidateKind::Host => 2,
            CandidateKind::PeerReflexive | CandidateKind::ServerReflexive | CandidateKind::PortMapped => 1,
            CandidateKind::Predicted => 0,
        };
        (class, self.remote.is_ipv6())
    }
}

/// Whether data should move from the `incumbent` to the `challenger`. Never true both ways round.
pub fn better(challenger: &Measured, incumbent: &Measured) -> bool {
    if clearly_faster(challenger.rtt, incumbent.rtt) {
        return true;
    }
    challenger.rtt <= incumbent.rtt + KIND_MAY_COST && challenger.kind_rank() > incumbent.kind_rank()
}

/// Whether a pair that is not proven yet could still turn out better.
pub(crate) fn could_beat(remote_kind: CandidateKind, remote: SocketAddr, incumbent: &Measured) -> bool {
    better(&Measured { rtt: Duration::ZERO, remote_kind, remote }, incumbent)
}

fn clearly_faster(challenger: Duration, incumbent: Duration) -> bool {
    incumbent.saturating_sub(challenger) > CLEARLY_FASTER
        && challenger * 100 < incumbent * (100 - CLEARLY_FASTER_PERCENT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use CandidateKind::{Host, PeerReflexive, PortMapped, Predicted, ServerReflexive};

    fn measured(rtt_ms: u64, remote_kind: CandidateKind, remote: &str) -> Measured {
        Measured { rtt: Duration::from_millis(rtt_ms), remote_kind, remote: remote.parse().unwrap() }
    }

    #[test]
    fn what_is_better_than_what() {
        const V4: &str = "192.0.2.1:9";
        const V6: &str = "[2001:db8::1]:9";
        // (challenger, incumbent, whether it wins)
        let table = [
            ((10, ServerReflexive, V4), (40, ServerReflexive, V4), true, "much faster"),
            ((35, ServerReflexive, V4), (40, ServerReflexive, V4), false, "5 ms is noise"),
            ((89, ServerReflexive, V4), (100, ServerReflexive, V4), false, "11 ms, but 11 % only"),
            ((79, ServerReflexive, V4), (100, ServerReflexive, V4), true, "21 ms and 21 %"),
            ((1, ServerReflexive, V4), (10, ServerReflexive, V4), false, "90 %, but 9 ms only"),
            ((1, Host, V4), (1, ServerReflexive, V4), true, "the same network beats the hairpin"),
            ((2, Host, V4), (1, ServerReflexive, V4), true, "and may be a little slower"),
            ((7, Host, V4), (1, ServerReflexive, V4), false, "but not much"),
            ((1, ServerReflexive, V4), (2, Host, V4), false, "and is not left for a hairpin"),
            ((20, Host, V6), (20, Host, V4), true, "IPv6 wins a tie"),
            ((20, Host, V4), (20, Host, V6), false, "IPv4 does not"),
            ((20, ServerReflexive, V4), (45, Host, V6), true, "IPv6 does not win at any price"),
            ((20, PeerReflexive, V4), (20, ServerReflexive, V4), false, "mappings are alike"),
            ((20, ServerReflexive, V4), (20, PortMapped, V4), false, "mappings are alike"),
            ((20, PortMapped, V4), (20, Predicted, V4), true, "a known mapping beats a guess"),
        ];
        for (challenger, incumbent, wins, why) in table {
            let challenger = measured(challenger.0, challenger.1, challenger.2);
            let incumbent = measured(incumbent.0, incumbent.1, incumbent.2);
            assert_eq!(better(&challenger, &incumbent), wins, "{why}: {challenger:?} for {incumbent:?}");
        }
    }

    #[test]
    fn no_two_paths_replace_each_other_in_turn() {
        let mut all = Vec::new();
        for rtt in (0..120).step_by(3) {
            for kind in [Host, PeerReflexive, ServerReflexive, PortMapped, Predicted] {
                all.push(measured(rtt, kind, "192.0.2.1:9"));
                all.push(measured(rtt, kind, "[2001:db8::1]:9"));
            }
        }
        for a in &all {
            for b in &all {
                assert!(!(better(a, b) && better(b, a)), "{a:?} and {b:?}");
            }
        }
    }
}
