//! Signalling with one rendezvous server: connects over UDP, or over TCP where UDP does not get through, registers, carries messages, moves back to
//! UDP when it can, comes back when it is lost.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt as _, StreamExt as _};
use quinn::{Connection, ConnectionError};
use rand::Rng as _;
use rendezvous_wire::admission::{Challenge, Solution, Work};
use rendezvous_wire::message::{Notice, Request};
use rendezvous_wire::{KeyPair, RendezvousAddress};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::error::Elapsed;
use tokio::time::{MissedTickBehavior, timeout};

use crate::backoff;
use crate::driver::Event;
use crate::link::{Link, Place, is_wrong_key, quic_config};
use crate::resolve::{ATTEMPT_DELAY, has_route, resolve};
use crate::socket::PathSocket;
use crate::tunnel::dial::{self, Dialled, StreamError};
use crate::tunnel::{self, proxy::ProxyError};

/// How long one server address may take to answer.
pub(crate) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a handshake may take to end that the server has answered. A server that everybody comes back to is slow, and a handshake that is given up
/// has to be made once more: at five seconds each, a herd would keep it slow.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// UDP's head start over TCP where it has worked and nobody waits: a server that everybody comes back to answers late, and TCP would be a second handshake
/// for it with each. As long as they take to come back.
const PATIENT_HEAD_START: Duration = Duration::from_secs(3);

/// First and longest pause before a server that has refused us is asked again; doubled each time.
const REFUSED: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// How often a peer whose network has let only TCP through begins another attempt, while earlier ones may wait for the retransmission of a lost
/// SYN (after 1 s, 3 s, 7 s: RFC 6298, section 2).
const TCP_ATTEMPTS: Duration = Duration::from_millis(250);

/// How often it is looked whether what was sent on a QUIC connection has led to anything: acknowledgements take a round trip.
const SILENCE: Duration = Duration::from_secs(1);

/// First and longest pause before UDP is tried again by a peer that is on TCP; doubled each time.
const RETRY_UDP: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));

/// Why a rendezvous server cannot be used at present.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// As the daemon has told it.
    #[error("{0}")]
    Told(String),
    /// The host name has no address.
    #[error("{host} cannot be resolved: {cause}. Check the name, and that DNS works here")]
    Resolve {
        /// The name.
        host: String,
        /// What the resolver said.
        cause: String,
    },
    /// Nothing came back.
    #[error(
        "no answer from {host} on UDP port {port}, nor on TCP port {port}. Is `rendezvous serve` running there, and are these ports open in its firewall and not blocked in this network?"
    )]
    Unreachable {
        /// The server's host.
        host: String,
        /// Its signalling port.
        port: u16,
    },
    /// UDP does not pass, and the proxy that the environment names does not help.
    #[error("UDP does not get through to the rendezvous server, and over TCP {0}")]
    Proxy(ProxyError),
    /// UDP does not pass, and whoever answers over TCP is no rendezvous server.
    #[error(
        "UDP does not get through to {host}, and what answers there on TCP port {port} is not the rendezvous server: {cause}. A captive portal or a filter \
         in this network, perhaps: does a browser get to the web? Or another server has that port on {host}"
    )]
    Intercepted {
        /// The server's host.
        host: String,
        /// Its port.
        port: u16,
        /// What was seen.
        cause: String,
    },
    /// Somebody answered who does not hold the server's key.
    #[error(
        "{host} answers, but with another key than {id}. Its key has changed, the address is wrong, or somebody is in between; compare with the rv:// address that `rendezvous` printed on its start"
    )]
    WrongKey {
        /// The server's host.
        host: String,
        /// The key that was expected.
        id: rendezvous_wire::PeerId,
    },
    /// The server closed the connection and said why.
    #[error("the rendezvous server at {host} refused: {reason}")]
    Refused {
        /// The server's host.
        host: String,
        /// The server's own words.
        reason: String,
    },
    /// The connection broke.
    #[error("the connection to the rendezvous server at {host} was lost: {cause}")]
    Lost {
        /// The server's host.
        host: String,
        /// What QUIC, or TLS, said.
        cause: String,
    },
}

