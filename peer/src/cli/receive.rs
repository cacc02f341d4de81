//! `peer receive`.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clap::Args;
use peer::daemon::{Access, Wanted};
use peer::service::{Answer, Exchange, Hub, Incoming, Opening, Request};
use peer::transfer::{self, Consent, Manifest, Progress, ReceiveError, Received, Refusal};
use peer::{PeerId, Session};
use serde_json::json;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};

use super::connect::follow;
use super::gate::Gate;
use super::report::Report;
use super::settings::{self, EndpointArguments, PeerName};
use super::transfers::{Meter, files, is_live, size, some};
use super::{Failure, exit, follow_servers, interrupted, pipe};

pub(super) const EXAMPLES: &str = "\
Examples:
  peer receive Downloads
  peer receive --from laptop --forever incoming

Without --from it asks before anything is taken, of trusted peers too, and needs a terminal to
ask at. Open invitations (peer invite) are taken meanwhile. What is there is never replaced
without --overwrite, or a yes at the terminal. A file has its name once its content is verified;
until then it is beside it and ends with .peer-part, and the next attempt goes on with it.";

/// The sender closes when it has heard that all is well.
const GOODBYE: Duration = Duration::from_secs(5);

/// How long a session may take to say what it is for.
const HESITATION: Duration = Duration::from_secs(30);

/// Sessions at a time.
const MAX_SESSIONS: usize = 64;

/// Names that `--json` shows of an offer.
const SHOWN: usize = 100;

#[derive(Debug, Args)]
pub(super) struct ReceiveArguments {
    #[command(flatten)]
    pub(super) endpoint: EndpointArguments,
    /// Take what this peer sends, and nothing from others, without asking; an alias or an id; may be given more than once.
    #[arg(long, value_name = "PEER")]
    from: Vec<PeerName>,
    /// Replace files that are there and differ.
    #[arg(long)]
    overwrite: bool,
    /// Go on after the first transfer, until stopped.
    #[arg(long)]
    forever: bool,
    /// The folder to put it into; made when it does not exist.
    #[arg(default_value = ".", value_name = "FOLDER")]
    folder: PathBuf,
}

pub(super) async fn run(arguments: ReceiveArguments, verbose: bool) -> Result<(), Failure> {
    let settings = arguments.endpoint.settle()?;
    let report = arguments.endpoint.report(&settings);
    let from = arguments
        .from
        .iter()
        .map(|name| settings.find(name).map(|found| found.id))
        .collect::<Result<Vec<_>, _>>()?;
    if arguments.from.is_empty() && !can_ask(&report) {
        let words = "say with --from PEER whose files to take, or run it at a terminal, where it can ask";
        return Err(Failure { code: exit::USAGE, error: anyhow::anyhow!(words) });
    }
    std::fs::create_dir_all(&arguments.folder).map_err(|error| {
        Failure::of_file(format_args!("{} cannot be made: {error}", arguments.folder.display()), Some(&error))
    })?;
    let gate =
        Arc::new(Gate::new(settings.home.clone(), Vec::new(), from, arguments.from.is_empty(), &report)?);
    let wanted = Wanted { files: true, ..Wanted::default() };
    let access = settings.serving(gate.policy(), (wanted, None), &report, "receive").await?;
    follow_servers(&access, &report, verbose);
    report.receiving(access.id(), access.servers().unwrap_or(&settings.servers));
    let mut desk = Desk::new(&arguments, gate, &report);
    let outcome = tokio::select! {
        outcome = desk.serve(&access) => outcome,
        () = interrupted() => desk.interrupted(),
    };
    settings::conclude(&access, outcome).await
}

/// Whether there is somebody to ask.
fn can_ask(report: &Report) -> bool {
    is_live(report) && std::io::stdin().is_terminal()
}

/// The transfer that is under way.
struct Running {
    session: Session,
    task: JoinHandle<Result<Received, ReceiveError>>,
    progress: Arc<Progress>,
}

struct Desk {
    gate: Arc<Gate>,
    folder: PathBuf,
    overwrite: bool,
    forever: bool,
    report: Report,
    /// `None`: those who may connect may send.
    person: Option<Person>,
    running: Option<Running>,
    /// Whether something has begun that has not ended well.
    unfinished: bool,
}

impl Desk {
    fn new(arguments: &ReceiveArguments, gate: Arc<Gate>, report: &Report) -> Self {
        let person = can_ask(report).then(Person::default);
        Self {
            gate,
            folder: arguments.folder.clone(),
            overwrite: arguments.overwrite,
            forever: arguments.forever,
            report: report.clone(),
            person: person.map(|person| Person { trusts_all: !arguments.from.is_empty(), ..person }),
            running: None,
            unfinished: false,
        }
    }

