//! The daemon's sessions, and who uses them.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use rendezvous_wire::PeerId;
use rendezvous_wire::message::IntroductionPolicy;
use tokio::task::JoinSet;

use super::line::Teller;
use super::message::{Tell, Wanted, Who};
use super::server::Host;
use super::share::{Brought, Share};
use super::status::{BytesStatus, CommandStatus, SessionStatus};
use crate::endpoint::{ConnectError, Endpoint};
use crate::service::{Answer, Exchange, Hub, Incoming, Opening, REFUSED, Request};
use crate::session::{Path, Session};

/// A session that nobody uses is kept for so long: whoever runs one command runs another.
const LINGER: Duration = Duration::from_secs(30);

/// How often it is looked at them.
pub(super) const SWEEP: Duration = Duration::from_secs(1);

/// How long the answer of a session that is there is waited for before another is opened as well: it outlasts the round trips of most paths.
const HEAD_START: Duration = Duration::from_secs(1);

/// A session that does not answer for this long is not used: several round trips of any path, and two retransmissions (RFC 9002, 6.2).
const SILENT: Duration = Duration::from_secs(5);

/// How long a program that has opened a session may take to say whether it is a daemon; one that is none may never say.
const HOLDING: Duration = Duration::from_secs(2);

/// How long a command may take to take what was brought for it.
const TAKING: Duration = Duration::from_secs(10);

/// Streams of one peer's that may be served at a time: as many as it may have open.
const MOST_SERVED: usize = 2048;

/// Policy ids that a server takes; with more everybody is introduced, and told apart here.
const MOST_IDS: usize = 256;

/// Code of a session that nobody uses.
const UNUSED: u32 = 0;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Only whole entries are put in and taken out.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn rfc3339(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}

/// A session of the daemon's.
pub(super) struct Held {
    hub: Hub,
    dialled: bool,
    since: SystemTime,
    shares: Mutex<BTreeMap<u64, Arc<Share>>>,
    /// Streams that commands have opened, by their ids: whose, and what the command calls them.
    owners: Mutex<HashMap<u64, (Weak<Share>, u64)>>,
    /// Streams of the other side's that are being served.
    served: AtomicUsize,
    /// The other side keeps it for us, though it is the other side's.
    hold: tokio::sync::Mutex<Hold>,
    /// Since when nobody uses it.
    idle: Mutex<Option<Instant>>,
}

/// Whether a session that the other side has opened may be used for our commands.
enum Hold {
    NotAsked,
    Kept(#[expect(dead_code, reason = "it is kept for as long as the stream is open")] Exchange),
    /// It is a program's that gives nothing, or gives only what is its own.
    No,
}

/// Counts a stream that is served.
struct Serving(Arc<Held>);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.served.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Held {
    fn new(session: Session, dialled: bool) -> Arc<Self> {
        Arc::new(Self {
            hub: Hub::new(session),
            dialled,
            since: SystemTime::now(),
            shares: Mutex::default(),
            owners: Mutex::default(),
            served: AtomicUsize::new(0),
            hold: tokio::sync::Mutex::new(Hold::NotAsked),
            idle: Mutex::default(),
        })
    }

    pub(super) fn hub(&self) -> &Hub {
        &self.hub
    }

    pub(super) fn session(&self) -> &Session {
        self.hub.session()
    }

    pub(super) fn own(&self, real: u64, local: u64, share: &Arc<Share>) {
        lock(&self.owners).insert(real, (Arc::downgrade(share), local));
    }

    pub(super) fn disown(&self, real: u64) {
        lock(&self.owners).remove(&real);
    }

    pub(super) fn join(&self, share: &Arc<Share>) {
        lock(&self.shares).insert(share.number, share.clone());
    }

    pub(super) fn leave(&self, share: &Share) {
        lock(&self.shares).remove(&share.number);
    }

    /// Looks at it; true when nobody has used it for long enough.
    fn look(&self, now: Instant) -> bool {
        let used = !lock(&self.shares).is_empty() || self.served.load(Ordering::Relaxed) > 0;
        let mut idle = lock(&self.idle);
        *idle = if used { None } else { idle.or(Some(now)) };
        idle.is_some_and(|since| now.saturating_duration_since(since) >= LINGER)
    }