/// What the driver and a signalling task need of each other.
pub(crate) struct Signalling {
    pub(crate) index: usize,
    pub(crate) address: RendezvousAddress,
    pub(crate) identity: Arc<KeyPair>,
    pub(crate) quinn: quinn::Endpoint,
    pub(crate) socket: Arc<PathSocket>,
    pub(crate) events: mpsc::Sender<Event>,
    pub(crate) requests: mpsc::Receiver<Request>,
    /// The registration has turned out to be void.
    pub(crate) void: Arc<Notify>,
    /// Whether the relay does not answer over UDP.
    pub(crate) deaf: watch::Receiver<bool>,
    /// Held by whatever must end in good order.
    pub(crate) alive: watch::Receiver<()>,
    /// What the last connection was over.
    pub(crate) before: Option<Transport>,
    /// Whether somebody waits for the server: a session that it relays, or a dial.
    pub(crate) urgent: Arc<AtomicBool>,
}

/// What a signalling connection is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    Udp,
    Tcp,
}

/// A connection that is not yet registered.
enum Connected {
    Quic(Connection, Place),
    Stream(Box<Dialled>),
}

/// An attempt at another connection while there is one; it may come to nothing.
type Attempt<'a> = Pin<Box<dyn Future<Output = Option<Connected>> + Send + 'a>>;

/// How a session with the server has ended.
enum Ended {
    /// The driver is gone.
    Over,
    /// After a registration.
    Lost(ServerError),
    /// The server answers again: to be tried anew at once.
    Stale,
}

impl Signalling {
    /// Runs until the driver is gone.
    pub(crate) async fn run(mut self) {
        let mut away: Option<Instant> = None;
        let mut refusals = 0;
        loop {
            let ended = self.session().await;
            let since = away.map(|since| since.elapsed());
            let mut pause = backoff::pause(since, &mut rand::rng());
            let error = match ended {
                Ok(Ended::Over) => return,
                Ok(Ended::Stale) => continue,
                Ok(Ended::Lost(lost)) => {
                    away = None;
                    pause = backoff::pause(None, &mut rand::rng());
                    lost
                }
                Err(error) => error,
            };
            away.get_or_insert_with(Instant::now);
            if matches!(error, ServerError::Refused { .. }) {
                pause = pause.max(jittered(REFUSED.0.saturating_mul(1 << refusals).min(REFUSED.1)));
                refusals = (refusals + 1).min(10);
            } else {
                refusals = 0;
            }
            tracing::debug!(server = %self.address.host, %error, "signalling is down");
            if self.events.send(Event::ServerDown { server: self.index, error }).await.is_err() {
                return;
            }
            // What was asked of a connection that is gone is void: the driver asks again when it is back.
            let until = tokio::time::Instant::now() + pause;
            loop {
                tokio::select! {
                    () = tokio::time::sleep_until(until) => break,
                    () = self.void.notified() => break,
                    request = self.requests.recv() => if request.is_none() { return },
                }
            }
        }
    }

    /// From a first connection to the loss of the last.
    async fn session(&mut self) -> Result<Ended, ServerError> {
        let shell = self.shell();
        let connected = {
            let race = shell.race(self.before);
            tokio::pin!(race);
            loop {
                tokio::select! {
                    connected = &mut race => break connected?,
                    () = self.void.notified() => if !shell.is_answered() { return Ok(Ended::Stale) },
                }
            }
        };
        // What was void is no more.
        let _ = self.void.notified().now_or_never();
        let Some(mut link) = shell.register(connected).await? else { return Ok(Ended::Over) };
        let mut registered = false;
        let mut attempt: Option<Attempt<'_>> = link.is_stream().then(|| shell.back_to_udp());
        // What a connection still brings that another has taken the place of.
        let mut former: Option<Link> = None;
        let mut silence = Silence::default();
        let mut look = tokio::time::interval(SILENCE);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.before = Some(transport(&link));
            let connected = tokio::select! {
                _ = look.tick() => {
                    if link.traffic().is_some_and(|traffic| silence.look(traffic))
                        && shell.events.send(Event::ServerSilent { server: shell.index }).await.is_err()
                    {
                        return Ok(Ended::Over);
                    }
                    continue;
                }
                () = self.void.notified() => {
                    if attempt.is_none() || !shell.is_answered() {
                        attempt = Some(shell.anew(transport(&link)));
                    }
                    continue;
                }
                notice = link.receive() => {
                    let notice = match notice {
                        Err(lost) if registered => return Ok(Ended::Lost(lost)),
                        notice => notice?,
                    };
                    registered |= matches!(notice, Notice::Registered(_));
                    if let Notice::Challenge(challenge) = notice {
                        let solution = shell.work(challenge).await?;
                        link.send(&Request::Solve(solution)).await?;
                        continue;
                    }
                    if let Some(event) = shell.event(notice, &mut link)
                        && shell.events.send(event).await.is_err()
                    {
                        return Ok(Ended::Over);
                    }
                    continue;
                }
                notice = receive_former(&mut former) => {
                    // A registration of its own is superseded.
                    if !matches!(notice, Notice::Registered(_)) {
                        let event = Event::Notice { server: shell.index, notice };
                        if shell.events.send(event).await.is_err() {
                            return Ok(Ended::Over);
                        }
                    }
                    continue;
                }
                request = self.requests.recv() => match request {
                    Some(request) => {
                        link.send(&request).await?;
                        continue;
                    }
                    None => {
                        link.goodbye();
                        return Ok(Ended::Over);
                    }
                },
                () = until_true(&mut self.deaf), if attempt.is_none() => {
                    attempt = Some(shell.over_to_tcp(self.deaf.clone()));
                    continue;
                }
                connected = run_attempt(&mut attempt) => connected,
            };
            match shell.register(connected).await {
                Ok(Some(better)) => {
                    tracing::debug!(server = %shell.address.host, stream = better.is_stream(), "signalling moves");
                    former = Some(std::mem::replace(&mut link, better));
                    attempt = link.is_stream().then(|| shell.back_to_udp());
                }
                Ok(None) => return Ok(Ended::Over),
                Err(error) => {
                    tracing::debug!(server = %shell.address.host, %error, "signalling stays where it is");
                    attempt = link.is_stream().then(|| shell.back_to_udp());
                }
            }
        }
    }

    fn shell(&self) -> Shell {
        Shell {
            index: self.index,
            address: self.address.clone(),
            identity: self.identity.clone(),
            quinn: self.quinn.clone(),
            socket: self.socket.clone(),
            events: self.events.clone(),
            alive: self.alive.clone(),
            answered: Arc::default(),
            urgent: self.urgent.clone(),
        }
    }
}

