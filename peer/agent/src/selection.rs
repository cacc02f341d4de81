//! Which of two proven paths is better.

use std::time::Duration;

use rendezvous_wire::candidate::CandidateKind;

/// What counts of a proven path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Merit {
    pub(crate) rtt: Duration,
    pub(crate) remote_kind: CandidateKind,
    pub(crate) ipv6: bool,
}

/// A path must be faster by this much, and by a fifth, to be worth leaving another: RTTs jitter, and each change of path costs the session
/// a moment.
const CLEARLY: Duration = Duration::from_millis(10);

/// Within this much two paths are equally fast.
const ABOUT: Duration = Duration::from_millis(5);

/// Whether to leave `present` for `other`.
pub(crate) fn is_better(other: Merit, present: Merit) -> bool {
    if other.rtt + CLEARLY < present.rtt && other.rtt.mul_f64(1.25) < present.rtt {
        return true;
    }
    // Equally fast: the LAN rather than a hairpin, IPv6 rather than a translated IPv4 (RFC 8421).
    other.rtt <= present.rtt + ABOUT && rank(other) > rank(present)
}

fn rank(merit: Merit) -> (bool, bool) {
    // Every IPv6 candidate is a host's own; what counts for IPv4 is whether a NAT is in between.
    (merit.remote_kind == CandidateKind::Host, merit.ipv6)
}

#[cfg(test)]
mod tests {
    use super::*;
    use CandidateKind::{Host, ServerReflexive};

    fn merit(rtt: u64, remote_kind: CandidateKind, ipv6: bool) -> Merit {
        Merit { rtt: Duration::from_millis(rtt), remote_kind, ipv6 }
    }

    #[test]
    fn a_path_is_left_only_for_a_clearly_better_one() {
        for (other, present, expected) in [
            // By RTT, with stickiness.
            (merit(20, ServerReflexive, false), merit(80, ServerReflexive, false), true),
            (merit(75, ServerReflexive, false), merit(80, ServerReflexive, false), false),
            (merit(95, ServerReflexive, false), merit(108, ServerReflexive, false), false),
            (merit(1, ServerReflexive, false), merit(9, ServerReflexive, false), false),
            (merit(80, ServerReflexive, false), merit(20, ServerReflexive, false), false),
            // Equal RTT: by kind, then by family.
            (merit(2, Host, false), merit(1, ServerReflexive, false), true),
            (merit(1, ServerReflexive, false), merit(2, Host, false), false),
            (merit(41, Host, true), merit(40, Host, false), true),
            (merit(40, Host, false), merit(41, Host, true), false),
            // A better kind does not make up for a slower path.
            (merit(60, Host, true), merit(40, ServerReflexive, false), false),
        ] {
            assert_eq!(is_better(other, present), expected, "{other:?} for {present:?}");
        }
    }

    #[test]
    fn two_paths_are_never_each_better_than_the_other() {
        let kinds = [Host, ServerReflexive, CandidateKind::PeerReflexive];
        let mut all = Vec::new();
        for rtt in [0, 1, 3, 5, 6, 10, 11, 14, 20, 40, 51, 80, 300] {
            for kind in kinds {
                all.extend([merit(rtt, kind, true), merit(rtt, kind, false)]);
            }
        }
        for a in &all {
            for b in &all {
                assert!(!(is_better(*a, *b) && is_better(*b, *a)), "{a:?} {b:?}");
            }
        }
    }
}
