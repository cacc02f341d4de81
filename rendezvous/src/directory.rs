//! Who is registered, at which addresses, and open to whom. Pure.

use std::collections::HashMap;
use std::net::SocketAddr;

use rendezvous_wire::candidate::{self, CandidateKind, Mapping};
use rendezvous_wire::message::{IntroductionPolicy, Register, RegistrationId};
use rendezvous_wire::{Candidate, PeerId};

use crate::limits::{Limits, Source};

/// The online registrations. Several may share a [`PeerId`]: a machine's listening process and a dialling one.
#[derive(Debug, Default)]
pub struct Directory {
    registrations: HashMap<RegistrationId, Registration>,
    /// Oldest first.
    by_peer: HashMap<PeerId, Vec<RegistrationId>>,
    by_source: HashMap<Source, usize>,
    by_prefix: HashMap<Source, usize>,
}

/// One registration as the directory holds it.
#[derive(Debug, Clone)]
pub struct Registration {
    /// Whose it is.
    pub peer: PeerId,
    /// Where its signalling connection came from when it was made: what its quotas are counted under.
    pub source: Source,
    /// The source of its signalling connection now.
    pub observed: SocketAddr,
    /// Whether that is a mapping of the UDP socket with which it checks paths: not that of a stream.
    pub is_reflexive: bool,
    /// Which of the processes that hold its key.
    pub instance: u64,
    mapping: Mapping,
    offered: Vec<Candidate>,
    policy: IntroductionPolicy,
}

impl Registration {
    /// The peer's mapping behaviour: what it says itself; and before it has learnt it, that there is no NAT where we see its own address.
    pub fn mapping(&self) -> Mapping {
        let own = |candidate: &Candidate| {
            candidate.kind == CandidateKind::Host && candidate.address == self.observed
        };
        match self.mapping {
            Mapping::Unknown if self.is_reflexive && self.offered.iter().any(own) => {
                Mapping::EndpointIndependent
            }
            mapping => mapping,
        }
    }

    /// What the other side of an introduction is told: the offered candidates, and the observed endpoint as a
    /// server-reflexive one unless the peer offers that address itself.
    pub fn candidates(&self) -> Vec<Candidate> {
        let mut candidates = self.offered.clone();
        let known = candidates.iter().any(|candidate| candidate.address == self.observed);
        if self.is_reflexive && !known && candidate::is_probeable(self.observed) {
            candidates.push(Candidate::new(CandidateKind::ServerReflexive, self.observed, u16::MAX));
        }
        candidates
    }

    fn describe(&mut self, says: Register) {
        let probeable = |candidate: &Candidate| candidate::is_probeable(candidate.address);
        self.offered = says.candidates.into_iter().filter(probeable).collect();
        self.mapping = says.mapping;
        self.instance = says.instance;
        self.policy = says.policy;
    }
}

/// Why a registration was refused. The peer is told in these words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// [`Limits::registrations`].
    #[error("the server is full; try again later, or use another server")]
    Full,
    /// [`Limits::registrations_per_source`].
    #[error(
        "too many registrations from this address; end some of them, or ask whoever runs the server for more"
    )]
    Source,
    /// [`Limits::registrations_per_prefix`].
    #[error("too many registrations from the network of this address; ask whoever runs the server for more")]
    Prefix,
    /// [`Limits::registering`].
    #[error(
        "this peer registers too often; wait a while, and see that its key is not in use on many machines"
    )]
    TooOften,
    /// [`Limits::candidates`].
    #[error("more than {0} candidates; take addresses from this machine that it does not need")]
    Candidates(usize),
    /// [`Broker::handle_ban`](crate::broker::Broker::handle_ban).
    #[error("this peer is banned here; ask whoever runs the server")]
    Banned,
    /// [`Broker::handle_leaving`](crate::broker::Broker::handle_leaving).
    #[error("the server is going away; use another one, or try again in a while")]
    Leaving,
}

impl Directory {
    /// How many are online.
    pub fn len(&self) -> usize {
        self.registrations.len()
    }

    /// Whether nobody is online.
    pub fn is_empty(&self) -> bool {
        self.registrations.is_empty()
    }

    /// The registration of this number, if it is online.
    pub fn get(&self, id: RegistrationId) -> Option<&Registration> {
        self.registrations.get(&id)
    }

