//! How the two sides of a conversation find each other: sessions, and the streams in them.

use std::sync::Arc;
use std::time::Duration;

use peer::chat::{Frame, FrameError};
use peer::daemon::Access;
use peer::quinn::{RecvStream, SendStream, Side};
use peer::service::{Answer, Cause, Exchange, Hub, Incoming, Opening, Request, RequestError};
use peer::{ConnectError, Session};
use serde_json::json;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;

use super::super::gate::Gate;
use super::super::report::Report;
use super::super::settings::{self, Found, Settings};
use super::super::{Failure, exit, pipe};

/// How long the other side may take to say whether it talks; nobody is asked for that.
const ANSWER: Duration = Duration::from_secs(30);

/// How long a session may take to say what it is for.
const HESITATION: Duration = Duration::from_secs(30);

/// Sessions at a time.
const MAX_SESSIONS: usize = 64;

/// How often a session is looked at.
const LOOK: Duration = Duration::from_secs(5);

/// A session from which nothing has come for this long is asked whether it is there: longer than its keep-alive interval of 15 s.
const SILENCE: Duration = Duration::from_secs(20);

/// How long an answer to that may take: several round trips of any path, and two retransmissions (RFC 9002, 6.2).
const SILENT: Duration = Duration::from_secs(5);

/// Frames that wait between the stream and the screen, in either direction.
const QUEUE: usize = 64;

/// A stream for a conversation.
pub(super) struct Link {
    pub(super) exchange: Exchange,
    /// We have asked for it, and it was accepted; else it waits for our answer.
    pub(super) ours: bool,
}

/// Why a call led to nothing.
pub(super) enum Trouble {
    /// Another may, a little later.
    Passing(Failure),
    /// The other side does not want to, and would not a little later.
    Refused(Failure),
}

/// Calls the other side. `None`: it is calling as well, in the same session, and its stream is the one.
pub(super) async fn call(
    access: Access,
    settings: Arc<Settings>,
    found: Found,
    gate: Arc<Gate>,
    links: mpsc::Sender<Link>,
    report: Report,
) -> Result<Option<Link>, Trouble> {
    let session = access.connect(found.id).await.map_err(|error| match error {
        error @ (ConnectError::Unavailable(_)
        | ConnectError::TimedOut { .. }
        | ConnectError::Handshake { .. }
        | ConnectError::Server(_)) => Trouble::Passing(error.into()),
        error => Trouble::Refused(error.into()),
    })?;
    report.connected(&session);
    let hub = Hub::new(session);
    tokio::spawn(attend(hub.clone(), gate, links, true, report.clone()));
    let asked = async {
        settings.show_secret(&hub, &found, &report).await.map_err(|error| match error {
            RequestError::Session => Trouble::Passing(Failure::broken(error)),
            error => Trouble::Refused(settings::not_invited(error)),
        })?;
        match hub.ask(&Request::Chat).await {
            Ok(exchange) => Ok(Some(Link { exchange, ours: true })),
            Err(RequestError::Failed(Cause::InUse)) => Ok(None),
            Err(RequestError::Failed(Cause::Busy)) => {
                let words = format!("{} is talking with somebody else", found.id);
                Err(Trouble::Passing(Failure { code: exit::REFUSED, error: anyhow::anyhow!(words) }))
            }
            Err(RequestError::Refused) => {
                let words = format!("{} does not talk; `peer chat` must run there", found.id);
                Err(Trouble::Refused(Failure { code: exit::REFUSED, error: anyhow::anyhow!(words) }))
            }
            Err(error) => Err(Trouble::Passing(Failure::request(error, "a conversation"))),
        }
    };
    tokio::time::timeout(ANSWER, asked).await.unwrap_or_else(|_| {
        let words = format!("no answer within {} s", ANSWER.as_secs());
        Err(Trouble::Passing(Failure::broken(anyhow::anyhow!(words))))
    })
}

/// Takes the sessions that others open; never ends before the endpoint does.
pub(super) async fn answer(access: &Access, gate: &Arc<Gate>, links: &mpsc::Sender<Link>, report: &Report) {
    let mut sessions = JoinSet::new();
    loop {
        tokio::select! {
            session = access.accept(), if sessions.len() < MAX_SESSIONS => {
                let Some(session) = session else { return };
                report.connected(&session);
                sessions.spawn(attend(Hub::new(session), gate.clone(), links.clone(), false, report.clone()));
            }
            Some(_) = sessions.join_next() => {}
        }
    }
}

