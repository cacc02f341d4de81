//! How datagrams leave: straight, in frames, both ways, and in pieces where a path is narrow.

use std::cell::RefCell;
use std::io::{self, ErrorKind};
use std::sync::atomic::Ordering;
use std::time::Instant;

use quinn::udp::{EcnCodepoint, Transmit};
use rendezvous_wire::relay::HEADER_LEN;
use tokio::io::Interest;

use super::remote::{Carrier, Framed, Remote, Route, SocketIndex, Straight};
use super::{PathSocket, pieces};

impl PathSocket {
    /// Sends by a route. Only `WouldBlock` is an error.
    pub(super) fn send(&self, remote: &Remote, transmit: &Transmit<'_>) -> io::Result<()> {
        match &**remote.route() {
            Route::Capture => {
                let size = transmit.segment_size.unwrap_or(transmit.contents.len()).max(1);
                for datagram in transmit.contents.chunks(size) {
                    if remote.capture(datagram) {
                        // The driver outlives the socket's use but for the moment of shutting down.
                        let _ = self.flights.send(remote.synthetic);
                    }
                }
                Ok(())
            }
            Route::Direct(direct) => self.send_straight(remote, *direct, transmit),
            Route::Relay(relay) => {
                self.send_framed(remote, relay, transmit)?;
                self.note_relayed(remote);
                Ok(())
            }
            Route::Relays { first, second } => {
                self.send_framed(remote, first, transmit)?;
                self.note_relayed(remote);
                // As above: it has left once.
                let _ = self.send_framed(remote, second, transmit);
                Ok(())
            }
            Route::Both { direct, relay } => {
                self.send_straight(remote, *direct, transmit)?;
                // It has left once: what the relay's socket cannot take is lost.
                let _ = self.send_framed(remote, relay, transmit);
                Ok(())
            }
        }
    }

    fn note_relayed(&self, remote: &Remote) {
        if remote.relay_meter.note_sent(Instant::now()) {
            let _ = self.traffic.send(remote.synthetic);
        }
    }

    fn send_straight(&self, remote: &Remote, to: Straight, transmit: &Transmit<'_>) -> io::Result<()> {
        let (socket, destination) = (to.socket, to.address);
        if segment(transmit) > pieces::NARROW && !remote.direct_is_wide.load(Ordering::Relaxed) {
            let ecn = transmit.ecn;
            in_pieces(remote, &[], transmit, |contents, size| {
                let segment_size = Some(size);
                self.send_on(socket, &Transmit { destination, ecn, contents, segment_size, src_ip: None })
            })?;
        } else {
            let (contents, segment_size) = (transmit.contents, transmit.segment_size);
            let ecn = transmit.ecn;
            self.send_on(socket, &Transmit { destination, ecn, contents, segment_size, src_ip: None })?;
        }
        remote.carried.direct_sent.fetch_add(transmit.contents.len() as u64, Ordering::Relaxed);
        if remote.meter.note_sent(Instant::now()) {
            let _ = self.traffic.send(remote.synthetic);
        }
        Ok(())
    }

    fn send_framed(&self, remote: &Remote, to: &Framed, transmit: &Transmit<'_>) -> io::Result<()> {
        let header = to.channel.header();
        let length = transmit.contents.len() as u64;
        let sent = self.send_in_frames(remote, to, header, transmit);
        if sent.is_ok() {
            remote.carried.relayed_sent.fetch_add(length, Ordering::Relaxed);
        }
        sent
    }

    fn send_in_frames(
        &self,
        remote: &Remote,
        to: &Framed,
        header: [u8; HEADER_LEN],
        transmit: &Transmit<'_>,
    ) -> io::Result<()> {
        if segment(transmit) > pieces::NARROW && !remote.relay_is_wide.load(Ordering::Relaxed) {
            return in_pieces(remote, &header, transmit, |frames, size| {
                self.send_frames(&to.carrier, transmit.ecn, frames, Some(size))
            });
        }
        with_frames(header, transmit, |contents, segment_size| {
            self.send_frames(&to.carrier, transmit.ecn, contents, segment_size)
        })
    }