/// Whether a QUIC connection gets answers: something was sent before the last look and nothing has come since.
#[derive(Debug, Default)]
struct Silence {
    /// Datagrams sent and received, at the last look.
    last: (u64, u64),
    /// Whether some had been sent then that nothing had followed.
    waiting: bool,
}

impl Silence {
    fn look(&mut self, (sent, received): (u64, u64)) -> bool {
        let heard = received != self.last.1;
        let silent = self.waiting && !heard;
        self.waiting = sent != self.last.0 && !heard;
        self.last = (sent, received);
        silent
    }
}

/// What it takes to connect.
struct Shell {
    index: usize,
    address: RendezvousAddress,
    identity: Arc<KeyPair>,
    quinn: quinn::Endpoint,
    socket: Arc<PathSocket>,
    events: mpsc::Sender<Event>,
    alive: watch::Receiver<()>,
    /// The server has answered the handshake that is under way.
    answered: Arc<AtomicBool>,
    urgent: Arc<AtomicBool>,
}

impl Shell {
    /// Whether a handshake is under way that is not to be given up for another.
    fn is_answered(&self) -> bool {
        self.answered.load(Ordering::Relaxed)
    }

    /// UDP, and with a head start of that over it TCP: whichever stands first. It keeps the other from being tried any longer. Where only TCP has
    /// led to the server before there is no head start, and TCP is tried again and again meanwhile. No TCP while a handshake over UDP goes on.
    async fn race(&self, before: Option<Transport>) -> Result<Connected, ServerError> {
        let failed = Notify::new();
        let over = AtomicBool::new(false);
        let quic = async {
            let result = self.connect_quic().await;
            if result.is_err() {
                over.store(true, Ordering::Relaxed);
                failed.notify_one();
            }
            result
        };
        let stream = async {
            let patient = before == Some(Transport::Udp) && !self.urgent.load(Ordering::Relaxed);
            let head_start = if patient { PATIENT_HEAD_START } else { ATTEMPT_DELAY };
            if before == Some(Transport::Tcp) {
                return self.insist_on_stream(&over).await;
            }
            if timeout(head_start, failed.notified()).await.is_err() && self.is_answered() {
                failed.notified().await;
            }
            self.connect_stream().await
        };
        tokio::pin!(quic, stream);
        tokio::select! {
            first = &mut quic => match first {
                Ok(connected) => Ok(connected),
                Err(error) => stream.await.map_err(|stream| self.neither(error, &stream)),
            },
            first = &mut stream => match first {
                Ok(connected) => Ok(connected),
                Err(stream) => quic.await.map_err(|error| self.neither(error, &stream)),
            },
        }
    }

