//! Signalling and relay on one TLS stream, for networks that let no UDP through.
//!
//! The stream carries records in both directions, each a byte that says its kind, a 16-bit big-endian length and so many bytes:
//!
//! | kind | what | bytes |
//! |---|---|---|
//! | 0 | a message ([`crate::message`]) | postcard; with its length just what it is on a QUIC stream |
//! | 1 | frames ([`crate::relay`]) | a 16-bit segment size, then frames of that size each, but for a shorter last one |
//! | 2 | a binding | 64-bit sequence of the binding that this stream makes or renews, and in the other direction confirms |
//! | 3 | the end | 32-bit [`close_code`](crate::message::close_code), then the reason in UTF-8; the last record |
//!
//! The stream is the binding: its peer has proved its key, so no bind request ([`crate::stun::BindRequest`]) is needed, but the sequence is
//! from the same count as theirs, and the highest of a registration is in force. A peer writes the binding before it registers, and writes it
//! again to keep the stream alive.
//!
//! What a sender has in one batch (segmentation offload) travels as one record, and can leave as one batch at the other end.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

use crate::message::MAX_MESSAGE;
use crate::relay::HEADER_LEN;

const MESSAGE: u8 = 0;
const FRAMES: u8 = 1;
const BINDING: u8 = 2;
const CLOSE: u8 = 3;

/// Kind and length.
const RECORD_HEADER: usize = 3;

/// The segment size of frames.
const SEGMENT: usize = 2;

/// A binding's sequence.
const SEQUENCE: usize = 8;

/// A close code.
const CODE: usize = 4;

/// Most bytes of a reason to close.
pub const MAX_REASON: usize = 256;

/// A buffer with room for so many times what it is needed for is given back, unless it is small anyway.
const OVERSIZE: usize = 8;

/// Room that is not worth giving back.
const SMALL: usize = 1_024;

/// Most bytes of frames in one record, their headers included.
pub const MAX_FRAMES: usize = u16::MAX as usize - SEGMENT;

/// Most bytes of one frame, its header included: a frame that came over UDP has filled an Ethernet packet at most.
pub const MAX_FRAME: usize = 1_500;

/// One record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// The body of a message, for [`crate::message::decode`].
    Message(Bytes),
    /// Frames, each of `segment` bytes but for a shorter last one.
    Frames {
        /// The frames, headers included; not empty.
        bytes: Bytes,
        /// From 5 to [`MAX_FRAME`] bytes.
        segment: usize,
    },
    /// A binding's sequence.
    Binding(u64),
    /// The end.
    Close {
        /// See [`close_code`](crate::message::close_code).
        code: u32,
        /// In words, for a log.
        reason: String,
    },
}

/// Why bytes are no record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// A kind that this version does not know.
    #[error("a record of unknown kind {0}")]
    Kind(u8),
    /// Longer than its kind may be, or shorter.
    #[error("a record of kind {kind} with {length} bytes")]
    Length {
        /// Of the record.
        kind: u8,
        /// In its header.
        length: usize,
    },
    /// Frames without room for their headers, or too long.
    #[error("frames of {0} bytes")]
    Segment(usize),
}

/// Cuts a byte stream into records. Holds at most one record and what was read with its end.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: BytesMut,
}

impl Decoder {
    /// The buffer to append bytes to as they come off the stream; whoever reads bounds how many at a time.
    pub fn buffer(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// The next whole record; `None` until more bytes have come. After an error the stream is of no more use.
    pub fn poll(&mut self) -> Result<Option<Record>, RecordError> {
        let [kind, high, low, ..] = self.buffer[..] else { return Ok(None) };
        let length = usize::from(u16::from_be_bytes([high, low]));
        let fits = match kind {
            MESSAGE => length <= MAX_MESSAGE,
            FRAMES => length > SEGMENT + HEADER_LEN,
            BINDING => length == SEQUENCE,
            CLOSE => (CODE..=CODE + MAX_REASON).contains(&length),
            _ => return Err(RecordError::Kind(kind)),
        };
        if !fits {
            return Err(RecordError::Length { kind, length });
        }
        if self.buffer.len() < RECORD_HEADER + length {
            return Ok(None);
        }
        self.buffer.advance(RECORD_HEADER);
        let mut body = self.buffer.split_to(length).freeze();
        Ok(Some(match kind {
            MESSAGE => Record::Message(body),
            FRAMES => {
                let segment = usize::from(body.get_u16());
                if segment <= HEADER_LEN || segment > MAX_FRAME {
                    return Err(RecordError::Segment(segment));
                }
                Record::Frames { bytes: body, segment }
            }
            BINDING => Record::Binding(body.get_u64()),
            _ => {
                let code = body.get_u32();
                Record::Close { code, reason: String::from_utf8_lossy(&body).into_owned() }
            }
        }))
    }
}

/// A message record, from what [`crate::message::encode`] gives.
pub fn put_message(encoded: &[u8], out: &mut BytesMut) {
    out.reserve(1 + encoded.len());
    out.put_u8(MESSAGE);
    out.put_slice(encoded);
}

/// A binding record.
pub fn put_binding(sequence: u64, out: &mut BytesMut) {
    out.put_u8(BINDING);
    out.put_u16(SEQUENCE as u16);
    out.put_u64(sequence);
}

/// A close record; a reason too long is cut.
pub fn put_close(code: u32, reason: &str, out: &mut BytesMut) {
    let reason = &reason.as_bytes()[..reason.floor_char_boundary(MAX_REASON)];
    out.put_u8(CLOSE);
    out.put_u16((CODE + reason.len()) as u16);
    out.put_u32(code);
    out.put_slice(reason);
}

/// Records on their way to a stream that takes them at its own pace: bounded in bytes, full at once and without a word, as a router's
/// queue is. What the writer has taken counts until it comes for more.
#[derive(Debug)]
pub struct Backlog {
    waiting: BytesMut,
    taken: usize,
    most: usize,
}

impl Backlog {
    /// Room for `most` bytes.
    pub fn new(most: usize) -> Self {
        Self { waiting: BytesMut::new(), taken: 0, most }
    }

    /// Queues frames of `segment` bytes each but for a shorter last one, in as few records as hold them. False: those that found no room
    /// were dropped.
    pub fn push_frames(&mut self, frames: &[u8], segment: usize) -> bool {
        let segment = segment.min(frames.len());
        if segment <= HEADER_LEN || segment > MAX_FRAME {
            return frames.is_empty();
        }
        for part in frames.chunks(MAX_FRAMES / segment * segment) {
            let length = SEGMENT + part.len();
            if self.taken + self.waiting.len() + RECORD_HEADER + length > self.most {
                return false;
            }
            self.waiting.reserve(RECORD_HEADER + length);
            self.waiting.put_u8(FRAMES);
            self.waiting.put_u16(length as u16);
            self.waiting.put_u16(segment as u16);
            self.waiting.put_slice(part);
        }
        true
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Takes all that waits, and in exchange the buffer of what was taken before.
    pub fn take(&mut self, written: BytesMut) -> BytesMut {
        let mut spare = written;
        spare.clear();
        if spare.capacity() > OVERSIZE * self.waiting.len().max(SMALL) {
            // A burst is over: what it took is not kept.
            spare = BytesMut::new();
        }
        let taken = std::mem::replace(&mut self.waiting, spare);
        self.taken = taken.len();
        taken
    }
}

#[cfg(test)]
#[path = "stream_tests.rs"]
mod tests;
