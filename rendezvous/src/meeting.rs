//! How the two sides of an introduction are brought to act at the same moment. Pure.
//!
//! A meeting has two steps, and each waits for both sides: first each says where its flows will be seen, then each says that
//! its NAT is open. What one side says twice, counts as it said it last. An offer that has waited too long counts no more: the sockets behind its doors are
//! closed by now, and whoever were told of them would be one meeting behind the other from then on.

use std::mem::take;
use std::net::SocketAddr;
use std::time::Instant;

use rendezvous_wire::message::{MeetingNumber, OFFER_LIFETIME};

/// A side of an introduction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Asker,
    Target,
}

/// How far the present meeting of an introduction has come.
#[derive(Debug, Default)]
pub(crate) struct MeetingState {
    /// Of the last meeting that began.
    number: u32,
    /// What each side has offered for the next one.
    offers: [Option<(Instant, Vec<SocketAddr>)>; 2],
    primed: [bool; 2],
}

impl MeetingState {
    /// One side offers its doors. When both have: a new meeting's number, and the doors of asker and target.
    pub(crate) fn meet(
        &mut self,
        side: Side,
        doors: Vec<SocketAddr>,
        now: Instant,
    ) -> Option<(MeetingNumber, [Vec<SocketAddr>; 2])> {
        self.offers[side as usize] = Some((now, doors));
        let stands = |offer: &Option<(Instant, Vec<SocketAddr>)>| {
            offer.as_ref().is_some_and(|(since, _)| now.saturating_duration_since(*since) < OFFER_LIFETIME)
        };
        if !self.offers.iter().all(stands) {
            return None;
        }
        self.number = self.number.wrapping_add(1);
        self.primed = [false; 2];
        let doors = take(&mut self.offers).map(|offer| offer.map_or_else(Vec::new, |(_, doors)| doors));
        Some((MeetingNumber(self.number), doors))
    }

    /// One side is primed for the meeting of this number. True once, when both are.
    pub(crate) fn primed(&mut self, side: Side, number: MeetingNumber) -> bool {
        if number.0 != self.number || self.primed == [true; 2] {
            return false;
        }
        self.primed[side as usize] = true;
        self.primed == [true; 2]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn doors(port: u16) -> Vec<SocketAddr> {
        vec![([192, 0, 2, 1], port).into()]
    }

    #[test]
    fn a_meeting_begins_when_both_have_offered_and_goes_when_both_are_primed() {
        let (mut state, now) = (MeetingState::default(), Instant::now());
        assert_eq!(state.meet(Side::Asker, doors(1), now), None);
        let (number, offered) = state.meet(Side::Target, doors(2), now).unwrap();
        assert_eq!(offered, [doors(1), doors(2)]);
        assert!(!state.primed(Side::Target, number) && !state.primed(Side::Target, number));
        assert!(state.primed(Side::Asker, number));
        assert!(!state.primed(Side::Asker, number), "only once");
    }

    #[test]
    fn the_last_offer_counts_and_an_old_meeting_goes_nowhere() {
        let (mut state, now) = (MeetingState::default(), Instant::now());
        state.meet(Side::Target, doors(1), now);
        state.meet(Side::Target, doors(2), now);
        let (first, offered) = state.meet(Side::Asker, doors(3), now).unwrap();
        assert_eq!(offered, [doors(3), doors(2)]);
        state.primed(Side::Asker, first);
        state.meet(Side::Asker, doors(4), now);
        let (second, _) = state.meet(Side::Target, doors(5), now).unwrap();
        assert_ne!(first, second);
        assert!(!state.primed(Side::Target, first) && !state.primed(Side::Target, second));
        assert!(state.primed(Side::Asker, second));
    }

    #[test]
    fn an_offer_that_nobody_has_taken_up_in_time_is_void() {
        let (mut state, now) = (MeetingState::default(), Instant::now());
        state.meet(Side::Asker, doors(1), now);
        let late = now + OFFER_LIFETIME;
        assert_eq!(state.meet(Side::Target, doors(2), late), None, "the asker has closed these doors");
        let (_, offered) = state.meet(Side::Asker, doors(3), late).unwrap();
        assert_eq!(offered, [doors(3), doors(2)]);
    }
}
