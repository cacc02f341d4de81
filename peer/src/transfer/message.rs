//! What the two sides say, and how it is framed.
//!
//! A frame is four bytes, little-endian: the length in the lower 31 bits, and in the highest whether it is content. Content is the next
//! bytes of the file that [`FromSender::Begin`] has named; everything else is a message in postcard's encoding.
//!
//! 1. The sender offers ([`FromSender::Offer`], [`FromSender::Entries`]), the receiver consents or refuses.
//! 2. The receiver asks, in any order; the sender answers in that order, while more questions come.
//! 3. [`ToSender::Done`] ends it.

use std::time::Duration;

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::manifest::{Entry, Modified};
use super::tree::{GROUP, GroupValue};

/// The protocol that [`FromSender::Offer`] names.
pub(crate) const VERSION: u16 = 1;

/// The longest message; also bounds what decoding one can allocate.
pub(crate) const MAX_MESSAGE: usize = 64 << 10;

/// The longest run of content in one frame.
pub(crate) const MAX_CONTENT: usize = GROUP as usize;

/// Bytes before each frame.
pub(crate) const HEADER: usize = 4;

const CONTENT: u32 = 1 << 31;

/// How often a receiver says that it is there, and how long a sender believes it without. A receiver that was killed says nothing, and its session would
/// be believed in for a quarter of an hour, since it may only be asleep; here that costs no more than asking again.
pub(crate) const ALIVE: Duration = Duration::from_secs(2);
pub(crate) const SILENCE: Duration = Duration::from_secs(10);

/// Group values in one message.
pub(crate) const MAX_VALUES: usize = 1024;

/// From the side that has the files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum FromSender {
    /// What is offered, in all.
    Offer { version: u16, entries: u32 },
    /// The next entries of the offer.
    Entries(Vec<Entry>),
    /// Content of a wanted file follows, from its first byte; again, when it has changed meanwhile.
    Begin { file: u32, size: u64, mode: u32, modified: Modified },
    /// The next bytes are zeros, and a hole.
    Hole { length: u64 },
    /// The next groups are as the receiver said that it has them.
    Skip { groups: u64 },
    /// That was all of the file; its BLAKE3.
    End { hash: [u8; 32] },
    /// The compared file has the same content.
    Same { file: u32 },
    /// It has not.
    Differs { file: u32 },
    /// The file cannot be sent.
    Failed { file: u32, problem: FileProblem },
}

/// Why a file cannot be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[non_exhaustive]
pub enum FileProblem {
    /// It has gone, or is something else now.
    #[error("it is not there any more")]
    Gone,
    /// The sender may not read it.
    #[error("the sender may not read it")]
    Denied,
    /// Reading failed.
    #[error("the sender cannot read it")]
    Unreadable,
    /// It never kept still.
    #[error("it keeps changing while it is read")]
    Changing,
}

/// From the side that wants them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ToSender {
    /// Nothing will be taken.
    Refused(Refusal),
    /// Questions follow.
    Accepted,
    /// These groups of the file that is named next are here: values from group `first` on.
    Known { first: u64, values: Vec<GroupValue> },
    /// The content of these files, without the groups that are known.
    Want { first: u32, count: u32 },
    /// Whether this is the file's hash.
    Compare { file: u32, hash: [u8; 32] },
    /// It is all here, on disk, but for these many files.
    Done { kept: u32, failed: u32 },
    /// It cannot go on.
    Failed(ReceiverProblem),
    /// It is still there; from the beginning on, every [`ALIVE`].
    Alive,
}

/// Why an offer was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The person, or what decides for it, said no.
    #[error("refused")]
    Declined,
    /// Another transfer is under way.
    #[error("the other side is busy with another transfer")]
    Busy,
    /// Another version of the protocol.
    #[error("the other side speaks another version: use the same version on both sides")]
    Version,
    /// The offer breaks the rules.
    #[error("the other side found the offer unsound")]
    Unsound,
}

