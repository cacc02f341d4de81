//! One file on its way in: order, bounds and verification. Writes nothing itself.

use std::collections::VecDeque;
use std::ops::Range;

use super::tree::{GROUP, GroupHasher, GroupValue, Tree, group_length};

/// Groups that are on this side's disk, ascending.
pub(crate) type Known = VecDeque<(u64, GroupValue)>;

/// What an arriving file wants done to the disk.
pub(crate) trait Sink {
    type Error;

    /// Content belongs at this offset.
    fn write(&mut self, offset: u64, content: &[u8]) -> Result<(), Self::Error>;

    /// Nothing but zeros belongs there.
    fn hole(&mut self, offset: u64, length: u64) -> Result<(), Self::Error>;
}

/// How the other side broke the rules, or what came is not what was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ArrivalError {
    /// More than the file's size.
    #[error("more than the file has")]
    Beyond,
    /// Ended too soon.
    #[error("less than the file has")]
    Short,
    /// Left out what is not here.
    #[error("it left out what is not here")]
    Unknown,
    /// Larger than what was consented to.
    #[error("it is much larger than it was when it was offered: it must be offered again")]
    Grown,
    /// The content is not what was sent.
    #[error("the content does not match its BLAKE3")]
    Hash,
}

/// Either kind of failure.
#[derive(Debug)]
pub(crate) enum TakeError<E> {
    Rules(ArrivalError),
    Sink(E),
}

impl<E> From<ArrivalError> for TakeError<E> {
    fn from(error: ArrivalError) -> Self {
        Self::Rules(error)
    }
}

/// A file of known size whose content comes in order.
pub(crate) struct Arrival {
    size: u64,
    cursor: u64,
    tree: Tree,
    /// Of the present group, once there is some of it.
    hasher: Option<GroupHasher>,
    known: Known,
}

impl Arrival {
    pub(crate) fn new(size: u64, known: Known) -> Self {
        Self { size, cursor: 0, tree: Tree::default(), hasher: None, known }
    }

    /// The present group: number, first byte, and the byte after its last.
    fn group(&self) -> (u64, Range<u64>) {
        let group = self.cursor / GROUP;
        let start = group * GROUP;
        (group, start..start + group_length(self.size, group))
    }

    /// Whether so much more can belong to it.
    pub(crate) fn check(&self, length: u64) -> Result<(), ArrivalError> {
        if length > self.size - self.cursor { Err(ArrivalError::Beyond) } else { Ok(()) }
    }

    /// The next bytes.
    pub(crate) fn content<S: Sink>(
        &mut self,
        mut bytes: &[u8],
        sink: &mut S,
    ) -> Result<(), TakeError<S::Error>> {
        self.check(bytes.len() as u64)?;
        while !bytes.is_empty() {
            let (_, place) = self.group();
            let (now, later) = bytes.split_at(bytes.len().min((place.end - self.cursor) as usize));
            self.hash(|hasher| hasher.update(now));
            sink.write(self.cursor, now).map_err(TakeError::Sink)?;
            self.advance(now.len() as u64);
            bytes = later;
        }
        Ok(())
    }

    /// The next bytes are a hole.
    pub(crate) fn hole<S: Sink>(&mut self, length: u64, sink: &mut S) -> Result<(), TakeError<S::Error>> {
        self.check(length)?;
        sink.hole(self.cursor, length).map_err(TakeError::Sink)?;
        let end = self.cursor + length;
        while self.cursor < end {
            let (_, place) = self.group();
            let step = place.end.min(end) - self.cursor;
            self.hash(|hasher| hasher.update_zeros(step));
            self.advance(step);
        }
        Ok(())
    }

    fn hash(&mut self, update: impl FnOnce(&mut GroupHasher)) {
        let (size, group) = (self.size, self.cursor / GROUP);
        update(self.hasher.get_or_insert_with(|| GroupHasher::new(size, group)));
    }

    /// So much more of the present group, and not beyond it, has been hashed.
    fn advance(&mut self, length: u64) {
        let (group, place) = self.group();
        self.cursor += length;
        if self.cursor < place.end {
            return;
        }
        if let Some(hasher) = self.hasher.take() {
            self.tree.push(hasher.finish());
        }
        // What is known of a group that came all the same is of no use.
        while self.known.front().is_some_and(|(known, _)| *known <= group) {
            self.known.pop_front();
        }
    }

    /// The next groups are those that are known. How many bytes that is.
    pub(crate) fn skip(&mut self, groups: u64) -> Result<u64, ArrivalError> {
        let before = self.cursor;
        for _ in 0..groups {
            let (group, place) = self.group();
            match self.known.pop_front() {
                Some((known, value)) if known == group && place.start == self.cursor && !place.is_empty() => {
                    self.tree.push(value);
                    self.cursor = place.end;
                }
                _ => return Err(ArrivalError::Unknown),
            }
        }
        Ok(self.cursor - before)
    }

    /// That was all: is it what was sent?
    pub(crate) fn end(mut self, hash: [u8; 32]) -> Result<(), ArrivalError> {
        if self.cursor != self.size {
            return Err(ArrivalError::Short);
        }
        if self.size == 0 {
            self.tree.push(GroupHasher::new(0, 0).finish());
        }
        if self.tree.finish() == Some(hash) { Ok(()) } else { Err(ArrivalError::Hash) }
    }
}
