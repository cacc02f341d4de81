//! Introductions and the relay channels that live and die with them. Pure.

use std::collections::{HashMap, HashSet};
use std::time::Instant;

use data_encoding::BASE64_NOPAD;
use rand::rngs::StdRng;
use rand::{Rng, RngCore};
use rendezvous_wire::candidate::Mapping;
use rendezvous_wire::message::{
    Credentials, Introduce, Introduction, IntroductionId, Meeting, MeetingNumber, NotIntroduced, Purpose,
    RegistrationId, Role,
};
use rendezvous_wire::relay::Channel;
use rendezvous_wire::{Candidate, PeerId};

use crate::limits::Limits;
use crate::meeting::{MeetingState, Side};

/// Bytes of randomness in a ufrag: 48 bits in 8 characters, where RFC 8445, section 5.3 asks for 24 bits.
const UFRAG_BYTES: usize = 6;

/// Bytes of randomness in a password: 144 bits in 24 characters, where RFC 8445, section 5.3 asks for 128 bits.
pub(crate) const PASSWORD_BYTES: usize = 18;

/// One side of an introduction to be made.
#[derive(Debug, Clone)]
pub struct Party {
    /// Its registration.
    pub registration: RegistrationId,
    /// Its key.
    pub peer: PeerId,
    /// What the other side is told.
    pub instance: u64,
    /// What the other side is told.
    pub candidates: Vec<Candidate>,
    /// What the other side is told.
    pub mapping: Mapping,
}

/// An introduction just made: a notice for each side.
#[derive(Debug)]
pub struct Made {
    /// For the asker.
    pub to_asker: Introduction,
    /// For the target, the asker's first flight in it.
    pub to_target: Introduction,
}

/// An introduction that is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Which.
    pub introduction: IntroductionId,
    /// Its channel, free again.
    pub channel: Channel,
    /// The registration that did not end it and is to be told.
    pub other: RegistrationId,
}

/// The introductions in force.
#[derive(Debug, Default)]
pub struct Introductions {
    entries: HashMap<IntroductionId, Entry>,
    members: HashMap<RegistrationId, Membership>,
    channels: HashSet<Channel>,
}

#[derive(Debug)]
struct Entry {
    asker: RegistrationId,
    target: RegistrationId,
    channel: Channel,
    meeting: MeetingState,
}

impl Entry {
    fn side(&self, member: RegistrationId) -> Option<Side> {
        match member {
            _ if member == self.asker => Some(Side::Asker),
            _ if member == self.target => Some(Side::Target),
            _ => None,
        }
    }

    fn other(&self, member: RegistrationId) -> Option<RegistrationId> {
        match member {
            _ if member == self.asker => Some(self.target),
            _ if member == self.target => Some(self.asker),
            _ => None,
        }
    }
}

#[derive(Debug, Default)]
struct Membership {
    asked: Vec<IntroductionId>,
    answered: Vec<IntroductionId>,
}

impl Introductions {
    /// How many are in force; as many channels are open.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether none is in force.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Makes an introduction, if every bound allows it.
    pub fn make(
        &mut self,
        asked: Introduce,
        asker: Party,
        target: Party,
        limits: &Limits,
        rng: &mut StdRng,
    ) -> Result<Made, NotIntroduced> {
        self.check_bounds(asker.registration, target.registration, limits)?;
        let introduction = self.free_id(rng);
        let channel = self.free_channel(rng);
        let (asker_id, target_id) = (asker.registration, target.registration);
        let entry = Entry { asker: asker_id, target: target_id, channel, meeting: MeetingState::default() };
        self.entries.insert(introduction, entry);
        self.members.entry(asker.registration).or_default().asked.push(introduction);
        self.members.entry(target.registration).or_default().answered.push(introduction);
        let mut made = made((introduction, channel, asked.purpose), asker, target, rng);
        made.to_asker.request = Some(asked.request);
        made.to_target.first_flight = asked.first_flight;
        Ok(made)
    }

    /// Makes an introduction anew: fresh credentials, and what the two sides offer now. `None` when one of the two is not there.
    pub fn renew(
        &mut self,
        (introduction, round): (IntroductionId, u64),
        by: RegistrationId,
        party: impl Fn(RegistrationId) -> Option<Party>,
        rng: &mut StdRng,
    ) -> Option<Made> {
        let entry = self.entries.get_mut(&introduction)?;
        entry.side(by)?;
        let (asker, target) = (party(entry.asker)?, party(entry.target)?);
        entry.meeting = MeetingState::default();
        Some(made((introduction, entry.channel, Purpose::Again(round)), asker, target, rng))
    }

    /// Both ends of an introduction, asker's first.
    pub fn sides(&self, introduction: IntroductionId) -> Option<[RegistrationId; 2]> {
        self.entries.get(&introduction).map(|entry| [entry.asker, entry.target])
    }

