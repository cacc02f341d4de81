//! Whether two peers can have a direct path, from where they are alone: RFC 4787's definitions, and no line of the agent's.

use std::time::Duration;

use netsim::{Egress, Filtering, Ipv6, Mapping, PortAllocation, Router};

use super::scenario::{Peer, Scenario, Site};

/// What is to be expected of two peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Verdict {
    /// A direct path, by plain or primed checks.
    Plain,
    /// A direct path, once the ports of one side or both are foretold.
    Predicted,
    /// A direct path if a probe meets a mapping.
    Chance,
    /// No direct path.
    Never,
    /// No session: one side's network blocks UDP.
    NoSession,
}

impl Verdict {
    /// Every verdict.
    pub const ALL: [Self; 5] = [Self::Plain, Self::Predicted, Self::Chance, Self::Never, Self::NoSession];

    /// A short name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Predicted => "predicted",
            Self::Chance => "by chance",
            Self::Never => "never",
            Self::NoSession => "no session",
        }
    }
}

/// How long after the introduction a path has to stand, where one is sure to come. The rests between meetings double, so when one side has heard of it so much later
/// than the other, that one may be resting for as long again.
///
/// `None`: it is not sure to come. A NAT that forgets in less than the 15 s of RFC 8445, section 11, leaves a peer that waits deaf in between: it hears of the introduction
/// many seconds late, and a router that accepts what comes meanwhile keeps the ports that the checks need. (A peer that has measured this keeps its bindings, but that
/// takes it half a minute, and is not simulated.)
pub fn bound(scenario: &Scenario, peers: (usize, usize), apart: Duration) -> Option<Duration> {
    let forgetful = |index: usize| {
        let routers = &scenario.sites[scenario.peers[index].site].routers;
        routers.iter().filter_map(|router| router.binding_lifetime).any(|lifetime| lifetime <= KEEP_ALIVE)
    };
    let never_deaf = !forgetful(peers.0) && !forgetful(peers.1);
    never_deaf.then_some(Duration::from_secs(5) + apart * 2)
}

/// Between two keep-alives (RFC 8445, section 11).
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// The sockets of the hard side and the probes of the easy side of one birthday attempt, as the design has them.
const BIRTHDAY: (f64, i32) = (512.0, 740);

/// What birthday probing can do for two peers which begin together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Chance {
    /// The probability that the first attempt succeeds, least and most.
    pub first: (f64, f64),
    /// Attempts that find as good conditions as the first.
    pub attempts: i32,
}

impl Chance {
    /// The most likely that no attempt succeeds. A random port that happens to be the socket's own is taken for one that was preserved, and then nobody probes: three
    /// ports are seen.
    pub fn never(&self) -> f64 {
        (1.0 - self.first.0).powi(self.attempts) + 3.0 / 64_512.0
    }
}

/// What birthday probing can do for two peers which begin together.
///
/// One of N probes meets one of M mappings with 1 - (1 - M/64512)^N. The first of them leave while the last sockets are not yet open and the two sides
/// begin up to 300 ms and half a round trip apart, so there is a range. What the routers accept for themselves makes no difference: nothing of the hard side's comes as
/// far as the easy side's before the probes are through, and but for those first ones the probes find all mappings made.
///
/// Small tables are still full of the first attempt's flows when the second begins 40 s later, if they are remembered for longer than that.
pub fn birthday(scenario: &Scenario, peers: (usize, usize)) -> Chance {
    let mut routers =
        [peers.0, peers.1].into_iter().flat_map(|index| &scenario.sites[scenario.peers[index].site].routers);
    let (sockets, probes) = BIRTHDAY;
    let chance = |probes: i32| 1.0 - (1.0 - sockets / 64_512.0).powi(probes);
    let full = routers.any(|router| {
        let remembers = router.binding_lifetime.is_some_and(|lifetime| lifetime > Duration::from_secs(40));
        router.most_flows.is_some() && remembers
    });
    // Of the probes' 3 s: half a second in which the sockets open, half of it in vain, and 300 ms.
    let first = (chance(probes * 8 / 10), chance(probes));
    Chance { first, attempts: if full { 1 } else { 3 } }
}

/// What a chain of routers does to a host behind it.
#[derive(Debug, Clone, Copy)]
struct Behind {
    /// `None`: every destination sees the same port.
    allocation: Option<PortAllocation>,
    filtering: Filtering,
}

fn behind(routers: &[Router]) -> Behind {
    let strictness = |filtering: &Filtering| match filtering {
        Filtering::EndpointIndependent => 0,
        Filtering::AddressDependent => 1,
        _ => 2,
    };
    let dependent = |router: &&Router| router.mapping == Some(Mapping::AddressAndPortDependent);
    let filterings = routers.iter().filter_map(|router| router.filtering);
    Behind {
        allocation: routers.iter().find(dependent).map(|router| router.allocation),
        filtering: filterings.max_by_key(strictness).unwrap_or(Filtering::EndpointIndependent),
    }
}

