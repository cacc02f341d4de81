//! A command's end: shares of the daemon's sessions.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path as FilePath, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use quinn::{Connection, ConnectionError, Side};
use rendezvous_wire::message::IntroductionPolicy;
use rendezvous_wire::{KeyPair, PeerId, RendezvousAddress};
use tokio::sync::{oneshot, watch};

use super::line::{Hearer, Line, Teller};
use super::message::{self, Ask, Explained, Hello, News, NotOpened, Tell, Wanted, Who};
use super::status::Status;
use super::{DaemonError, close, packets, place};
use crate::endpoint::ConnectError;
use crate::server_changes::{Announcer, ServerChanges};
use crate::session::{Milestones, Path, Session, ShareNews};

/// How long the daemon may take to say who it is.
const PATIENCE: Duration = Duration::from_secs(10);

/// A daemon that ends closes its sessions first, then its sockets.
const MOMENT: Duration = Duration::from_secs(1);

/// How often it is looked whether the daemon is there again, to hear of its servers.
const RETURN: Duration = Duration::from_secs(1);

type CommandLine = Line<Ask, Tell>;

/// Connects, and hears who it is.
async fn call(path: &FilePath) -> Result<(CommandLine, Hello), DaemonError> {
    let socket = place::connect(path).await?;
    let mut line: CommandLine = Line::new(socket, message::MAX_CONTROL);
    let hello = tokio::time::timeout(PATIENCE, line.hearer.hear_as::<Hello>()).await;
    let path = path.to_owned();
    let Ok(Some(hello)) = hello else { return Err(DaemonError::Mute { path }) };
    if hello.version != message::VERSION {
        return Err(DaemonError::Version { pid: hello.pid, theirs: hello.version });
    }
    if hello.id.is_none() { Err(DaemonError::Foreign { path }) } else { Ok((line, hello)) }
}

/// Asks the daemon at `path` for one thing.
async fn ask(path: &FilePath, question: &Ask) -> Result<Tell, DaemonError> {
    let (mut line, hello) = call(path).await?;
    line.teller.tell(question).await;
    match line.hearer.hear().await {
        Some(Tell::Failed { words }) => Err(DaemonError::Failed(words)),
        Some(answer) => Ok(answer),
        None => Err(DaemonError::Gone { pid: hello.pid }),
    }
}

/// How the daemon at `path` is.
///
/// # Errors
///
/// [`DaemonError::NotRunning`] and others.
pub async fn status(path: &FilePath) -> Result<Status, DaemonError> {
    match ask(path, &Ask::Status).await? {
        Tell::Status { status } => Ok(*status),
        _ => Err(DaemonError::Mute { path: path.to_owned() }),
    }
}

/// Ends the daemon at `path`, and waits until it has ended.
///
/// # Errors
///
/// [`DaemonError::NotRunning`] and others.
pub async fn down(path: &FilePath) -> Result<(), DaemonError> {
    let (mut line, _) = call(path).await?;
    line.teller.tell(&Ask::Down).await;
    // The socket is closed when all is done.
    while line.hearer.hear().await.is_some() {}
    Ok(())
}

/// Has the daemon at `path` read again what is served.
///
/// # Errors
///
/// [`DaemonError::Failed`] when the configuration is wrong, and others.
pub async fn reload(path: &FilePath) -> Result<(), DaemonError> {
    ask(path, &Ask::Reload).await.map(|_| ())
}

/// Uses the daemon for one command. A cheap handle.
#[derive(Clone)]
pub struct Client(Arc<Inner>);

struct Inner {
    path: PathBuf,
    key: KeyPair,
    who: Who,
    pid: u32,
    servers: Vec<RendezvousAddress>,
    /// The daemon has ended while it was used.
    lost: watch::Sender<bool>,
    changes: Announcer,
    /// Listens for changes, once somebody wants to hear of them.
    listening: Mutex<Option<tokio::task::JoinHandle<()>>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        let listening = self.listening.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(listening) = listening.take() {
            listening.abort();
        }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("pid", &self.0.pid).finish_non_exhaustive()
    }
}