    fn send_frames(
        &self,
        carrier: &Carrier,
        ecn: Option<EcnCodepoint>,
        contents: &[u8],
        segment_size: Option<usize>,
    ) -> io::Result<()> {
        match carrier {
            Carrier::Udp { socket, address } => {
                let destination = *address;
                self.send_on(*socket, &Transmit { destination, ecn, contents, segment_size, src_ip: None })
            }
            Carrier::Stream { outlet, .. } => {
                outlet.push(contents, segment_size.unwrap_or(contents.len()));
                Ok(())
            }
        }
    }

    /// Asks whether the direct path carries a datagram of full size.
    pub(crate) fn probe_straight(&self, to: Straight, nonce: [u8; 8]) {
        self.send_stun(to.socket, to.address, &pieces::probe(&[], nonce));
    }

    /// Asks whether the relayed path does.
    pub(crate) fn probe_framed(&self, to: &Framed, nonce: [u8; 8]) {
        self.send_control(to, &pieces::probe(&to.channel.header(), nonce));
    }

    /// Answers such a question.
    pub(crate) fn answer_framed(&self, to: &Framed, nonce: [u8; 8]) {
        self.send_control(to, &pieces::answer(&to.channel.header(), nonce));
    }

    fn send_control(&self, to: &Framed, frame: &[u8]) {
        match &to.carrier {
            Carrier::Udp { socket, address } => self.send_stun(*socket, *address, frame),
            Carrier::Stream { outlet, .. } => outlet.push(frame, frame.len()),
        }
    }

    /// Flushes what was captured for a remote that now has a route.
    pub(crate) fn flush(&self, remote: &Remote) {
        for datagram in remote.take_captured() {
            let transmit = Transmit {
                destination: remote.synthetic,
                ecn: None,
                contents: &datagram,
                segment_size: None,
                src_ip: None,
            };
            // A loss to QUIC.
            let _ = self.send(remote, &transmit);
        }
    }

    fn send_on(&self, socket: SocketIndex, transmit: &Transmit<'_>) -> io::Result<()> {
        let inners = self.inners.load();
        let Some(Some(inner)) = inners.get(socket) else { return Ok(()) };
        let sent = inner.io.try_io(Interest::WRITABLE, || inner.state.send(inner.sockref(), transmit));
        match sent {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.blocked.fetch_or(1 << socket, Ordering::Release);
                Err(error)
            }
            Err(error) => {
                tracing::trace!(destination = %transmit.destination, %error, "datagram not sent");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }
}

/// Gives each datagram to `send` by itself, the long ones as two pieces, with the bytes of either.
fn in_pieces(
    remote: &Remote,
    frame: &[u8],
    transmit: &Transmit<'_>,
    mut send: impl FnMut(&[u8], usize) -> io::Result<()>,
) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(2 * pieces::NARROW);
    for datagram in transmit.contents.chunks(segment(transmit)) {
        let size = if datagram.len() > pieces::NARROW {
            let number = remote.number.fetch_add(1, Ordering::Relaxed);
            pieces::split(datagram, number, frame, &mut buffer)
        } else {
            buffer.clear();
            buffer.extend_from_slice(frame);
            buffer.extend_from_slice(datagram);
            buffer.len()
        };
        send(&buffer, size)?;
    }
    Ok(())
}

/// The bytes of each datagram but the last.
fn segment(transmit: &Transmit<'_>) -> usize {
    transmit.segment_size.unwrap_or(transmit.contents.len()).max(1)
}

/// Puts a frame header before every datagram of `transmit`, in a buffer that the thread keeps.
fn with_frames<T>(
    header: [u8; HEADER_LEN],
    transmit: &Transmit<'_>,
    send: impl FnOnce(&[u8], Option<usize>) -> T,
) -> T {
    thread_local! {
        static FRAMES: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    let size = transmit.segment_size.unwrap_or(transmit.contents.len()).max(1);
    FRAMES.with_borrow_mut(|frames| {
        frames.clear();
        for datagram in transmit.contents.chunks(size) {
            frames.extend_from_slice(&header);
            frames.extend_from_slice(datagram);
        }
        send(frames, transmit.segment_size.map(|size| size + HEADER_LEN))
    })
}
