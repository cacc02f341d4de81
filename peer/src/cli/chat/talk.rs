//! A conversation under way: what is typed, what arrives, and the stream that carries it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use peer::chat::{Conversation, Event, Frame, FrameError, LATE, harmless, pieces};
use peer::service::{Answer, Cause};
use peer::{Path, PeerId};
use rand::Rng as _;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::{sleep_until, timeout};

use super::super::Failure;
use super::super::gate::Gate;
use super::super::report::{Report, ms};
use super::caller::{Caller, PAUSE};
use super::front::{Front, Input, Said};
use super::links::{Line, Link, Pulse, Trouble};

/// For goodbyes, and for the last lines of whoever leaves.
const GOODBYE: Duration = Duration::from_secs(3);

/// How long the other side may take to greet on a new stream.
const GREETING: Duration = Duration::from_secs(10);

/// Two streams that were asked for within this time are one attempt of both sides.
const AT_ONCE: Duration = Duration::from_secs(5);

/// A conversation under way.
pub(super) struct Talk {
    own: PeerId,
    front: Front,
    gate: Arc<Gate>,
    report: Report,
    caller: Option<Caller>,
    /// Whom it is with.
    peer: Option<PeerId>,
    conversation: Conversation,
    line: Option<Attached>,
    /// This side has nothing more to say.
    ended: bool,
    /// When a side that leaves waits no more.
    deadline: Option<tokio::time::Instant>,
}

/// The stream in use.
struct Attached {
    line: Line,
    since: Instant,
    paths: Box<dyn futures_util::Stream<Item = Path> + Send + Unpin>,
    /// Whether the last path that was told of is direct.
    direct: Option<bool>,
}

/// What woke the loop.
enum Wake {
    Input(Input),
    Link(Option<Link>),
    Called(Result<Option<Link>, Trouble>),
    Frame(Option<Result<Frame, FrameError>>),
    Path(Option<Path>),
    Pulse(Pulse),
    Words(String, String),
    Time,
}

impl Talk {
    pub(super) fn new(
        own: PeerId,
        front: Front,
        gate: Arc<Gate>,
        report: Report,
        caller: Option<Caller>,
    ) -> Self {
        Self {
            own,
            front,
            gate,
            report,
            peer: caller.as_ref().map(|caller| caller.found.id),
            caller,
            conversation: Conversation::new(rand::rng().random()),
            line: None,
            ended: false,
            deadline: None,
        }
    }

    pub(super) fn begin(&mut self) {
        let own = self.own;
        match self.peer {
            Some(peer) => {
                let name = self.gate.name(peer);
                self.note("calling", json!({ "id": own.to_string() }), &format!("calling {name}"));
            }
            None => {
                let words = format!("waiting for a call: peer chat {own}");
                self.note("listening", json!({ "id": own.to_string() }), &words);
            }
        }
    }

    fn note(&mut self, event: &str, mut fields: Value, words: &str) {
        if let (Some(peer), true) = (self.peer, fields["id"].is_null()) {
            fields["peer"] = peer.to_string().into();
        }
        self.front.note(event, fields, words);
    }

    fn name(&self) -> String {
        self.peer.map_or_else(|| "the other side".to_owned(), |peer| self.gate.name(peer))
    }

    pub(super) async fn run(
        &mut self,
        linked: &mut mpsc::Receiver<Link>,
        words: &mut mpsc::UnboundedReceiver<(String, String)>,
    ) -> Result<(), Failure> {
        loop {
            if let Some(outcome) = self.settle().await {
                return outcome;
            }
            match self.wake(linked, words).await {
                Wake::Input(input) => {
                    if let Some(outcome) = self.typed(input) {
                        return outcome;
                    }
                }
                Wake::Link(Some(link)) => self.adopt(link).await,
                Wake::Link(None) => return Ok(()),
                Wake::Called(Ok(Some(link))) => self.adopt(link).await,
                Wake::Called(outcome) => {
                    let Some(caller) = &mut self.caller else { continue };
                    // While the old stream is there, or theirs is, nothing has failed.
                    if self.line.is_some() && self.conversation.is_met() {
                        continue;
                    }
                    caller.failed(outcome.err())?;
                }
                Wake::Frame(Some(Ok(frame))) => {
                    if self.conversation.handle_frame(frame, Instant::now()).is_err() {
                        self.lost(b"not by the rules");
                    }
                }
                Wake::Frame(Some(Err(_)) | None) => self.lost(b"the stream has ended"),
                Wake::Path(path) => self.path_is(path),
                Wake::Pulse(pulse) => self.felt(pulse),
                Wake::Words(event, words) => self.pass_on(&event, &words),
                Wake::Time => {
                    self.conversation.handle_timeout(Instant::now());
                    let ungreeted = self.line.as_ref().is_some_and(|line| line.since.elapsed() >= GREETING);
                    if ungreeted && !self.conversation.is_met() && !self.conversation.is_over() {
                        self.lost(b"no greeting");
                    }
                }
            }
        }
    }

