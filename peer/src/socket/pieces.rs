//! What the two path sockets of a session say to each other beside QUIC: a datagram in two pieces, where a path is narrower than QUIC believes, and
//! the probes that tell how wide a path is. Pure.
//!
//! QUIC sees one path and finds one MTU; beneath it the paths differ. A datagram that is too long for the path of the moment goes in two
//! pieces of equal length and is put together on the other side, so that no change of path makes a black hole. A path
//! counts as narrow until a probe of full size has been answered on it.
//!
//! ```text
//!  0                   1                   2                   3
//!  0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//! +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//! |  kind = 0x30  |0 0 0 0 0 0|o|s|            number             |  piece: o, the length is odd; s, the second
//! |  kind = 0x31  |                       0                       |  probe: 8 bytes of nonce, then nothing of meaning
//! |  kind = 0x32  |                       0                       |  answer: the nonce
//! +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//! ```
//!
//! Over a relay all of this is inside a frame. The kinds are of those that RFC 9443 leaves free of QUIC and STUN.

use std::time::{Duration, Instant};

use bytes::Bytes;
use rendezvous_wire::demux::{Protocol, classify};

const PIECE: u8 = 0x30;
const PROBE: u8 = 0x31;
const ANSWER: u8 = 0x32;
const SECOND: u8 = 1;
const ODD: u8 = 2;
const HEADER: usize = 4;

/// The longest datagram that every path carries, in a frame or not: 1,280 bytes (RFC 8200, section 5) less IPv6, UDP and the frame's header.
pub(crate) const NARROW: usize = 1280 - 40 - 8 - 4;

/// Bytes of a probe: the longest QUIC datagram there is.
pub(super) const WIDE: usize = crate::config::MAX_MTU as usize;

/// Datagrams of which one piece may wait for the other.
const WAITING: usize = 64;

/// What a control datagram says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Control<'a> {
    /// One of two pieces.
    Piece(&'a [u8]),
    /// How wide is the path?
    Probe([u8; 8]),
    /// As wide as the probe with this nonce.
    Answer([u8; 8]),
}

/// Reads a control datagram.
pub(super) fn parse(datagram: &[u8]) -> Option<Control<'_>> {
    let nonce = || datagram.get(HEADER..HEADER + 8)?.try_into().ok();
    match *datagram.first()? {
        PIECE if datagram.len() > HEADER => Some(Control::Piece(datagram)),
        PROBE => Some(Control::Probe(nonce()?)),
        ANSWER => Some(Control::Answer(nonce()?)),
        _ => None,
    }
}

/// A probe, or the answer to one, behind `frame`, the header of a relay's frame or nothing.
pub(super) fn probe(frame: &[u8], nonce: [u8; 8]) -> Vec<u8> {
    let mut datagram = [frame, &[PROBE, 0, 0, 0], &nonce].concat();
    datagram.resize(frame.len() + WIDE, 0);
    datagram
}

/// See [`probe`].
pub(super) fn answer(frame: &[u8], nonce: [u8; 8]) -> Vec<u8> {
    [frame, &[ANSWER, 0, 0, 0], &nonce].concat()
}

/// Puts the two pieces of a datagram, each behind `frame`, into `buffer`; the bytes of either. Of an odd number of bytes the middle one is in both.
pub(super) fn split(datagram: &[u8], number: u16, frame: &[u8], buffer: &mut Vec<u8>) -> usize {
    let half = datagram.len().div_ceil(2);
    let odd = if datagram.len() % 2 == 1 { ODD } else { 0 };
    let [high, low] = number.to_be_bytes();
    buffer.clear();
    for (flag, piece) in [(0, &datagram[..half]), (SECOND, &datagram[datagram.len() - half..])] {
        buffer.extend_from_slice(frame);
        buffer.extend_from_slice(&[PIECE, odd | flag, high, low]);
        buffer.extend_from_slice(piece);
    }
    frame.len() + HEADER + half
}

/// Pieces that wait for their other half. A new one takes the place of an old one: bounded, and without a clock.
#[derive(Debug, Default)]
pub(super) struct Reassembly {
    waiting: Vec<Option<(u8, u16, Bytes)>>,
}

impl Reassembly {
    /// Takes a piece; the whole datagram when it was the last, and is QUIC.
    pub(super) fn take(&mut self, piece: &[u8]) -> Option<Bytes> {
        let (&[PIECE, flags, high, low], half) = piece.split_first_chunk::<HEADER>()? else { return None };
        if half.is_empty() || half.len() > WIDE / 2 + 1 || flags & !(SECOND | ODD) != 0 {
            return None;
        }
        let number = u16::from_be_bytes([high, low]);
        self.waiting.resize(WAITING, None);
        let slot = &mut self.waiting[usize::from(number) % WAITING];
        match slot.take() {
            Some((other, same, first))
                if same == number && other ^ flags == SECOND && first.len() == half.len() =>
            {
                let (start, end) = if flags & SECOND == 0 { (half, &first[..]) } else { (&first[..], half) };
                let overlap = usize::from(flags & ODD != 0);
                let whole = [start, &end[overlap..]].concat();
                (classify(&whole) == Protocol::Quic).then(|| whole.into())
            }
            _ => {
                *slot = Some((flags, number, Bytes::copy_from_slice(half)));
                None
            }
        }
    }
}

