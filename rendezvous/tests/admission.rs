//! Who gets in, over the network.

mod common;

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::*;
use rendezvous::Server;
use rendezvous::config::{Admission, Callout, Mode, OnFailure};
use rendezvous::control::{self, Answer, Question};
use rendezvous_wire::admission::{Solution, Work};
use rendezvous_wire::message::{Notice, Request};
use rendezvous_wire::{KeyPair, PeerId, Token};

fn key() -> KeyPair {
    KeyPair::generate().unwrap()
}

fn copy(key: &KeyPair) -> KeyPair {
    KeyPair::from_pem(&key.to_pem()).unwrap()
}

/// A server with a store and a socket in `state`.
async fn serve_in(state: &Path, admission: Admission) -> Server {
    let server = builder().state(state).control(socket(state)).admission(admission);
    server.start().await.unwrap()
}

fn socket(state: &Path) -> PathBuf {
    state.join(control::SOCKET_NAME)
}

async fn ask(state: &Path, question: Question) -> Answer {
    let socket = socket(state);
    tokio::task::spawn_blocking(move || control::ask(&socket, &question)).await.unwrap().unwrap()
}

async fn new_token(state: &Path, uses: u32, seconds: Option<u64>) -> Token {
    match ask(state, Question::NewToken { uses, seconds, note: "test".into() }).await {
        Answer::Token(made) => made.token.parse().unwrap(),
        other => panic!("{other:?}"),
    }
}

async fn register(server: &Server, key: &KeyPair, token: Option<&Token>) -> Result<(), String> {
    connect_able(server, key).await.register(token).await.map(|_| ())
}

fn mode(mode: Mode) -> Admission {
    Admission { mode, ..Admission::default() }
}

#[tokio::test]
async fn a_token_lets_one_peer_in_for_good_and_nobody_else() {
    let state = tempfile::tempdir().unwrap();
    let server = serve_in(state.path(), mode(Mode::Token)).await;
    let token = new_token(state.path(), 1, None).await;
    let (first, second) = (key(), key());
    let without = register(&server, &first, None).await.unwrap_err();
    assert!(without.contains("token") && without.contains("peer init"), "{without}");
    let wrong = register(&server, &first, Some(&Token([1; 16]))).await.unwrap_err();
    assert!(wrong.contains("does not know"), "{wrong}");
    register(&server, &first, Some(&token)).await.unwrap();
    let late = register(&server, &second, Some(&token)).await.unwrap_err();
    assert!(late.contains("used up"), "{late}");
    let old = connect(&server, &second).await.register(None).await.unwrap_err();
    assert!(old.contains("token"), "a peer of old is told as well: {old}");
    server.shutdown().await;

    let server = serve_in(state.path(), mode(Mode::Token)).await;
    register(&server, &first, None).await.unwrap();
    assert!(register(&server, &second, Some(&token)).await.is_err(), "spent on disk as well");
    let Answer::Tokens(tokens) = ask(state.path(), Question::Tokens).await else { panic!() };
    assert_eq!((tokens[0].used, tokens[0].uses), (1, 1));
}

#[tokio::test]
async fn many_who_come_with_one_token_at_once_are_let_in_as_often_as_it_says() {
    let state = tempfile::tempdir().unwrap();
    let server = serve_in(state.path(), mode(Mode::Token)).await;
    let token = new_token(state.path(), 3, None).await;
    let attempts: Vec<_> = (0..20).map(|_| key()).collect();
    let attempts = attempts.iter().map(|key| register(&server, key, Some(&token)));
    let results = futures_util::future::join_all(attempts).await;
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 3, "{results:?}");
}

#[tokio::test]
async fn an_allow_list_is_extended_and_cut_while_it_runs() {
    let state = tempfile::tempdir().unwrap();
    let (listed, other) = (key(), key());
    let server =
        serve_in(state.path(), Admission { allow: vec![listed.id()], ..mode(Mode::AllowList) }).await;
    register(&server, &listed, None).await.unwrap();
    let refused = register(&server, &other, None).await.unwrap_err();
    assert!(refused.contains(&format!("rendezvous admit {}", other.id())), "{refused}");
    let note = "the laptop".to_owned();
    assert_eq!(ask(state.path(), Question::Admit { peer: other.id(), note }).await, Answer::Done(true));
    register(&server, &other, None).await.unwrap();
    assert_eq!(ask(state.path(), Question::Withdraw { peer: other.id() }).await, Answer::Done(true));
    register(&server, &other, None).await.unwrap_err();
    server.reload(Default::default(), mode(Mode::Open)).await;
    register(&server, &other, None).await.unwrap();
}

