//! The daemon and its commands, without other peers.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rendezvous_wire::KeyPair;
use rendezvous_wire::message::IntroductionPolicy;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};

use super::line::Line;
use super::message::{self, Ask, Hello, Kind, Tell};
use super::{Client, Daemon, DaemonError, End, Explained, Host, ServingStatus, packets};
use crate::explain::Explanation;
use crate::service::{Exchange, Request};
use crate::{ConnectError, Endpoint, PeerId, Session, identity};

/// Generous: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(30);

fn key() -> KeyPair {
    KeyPair::generate().unwrap()
}

/// Both ends of a share's connection.
async fn pair() -> (quinn::Connection, quinn::Connection, [Box<dyn std::any::Any>; 2]) {
    let key = key();
    let (one, other) = UnixStream::pair().unwrap();
    let command: Line<Ask, Tell> = Line::new(one, message::MAX_CONTROL);
    let daemon: Line<Tell, Ask> = Line::new(other, message::MAX_ASK);
    let (command_packets, daemon_packets) = (command.packets, daemon.packets);
    let (at_command, at_daemon) =
        tokio::join!(packets::connect(command_packets, &key), packets::accept(daemon_packets, &key));
    let rest: [Box<dyn std::any::Any>; 2] =
        [Box::new((command.teller, command.hearer)), Box::new((daemon.teller, daemon.hearer))];
    (at_command.unwrap(), at_daemon.unwrap(), rest)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_resets_and_datagrams_pass_the_socket() {
    let (command, daemon, _rest) = pair().await;
    let content: Vec<u8> = (0..20_000_000_u32).map(|number| number.to_le_bytes()[1]).collect();
    let (mut send, mut receive) = command.open_bi().await.unwrap();
    let echo = tokio::spawn({
        let daemon = daemon.clone();
        async move {
            let (mut send, mut receive) = daemon.accept_bi().await.unwrap();
            while let Some(chunk) = receive.read_chunk(1 << 16, true).await.unwrap() {
                send.write_chunk(chunk.bytes).await.unwrap();
            }
            send.finish().unwrap();
            let (mut send, receive) = daemon.accept_bi().await.unwrap();
            send.reset(7_u8.into()).unwrap();
            receive
        }
    });
    let sending = async {
        send.write_all(&content).await.unwrap();
        send.finish().unwrap();
    };
    let (returned, ()) = tokio::join!(receive.read_to_end(content.len() + 1), sending);
    assert!(returned.unwrap() == content, "other bytes came back");

    let (mut send, mut receive) = command.open_bi().await.unwrap();
    send.write_all(b"x").await.unwrap();
    let mut at_daemon = echo.await.unwrap();
    assert_eq!(receive.read(&mut [0]).await, Err(quinn::ReadError::Reset(7_u8.into())));
    at_daemon.stop(9_u8.into()).unwrap();
    assert_eq!(send.stopped().await.unwrap(), Some(9_u8.into()));

    // The longest datagram of any path fits.
    command.send_datagram(vec![5; 1400].into()).unwrap();
    let datagram = tokio::time::timeout(PATIENCE, daemon.read_datagram()).await.unwrap().unwrap();
    assert_eq!(datagram.len(), 1400);
    daemon.close(3_u8.into(), b"enough");
    let closed = tokio::time::timeout(PATIENCE, command.closed()).await.unwrap();
    assert!(closed.to_string().contains("enough"), "{closed}");
}

#[tokio::test]
async fn another_key_gets_no_connection() {
    let (one, other) = UnixStream::pair().unwrap();
    let command: Line<Ask, Tell> = Line::new(one, message::MAX_CONTROL);
    let daemon: Line<Tell, Ask> = Line::new(other, message::MAX_ASK);
    let (ours, theirs) = (key(), key());
    let (at_command, at_daemon) =
        tokio::join!(packets::connect(command.packets, &ours), packets::accept(daemon.packets, &theirs));
    assert!(at_command.is_err() && at_daemon.is_err());
}

/// Serves nothing.
struct Nothing;

impl Host for Nothing {
    fn policy(&self) -> IntroductionPolicy {
        IntroductionPolicy::Only(Vec::new())
    }

    fn takes(&self, _: PeerId, _: &Request) -> bool {
        false
    }

    async fn answer(&self, _: Request, exchange: Exchange) {
        exchange.refuse().await;
    }

    fn refused(&self, _: PeerId, _: &str) {}

    fn connected(&self, _: &Session) {}

    fn ended(&self, _: &Session) {}

    fn alias(&self, _: PeerId) -> Option<String> {
        None
    }

    fn explained(&self, explanation: &Explanation) -> Explained {
        Explained { fields: serde_json::Value::Null, words: explanation.to_string() }
    }

    fn serving(&self) -> ServingStatus {
        ServingStatus::default()
    }

    fn reload(&self) -> Result<(), String> {
        Err("there is nothing to read".into())
    }
}

struct Place {
    _directory: tempfile::TempDir,
    path: PathBuf,
    key: PathBuf,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (path, key) = (directory.path().join("run/control.sock"), directory.path().join("key.pem"));
        Self { _directory: directory, path, key }
    }

    fn identity(&self) -> KeyPair {
        identity::load_or_create(&self.key).unwrap()
    }
}