/// Waits after the probes of a path whose width is not known: as the first checks of a path (RFC 8489, 6.2.1, with a shorter RTO).
const RETRIES: [Duration; 4] =
    [Duration::from_millis(200), Duration::from_millis(400), Duration::from_millis(800), PROBE_AGAIN];

/// How often a narrow path is probed again: as often as quinn's own search is set to.
const PROBE_AGAIN: Duration = Duration::from_secs(20);

/// Finds out whether a path carries datagrams of full size.
#[derive(Debug)]
pub(crate) struct WidthProbe {
    nonce: [u8; 8],
    sent: usize,
    next: Option<Instant>,
}

impl WidthProbe {
    /// Of a path that data takes from now on.
    pub(crate) fn new(nonce: [u8; 8], now: Instant) -> Self {
        Self { nonce, sent: 0, next: Some(now) }
    }

    /// When the next probe is due.
    pub(crate) fn poll_timeout(&self) -> Option<Instant> {
        self.next
    }

    /// The nonce of the probe that is due.
    pub(crate) fn poll(&mut self, now: Instant) -> Option<[u8; 8]> {
        self.next.filter(|next| *next <= now)?;
        self.next = Some(now + RETRIES[self.sent.min(RETRIES.len() - 1)]);
        self.sent += 1;
        Some(self.nonce)
    }

    /// Whether this answers one of its probes: the path is wide, and is not probed again.
    pub(crate) fn handle_answer(&mut self, nonce: [u8; 8]) -> bool {
        let mine = self.sent > 0 && nonce == self.nonce;
        if mine {
            self.next = None;
        }
        mine
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(datagram: &[u8], number: u16) -> [Vec<u8>; 2] {
        let mut buffer = Vec::new();
        let each = split(datagram, number, &[], &mut buffer);
        assert_eq!(buffer.len(), 2 * each);
        [buffer[..each].to_vec(), buffer[each..].to_vec()]
    }

    fn quic(length: usize) -> Vec<u8> {
        (0..length).map(|at| 0x40 | (at % 61) as u8).collect()
    }

    #[test]
    fn two_pieces_in_either_order_make_the_datagram() {
        for length in [2, 3, NARROW + 1, WIDE - 1, WIDE] {
            let datagram = quic(length);
            let [first, second] = pieces(&datagram, 7);
            assert!(first.len() <= NARROW && classify(&first) == Protocol::Relay);
            let mut reassembly = Reassembly::default();
            assert_eq!(reassembly.take(&first), None);
            assert_eq!(reassembly.take(&second).unwrap(), datagram);
            assert_eq!(reassembly.take(&second), None);
            assert_eq!(reassembly.take(&first).unwrap(), datagram);
        }
    }

    #[test]
    fn pieces_of_different_datagrams_make_none() {
        let mut reassembly = Reassembly::default();
        let [first, _] = pieces(&quic(1400), 1);
        let [again, second] = pieces(&quic(1400), 1 + WAITING as u16);
        assert_eq!(reassembly.take(&first), None);
        assert_eq!(reassembly.take(&second), None);
        assert_eq!(reassembly.take(&again).unwrap(), quic(1400));
        let [first, _] = pieces(&quic(1400), 9);
        let [_, shorter] = pieces(&quic(1300), 9);
        assert_eq!((reassembly.take(&first), reassembly.take(&shorter)), (None, None));
        let [first, second] = pieces(&[1; 1400], 3);
        assert_eq!((reassembly.take(&first), reassembly.take(&second)), (None, None), "not QUIC");
    }

    #[test]
    fn any_bytes_at_all_are_survived() {
        use rand::{Rng as _, RngCore as _, SeedableRng as _};
        let mut rng = rand::rngs::StdRng::seed_from_u64(1);
        let mut reassembly = Reassembly::default();
        for _ in 0..100_000 {
            let mut bytes = vec![0; rng.random_range(0..40)];
            rng.fill_bytes(&mut bytes);
            if let Some(first) = bytes.first_mut() {
                *first = rng.random_range(PIECE..=ANSWER + 1);
            }
            if let Some(Control::Piece(piece)) = parse(&bytes) {
                reassembly.take(piece);
            }
        }
        assert!(reassembly.take(&[PIECE, 0, 0, 0]).is_none());
        assert!(reassembly.take(&[&[PIECE, 0, 0, 0][..], &[0x40; 2000]].concat()).is_none());
    }

    #[test]
    fn probes_are_read_and_answered_and_end_with_an_answer() {
        let now = Instant::now();
        let mut probing = WidthProbe::new([7; 8], now);
        assert!(!probing.handle_answer([7; 8]), "nothing was asked");
        let nonce = probing.poll(now).unwrap();
        let datagram = probe(&[], nonce);
        assert_eq!((datagram.len(), parse(&datagram)), (WIDE, Some(Control::Probe(nonce))));
        assert_eq!(parse(&answer(&[], nonce)), Some(Control::Answer(nonce)));
        assert_eq!(probing.poll(now), None);
        assert!(probing.poll(now + RETRIES[0]).is_some());
        assert!(!probing.handle_answer([8; 8]));
        assert!(probing.handle_answer(nonce));
        assert_eq!(probing.poll_timeout(), None);
    }
}