impl Client {
    /// The daemon at `path`, for the command `command` of the identity `key`.
    ///
    /// # Errors
    ///
    /// [`DaemonError::NotRunning`]; [`DaemonError::Identity`] when it is known by another key; and others.
    pub async fn connect(path: &FilePath, key: KeyPair, command: &str) -> Result<Self, DaemonError> {
        let (_, hello) = call(path).await?;
        let (own, theirs) = (key.id(), hello.id.unwrap_or(key.id()));
        if own != theirs {
            return Err(DaemonError::Identity { pid: hello.pid, theirs, own });
        }
        Ok(Self(Arc::new(Inner {
            path: path.to_owned(),
            key,
            who: Who { command: command.to_owned(), pid: std::process::id() },
            pid: hello.pid,
            servers: hello.servers,
            lost: watch::Sender::new(false),
            changes: Announcer::new(),
            listening: Mutex::default(),
        })))
    }

    /// The key that the daemon is known by, which is ours.
    pub fn id(&self) -> PeerId {
        self.0.key.id()
    }

    /// The daemon's process, as it was when this was made.
    pub fn pid(&self) -> u32 {
        self.0.pid
    }

    /// Where it registers.
    pub fn servers(&self) -> &[RendezvousAddress] {
        &self.0.servers
    }

    /// Whether the daemon has ended while it was used. Where a session has just broken that may be known a moment later: waits as long as that may
    /// take.
    pub async fn is_lost(&self) -> bool {
        let mut lost = self.0.lost.subscribe();
        tokio::time::timeout(MOMENT, lost.wait_for(|lost| *lost)).await.is_ok()
    }

    /// A share of a session with `peer`, which the daemon has or opens.
    ///
    /// # Errors
    ///
    /// As of [`Endpoint::connect`](crate::Endpoint::connect), and when the daemon is gone.
    pub async fn open(&self, peer: PeerId) -> Result<Session, ConnectError> {
        self.share(&Ask::Open { peer, who: self.0.who.clone() }, peer, Side::Client).await
    }

    async fn share(&self, question: &Ask, peer: PeerId, side: Side) -> Result<Session, ConnectError> {
        let started = Instant::now();
        let (line, hello) = call(&self.0.path).await?;
        let Line { teller, mut hearer, packets } = line;
        teller.tell(question).await;
        let (peer, news) = match hearer.hear().await {
            Some(Tell::Opened { peer, news }) => (peer, news),
            // Its endpoint is, and soon it will be.
            Some(Tell::NotOpened { why: NotOpened::Closed }) => {
                return Err(DaemonError::Gone { pid: hello.pid }.into());
            }
            Some(Tell::NotOpened { why }) => return Err(why.into_error(peer)),
            _ => return Err(DaemonError::Gone { pid: hello.pid }.into()),
        };
        let connection = packets::connect(packets, &self.0.key).await.map_err(|error| {
            tracing::debug!(%error, "no connection to the daemon");
            DaemonError::Gone { pid: hello.pid }
        })?;
        let (follower, share) = Follower::new(&news, hearer, connection.clone(), self.0.lost.clone());
        let (dropped, drop_heard) = oneshot::channel();
        let leased = Leased(Arc::new(Lease {
            teller,
            width: share.width,
            heard: share.heard,
            side,
            waiting: follower.waiting.clone(),
            _dropped: dropped,
        }));
        tokio::spawn(follower.run(drop_heard));
        let news =
            ShareNews { path: share.path, milestones: share.milestones, exhausted: share.exhausted, started };
        Ok(Session::share(connection, peer, news, leased))
    }

    /// Takes what peers bring for this command from now on.
    ///
    /// # Errors
    ///
    /// When the daemon is gone.
    pub async fn serve(&self, wanted: Wanted, policy: IntroductionPolicy) -> Result<Serving, DaemonError> {
        let (mut line, hello) = call(&self.0.path).await?;
        line.teller.tell(&Ask::Serve { wanted, policy, who: self.0.who.clone() }).await;
        match line.hearer.hear().await {
            Some(Tell::Done) => Ok(Serving {
                client: self.clone(),
                teller: line.teller,
                hearer: tokio::sync::Mutex::new(line.hearer),
            }),
            _ => Err(DaemonError::Gone { pid: hello.pid }),
        }
    }

    /// Which of these peers are there, and by which path they are reached.
    ///
    /// # Errors
    ///
    /// When the daemon is gone.
    pub async fn reach(&self, peers: &[PeerId]) -> Result<Vec<Option<Path>>, DaemonError> {
        match ask(&self.0.path, &Ask::Reach { peers: peers.to_vec() }).await? {
            Tell::Reached { paths } => Ok(paths.into_iter().map(|path| path.map(Path::from)).collect()),
            _ => Err(DaemonError::Mute { path: self.0.path.clone() }),
        }
    }

