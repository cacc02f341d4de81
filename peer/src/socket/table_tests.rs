//! Tests of the demultiplexing of received buffers.

use std::time::Instant;

use super::super::remote::Route;
use super::*;

const QUIC: u8 = 0xc0;
const SHORT: u8 = 0x45;

#[derive(Default)]
struct Collected {
    stun: Vec<(SocketAddr, Vec<u8>)>,
    stray: Vec<(SocketAddr, Bytes)>,
    /// Whose, in a frame or not, and what.
    control: Vec<(SocketAddr, bool, String)>,
}

impl Sink for Collected {
    fn stun(&mut self, source: SocketAddr, datagram: &[u8]) {
        self.stun.push((source, datagram.to_vec()));
    }

    fn stray(&mut self, remote: SocketAddr, datagram: Bytes) {
        self.stray.push((remote, datagram));
    }

    fn control(&mut self, remote: SocketAddr, frame: &[u8], control: Control<'_>) {
        self.control.push((remote, !frame.is_empty(), format!("{control:?}")));
    }
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

const DIRECT: &str = "203.0.113.1:1000";
const RELAY: &str = "198.51.100.1:3478";

/// Two remotes: the first is known by its source, both have a channel (1 and 2).
fn table() -> (Table, SocketAddr, SocketAddr) {
    let now = Instant::now();
    let remotes = [1, 2].map(|number| Arc::new(Remote::new(number, Route::Capture, now)));
    let [first, second] = [remotes[0].synthetic, remotes[1].synthetic];
    let mut table = Table::default();
    table.remotes.extend(remotes.map(|remote| (remote.synthetic, remote)));
    table.sources.insert(address(DIRECT), first);
    table.relays.insert(address(RELAY));
    table.channels.insert((address(RELAY), Channel::new(1).unwrap()), first);
    table.channels.insert((address(RELAY), Channel::new(2).unwrap()), second);
    (table, first, second)
}

fn run(source: &str, datagrams: &[Vec<u8>]) -> (Vec<u8>, RecvMeta, Collected) {
    let (table, ..) = table();
    let mut buffer = datagrams.concat();
    let stride = datagrams[0].len();
    let mut meta = RecvMeta {
        addr: address(source),
        len: buffer.len(),
        stride,
        ecn: None,
        dst_ip: Some(address(RELAY).ip()),
    };
    let mut sink = Collected::default();
    demux(&table, &mut buffer, &mut meta, &mut sink);
    buffer.truncate(meta.len);
    (buffer, meta, sink)
}

fn datagram(first: u8, fill: u8, length: usize) -> Vec<u8> {
    let mut datagram = vec![fill; length];
    datagram[0] = first;
    datagram
}

fn frame(channel: u32, quic: &[u8]) -> Vec<u8> {
    [&Channel::new(channel).unwrap().header()[..], quic].concat()
}

#[test]
fn a_direct_run_stays_whole_and_loses_stun_and_noise() {
    let (_, first, _) = table();
    let [a, b, c] = [1, 2, 3].map(|fill| datagram(QUIC, fill, 10));
    let short = datagram(SHORT, 4, 7);
    let stun = datagram(0, 9, 10);
    let noise = datagram(0x90, 9, 10);
    let (left, meta, sink) =
        run(DIRECT, &[a.clone(), stun.clone(), b.clone(), noise, c.clone(), short.clone()]);
    assert_eq!(left, [a, b, c, short].concat());
    assert_eq!((meta.addr, meta.stride, meta.dst_ip), (first, 10, None));
    assert_eq!(sink.stun, [(address(DIRECT), stun)]);
    assert!(sink.stray.is_empty());
}

#[test]
fn a_relay_run_of_mixed_channels_is_split() {
    let (_, first, second) = table();
    let quic: Vec<_> = (0..6).map(|fill| datagram(QUIC, fill, 20)).collect();
    let frames: Vec<_> =
        [1, 1, 2, 1, 9, 2].iter().zip(&quic).map(|(channel, quic)| frame(*channel, quic)).collect();
    let (left, meta, sink) = run(RELAY, &frames);
    assert_eq!(left, [&quic[0][..], &quic[1], &quic[3]].concat());
    assert_eq!((meta.addr, meta.stride), (first, 20));
    let strays: Vec<_> = sink.stray.iter().map(|(remote, datagram)| (*remote, datagram.to_vec())).collect();
    assert_eq!(strays, [(second, quic[2].clone()), (second, quic[5].clone())], "channel 9 is unknown");
}

#[test]
fn from_an_unknown_source_only_stun_is_taken() {
    let stun = datagram(1, 0, 20);
    let (left, meta, sink) =
        run("192.0.2.7:7", &[datagram(QUIC, 0, 20), stun.clone(), frame(1, &datagram(QUIC, 0, 16))]);
    assert!(left.is_empty() && meta.len == 0 && sink.stray.is_empty());
    assert_eq!(sink.stun.len(), 1);
}

#[test]
fn a_frame_counts_only_from_a_relay_and_only_with_quic_inside() {
    let (left, ..) = run(DIRECT, &[frame(1, &datagram(QUIC, 0, 16))]);
    assert!(left.is_empty());
    let (left, _, sink) = run(RELAY, &[frame(1, &datagram(0, 0, 16))]);
    assert!(left.is_empty() && sink.stun.is_empty());
    let (left, ..) = run(RELAY, &[frame(1, &[])]);
    assert!(left.is_empty());
}

#[test]
fn any_bytes_at_all_are_survived() {
    use rand::{Rng as _, SeedableRng as _};
    let (table, ..) = table();
    for seed in 0..20_000u64 {
        let mut random = rand::rngs::StdRng::seed_from_u64(seed);
        let length = random.random_range(0..200);
        let mut buffer: Vec<u8> = (0..length).map(|_| random.random()).collect();
        // Mostly plausible first bytes.
        for byte in buffer.iter_mut().step_by(random.random_range(1..50)) {
            *byte = *[0x20, 0x20, QUIC, SHORT, 0, 0x90].get(random.random_range(0..6)).unwrap();
        }
        let source = address([DIRECT, RELAY, "192.0.2.7:7"][random.random_range(0..3)]);
        let stride = random.random_range(0..60);
        let mut meta = RecvMeta { addr: source, len: length, stride, ecn: None, dst_ip: None };
        demux(&table, &mut buffer, &mut meta, &mut Collected::default());
        assert!(meta.len <= length, "seed {seed}");
    }
}

#[test]
fn control_is_taken_from_where_quic_is_taken_from() {
    let (_, first, second) = table();
    let probe = pieces::probe(&[], [9; 8]);
    let (buffer, _, sink) = run(DIRECT, std::slice::from_ref(&probe));
    assert_eq!((buffer.len(), sink.control.len()), (0, 1));
    assert_eq!((sink.control[0].0, sink.control[0].1), (first, false));
    let framed = pieces::answer(&Channel::new(2).unwrap().header(), [9; 8]);
    let (_, _, sink) = run(RELAY, &[framed]);
    assert_eq!((sink.control[0].0, sink.control[0].1), (second, true));
    for (source, datagram) in [("192.0.2.9:9", probe.clone()), (RELAY, probe)] {
        let (buffer, _, sink) = run(source, &[datagram]);
        assert_eq!((buffer.len(), sink.control.len(), sink.stray.len()), (0, 0, 0), "from {source}");
    }
}
