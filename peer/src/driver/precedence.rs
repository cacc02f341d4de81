//! Which of several introductions to one remote endpoint counts: both sides hear of all of them, from several servers perhaps, in any order, and
//! have to take the same one. Pure.

use rendezvous_wire::message::{IntroductionId, Purpose};

/// What one remote endpoint's introductions have shown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Precedence {
    /// The greatest so far, by round and number ([`Purpose::Again`]).
    held: Option<(u64, IntroductionId)>,
}

impl Precedence {
    /// What to ask for another with.
    pub(super) fn next_round(&self) -> u64 {
        self.held.map_or(0, |(round, _)| round).saturating_add(1)
    }

    /// Whether this one takes the place of all before. One that begins a session always does: its asker knows of no other.
    pub(super) fn admits(&mut self, purpose: Purpose, introduction: IntroductionId) -> bool {
        let offered = match purpose {
            Purpose::Spare => return false,
            Purpose::Session => (0, introduction),
            Purpose::Again(round) => (round, introduction),
        };
        if purpose != Purpose::Session && self.held.is_some_and(|held| held > offered) {
            return false;
        }
        self.held = Some(offered);
        true
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::seq::SliceRandom as _;
    use rand::{Rng as _, SeedableRng as _};

    use super::*;

    fn id(number: u64) -> IntroductionId {
        IntroductionId(number)
    }

    #[test]
    fn a_later_round_counts_and_a_crossing_one_by_its_number() {
        let mut precedence = Precedence::default();
        assert!(precedence.admits(Purpose::Session, id(900)));
        assert_eq!(precedence.next_round(), 1);
        assert!(precedence.admits(Purpose::Again(1), id(5)), "whatever its number");
        assert!(!precedence.admits(Purpose::Again(1), id(4)));
        assert!(precedence.admits(Purpose::Again(1), id(6)));
        assert!(precedence.admits(Purpose::Again(1), id(6)), "the same one, made anew");
        assert!(!precedence.admits(Purpose::Spare, id(7)));
        assert_eq!(precedence.next_round(), 2);
        assert!(precedence.admits(Purpose::Session, id(1)), "the other side has begun anew");
    }

    /// Two sides ask at two servers, again and again; the notices of either server come in order, those of both in any.
    #[test]
    fn both_sides_end_with_the_same_one_whatever_the_order() {
        for seed in 0..2_000 {
            let mut random = StdRng::seed_from_u64(seed);
            let mut sides = [Precedence::default(); 2];
            let mut taken = [id(0); 2];
            for side in &mut sides {
                side.admits(Purpose::Session, id(0));
            }
            // What either server has yet to deliver, to either side.
            let mut under_way: [[Vec<(Purpose, IntroductionId)>; 2]; 2] = Default::default();
            let mut asks = random.random_range(1..6);
            loop {
                let mut choices: Vec<(usize, usize)> = Vec::new();
                for (server, queues) in under_way.iter().enumerate() {
                    let waiting = queues.iter().enumerate().filter(|(_, queue)| !queue.is_empty());
                    choices.extend(waiting.map(|(side, _)| (server, side)));
                }
                choices.shuffle(&mut random);
                if asks > 0 && (choices.is_empty() || random.random_bool(0.5)) {
                    asks -= 1;
                    let (server, asker) = (random.random_range(0..2), random.random_range(0..2));
                    let purpose = Purpose::Again(sides[asker].next_round());
                    let introduction = id(random.random());
                    for queue in &mut under_way[server] {
                        queue.push((purpose, introduction));
                    }
                } else if let Some((server, side)) = choices.first().copied() {
                    let (purpose, introduction) = under_way[server][side].remove(0);
                    if sides[side].admits(purpose, introduction) {
                        taken[side] = introduction;
                    }
                } else {
                    break;
                }
            }
            assert_eq!(taken[0], taken[1], "seed {seed}");
            assert_eq!(sides[0], sides[1], "seed {seed}");
        }
    }
}