    /// Whether the other side gives in it what it has to give.
    async fn is_for_us(&self) -> bool {
        if self.session().close_reason().is_some() {
            return false;
        }
        if self.dialled {
            return true;
        }
        let mut hold = self.hold.lock().await;
        if let Hold::NotAsked = *hold {
            *hold = match tokio::time::timeout(HOLDING, self.hub.ask(&Request::Hold)).await {
                Ok(Ok(exchange)) => Hold::Kept(exchange),
                Ok(Err(_)) | Err(_) => Hold::No,
            };
        }
        matches!(*hold, Hold::Kept(_))
    }

    fn status(&self, alias: Option<String>) -> SessionStatus {
        let (session, path) = (self.session(), self.session().path());
        let traffic = session.traffic().unwrap_or_default();
        let (local, remote) = match path {
            Some(Path::Direct { local, remote, .. }) => (Some(local), Some(remote)),
            Some(Path::Relayed { relay, .. }) => (None, Some(relay)),
            None => (None, None),
        };
        SessionStatus {
            peer: session.peer(),
            alias,
            dialled: self.dialled,
            since: rfc3339(self.since),
            direct: path.is_some_and(|path| path.is_direct()),
            path: path.map(|path| path.to_string()),
            local: local.map(|address| address.to_string()),
            remote: remote.map(|address| address.to_string()),
            rtt_ms: (session.rtt().as_secs_f64() * 1e6).round() / 1e3,
            bytes: BytesStatus {
                direct_sent: traffic.direct_sent,
                direct_received: traffic.direct_received,
                relayed_sent: traffic.relayed_sent,
                relayed_received: traffic.relayed_received,
            },
            commands: lock(&self.shares).values().map(|share| share.status()).collect(),
            served: self.served.load(Ordering::Relaxed),
        }
    }
}

/// A command that takes what peers bring.
struct Server {
    wanted: Wanted,
    policy: IntroductionPolicy,
    teller: Teller<Tell>,
    who: Who,
    since: SystemTime,
}

/// What was brought for a command that has yet to take it.
struct Arrival {
    held: Arc<Held>,
    brought: Brought,
}

/// See the module's documentation.
pub(super) struct Sessions<H> {
    pub(super) endpoint: Endpoint,
    pub(super) host: Arc<H>,
    /// The oldest first.
    all: Mutex<Vec<Arc<Held>>>,
    /// One dial at a time to each.
    dialling: Mutex<HashMap<PeerId, Arc<tokio::sync::Mutex<()>>>>,
    /// By number; the newest has what peers bring.
    servers: Mutex<BTreeMap<u64, Server>>,
    arrivals: Mutex<HashMap<u64, Arrival>>,
    policy: tokio::sync::Mutex<Option<IntroductionPolicy>>,
    next: AtomicU64,
}

impl<H: Host> Sessions<H> {
    pub(super) fn new(endpoint: Endpoint, host: Arc<H>) -> Arc<Self> {
        Arc::new(Self {
            endpoint,
            host,
            all: Mutex::default(),
            dialling: Mutex::default(),
            servers: Mutex::default(),
            arrivals: Mutex::default(),
            policy: tokio::sync::Mutex::default(),
            next: AtomicU64::new(1),
        })
    }

    pub(super) fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// A session with `peer`: one that is there, or a new one.
    pub(super) async fn open(self: &Arc<Self>, peer: PeerId) -> Result<Arc<Held>, ConnectError> {
        let turn = lock(&self.dialling).entry(peer).or_default().clone();
        let held = {
            let _turn = turn.lock().await;
            self.find_or_dial(peer).await
        };
        drop(turn);
        lock(&self.dialling).retain(|_, turn| Arc::strong_count(turn) > 1);
        held
    }

    async fn find_or_dial(self: &Arc<Self>, peer: PeerId) -> Result<Arc<Held>, ConnectError> {
        let known: Vec<Arc<Held>> =
            lock(&self.all).iter().filter(|held| held.session().peer() == peer).cloned().collect();
        // The newest first, and our own before theirs.
        let (ours, theirs): (Vec<_>, Vec<_>) = known.into_iter().rev().partition(|held| held.dialled);
        let mut found = None;
        for held in ours.into_iter().chain(theirs) {
            if held.is_for_us().await {
                found = Some(held);
                break;
            }
        }
        let dial = self.endpoint.connect(peer);
        let Some(found) = found else { return Ok(self.hold(dial.await?, true)) };
        // The other side may have been started anew without a word, and then it is a new session that reaches it.
        let answers = found.hub.answers(SILENT);
        let late = async {
            tokio::time::sleep(HEAD_START).await;
            dial.await
        };
        tokio::pin!(answers, late);
        tokio::select! {
            answers = &mut answers => match answers {
                true => Ok(found.clone()),
                false => Ok(self.hold(late.await?, true)),
            },
            dialled = &mut late => match dialled {
                Ok(session) => Ok(self.hold(session, true)),
                Err(_) if answers.await => Ok(found.clone()),
                Err(error) => Err(error),
            },
        }
    }