    async fn serve(&mut self, access: &Access) -> Result<(), Failure> {
        let (offers, mut offered) = mpsc::channel(1);
        let mut sessions = JoinSet::new();
        loop {
            let ended = async {
                match &mut self.running {
                    Some(running) => (&mut running.task).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                ended = ended => {
                    let Some(running) = self.running.take() else { continue };
                    let outcome = ended.unwrap_or(Err(ReceiveError::Abandoned));
                    if let Some(end) = self.ended(&running, outcome).await {
                        return end;
                    }
                }
                session = access.accept(), if sessions.len() < MAX_SESSIONS => {
                    let Some(session) = session else { return settings::brought_all(access) };
                    self.report.connected(&session);
                    sessions.spawn(attend(session, self.gate.clone(), offers.clone()));
                }
                Some(_) = sessions.join_next() => {}
                Some(exchange) = offered.recv() => self.arrived(exchange).await,
            }
        }
    }

    /// Somebody has files.
    async fn arrived(&mut self, exchange: Exchange) {
        let session = exchange.hub().session().clone();
        match self.running.take() {
            Some(mut running)
                if running.session.peer() == session.peer()
                    && running.session.stable_id() != session.stable_id() =>
            {
                // It has begun again, and knows why; what we have is as good as before.
                running.session.close(1_u8.into(), b"begun again");
                if let Ok(Ok(received)) = (&mut running.task).await {
                    self.tell(&running, &received);
                }
            }
            Some(running) => {
                self.running = Some(running);
                tokio::spawn(transfer::refuse(exchange.send, Refusal::Busy));
                return;
            }
            None => {}
        }
        let progress = Arc::new(Progress::default());
        let decider = Decider {
            peer: session.peer(),
            name: self.gate.name(session.peer()),
            overwrite: self.overwrite,
            person: self.person.clone(),
            report: self.report.clone(),
            session: session.clone(),
            progress: progress.clone(),
            meter: None,
        };
        let task = tokio::spawn(take(exchange, self.folder.clone(), decider, progress.clone()));
        self.running = Some(Running { session, task, progress });
        self.unfinished = true;
    }

    /// What follows the end of a transfer; `Some` when it was the last.
    async fn ended(
        &mut self,
        running: &Running,
        outcome: Result<Received, ReceiveError>,
    ) -> Option<Result<(), Failure>> {
        let peer = running.session.peer();
        match outcome {
            Ok(received) => {
                self.unfinished = false;
                self.tell(running, &received);
                let _ = tokio::time::timeout(GOODBYE, running.session.closed()).await;
                let problems = problems(&received);
                match problems {
                    Some(problems) if self.forever => self.report.session_failed(peer, &problems),
                    Some(problems) => return Some(Err(Failure::failed(problems))),
                    None => {}
                }
                (!self.forever).then_some(Ok(()))
            }
            Err(error) if error.is_transient() || matches!(error, ReceiveError::Declined) => {
                let message = error.to_string();
                let words = format!("{message}; what has arrived is kept, waiting for more");
                self.report.say(
                    "interrupted",
                    json!({ "message": message, "peer": peer.to_string() }),
                    &words,
                );
                None
            }
            Err(error) if self.forever => {
                self.report.session_failed(peer, &error.into());
                None
            }
            Err(error) => {
                let _ = tokio::time::timeout(GOODBYE, running.session.closed()).await;
                Some(Err(Failure::failed(error)))
            }
        }
    }

    fn tell(&self, running: &Running, received: &Received) {
        let standing = running.progress.now();
        let fields = json!({
            "peer": running.session.peer().to_string(),
            "received": received.received, "same": received.same, "kept": received.kept,
            "failed": received.failed.iter().map(|(path, problem)| json!({ "path": path, "message": problem.to_string() })).collect::<Vec<_>>(),
            "bytes": standing.bytes, "carried": standing.carried,
        });
        let mut words =
            format!("{} received and verified, {}", files(received.received), size(standing.bytes));
        if received.same > 0 {
            words += &format!("; {} were here already", received.same);
        }
        self.report.say("received", fields, &words);
    }

    fn interrupted(&self) -> Result<(), Failure> {
        if self.running.is_none() && self.forever {
            // Stopping it is how it ends.
            return Ok(());
        }
        let words = match self.unfinished {
            true => {
                "interrupted: what has arrived is kept; receive into the same folder again, and have it sent again"
            }
            false => "interrupted",
        };
        Err(Failure { code: exit::INTERRUPTED, error: anyhow::anyhow!(words) })
    }
}

/// What was not as it should be.
fn problems(received: &Received) -> Option<anyhow::Error> {
    let mut words = Vec::new();
    if !received.kept.is_empty() {
        words.push(format!(
            "others of the same name were here and are kept (--overwrite replaces them): {}",
            some(&received.kept)
        ));
    }
    if !received.failed.is_empty() {
        let failed: Vec<String> =
            received.failed.iter().map(|(path, problem)| format!("{path} ({problem})")).collect();
        words.push(format!("not received: {}", some(&failed)));
    }
    (!words.is_empty()).then(|| anyhow::anyhow!("{}", words.join("; ")))
}

/// Answers what a session wants until it ends: files are for the desk, anything else for the gate.
async fn attend(session: Session, gate: Arc<Gate>, offers: mpsc::Sender<Exchange>) {
    let hub = Hub::new(session.clone());
    let Ok(Ok(mut opening)) = tokio::time::timeout(HESITATION, hub.accept()).await else {
        session.close(1_u8.into(), b"nothing was asked for");
        return;
    };
    let mut streams = JoinSet::new();
    loop {
        streams.spawn(attend_stream(opening, gate.clone(), offers.clone()));
        while streams.try_join_next().is_some() {}
        let Ok(next) = hub.accept().await else { return };
        opening = next;
    }
}

async fn attend_stream(opening: Opening, gate: Arc<Gate>, offers: mpsc::Sender<Exchange>) {
    match opening.read().await {
        Ok(Incoming::Request(Request::Files, mut exchange)) => {
            // Whether they are wanted is said once they are known.
            if exchange.respond(Answer::Accepted).await.is_ok() {
                let _ = offers.send(exchange).await;
            }
        }
        Ok(Incoming::Request(request, exchange)) => gate.answer(request, exchange).await,
        Ok(Incoming::Pipe(send, receive)) => pipe::refuse(send, receive),
        Ok(_) | Err(_) => {}
    }
}

/// One transfer.
async fn take(
    exchange: Exchange,
    folder: PathBuf,
    mut decider: Decider,
    progress: Arc<Progress>,
) -> Result<Received, ReceiveError> {
    let report = decider.report.clone();
    // On a terminal the live line shows the path.
    let paths = (!is_live(&report)).then(|| tokio::spawn(follow(decider.session.clone(), report)));
    let folder: &Path = &folder;
    let taken = transfer::receive(exchange.send, exchange.receive, folder, &mut decider, &progress).await;
    if let Some(paths) = paths {
        paths.abort();
    }
    taken
}

/// Says yes or no, for a person or for what the command line says.
struct Decider {
    peer: PeerId,
    /// What the person calls it.
    name: String,
    overwrite: bool,
    person: Option<Person>,
    report: Report,
    session: Session,
    progress: Arc<Progress>,
    meter: Option<Meter>,
}

impl Consent for Decider {
    async fn accept(&mut self, offer: &Manifest) -> bool {
        let top: Vec<String> = offer.top().collect();
        let words =
            format!("{} offers {}, {}: {}", self.name, files(offer.files()), size(offer.bytes()), some(&top));
        let fields = json!({
            "peer": self.peer.to_string(), "files": offer.files(), "bytes": offer.bytes(),
            "top": &top[..top.len().min(SHOWN)],
        });
        self.report.say("offered", fields, &words);
        let taken = match &self.person {
            Some(person) if !person.trusts_all => {
                let offer = Offer { peer: self.peer, top, files: offer.files(), bytes: offer.bytes() };
                person.takes(offer).await
            }
            _ => true,
        };
        if taken {
            self.meter = Some(Meter::start(&self.report, &self.session, &self.progress));
        }
        taken
    }

