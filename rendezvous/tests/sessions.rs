//! What peers do with a server when all goes well: register, meet, talk over the relay, part.

mod common;

use std::net::SocketAddr;

use common::*;
use rendezvous::Limits;
use rendezvous_wire::KeyPair;
use rendezvous_wire::candidate::{Candidate, CandidateKind, Mapping, PortAllocation};
use rendezvous_wire::message::{
    IntroductionPolicy, NotIntroduced, Notice, Register, Request, Role, close_code,
};

#[tokio::test]
async fn a_registration_tells_what_the_server_sees() {
    let server = serve().await;
    let peer = Peer::register(&server).await;
    assert_eq!(peer.registered.observed, peer.line.endpoint.local_addr().unwrap());
    assert_eq!(peer.registered.reflection_ports, server.ports().reflection);
    assert_eq!(u64::from(peer.registered.lease), Limits::default().lease.as_secs());
}

#[tokio::test]
async fn both_sides_are_introduced_and_talk_over_the_relay() {
    let server = serve().await;
    let mut listener = Peer::register(&server).await;
    let mut dialler = Peer::register_as(&server, KeyPair::generate().unwrap(), closed()).await;
    assert_eq!(listener.bind().await, listener.socket.local_addr().unwrap());
    dialler.bind().await;

    let flight = vec![vec![0xc0; 1200], vec![0x40; 30]];
    let request = dialler.ask(listener.id(), flight.clone()).await;
    let (to_dialler, to_listener) = (dialler.introduction().await, listener.introduction().await);
    assert_eq!(to_dialler.request, Some(request));
    assert_eq!((to_dialler.peer, to_listener.peer), (listener.id(), dialler.id()));
    assert_eq!((to_dialler.role, to_listener.role), (Role::Controlling, Role::Controlled));
    assert_eq!((&to_dialler.local, &to_dialler.remote), (&to_listener.remote, &to_listener.local));
    assert_eq!(to_dialler.channel, to_listener.channel);
    assert_eq!((to_dialler.first_flight.len(), &to_listener.first_flight), (0, &flight));

    for payload in [b"a".to_vec(), b"b".repeat(1448), b"c".repeat(1496)] {
        let out = frame(&to_dialler, &payload);
        dialler.socket.send_to(&out, dialler.relay).await.unwrap();
        assert_eq!(listener.receive().await, out);
        listener.socket.send_to(&out, listener.relay).await.unwrap();
        assert_eq!(dialler.receive().await, out);
    }
}

#[tokio::test]
async fn candidates_mapping_and_policy_can_be_updated() {
    let server = serve().await;
    let mut listener = Peer::register_as(&server, KeyPair::generate().unwrap(), closed()).await;
    let mut dialler = Peer::register(&server).await;
    dialler.ask(listener.id(), Vec::new()).await;
    assert_eq!(dialler.refusal().await, NotIntroduced::Unavailable);

    let host = Candidate::new(CandidateKind::Host, "192.0.2.5:9".parse::<SocketAddr>().unwrap(), 3);
    let loopback = Candidate::new(CandidateKind::Host, "127.0.0.1:9".parse::<SocketAddr>().unwrap(), 3);
    let says = Register {
        instance: 1,
        candidates: vec![host, loopback],
        mapping: Mapping::AddressAndPortDependent(PortAllocation::Random),
        policy: IntroductionPolicy::Only(vec![dialler.id()]),
    };
    listener.line.tell(&Request::Update(says)).await;
    // The listener's own question is answered after its update was taken.
    listener.ask(listener.id(), Vec::new()).await;
    assert_eq!(listener.refusal().await, NotIntroduced::Oneself);
    let (to_dialler, _) = introduce(&mut dialler, &mut listener).await;
    assert_eq!(to_dialler.candidates, [host]);
    assert_eq!(to_dialler.mapping, Mapping::AddressAndPortDependent(PortAllocation::Random));
}

#[tokio::test]
async fn closing_an_introduction_ends_its_channel_and_tells_the_other() {
    let server = serve().await;
    let (mut a, mut b) = (Peer::register(&server).await, Peer::register(&server).await);
    a.bind().await;
    b.bind().await;
    let (to_a, _) = introduce(&mut a, &mut b).await;
    let (kept, _) = introduce(&mut a, &mut b).await;
    b.line.tell(&Request::Close(to_a.introduction)).await;
    assert_eq!(a.line.hear().await, Ok(Notice::Closed(to_a.introduction)));
    for introduction in [&to_a, &kept] {
        a.socket.send_to(&frame(introduction, b"x"), a.relay).await.unwrap();
    }
    assert_eq!(b.receive().await, frame(&kept, b"x"));
}

#[tokio::test]
async fn a_goodbye_ends_everything_at_once() {
    let server = serve().await;
    let (mut a, mut b) = (Peer::register(&server).await, Peer::register(&server).await);
    a.bind().await;
    b.bind().await;
    let (to_a, _) = introduce(&mut a, &mut b).await;
    b.line.connection.close(close_code::SHUTDOWN.into(), b"bye");
    assert_eq!(a.line.hear().await, Ok(Notice::Closed(to_a.introduction)));
    a.ask(b.id(), Vec::new()).await;
    assert_eq!(a.refusal().await, NotIntroduced::Unavailable);
    a.socket.send_to(&frame(&to_a, b"x"), a.relay).await.unwrap();
    a.settle().await;
    b.settle().await;
    assert_eq!(server.relay_count().refused, 1);
}

#[tokio::test]
async fn peers_are_told_when_the_server_goes() {
    let server = serve().await;
    let peer = Peer::register(&server).await;
    let stopping = tokio::spawn(server.shutdown());
    assert_eq!(peer.line.close_code().await, close_code::SHUTDOWN);
    drop(peer);
    stopping.await.unwrap();
}
