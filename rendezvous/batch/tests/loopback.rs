//! What is sent arrives as it was meant, over loopback.

use std::io::IoSliceMut;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use quinn::udp::{EcnCodepoint, RecvMeta, UdpSocketState};
use rendezvous_batch::{Batch, Datagram, MOST, Sent, drops};

struct Receiver {
    socket: UdpSocket,
    state: UdpSocketState,
}

impl Receiver {
    fn new(ip: IpAddr) -> Self {
        let socket = UdpSocket::bind((ip, 0)).unwrap();
        let state = UdpSocketState::new((&socket).into()).unwrap();
        socket.set_nonblocking(false).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        Self { socket, state }
    }

    fn address(&self) -> SocketAddr {
        self.socket.local_addr().unwrap()
    }

    /// The next datagrams, cut apart, with what is known of them.
    fn next(&self) -> (Vec<Vec<u8>>, RecvMeta) {
        let mut buffer = vec![0; 65_536];
        let mut meta = [RecvMeta::default()];
        let received =
            self.state.recv((&self.socket).into(), &mut [IoSliceMut::new(&mut buffer)], &mut meta).unwrap();
        assert_eq!(received, 1);
        let datagrams = buffer[..meta[0].len].chunks(meta[0].stride).map(<[u8]>::to_vec).collect();
        (datagrams, meta[0])
    }
}

fn plain(bytes: &[u8], to: SocketAddr) -> Datagram<'_> {
    Datagram { bytes, to, from: None, segment: None, ecn: 0 }
}

#[test]
fn more_than_one_call_takes_arrives_in_order_at_many() {
    let here = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let receivers = [Receiver::new(here), Receiver::new(here), Receiver::new(here)];
    let sender = UdpSocket::bind((here, 0)).unwrap();
    let payloads: Vec<[u8; 2]> = (0..2 * MOST as u16 + 7).map(u16::to_be_bytes).collect();
    let all = payloads.iter().enumerate().map(|(place, bytes)| plain(bytes, receivers[place % 3].address()));
    assert!(matches!(Batch::default().send(&sender, all), Sent::All));
    for (place, bytes) in payloads.iter().enumerate() {
        let (datagrams, meta) = receivers[place % 3].next();
        assert_eq!((datagrams, meta.addr), (vec![bytes.to_vec()], sender.local_addr().unwrap()));
    }
}

#[test]
fn source_mark_and_segments_are_as_asked_in_both_families() {
    let v6 = IpAddr::V6(Ipv6Addr::LOCALHOST);
    let cases = [(IpAddr::from([127, 0, 0, 1]), IpAddr::from([127, 7, 7, 7]), IpAddr::from([0, 0, 0, 0]))]
        .into_iter()
        .chain(UdpSocket::bind((v6, 0)).is_ok().then_some((v6, v6, Ipv6Addr::UNSPECIFIED.into())));
    let mut batch = Batch::default();
    for (at, source, anywhere) in cases {
        let receiver = Receiver::new(at);
        let sender = UdpSocket::bind((anywhere, 0)).unwrap();
        let long = [7; 2_500];
        let full = Datagram {
            bytes: &long,
            to: receiver.address(),
            from: Some(source),
            segment: Some(1_000),
            ecn: 0b10,
        };
        // The second has less of everything: nothing may be left of the first.
        let less = plain(&long[..9], receiver.address());
        assert!(matches!(batch.send(&sender, [full]), Sent::All));
        assert!(matches!(batch.send(&sender, [less]), Sent::All));
        let mut got = Vec::new();
        while got.iter().map(Vec::len).sum::<usize>() < long.len() {
            let (datagrams, meta) = receiver.next();
            assert_eq!((meta.addr.ip(), meta.ecn), (source, Some(EcnCodepoint::Ect0)));
            got.extend(datagrams);
        }
        assert_eq!(got.iter().map(Vec::len).collect::<Vec<_>>(), [1_000, 1_000, 500]);
        let (datagrams, meta) = receiver.next();
        assert_eq!((datagrams, meta.ecn), (vec![long[..9].to_vec()], None));
        assert_eq!(meta.addr.ip(), at, "the kernel's choice");
    }
}

#[test]
fn a_refusal_names_the_datagram() {
    let receiver = Receiver::new(Ipv4Addr::LOCALHOST.into());
    let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let too_long = vec![0; 65_536];
    let to = receiver.address();
    let batch = [plain(b"1", to), plain(b"2", to), plain(&too_long, to), plain(b"4", to)];
    let Sent::Part(2, error) = Batch::default().send(&sender, batch) else { panic!("refused at the third") };
    assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE));
    assert_eq!(receiver.next().0, [b"1"]);
    assert_eq!(receiver.next().0, [b"2"]);
    assert!(matches!(Batch::default().send(&sender, []), Sent::All));
}

#[test]
fn what_the_kernel_drops_is_counted() {
    let receiver = Receiver::new(Ipv4Addr::LOCALHOST.into());
    let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    assert_eq!(drops(&receiver.socket).unwrap(), 0);
    // Far more than any socket's buffer, and nobody reads.
    let sent = 20_000;
    let payload = [7; 1_200];
    let all = (0..sent).map(|_| plain(&payload, receiver.address()));
    assert!(matches!(Batch::default().send(&sender, all), Sent::All));
    let dropped = drops(&receiver.socket).unwrap();
    receiver.socket.set_nonblocking(true).unwrap();
    let mut buffer = [0; 2_000];
    let kept = (0..).take_while(|_| receiver.socket.recv(&mut buffer).is_ok()).count();
    assert!(dropped > 0 && kept > 0, "{dropped} dropped, {kept} kept");
    assert_eq!(dropped as usize + kept, sent);
}