    async fn wake(
        &mut self,
        linked: &mut mpsc::Receiver<Link>,
        words: &mut mpsc::UnboundedReceiver<(String, String)>,
    ) -> Wake {
        let greet_by = match &self.line {
            Some(line) if !self.conversation.is_met() => Some((line.since + GREETING).into()),
            _ => None,
        };
        let late = self.conversation.poll_timeout().map(Into::into);
        let next = [late, greet_by, self.deadline].into_iter().flatten().min();
        let time = async {
            match next {
                Some(next) => sleep_until(next).await,
                None => std::future::pending().await,
            }
        };
        let called = async {
            match &mut self.caller {
                Some(caller) => caller.called().await,
                None => std::future::pending().await,
            }
        };
        let line = async {
            match &mut self.line {
                Some(Attached { line, paths, .. }) => tokio::select! {
                    frame = line.incoming.recv() => Wake::Frame(frame),
                    Some(pulse) = line.pulse.recv() => Wake::Pulse(pulse),
                    path = paths.next() => Wake::Path(path),
                    // What did not fit goes when there is room.
                    _ = line.outgoing.reserve(), if line.outgoing.capacity() == 0 => Wake::Time,
                },
                None => std::future::pending().await,
            }
        };
        let listening = !self.ended && (self.front.is_screen() || !self.conversation.is_full());
        tokio::select! {
            wake = line => wake,
            link = linked.recv() => Wake::Link(link),
            outcome = called => Wake::Called(outcome),
            input = self.front.input(), if listening => Wake::Input(input),
            Some((event, words)) = words.recv() => Wake::Words(event, words),
            () = time => Wake::Time,
        }
    }

    /// Shows what there is to show and sends what there is to send. `Some`: it is over.
    async fn settle(&mut self) -> Option<Result<(), Failure>> {
        while let Some(event) = self.conversation.poll_event() {
            if let Some(end) = self.show(event).await {
                return Some(end);
            }
        }
        if let Some(Attached { line, .. }) = &self.line {
            while let Ok(permit) = line.outgoing.try_reserve() {
                match self.conversation.poll_transmit(Instant::now()) {
                    Some(frame) => permit.send(frame),
                    None => break,
                }
            }
        }
        if !self.ended {
            return None;
        }
        // One that has nothing to say finds out whether anybody is there, all the same; a person need not wait for that.
        let met = self.front.is_screen() || self.caller.as_ref().is_none_or(|caller| caller.met);
        let silent = self.conversation.undelivered() == 0 && self.line.is_none();
        if self.conversation.is_over() || (silent && met) {
            return Some(self.verdict());
        }
        let late = self.deadline.is_some_and(|deadline| deadline <= tokio::time::Instant::now());
        late.then(|| self.verdict())
    }

    /// How it ends when this side is done, or the other.
    fn verdict(&self) -> Result<(), Failure> {
        match self.conversation.undelivered() {
            0 => Ok(()),
            count => {
                let lines = if count == 1 { "1 line was".to_owned() } else { format!("{count} lines were") };
                let words = format!("{lines} not delivered to {}", self.name());
                Err(Failure::broken(anyhow::anyhow!(words)))
            }
        }
    }