    /// What becomes of the daemon's rendezvous servers from now on; of the next daemon's as well, should this one end.
    pub fn server_changes(&self) -> ServerChanges {
        let mut listening = self.0.listening.lock().unwrap_or_else(PoisonError::into_inner);
        listening.get_or_insert_with(|| {
            let (path, changes) = (self.0.path.clone(), self.0.changes.clone());
            tokio::spawn(async move {
                loop {
                    if let Ok((mut line, _)) = call(&path).await {
                        line.teller.tell(&Ask::Servers).await;
                        while let Some(Tell::Server { change }) = line.hearer.hear().await {
                            let change = crate::ServerChange::from(change);
                            changes.announce(&change.server, change.state);
                        }
                    }
                    tokio::time::sleep(RETURN).await;
                }
            })
        });
        self.0.changes.listen().subscribe()
    }
}

/// What peers bring for a command.
pub struct Serving {
    client: Client,
    teller: Teller<Ask>,
    hearer: tokio::sync::Mutex<Hearer<Tell>>,
}

impl fmt::Debug for Serving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serving").field("client", &self.client).finish_non_exhaustive()
    }
}

impl Serving {
    /// A share of the next session that brings something; `None` when the daemon is gone.
    pub(super) async fn accept(&self) -> Option<Session> {
        let mut hearer = self.hearer.lock().await;
        loop {
            match hearer.hear().await {
                Some(Tell::Arrived { arrival }) => {
                    let ask = Ask::Take { arrival, who: self.client.0.who.clone() };
                    match self.client.share(&ask, self.client.id(), Side::Server).await {
                        Ok(session) => return Some(session),
                        // It has gone meanwhile.
                        Err(error) => tracing::debug!(%error, "an arrival could not be taken"),
                    }
                }
                Some(_) => {}
                None => {
                    self.client.0.lost.send_replace(true);
                    return None;
                }
            }
        }
    }

    /// Lets others in from now on.
    pub(super) async fn set_policy(&self, policy: IntroductionPolicy) {
        self.teller.tell(&Ask::Policy { policy }).await;
    }
}

/// What a share knows of the session that it is of.
#[derive(Clone)]
pub(crate) struct Leased(Arc<Lease>);

struct Lease {
    teller: Teller<Ask>,
    width: watch::Receiver<Option<usize>>,
    heard: watch::Receiver<u64>,
    side: Side,
    waiting: Arc<Mutex<Waiting>>,
    /// Tells the follower when this is dropped.
    _dropped: oneshot::Sender<()>,
}

/// Questions that the daemon has yet to answer. Dropped: it never will.
#[derive(Default)]
struct Waiting {
    delivered: HashMap<u64, oneshot::Sender<bool>>,
    explained: HashMap<u64, oneshot::Sender<Option<Explained>>>,
    next: u64,
    over: bool,
}

fn lock(waiting: &Mutex<Waiting>) -> MutexGuard<'_, Waiting> {
    // Only whole entries are put in and taken out.
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Leased {
    pub(crate) fn side(&self) -> Side {
        self.0.side
    }

    /// The longest datagram that the path beneath takes.
    pub(crate) fn width(&self) -> Option<usize> {
        *self.0.width.borrow()
    }

    /// UDP datagrams that the session beneath has received.
    pub(crate) fn heard(&self) -> u64 {
        *self.0.heard.borrow()
    }

    /// Waits until the other side has all of that stream. False: it never will.
    pub(crate) async fn delivered(&self, stream: u64) -> bool {
        let (reply, delivered) = oneshot::channel();
        {
            let mut waiting = lock(&self.0.waiting);
            if waiting.over {
                return false;
            }
            waiting.delivered.insert(stream, reply);
        }
        self.0.teller.tell(&Ask::Deliver { stream }).await;
        delivered.await.unwrap_or(false)
    }

    /// Why the session's path is what it is, as the daemon shows it.
    pub(crate) async fn explain(&self) -> Option<Explained> {
        let (reply, explained) = oneshot::channel();
        let number = {
            let mut waiting = lock(&self.0.waiting);
            if waiting.over {
                return None;
            }
            waiting.next += 1;
            let number = waiting.next;
            waiting.explained.insert(number, reply);
            number
        };
        self.0.teller.tell(&Ask::Explain { number }).await;
        explained.await.ok()?
    }
}

