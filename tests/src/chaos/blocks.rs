//! The blocks of a stream: numbered, dated, and each with the hash of all before it.

use rand::rngs::StdRng;
use rand::{RngCore as _, SeedableRng};
use ring::digest::{Context, SHA256};

/// Number, time and hash.
const HEADER: usize = 8 + 8 + 32;

/// The least length of a block.
pub const LEAST: usize = HEADER + 1;

/// What came is not what was sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// A block is missing, doubled or in the wrong place.
    #[error("block {came} came in the place of block {expected}")]
    Number {
        /// Of the block that came.
        came: u64,
        /// Of the one that was to come.
        expected: u64,
    },
    /// Something before this block came otherwise than it was sent.
    #[error("the hash of what was sent before block {0} is not that of what came")]
    Hash(u64),
}

/// One end of a stream in one direction: counts blocks and hashes them as they go by.
#[derive(Clone)]
pub struct Blocks {
    count: u64,
    hash: Context,
}

impl Default for Blocks {
    fn default() -> Self {
        Self { count: 0, hash: Context::new(&SHA256) }
    }
}

impl Blocks {
    /// How many have gone by.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The hash of everything that has gone by, in hexadecimal.
    pub fn hash(&self) -> String {
        data_encoding::HEXLOWER.encode(self.hash.clone().finish().as_ref())
    }

    /// Fills `block`, of [`LEAST`] bytes or more, with the next one to send. `now`: microseconds since 1970.
    pub fn fill(&mut self, block: &mut [u8], stream: u64, now: u64) {
        let (header, body) = block.split_at_mut(HEADER);
        header[..8].copy_from_slice(&self.count.to_be_bytes());
        header[8..16].copy_from_slice(&now.to_be_bytes());
        header[16..].copy_from_slice(self.hash.clone().finish().as_ref());
        StdRng::seed_from_u64(stream << 32 ^ self.count).fill_bytes(body);
        self.pass(block);
    }

    /// Takes a block that came; when it was sent.
    ///
    /// # Errors
    ///
    /// When it is not the next one of those that were sent.
    pub fn take(&mut self, block: &[u8]) -> Result<u64, Mismatch> {
        let number = |at: usize| block[at..at + 8].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        let (came, sent) = (number(0), number(8));
        if came != self.count {
            return Err(Mismatch::Number { came, expected: self.count });
        }
        if self.hash.clone().finish().as_ref() != &block[16..HEADER] {
            return Err(Mismatch::Hash(came));
        }
        self.pass(block);
        Ok(sent)
    }

    fn pass(&mut self, block: &[u8]) {
        self.hash.update(block);
        self.count += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(from: &mut Blocks, now: u64) -> [u8; 100] {
        let mut block = [0; 100];
        from.fill(&mut block, 7, now);
        block
    }

    #[test]
    fn what_is_sent_is_taken_and_hashes_agree() {
        let (mut here, mut there) = (Blocks::default(), Blocks::default());
        for now in 0..10 {
            assert_eq!(there.take(&block(&mut here, now)), Ok(now));
            assert_eq!(here.hash(), there.hash());
        }
        assert_eq!(there.count(), 10);
    }

    #[test]
    fn a_missing_block_a_doubled_one_and_a_changed_one_are_noticed() {
        let (mut here, mut there) = (Blocks::default(), Blocks::default());
        let [first, second, third] = [1, 2, 3].map(|now| block(&mut here, now));
        assert_eq!(there.clone().take(&second), Err(Mismatch::Number { came: 1, expected: 0 }));
        there.take(&first).unwrap();
        assert_eq!(there.clone().take(&first), Err(Mismatch::Number { came: 0, expected: 1 }));
        let mut changed = second;
        changed[99] ^= 1;
        there.take(&changed).unwrap();
        assert_eq!(there.take(&third), Err(Mismatch::Hash(2)));
    }
}