    /// Keeps a session and serves what the other side wants in it, until it ends.
    pub(super) fn hold(self: &Arc<Self>, session: Session, dialled: bool) -> Arc<Held> {
        let held = Held::new(session, dialled);
        lock(&self.all).push(held.clone());
        self.host.connected(held.session());
        tokio::spawn(self.clone().attend(held.clone()));
        held
    }

    async fn attend(self: Arc<Self>, held: Arc<Held>) {
        let mut streams = JoinSet::new();
        while let Ok(opening) = held.hub.accept().await {
            while streams.try_join_next().is_some() {}
            if streams.len() < MOST_SERVED {
                held.served.fetch_add(1, Ordering::Relaxed);
                streams.spawn(self.clone().serve(Serving(held.clone()), opening));
            }
        }
        streams.shutdown().await;
        lock(&self.all).retain(|other| !Arc::ptr_eq(other, &held));
        self.host.ended(held.session());
    }

    /// One stream that the other side has opened.
    async fn serve(self: Arc<Self>, serving: Serving, opening: Opening) {
        let held = &serving.0;
        let peer = held.session().peer();
        match opening.read().await {
            Ok(Incoming::Pipe(mut send, mut receive)) => match self.server(peer, |wanted| wanted.pipes) {
                Some(number) => self.bring(number, held, Brought::pipe((send, receive))).await,
                None => {
                    self.host.refused(peer, "a pipe");
                    let _ = send.reset(REFUSED.into());
                    let _ = receive.stop(REFUSED.into());
                }
            },
            Ok(Incoming::Request(Request::Connection { listener }, exchange)) => {
                let owner = lock(&held.owners).get(&listener).cloned();
                let share = owner.and_then(|(share, local)| Some((share.upgrade()?, local)));
                let Some((share, local)) = share else { return exchange.refuse().await };
                let request = Request::Connection { listener: local };
                share.bring(Brought::request(&request, exchange.into_halves())).await;
            }
            Ok(Incoming::Request(Request::Hold, mut exchange)) => {
                if exchange.respond(Answer::Accepted).await.is_ok() {
                    let mut byte = [0];
                    let _ = exchange.receive.read(&mut byte).await;
                }
            }
            Ok(Incoming::Request(request, exchange)) => {
                let wants = |wanted: &Wanted| match request {
                    Request::Files => wanted.files,
                    Request::Connect(_) | Request::Listen(_) => wanted.forwardings,
                    Request::Bench(_) => wanted.measurements,
                    Request::Chat => wanted.conversations,
                    _ => false,
                };
                let server = match self.host.takes(peer, &request) {
                    true => None,
                    false => self.server(peer, wants),
                };
                match server {
                    Some(number) => {
                        self.bring(number, held, Brought::request(&request, exchange.into_halves())).await;
                    }
                    None => self.host.answer(request, exchange).await,
                }
            }
            Err(error) => tracing::debug!(%error, "an incoming stream was of no use"),
        }
    }

    /// The newest command that wants it from that peer.
    fn server(&self, peer: PeerId, wants: impl Fn(&Wanted) -> bool) -> Option<u64> {
        let servers = lock(&self.servers);
        let wanting =
            servers.iter().rev().find(|(_, server)| wants(&server.wanted) && server.policy.admits(peer));
        wanting.map(|(number, _)| *number)
    }

    /// Offers a stream to a command, until that has taken it.
    async fn bring(&self, server: u64, held: &Arc<Held>, brought: Brought) {
        let arrival = self.number();
        lock(&self.arrivals).insert(arrival, Arrival { held: held.clone(), brought });
        let teller = lock(&self.servers).get(&server).map(|server| server.teller.clone());
        if let Some(teller) = teller {
            teller.tell(&Tell::Arrived { arrival }).await;
            tokio::time::sleep(TAKING).await;
        }
        if let Some(Arrival { brought, .. }) = lock(&self.arrivals).remove(&arrival) {
            let (mut send, mut receive) = brought.halves;
            let _ = send.reset(REFUSED.into());
            let _ = receive.stop(REFUSED.into());
        }
    }

