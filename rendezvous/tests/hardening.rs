//! What a server does with peers that are wrong, slow, greedy or hostile.

mod common;

use std::net::SocketAddr;

use common::*;
use quinn::{ConnectionError, TransportConfig, VarInt};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use rendezvous::Limits;
use rendezvous::limits::Rate;
use rendezvous_wire::KeyPair;
use rendezvous_wire::message::{Introduce, NotIntroduced, Notice, Purpose, Request, RequestId, close_code};

#[tokio::test]
async fn offline_and_closed_peers_look_the_same() {
    let server = serve().await;
    let closed = Peer::register_as(&server, KeyPair::generate().unwrap(), closed()).await;
    let mut asker = Peer::register(&server).await;
    for target in [closed.id(), KeyPair::generate().unwrap().id()] {
        asker.ask(target, Vec::new()).await;
        assert_eq!(asker.refusal().await, NotIntroduced::Unavailable);
    }
}

#[tokio::test]
async fn a_server_with_another_key_is_not_talked_to() {
    let server = serve().await;
    let key = KeyPair::generate().unwrap();
    let result = connect_expecting(&server, &key, KeyPair::generate().unwrap().id()).await;
    assert!(matches!(result.err(), Some(ConnectionError::TransportError(_))));
}

#[tokio::test]
async fn a_malformed_message_ends_that_connection_alone() {
    let server = serve().await;
    let (mut good, bad) = (Peer::register(&server).await, Peer::register(&server).await);
    let mut line = bad.line;
    line.send.write_all(&[0, 3, 0xff, 0xff, 0xff]).await.unwrap();
    assert_eq!(line.close_code().await, close_code::MALFORMED);
    good.ask(good.id(), Vec::new()).await;
    assert_eq!(good.refusal().await, NotIntroduced::Oneself);
}

#[tokio::test]
async fn whoever_does_not_register_first_is_turned_away() {
    let server = serve().await;
    let mut line = connect(&server, &KeyPair::generate().unwrap()).await;
    let target = KeyPair::generate().unwrap().id();
    let introduce =
        Introduce { request: RequestId(1), target, purpose: Purpose::Session, first_flight: Vec::new() };
    line.tell(&Request::Introduce(introduce)).await;
    assert_eq!(line.close_code().await, close_code::NOT_REGISTERED);

    let mut twice = Peer::register(&server).await;
    twice.line.tell(&Request::Register(open())).await;
    assert_eq!(twice.line.close_code().await, close_code::MALFORMED);
}

#[tokio::test]
async fn whoever_says_nothing_is_turned_away() {
    let server = serve().await;
    // The stream exists for the server once something is sent on it: half a length will do.
    let mut line = connect(&server, &KeyPair::generate().unwrap()).await;
    line.send.write_all(&[0]).await.unwrap();
    assert_eq!(line.close_code().await, close_code::NOT_REGISTERED);
}

#[tokio::test]
async fn asking_too_often_is_answered_with_too_many() {
    let limits = Limits { introducing: Rate::new(2, 1), ..Limits::default() };
    let server = serve_with(limits).await;
    let (mut asker, target) = (Peer::register(&server).await, Peer::register(&server).await);
    for _ in 0..10 {
        asker.ask(target.id(), Vec::new()).await;
    }
    asker.introduction().await;
    asker.introduction().await;
    let mut refused = 0;
    for _ in 2..10 {
        match asker.line.hear().await.unwrap() {
            Notice::NotIntroduced(_, reason) => {
                assert_eq!(reason, NotIntroduced::TooMany);
                refused += 1;
            }
            other => assert!(matches!(other, Notice::Introduction(_))),
        }
    }
    assert!(refused > 0, "ten introductions at once, where two are allowed");
}

#[tokio::test]
async fn a_full_server_refuses_and_has_room_again() {
    let server = serve_with(Limits { registrations: 1, ..Limits::default() }).await;
    let only = Peer::register(&server).await;
    let mut line = connect(&server, &KeyPair::generate().unwrap()).await;
    line.tell(&Request::Register(open())).await;
    assert_eq!(line.close_code().await, close_code::REFUSED);
    only.line.connection.close(close_code::SHUTDOWN.into(), b"");
    loop {
        let mut line = connect(&server, &KeyPair::generate().unwrap()).await;
        line.tell(&Request::Register(open())).await;
        match line.hear().await {
            Ok(notice) => break assert!(matches!(notice, Notice::Registered(_))),
            Err(error) => assert!(matches!(error, ConnectionError::ApplicationClosed(_))),
        }
    }
}