#[tokio::test]
async fn a_ban_ends_registration_and_relay_at_once_and_outlives_the_server() {
    let state = tempfile::tempdir().unwrap();
    let server = serve_in(state.path(), Admission::default()).await;
    let banned = key();
    let mut a = Peer::register_able(&server, copy(&banned)).await;
    let mut b = Peer::register_able(&server, key()).await;
    a.bind().await;
    b.bind().await;
    let (introduction, _) = introduce(&mut a, &mut b).await;
    a.socket.send_to(&frame(&introduction, &[1]), a.relay).await.unwrap();
    b.receive().await;
    let Answer::Sessions(sessions) = ask(state.path(), Question::Sessions).await else { panic!() };
    assert_eq!((&sessions[0].asker, &sessions[0].target), (&a.id().to_string(), &b.id().to_string()));

    let ban = Question::Ban { peer: banned.id(), seconds: None, reason: "too loud".into() };
    assert_eq!(ask(state.path(), ban).await, Answer::Done(true));
    let told = a.line.refusal().await;
    assert!(told.contains("too loud") && told.contains("ask"), "{told}");
    let closed = b.line.hear().await.unwrap();
    assert!(matches!(closed, Notice::Closed(id) if id == introduction.introduction), "{closed:?}");
    a.socket.send_to(&frame(&introduction, &[2]), a.relay).await.unwrap();
    a.settle().await;
    b.settle().await;
    let again = register(&server, &banned, None).await.unwrap_err();
    assert!(again.contains("too loud"), "{again}");
    server.shutdown().await;

    let server = serve_in(state.path(), Admission::default()).await;
    assert!(register(&server, &banned, None).await.is_err());
    assert_eq!(ask(state.path(), Question::Unban { peer: banned.id() }).await, Answer::Done(true));
    register(&server, &banned, None).await.unwrap();
    let short = Question::Ban { peer: banned.id(), seconds: Some(0), reason: String::new() };
    ask(state.path(), short).await;
    register(&server, &banned, None).await.unwrap();
}

#[tokio::test]
async fn in_a_flood_newcomers_work_and_those_who_are_known_do_not() {
    let known = key();
    // Reached with the eleventh newcomer, since they are counted over ten seconds.
    let admission = Admission {
        allow: vec![known.id()],
        work_above: 1,
        work_bits: 8,
        work_most_bits: 12,
        ..Admission::default()
    };
    let server = builder().admission(admission).start().await.unwrap();
    let mut challenged = 0;
    for _ in 0..40 {
        let newcomer = key();
        let mut line = connect_able(&server, &newcomer).await;
        line.tell(&Request::Register(open())).await;
        match line.hear().await.unwrap() {
            Notice::Registered(_) => {}
            Notice::Challenge(challenge) => {
                challenged += 1;
                assert!((8..=12).contains(&challenge.bits));
                let work = Work { challenge, server: server.id(), peer: newcomer.id() };
                line.tell(&Request::Solve(work.solve(0, || true).unwrap())).await;
                assert!(matches!(line.hear().await, Ok(Notice::Registered(_))));
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(challenged >= 20, "{challenged} of 40");

    let cheat = key();
    let mut line = connect_able(&server, &cheat).await;
    line.tell(&Request::Register(open())).await;
    let Ok(Notice::Challenge(challenge)) = line.hear().await else { panic!("no challenge") };
    let work = Work { challenge, server: server.id(), peer: cheat.id() };
    let wrong = (0..).map(Solution).find(|solution| !work.is_done_by(*solution)).unwrap();
    line.tell(&Request::Solve(wrong)).await;
    assert!(line.refusal().await.contains("try again"));
    let old = connect(&server, &key()).await.register(None).await.unwrap_err();
    assert!(old.contains("too old"), "{old}");
    register(&server, &known, None).await.unwrap();
    connect(&server, &known).await.register(None).await.unwrap();
}

/// An HTTP service on loopback that admits by the first character of an id, or says nothing.
struct Service {
    url: String,
    asked: std::sync::mpsc::Receiver<String>,
}

fn service(answer: impl Fn(&str) -> Option<String> + Send + 'static) -> Service {
    let listener = TcpListener::bind((HERE, 0)).unwrap();
    let url = format!("http://{}/admit", listener.local_addr().unwrap());
    let (sender, asked) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut silent = Vec::new();
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let (mut request, mut buffer) = (String::new(), [0; 4096]);
            while !request.contains('}') {
                let length = stream.read(&mut buffer).unwrap();
                assert!(length > 0, "a whole question");
                request.push_str(&String::from_utf8_lossy(&buffer[..length]));
            }
            match answer(&request) {
                Some(response) => stream.write_all(response.as_bytes()).unwrap(),
                None => silent.push(stream),
            }
            if sender.send(request).is_err() {
                return;
            }
        }
    });
    Service { url, asked }
}

fn http(status: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len())
}

fn called_out(url: &str, on_failure: OnFailure, timeout_ms: u64) -> Admission {
    let callout = Callout { url: url.to_owned(), timeout_ms, on_failure, cache_seconds: 60 };
    Admission { callout, ..mode(Mode::Callout) }
}

