//! A session that is opened again whenever it ends, and what is forwarded through it.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::Rng as _;
use rendezvous_wire::PeerId;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use super::listen::{Listener, Opener};
use super::spec::{Bind, Forwarding, Target};
use super::{Listeners, Notice, Observer, connect, socks};
use crate::daemon::Access;
use crate::endpoint::ConnectError;
use crate::service::{Exchange, Hub, Incoming, Request, RequestError};
use crate::session::Session;

/// The first and the longest pause between attempts to open a session; each is twice the one before, and up to half of it is left to chance.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// How long a connection waits for a session.
const WAIT: Duration = Duration::from_secs(15);

/// How often a session is looked at.
const LOOK: Duration = Duration::from_secs(5);

/// A session from which nothing has come for this long is asked whether it is there: longer than its keep-alive interval of 15 s.
const SILENCE: Duration = Duration::from_secs(20);

/// A session that does not answer for this long is given up if another can be opened: several round trips of any path, and two retransmissions (RFC 9002, 6.2).
const SILENT: Duration = Duration::from_secs(5);

/// Code of a session that was given up.
const GIVEN_UP: u32 = 0x5e12;

/// What to forward.
#[derive(Debug, Clone, Default)]
#[must_use]
pub struct Plan {
    /// From here to targets at the other side.
    pub local: Vec<Forwarding>,
    /// From the other side to targets here; the other side must allow it.
    pub remote: Vec<Forwarding>,
    /// Where SOCKS5 is spoken (RFC 1928); the other side resolves names.
    pub socks: Vec<Bind>,
}

/// Why nothing is forwarded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ForwardError {
    /// There is no listening there.
    #[error("{}", bind_failed(at, source))]
    Bind {
        /// Where.
        at: Bind,
        /// What the system said.
        source: io::Error,
    },
    /// The first session could not be opened.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The other side does not listen for us.
    #[error("the other side does not listen at {at}: {source}")]
    Remote {
        /// Where.
        at: Bind,
        /// Why.
        source: RequestError,
    },
    /// What was to be done first in every session was not accepted.
    #[error("{0}")]
    Prologue(RequestError),
}

fn bind_failed(at: &Bind, source: &io::Error) -> String {
    let hint = match source.kind() {
        io::ErrorKind::AddrInUse => ". Another program listens there; choose another port",
        io::ErrorKind::PermissionDenied if matches!(at, Bind::Address(..)) => {
            ". Ports below 1024 may need root; choose another port"
        }
        io::ErrorKind::AddrNotAvailable => ". That is no address of this machine",
        _ => "",
    };
    format!("cannot listen at {at}: {source}{hint}")
}

/// The session of the moment.
#[derive(Debug, Clone)]
pub(super) struct Link {
    hub: watch::Receiver<Option<Hub>>,
    doubt: Arc<Notify>,
}

impl Link {
    /// Makes a request in the present session, or in the next one.
    pub(super) async fn request(&self, request: &Request) -> Result<Exchange, RequestError> {
        let mut hub = self.hub.clone();
        let there =
            hub.wait_for(|hub| hub.as_ref().is_some_and(|hub| hub.session().close_reason().is_none()));
        let hub = match tokio::time::timeout(WAIT, there).await {
            Ok(Ok(hub)) => hub.clone(),
            _ => None,
        };
        hub.ok_or(RequestError::Session)?.request(request).await
    }

    /// The session is to be asked whether it is there.
    pub(super) fn suspect(&self) {
        self.doubt.notify_one();
    }
}

/// One target through the link.
#[derive(Debug, Clone)]
pub(super) struct To {
    pub(super) link: Link,
    pub(super) target: Arc<Target>,
}

impl Opener for To {
    async fn open(&self) -> Result<Exchange, RequestError> {
        self.link.request(&Request::Connect(Target::clone(&self.target))).await
    }

    fn suspect(&self) {
        self.link.suspect();
    }

    fn shown(&self) -> String {
        self.target.to_string()
    }
}

