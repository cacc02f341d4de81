//! Tests of the path socket over real sockets on loopback.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use rendezvous_wire::relay::{Channel, HEADER_LEN};

use super::*;

fn bound() -> std::net::UdpSocket {
    let socket = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket
}

/// A path socket, and a plain socket that stands for whoever it talks to.
async fn pair() -> (Arc<PathSocket>, Outlets, std::net::UdpSocket, SocketAddr) {
    let (socket, outlets) = PathSocket::new(vec![bound()]).unwrap();
    // Until the runtime has looked at the socket, it would block.
    socket.inner(0).unwrap().io.writable().await.unwrap();
    let other = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    other.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let address = other.local_addr().unwrap();
    (socket, outlets, other, address)
}

fn add(socket: &PathSocket, route: Route) -> Arc<Remote> {
    let remote = Arc::new(Remote::new(7, route, Instant::now()));
    socket.update(|table| {
        table.remotes.insert(remote.synthetic, remote.clone());
    });
    remote
}

fn transmit(remote: &Remote, contents: &[u8], segment_size: Option<usize>, send: impl FnOnce(&Transmit<'_>)) {
    send(&Transmit { destination: remote.synthetic, ecn: None, contents, segment_size, src_ip: None });
}

/// A batch as quinn makes it: datagrams of one size, the last one shorter, each with a QUIC first byte.
fn batch(size: usize, count: usize, last: usize) -> Vec<u8> {
    let mut batch = Vec::new();
    for number in 0..count {
        let start = batch.len();
        batch.resize(start + if number + 1 == count { last } else { size }, number as u8);
        batch[start] = 0xc0;
    }
    batch
}

/// Reads what quinn would: datagrams with their sources.
async fn receive(socket: &PathSocket) -> Vec<(SocketAddr, Vec<u8>)> {
    let mut storage = vec![vec![0; 65_536]; quinn::udp::BATCH_SIZE];
    let mut meta = [RecvMeta::default(); quinn::udp::BATCH_SIZE];
    let read = std::future::poll_fn(|cx| {
        let mut buffers: Vec<_> = storage.iter_mut().map(|buffer| IoSliceMut::new(buffer)).collect();
        socket.poll_recv(cx, &mut buffers, &mut meta)
    });
    let count = tokio::time::timeout(Duration::from_secs(10), read).await.unwrap().unwrap();
    let mut datagrams = Vec::new();
    for (buffer, meta) in storage.iter().zip(&meta).take(count).filter(|(_, meta)| meta.len > 0) {
        datagrams
            .extend(buffer[..meta.len].chunks(meta.stride).map(|datagram| (meta.addr, datagram.to_vec())));
    }
    datagrams
}

#[tokio::test]
async fn a_batch_goes_through_a_relay_and_back_whole_and_in_order() {
    let (socket, _outlets, relay, address) = pair().await;
    let channel = Channel::new(5).unwrap();
    let remote = add(&socket, Route::Relay(Framed { carrier: Carrier::Udp { socket: 0, address }, channel }));
    socket.update(|table| {
        table.relays.insert(address);
        table.channels.insert((address, channel), remote.synthetic);
    });
    let contents = batch(1200, 10, 700);
    transmit(&remote, &contents, Some(1200), |transmit| socket.try_send(transmit).unwrap());
    let mut buffer = [0; 2000];
    for datagram in contents.chunks(1200) {
        let (length, source) = relay.recv_from(&mut buffer).unwrap();
        assert_eq!(buffer[..HEADER_LEN], channel.header());
        assert_eq!(&buffer[HEADER_LEN..length], datagram);
        relay.send_to(&buffer[..length], source).unwrap();
    }
    let mut seen = Vec::new();
    while seen.len() < 10 {
        seen.extend(receive(&socket).await);
    }
    assert!(seen.iter().all(|(source, _)| *source == remote.synthetic));
    assert_eq!(seen.into_iter().flat_map(|(_, datagram)| datagram).collect::<Vec<_>>(), contents);
}

#[tokio::test]
async fn a_switch_changes_where_the_same_remote_is_reached() {
    let (socket, _outlets, first, first_address) = pair().await;
    let second = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    second.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let remote = add(&socket, Route::Direct(Straight { socket: 0, address: first_address }));
    let mut buffer = [0; 100];
    for receiver in [&first, &second] {
        let address = receiver.local_addr().unwrap();
        remote.switch(Route::Direct(Straight { socket: 0, address }), Instant::now());
        transmit(&remote, &[0xc0, 1, 2], None, |transmit| socket.try_send(transmit).unwrap());
        assert_eq!(receiver.recv(&mut buffer).unwrap(), 3);
    }
    assert!(!remote.switch(
        Route::Direct(Straight { socket: 0, address: second.local_addr().unwrap() }),
        Instant::now()
    ));
}

#[tokio::test]
async fn a_first_flight_is_captured_told_of_once_and_flushed() {
    let (socket, mut outlets, other, address) = pair().await;
    let remote = add(&socket, Route::Capture);
    for number in 0..3 {
        transmit(&remote, &[0xc0, number], None, |transmit| socket.try_send(transmit).unwrap());
    }
    assert_eq!(outlets.flights.try_recv().unwrap(), remote.synthetic);
    assert!(outlets.flights.try_recv().is_err(), "told of more than once");
    remote.switch(Route::Direct(Straight { socket: 0, address }), Instant::now());
    socket.flush(&remote);
    let mut buffer = [0; 100];
    for number in 0..3 {
        assert_eq!(other.recv(&mut buffer).unwrap(), 2);
        assert_eq!(buffer[1], number);
    }
    assert!(remote.take_captured().is_empty());
}

#[tokio::test]
async fn stun_leaves_by_its_own_door_and_injected_datagrams_come_in() {
    let (socket, mut outlets, other, address) = pair().await;
    let remote = add(&socket, Route::Direct(Straight { socket: 0, address }));
    let own = socket.local_addresses()[0];
    other.send_to(&[0, 1, 2, 3], own).unwrap();
    // QUIC of a stranger: dropped.
    other.send_to(&[0xc0, 9], own).unwrap();
    socket.update(|table| {
        table.sources.insert(address, remote.synthetic);
    });
    other.send_to(&[0xc0, 7, 7], own).unwrap();
    let mut seen = Vec::new();
    while !seen.iter().any(|(_, datagram)| *datagram == [0xc0, 7, 7]) {
        seen.extend(receive(&socket).await);
    }
    let stun = outlets.stun.recv().await.unwrap();
    assert_eq!((stun.socket, stun.source, &stun.bytes[..]), (0, address, &[0u8, 1, 2, 3][..]));
    socket.inject(remote.synthetic, Bytes::from_static(&[0xc1, 1]));
    assert_eq!(receive(&socket).await, [(remote.synthetic, vec![0xc1, 1])]);
}

#[tokio::test]
async fn no_error_but_would_block_reaches_quinn() {
    let (socket, _outlets, _other, _) = pair().await;
    // No route to an IPv6 address from an IPv4 socket; no remote at all.
    let remote =
        add(&socket, Route::Direct(Straight { socket: 0, address: "[2001:db8::1]:9".parse().unwrap() }));
    transmit(&remote, &[0xc0], None, |transmit| socket.try_send(transmit).unwrap());
    let stranger = Remote::new(8, Route::Capture, Instant::now());
    transmit(&stranger, &[0xc0], None, |transmit| socket.try_send(transmit).unwrap());
    let remote = Arc::new(Remote::new(
        9,
        Route::Direct(Straight { socket: 3, address: "192.0.2.1:9".parse().unwrap() }),
        Instant::now(),
    ));
    socket.update(|table| {
        table.remotes.insert(remote.synthetic, remote.clone());
    });
    transmit(&remote, &[0xc0], None, |transmit| socket.try_send(transmit).unwrap());
}

#[tokio::test]
async fn what_came_while_the_process_slept_is_not_read() {
    let (socket, _outlets, other, address) = pair().await;
    let remote = add(&socket, Route::Direct(Straight { socket: 0, address }));
    socket.update(|table| {
        table.sources.insert(address, remote.synthetic);
    });
    let channel = Channel::new(7).unwrap();
    socket.update(|table| {
        table.channels.insert((address, channel), remote.synthetic);
    });
    let mut frame = channel.header().to_vec();
    frame.extend([0xc0, 21]);
    let waiting = || socket.injected.lock().unwrap().len();
    socket.receive_frames(address, &Bytes::from(frame.clone()), frame.len());
    assert_eq!(waiting(), 1);
    socket.injected.lock().unwrap().clear();
    let here = socket.own[0];
    for number in 0..20 {
        other.send_to(&[0xc0, number], here).unwrap();
    }
    // The watch over the network notices first.
    socket.beat(Instant::now() + ASLEEP);
    other.send_to(&[0xc0, 20], here).unwrap();
    assert_eq!(receive(&socket).await, [(remote.synthetic, vec![0xc0, 20])]);
    // A stream's are dropped for a while.
    socket.receive_frames(address, &Bytes::from(frame.clone()), frame.len());
    assert_eq!(waiting(), 0);
}

#[tokio::test]
async fn an_adopted_socket_carries_quic_both_ways_and_can_be_released() {
    let (socket, _outlets, other, address) = pair().await;
    let waiting = {
        let socket = socket.clone();
        tokio::spawn(async move { receive(&socket).await })
    };
    // The reader is asleep on the first socket when the second one comes.
    tokio::task::yield_now().await;
    let extra = Arc::new(UdpSocket::from_std(bound()).unwrap());
    extra.writable().await.unwrap();
    let extra_address = extra.local_addr().unwrap();
    let index = socket.adopt(extra).unwrap();
    let remote = add(&socket, Route::Direct(Straight { socket: index, address }));
    socket.update(|table| {
        table.sources.insert(address, remote.synthetic);
    });
    other.send_to(&[0xc0, 3], extra_address).unwrap();
    assert_eq!(waiting.await.unwrap(), [(remote.synthetic, vec![0xc0, 3])]);
    transmit(&remote, &[0xc0, 4], None, |transmit| socket.try_send(transmit).unwrap());
    let mut buffer = [0; 100];
    let (length, source) = other.recv_from(&mut buffer).unwrap();
    assert_eq!((length, source), (2, extra_address));
    socket.release(index);
    transmit(&remote, &[0xc0, 5], None, |transmit| socket.try_send(transmit).unwrap());
    assert_eq!(
        socket.adopt(Arc::new(UdpSocket::from_std(bound()).unwrap())),
        Some(index),
        "the slot is free again"
    );
}

#[tokio::test]
async fn a_doubtful_route_sends_everything_twice() {
    let (socket, _outlets, other, address) = pair().await;
    let relay = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    relay.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let channel = Channel::new(20).unwrap();
    let framed =
        Framed { carrier: Carrier::Udp { socket: 0, address: relay.local_addr().unwrap() }, channel };
    let remote = add(&socket, Route::Both { direct: Straight { socket: 0, address }, relay: framed });
    transmit(&remote, b"\xc0abc", None, |transmit| socket.try_send(transmit).unwrap());
    let mut buffer = [0; 100];
    let length = other.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"\xc0abc");
    let length = relay.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[HEADER_LEN..length], b"\xc0abc");
}