/// A daemon whose only server is nobody; until it is asked to end.
async fn run(place: &Place) -> (Endpoint, tokio::task::JoinHandle<(Daemon, End)>) {
    let key = place.identity();
    let daemon = Daemon::listen(&place.path, &place.key).unwrap();
    let server = format!("rv://{}@127.0.0.1:1", self::key().id()).parse().unwrap();
    let endpoint = Endpoint::builder()
        .identity(place.identity())
        .server(server)
        .port_mapping(false)
        .bind()
        .await
        .unwrap();
    let running = endpoint.clone();
    let task = tokio::spawn(async move {
        let end = daemon.run(&running, key, Vec::new(), Arc::new(Nothing), std::future::pending()).await;
        (daemon, end)
    });
    (endpoint, task)
}

#[tokio::test]
async fn a_daemon_tells_how_it_is_and_ends_when_asked() {
    let place = Place::new();
    let (endpoint, task) = run(&place).await;
    let status = super::status(&place.path).await.unwrap();
    assert_eq!((status.id, status.pid), (endpoint.id(), std::process::id()));
    assert!(status.servers.len() == 1 && status.sessions.is_empty());
    let refused = super::reload(&place.path).await.unwrap_err();
    assert_eq!(refused.to_string(), "there is nothing to read");
    let path = place.path.clone();
    let down = tokio::spawn(async move { super::down(&path).await });
    let (daemon, end) = task.await.unwrap();
    assert!(matches!(end, End::Asked(_)) && !down.is_finished(), "whoever asked waits");
    endpoint.close().await;
    drop((daemon, end));
    down.await.unwrap().unwrap();
    assert!(matches!(super::status(&place.path).await, Err(DaemonError::NotRunning { .. })));
}

#[tokio::test]
async fn what_is_no_command_harms_nobody() {
    let place = Place::new();
    let (_endpoint, _task) = run(&place).await;
    let frame = |kind, body: &[u8]| [&message::header(kind, body.len())[..], body].concat();
    let mut too_long = message::header(Kind::Control, message::MAX_ASK + 1).to_vec();
    too_long.resize(100, b' ');
    for garbage in [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        frame(Kind::Control, b"{\"ask\":\"everything\"}"),
        frame(Kind::Control, b"no json"),
        frame(Kind::Packet, &[0x40; 1200]),
        too_long,
        vec![1, 0],
    ] {
        let mut socket = UnixStream::connect(&place.path).await.unwrap();
        socket.write_all(&garbage).await.unwrap();
        socket.shutdown().await.unwrap();
        let mut said = Vec::new();
        // It says who it is, and no more.
        let _ = tokio::time::timeout(PATIENCE, socket.read_to_end(&mut said)).await.unwrap();
        assert!(said.len() < 1000, "{}", String::from_utf8_lossy(&said));
    }
    assert!(super::status(&place.path).await.is_ok());
}

#[tokio::test]
async fn commands_are_told_why_they_get_no_session() {
    let place = Place::new();
    let (endpoint, task) = run(&place).await;
    let other = Client::connect(&place.path, key(), "test").await;
    assert!(matches!(other, Err(DaemonError::Identity { .. })));
    let client = Client::connect(&place.path, place.identity(), "test").await.unwrap();
    let oneself = client.open(endpoint.id()).await.unwrap_err();
    assert!(matches!(oneself, ConnectError::Refused(_)), "{oneself}");
    assert!(!client.is_lost().await);
    task.abort();
    let _ = task.await;
    let gone = client.open(endpoint.id()).await.unwrap_err().to_string();
    assert!(gone.contains("no daemon runs"), "{gone}");
}

#[tokio::test]
async fn a_daemon_of_another_version_is_told_from_one_that_is_none() {
    let place = Place::new();
    std::fs::create_dir(place.path.parent().unwrap()).unwrap();
    let listener = UnixListener::bind(&place.path).unwrap();
    let answer = |bytes: Vec<u8>| {
        let listener = &listener;
        async move {
            let (mut socket, _) = listener.accept().await.unwrap();
            socket.write_all(&bytes).await.unwrap();
        }
    };
    let hello = Hello { version: 9, pid: 77, id: Some(key().id()), servers: Vec::new() };
    let body = message::encode(&hello);
    let newer = [&message::header(Kind::Control, body.len())[..], &body].concat();
    let (status, ()) = tokio::join!(super::status(&place.path), answer(newer));
    let words = status.unwrap_err().to_string();
    assert!(
        words.contains("process 77") && words.contains("version 9") && words.contains("`peer up`"),
        "{words}"
    );
    let (status, ()) =
        tokio::join!(super::status(&place.path), answer(b"220 mail.example ESMTP\r\n".to_vec()));
    assert!(matches!(status, Err(DaemonError::Mute { .. })));
}