    /// One side ends an introduction; `None` when it is not a side of it.
    pub fn close(&mut self, introduction: IntroductionId, by: RegistrationId) -> Option<Ended> {
        let other = self.entries.get(&introduction)?.other(by)?;
        let entry = self.entries.remove(&introduction)?;
        self.channels.remove(&entry.channel);
        self.forget(entry.asker, |membership| &mut membership.asked, introduction);
        self.forget(entry.target, |membership| &mut membership.answered, introduction);
        Some(Ended { introduction, channel: entry.channel, other })
    }

    /// One side is ready to meet. When the other is too: what each is to be told.
    pub fn meet(
        &mut self,
        from: RegistrationId,
        meeting: Meeting,
        now: Instant,
    ) -> Option<[(RegistrationId, MeetingNumber, Meeting); 2]> {
        let introduction = meeting.introduction;
        let entry = self.entries.get_mut(&introduction)?;
        let side = entry.side(from)?;
        let (number, [asker, target]) = entry.meeting.meet(side, meeting.doors, now)?;
        let part = |doors| Meeting { introduction, doors };
        Some([(entry.asker, number, part(target)), (entry.target, number, part(asker))])
    }

    /// One side is primed. When the other is too: both, to be told.
    pub fn primed(
        &mut self,
        from: RegistrationId,
        introduction: IntroductionId,
        number: MeetingNumber,
    ) -> Option<[RegistrationId; 2]> {
        let entry = self.entries.get_mut(&introduction)?;
        let side = entry.side(from)?;
        entry.meeting.primed(side, number).then_some([entry.asker, entry.target])
    }

    /// A registration has ended: so do all its introductions.
    pub fn end_all(&mut self, of: RegistrationId) -> Vec<Ended> {
        let Some(membership) = self.members.remove(&of) else { return Vec::new() };
        let ids = membership.asked.into_iter().chain(membership.answered);
        ids.filter_map(|id| self.close(id, of)).collect()
    }

    /// All in force: number, asker, target and channel.
    pub fn iter(
        &self,
    ) -> impl Iterator<Item = (IntroductionId, RegistrationId, RegistrationId, Channel)> + '_ {
        self.entries.iter().map(|(id, entry)| (*id, entry.asker, entry.target, entry.channel))
    }

    /// Of how many this registration is a side.
    pub fn count(&self, registration: RegistrationId) -> usize {
        let membership = self.members.get(&registration);
        membership.map_or(0, |membership| membership.asked.len() + membership.answered.len())
    }

    /// Whether this registration is a side of any introduction.
    pub fn has_any(&self, registration: RegistrationId) -> bool {
        self.members.contains_key(&registration)
    }

    fn check_bounds(
        &self,
        asker: RegistrationId,
        target: RegistrationId,
        limits: &Limits,
    ) -> Result<(), NotIntroduced> {
        let asked = self.members.get(&asker).map_or(&[][..], |membership| &membership.asked);
        if asked.len() >= limits.asked_per_registration {
            return Err(NotIntroduced::TooMany);
        }
        let to_target =
            |id: &&IntroductionId| self.entries.get(id).is_some_and(|entry| entry.target == target);
        if asked.iter().filter(to_target).count() >= limits.introductions_per_pair {
            return Err(NotIntroduced::TooMany);
        }
        let answered = self.members.get(&target).map_or(0, |membership| membership.answered.len());
        if answered >= limits.answered_per_registration || self.entries.len() >= limits.channel_bound() {
            return Err(NotIntroduced::Full);
        }
        Ok(())
    }

    fn free_id(&self, rng: &mut StdRng) -> IntroductionId {
        loop {
            let id = IntroductionId(rng.next_u64());
            if !self.entries.contains_key(&id) {
                return id;
            }
        }
    }

    fn free_channel(&mut self, rng: &mut StdRng) -> Channel {
        loop {
            let number = rng.random_range(0..Channel::COUNT);
            if let Some(channel) = Channel::new(number).filter(|channel| self.channels.insert(*channel)) {
                return channel;
            }
        }
    }

    fn forget(
        &mut self,
        registration: RegistrationId,
        side: impl Fn(&mut Membership) -> &mut Vec<IntroductionId>,
        introduction: IntroductionId,
    ) {
        let Some(membership) = self.members.get_mut(&registration) else { return };
        let ids = side(membership);
        if let Some(place) = ids.iter().position(|id| *id == introduction) {
            ids.swap_remove(place);
        }
        if membership.asked.is_empty() && membership.answered.is_empty() {
            self.members.remove(&registration);
        }
    }
}

/// What each side is told of the other.
fn made(
    (introduction, channel, purpose): (IntroductionId, Channel, Purpose),
    asker: Party,
    target: Party,
    rng: &mut StdRng,
) -> Made {
    let (of_asker, of_target) = (credentials(rng), credentials(rng));
    let to_asker = Introduction {
        introduction,
        request: None,
        peer: target.peer,
        instance: target.instance,
        purpose,
        role: Role::Controlling,
        local: of_asker.clone(),
        remote: of_target.clone(),
        candidates: target.candidates,
        mapping: target.mapping,
        channel,
        first_flight: Vec::new(),
    };
    let to_target = Introduction {
        introduction,
        request: None,
        peer: asker.peer,
        instance: asker.instance,
        purpose,
        role: Role::Controlled,
        local: of_target,
        remote: of_asker,
        candidates: asker.candidates,
        mapping: asker.mapping,
        channel,
        first_flight: Vec::new(),
    };
    Made { to_asker, to_target }
}

