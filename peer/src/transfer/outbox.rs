//! Frames in large blocks.

use bytes::{Bytes, BytesMut};
use serde::Serialize;
use tokio::sync::mpsc;

use super::blocks::Blocks;
use super::content::STEP;
use super::message::{FromSender, HEADER, MAX_MESSAGE, content_header, encode};
use super::tree::GROUP;

/// A block with more than this in it leaves.
const ENOUGH: usize = 2 * STEP;

/// Room for that, and for what comes next with its header.
const BLOCK: usize = ENOUGH + HEADER + MAX_MESSAGE + HEADER + STEP;

/// A message about a hole or about groups left out is shorter.
const MAX_PENDING: usize = 32;

/// Blocks that are remembered; quinn holds a send window of them, 32 MiB.
const POOL: usize = (32 << 20) / ENOUGH + 8;

/// Nobody takes what leaves.
#[derive(Debug)]
pub(crate) struct Gone;

/// Collects frames.
pub(crate) struct Outbox {
    blocks: mpsc::Sender<Bytes>,
    block: BytesMut,
    used: usize,
    /// Where the room begins that was given last.
    room: usize,
    pool: Blocks,
    /// A hole, or groups left out, that may yet grow.
    hole: u64,
    skipped: u64,
    encoded: Vec<u8>,
    scratch: Vec<u8>,
}

impl Outbox {
    pub(crate) fn new(blocks: mpsc::Sender<Bytes>) -> Self {
        let mut pool = Blocks::new(BLOCK, POOL);
        Self {
            blocks,
            block: pool.take(),
            used: 0,
            room: 0,
            pool,
            hole: 0,
            skipped: 0,
            encoded: Vec::new(),
            scratch: Vec::new(),
        }
    }

    /// A buffer of one group for any use.
    pub(crate) fn scratch(&mut self) -> &mut [u8] {
        self.scratch.resize(GROUP as usize, 0);
        &mut self.scratch
    }

    /// Where the next `length` bytes, at most [`STEP`], may be read to, for [`content`](Self::content).
    pub(crate) fn room(&mut self, length: usize) -> Result<&mut [u8], Gone> {
        // What is still to be said comes first.
        let pending = if self.hole > 0 || self.skipped > 0 { MAX_PENDING } else { 0 };
        if self.used + pending + HEADER + length > BLOCK {
            self.send_block()?;
        }
        self.room = self.used + pending + HEADER;
        Ok(&mut self.block[self.room..self.room + length])
    }

    /// The first `length` bytes of the room leave.
    pub(crate) fn content(&mut self, length: usize) -> Result<(), Gone> {
        let start = self.room;
        self.say_pending()?;
        let to = self.used + HEADER;
        if to != start {
            self.block.copy_within(start..start + length, to);
        }
        self.block[self.used..to].copy_from_slice(&content_header(length));
        self.used = to + length;
        self.leave()
    }

    pub(crate) fn hole(&mut self, length: u64) -> Result<(), Gone> {
        if self.skipped > 0 {
            self.say_pending()?;
        }
        self.hole += length;
        Ok(())
    }

    /// One more group that is known.
    pub(crate) fn skip(&mut self) -> Result<(), Gone> {
        if self.hole > 0 {
            self.say_pending()?;
        }
        self.skipped += 1;
        Ok(())
    }

    pub(crate) fn message(&mut self, message: &FromSender) -> Result<(), Gone> {
        self.say_pending()?;
        self.append(message)?;
        self.leave()
    }

    fn say_pending(&mut self) -> Result<(), Gone> {
        let (length, groups) = (std::mem::take(&mut self.hole), std::mem::take(&mut self.skipped));
        if length > 0 {
            self.append(&FromSender::Hole { length })?;
        }
        if groups > 0 {
            self.append(&FromSender::Skip { groups })?;
        }
        Ok(())
    }

    fn append(&mut self, message: &impl Serialize) -> Result<(), Gone> {
        let mut encoded = std::mem::take(&mut self.encoded);
        encoded.clear();
        encode(message, &mut encoded);
        let at = self.make_room(encoded.len())?;
        self.block[at..at + encoded.len()].copy_from_slice(&encoded);
        self.used = at + encoded.len();
        self.encoded = encoded;
        Ok(())
    }

    fn make_room(&mut self, length: usize) -> Result<usize, Gone> {
        if self.used + length > BLOCK {
            self.send_block()?;
        }
        Ok(self.used)
    }

    fn leave(&mut self) -> Result<(), Gone> {
        if self.used >= ENOUGH { self.send_block() } else { Ok(()) }
    }

    /// Everything leaves.
    pub(crate) fn flush(&mut self) -> Result<(), Gone> {
        self.say_pending()?;
        self.send_block()
    }

    fn send_block(&mut self) -> Result<(), Gone> {
        if self.used == 0 {
            return Ok(());
        }
        let full = std::mem::take(&mut self.block);
        let leaving = self.pool.give(full, self.used);
        self.used = 0;
        self.block = self.pool.take();
        self.blocks.blocking_send(leaving).map_err(|_| Gone)
    }
}
