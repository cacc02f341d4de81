//! Why a session is direct, or why it is not: what was tried, and in words what follows from it. Pure.

use std::fmt;
use std::net::IpAddr;

use peer_agent::{PairReport, PairState, Rung, RungReport};
use rendezvous_wire::candidate::Mapping;
use rendezvous_wire::{Candidate, CandidateKind};

use crate::session::RelayTransport;

/// Everything that is known about the paths of a session.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Explanation {
    /// How this side's NAT maps, as measured at the rendezvous server.
    pub local: Mapping,
    /// How the other side's maps, as that side measured it.
    pub remote: Mapping,
    /// Every pair of a socket of ours and an address of theirs, best first.
    pub pairs: Vec<PairReport>,
    /// What was done beyond plain checks of these pairs.
    pub rungs: Vec<RungReport>,
    /// Which rung has led to the path in use.
    pub rung: Option<Rung>,
    /// Whether a whole round of checks has ended with nothing proven since a direct path was last in use.
    pub exhausted: bool,
    /// What this side offers.
    pub candidates: Vec<Candidate>,
    /// How the relay is reached from here, where it is known.
    pub over: Option<RelayTransport>,
    /// Whether the rendezvous server has never seen the other side over UDP.
    pub remote_unseen: bool,
    /// A router on this side's way to the relay that is a carrier's (RFC 6598), where one was heard of. Asked for only where the NAT on
    /// this side is in the way.
    pub carrier: Option<IpAddr>,
}

/// What an [`Explanation`] comes down to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Verdict {
    /// A direct path is in use.
    Direct,
    /// It is too early to say.
    Trying,
    /// Both NATs take a new port for every destination.
    BothPortDependent,
    /// Our NAT takes a new port for every destination, and the other side lets in none of them.
    LocalPortDependent,
    /// The other side's NAT takes a new port for every destination, and ours lets in none of them.
    RemotePortDependent,
    /// Our network lets no UDP through: the relay is reached over TCP.
    LocalUdpBlocked,
    /// The other side's network lets no UDP through.
    RemoteUdpBlocked,
    /// Both are behind one NAT that does not hairpin (RFC 4787, section 6), and do not reach each other inside it.
    NoHairpinning,
    /// The other side's checks arrive, and ours are not answered.
    OneWay,
    /// The two have no address family in common, or the other side has offered no address.
    NothingToTry,
    /// Nothing that was sent was answered, though neither NAT explains it.
    NoAnswer,
}

impl Explanation {
    /// What it comes down to.
    pub fn verdict(&self) -> Verdict {
        if self.pairs.iter().any(|pair| pair.selected) {
            return Verdict::Direct;
        }
        if self.over.is_some_and(|over| over != RelayTransport::Udp) {
            return Verdict::LocalUdpBlocked;
        }
        if !self.have_family_in_common() {
            return Verdict::NothingToTry;
        }
        if !self.exhausted {
            return Verdict::Trying;
        }
        let heard = self.pairs.iter().any(|pair| pair.checks_received > 0);
        if self.remote_unseen && !heard {
            return Verdict::RemoteUdpBlocked;
        }
        match (self.local.is_port_dependent(), self.remote.is_port_dependent()) {
            (true, true) => Verdict::BothPortDependent,
            (true, false) => Verdict::LocalPortDependent,
            (false, true) => Verdict::RemotePortDependent,
            _ if heard => Verdict::OneWay,
            _ if self.shares_nat() => Verdict::NoHairpinning,
            _ => Verdict::NoAnswer,
        }
    }

    /// Whether the other side's mapping is at an address at which there is a mapping of ours.
    fn shares_nat(&self) -> bool {
        let reflexive = |kind| kind == CandidateKind::ServerReflexive;
        let ours = self.candidates.iter().filter(|candidate| reflexive(candidate.kind));
        let ours: Vec<IpAddr> = ours.map(|candidate| candidate.address.ip()).collect();
        let theirs = self.pairs.iter().filter(|pair| reflexive(pair.remote_kind));
        theirs.into_iter().any(|pair| ours.contains(&pair.path.remote.ip()))
    }

