//! The relay through real sockets: who may send what to whom.

mod common;

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use common::*;
use quinn::udp::{BATCH_SIZE, RecvMeta, Transmit, UdpSocketState};
use rendezvous::Limits;
use rendezvous_wire::KeyPair;
use rendezvous_wire::message::{Introduction, NotIntroduced, Notice};
use rendezvous_wire::stun::{Class, Received, TransactionId, binding_request};
use tokio::io::Interest;

/// Two bound peers and their introduction.
async fn pair(server: &rendezvous::Server) -> (Peer, Peer, Introduction) {
    let (mut a, mut b) = (Peer::register(server).await, Peer::register(server).await);
    a.bind().await;
    b.bind().await;
    let (introduction, _) = introduce(&mut a, &mut b).await;
    (a, b, introduction)
}

#[tokio::test]
async fn both_ports_answer_strangers() {
    let server = serve().await;
    let socket = tokio::net::UdpSocket::bind((HERE, 0)).await.unwrap();
    for port in server.ports().reflection {
        let at = SocketAddr::new(HERE, port);
        socket.send_to(&binding_request(TransactionId([4; 12])).unwrap(), at).await.unwrap();
        let bytes = receive(&socket, at).await;
        let answer = Received::parse(&bytes).unwrap();
        assert_eq!(answer.class(), Class::Success);
        assert_eq!(answer.mapped_address(), Some(socket.local_addr().unwrap()));
    }
}

#[tokio::test]
async fn an_unbound_peer_gets_nothing_and_sends_nothing() {
    let server = serve().await;
    let (mut a, mut b) = (Peer::register(&server).await, Peer::register(&server).await);
    let (introduction, _) = introduce(&mut a, &mut b).await;
    a.bind().await;
    for sender in [&a, &b] {
        sender.socket.send_to(&frame(&introduction, b"early"), sender.relay).await.unwrap();
        sender.settle().await;
    }
    a.settle().await;
    b.settle().await;
    assert_eq!(server.relay_count().refused, 2);
    b.bind().await;
    a.socket.send_to(&frame(&introduction, b"now"), a.relay).await.unwrap();
    assert_eq!(b.receive().await, frame(&introduction, b"now"));
}

#[tokio::test]
async fn a_stranger_cannot_send_on_a_channel() {
    let server = serve().await;
    let (_a, b, introduction) = pair(&server).await;
    let mut bound_stranger = Peer::register(&server).await;
    bound_stranger.bind().await;
    let unbound_stranger = Peer::register(&server).await;
    for stranger in [&bound_stranger, &unbound_stranger] {
        stranger.socket.send_to(&frame(&introduction, b"x"), stranger.relay).await.unwrap();
        stranger.settle().await;
    }
    b.settle().await;
    assert_eq!((server.relay_count().refused, server.relay_count().forwarded), (2, 0));
}

#[tokio::test]
async fn a_peer_that_moves_binds_again_and_a_replay_does_not_move_it_back() {
    let server = serve().await;
    let (mut a, mut b, introduction) = pair(&server).await;
    let (_, captured) = b.bind_request();
    b.socket.send_to(&captured, b.relay).await.unwrap();
    assert_eq!(Received::parse(&b.receive().await).unwrap().class(), Class::Success);

    let old = std::mem::replace(&mut b.socket, tokio::net::UdpSocket::bind((HERE, 0)).await.unwrap());
    b.bind().await;
    a.socket.send_to(&frame(&introduction, b"hello"), a.relay).await.unwrap();
    assert_eq!(b.receive().await, frame(&introduction, b"hello"));

    let mut thief = Peer::register(&server).await;
    thief.socket = old;
    for _ in 0..3 {
        thief.socket.send_to(&captured, thief.relay).await.unwrap();
    }
    thief.settle().await;
    a.socket.send_to(&frame(&introduction, b"still"), a.relay).await.unwrap();
    assert_eq!(b.receive().await, frame(&introduction, b"still"));
    a.bind().await;
}