/// Why a receiver cannot go on. What is there is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[non_exhaustive]
pub enum ReceiverProblem {
    /// No space, or no quota, left.
    #[error("the other side's disk is full: what has arrived is kept, send it again when there is room")]
    DiskFull,
    /// It may not write there.
    #[error("the other side may not write to its folder")]
    Denied,
    /// Something else with its disk.
    #[error("the other side cannot write what it receives")]
    Disk,
    /// It did not understand us.
    #[error("the other side did not understand what it was sent")]
    Protocol,
    /// Its owner has stopped it.
    #[error("the other side was stopped: what has arrived is kept, send it again to go on")]
    Stopped,
    /// More came than was offered.
    #[error("a file is much larger than it was when it was offered: send it again")]
    Grown,
}

/// Why bytes are no frames of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// Longer than any frame.
    #[error("a frame of {0} bytes")]
    Length(usize),
    /// No message.
    #[error("a message that cannot be read")]
    Message,
    /// It ended in the middle.
    #[error("it ended in the middle of a frame")]
    Truncated,
}

/// Appends a message with its header.
pub(crate) fn encode(message: &impl Serialize, output: &mut Vec<u8>) {
    let start = output.len();
    output.extend([0; HEADER]);
    match postcard::to_extend(message, std::mem::take(output)) {
        Ok(filled) => *output = filled,
        // Only sequences of unknown length and the like; ours have none.
        Err(error) => unreachable!("{error}"),
    }
    let length = (output.len() - start - HEADER) as u32;
    output[start..start + HEADER].copy_from_slice(&length.to_le_bytes());
}

/// The header of so many bytes of content.
pub(crate) fn content_header(length: usize) -> [u8; HEADER] {
    debug_assert!((1..=MAX_CONTENT).contains(&length));
    (length as u32 | CONTENT).to_le_bytes()
}

/// What has arrived.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Item<M> {
    Message(M),
    /// A piece of content, as it came.
    Content(Bytes),
}

/// Takes frames apart, as the bytes come. Content is passed on without a copy; a message is gathered first.
#[derive(Debug, Default)]
pub(crate) struct Deframer {
    header: [u8; HEADER],
    header_length: usize,
    message: Vec<u8>,
    /// Of the frame that has begun.
    left: usize,
    content: bool,
}

impl Deframer {
    /// The next item out of `input`, which is shortened by it; `None` when all of `input` is used up.
    pub(crate) fn next<M: DeserializeOwned>(
        &mut self,
        input: &mut Bytes,
    ) -> Result<Option<Item<M>>, FrameError> {
        while !input.is_empty() {
            if self.left == 0 {
                let take = input.len().min(HEADER - self.header_length);
                self.header[self.header_length..][..take].copy_from_slice(&input.split_to(take));
                self.header_length += take;
                if self.header_length < HEADER {
                    return Ok(None);
                }
                self.header_length = 0;
                let header = u32::from_le_bytes(self.header);
                self.content = header & CONTENT != 0;
                self.left = (header & !CONTENT) as usize;
                let most = if self.content { MAX_CONTENT } else { MAX_MESSAGE };
                if self.left == 0 || self.left > most {
                    return Err(FrameError::Length(self.left));
                }
                continue;
            }
            let piece = input.split_to(input.len().min(self.left));
            self.left -= piece.len();
            if self.content {
                return Ok(Some(Item::Content(piece)));
            }
            self.message.extend_from_slice(&piece);
            if self.left == 0 {
                let message = postcard::from_bytes(&self.message).map_err(|_| FrameError::Message)?;
                self.message.clear();
                return Ok(Some(Item::Message(message)));
            }
        }
        Ok(None)
    }

    /// Whether nothing has begun that is not complete.
    #[cfg(test)]
    pub(crate) fn is_between_frames(&self) -> bool {
        self.left == 0 && self.header_length == 0
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng as _, RngCore as _, SeedableRng as _};

    use super::*;
    use crate::transfer::manifest::Kind;

    fn samples() -> Vec<FromSender> {
        let modified = Modified { seconds: -5, nanoseconds: 7 };
        let entry = |kind| Entry { parent: Some(3), name: b"\xffname".to_vec(), kind };
        vec![
            FromSender::Offer { version: VERSION, entries: 9 },
            FromSender::Entries(vec![
                entry(Kind::Folder { mode: 0o755, modified }),
                entry(Kind::File { size: u64::MAX, mode: 0o644, modified }),
                entry(Kind::Link { target: b"../x".to_vec() }),
            ]),
            FromSender::Begin { file: 1, size: 2, mode: 3, modified },
            FromSender::Hole { length: 1 << 40 },
            FromSender::Skip { groups: 5 },
            FromSender::End { hash: [7; 32] },
            FromSender::Failed { file: 1, problem: FileProblem::Changing },
        ]
    }