    /// One attempt after the other, the first to succeed wins; no more of them when `over`.
    async fn insist_on_stream(&self, over: &AtomicBool) -> Result<Connected, StreamError> {
        let mut attempts = FuturesUnordered::new();
        attempts.push(self.connect_stream());
        loop {
            tokio::select! {
                Some(ended) = attempts.next() => match ended {
                    Err(StreamError::Refused | StreamError::Unreachable) if !over.load(Ordering::Relaxed) => {}
                    Err(error) if attempts.is_empty() => return Err(error),
                    Err(_) => {}
                    connected => return connected,
                },
                () = tokio::time::sleep(jittered(TCP_ATTEMPTS)), if !over.load(Ordering::Relaxed) => {
                    attempts.push(self.connect_stream());
                }
                else => return Err(StreamError::Unreachable),
            }
        }
    }

    /// What to say when neither way leads to the server: whatever is more than that nothing came back.
    fn neither(&self, quic: ServerError, stream: &StreamError) -> ServerError {
        tracing::debug!(server = %self.address.host, %quic, %stream, "neither UDP nor TCP");
        match quic {
            ServerError::Unreachable { .. } | ServerError::Resolve { .. } => {
                stream.explain(&self.address).unwrap_or(quic)
            }
            quic => quic,
        }
    }

    /// Connects once more, while the old connection may or may not be alive.
    fn anew(&self, before: Transport) -> Attempt<'_> {
        Box::pin(async move {
            let began = Instant::now();
            loop {
                match self.race(Some(before)).await {
                    Ok(connected) => return Some(connected),
                    Err(error) => {
                        tracing::debug!(server = %self.address.host, %error, "not anew");
                        let failed = Event::AttemptFailed { server: self.index, error };
                        if self.events.send(failed).await.is_err() {
                            return None;
                        }
                    }
                }
                let pause = backoff::pause(Some(began.elapsed()), &mut rand::rng());
                tokio::time::sleep(pause).await;
            }
        })
    }

    /// Tries UDP until it works.
    /// At once at first: a datagram may have been lost, and TCP have won for no other reason.
    fn back_to_udp(&self) -> Attempt<'_> {
        Box::pin(async {
            let mut pause = Duration::ZERO;
            loop {
                tokio::time::sleep(jittered(pause)).await;
                if let Ok(connected) = self.connect_quic().await {
                    return Some(connected);
                }
                pause = (pause * 2).clamp(RETRY_UDP.0, RETRY_UDP.1);
            }
        })
    }

    /// Tries TCP, for a relay that is deaf to UDP. It will be heard of again if it still is.
    fn over_to_tcp(&self, deaf: watch::Receiver<bool>) -> Attempt<'_> {
        Box::pin(async move {
            match self.connect_stream().await {
                // A network that was away for a moment brings UDP back first.
                Ok(connected) => deaf.borrow().then_some(connected),
                Err(error) => {
                    tracing::debug!(server = %self.address.host, %error, "no TCP either");
                    tokio::time::sleep(jittered(RETRY_UDP.0)).await;
                    None
                }
            }
        })
    }

    /// Registers over a fresh connection. `None`: the driver is gone.
    async fn register(&self, connected: Connected) -> Result<Option<Link>, ServerError> {
        let (reply, registering) = oneshot::channel();
        let event = Event::ServerConnected { server: self.index, reply };
        if self.events.send(event).await.is_err() {
            return Ok(None);
        }
        let Ok(registering) = registering.await else { return Ok(None) };
        let mut link = match connected {
            Connected::Quic(connection, place) => Link::quic(self.address.clone(), connection, place).await?,
            Connected::Stream(dialled) => {
                let (socket, alive) = (self.socket.clone(), self.alive.clone());
                let answers = (self.index, self.events.clone());
                let (able, sequence) = (dialled.is_able(), registering.sequence);
                let (tunnel, conversation) = tunnel::start(*dialled, sequence, socket, answers, alive);
                Link::stream(self.address.clone(), tunnel, conversation, able)
            }
        };
        link.register(registering).await?;
        Ok(Some(link))
    }

    /// Does the work that the server wants before it registers us.
    async fn work(&self, challenge: Challenge) -> Result<Solution, ServerError> {
        let work = Work { challenge, server: self.address.id, peer: self.identity.id() };
        let late = Instant::now() + Duration::from_secs(challenge.seconds.into());
        tracing::debug!(server = %self.address.host, bits = challenge.bits, "working for admission");
        let start = rand::rng().random();
        let solving = tokio::task::spawn_blocking(move || work.solve(start, || Instant::now() < late));
        // Whatever keeps it from being done, the server will not have us for now.
        solving.await.ok().flatten().ok_or_else(|| ServerError::Refused {
            host: self.address.host.clone(),
            reason: format!(
                "too many newcomers at present, and it asks for more work ({} bits) than this machine does in {} s; try again in a while",
                challenge.bits, challenge.seconds
            ),
        })
    }

    /// What the driver is told of a notice.
    fn event(&self, notice: Notice, link: &mut Link) -> Option<Event> {
        let server = self.index;
        Some(match notice {
            Notice::Registered(registered) => {
                Event::ServerUp { server, reached: link.reached()?, registered }
            }
            notice => Event::Notice { server, notice },
        })
    }

    async fn connect_stream(&self) -> Result<Connected, StreamError> {
        dial::dial(&self.address, &self.identity).await.map(|dialled| Connected::Stream(Box::new(dialled)))
    }

    /// Races the server's addresses, each with a head start over the next (RFC 8305).
    async fn connect_quic(&self) -> Result<Connected, ServerError> {
        let host = self.address.host.clone();
        let addresses = resolve(&self.address).await?;
        self.answered.store(false, Ordering::Relaxed);
        let mut attempts = tokio::task::JoinSet::new();
        for &address in &addresses {
            let (reply, remote) = oneshot::channel();
            if self.events.send(Event::ServerAddress { address, reply }).await.is_err() {
                break;
            }
            let Ok(Some(synthetic)) = remote.await else { continue };
            let config = quic_config(&self.identity, &self.address);
            let (quinn, answered) = (self.quinn.clone(), self.answered.clone());
            let order = attempts.len();
            attempts.spawn(async move {
                tokio::time::sleep(ATTEMPT_DELAY * order as u32).await;
                let connecting = quinn.connect_with(config?, synthetic, "rendezvous").ok()?;
                Some((shake_hands(connecting, &answered).await, address))
            });
        }
        let mut failure = ServerError::Unreachable { host: host.clone(), port: self.address.port };
        while let Some(attempt) = attempts.join_next().await {
            match attempt {
                Ok(Some((Ok(Ok(connection)), signalling))) => {
                    let other = |address: &&SocketAddr| {
                        address.is_ipv4() != signalling.is_ipv4() && has_route(**address)
                    };
                    let other = addresses.iter().find(other).copied();
                    return Ok(Connected::Quic(connection, Place { signalling, other }));
                }
                Ok(Some((Ok(Err(error)), _))) if is_wrong_key(&error) => {
                    failure = ServerError::WrongKey { host: host.clone(), id: self.address.id };
                }
                Ok(_) | Err(_) => {}
            }
        }
        Err(failure)
    }
}