    async fn show(&mut self, event: Event) -> Option<Result<(), Failure>> {
        let name = self.name();
        match event {
            Event::Here { anew } => {
                if let Some(caller) = &mut self.caller {
                    caller.reached();
                }
                let path = self.line.as_ref().and_then(|attached| attached.line.session.path());
                let how = match path {
                    Some(path) if path.is_direct() => ", on a direct path",
                    Some(_) => ", over the relay",
                    None => "",
                };
                if let Some(attached) = &mut self.line {
                    attached.direct = path.map(|path| path.is_direct());
                }
                self.note("here", json!({ "anew": anew }), &format!("{name} is here{how}"));
            }
            Event::Line { text, age } => {
                let id = self.peer.map(|peer| peer.to_string()).unwrap_or_default();
                let said = Said { name: &name, id: &id, text: &text, age };
                if let Err(error) = self.front.said(&said).await {
                    // Whoever reads has had enough, as `head` has.
                    let enough = error.kind() == std::io::ErrorKind::BrokenPipe;
                    return Some(if enough { Ok(()) } else { Err(Failure::failed(error)) });
                }
            }
            Event::Late { number, text } => {
                if let Some(attached) = &self.line {
                    attached.line.doubt.notify_one();
                }
                let fields = json!({ "number": number, "text": text });
                let words = format!("not delivered yet, after {} s: {}", LATE.as_secs(), short(&text));
                self.note("late", fields, &words);
            }
            Event::Delivered { number, text, after } => {
                let fields = json!({ "number": number, "text": text, "after_ms": ms(after) });
                let words = format!("delivered, after {:.0} s: {}", after.as_secs_f64(), short(&text));
                self.note("delivered", fields, &words);
            }
            Event::Left => {
                self.note("left", json!({}), &format!("{name} has left"));
                if let Some(attached) = self.line.take() {
                    attached.line.finish(GOODBYE).await;
                }
                self.conversation.handle_loss();
                if !self.front.is_screen() || self.ended {
                    return Some(self.verdict());
                }
                // A screen stays, for whoever comes next.
                if let Some(caller) = &mut self.caller {
                    caller.call_again(false);
                }
            }
            _ => {}
        }
        None
    }

    /// Something was typed. `Some`: that was the end.
    fn typed(&mut self, input: Input) -> Option<Result<(), Failure>> {
        match input {
            Input::Line(line) if self.front.is_screen() => match line.trim() {
                "" => {}
                "/quit" => self.leave(),
                "/path" => {
                    let path = self.line.as_ref().and_then(|attached| attached.line.session.path());
                    let words = path.map_or_else(|| "no session".to_owned(), |path| path.to_string());
                    self.note("path", json!({}), &words);
                }
                "/help" => {
                    self.note("help", json!({}), "/path: which path is in use; /quit or Ctrl-D: leave");
                }
                _ => self.say(&line),
            },
            Input::Line(line) => self.say(&line),
            Input::End => self.leave(),
            Input::Interrupted => return Some(Err(Failure::interrupted())),
        }
        None
    }

    fn say(&mut self, line: &str) {
        for piece in pieces(line) {
            if let Err(full) = self.conversation.say(piece, Instant::now()) {
                let words = format!("not said: {full}: {}", short(piece));
                self.note("full", json!({ "text": piece }), &words);
                return;
            }
            self.front.echo(piece);
        }
    }

    fn leave(&mut self) {
        if !self.front.is_screen() && self.caller.is_none() {
            // A program that waits for a call goes on hearing.
            self.front.stop();
            return;
        }
        self.ended = true;
        self.conversation.leave();
        // A person is not kept waiting; what a program has said is delivered first, however long that takes.
        self.deadline = self.front.is_screen().then(|| tokio::time::Instant::now() + GOODBYE);
    }