    fn answers() -> Vec<ToSender> {
        vec![
            ToSender::Accepted,
            ToSender::Known { first: 4, values: vec![[1; 32], [2; 32]] },
            ToSender::Want { first: 1, count: u32::MAX },
            ToSender::Compare { file: 2, hash: [9; 32] },
            ToSender::Done { kept: 0, failed: 1 },
            ToSender::Failed(ReceiverProblem::DiskFull),
            ToSender::Refused(Refusal::Busy),
        ]
    }

    fn split<M: DeserializeOwned>(
        bytes: &[u8],
        random: &mut SmallRng,
    ) -> Result<(Vec<M>, Vec<u8>, bool), FrameError> {
        let (mut deframer, mut messages, mut content) = (Deframer::default(), Vec::new(), Vec::new());
        let mut rest = bytes;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(random.random_range(1..=rest.len()));
            let mut now = Bytes::copy_from_slice(now);
            while let Some(item) = deframer.next(&mut now)? {
                match item {
                    Item::Message(message) => messages.push(message),
                    Item::Content(piece) => content.extend_from_slice(&piece),
                }
            }
            rest = later;
        }
        Ok((messages, content, deframer.is_between_frames()))
    }

    #[test]
    fn frames_survive_any_cut() {
        let mut bytes = Vec::new();
        for sample in samples() {
            encode(&sample, &mut bytes);
            bytes.extend(content_header(3));
            bytes.extend(b"abc");
        }
        for seed in 0..200 {
            let (messages, content, whole) =
                split::<FromSender>(&bytes, &mut SmallRng::seed_from_u64(seed)).unwrap();
            assert_eq!(messages, samples(), "seed {seed}");
            assert_eq!(content, b"abc".repeat(samples().len()), "seed {seed}");
            assert!(whole);
        }
    }

    #[test]
    fn lengths_are_bounded_before_anything_is_kept() {
        for header in [0, CONTENT, MAX_MESSAGE as u32 + 1, u32::MAX, CONTENT | (MAX_CONTENT as u32 + 1)] {
            let mut bytes = Bytes::copy_from_slice(&header.to_le_bytes());
            let item = Deframer::default().next::<FromSender>(&mut bytes);
            assert!(matches!(item, Err(FrameError::Length(_))), "{header:x}");
        }
        // A message that claims a billion entries.
        let mut bytes = vec![7, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff, 3, 0];
        bytes[0] = (bytes.len() - HEADER) as u8;
        let item = Deframer::default().next::<FromSender>(&mut Bytes::from(bytes));
        assert_eq!(item, Err(FrameError::Message));
    }

    /// Random and mutated bytes: an error or messages, never a panic.
    #[test]
    fn garbage_is_an_error() {
        for seed in 0..30_000 {
            let mut random = SmallRng::seed_from_u64(seed);
            let mut bytes = Vec::new();
            if seed % 3 == 0 {
                bytes.resize(random.random_range(0..300), 0);
                random.fill_bytes(&mut bytes);
                // Lengths that are let through now and then.
                if bytes.len() > 4 {
                    let length = (bytes.len() as u32 - 4) | (random.random_range(0..2) << 31);
                    bytes[..4].copy_from_slice(&length.to_le_bytes());
                }
            } else {
                samples().iter().for_each(|sample| encode(sample, &mut bytes));
                answers().iter().for_each(|answer| encode(answer, &mut bytes));
                for _ in 0..random.random_range(1..6) {
                    let at = random.random_range(0..bytes.len());
                    bytes[at] = random.random();
                }
            }
            let _ = split::<FromSender>(&bytes, &mut random);
            let _ = split::<ToSender>(&bytes, &mut random);
        }
    }

    #[test]
    fn the_largest_list_of_values_fits_a_message() {
        let mut bytes = Vec::new();
        encode(&ToSender::Known { first: u64::MAX, values: vec![[255; 32]; MAX_VALUES] }, &mut bytes);
        assert!(bytes.len() - HEADER <= MAX_MESSAGE);
    }
}
