//! Arrivals of random files in random pieces, honest and not.

use rand::rngs::SmallRng;
use rand::{Rng as _, RngCore as _, SeedableRng as _};

use super::arrival::{Arrival, ArrivalError, Known, Sink, TakeError};
use super::tree::{GROUP, GroupHasher, group_length, groups};

/// A disk in memory that knows what must not be written.
struct Memory(Vec<u8>);

impl Sink for Memory {
    type Error = ();

    fn write(&mut self, offset: u64, content: &[u8]) -> Result<(), ()> {
        self.0.get_mut(offset as usize..offset as usize + content.len()).ok_or(())?.copy_from_slice(content);
        Ok(())
    }

    fn hole(&mut self, offset: u64, length: u64) -> Result<(), ()> {
        self.0.get_mut(offset as usize..(offset + length) as usize).ok_or(())?.fill(0);
        Ok(())
    }
}

fn rules(error: &TakeError<()>) -> ArrivalError {
    match error {
        TakeError::Rules(error) => *error,
        TakeError::Sink(()) => panic!("it wrote where nothing belongs"),
    }
}

/// What a sender does, in random steps: content, holes, groups that are known left out.
#[test]
fn whatever_the_pieces_the_file_is_the_same() {
    for seed in 0..60 {
        let mut random = SmallRng::seed_from_u64(seed);
        let size = match random.random_range(0..4) {
            0 => random.random_range(0..3000),
            1 => GROUP * random.random_range(1..4),
            _ => random.random_range(0..4 * GROUP),
        };
        let mut content = vec![0; size as usize];
        for _ in 0..random.random_range(0..4) {
            let from = random.random_range(0..=content.len());
            let to = random.random_range(from..=content.len());
            random.fill_bytes(&mut content[from..to]);
        }
        // A part in which some groups are right, and the others anything.
        let mut disk = Memory(content.clone());
        let mut known = Known::new();
        for group in 0..groups(size) {
            let range = (group * GROUP) as usize..(group * GROUP + group_length(size, group)) as usize;
            if size > GROUP && random.random_bool(0.5) {
                let mut hasher = GroupHasher::new(size, group);
                hasher.update(&content[range]);
                known.push_back((group, hasher.finish()));
            } else {
                random.fill_bytes(&mut disk.0[range]);
            }
        }
        let mut arrival = Arrival::new(size, known.clone());
        let mut at = 0_usize;
        while at < content.len() {
            let group = at as u64 / GROUP;
            let is_known = known.iter().any(|(known, _)| *known == group);
            if is_known && (at as u64).is_multiple_of(GROUP) {
                at += arrival.skip(1).unwrap() as usize;
                continue;
            }
            // Not into a group that is left out.
            let end = ((group + 1) * GROUP).min(size) as usize;
            let zeros = content[at..end].iter().take_while(|byte| **byte == 0).count();
            if zeros > 0 && random.random_bool(0.7) {
                let count = random.random_range(1..=zeros);
                arrival.hole(count as u64, &mut disk).unwrap();
                at += count;
            } else {
                let count = random.random_range(1..=end - at);
                arrival.content(&content[at..at + count], &mut disk).unwrap();
                at += count;
            }
        }
        let hash = *blake3::hash(&content).as_bytes();
        assert_eq!(arrival.end(hash), Ok(()), "seed {seed}");
        assert!(disk.0 == content, "seed {seed}");
    }
}

#[test]
fn what_breaks_the_rules_is_found() {
    let mut disk = Memory(vec![0; 100]);
    let mut arrival = Arrival::new(100, Known::new());
    assert_eq!(rules(&arrival.content(&[1; 101], &mut disk).unwrap_err()), ArrivalError::Beyond);
    assert_eq!(rules(&arrival.hole(u64::MAX, &mut disk).unwrap_err()), ArrivalError::Beyond);
    arrival.content(&[1; 99], &mut disk).unwrap();
    assert_eq!(rules(&arrival.hole(2, &mut disk).unwrap_err()), ArrivalError::Beyond);
    assert_eq!(arrival.skip(1), Err(ArrivalError::Unknown));
    assert_eq!(arrival.end([0; 32]), Err(ArrivalError::Short));
    let mut arrival = Arrival::new(3, Known::new());
    arrival.content(b"abc", &mut disk).unwrap();
    assert_eq!(arrival.end(*blake3::hash(b"abd").as_bytes()), Err(ArrivalError::Hash));
    assert_eq!(Arrival::new(0, Known::new()).end(*blake3::hash(b"").as_bytes()), Ok(()));
}

/// Groups may be left out only where they are known, from their first byte on.
#[test]
fn groups_that_are_not_known_cannot_be_left_out() {
    let size = 3 * GROUP;
    let mut disk = Memory(vec![0; size as usize]);
    let known = || Known::from([(1, [7; 32])]);
    assert_eq!(Arrival::new(size, known()).skip(1), Err(ArrivalError::Unknown));
    let mut arrival = Arrival::new(size, known());
    arrival.hole(GROUP + 1, &mut disk).unwrap();
    assert_eq!(arrival.skip(1), Err(ArrivalError::Unknown));
    let mut arrival = Arrival::new(size, known());
    arrival.hole(GROUP, &mut disk).unwrap();
    assert_eq!(arrival.skip(1), Ok(GROUP));
    assert_eq!(arrival.skip(1), Err(ArrivalError::Unknown));
    // A value that is not the content's makes another file of it.
    arrival.content(&vec![0; GROUP as usize], &mut disk).unwrap();
    assert_eq!(arrival.end(*blake3::hash(&disk.0).as_bytes()), Err(ArrivalError::Hash));
}
