//! The program is killed at random moments of enrolment, token use and bans: its store opens every time, no token is used twice, and what was answered
//! has happened. `KILLS=200` for more than the short form.

mod common;

use std::collections::{HashMap, HashSet};
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::*;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use rendezvous::control::{self, Answer, Question};
use rendezvous_wire::message::{Notice, Request};
use rendezvous_wire::{KeyPair, PeerId, RendezvousAddress, Token, signalling_alpns};

/// The rounds of `make test`.
const SHORT: u32 = 20;

/// The server's process.
struct Serving {
    child: Child,
    address: RendezvousAddress,
}

impl Serving {
    fn start(state: &Path) -> Self {
        let config = state.join("rendezvous.toml");
        // Nobody is held up by limits that are tested elsewhere.
        let text = "[network]\nlisten = [\"127.0.0.1\"]\nport = 0\nreflection_ports = [0, 0]\nrelay_threads = 1\n[admission]\nmode = \"token\"\n";
        std::fs::write(&config, text).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_rendezvous"))
            .args(["serve", "--json", "-q", "--config"])
            .arg(&config)
            .arg("--state-dir")
            .arg(state)
            .env_remove("RUST_LOG")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let ready: serde_json::Value =
            serde_json::from_str(&line).expect("it starts with the store as it was left");
        Self { child, address: ready["address"].as_str().unwrap().parse().unwrap() }
    }

