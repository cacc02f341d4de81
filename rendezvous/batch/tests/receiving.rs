//! What arrives is told as it was sent, over loopback.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

use quinn::udp::UdpSocketState;
use rendezvous_batch::{Arrival, Batch, Datagram, MOST, Receiver, Sent, without_destinations};

/// A socket with the options of the server's, which receives without waiting.
fn socket(ip: IpAddr) -> UdpSocket {
    let socket = UdpSocket::bind((ip, 0)).unwrap();
    UdpSocketState::new((&socket).into()).unwrap();
    socket
}

fn send(from: &UdpSocket, datagrams: &[Datagram<'_>]) {
    // Over loopback a datagram waits at its destination when the call returns.
    assert!(matches!(Batch::default().send(from, datagrams.iter().copied()), Sent::All));
}

fn plain<'a>(bytes: &'a [u8], to: &UdpSocket) -> Datagram<'a> {
    Datagram { bytes, to: to.local_addr().unwrap(), from: None, segment: None, ecn: 0 }
}

#[test]
fn a_batch_holds_what_waits_and_no_more_than_is_asked_for() {
    let (sender, receiver) = (socket(Ipv4Addr::LOCALHOST.into()), socket(Ipv4Addr::LOCALHOST.into()));
    let mut batch = Receiver::default();
    let nothing = batch.receive(&receiver, MOST).unwrap_err();
    assert_eq!((nothing.kind(), batch.arrivals().count()), (ErrorKind::WouldBlock, 0));
    // Of different lengths, each longer than the one before: nothing coalesces them.
    let payloads: Vec<Vec<u8>> = (1..=MOST + 9).map(|length| vec![7; length]).collect();
    let all: Vec<_> = payloads.iter().map(|bytes| plain(bytes, &receiver)).collect();
    send(&sender, &all);
    let mut got = Vec::new();
    for (offer, expected) in [(4, 4), (usize::MAX, MOST), (MOST, 5)] {
        assert_eq!(batch.receive(&receiver, offer).unwrap(), expected);
        got.extend(batch.arrivals().map(|arrival| arrival.bytes.to_vec()));
    }
    assert_eq!(got, payloads);
    assert!(batch.receive(&receiver, MOST).is_err());
    // What was taken before is gone.
    assert_eq!(batch.arrivals().count(), 0);
}

#[test]
fn sender_destination_mark_and_segments_are_told_in_both_families() {
    let v6 = IpAddr::V6(Ipv6Addr::LOCALHOST);
    let cases = [(IpAddr::from([127, 7, 7, 7]), IpAddr::from([0, 0, 0, 0]))]
        .into_iter()
        .chain(UdpSocket::bind((v6, 0)).is_ok().then_some((v6, Ipv6Addr::UNSPECIFIED.into())));
    for (at, anywhere) in cases {
        let (sender, receiver) = (socket(at), socket(anywhere));
        let mut to = receiver.local_addr().unwrap();
        to.set_ip(at);
        let long = [7; 2_500];
        let coalesced = Datagram { bytes: &long, to, from: None, segment: Some(1_000), ecn: 0b11 };
        let alone = Datagram { segment: None, ecn: 0, bytes: &long[..9], ..coalesced };
        let empty = Datagram { bytes: &[], ..alone };
        send(&sender, &[coalesced, alone, empty]);
        let mut batch = Receiver::default();
        let (mut got, mut last) = (Vec::new(), None);
        while batch.receive(&receiver, 2).is_ok() {
            for arrival in batch.arrivals() {
                assert_eq!((arrival.from, arrival.to), (sender.local_addr().unwrap(), Some(at)));
                assert!(arrival.bytes.is_empty() || arrival.segment <= arrival.bytes.len());
                let mut cut: Vec<_> = arrival.bytes.chunks(arrival.segment).map(<[u8]>::len).collect();
                cut.extend(arrival.bytes.is_empty().then_some(0));
                got.extend(cut.into_iter().map(|length| (length, arrival.ecn)));
                last = Some((arrival.bytes.len(), arrival.segment));
            }
        }
        assert_eq!(got, [(1_000, 0b11), (1_000, 0b11), (500, 0b11), (9, 0), (0, 0)]);
        assert_eq!(last, Some((0, 1)), "nothing of the longer ones is left");
    }
}

#[test]
fn a_socket_that_is_not_asked_for_destinations_tells_none() {
    let (sender, receiver) = (socket(Ipv4Addr::LOCALHOST.into()), socket(Ipv4Addr::LOCALHOST.into()));
    without_destinations(&receiver).unwrap();
    send(&sender, &[Datagram { ecn: 0b01, ..plain(b"any", &receiver) }]);
    let mut batch = Receiver::default();
    assert_eq!(batch.receive(&receiver, 1).unwrap(), 1);
    let expected =
        Arrival { bytes: b"any", from: sender.local_addr().unwrap(), to: None, segment: 3, ecn: 0b01 };
    assert_eq!(batch.arrivals().collect::<Vec<_>>(), [expected]);
}