    /// Whether one more registration of `peer` from `observed` fits, or one in the place of `replaced`; `Ok(Some(oldest))` when
    /// that one must go first.
    pub fn admit(
        &self,
        peer: PeerId,
        observed: SocketAddr,
        replaced: Option<RegistrationId>,
        limits: &Limits,
    ) -> Result<Option<RegistrationId>, RegisterError> {
        let of_peer = self.of(peer);
        let replaced = replaced.filter(|id| of_peer.contains(id));
        let crowded = of_peer.len() >= limits.registrations_per_peer.max(1);
        let leaving = replaced.or(of_peer.first().copied().filter(|_| crowded));
        let source = Source::from(observed.ip());
        let leaves_source = leaving.and_then(|id| self.get(id)).is_some_and(|gone| gone.source == source);
        let from_source = self.by_source.get(&source).copied().unwrap_or(0) - usize::from(leaves_source);
        if from_source >= limits.registrations_per_source {
            return Err(RegisterError::Source);
        }
        let prefix = source.prefix();
        let leaves_prefix =
            leaving.and_then(|id| self.get(id)).is_some_and(|gone| gone.source.prefix() == prefix);
        let from_prefix = self.by_prefix.get(&prefix).copied().unwrap_or(0) - usize::from(leaves_prefix);
        if from_prefix >= limits.registrations_per_prefix {
            return Err(RegisterError::Prefix);
        }
        if self.registrations.len() - usize::from(leaving.is_some()) >= limits.registrations {
            return Err(RegisterError::Full);
        }
        Ok(leaving.filter(|_| replaced.is_none()))
    }

    /// Enters a registration under a number that is free.
    pub fn insert(
        &mut self,
        id: RegistrationId,
        peer: PeerId,
        (observed, is_reflexive): (SocketAddr, bool),
        says: Register,
    ) {
        let source = observed.ip().into();
        let mut registration = Registration {
            peer,
            source,
            observed,
            is_reflexive,
            mapping: Mapping::Unknown,
            instance: says.instance,
            offered: Vec::new(),
            policy: IntroductionPolicy::Only(Vec::new()),
        };
        registration.describe(says);
        self.registrations.insert(id, registration);
        self.by_peer.entry(peer).or_default().push(id);
        *self.by_source.entry(source).or_default() += 1;
        *self.by_prefix.entry(source.prefix()).or_default() += 1;
    }

    /// Replaces what a peer says of itself.
    pub fn update(&mut self, id: RegistrationId, says: Register) {
        if let Some(registration) = self.registrations.get_mut(&id) {
            registration.describe(says);
        }
    }

    /// The signalling connection now comes from here: a NAT has rebound, or the peer has moved.
    pub fn observe(&mut self, id: RegistrationId, observed: SocketAddr) {
        if let Some(registration) = self.registrations.get_mut(&id) {
            registration.observed = observed;
        }
    }

    /// Takes a registration out.
    pub fn remove(&mut self, id: RegistrationId) -> Option<Registration> {
        let registration = self.registrations.remove(&id)?;
        if let Some(ids) = self.by_peer.get_mut(&registration.peer) {
            ids.retain(|other| *other != id);
            if ids.is_empty() {
                self.by_peer.remove(&registration.peer);
            }
        }
        let source = registration.source;
        for (counts, of) in [(&mut self.by_source, source), (&mut self.by_prefix, source.prefix())] {
            if let Some(count) = counts.get_mut(&of) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(&of);
                }
            }
        }
        Some(registration)
    }

    /// All online registrations.
    pub fn iter(&self) -> impl Iterator<Item = (RegistrationId, &Registration)> {
        self.registrations.iter().map(|(id, registration)| (*id, registration))
    }

    /// All online registrations of a peer, oldest first.
    pub fn of(&self, peer: PeerId) -> &[RegistrationId] {
        self.by_peer.get(&peer).map_or(&[], Vec::as_slice)
    }

    /// The newest registration of `target` that admits `asker`. `None` does not tell why.
    pub fn find(&self, target: PeerId, asker: PeerId) -> Option<(RegistrationId, &Registration)> {
        let newest_first = self.of(target).iter().rev();
        newest_first
            .filter_map(|id| Some((*id, self.registrations.get(id)?)))
            .find(|(_, registration)| registration.policy.admits(asker))
    }
}

#[cfg(test)]
mod tests {
    use rendezvous_wire::candidate::PortAllocation;

    use super::*;

    const A: PeerId = PeerId::from_bytes([1; 32]);
    const B: PeerId = PeerId::from_bytes([2; 32]);
    const C: PeerId = PeerId::from_bytes([3; 32]);

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn says(policy: IntroductionPolicy, addresses: &[&str]) -> Register {
        let candidate = |text: &&str| Candidate::new(CandidateKind::Host, address(text), 1);
        Register {
            instance: 1,
            candidates: addresses.iter().map(candidate).collect(),
            mapping: Mapping::EndpointIndependent,
            policy,
        }
    }

    fn open() -> Register {
        says(IntroductionPolicy::Anyone, &[])
    }

    #[test]
    fn the_newest_registration_that_admits_the_asker_is_found() {
        let mut directory = Directory::default();
        let seen = address("198.51.100.1:7");
        directory.insert(RegistrationId(1), B, (seen, true), open());
        directory.insert(RegistrationId(2), B, (seen, true), says(IntroductionPolicy::Only(vec![A]), &[]));
        directory.insert(RegistrationId(3), B, (seen, true), says(IntroductionPolicy::Only(vec![]), &[]));
        let found = |directory: &Directory, asker| directory.find(B, asker).map(|(id, _)| id.0);
        assert_eq!(found(&directory, A), Some(2));
        assert_eq!(found(&directory, C), Some(1));
        directory.remove(RegistrationId(2));
        assert_eq!(found(&directory, A), Some(1));
        directory.update(RegistrationId(1), says(IntroductionPolicy::Only(vec![]), &[]));
        assert_eq!(found(&directory, A), None);
        assert!(directory.find(C, A).is_none());
    }

