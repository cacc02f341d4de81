//! Every limit driven past its bound over the network: who is over is told, the others notice nothing.
//!
//! Those of introductions, of one source's registrations, of readers and of handshakes of one source are in `hardening.rs`.

mod common;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use common::*;
use quinn::ConnectionError;
use rendezvous::limits::Rate;
use rendezvous::{Limits, Server};
use rendezvous_wire::message::{Introduction, Limit, NotIntroduced, Notice, Register, Request};
use rendezvous_wire::{Candidate, CandidateKind, KeyPair, signalling_alpns};

fn key() -> KeyPair {
    KeyPair::generate().unwrap()
}

fn copy(key: &KeyPair) -> KeyPair {
    KeyPair::from_pem(&key.to_pem()).unwrap()
}

async fn from(ip: IpAddr, server: &Server) -> Result<Line, ConnectionError> {
    let at = SocketAddr::new(HERE, server.ports().signalling);
    connect_from(ip, at, &key(), server.id(), Default::default(), &signalling_alpns()).await
}

const fn host(last: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(127, 0, 0, last))
}

/// Of another /24.
const ELSEWHERE: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 7, 1));

#[tokio::test]
async fn handshakes_of_a_prefix_are_bounded_and_those_of_another_are_not() {
    let limits = Limits { connecting_per_prefix: Rate::new(3, 1), ..Limits::default() };
    let server = serve_with(limits).await;
    let mut refused = 0;
    for last in 1..=20 {
        match from(host(last), &server).await {
            Ok(_) => {}
            Err(ConnectionError::ConnectionClosed(_)) => refused += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert!(refused > 0, "twenty addresses of one prefix were let in");
    from(ELSEWHERE, &server).await.unwrap().register(None).await.unwrap();
}

#[tokio::test]
async fn registrations_of_a_prefix_are_bounded_and_those_of_another_are_not() {
    let limits = Limits { registrations_per_prefix: 2, registrations_per_source: 1, ..Limits::default() };
    let server = serve_with(limits).await;
    let mut kept = Vec::new();
    for last in 1..=2 {
        let mut line = from(host(last), &server).await.unwrap();
        line.register(None).await.unwrap();
        kept.push(line);
    }
    let third = from(host(3), &server).await.unwrap().register(None).await.unwrap_err();
    assert!(third.contains("network") && third.contains("ask"), "{third}");
    let crowded = from(host(1), &server).await.unwrap().register(None).await.unwrap_err();
    assert!(crowded.contains("this address"), "{crowded}");
    from(ELSEWHERE, &server).await.unwrap().register(None).await.unwrap();
    assert!(kept.iter().all(|line| line.connection.close_reason().is_none()));
}

#[tokio::test]
async fn a_key_that_registers_too_often_is_told_and_others_are_not_held_up() {
    let server = serve_with(Limits { registering: Rate::new(3, 1), ..Limits::default() }).await;
    let hasty = key();
    let mut refused = Vec::new();
    for _ in 0..12 {
        let line = connect_able(&server, &hasty).await.register(None).await;
        refused.extend(line.err());
    }
    assert!(
        !refused.is_empty() && refused.iter().all(|said| said.contains("too often") && said.contains("wait"))
    );
    connect_able(&server, &key()).await.register(None).await.unwrap();
}

#[tokio::test]
async fn too_many_candidates_are_refused() {
    let server = serve_with(Limits { candidates: 2, ..Limits::default() }).await;
    let candidate = |port| Candidate::new(CandidateKind::Host, SocketAddr::from(([192, 168, 0, 1], port)), 1);
    let says = |count| Register { candidates: (1..=count).map(candidate).collect(), ..open() };
    let mut line = connect_able(&server, &key()).await;
    line.tell(&Request::Register(says(3))).await;
    let refused = line.refusal().await;
    assert!(refused.contains("more than 2 candidates"), "{refused}");
    let mut line = connect_able(&server, &key()).await;
    line.tell(&Request::Register(says(2))).await;
    assert!(matches!(line.hear().await, Ok(Notice::Registered(_))));
}

#[tokio::test]
async fn channels_of_a_key_and_introductions_of_a_prefix_are_bounded() {
    let limits =
        Limits { channels_per_peer: 2, introducing_per_prefix: Rate::new(5, 1), ..Limits::default() };
    let server = serve_with(limits).await;
    let mut a = Peer::register(&server).await;
    let mut targets = Vec::new();
    for _ in 0..3 {
        targets.push(Peer::register(&server).await);
    }
    for target in &mut targets[..2] {
        introduce(&mut a, target).await;
    }
    a.ask(targets[2].id(), Vec::new()).await;
    assert_eq!(a.refusal().await, NotIntroduced::TooMany);
    // Three of five are gone.
    let mut told = Vec::new();
    for _ in 0..20 {
        let mut other = Peer::register(&server).await;
        other.ask(key().id(), Vec::new()).await;
        told.push(other.refusal().await);
    }
    assert_eq!(told[0], NotIntroduced::Unavailable);
    assert!(told.contains(&NotIntroduced::TooMany), "{told:?}");
    let mut line = from(ELSEWHERE, &server).await.unwrap();
    let registered = line.register(None).await.unwrap();
    let mut elsewhere = Peer::on(line, key(), registered, HERE).await;
    elsewhere.ask(key().id(), Vec::new()).await;
    assert_eq!(elsewhere.refusal().await, NotIntroduced::Unavailable, "another prefix");
}

/// Two peers with a channel, the first of which sends.
struct Pair {
    from: Peer,
    to: Peer,
    introduction: Introduction,
}

impl Pair {
    async fn new(server: &Server) -> Self {
        let mut from = Peer::register_able(server, key()).await;
        let mut to = Peer::register_able(server, key()).await;
        from.bind().await;
        to.bind().await;
        let (introduction, _) = introduce(&mut from, &mut to).await;
        Self { from, to, introduction }
    }

    /// Sends this many bytes a second, in datagrams of 1,000, for so long; how many bytes have come.
    async fn send(&self, rate: usize, lasts: Duration) -> usize {
        let datagram = frame(&self.introduction, &[5; 1_000 - 4]);
        let mut arrived = 0;
        let mut buffer = [0; 2_048];
        let (began, mut sent) = (Instant::now(), 0);
        let mut tick = tokio::time::interval(Duration::from_millis(5));
        while began.elapsed() < lasts {
            tick.tick().await;
            // No more than a socket's buffer holds, however late this is.
            let due = (began.elapsed().as_secs_f64() * rate as f64) as usize;
            while sent + 1_000 <= due.min(sent + 50_000) {
                self.from.socket.send_to(&datagram, self.from.relay).await.unwrap();
                sent += 1_000;
            }
            sent = sent.max(due.saturating_sub(50_000));
            while let Ok(length) = self.to.socket.try_recv(&mut buffer) {
                arrived += length;
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        while let Ok(length) = self.to.socket.try_recv(&mut buffer) {
            arrived += length;
        }
        arrived
    }

    /// The limit that the sender hears of next.
    async fn limited(&mut self) -> Limit {
        match self.from.line.hear().await {
            Ok(Notice::Limited(limit)) => limit,
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn what_one_key_sends_over_the_relay_is_bounded_and_it_is_told() {
    // 100,000 bytes a second.
    let server = serve_with(Limits { relay_kbit_per_peer: 800, ..Limits::default() }).await;
    let (mut greedy, modest) = (Pair::new(&server).await, Pair::new(&server).await);
    let lasts = Duration::from_secs(3);
    let (of_greedy, of_modest) = tokio::join!(greedy.send(1_000_000, lasts), modest.send(50_000, lasts));
    // Its burst, and what is more by the time that a busy machine takes longer.
    assert!((200_000..=600_000).contains(&of_greedy), "{of_greedy}");
    assert!(of_modest >= 120_000, "{of_modest} of 150,000");
    assert_eq!(greedy.limited().await, Limit::Bandwidth(100_000));
    assert!(server.relay_count().limited > 0);
}

#[tokio::test]
async fn a_full_relay_is_shared_and_a_greedy_key_starves_nobody() {
    // 200,000 bytes a second in all.
    let server = serve_with(Limits { relay_kbit: 1_600, ..Limits::default() }).await;
    let mut greedy = Pair::new(&server).await;
    let (modest, other) = (Pair::new(&server).await, Pair::new(&server).await);
    let (before, lasts) = (Duration::from_secs(2), Duration::from_secs(4));
    // The greedy one has the relay for itself first.
    let alone = greedy.send(2_000_000, before).await;
    assert!(alone >= 200_000, "{alone}: nobody else wants it");
    let all =
        tokio::join!(greedy.send(2_000_000, lasts), modest.send(40_000, lasts), other.send(40_000, lasts));
    let (of_greedy, of_modest, of_other) = all;
    assert!(of_modest >= 130_000 && of_other >= 130_000, "{all:?}: 160,000 each");
    assert!(of_greedy >= of_modest, "{all:?}: what they leave is its own");
    assert!(of_greedy <= 1_000_000, "{all:?}: 480,000, and what it had before it was judged");
    assert!(matches!(greedy.limited().await, Limit::Share(_)));
}

#[tokio::test]
async fn a_month_that_is_used_up_is_told_and_others_go_on() {
    let state = tempfile::tempdir().unwrap();
    let limits = Limits { relay_mb_per_month: 1, ..Limits::default() };
    let start = || builder().limits(limits.clone()).state(state.path()).start();
    let server = start().await.unwrap();
    let (mut spent, modest) = (Pair::new(&server).await, Pair::new(&server).await);
    let spender = copy(&spent.from.key);
    spent.send(2_000_000, Duration::from_secs(2)).await;
    assert_eq!(spent.limited().await, Limit::Month(1_000_000));
    // Both ends have used it up.
    assert_eq!(spent.send(20_000, Duration::from_millis(500)).await, 0);
    assert!(modest.send(20_000, Duration::from_millis(500)).await > 0);
    server.shutdown().await;

    let server = start().await.unwrap();
    let mut line = connect_able(&server, &spender).await;
    line.register(None).await.unwrap();
    assert!(matches!(line.hear().await, Ok(Notice::Limited(Limit::Month(1_000_000)))), "it is remembered");
}

#[tokio::test]
async fn limits_are_changed_while_it_runs() {
    let server = serve().await;
    let mut first = Peer::register(&server).await;
    let stays = Limits { registrations: 1, relay_kbit_per_peer: 8, ..Limits::default() };
    server.reload(stays, Default::default()).await;
    let refused = connect_able(&server, &key()).await.register(None).await.unwrap_err();
    assert!(refused.contains("full"), "{refused}");
    first.ask(first.id(), Vec::new()).await;
    assert_eq!(first.refusal().await, NotIntroduced::Oneself, "who is here stays");
    server.reload(Limits::default(), Default::default()).await;
    connect_able(&server, &key()).await.register(None).await.unwrap();
}