/// Forwards through sessions with one peer.
#[derive(Debug)]
pub struct Forwarder {
    access: Access,
    peer: PeerId,
    remote: Vec<Forwarding>,
    observer: Observer,
    hub: watch::Sender<Option<Hub>>,
    doubt: Arc<Notify>,
    /// Listeners; they end with it.
    _listeners: JoinSet<()>,
}

impl Forwarder {
    /// Listens wherever the plan says so. What comes waits for the session that [`run`](Self::run) opens.
    ///
    /// # Errors
    ///
    /// [`ForwardError::Bind`]; then it listens nowhere.
    pub async fn bind(
        access: impl Into<Access>,
        peer: PeerId,
        plan: Plan,
        observer: Observer,
    ) -> Result<Self, ForwardError> {
        let (sender, hub) = watch::channel(None);
        let doubt = Arc::new(Notify::new());
        let link = Link { hub, doubt: doubt.clone() };
        let mut listeners = Vec::new();
        for forwarding in plan.local {
            listeners.push((listener(&forwarding.from).await?, Some(forwarding.to)));
        }
        for bind in &plan.socks {
            listeners.push((listener(bind).await?, None));
        }
        let mut tasks = JoinSet::new();
        for (listener, target) in listeners {
            let at = listener.bind_shown().clone();
            observer.notice(Notice::Listening { at, to: target.clone(), remote: false });
            match target {
                Some(target) => {
                    let to = To { link: link.clone(), target: Arc::new(target) };
                    tasks.spawn(listener.run(to, observer.clone()));
                }
                None => {
                    tasks.spawn(socks::run(listener, link.clone(), observer.clone()));
                }
            }
        }
        Ok(Self {
            access: access.into(),
            peer,
            remote: plan.remote,
            observer,
            hub: sender,
            doubt,
            _listeners: tasks,
        })
    }

    /// Opens a session, and another whenever one ends. In each, `prologue` is done first.
    ///
    /// # Errors
    ///
    /// When the first session fails: an error that more patience would not have cured.
    pub async fn run(
        self,
        prologue: impl AsyncFn(&Hub) -> Result<(), RequestError>,
    ) -> Result<(), ForwardError> {
        let mut pause = BACK_OFF.0;
        let mut first = true;
        let mut next = None;
        loop {
            let session = match next.take() {
                Some(session) => Ok(session),
                None => self.access.connect(self.peer).await,
            };
            match session {
                Ok(session) => {
                    let began = Instant::now();
                    self.observer.notice(Notice::Connected(session.clone()));
                    let hub = Hub::new(session);
                    match self.carry(&hub, &prologue).await {
                        // An answer that did not come is the session's end, not a refusal.
                        Err(error) if first && !error.is_transient() => return Err(error),
                        Err(error) => tracing::debug!(%error, "a session was of no use"),
                        Ok(replacement) => next = replacement,
                    }
                    first = false;
                    self.hub.send_replace(None);
                    hub.session().close(GIVEN_UP.into(), b"opened anew");
                    self.observer.notice(Notice::Lost { peer: self.peer });
                    // The next one is opened at once, unless this one was closed as soon as it stood.
                    if next.is_some() || began.elapsed() > pause {
                        pause = BACK_OFF.0;
                    } else {
                        tokio::time::sleep(pause).await;
                        pause = (pause * 2).min(BACK_OFF.1);
                    }
                }
                Err(error) if first => return Err(error.into()),
                Err(ConnectError::Closed) => return Ok(()),
                Err(error) => {
                    let after = pause.mul_f64(rand::rng().random_range(0.5..1.0));
                    self.observer.notice(Notice::Retry { error, after });
                    tokio::time::sleep(after).await;
                    pause = (pause * 2).min(BACK_OFF.1);
                }
            }
        }
    }