fn credentials(rng: &mut StdRng) -> Credentials {
    Credentials { ufrag: secret::<UFRAG_BYTES>(rng), password: secret::<PASSWORD_BYTES>(rng) }
}

/// `N` random bytes in base64: every character is an ice-char (RFC 8839, section 5.4).
pub(crate) fn secret<const N: usize>(rng: &mut StdRng) -> String {
    let mut bytes = [0; N];
    rng.fill_bytes(&mut bytes);
    BASE64_NOPAD.encode(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rendezvous_wire::message::RequestId;

    fn party(number: u8) -> Party {
        Party {
            registration: RegistrationId(number.into()),
            peer: PeerId::from_bytes([number; 32]),
            instance: number.into(),
            candidates: Vec::new(),
            mapping: Mapping::Unknown,
        }
    }

    fn make(
        introductions: &mut Introductions,
        asker: u8,
        target: u8,
        limits: &Limits,
        rng: &mut StdRng,
    ) -> Result<Made, NotIntroduced> {
        let (request, purpose) = (RequestId(5), Purpose::Session);
        let first_flight = vec![vec![1, 2]];
        let asked = Introduce { request, target: party(target).peer, purpose, first_flight };
        introductions.make(asked, party(asker), party(target), limits, rng)
    }

    #[test]
    fn both_sides_are_told_the_same_from_their_own_end() {
        let rng = &mut StdRng::seed_from_u64(1);
        let made = make(&mut Introductions::default(), 1, 2, &Limits::default(), rng).unwrap();
        let (asker, target) = (made.to_asker, made.to_target);
        assert_eq!((asker.introduction, asker.channel), (target.introduction, target.channel));
        assert_eq!((&asker.local, &asker.remote), (&target.remote, &target.local));
        assert_ne!(asker.local, asker.remote);
        assert_eq!((asker.role, target.role), (Role::Controlling, Role::Controlled));
        assert_eq!((asker.request, target.request), (Some(RequestId(5)), None));
        assert_eq!((asker.peer, target.peer), (party(2).peer, party(1).peer));
        assert!(asker.first_flight.is_empty());
        assert_eq!(target.first_flight, [[1, 2]]);
        assert_eq!((asker.local.ufrag.len(), asker.local.password.len()), (8, 24));
    }

    #[test]
    fn only_a_side_can_close_and_the_other_is_named() {
        let rng = &mut StdRng::seed_from_u64(1);
        let mut introductions = Introductions::default();
        let made = make(&mut introductions, 1, 2, &Limits::default(), rng).unwrap();
        let id = made.to_asker.introduction;
        assert_eq!(introductions.close(id, RegistrationId(3)), None);
        let ended = introductions.close(id, RegistrationId(2)).unwrap();
        assert_eq!((ended.other, ended.channel), (RegistrationId(1), made.to_asker.channel));
        assert_eq!(introductions.close(id, RegistrationId(1)), None);
        assert!(
            introductions.is_empty() && introductions.members.is_empty() && introductions.channels.is_empty()
        );
    }

    #[test]
    fn a_registration_takes_all_its_introductions_with_it() {
        let rng = &mut StdRng::seed_from_u64(1);
        let mut introductions = Introductions::default();
        for (asker, target) in [(1, 2), (1, 3), (4, 1), (2, 3)] {
            make(&mut introductions, asker, target, &Limits::default(), rng).unwrap();
        }
        let ended = introductions.end_all(RegistrationId(1));
        let mut others: Vec<u64> = ended.iter().map(|ended| ended.other.0).collect();
        others.sort_unstable();
        assert_eq!((others, introductions.len()), (vec![2, 3, 4], 1));
    }

    #[test]
    fn every_bound_holds_and_says_which_side_is_over() {
        let rng = &mut StdRng::seed_from_u64(1);
        let limits = Limits {
            channels: 6,
            asked_per_registration: 3,
            answered_per_registration: 4,
            introductions_per_pair: 2,
            ..Limits::default()
        };
        let mut introductions = Introductions::default();
        let mut ask = |asker, target| make(&mut introductions, asker, target, &limits, rng).map(|_| ());
        assert_eq!((ask(1, 2), ask(1, 2)), (Ok(()), Ok(())));
        assert_eq!(ask(1, 2), Err(NotIntroduced::TooMany));
        assert_eq!(ask(1, 3), Ok(()));
        assert_eq!(ask(1, 4), Err(NotIntroduced::TooMany));
        assert_eq!((ask(3, 2), ask(4, 2)), (Ok(()), Ok(())));
        assert_eq!(ask(5, 2), Err(NotIntroduced::Full));
        assert_eq!(ask(5, 1), Ok(()));
        assert_eq!(ask(5, 6), Err(NotIntroduced::Full));
    }
}