    /// Whether the other side has named an address of a family of which this side has one. Sockets are there for both.
    fn have_family_in_common(&self) -> bool {
        let [ipv4, ipv6] = self.families();
        let unknown = self.candidates.is_empty();
        self.pairs.iter().any(|pair| unknown || if pair.path.remote.is_ipv4() { ipv4 } else { ipv6 })
    }

    /// Whether addresses of IPv4, and of IPv6, are offered.
    fn families(&self) -> [bool; 2] {
        [true, false].map(|ipv4| self.candidates.iter().any(|candidate| candidate.address.is_ipv4() == ipv4))
    }

    /// Whether the NAT on this side is in the way by its mapping.
    fn blames_local(&self) -> bool {
        matches!(self.verdict(), Verdict::BothPortDependent | Verdict::LocalPortDependent)
    }

    /// Whether it matters if the NAT on this side is a carrier's.
    pub(crate) fn asks_for_carrier(&self) -> bool {
        self.blames_local() || self.verdict() == Verdict::NoHairpinning
    }

    /// What either user could change, each line enough by itself; empty where nothing need be.
    pub fn advice(&self) -> Vec<String> {
        let Some(advice) = self.verdict().advice() else { return Vec::new() };
        let mut lines = vec![advice.to_owned()];
        if self.blames_local() {
            lines.push(match self.carrier {
                Some(carrier) => format!(
                    "here: an IPv4 address of your own from the carrier, whose NAT is on the way ({carrier}); another router at home may \
                     not help"
                ),
                None => "here: endpoint-independent mapping at the router (\"full cone\" or \"open NAT\" in some menus), or a UDP port \
                         forwarded to this machine"
                    .to_owned(),
            });
        }
        if self.verdict() == Verdict::NoHairpinning {
            lines.push(match self.carrier {
                Some(carrier) => {
                    format!("an IPv4 address of its own from the carrier for either side; both are behind its NAT ({carrier})")
                }
                None => "hairpinning (\"NAT loopback\" in some menus) at the router that both share".to_owned(),
            });
            lines.push(
                "where both are on one LAN: leave for its devices to talk to each other (no \"client isolation\", not the guest network)"
                    .to_owned(),
            );
        }
        if matches!(self.verdict(), Verdict::BothPortDependent | Verdict::RemotePortDependent) {
            lines.push("there: endpoint-independent mapping or an address of its own; `peer doctor` on that side tells what its network needs".to_owned());
        }
        lines
    }
}

impl Verdict {
    /// A short name for programs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Trying => "trying",
            Self::BothPortDependent => "both-port-dependent",
            Self::LocalPortDependent => "local-port-dependent",
            Self::RemotePortDependent => "remote-port-dependent",
            Self::LocalUdpBlocked => "local-udp-blocked",
            Self::RemoteUdpBlocked => "remote-udp-blocked",
            Self::NoHairpinning => "no-hairpinning",
            Self::OneWay => "one-way",
            Self::NothingToTry => "nothing-to-try",
            Self::NoAnswer => "no-answer",
        }
    }

    /// What either user could change; `None` where nothing need be.
    pub const fn advice(self) -> Option<&'static str> {
        match self {
            Self::Direct | Self::Trying => None,
            Self::BothPortDependent
            | Self::LocalPortDependent
            | Self::RemotePortDependent
            | Self::NoHairpinning => Some("IPv6 on both sides"),
            Self::OneWay | Self::NoAnswer => Some(
                "a firewall on the way, perhaps on one of the two machines, that lets UDP out and its answers in",
            ),
            Self::LocalUdpBlocked => Some(
                "here: a network that lets UDP out and its answers in, to any port if possible; `peer doctor` tells more",
            ),
            Self::RemoteUdpBlocked => Some(
                "there: a network that lets UDP out and its answers in; `peer doctor` on that side tells what it does",
            ),
            Self::NothingToTry => Some("an IPv4 or IPv6 address that both sides have"),
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Direct => "the session runs on a direct path",
            Self::Trying => "relayed so far; direct paths are still being tried",
            Self::BothPortDependent => {
                "relayed: both networks take a new port for every destination, and nobody can foretell which"
            }
            Self::LocalPortDependent => {
                "relayed: this network takes a new port for every destination, and the other lets in only ports that it has \
                 sent to"
            }
            Self::RemotePortDependent => {
                "relayed: the other network takes a new port for every destination, and this one lets in only ports that it \
                 has sent to"
            }
            Self::LocalUdpBlocked => {
                "relayed over TCP: this network lets no UDP through, and without UDP there is no direct path"
            }
            Self::RemoteUdpBlocked => {
                "relayed: the other network lets no UDP through, and without UDP there is no direct path"
            }
            Self::NoHairpinning => {
                "relayed: both are behind one NAT that lets nobody inside reach its outside, and do not reach each other inside it"
            }
            Self::OneWay => "relayed: the other side's packets arrive here, but nothing that is sent from here is answered",
            Self::NothingToTry => "relayed: the two sides have no kind of address in common",
            Self::NoAnswer => {
                "relayed: nothing that was sent to the other side's addresses was answered, though neither NAT is in the way"
            }
        })
    }
}

