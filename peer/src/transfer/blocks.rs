//! Large buffers that are used again once nobody holds them any more: fresh memory costs a page fault every 4 kB.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

/// Blocks of one size.
pub(crate) struct Blocks {
    length: usize,
    /// Those on their way, oldest first.
    away: VecDeque<Bytes>,
    /// How many of them are remembered.
    most: usize,
}

impl Blocks {
    pub(crate) fn new(length: usize, most: usize) -> Self {
        Self { length, away: VecDeque::new(), most }
    }

    /// A block to be filled; what is in it is of no meaning.
    pub(crate) fn take(&mut self) -> BytesMut {
        if let Some(oldest) = self.away.pop_front() {
            match oldest.try_into_mut() {
                Ok(free) if free.len() == self.length => return free,
                Ok(_) => {}
                Err(held) if self.away.len() < self.most => self.away.push_front(held),
                Err(_) => {}
            }
        }
        BytesMut::zeroed(self.length)
    }

    /// The first `used` bytes of a block, which comes back when nobody holds them any more.
    pub(crate) fn give(&mut self, block: BytesMut, used: usize) -> Bytes {
        let full = block.freeze();
        let leaving = full.slice(..used);
        self.away.push_back(full);
        leaving
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_comes_back_when_it_is_free() {
        let mut blocks = Blocks::new(100, 4);
        let mut block = blocks.take();
        block[7] = 1;
        let place = block.as_ptr();
        let leaving = blocks.give(block, 8);
        assert_eq!(leaving.len(), 8);
        // It is still held.
        let other = blocks.take();
        assert_ne!(other.as_ptr(), place);
        drop((blocks.give(other, 1), leaving));
        let again = blocks.take();
        assert_eq!((again.as_ptr(), again.len()), (place, 100));
    }

    #[test]
    fn what_is_never_given_back_is_forgotten() {
        let mut blocks = Blocks::new(10, 3);
        let held: Vec<Bytes> = (0..50)
            .map(|_| {
                let block = blocks.take();
                blocks.give(block, 10)
            })
            .collect();
        assert!(blocks.away.len() <= 4, "{}", blocks.away.len());
        drop(held);
    }
}