    /// One session, from its beginning to its end; with the one that takes its place, where there is one.
    async fn carry(
        &self,
        hub: &Hub,
        prologue: &impl AsyncFn(&Hub) -> Result<(), RequestError>,
    ) -> Result<Option<Session>, ForwardError> {
        prologue(hub).await.map_err(ForwardError::Prologue)?;
        // They listen for as long as these streams are open.
        let mut asked: Vec<(Exchange, Arc<Target>)> = Vec::new();
        for forwarding in &self.remote {
            let (exchange, at) = ask_to_listen(hub, &forwarding.from)
                .await
                .map_err(|source| ForwardError::Remote { at: forwarding.from.clone(), source })?;
            let to = Some(forwarding.to.clone());
            self.observer.notice(Notice::Listening { at, to, remote: true });
            asked.push((exchange, Arc::new(forwarding.to.clone())));
        }
        self.hub.send_replace(Some(hub.clone()));
        tokio::select! {
            _ = hub.session().closed() => Ok(None),
            session = self.replacement(hub) => Ok(Some(session)),
            () = take_connections(hub, &asked, &self.observer) => Ok(None),
        }
    }

    /// Another session, once this one does not answer and another can be opened: the other side was started anew. One that merely sleeps, or has
    /// lost its network, finds this session and its connections when it is back.
    async fn replacement(&self, hub: &Hub) -> Session {
        loop {
            self.watch(hub).await;
            match self.access.connect(self.peer).await {
                Ok(session) => return session,
                Err(error) => tracing::debug!(%error, "no other session either"),
            }
        }
    }

    /// Ends when the other side does not answer.
    async fn watch(&self, hub: &Hub) {
        let received = || hub.session().heard();
        let (mut count, mut silent) = (received(), Duration::ZERO);
        loop {
            let doubted = tokio::time::timeout(LOOK, self.doubt.notified()).await.is_ok();
            let now = received();
            silent = if now == count { silent + LOOK } else { Duration::ZERO };
            count = now;
            if (doubted || silent >= SILENCE) && !hub.answers(SILENT).await {
                tracing::debug!(peer = %self.peer, "no answer within {SILENT:?}: is there another session to be had?");
                return;
            }
        }
    }
}

impl ForwardError {
    /// Whether the session's end is behind it.
    fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Prologue(RequestError::Session) | Self::Remote { source: RequestError::Session, .. }
        )
    }
}

async fn listener(bind: &Bind) -> Result<Listener, ForwardError> {
    Listener::bind(bind).await.map_err(|source| ForwardError::Bind { at: bind.clone(), source })
}

async fn ask_to_listen(hub: &Hub, bind: &Bind) -> Result<(Exchange, Bind), RequestError> {
    let mut exchange = hub.ask(&Request::Listen(bind.clone())).await?;
    let mut port = [0; 2];
    exchange.receive.read_exact(&mut port).await.map_err(|_| RequestError::Session)?;
    let mut at = bind.clone();
    if let Bind::Address(_, address) = &mut at {
        address.set_port(u16::from_be_bytes(port));
    }
    Ok((exchange, at))
}

/// Takes connections to what the other side listens for on our behalf. Anything else is refused: we asked, we do not serve.
async fn take_connections(hub: &Hub, asked: &[(Exchange, Arc<Target>)], observer: &Observer) {
    let targets: Vec<(u64, Arc<Target>)> =
        asked.iter().map(|(exchange, target)| (exchange.id(), target.clone())).collect();
    let targets = Arc::new(targets);
    let mut connections = JoinSet::new();
    while let Ok(opening) = hub.accept().await {
        while connections.try_join_next().is_some() {}
        let (targets, observer) = (targets.clone(), observer.clone());
        connections.spawn(async move {
            match opening.read().await {
                Ok(Incoming::Request(Request::Connection { listener }, exchange)) => {
                    match targets.iter().find(|(id, _)| *id == listener) {
                        Some((_, target)) => connect::lead(target, exchange, &observer).await,
                        None => exchange.refuse().await,
                    }
                }
                Ok(Incoming::Request(request, exchange)) => {
                    connect::serve(
                        request,
                        exchange,
                        &super::Rules::default(),
                        &Listeners::default(),
                        &observer,
                    )
                    .await;
                }
                Ok(Incoming::Pipe(mut send, mut receive)) => {
                    let _ = send.reset(crate::service::REFUSED.into());
                    let _ = receive.stop(crate::service::REFUSED.into());
                }
                Err(error) => tracing::debug!(%error, "an incoming stream was of no use"),
            }
        });
    }
}
