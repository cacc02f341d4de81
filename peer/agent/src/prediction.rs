//! Foretelling the ports of a NAT that gives each destination another one, from those it has given before. Pure functions.

use rendezvous_wire::candidate::PortAllocation;

/// Widest step from one mapping to the next that counts as a sequence. NATs step by 1 or a few; what lies between belongs to the other flows of the
/// household.
const WIDEST_STEP: u16 = 64;

/// How a NAT allocates ports, from those that the flows of one socket bound to `local` were seen at, in the order in which they began.
pub fn allocation(local: u16, seen: &[u16]) -> PortAllocation {
    if seen.contains(&local) {
        PortAllocation::Preserving
    } else if Sequence::of(seen).is_some() {
        PortAllocation::Sequential
    } else {
        PortAllocation::Random
    }
}

/// Ports that a NAT gives one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sequence {
    /// The last one seen.
    last: u16,
    /// From one to the next; negative where the NAT counts down.
    step: i32,
}

impl Sequence {
    /// The sequence behind some ports, given in the order in which their flows began. Other flows may have taken some in between: the step is the
    /// smallest that was seen. `None` with fewer than two, or when they go up and down, or too far.
    pub fn of(seen: &[u16]) -> Option<Self> {
        let steps: Vec<i32> =
            seen.windows(2).map(|pair| i32::from(pair[1].wrapping_sub(pair[0]) as i16)).collect();
        let narrow = |step: &i32| (1..=i32::from(WIDEST_STEP)).contains(&step.abs());
        let one_way = steps.windows(2).all(|pair| (pair[0] > 0) == (pair[1] > 0));
        if !one_way || !steps.iter().all(narrow) {
            return None;
        }
        Some(Self { last: *seen.last()?, step: steps.into_iter().min_by_key(|step| step.abs())? })
    }

    /// The ports to come, those that are none left out.
    pub fn coming(self) -> impl Iterator<Item = u16> {
        (1..).map_while(move |count| u16::try_from(i32::from(self.last) + self.step * count).ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_are_told_from_chance() {
        for (seen, expected) in [
            (&[5000, 5001, 5002][..], Some((5002, 1))),
            (&[5000, 5004, 5008], Some((5008, 4))),
            (&[5000, 5006, 5008], Some((5008, 2))),
            (&[5008, 5007, 5005], Some((5005, -1))),
            (&[65535, 3, 4], Some((4, 1))),
            (&[5000, 5000, 5001], None),
            (&[5000, 5004, 5002], None),
            (&[5000, 5065], None),
            (&[5000, 31_000, 31_001], None),
            (&[5000], None),
            (&[], None),
        ] {
            let sequence = expected.map(|(last, step)| Sequence { last, step });
            assert_eq!(Sequence::of(seen), sequence, "{seen:?}");
        }
    }

    #[test]
    fn the_ports_to_come_end_with_the_last_there_is() {
        let coming = |last, step| Sequence { last, step }.coming().take(3).collect::<Vec<_>>();
        assert_eq!(coming(5000, 2), [5002, 5004, 5006]);
        assert_eq!(coming(65534, 1), [65535]);
        assert_eq!(coming(2, -1), [1, 0]);
    }

    #[test]
    fn allocations() {
        use PortAllocation::{Preserving, Random, Sequential};
        for (local, seen, expected) in [
            (4000, [4000, 31_000, 9000], Preserving),
            (4000, [5000, 5001, 5002], Sequential),
            (4000, [5000, 9000, 31_000], Random),
        ] {
            assert_eq!(allocation(local, &seen), expected);
        }
    }
}
