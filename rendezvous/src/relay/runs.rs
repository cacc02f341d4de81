//! Cuts what the kernel coalesced into runs. Pure.
//!
//! A buffer from a socket with GRO holds several datagrams of one sender, all of one size but perhaps the last. They
//! need not be of one kind, nor on one channel: a sender's batch mixes what it likes.

use rendezvous_wire::demux::{Protocol, classify};
use rendezvous_wire::relay::Channel;

/// Neighbouring datagrams that are treated alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Run<'a> {
    /// One STUN message.
    Stun(&'a [u8]),
    /// Frames on one channel, which may leave as one send with this segment size.
    Frames {
        /// The channel of all of them.
        channel: Channel,
        /// The frames, headers included.
        bytes: &'a [u8],
        /// The size of each but perhaps the last.
        segment: usize,
    },
    /// Nothing of ours.
    Other,
}

/// The runs of a buffer whose datagrams begin at multiples of `stride`.
pub fn runs(buffer: &[u8], stride: usize) -> Runs<'_> {
    Runs { rest: buffer, stride: stride.max(1) }
}

/// Iterates over the [`Run`]s of a buffer.
#[derive(Debug, Clone)]
pub struct Runs<'a> {
    rest: &'a [u8],
    stride: usize,
}

impl<'a> Iterator for Runs<'a> {
    type Item = Run<'a>;

    fn next(&mut self) -> Option<Run<'a>> {
        if self.rest.is_empty() {
            return None;
        }
        let first = &self.rest[..self.stride.min(self.rest.len())];
        let (end, run) = match (classify(first), Channel::of(first)) {
            (Protocol::Stun, _) => (first.len(), Run::Stun(first)),
            (Protocol::Relay, Some(channel)) => {
                let alike = |frame: &&[u8]| Channel::of(frame) == Some(channel);
                let frames = self.rest.chunks(self.stride).take_while(alike);
                let end = frames.map(<[u8]>::len).sum();
                (end, Run::Frames { channel, bytes: &self.rest[..end], segment: self.stride })
            }
            _ => (first.len(), Run::Other),
        };
        self.rest = &self.rest[end..];
        Some(run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Channel = match Channel::new(1) {
        Some(channel) => channel,
        None => panic!(),
    };
    const B: Channel = match Channel::new(0x00ff_0001) {
        Some(channel) => channel,
        None => panic!(),
    };

    fn frame(channel: Channel, length: usize) -> Vec<u8> {
        let mut frame = channel.header().to_vec();
        frame.resize(length, 7);
        frame
    }

    fn stun() -> Vec<u8> {
        let mut bytes = vec![0; 28];
        bytes[1] = 1;
        bytes
    }

    #[test]
    fn a_batch_of_one_channel_is_one_run() {
        let buffer = [frame(A, 28), frame(A, 28), frame(A, 9)].concat();
        let all: Vec<_> = runs(&buffer, 28).collect();
        assert_eq!(all, [Run::Frames { channel: A, bytes: &buffer, segment: 28 }]);
    }

    #[test]
    fn a_mixed_batch_is_cut_where_it_changes() {
        let parts =
            [frame(A, 28), frame(A, 28), stun(), frame(B, 28), vec![0x80; 28], frame(A, 28), frame(B, 5)];
        let buffer = parts.concat();
        let all: Vec<_> = runs(&buffer, 28).collect();
        let frames = |channel, range: std::ops::Range<usize>| Run::Frames {
            channel,
            bytes: &buffer[range],
            segment: 28,
        };
        assert_eq!(
            all,
            [
                frames(A, 0..56),
                Run::Stun(&parts[2]),
                frames(B, 84..112),
                Run::Other,
                frames(A, 140..168),
                frames(B, 168..173),
            ]
        );
    }

    #[test]
    fn a_last_datagram_too_short_for_a_header_is_not_forwarded() {
        let buffer = [frame(A, 28), vec![0x20, 0, 0]].concat();
        let all: Vec<_> = runs(&buffer, 28).collect();
        assert_eq!(all, [Run::Frames { channel: A, bytes: &buffer[..28], segment: 28 }, Run::Other]);
    }

    #[test]
    fn an_empty_datagram_and_a_missing_stride_end() {
        assert_eq!(runs(&[], 0).count(), 0);
        assert_eq!(runs(&[1, 2, 3], 0).count(), 3);
        assert_eq!(runs(&frame(A, 10), 100).count(), 1);
    }
}
