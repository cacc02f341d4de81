//! What a relay thread sends of one batch that it received: collected, then handed to the kernel in one call a socket.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use rendezvous_batch::{Batch, Datagram, MOST, Sent};
use tracing::trace;

use super::reflect::Answer;
use super::table::Flow;

/// Longest segment of a coalesced send. Kernels answer EINVAL where a segment does not fit the interface, as they do where support for
/// segmentation is missing. Peers send at most this (1,448 + 4).
const MAX_SEGMENT: usize = 1_452;

/// Most bytes of one coalesced send: an IPv4 packet less its headers.
const MAX_SEND: usize = 65_507;

/// `UDP_MAX_SEGMENTS` of the kernel.
const MAX_SEGMENTS: usize = 64;

/// How long coalesced sends are not tried after the kernel has refused one. An address that has left the interface is reason enough for a
/// refusal, so this is no verdict on the kernel.
const GSO_RETRY: Duration = Duration::from_secs(60);

/// EINVAL and EIO of Linux: the kernel or the interface's driver does not segment.
const NO_SEGMENTATION: [i32; 2] = [22, 5];

/// The way out of one thread.
#[derive(Debug, Default)]
pub(crate) struct Outlets {
    batch: Batch,
    segmentation_lost: Option<Instant>,
}

/// Collects what leaves. Answers and frames keep their order.
pub(crate) struct Outbox<'a, 's, S> {
    outlets: &'a mut Outlets,
    sockets: &'a [S],
    waiting: ArrayVec<Waiting<'s>, MOST>,
    now: Instant,
}

struct Waiting<'s> {
    payload: Payload<'s>,
    to: Flow,
    segment: Option<u16>,
    ecn: u8,
}

enum Payload<'s> {
    Frames(&'s [u8]),
    Answer(Answer),
}

impl Waiting<'_> {
    fn datagram(&self) -> Datagram<'_> {
        let bytes = match &self.payload {
            Payload::Frames(bytes) => bytes,
            Payload::Answer(answer) => answer.as_ref(),
        };
        Datagram { bytes, to: self.to.remote, from: self.to.local, segment: self.segment, ecn: self.ecn }
    }
}

impl<'a, 's, S: AsFd> Outbox<'a, 's, S> {
    /// An empty one. Place [`Flow::socket`] of `sockets` is where a flow leaves.
    pub(crate) fn new(outlets: &'a mut Outlets, sockets: &'a [S], now: Instant) -> Self {
        Self { outlets, sockets, waiting: ArrayVec::new(), now }
    }

    /// Sends an answer.
    pub(crate) fn answer(&mut self, answer: Answer, to: Flow) {
        self.push(Waiting { payload: Payload::Answer(answer), to, segment: None, ecn: 0 });
    }

    /// Forwards a run of frames of this segment size, in as few sends as the kernel allows.
    pub(crate) fn forward(&mut self, bytes: &'s [u8], segment: usize, ecn: u8, to: Flow) {
        if bytes.len() <= segment {
            self.push(Waiting { payload: Payload::Frames(bytes), to, segment: None, ecn });
            return;
        }
        let most = match segment {
            1..=MAX_SEGMENT => self.outlets.segments(self.now).min(MAX_SEND / segment),
            _ => 1,
        };
        let size = u16::try_from(segment).ok().filter(|_| most > 1);
        for part in bytes.chunks(segment.max(1) * most.max(1)) {
            self.push(Waiting { payload: Payload::Frames(part), to, segment: size, ecn });
        }
    }

    fn push(&mut self, waiting: Waiting<'s>) {
        if self.waiting.is_full() {
            self.flush();
        }
        self.waiting.push(waiting);
    }

    /// Sends what waits. What the kernel refuses is as good as lost on the way.
    pub(crate) fn flush(&mut self) {
        for (number, socket) in self.sockets.iter().enumerate() {
            // Nearly always all of them leave by one socket.
            if self.waiting.iter().any(|waiting| waiting.to.socket == number) {
                self.outlets.send(socket, number, &self.waiting, self.now);
            }
        }
        self.waiting.clear();
    }
}

impl Outlets {
    fn segments(&mut self, now: Instant) -> usize {
        match self.segmentation_lost {
            Some(lost) if now.saturating_duration_since(lost) < GSO_RETRY => 1,
            _ => MAX_SEGMENTS,
        }
    }

    fn send(&mut self, socket: &impl AsFd, number: usize, waiting: &[Waiting<'_>], now: Instant) {
        let mut left = waiting.iter().filter(|waiting| waiting.to.socket == number);
        while let Sent::Part(sent, error) = self.batch.send(socket, left.clone().map(Waiting::datagram)) {
            trace!(%error, "a datagram did not leave");
            let Some(refused) = left.nth(sent) else { return };
            let unsegmented = error.raw_os_error().is_some_and(|code| NO_SEGMENTATION.contains(&code));
            if let Some(segment) = refused.segment.filter(|_| unsegmented) {
                self.segmentation_lost = Some(now);
                self.apart(socket, refused, segment);
            } else if error.kind() == std::io::ErrorKind::WouldBlock {
                // The socket's buffer is full, and stays so for the rest of this batch.
                return;
            }
        }
    }

    /// Sends frame by frame what the kernel did not segment.
    fn apart(&mut self, socket: &impl AsFd, refused: &Waiting<'_>, segment: u16) {
        let whole = Datagram { segment: None, ..refused.datagram() };
        let frames = whole.bytes.chunks(segment.into()).map(|bytes| Datagram { bytes, ..whole });
        if let Sent::Part(_, error) = self.batch.send(socket, frames) {
            trace!(%error, "frames did not leave");
        }
    }
}