/// Hears what becomes of the session beneath a share.
struct Follower {
    hearer: Hearer<Tell>,
    /// Until the session is dropped: to be closed when the daemon is gone.
    connection: Option<Connection>,
    lost: watch::Sender<bool>,
    path: watch::Sender<Option<Path>>,
    exhausted: watch::Sender<bool>,
    width: watch::Sender<Option<usize>>,
    heard: watch::Sender<u64>,
    milestones: Arc<Mutex<Milestones>>,
    waiting: Arc<Mutex<Waiting>>,
}

/// The session's ends of the same.
struct Share {
    path: watch::Receiver<Option<Path>>,
    exhausted: watch::Receiver<bool>,
    width: watch::Receiver<Option<usize>>,
    heard: watch::Receiver<u64>,
    milestones: Arc<Mutex<Milestones>>,
}

impl Follower {
    fn new(
        news: &News,
        hearer: Hearer<Tell>,
        connection: Connection,
        lost: watch::Sender<bool>,
    ) -> (Self, Share) {
        let (path, path_seen) = watch::channel(None);
        let (exhausted, exhausted_seen) = watch::channel(false);
        let (width, width_seen) = watch::channel(None);
        let (heard, heard_seen) = watch::channel(0);
        let milestones = Arc::<Mutex<Milestones>>::default();
        let follower = Self {
            hearer,
            connection: Some(connection),
            lost,
            path,
            exhausted,
            width,
            heard,
            milestones: milestones.clone(),
            waiting: Arc::default(),
        };
        follower.take(news.clone());
        let share = Share {
            path: path_seen,
            exhausted: exhausted_seen,
            width: width_seen,
            heard: heard_seen,
            milestones,
        };
        (follower, share)
    }

    fn take(&self, news: News) {
        let path = news.path.map(Path::from);
        if path.is_some_and(|path| path.is_direct()) {
            let mut milestones = self.milestones.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            milestones.proven.get_or_insert(now);
            milestones.direct.get_or_insert(now);
        }
        self.path.send_if_modified(|present| {
            let changed = *present != path;
            *present = path;
            changed
        });
        self.exhausted.send_if_modified(|present| {
            let changed = *present != news.exhausted;
            *present = news.exhausted;
            changed
        });
        self.width.send_replace(news.width);
        self.heard.send_replace(news.heard);
    }

    async fn run(mut self, mut dropped: oneshot::Receiver<()>) {
        let mut ended = false;
        loop {
            let connection = &self.connection;
            let closed = async {
                match connection {
                    Some(connection) => drop(connection.closed().await),
                    None => std::future::pending().await,
                }
            };
            // What was said before the connection was closed is heard before that.
            let told = tokio::select! {
                biased;
                told = self.hearer.hear() => told,
                () = closed => {
                    self.gone(ended);
                    self.connection = None;
                    continue;
                }
                _ = &mut dropped, if self.connection.is_some() => {
                    self.connection = None;
                    continue;
                }
            };
            match told {
                Some(Tell::News { news }) => self.take(news),
                Some(Tell::Delivered { stream, all }) => {
                    if let Some(reply) = lock(&self.waiting).delivered.remove(&stream) {
                        let _ = reply.send(all);
                    }
                }
                Some(Tell::Explained { number, explained }) => {
                    if let Some(reply) = lock(&self.waiting).explained.remove(&number) {
                        let _ = reply.send(explained);
                    }
                }
                // The connection says how.
                Some(Tell::Ended) => ended = true,
                Some(_) => {}
                None => {
                    self.gone(ended);
                    break;
                }
            }
        }
        let mut waiting = lock(&self.waiting);
        *waiting = Waiting { over: true, ..Waiting::default() };
    }

    /// The socket or the connection is closed: by us, or because the daemon has ended.
    fn gone(&self, session_ended: bool) {
        let Some(connection) = &self.connection else { return };
        let ended = match connection.close_reason() {
            None => true,
            Some(ConnectionError::ApplicationClosed(close)) => close.error_code == close::DAEMON_ENDS.into(),
            Some(ConnectionError::LocallyClosed) => false,
            // Without a word, or before the code can be told (RFC 9000, 10.2.3).
            Some(_) => true,
        };
        if session_ended {
            connection.close(close::SESSION_LOST.into(), b"the session has ended");
        } else if ended {
            self.lost.send_replace(true);
            connection.close(close::DAEMON_ENDS.into(), b"the daemon has ended");
        }
    }
}