    async fn replace(&mut self, paths: &[String]) -> bool {
        if self.overwrite {
            return true;
        }
        let Some(person) = &self.person else { return false };
        self.meter = None;
        let replace =
            person.says_yes(&format!("these are here and differ: {}. Replace them?", some(paths))).await;
        self.meter = Some(Meter::start(&self.report, &self.session, &self.progress));
        replace
    }
}

/// What a person has been asked about.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Offer {
    peer: PeerId,
    top: Vec<String>,
    files: u32,
    bytes: u64,
}

/// Whoever sits at the terminal.
#[derive(Clone, Default)]
struct Person {
    /// Has named on the command line whom to take everything from.
    trusts_all: bool,
    /// What was said yes to: it is not asked again when it goes on.
    taken: Arc<Mutex<Option<Offer>>>,
    lines: Arc<tokio::sync::Mutex<Option<mpsc::Receiver<String>>>>,
}

impl Person {
    async fn takes(&self, offer: Offer) -> bool {
        if self.taken.lock().unwrap_or_else(PoisonError::into_inner).as_ref() == Some(&offer) {
            return true;
        }
        let yes = self.says_yes("Take it?").await;
        if yes {
            *self.taken.lock().unwrap_or_else(PoisonError::into_inner) = Some(offer);
        }
        yes
    }

    /// Asks, and takes anything but a clear yes for a no.
    async fn says_yes(&self, question: &str) -> bool {
        let mut lines = self.lines.lock().await;
        let lines = lines.get_or_insert_with(read_lines);
        // What was typed before the question answers nothing.
        while lines.try_recv().is_ok() {}
        eprint!("peer: {question} [y/N] ");
        let answer = lines.recv().await.unwrap_or_default();
        matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes")
    }
}

/// Standard input by lines. One thread for good: a question that nobody waits for any more must not swallow the answer to the next.
fn read_lines() -> mpsc::Receiver<String> {
    let (sender, lines) = mpsc::channel(8);
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    });
    lines
}