fn transport(link: &Link) -> Transport {
    if link.is_stream() { Transport::Tcp } else { Transport::Udp }
}

/// Never ready when nobody will say.
async fn until_true(flag: &mut watch::Receiver<bool>) {
    if flag.wait_for(|flag| *flag).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// A silent address is given up sooner than a slow one.
async fn shake_hands(
    mut connecting: quinn::Connecting,
    answered: &AtomicBool,
) -> Result<Result<Connection, ConnectionError>, Elapsed> {
    if let Err(error) = timeout(HANDSHAKE_TIMEOUT, connecting.handshake_data()).await? {
        return Ok(Err(error));
    }
    answered.store(true, Ordering::Relaxed);
    let ended = timeout(BUSY_TIMEOUT, connecting).await;
    answered.store(false, Ordering::Relaxed);
    ended
}

/// Never ready without an attempt that has succeeded; none is left when it has ended.
async fn run_attempt(attempt: &mut Option<Attempt<'_>>) -> Connected {
    if let Some(running) = attempt {
        let connected = running.await;
        *attempt = None;
        if let Some(connected) = connected {
            return connected;
        }
    }
    std::future::pending().await
}

/// Never ready without a former connection; none is left when it has ended.
async fn receive_former(former: &mut Option<Link>) -> Notice {
    if let Some(link) = former {
        match link.receive().await {
            Ok(notice) => return notice,
            Err(_) => *former = None,
        }
    }
    std::future::pending().await
}

/// From half to one and a half times as long.
fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(rand::rng().random_range(0.5..1.5))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nothing_follows_for_a_whole_second_is_silence() {
        let mut silence = Silence::default();
        assert!(!silence.look((5, 5)));
        assert!(!silence.look((6, 5)), "just sent");
        assert!(silence.look((6, 5)));
        assert!(!silence.look((6, 5)), "said once");
        assert!(!silence.look((7, 5)));
        assert!(!silence.look((8, 6)), "answered");
        assert!(!silence.look((9, 7)));
        assert!(!silence.look((9, 7)), "nothing sent");
    }
}