/// Two peers of a scenario.
pub fn verdict(scenario: &Scenario, one: usize, other: usize) -> Verdict {
    let [one, other] = [one, other].map(|index| &scenario.peers[index]);
    let [here, there] = [one, other].map(|peer: &Peer| &scenario.sites[peer.site]);
    let blocked = |site: &Site| site.routers.iter().any(|router| router.egress == Egress::Web);
    if blocked(here) || blocked(there) {
        return Verdict::NoSession;
    }
    let same_lan = one.site == other.site;
    // Routed, and let in by a stateful firewall to which both sides have sent, if there is one.
    let ipv6 = [here, there].iter().all(|site| matches!(site.ipv6, Ipv6::Firewall | Ipv6::Open));
    if same_lan || ipv6 {
        return Verdict::Plain;
    }
    let carrier = |index: usize| scenario.sites[index].behind.unwrap_or(index);
    let same_carrier = carrier(one.site) == carrier(other.site);
    if same_carrier && !here.routers[1].hairpin {
        // Each knows the other at the carrier's outside only.
        return Verdict::Never;
    }
    over_the_internet(behind(&here.routers), behind(&there.routers))
}

fn over_the_internet(one: Behind, other: Behind) -> Verdict {
    let foretold = |allocation| allocation != PortAllocation::Random;
    match (one.allocation, other.allocation) {
        (None, None) => Verdict::Plain,
        (Some(hard), None) => hard_and_easy(hard, other),
        (None, Some(hard)) => hard_and_easy(hard, one),
        // Whatever is let in: what goes back comes from a port that the other side has not sent to.
        (Some(ours), Some(theirs)) if foretold(ours) && foretold(theirs) => Verdict::Predicted,
        (Some(_), Some(_)) => Verdict::Never,
    }
}

/// The hard side's mapping depends on the destination, the easy side's does not.
fn hard_and_easy(hard: PortAllocation, easy: Behind) -> Verdict {
    if easy.filtering != Filtering::AddressAndPortDependent {
        // The hard side's packet is let in from a port that nobody has heard of, and shows it.
        Verdict::Plain
    } else if hard == PortAllocation::Random {
        Verdict::Chance
    } else {
        Verdict::Predicted
    }
}

#[cfg(test)]
mod tests {
    use netsim::RouterKind;

    use super::*;

    fn peer(site: usize, host: usize) -> Peer {
        Peer { site, host, start: Duration::ZERO, skew: Duration::ZERO }
    }

    fn between(sites: Vec<Site>, peers: [Peer; 2]) -> Verdict {
        let scenario = Scenario { seed: 0, sites, peers: peers.to_vec(), dials: Vec::new() };
        let there = verdict(&scenario, 0, 1);
        assert_eq!(there, verdict(&scenario, 1, 0), "whoever dials");
        there
    }

    #[test]
    fn every_two_kinds() {
        use RouterKind as K;
        use Verdict as V;
        let table = [
            (K::Public, K::Apdm, V::Plain),
            (K::EimEif, K::CarrierApdm, V::Plain),
            (K::EimAdf, K::ApdmSequential, V::Plain),
            (K::EimApdf, K::EimApdf, V::Plain),
            (K::CarrierEim, K::Firewall, V::Plain),
            (K::EimApdf, K::Apdm, V::Chance),
            (K::Firewall, K::CarrierApdm, V::Chance),
            (K::EimApdf, K::ApdmSequential, V::Predicted),
            (K::ApdmPreserving, K::ApdmSequential, V::Predicted),
            (K::Apdm, K::Apdm, V::Never),
            (K::Apdm, K::ApdmPreserving, V::Never),
            (K::Public, K::UdpBlocked, V::NoSession),
        ];
        for (one, other, expected) in table {
            let site = |kind: K| Site::new(kind.routers());
            assert_eq!(
                between(vec![site(one), site(other)], [peer(0, 0), peer(1, 0)]),
                expected,
                "{one} {other}"
            );
            let v6 = |kind: K| Site { ipv6: Ipv6::Open, ..site(kind) };
            let over_ipv4 = expected;
            let expected = if expected == V::NoSession { expected } else { V::Plain };
            assert_eq!(
                between(vec![v6(one), v6(other)], [peer(0, 0), peer(1, 0)]),
                expected,
                "{one} {other}, IPv6"
            );
            let broken = Site { ipv6: Ipv6::Broken, ..site(one) };
            assert_eq!(
                between(vec![broken, v6(other)], [peer(0, 0), peer(1, 0)]),
                over_ipv4,
                "{one} {other}, IPv6 that goes nowhere"
            );
        }
    }

    #[test]
    fn one_lan_one_carrier() {
        let hard = Site { hosts: 2, ..Site::new(RouterKind::Apdm.routers()) };
        assert_eq!(between(vec![hard], [peer(0, 0), peer(0, 1)]), Verdict::Plain);
        for (kind, hairpin, expected) in [
            (RouterKind::CarrierEim, true, Verdict::Plain),
            (RouterKind::CarrierEim, false, Verdict::Never),
            (RouterKind::CarrierApdm, true, Verdict::Never),
        ] {
            let mut first = Site::new(kind.routers());
            first.routers[1].hairpin = hairpin;
            let second = Site { behind: Some(0), ..first.clone() };
            assert_eq!(between(vec![first, second], [peer(0, 0), peer(1, 0)]), expected, "{kind}");
        }
    }
}