    /// What has arrived under this number; once.
    pub(super) fn take_arrival(&self, arrival: u64) -> Option<(Arc<Held>, Brought)> {
        lock(&self.arrivals).remove(&arrival).map(|arrival| (arrival.held, arrival.brought))
    }

    /// A command takes what peers bring from now on; its number.
    pub(super) async fn enter(
        &self,
        wanted: Wanted,
        policy: IntroductionPolicy,
        teller: Teller<Tell>,
        who: Who,
    ) -> u64 {
        let number = self.number();
        let server = Server { wanted, policy, teller, who, since: SystemTime::now() };
        lock(&self.servers).insert(number, server);
        self.apply_policy().await;
        number
    }

    pub(super) async fn set_policy(&self, server: u64, policy: IntroductionPolicy) {
        if let Some(server) = lock(&self.servers).get_mut(&server) {
            server.policy = policy;
        }
        self.apply_policy().await;
    }

    pub(super) async fn leave(&self, server: u64) {
        lock(&self.servers).remove(&server);
        self.apply_policy().await;
    }

    /// Has those introduced that somebody here wants to be introduced.
    pub(super) async fn apply_policy(&self) {
        let mut told = self.policy.lock().await;
        let mut policy = self.host.policy();
        for server in lock(&self.servers).values() {
            policy = either(policy, &server.policy);
        }
        if told.as_ref() != Some(&policy) {
            self.endpoint.set_policy(policy.clone()).await;
            *told = Some(policy);
        }
    }

    /// Looks at all sessions, and ends those that nobody uses.
    pub(super) async fn sweep(&self, now: Instant) {
        let all: Vec<Arc<Held>> = lock(&self.all).clone();
        for held in all {
            if held.look(now) {
                if held.dialled {
                    held.session().close(UNUSED.into(), b"not in use");
                } else if let Ok(mut hold) = held.hold.try_lock()
                    && let Hold::Kept(_) = *hold
                {
                    *hold = Hold::NotAsked;
                }
            }
        }
        self.apply_policy().await;
    }

    /// Ends every share: the daemon ends.
    pub(super) fn end_shares(&self) {
        for held in lock(&self.all).iter() {
            lock(&held.shares).values().for_each(|share| share.end());
        }
    }

    pub(super) fn statuses(&self) -> (Vec<SessionStatus>, Vec<CommandStatus>) {
        let all: Vec<Arc<Held>> = lock(&self.all).clone();
        let sessions = all.iter().map(|held| held.status(self.host.alias(held.session().peer()))).collect();
        let waiting = lock(&self.servers)
            .values()
            .map(|server| CommandStatus {
                command: server.who.command.clone(),
                pid: server.who.pid,
                since: rfc3339(server.since),
                streams: 0,
            })
            .collect();
        (sessions, waiting)
    }
}

/// Whom either admits.
fn either(one: IntroductionPolicy, other: &IntroductionPolicy) -> IntroductionPolicy {
    match (one, other) {
        (IntroductionPolicy::Only(mut ids), IntroductionPolicy::Only(more)) => {
            ids.extend(more);
            ids.sort_unstable();
            ids.dedup();
            if ids.len() > MOST_IDS { IntroductionPolicy::Anyone } else { IntroductionPolicy::Only(ids) }
        }
        _ => IntroductionPolicy::Anyone,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_is_wanted_by_anybody_is_introduced() {
        let id = |seed| PeerId::from_bytes([seed; 32]);
        let only = |seeds: &[u8]| IntroductionPolicy::Only(seeds.iter().map(|seed| id(*seed)).collect());
        assert_eq!(either(only(&[3, 1]), &only(&[2, 3])), only(&[1, 2, 3]));
        assert_eq!(either(only(&[1]), &IntroductionPolicy::Anyone), IntroductionPolicy::Anyone);
        assert_eq!(either(only(&[]), &only(&[])), only(&[]));
        let many: Vec<PeerId> = (0..=255).map(id).collect();
        let other = IntroductionPolicy::Only(vec![PeerId::from_bytes([1, 2].repeat(16).try_into().unwrap())]);
        assert_eq!(either(IntroductionPolicy::Only(many), &other), IntroductionPolicy::Anyone);
    }
}