#[tokio::test]
async fn a_service_of_the_operators_decides_once_for_each_peer() {
    let (member, stranger) = (key(), key());
    let id = member.id().to_string();
    let service = service(move |request| {
        let body = if request.contains(&id) {
            "{\"admit\":true}"
        } else {
            "{\"admit\":false,\"reason\":\"no member\"}"
        };
        Some(http("200 OK", body))
    });
    let server =
        builder().admission(called_out(&service.url, OnFailure::Refuse, 5_000)).start().await.unwrap();
    for _ in 0..3 {
        register(&server, &member, None).await.unwrap();
        let refused = register(&server, &stranger, None).await.unwrap_err();
        assert!(refused.contains("no member") && refused.contains("ask"), "{refused}");
    }
    let asked: Vec<String> = service.asked.try_iter().collect();
    assert_eq!(asked.len(), 2, "the answers are kept");
    assert!(asked[0].starts_with("POST /admit ") && asked[0].contains("127.0.0.1"), "{}", asked[0]);
    assert!(asked[0].contains(&server.id().to_string()));
}

#[tokio::test]
async fn a_service_that_fails_lets_in_or_keeps_out_as_it_was_said_and_in_time() {
    let silent = service(|_| None);
    let broken = service(|_| Some(http("500 Internal Server Error", "{\"admit\":true}")));
    let nonsense = service(|_| Some(http("200 OK", "yes")));
    for service in [&silent, &broken, &nonsense] {
        for on_failure in [OnFailure::Refuse, OnFailure::Admit] {
            let admission = called_out(&service.url, on_failure, 300);
            let server = builder().admission(admission).start().await.unwrap();
            let began = Instant::now();
            let result = register(&server, &key(), None).await;
            assert_eq!(result.is_ok(), on_failure == OnFailure::Admit, "{result:?}");
            assert!(began.elapsed() < Duration::from_secs(5), "bounded by its timeout");
            if let Err(refused) = result {
                assert!(refused.contains("try again"), "{refused}");
            }
        }
    }
}

#[tokio::test]
async fn a_server_that_goes_away_tells_its_peers_and_waits_for_what_it_relays() {
    let mut server = serve().await;
    let mut a = Peer::register_able(&server, key()).await;
    let mut b = Peer::register_as(&server, key(), open()).await;
    let (introduction, _) = introduce(&mut a, &mut b).await;
    a.bind().await;
    b.bind().await;
    let (ended, has_ended) = tokio::sync::oneshot::channel();
    let (id, signalling) = (server.id(), server.ports().signalling);
    tokio::spawn(async move {
        server.drain(600).await;
        // It stays for as long as the test looks.
        let _ = ended.send(server);
    });
    assert!(matches!(a.line.hear().await, Ok(Notice::Leaving(600))));
    let at = std::net::SocketAddr::new(HERE, signalling);
    let (newcomer, alpns) = (key(), rendezvous_wire::signalling_alpns());
    let mut line = connect_from(HERE, at, &newcomer, id, Default::default(), &alpns).await.unwrap();
    let refused = line.register(None).await.unwrap_err();
    assert!(refused.contains("going away") && refused.contains("another"), "{refused}");
    // What is relayed goes on; the peer of old has heard nothing that it does not know.
    a.socket.send_to(&frame(&introduction, &[7]), a.relay).await.unwrap();
    assert_eq!(b.receive().await, frame(&introduction, &[7]));
    a.line.tell(&Request::Close(introduction.introduction)).await;
    assert!(matches!(b.line.hear().await, Ok(Notice::Closed(_))));
    let ended = tokio::time::timeout(PATIENCE, has_ended).await;
    ended.expect("nothing is left to wait for").expect("the server").shutdown().await;
}

#[tokio::test]
async fn peers_and_numbers_are_told_over_the_socket() {
    use std::os::unix::fs::PermissionsExt as _;
    let state = tempfile::tempdir().unwrap();
    let server = serve_in(state.path(), Admission::default()).await;
    let mode = std::fs::metadata(socket(state.path())).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut a = Peer::register(&server).await;
    let mut b = Peer::register(&server).await;
    introduce(&mut a, &mut b).await;
    let Answer::Peers(peers) = ask(state.path(), Question::Peers).await else { panic!() };
    let mut expected: Vec<String> = [a.id(), b.id()].iter().map(PeerId::to_string).collect();
    expected.sort();
    assert_eq!(peers.iter().map(|row| row.peer.clone()).collect::<Vec<_>>(), expected);
    assert!(peers.iter().all(|row| row.over == "udp" && row.channels == 1));
    let Answer::Stats(stats) = ask(state.path(), Question::Stats).await else { panic!() };
    assert_eq!((stats.registrations, stats.peers, stats.sessions, stats.leaving), (2, 2, 1, false));
}