    fn at(&self) -> (SocketAddr, PeerId) {
        (SocketAddr::new(HERE, self.address.port), self.address.id)
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the server has answered.
#[derive(Default)]
struct Answered {
    /// By the token that they have presented.
    enrolled: HashMap<Token, Vec<PeerId>>,
    banned: HashSet<PeerId>,
    admitted: HashSet<PeerId>,
}

/// How many each token admits.
const USES: u32 = 2;

async fn ask(state: &Path, question: Question) -> Option<Answer> {
    let socket = state.join(control::SOCKET_NAME);
    tokio::task::spawn_blocking(move || control::ask(&socket, &question)).await.unwrap().ok()
}

/// Registers with a token. `None`: the server has gone.
async fn register((at, id): (SocketAddr, PeerId), key: &KeyPair, token: Option<&Token>) -> Option<bool> {
    let registering = async {
        let mut line = connect_from(HERE, at, key, id, Default::default(), &signalling_alpns()).await.ok()?;
        if let Some(token) = token {
            line.send
                .write_all(&rendezvous_wire::message::encode(&Request::Present(token.clone())).unwrap())
                .await
                .ok()?;
        }
        line.send
            .write_all(&rendezvous_wire::message::encode(&Request::Register(open())).unwrap())
            .await
            .ok()?;
        match line.hear().await {
            Ok(Notice::Registered(_)) => Some(true),
            Err(quinn::ConnectionError::ApplicationClosed(_)) => Some(false),
            _ => None,
        }
    };
    // A connection to a server that has been killed answers nothing.
    tokio::time::timeout(Duration::from_secs(2), registering).await.ok().flatten()
}

/// Makes tokens, has more peers come with each than it admits, bans and admits, until told to stop.
async fn stir(state: &Path, server: (SocketAddr, PeerId), answered: &Mutex<Answered>, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let question = Question::NewToken { uses: USES, seconds: None, note: String::new() };
        let Some(Answer::Token(made)) = ask(state, question).await else { return };
        let token: Token = made.token.parse().unwrap();
        answered.lock().unwrap().enrolled.insert(token.clone(), Vec::new());
        let keys: Vec<KeyPair> = (0..USES + 1).map(|_| KeyPair::generate().unwrap()).collect();
        let coming = keys.iter().map(|key| register(server, key, Some(&token)));
        let results = futures_util::future::join_all(coming).await;
        for (key, result) in keys.iter().zip(results) {
            if result == Some(true) {
                answered.lock().unwrap().enrolled.get_mut(&token).unwrap().push(key.id());
            }
        }
        let [banned, admitted] = [(); 2].map(|()| KeyPair::generate().unwrap().id());
        let ban = Question::Ban { peer: banned, seconds: None, reason: String::new() };
        if let Some(Answer::Done(_)) = ask(state, ban).await {
            answered.lock().unwrap().banned.insert(banned);
        }
        let admit = Question::Admit { peer: admitted, note: String::new() };
        if let Some(Answer::Done(_)) = ask(state, admit).await {
            answered.lock().unwrap().admitted.insert(admitted);
        }
    }
}

/// What was answered has happened, and no token has admitted more than it may.
async fn verify(state: &Path, answered: &Mutex<Answered>) {
    let Some(Answer::Admitted(admitted)) = ask(state, Question::Admitted).await else { panic!("no answer") };
    let Some(Answer::Banned(banned)) = ask(state, Question::Banned).await else { panic!("no answer") };
    let Some(Answer::Tokens(tokens)) = ask(state, Question::Tokens).await else { panic!("no answer") };
    let mut by_token: HashMap<u64, u32> = HashMap::new();
    for row in &admitted {
        if let Some(number) = row.token {
            *by_token.entry(number).or_default() += 1;
        }
    }
    for token in &tokens {
        let peers = by_token.get(&token.number).copied().unwrap_or(0);
        assert!(peers <= token.uses, "token {} has admitted {peers} of {}", token.number, token.uses);
        assert_eq!(token.used, peers, "token {}: spent and admitted together or not at all", token.number);
    }
    let admitted: HashSet<String> = admitted.into_iter().map(|row| row.peer).collect();
    let banned: HashSet<String> = banned.into_iter().map(|row| row.peer).collect();
    let answered = answered.lock().unwrap();
    assert!(
        tokens.len() >= answered.enrolled.len(),
        "{} of {} tokens",
        tokens.len(),
        answered.enrolled.len()
    );
    let enrolled = answered.enrolled.values().flatten();
    for peer in enrolled.chain(&answered.admitted) {
        assert!(admitted.contains(&peer.to_string()), "{peer} was let in, and is forgotten");
    }
    for peer in &answered.banned {
        assert!(banned.contains(&peer.to_string()), "{peer} was banned, and is not");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_has_kept_what_it_has_answered() {
    let rounds = std::env::var("KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(SHORT);
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random);
    println!("replay with SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let state = tempfile::tempdir().unwrap();
    let answered = Arc::new(Mutex::new(Answered::default()));
    let mut spent = Vec::new();
    let began = Instant::now();
    for round in 0..rounds {
        let serving = Serving::start(state.path());
        let at = serving.at();
        verify(state.path(), &answered).await;
        // A token that was used up before stays so.
        if let Some(token) = spent.last() {
            let late = register(at, &KeyPair::generate().unwrap(), Some(token)).await;
            assert_eq!(late, Some(false), "a token was used {} times", USES + 1);
        }
        let stop = Arc::new(AtomicBool::new(false));
        let (path, known, flag) = (state.path().to_owned(), answered.clone(), stop.clone());
        let stirring = tokio::spawn(async move { stir(&path, at, &known, &flag).await });
        tokio::time::sleep(Duration::from_millis(random.random_range(0..400))).await;
        serving.kill();
        stop.store(true, Ordering::Relaxed);
        // Whatever waits for the server waits in vain.
        stirring.abort();
        if let Err(error) = stirring.await {
            assert!(error.is_cancelled(), "{error}");
        }
        let used_up =
            |(token, peers): (&Token, &Vec<PeerId>)| (peers.len() == USES as usize).then(|| token.clone());
        spent.extend(answered.lock().unwrap().enrolled.iter().filter_map(used_up).take(1));
        if (round + 1) % 50 == 0 {
            println!("{} kills in {} s", round + 1, began.elapsed().as_secs());
        }
    }
    let _serving = Serving::start(state.path());
    verify(state.path(), &answered).await;
    let answered = answered.lock().unwrap();
    let enrolled: usize = answered.enrolled.values().map(Vec::len).sum();
    println!(
        "{rounds} kills: {} tokens, {enrolled} peers enrolled, {} banned, {} admitted",
        answered.enrolled.len(),
        answered.banned.len(),
        answered.admitted.len()
    );
    assert!(enrolled > 0 && !answered.banned.is_empty(), "nothing was tested");
}