/// Answers what a session wants until it ends: conversations are for the person, anything else for the gate. Where both sides call at once, in
/// one session, the stream of the QUIC client counts.
async fn attend(hub: Hub, gate: Arc<Gate>, links: mpsc::Sender<Link>, calls: bool, report: Report) {
    let first = calls && hub.session().side() == Side::Client;
    let mut streams = JoinSet::new();
    let mut patience = (!calls).then_some(HESITATION);
    loop {
        let opening = match patience.take() {
            Some(patience) => tokio::time::timeout(patience, hub.accept()).await,
            None => Ok(hub.accept().await),
        };
        match opening {
            Ok(Ok(opening)) => {
                streams.spawn(attend_stream(opening, gate.clone(), links.clone(), first, report.clone()));
            }
            Ok(Err(_)) => return,
            Err(_) => return hub.session().close(1_u8.into(), b"nothing was asked for"),
        }
        while streams.try_join_next().is_some() {}
    }
}

async fn attend_stream(
    opening: Opening,
    gate: Arc<Gate>,
    links: mpsc::Sender<Link>,
    first: bool,
    report: Report,
) {
    match opening.read().await {
        Ok(Incoming::Request(Request::Chat, exchange)) => {
            let peer = exchange.peer();
            if !gate.admits(peer) {
                let words = format!("refused to {peer}: a conversation; it is not trusted");
                report.say("denied", json!({ "peer": peer.to_string(), "what": "chat" }), &words);
                exchange.refuse().await;
            } else if first {
                exchange.end(Answer::Failed(Cause::InUse)).await;
            } else {
                let _ = links.send(Link { exchange, ours: false }).await;
            }
        }
        Ok(Incoming::Request(request, exchange)) => gate.answer(request, exchange).await,
        Ok(Incoming::Pipe(send, receive)) => pipe::refuse(send, receive),
        Ok(_) | Err(_) => {}
    }
}

/// Whether the other side answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pulse {
    Silent,
    Back,
}

/// The stream that carries the conversation now.
pub(super) struct Line {
    pub(super) session: Session,
    pub(super) ours: bool,
    pub(super) incoming: mpsc::Receiver<Result<Frame, FrameError>>,
    pub(super) outgoing: mpsc::Sender<Frame>,
    pub(super) pulse: mpsc::Receiver<Pulse>,
    pub(super) doubt: Arc<Notify>,
    writer: tokio::task::JoinHandle<()>,
    tasks: JoinSet<()>,
}

impl Line {
    pub(super) fn new(exchange: Exchange, ours: bool) -> Self {
        let hub = exchange.hub().clone();
        let (Exchange { send, receive, .. }, session) = (exchange, hub.session().clone());
        let (frames, incoming) = mpsc::channel(QUEUE);
        let (outgoing, to_write) = mpsc::channel(QUEUE);
        let (beats, pulse) = mpsc::channel(1);
        let doubt = Arc::new(Notify::new());
        let mut tasks = JoinSet::new();
        tasks.spawn(read(receive, frames));
        tasks.spawn(feel(hub, doubt.clone(), beats));
        let writer = tokio::spawn(write(send, to_write));
        Self { session, ours, incoming, outgoing, pulse, doubt, writer, tasks }
    }

    /// Ends it in good order: the other side has what was sent.
    pub(super) async fn finish(self, patience: Duration) {
        let Self { session, outgoing, writer, mut tasks, .. } = self;
        drop(outgoing);
        let _ = tokio::time::timeout(patience, writer).await;
        tasks.abort_all();
        session.close(0_u8.into(), b"goodbye");
    }

    /// Ends it without a word more, and its session with it.
    pub(super) fn give_up(self, reason: &[u8]) {
        self.writer.abort();
        self.session.close(1_u8.into(), reason);
    }
}

async fn read(mut stream: RecvStream, frames: mpsc::Sender<Result<Frame, FrameError>>) {
    loop {
        let frame = Frame::read(&mut stream).await;
        let last = frame.is_err();
        if frames.send(frame).await.is_err() || last {
            return;
        }
    }
}

/// Writes until there are no more, ends the stream, and waits until the other side has all of it.
async fn write(mut stream: SendStream, mut frames: mpsc::Receiver<Frame>) {
    while let Some(frame) = frames.recv().await {
        if stream.write_all(&frame.encode()).await.is_err() {
            return;
        }
    }
    let _ = stream.finish();
    let _ = stream.stopped().await;
}

/// Tells when the other side does not answer any more, and when it does again.
async fn feel(hub: Hub, doubt: Arc<Notify>, beats: mpsc::Sender<Pulse>) {
    let received = || hub.session().stats().udp_rx.datagrams;
    let (mut count, mut silent) = (received(), Duration::ZERO);
    loop {
        let doubted = tokio::time::timeout(LOOK, doubt.notified()).await.is_ok();
        let now = received();
        silent = if now == count { silent + LOOK } else { Duration::ZERO };
        count = now;
        if !(doubted || silent >= SILENCE) || hub.answers(SILENT).await {
            continue;
        }
        if beats.send(Pulse::Silent).await.is_err() {
            return;
        }
        while !hub.answers(LOOK).await {
            if hub.session().close_reason().is_some() {
                return;
            }
        }
        if beats.send(Pulse::Back).await.is_err() {
            return;
        }
    }
}