#[tokio::test]
async fn the_driver_hears_of_unanswered_traffic_and_of_copies() {
    let (socket, mut outlets, other, address) = pair().await;
    let relay = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let relay_address = relay.local_addr().unwrap();
    let channel = Channel::new(20).unwrap();
    let remote = add(&socket, Route::Direct(Straight { socket: 0, address }));
    socket.update(|table| {
        table.sources.insert(address, remote.synthetic);
        table.relays.insert(relay_address);
        table.channels.insert((relay_address, channel), remote.synthetic);
    });
    for _ in 0..3 {
        transmit(&remote, b"\xc0abc", None, |transmit| socket.try_send(transmit).unwrap());
    }
    assert_eq!(outlets.traffic.try_recv(), Ok(remote.synthetic));
    assert!(outlets.traffic.try_recv().is_err(), "once is enough");
    assert!(remote.meter.take().unanswered_since.is_some());
    let own = socket.local_addresses()[0];
    other.send_to(b"\xc0def", own).unwrap();
    receive(&socket).await;
    assert_eq!(remote.meter.take(), peer_agent::Traffic::default());
    let mut frame = channel.header().to_vec();
    frame.extend(b"\xc0ghi");
    relay.send_to(&frame, own).unwrap();
    receive(&socket).await;
    assert_eq!(outlets.traffic.try_recv(), Ok(remote.synthetic));
    assert!(remote.meter.take().relayed);
}