    /// A stream for the conversation: taken, unless there is a better one or the conversation is with somebody else.
    async fn adopt(&mut self, link: Link) {
        let Link { mut exchange, ours } = link;
        let peer = exchange.peer();
        let busy = self.peer.is_some_and(|present| present != peer)
            && (self.line.is_some() || self.conversation.undelivered() > 0);
        if busy {
            return exchange.end(Answer::Failed(Cause::Busy)).await;
        }
        // Where both sides called, and got two sessions, both keep the one that the lesser id asked for.
        let crossing = self.line.as_ref().is_some_and(|present| {
            let other_session = present.line.session.stable_id() != exchange.hub().session().stable_id();
            other_session && present.line.ours != ours && present.since.elapsed() < AT_ONCE
        });
        if crossing && ours != (self.own < peer) {
            return match ours {
                true => exchange.hub().session().close(1_u8.into(), b"the other call counts"),
                false => exchange.end(Answer::Failed(Cause::InUse)).await,
            };
        }
        if !ours && exchange.respond(Answer::Accepted).await.is_err() {
            return;
        }
        if self.peer.replace(peer).is_some_and(|before| before != peer) {
            // Numbers and acknowledgements are between two.
            self.conversation = Conversation::new(rand::rng().random());
        }
        let session = exchange.hub().session().clone();
        if let Some(old) = self.line.take()
            && old.line.session.stable_id() != session.stable_id()
        {
            old.line.give_up(b"opened anew");
        }
        self.conversation.handle_stream();
        if self.ended {
            self.conversation.leave();
        }
        let paths = Box::new(session.path_changes());
        self.line =
            Some(Attached { line: Line::new(exchange, ours), since: Instant::now(), paths, direct: None });
    }

    /// The stream is of no use any more; another is looked for.
    fn lost(&mut self, reason: &[u8]) {
        let mut lived = Duration::ZERO;
        if let Some(attached) = self.line.take() {
            let met = self.conversation.is_met();
            lived = attached.since.elapsed();
            attached.line.give_up(reason);
            if met {
                let words = format!("{} is gone: the session has ended", self.name());
                self.note("gone", json!({}), &words);
            }
        }
        self.conversation.handle_loss();
        if let Some(caller) = &mut self.caller {
            caller.call_again(lived > PAUSE);
        }
    }

    fn path_is(&mut self, path: Option<Path>) {
        let Some(attached) = &mut self.line else { return };
        let Some(path) = path else {
            // The session is over; its stream tells.
            attached.paths = Box::new(futures_util::stream::pending());
            return;
        };
        let session = attached.line.session.clone();
        // Kept for `peer list`, and told where everything is told.
        self.report.path(&session, &path);
        let told = attached.direct.replace(path.is_direct());
        let news = told.is_some_and(|direct| direct != path.is_direct()) && self.conversation.is_met();
        if self.front.is_screen() && news {
            let how = if path.is_direct() { "on a direct path now" } else { "reached over the relay now" };
            let words = format!("{} is {how}", self.name());
            self.note("path", json!({}), &words);
        }
    }

    fn felt(&mut self, pulse: Pulse) {
        let name = self.name();
        match pulse {
            Pulse::Silent => {
                self.note("silent", json!({}), &format!("{name} does not answer"));
                // It may have been started anew; the session that sleeps is kept until there is another.
                if let Some(caller) = &mut self.caller {
                    caller.call_again(true);
                }
            }
            Pulse::Back => {
                self.note("answers", json!({}), &format!("{name} answers again"));
                if let Some(caller) = &mut self.caller {
                    caller.again = None;
                }
            }
        }
    }

    /// Words of others, without those that are told here in words of our own.
    fn pass_on(&mut self, event: &str, words: &str) {
        if !matches!(event, "registered" | "connected" | "path" | "closed") {
            self.front.note(event, json!({}), words);
        }
    }

    /// Goodbye, in good order where there is time.
    pub(super) async fn end(&mut self) {
        if let Some(Attached { line, .. }) = self.line.take() {
            if !self.conversation.is_over() && self.conversation.is_met() {
                self.conversation.leave();
                while let Some(frame) = self.conversation.poll_transmit(Instant::now()) {
                    if !matches!(timeout(GOODBYE, line.outgoing.send(frame)).await, Ok(Ok(()))) {
                        break;
                    }
                }
            }
            line.finish(GOODBYE).await;
        }
    }
}

/// The beginning of a line, for a note about it.
fn short(text: &str) -> String {
    const SHOWN: usize = 40;
    let text = harmless(text);
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.into_owned(),
    }
}
