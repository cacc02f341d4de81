//! A reliable byte stream over datagrams: as much of QUIC as signalling needs. Pure.
//!
//! What the real thing costs in time is kept: a lost message comes one retransmission time-out later, and holds up those behind it.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// First byte of a frame, one of QUIC's.
const MARK: u8 = 0x40;
const HEADER: usize = 18;

/// About three round trips, as QUIC's first probe time-outs are; doubled up to [`MAX_TIMEOUT`].
const TIMEOUT: Duration = Duration::from_millis(300);
const MAX_TIMEOUT: Duration = Duration::from_secs(3);

/// As in `peer`: a quiet connection says something, and wants an answer.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Most frames that are repeated at once.
const BURST: usize = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Data,
    Ack,
}

/// Which connection a datagram belongs to, if it is one of a pipe.
pub(super) fn connection(datagram: &[u8]) -> Option<u64> {
    let header = datagram.first_chunk::<HEADER>().filter(|header| header[0] == MARK)?;
    Some(u64::from_be_bytes(header[2..10].try_into().ok()?))
}

/// One end.
#[derive(Debug)]
pub(super) struct Pipe {
    connection: u64,
    keeps_alive: bool,
    next: u64,
    unacknowledged: VecDeque<(u64, Vec<u8>)>,
    timeout: Duration,
    repeat_at: Option<Instant>,
    quiet_at: Instant,
    expected: u64,
    early: BTreeMap<u64, Vec<u8>>,
    transmits: VecDeque<Vec<u8>>,
}

impl Pipe {
    /// The end that keeps alive is the peer's.
    pub(super) fn new(connection: u64, keeps_alive: bool, now: Instant) -> Self {
        Self {
            connection,
            keeps_alive,
            next: 0,
            unacknowledged: VecDeque::new(),
            timeout: TIMEOUT,
            repeat_at: None,
            quiet_at: now + KEEP_ALIVE,
            expected: 0,
            early: BTreeMap::new(),
            transmits: VecDeque::new(),
        }
    }

    /// Sends some bytes of the stream.
    pub(super) fn send(&mut self, bytes: Vec<u8>, now: Instant) {
        let frame = self.frame(Kind::Data, self.next, &bytes);
        self.transmits.push_back(frame);
        self.unacknowledged.push_back((self.next, bytes));
        self.next += 1;
        self.repeat_at.get_or_insert(now + self.timeout);
        self.quiet_at = now + KEEP_ALIVE;
    }

    /// Takes a datagram; the bytes that have become complete.
    pub(super) fn handle(&mut self, datagram: &[u8], now: Instant) -> Vec<u8> {
        let Some((header, payload)) = datagram.split_first_chunk::<HEADER>() else { return Vec::new() };
        let number = header[10..].try_into().map_or(0, u64::from_be_bytes);
        if header[1] == Kind::Ack as u8 {
            let before = self.unacknowledged.len();
            self.unacknowledged.retain(|(own, _)| *own >= number);
            if self.unacknowledged.len() < before {
                self.timeout = TIMEOUT;
                self.repeat_at = (!self.unacknowledged.is_empty()).then_some(now + self.timeout);
            }
            return Vec::new();
        }
        if number >= self.expected {
            self.early.insert(number, payload.to_vec());
        }
        let mut complete = Vec::new();
        while let Some(bytes) = self.early.remove(&self.expected) {
            complete.extend(bytes);
            self.expected += 1;
        }
        let ack = self.frame(Kind::Ack, self.expected, &[]);
        self.transmits.push_back(ack);
        complete
    }

    /// Repeats what is not acknowledged.
    pub(super) fn handle_timeout(&mut self, now: Instant) {
        if self.keeps_alive && self.quiet_at <= now {
            self.send(Vec::new(), now);
        }
        if self.repeat_at.is_some_and(|at| at <= now) {
            self.timeout = (self.timeout * 2).min(MAX_TIMEOUT);
            self.repeat_at = Some(now + self.timeout);
            let waiting = self.unacknowledged.iter().take(BURST);
            let frames: Vec<_> =
                waiting.map(|(number, bytes)| self.frame(Kind::Data, *number, bytes)).collect();
            self.transmits.extend(frames);
        }
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.repeat_at.into_iter().chain(self.keeps_alive.then_some(self.quiet_at)).min()
    }

    pub(super) fn poll_transmit(&mut self) -> Option<Vec<u8>> {
        self.transmits.pop_front()
    }

    fn frame(&self, kind: Kind, number: u64, payload: &[u8]) -> Vec<u8> {
        let mut frame = Vec::with_capacity(HEADER + payload.len());
        frame.extend([MARK, kind as u8]);
        frame.extend(self.connection.to_be_bytes());
        frame.extend(number.to_be_bytes());
        frame.extend(payload);
        frame
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_comes_once_and_in_order_over_a_line_that_loses_every_other_datagram() {
        let mut now = Instant::now();
        let (mut here, mut there) = (Pipe::new(7, true, now), Pipe::new(7, false, now));
        let mut received = Vec::new();
        let mut carried = 0;
        for byte in 0..20 {
            here.send(vec![byte], now);
        }
        for _ in 0..200 {
            while let Some(datagram) = here.poll_transmit() {
                carried += 1;
                assert_eq!(connection(&datagram), Some(7));
                if carried % 2 == 0 {
                    received.extend(there.handle(&datagram, now));
                }
            }
            while let Some(datagram) = there.poll_transmit() {
                carried += 1;
                if carried % 2 == 0 {
                    here.handle(&datagram, now);
                }
            }
            now += Duration::from_millis(100);
            here.handle_timeout(now);
            there.handle_timeout(now);
        }
        assert_eq!(received, (0..20).collect::<Vec<u8>>());
        assert!(there.poll_timeout().is_none());
    }
}