#[tokio::test]
async fn relayed_sessions_survive_the_loss_of_signalling_until_the_lease_lapses() {
    let server = serve_with(Limits { lease: Duration::from_secs(3), ..Limits::default() }).await;
    let (mut a, b, introduction) = pair(&server).await;
    // Anything but a goodbye.
    b.line.connection.close(77u32.into(), b"");
    loop {
        a.ask(b.id(), Vec::new()).await;
        match a.line.hear().await {
            Ok(Notice::NotIntroduced(_, NotIntroduced::Unavailable)) => break,
            Ok(Notice::Introduction(_)) => {}
            other => panic!("{other:?}"),
        }
    }
    a.bind().await;
    a.socket.send_to(&frame(&introduction, b"on"), a.relay).await.unwrap();
    assert_eq!(b.receive().await, frame(&introduction, b"on"));
    let Ok(Notice::Closed(_)) = a.line.hear().await else { panic!("not closed") };
    a.socket.send_to(&frame(&introduction, b"off"), a.relay).await.unwrap();
    a.settle().await;
    b.settle().await;
}

#[tokio::test]
async fn batches_leave_as_they_came_and_mixed_ones_are_sorted() {
    let server = serve().await;
    let (mut a, mut b, first) = pair(&server).await;
    let (second, _) = introduce(&mut a, &mut b).await;
    let mut c = Peer::register(&server).await;
    c.bind().await;
    let (third, _) = introduce(&mut a, &mut c).await;

    let frames: Vec<Vec<u8>> = (0..30u8)
        .map(|n| {
            let introduction = match n {
                0..20 => &first,
                20..25 => &second,
                _ => &third,
            };
            frame(introduction, &[n; 1196])
        })
        .collect();
    // What arrives before a socket coalesces is cut apart by the kernel.
    let [state, at_b, at_c] = [&a, &b, &c].map(|peer| UdpSocketState::new((&peer.socket).into()).unwrap());
    let batch = frames.concat();
    let segments = state.max_gso_segments().min(frames.len());
    for part in batch.chunks(1200 * segments) {
        let transmit = Transmit {
            destination: a.relay,
            ecn: None,
            contents: part,
            segment_size: Some(1200),
            src_ip: None,
        };
        a.socket
            .async_io(Interest::WRITABLE, || state.try_send((&a.socket).into(), &transmit))
            .await
            .unwrap();
    }

    let coalesces = segments > 1;
    let (at_b, largest) = receive_coalesced(&b, &at_b, 25).await;
    assert_eq!(at_b, frames[..25]);
    assert!(!coalesces || largest > 1, "20 frames on one channel left one by one");
    let (at_c, _) = receive_coalesced(&c, &at_c, 5).await;
    assert_eq!(at_c, frames[25..]);
    assert_eq!(server.relay_count().forwarded, 30);
    assert_eq!(server.relay_count().forwarded_bytes, 30 * 1200);
}

/// So many frames, and the most that one buffer held.
async fn receive_coalesced(peer: &Peer, state: &UdpSocketState, count: usize) -> (Vec<Vec<u8>>, usize) {
    let mut storage = vec![0; 65536];
    let (mut frames, mut largest) = (Vec::new(), 0);
    while frames.len() < count {
        let mut metas = [RecvMeta::default(); BATCH_SIZE];
        let receiving = peer.socket.async_io(Interest::READABLE, || {
            let slices = &mut [std::io::IoSliceMut::new(&mut storage)];
            state.recv((&peer.socket).into(), slices, &mut metas)
        });
        tokio::time::timeout(PATIENCE, receiving).await.expect("frames").unwrap();
        let buffer: Vec<_> = storage[..metas[0].len].chunks(metas[0].stride).map(<[u8]>::to_vec).collect();
        largest = largest.max(buffer.len());
        frames.extend(buffer);
    }
    (frames, largest)
}

#[tokio::test]
async fn peers_of_both_families_meet_over_the_relay() {
    let six = IpAddr::V6(Ipv6Addr::LOCALHOST);
    if std::net::UdpSocket::bind((six, 0)).is_err() {
        eprintln!("no IPv6 here: nothing to test");
        return;
    }
    let server = builder().listen(six).start().await.unwrap();
    let mut a = Peer::register(&server).await;
    let key = KeyPair::generate().unwrap();
    let Peer { line, registered, .. } = Peer::register_as(&server, key, open()).await;
    let mut b = Peer::on(line, KeyPair::generate().unwrap(), registered, six).await;
    a.bind().await;
    assert_eq!(b.bind().await, b.socket.local_addr().unwrap());
    b.ask(a.id(), Vec::new()).await;
    let introduction = b.introduction().await;
    b.socket.send_to(&frame(&introduction, b"six"), b.relay).await.unwrap();
    assert_eq!(a.receive().await, frame(&introduction, b"six"));
    a.socket.send_to(&frame(&introduction, b"four"), a.relay).await.unwrap();
    assert_eq!(b.receive().await, frame(&introduction, b"four"));
}
