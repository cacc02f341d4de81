//! Who is who on the shared socket: synthetic addresses, real sources, relay channels; and the demultiplexing of what
//! arrives, which is pure and works in place.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use quinn::udp::RecvMeta;
use rendezvous_wire::demux::{Protocol, classify};
use rendezvous_wire::relay::{Channel, HEADER_LEN};

use super::pieces::{self, Control};
use super::remote::Remote;

/// What the packet path looks up. Replaced as a whole on every change, read without a lock.
#[derive(Debug, Clone, Default)]
pub(crate) struct Table {
    /// By the synthetic address that quinn sends to.
    pub(crate) remotes: HashMap<SocketAddr, Arc<Remote>>,
    /// Real sources whose QUIC belongs to a remote, by its synthetic address.
    pub(crate) sources: HashMap<SocketAddr, SocketAddr>,
    /// Relay channels, by the relay's address.
    pub(crate) channels: HashMap<(SocketAddr, Channel), SocketAddr>,
    /// The relays' addresses: what comes from these with a frame header is a frame.
    pub(crate) relays: HashSet<SocketAddr>,
}

impl Table {
    /// The synthetic address that this datagram's QUIC belongs to, and where its QUIC begins.
    fn owner(&self, source: SocketAddr, datagram: &[u8]) -> Option<(SocketAddr, usize)> {
        match classify(datagram) {
            Protocol::Quic => self.sources.get(&source).map(|remote| (*remote, 0)),
            Protocol::Relay if self.relays.contains(&source) => {
                self.framed(source, datagram).map(|remote| (remote, HEADER_LEN))
            }
            _ => None,
        }
    }

    /// The synthetic address that the QUIC in a relay's frame belongs to.
    pub(super) fn framed(&self, relay: SocketAddr, frame: &[u8]) -> Option<SocketAddr> {
        (classify(frame.get(HEADER_LEN..)?) == Protocol::Quic).then(|| self.channel(relay, frame)).flatten()
    }

    /// The synthetic address that a relay's frame belongs to.
    pub(super) fn channel(&self, relay: SocketAddr, frame: &[u8]) -> Option<SocketAddr> {
        self.channels.get(&(relay, Channel::of(frame)?)).copied()
    }

    /// The same for what the other side's path socket says to ours: it comes from where its QUIC comes from.
    fn control(&self, source: SocketAddr, datagram: &[u8]) -> Option<(SocketAddr, usize)> {
        if self.relays.contains(&source) {
            return Some((self.channel(source, datagram)?, HEADER_LEN));
        }
        (classify(datagram) == Protocol::Relay)
            .then(|| self.sources.get(&source))
            .flatten()
            .map(|remote| (*remote, 0))
    }
}

/// What [`demux`] takes out of a buffer, since quinn must not see it there.
pub(crate) trait Sink {
    /// A STUN message.
    fn stun(&mut self, source: SocketAddr, datagram: &[u8]);
    /// A QUIC datagram that does not fit the run in place: of another remote, or after a shorter one.
    fn stray(&mut self, remote: SocketAddr, datagram: Bytes);
    /// What the other side's path socket says: behind `frame`, a relay's header or nothing.
    fn control(&mut self, remote: SocketAddr, frame: &[u8], control: Control<'_>);
}

/// Sorts one received buffer, which GRO may have made of many datagrams: leaves in it one run of QUIC datagrams of one remote,
/// described by `meta` under the remote's synthetic address; everything else goes to the sink or nowhere. `meta.len` is 0 when nothing is left.
///
/// Every datagram is looked at: GRO merges whatever has the same source and size.
pub(crate) fn demux(table: &Table, buffer: &mut [u8], meta: &mut RecvMeta, sink: &mut impl Sink) {
    let source = meta.addr;
    let length = meta.len.min(buffer.len());
    let stride = if meta.stride == 0 { length.max(1) } else { meta.stride };
    let mut run: Option<(SocketAddr, usize)> = None;
    let mut ended = false;
    let mut kept = 0;
    let mut start = 0;
    while start < length {
        let end = (start + stride).min(length);
        let datagram = &buffer[start..end];
        if classify(datagram) == Protocol::Stun {
            sink.stun(source, datagram);
        } else if let Some((remote, skip)) = table.owner(source, datagram) {
            let size = datagram.len() - skip;
            let (run_remote, run_stride) = *run.get_or_insert((remote, size));
            if run_remote == remote && size <= run_stride && !ended {
                buffer.copy_within(start + skip..end, kept);
                kept += size;
                ended = size < run_stride;
            } else {
                sink.stray(remote, Bytes::copy_from_slice(&buffer[start + skip..end]));
            }
        } else if let Some((remote, skip)) = table.control(source, datagram) {
            let (frame, datagram) = datagram.split_at(skip);
            if let Some(control) = pieces::parse(datagram) {
                sink.control(remote, frame, control);
            }
        }
        start = end;
    }
    meta.len = kept;
    // A connection must not learn addresses that a switch makes stale.
    meta.dst_ip = None;
    if let Some((remote, stride)) = run {
        meta.addr = remote;
        meta.stride = stride;
    }
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