#[tokio::test]
async fn connecting_too_often_takes_a_proof_of_address_and_is_then_refused() {
    let limits = Limits { connecting: Rate::new(1, 1), ..Limits::default() };
    let server = serve_with(limits).await;
    let key = KeyPair::generate().unwrap();
    let mut outcomes = Vec::new();
    for _ in 0..10 {
        match connect_expecting(&server, &key, server.id()).await {
            Ok(_) => outcomes.push("connected"),
            Err(ConnectionError::ConnectionClosed(_)) => outcomes.push("refused"),
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(outcomes[..2], ["connected"; 2], "one at once, one after a Retry");
    assert!(outcomes.contains(&"refused"), "ten connections within a second were let in");
}

#[tokio::test]
async fn the_newest_process_of_a_peer_replaces_the_oldest() {
    let server = serve_with(Limits { registrations_per_peer: 1, ..Limits::default() }).await;
    let key = KeyPair::generate().unwrap();
    let again = KeyPair::from_pem(&key.to_pem()).unwrap();
    let old = Peer::register_as(&server, key, open()).await;
    let mut new = Peer::register_as(&server, again, open()).await;
    assert_eq!(old.line.close_code().await, close_code::REFUSED);
    let mut asker = Peer::register(&server).await;
    introduce(&mut asker, &mut new).await;
}

#[tokio::test]
async fn a_peer_that_does_not_read_is_dropped() {
    let generous = Rate::new(10_000, 10_000);
    let limits = Limits {
        queued_bytes: 16 * 1024,
        introductions_per_pair: 10_000,
        asked_per_registration: 10_000,
        introducing: generous,
        introducing_per_source: generous,
        ..Limits::default()
    };
    let server = serve_with(limits).await;
    let mut narrow = TransportConfig::default();
    narrow.stream_receive_window(VarInt::from_u32(1024));
    let key = KeyPair::generate().unwrap();
    let mut deaf = connect_with(&server, &key, server.id(), narrow).await.unwrap();
    deaf.tell(&Request::Register(open())).await;
    let Ok(Notice::Registered(_)) = deaf.hear().await else { panic!("not registered") };

    let mut asker = Peer::register(&server).await;
    let flight = vec![vec![0; 1200]; 4];
    let mut asked = 0;
    while deaf.connection.close_reason().is_none() {
        asker.ask(key.id(), flight.clone()).await;
        asker.line.hear().await.unwrap();
        asked += 1;
        assert!(asked < 1_000, "the server keeps what nobody reads");
    }
    assert_eq!(deaf.close_code().await, close_code::TOO_SLOW);
    let mut other = Peer::register(&server).await;
    introduce(&mut asker, &mut other).await;
}

#[tokio::test]
async fn garbage_on_every_port_disturbs_nobody() {
    let server = serve().await;
    let (mut a, mut b) = (Peer::register(&server).await, Peer::register(&server).await);
    a.bind().await;
    b.bind().await;
    let (introduction, _) = introduce(&mut a, &mut b).await;

    let ports = [server.ports().signalling, server.ports().reflection[0], server.ports().reflection[1]];
    let mut rng = StdRng::seed_from_u64(3);
    let noise = tokio::net::UdpSocket::bind((HERE, 0)).await.unwrap();
    let (_, bind_request) = a.bind_request();
    let samples = [introduction.channel.header().to_vec(), bind_request, vec![0xc0; 1200], vec![0x40; 40]];
    for round in 0..200u8 {
        for port in ports {
            let mut datagram = samples[rng.random_range(0..samples.len())].clone();
            datagram.resize(rng.random_range(0..1400), round);
            if !datagram.is_empty() && rng.random() {
                let place = rng.random_range(0..datagram.len());
                rng.fill_bytes(&mut datagram[place..]);
            }
            noise.send_to(&datagram, SocketAddr::new(HERE, port)).await.unwrap();
        }
        let out = frame(&introduction, &[round; 100]);
        a.socket.send_to(&out, a.relay).await.unwrap();
        assert_eq!(b.receive().await, out);
    }
    let mut c = Peer::register(&server).await;
    introduce(&mut c, &mut a).await;
}