fn families(offered: [bool; 2]) -> &'static str {
    match offered {
        [true, true] => "IPv4 and IPv6",
        [true, false] => "IPv4 only",
        [false, true] => "IPv6 only",
        [false, false] => "no address at all",
    }
}

/// One pair in words.
pub(crate) fn describe(pair: &PairReport) -> String {
    let outcome = match (pair.state, pair.error) {
        (PairState::Succeeded, _) => "works".to_owned(),
        (PairState::Failed, Some(error)) => error.to_string(),
        (PairState::Failed, None) => "no answer".to_owned(),
        (PairState::Superseded, _) => "given up for a better one".to_owned(),
        _ => "not yet known".to_owned(),
    };
    let rtt = pair.rtt.map(|rtt| format!(", RTT {:.1} ms", rtt.as_secs_f64() * 1e3)).unwrap_or_default();
    let used = if pair.selected { ", in use" } else { "" };
    format!(
        "{} ({}): {outcome}{rtt}{used}; {} checks sent, {} answered, {} received",
        pair.path.remote, pair.remote_kind, pair.checks_sent, pair.checks_answered, pair.checks_received
    )
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = self.verdict();
        writeln!(f, "{verdict}")?;
        for advice in self.advice() {
            writeln!(f, "  what would help: {advice}")?;
        }
        if verdict == Verdict::NothingToTry {
            writeln!(f, "  this side offers: {}", families(self.families()))?;
        }
        writeln!(f, "  this side:  {}", self.local)?;
        writeln!(f, "  other side: {}", self.remote)?;
        write!(f, "  tried:")?;
        for pair in &self.pairs {
            write!(f, "\n    {}", describe(pair))?;
        }
        for rung in &self.rungs {
            write!(f, "\n    {rung}")?;
        }
        if let Some(rung) = self.rung {
            write!(f, "\n  found by:   {rung}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Mapping::{EndpointIndependent as Eim, Unknown};
    use peer_agent::{Path, SocketId};
    const APDM: Mapping =
        Mapping::AddressAndPortDependent(rendezvous_wire::candidate::PortAllocation::Random);

    fn pair(selected: bool, checks_received: u64) -> PairReport {
        PairReport {
            path: Path { socket: SocketId(0), remote: "192.0.2.1:9".parse().unwrap() },
            remote_kind: CandidateKind::ServerReflexive,
            priority: 1,
            state: if selected { PairState::Succeeded } else { PairState::Failed },
            selected,
            checks_sent: 7,
            checks_answered: u64::from(selected),
            checks_received,
            rtt: None,
            mapped: None,
            error: None,
        }
    }

    const OURS: &str = "198.51.100.1:7";

    /// A pair with a mapping at the address of ours.
    fn same_nat(checks_received: u64) -> PairReport {
        let path = Path { socket: SocketId(0), remote: "198.51.100.1:9".parse().unwrap() };
        PairReport { path, ..pair(false, checks_received) }
    }

    #[test]
    fn every_situation_has_its_verdict() {
        for (local, remote, pairs, exhausted, expected) in [
            (APDM, APDM, vec![pair(true, 1)], false, Verdict::Direct),
            (Eim, Eim, vec![pair(false, 0)], false, Verdict::Trying),
            (Eim, Eim, vec![], true, Verdict::NothingToTry),
            (APDM, APDM, vec![pair(false, 0)], true, Verdict::BothPortDependent),
            (APDM, Eim, vec![pair(false, 0)], true, Verdict::LocalPortDependent),
            (APDM, Unknown, vec![pair(false, 0)], true, Verdict::LocalPortDependent),
            (Eim, APDM, vec![pair(false, 0)], true, Verdict::RemotePortDependent),
            (Eim, Eim, vec![pair(false, 3)], true, Verdict::OneWay),
            (Eim, Unknown, vec![pair(false, 0)], true, Verdict::NoAnswer),
            (Eim, Eim, vec![pair(false, 0), same_nat(0)], true, Verdict::NoHairpinning),
            (Eim, Eim, vec![pair(false, 0), same_nat(3)], true, Verdict::OneWay),
            (APDM, APDM, vec![same_nat(0)], true, Verdict::BothPortDependent),
        ] {
            let candidates = vec![Candidate::new(CandidateKind::ServerReflexive, OURS.parse().unwrap(), 1)];
            let explanation =
                Explanation { local, remote, pairs, exhausted, candidates, ..Explanation::default() };
            assert_eq!(explanation.verdict(), expected, "{explanation}");
            let nothing_to_do = matches!(expected, Verdict::Direct | Verdict::Trying);
            assert_eq!(explanation.advice().is_empty(), nothing_to_do, "{explanation}");
            let sides = ["help: here:", "help: there:"].map(|side| explanation.to_string().contains(side));
            let blamed = match expected {
                Verdict::BothPortDependent => [true, true],
                Verdict::LocalPortDependent => [true, false],
                Verdict::RemotePortDependent => [false, true],
                _ => [false, false],
            };
            assert_eq!(sides, blamed, "{explanation}");
            let relayed = expected.to_string().starts_with("relayed");
            assert_eq!(relayed, expected != Verdict::Direct);
        }
    }

    #[test]
    fn a_network_without_udp_is_named_on_either_side() {
        let explanation = |over, remote_unseen, exhausted| Explanation {
            pairs: vec![pair(false, 0)],
            over: Some(over),
            remote_unseen,
            exhausted,
            ..Explanation::default()
        };
        for (over, unseen, exhausted, expected) in [
            (RelayTransport::Tcp, false, false, Verdict::LocalUdpBlocked),
            (RelayTransport::Proxy, true, true, Verdict::LocalUdpBlocked),
            (RelayTransport::Udp, true, true, Verdict::RemoteUdpBlocked),
            (RelayTransport::Udp, true, false, Verdict::Trying),
            (RelayTransport::Udp, false, true, Verdict::NoAnswer),
        ] {
            let explanation = explanation(over, unseen, exhausted);
            assert_eq!(explanation.verdict(), expected, "{explanation}");
            let helped = explanation.to_string().contains("help: ");
            assert_eq!(helped, expected != Verdict::Trying, "{explanation}");
        }
    }

    #[test]
    fn a_carrier_is_named_where_its_nat_is_in_the_way() {
        let pairs = vec![pair(false, 0)];
        let carrier = Some("100.64.0.1".parse().unwrap());
        let mut explanation = Explanation {
            local: APDM,
            remote: APDM,
            pairs,
            exhausted: true,
            carrier,
            ..Explanation::default()
        };
        assert!(explanation.to_string().contains("100.64.0.1"));
        explanation.candidates =
            vec![Candidate::new(CandidateKind::ServerReflexive, OURS.parse().unwrap(), 1)];
        (explanation.local, explanation.remote) = (Eim, Eim);
        explanation.pairs = vec![same_nat(0)];
        assert!(explanation.to_string().contains("100.64.0.1"), "{explanation}");
        explanation.pairs = vec![pair(false, 0)];
        explanation.local = Eim;
        assert!(!explanation.to_string().contains("100.64.0.1"), "{explanation}");
    }

    #[test]
    fn families_that_do_not_meet_are_named() {
        let candidates = vec![Candidate::new(CandidateKind::Host, "[2001:db8::1]:7".parse().unwrap(), 1)];
        let explanation = Explanation { candidates, exhausted: true, ..Explanation::default() };
        assert!(explanation.to_string().contains("this side offers: IPv6 only"), "{explanation}");
        let explanation = Explanation { pairs: vec![pair(false, 0)], ..explanation };
        assert_eq!(explanation.verdict(), Verdict::NothingToTry, "an IPv4 address is of no use here");
    }
}
