//! The daemon: who connects to it, and what becomes of that.

use std::path::Path as FilePath;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use rendezvous_wire::message::IntroductionPolicy;
use rendezvous_wire::{KeyPair, PeerId, RendezvousAddress};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

use super::line::{Hearer, Line, Teller};
use super::message::{self, Ask, Hello, NotOpened, Tell, Who};
use super::packets::{self, Packets};
use super::place::{self, Listening};
use super::sessions::{Held, SWEEP, Sessions, rfc3339};
use super::share::{Brought, Share};
use super::status::{ServingStatus, Status};
use super::{DaemonError, Explained};
use crate::endpoint::Endpoint;
use crate::explain::Explanation;
use crate::service::{Exchange, Request};
use crate::session::Session;

/// Commands at a time, and their shares; more wait.
const MAX_LINES: usize = 1024;

/// How long a command may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a peer may take to be reached for [`Ask::Reach`].
const REACH: Duration = Duration::from_secs(8);

/// What a daemon serves by itself, and what is shown of it.
pub trait Host: Send + Sync + 'static {
    /// Who may be introduced for what it serves.
    fn policy(&self) -> IntroductionPolicy;

    /// Whether it serves that to that peer.
    fn takes(&self, peer: PeerId, request: &Request) -> bool;

    /// Answers a request, and does what it asks for until that is over.
    fn answer(&self, request: Request, exchange: Exchange) -> impl Future<Output = ()> + Send;

    /// Something that is no request was refused to that peer.
    fn refused(&self, peer: PeerId, what: &str);

    /// A session stands.
    fn connected(&self, session: &Session);

    /// It is over.
    fn ended(&self, session: &Session);

    /// What people call that peer.
    fn alias(&self, peer: PeerId) -> Option<String>;

    /// An explanation as it is to be shown.
    fn explained(&self, explanation: &Explanation) -> Explained;

    /// What it serves.
    fn serving(&self) -> ServingStatus;

    /// Reads again what it serves; in words, why that is impossible.
    fn reload(&self) -> Result<(), String>;
}

/// Why a daemon has ended.
#[derive(Debug)]
#[must_use]
pub enum End {
    /// Somebody has asked it to, and waits until this is dropped.
    Asked(mpsc::Sender<Vec<u8>>),
    /// It was stopped.
    Stopped,
    /// Its endpoint is closed.
    Closed,
}

/// A daemon that listens for commands.
#[derive(Debug)]
pub struct Daemon(Listening);

/// What every conversation works with.
struct Shared<H> {
    sessions: Arc<Sessions<H>>,
    key: KeyPair,
    servers: Vec<RendezvousAddress>,
    since: SystemTime,
    down: mpsc::Sender<Teller<Tell>>,
}

impl Daemon {
    /// Listens at `path` for the identity whose key is in the file `key`. Must be called inside a tokio runtime.
    ///
    /// # Errors
    ///
    /// When another daemon has the place or the identity, or others could get at the socket.
    pub fn listen(path: &FilePath, key: &FilePath) -> Result<Self, DaemonError> {
        Listening::begin(path, key).map(Self)
    }

    /// Serves commands and peers until it is asked to end, or `stop` is over. The endpoint stays open. The socket goes when this daemon is dropped.
    pub async fn run<H: Host>(
        &self,
        endpoint: &Endpoint,
        key: KeyPair,
        servers: Vec<RendezvousAddress>,
        host: Arc<H>,
        stop: impl Future<Output = ()>,
    ) -> End {
        let sessions = Sessions::new(endpoint.clone(), host);
        let (down, mut asked_down) = mpsc::channel(1);
        let since = SystemTime::now();
        let shared = Arc::new(Shared { sessions: sessions.clone(), key, servers, since, down });
        let accepting = async {
            while let Some(session) = endpoint.accept().await {
                sessions.hold(session, false);
            }
        };
        let sweeping = async {
            let mut sweep = tokio::time::interval(SWEEP);
            loop {
                sweep.tick().await;
                sessions.sweep(Instant::now()).await;
            }
        };
        let mut lines = JoinSet::new();
        let end = tokio::select! {
            () = stop => End::Stopped,
            () = accepting => End::Closed,
            () = sweeping => End::Closed,
            () = self.take_lines(&shared, &mut lines) => End::Closed,
            teller = asked_down.recv() => teller.map_or(End::Closed, |teller| End::Asked(teller.into_frames())),
        };
        sessions.end_shares();
        lines.shutdown().await;
        end
    }