    #[test]
    fn the_observed_endpoint_is_offered_once() {
        let mut directory = Directory::default();
        let id = RegistrationId(1);
        let offered = says(IntroductionPolicy::Anyone, &["10.0.0.1:5"]);
        directory.insert(id, A, (address("198.51.100.1:7"), true), offered);
        let kinds = |directory: &Directory| -> Vec<_> {
            directory.get(id).unwrap().candidates().iter().map(|c| (c.kind, c.address.to_string())).collect()
        };
        assert_eq!(
            kinds(&directory),
            [
                (CandidateKind::Host, "10.0.0.1:5".into()),
                (CandidateKind::ServerReflexive, "198.51.100.1:7".into())
            ]
        );
        directory.update(id, says(IntroductionPolicy::Anyone, &["198.51.100.1:7"]));
        assert_eq!(kinds(&directory), [(CandidateKind::Host, "198.51.100.1:7".into())]);
        directory.observe(id, address("198.51.100.1:8"));
        assert_eq!(kinds(&directory).len(), 2);
    }

    /// Else the other side would take it for one that has no UDP, and make nothing of it.
    #[test]
    fn a_peer_that_is_seen_at_its_own_address_has_no_nat_before_it_has_said_so() {
        let mut directory = Directory::default();
        let id = RegistrationId(1);
        let mut mapping = |seen: &str, is_reflexive, offered: &str, said| {
            let says = Register { mapping: said, ..says(IntroductionPolicy::Anyone, &[offered]) };
            directory.insert(id, A, (address(seen), is_reflexive), says);
            let mapping = directory.get(id).unwrap().mapping();
            directory.remove(id);
            mapping
        };
        let own = "198.51.100.1:7";
        let random = Mapping::AddressAndPortDependent(PortAllocation::Random);
        assert_eq!(mapping(own, true, own, Mapping::Unknown), Mapping::EndpointIndependent);
        assert_eq!(mapping(own, true, own, random), random);
        assert_eq!(mapping(own, true, "10.0.0.1:7", Mapping::Unknown), Mapping::Unknown);
        assert_eq!(mapping(own, true, "198.51.100.1:8", Mapping::Unknown), Mapping::Unknown);
        assert_eq!(mapping(own, false, own, Mapping::Unknown), Mapping::Unknown, "of a stream");
    }

    #[test]
    fn addresses_that_must_not_be_probed_are_dropped() {
        let mut directory = Directory::default();
        let bad = says(IntroductionPolicy::Anyone, &["127.0.0.1:9", "169.254.169.254:80", "224.0.0.1:5"]);
        directory.insert(RegistrationId(1), A, (address("127.0.0.1:4"), true), bad);
        assert!(directory.get(RegistrationId(1)).unwrap().candidates().is_empty());
    }

    #[test]
    fn bounds_hold_and_are_given_back() {
        let limits = Limits {
            registrations: 3,
            registrations_per_source: 2,
            registrations_per_peer: 1,
            ..Limits::default()
        };
        let mut directory = Directory::default();
        let (here, there) = (address("192.0.2.1:1"), address("192.0.2.2:1"));
        directory.insert(RegistrationId(1), A, (here, true), open());
        assert_eq!(directory.admit(A, there, None, &limits), Ok(Some(RegistrationId(1))));
        directory.insert(RegistrationId(2), B, (here, true), open());
        assert_eq!(directory.admit(C, here, None, &limits), Err(RegisterError::Source));
        assert_eq!(directory.admit(C, there, None, &limits), Ok(None));
        directory.insert(RegistrationId(3), C, (there, true), open());
        let another = PeerId::from_bytes([4; 32]);
        assert_eq!(directory.admit(another, there, None, &limits), Err(RegisterError::Full));
        directory.remove(RegistrationId(1));
        assert_eq!(directory.admit(another, here, None, &limits), Ok(None));
        let crowded = Limits { registrations_per_prefix: 2, ..limits };
        let (beside, elsewhere) = (address("192.0.2.3:1"), address("192.0.3.3:1"));
        assert_eq!(directory.admit(another, beside, None, &crowded), Err(RegisterError::Prefix));
        assert_eq!(directory.admit(another, elsewhere, None, &crowded), Ok(None));
        directory.remove(RegistrationId(2));
        directory.remove(RegistrationId(3));
        assert!(directory.is_empty() && directory.by_peer.is_empty());
        assert!(directory.by_source.is_empty() && directory.by_prefix.is_empty());
    }
}