    async fn take_lines<H: Host>(&self, shared: &Arc<Shared<H>>, lines: &mut JoinSet<()>) {
        let room = Arc::new(Semaphore::new(MAX_LINES));
        loop {
            let Ok(permit) = room.clone().acquire_owned().await else { return };
            match self.0.listener.accept().await {
                Ok((socket, _)) => {
                    while lines.try_join_next().is_some() {}
                    let shared = shared.clone();
                    lines.spawn(async move {
                        shared.converse(socket).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    // Out of files: they come back when a conversation ends.
                    tracing::warn!(%error, "the control socket cannot be read");
                    tokio::time::sleep(SWEEP).await;
                }
            }
        }
    }
}

impl<H: Host> Shared<H> {
    async fn converse(self: Arc<Self>, socket: UnixStream) {
        let own = place::is_own(&socket);
        let line: Line<Tell, Ask> = Line::new(socket, message::MAX_ASK);
        let Line { teller, mut hearer, packets } = line;
        let hello = Hello {
            version: message::VERSION,
            pid: std::process::id(),
            id: own.then(|| self.sessions.endpoint.id()),
            servers: if own { self.servers.clone() } else { Vec::new() },
        };
        teller.tell_as(&hello).await;
        if !own {
            tracing::warn!("another user has tried to use this daemon; refused");
            return;
        }
        let Ok(Some(ask)) = tokio::time::timeout(PATIENCE, hearer.hear()).await else { return };
        match ask {
            Ask::Open { peer, who } => {
                // The command may give up meanwhile.
                let opened = tokio::select! {
                    opened = self.sessions.open(peer) => opened,
                    () = teller.closed() => return,
                };
                match opened {
                    Ok(held) => self.share(held, None, who, (teller, hearer, packets)).await,
                    Err(error) => {
                        teller.tell(&Tell::NotOpened { why: NotOpened::from(&error) }).await;
                    }
                }
            }
            Ask::Take { arrival, who } => match self.sessions.take_arrival(arrival) {
                Some((held, brought)) => {
                    self.share(held, Some(brought), who, (teller, hearer, packets)).await;
                }
                None => {
                    let words = "it has gone meanwhile".to_owned();
                    teller.tell(&Tell::NotOpened { why: NotOpened::Other { words } }).await;
                }
            },
            Ask::Serve { wanted, policy, who } => {
                drop(packets);
                let server = self.sessions.enter(wanted, policy, teller.clone(), who).await;
                teller.tell(&Tell::Done).await;
                while let Some(ask) = hearer.hear().await {
                    if let Ask::Policy { policy } = ask {
                        self.sessions.set_policy(server, policy).await;
                    }
                }
                self.sessions.leave(server).await;
            }
            Ask::Servers => {
                drop(packets);
                let mut changes = self.sessions.endpoint.server_changes();
                loop {
                    tokio::select! {
                        change = changes.next() => {
                            let Some(change) = change else { return };
                            teller.tell(&Tell::Server { change: change.into() }).await;
                        }
                        // Nothing more is asked: it is the end.
                        _ = hearer.hear() => return,
                    }
                }
            }
            Ask::Status => {
                let status = Box::new(self.status().await);
                teller.tell(&Tell::Status { status }).await;
            }
            Ask::Reach { peers } => {
                let paths = self.reach(peers).await;
                teller.tell(&Tell::Reached { paths }).await;
            }
            Ask::Reload => {
                let told = match self.sessions.host.reload() {
                    Ok(()) => Tell::Done,
                    Err(words) => Tell::Failed { words },
                };
                self.sessions.apply_policy().await;
                teller.tell(&told).await;
            }
            Ask::Down => {
                drop(packets);
                let _ = self.down.send(teller).await;
                // Until all conversations are ended.
                std::future::pending::<()>().await;
            }
            Ask::Policy { .. } | Ask::Explain { .. } | Ask::Deliver { .. } => {}
        }
    }

    /// Gives a command its share of a session, until either is over.
    async fn share(
        &self,
        held: Arc<Held>,
        brought: Option<Brought>,
        who: Who,
        (teller, hearer, packets): (Teller<Tell>, Hearer<Ask>, Packets),
    ) {
        let (peer, news) = (held.session().peer(), Share::present(&held));
        teller.tell(&Tell::Opened { peer, news }).await;
        let connection = match tokio::time::timeout(PATIENCE, packets::accept(packets, &self.key)).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => return tracing::debug!(%error, "a command has not come"),
            Err(_) => return tracing::debug!("a command has not come"),
        };
        let share = Share::new(self.sessions.number(), who, held.clone(), connection);
        held.join(&share);
        let _leaving = Leaving(&held, &share);
        share.clone().run(&*self.sessions.host, teller, hearer, brought).await;
    }

    async fn status(&self) -> Status {
        let (sessions, waiting) = self.sessions.statuses();
        Status {
            pid: std::process::id(),
            id: self.sessions.endpoint.id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            since: rfc3339(self.since),
            servers: self.sessions.endpoint.servers().await.into_iter().map(Into::into).collect(),
            sessions,
            waiting,
            serving: self.sessions.host.serving(),
        }
    }

    /// By which path each of them is reached, if it is.
    async fn reach(&self, peers: Vec<PeerId>) -> Vec<Option<message::Told>> {
        let mut paths = vec![None; peers.len()];
        let mut asking = JoinSet::new();
        for (index, peer) in peers.into_iter().enumerate() {
            let sessions = self.sessions.clone();
            asking.spawn(async move {
                let held = tokio::time::timeout(REACH, sessions.open(peer)).await.ok()?.ok()?;
                Some((index, held.session().path()?))
            });
        }
        while let Some(asked) = asking.join_next().await {
            if let Ok(Some((index, path))) = asked {
                paths[index] = Some(path.into());
            }
        }
        paths
    }
}

/// The command uses the session no more, however that came about.
struct Leaving<'a>(&'a Held, &'a Share);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.leave(self.1);
    }
}
