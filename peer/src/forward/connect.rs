//! The far side: what is asked for is connected to, or listened for.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use rendezvous_wire::PeerId;
use tokio::net::{TcpStream, UdpSocket, UnixStream, lookup_host};
use tokio::sync::{Notify, watch};

use super::datagrams::{self, End, MAX_DATAGRAM, Sink};
use super::listen::{Listener, Opener};
use super::rules::{Rules, Verdict};
use super::spec::{Bind, Target};
use super::streams::{self, AtOnce};
use super::{Notice, Observer};
use crate::service::{Answer, Cause, Exchange, Hub, Request, RequestError};

/// How long a connection may take to stand.
const PATIENCE: Duration = Duration::from_secs(10);

/// Answers a request for a forwarding by the rules for that peer: [`Request::Connect`], [`Request::Listen`] and [`Request::Ping`]; anything
/// else is refused. Ends with what was asked for.
pub async fn serve(
    request: Request,
    exchange: Exchange,
    rules: &Rules,
    listeners: &Listeners,
    observer: &Observer,
) {
    match request {
        Request::Ping => echo(exchange).await,
        Request::Connect(target) => {
            let outcome = match rules.verdict(&target) {
                Verdict::Refused => None,
                Verdict::Allowed => Some(resolve(&target, |_| true).await),
                Verdict::Resolve => {
                    match resolve(&target, |address| allowed(rules, &target, address)).await {
                        // Whether there is such a name is none of their business.
                        Ok(Place::Addresses(addresses)) if addresses.is_empty() => None,
                        Err(_) => None,
                        found => Some(found),
                    }
                }
            };
            match outcome {
                Some(place) => connect(&target, place, exchange, observer).await,
                None => {
                    observer.notice(Notice::Denied { peer: exchange.peer(), what: target.to_string() });
                    exchange.refuse().await;
                }
            }
        }
        Request::Listen(bind) if rules.allows_listening(&bind) => {
            listen(&bind, exchange, listeners, observer).await;
        }
        Request::Listen(bind) => {
            observer.notice(Notice::Denied { peer: exchange.peer(), what: format!("listening at {bind}") });
            exchange.refuse().await;
        }
        _ => exchange.refuse().await,
    }
}

/// Connects to `target`, wherever it leads, and joins the stream to it.
pub(super) async fn lead(target: &Target, exchange: Exchange, observer: &Observer) {
    let place = resolve(target, |_| true).await;
    connect(target, place, exchange, observer).await;
}

fn allowed(rules: &Rules, target: &Target, address: SocketAddr) -> bool {
    match target {
        Target::Host { protocol, .. } => rules.allows_address(*protocol, address),
        Target::Unix(_) => false,
    }
}

enum Place {
    Addresses(Vec<SocketAddr>),
    Path(String),
}

async fn resolve(target: &Target, wanted: impl Fn(SocketAddr) -> bool) -> io::Result<Place> {
    match target {
        Target::Unix(path) => Ok(Place::Path(path.clone())),
        Target::Host { host, port, .. } => {
            let found = tokio::time::timeout(PATIENCE, lookup_host((host.as_str(), *port)));
            let found = found.await.map_err(|_| io::ErrorKind::TimedOut)?;
            // The resolver has no kind of error for this.
            let found = found.map_err(|error| io::Error::new(io::ErrorKind::NotFound, error))?;
            Ok(Place::Addresses(found.filter(|address| wanted(*address)).collect()))
        }
    }
}

async fn connect(target: &Target, place: io::Result<Place>, mut exchange: Exchange, observer: &Observer) {
    let socket = match place {
        Ok(place) => open(target, place).await,
        Err(error) => Err(error),
    };
    let peer = exchange.peer();
    let socket = match socket {
        Ok(socket) => socket,
        Err(error) => {
            let cause = Cause::of(&error);
            observer.notice(Notice::Failed { peer, what: target.to_string(), cause });
            return exchange.end(Answer::Failed(cause)).await;
        }
    };
    observer.notice(Notice::Served { peer, what: target.to_string() });
    if exchange.respond(Answer::Accepted).await.is_err() {
        return;
    }
    let outcome = match socket {
        Outside::Tcp(socket) => streams::join(socket, exchange.send, exchange.receive, AtOnce).await,
        Outside::Unix(socket) => streams::join(socket, exchange.send, exchange.receive, AtOnce).await,
        Outside::Udp(socket) => {
            let socket = Arc::new(socket);
            let end = Connected { socket: socket.clone(), buffer: vec![0; MAX_DATAGRAM] };
            datagrams::join(end, socket, exchange, AtOnce).await
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(%target, %error, "a forwarded connection ended early");
    }
}

enum Outside {
    Tcp(TcpStream),
    Unix(UnixStream),
    Udp(UdpSocket),
}

async fn open(target: &Target, place: Place) -> io::Result<Outside> {
    let opening = async {
        match place {
            Place::Path(path) => UnixStream::connect(path).await.map(Outside::Unix),
            Place::Addresses(addresses) if target.is_udp() => {
                let first = addresses.first().ok_or(io::ErrorKind::NotFound)?;
                let own: SocketAddr =
                    if first.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" }.parse().map_err(io::Error::other)?;
                let socket = UdpSocket::bind(own).await?;
                socket.connect(first).await?;
                Ok(Outside::Udp(socket))
            }
            Place::Addresses(addresses) => {
                let socket = TcpStream::connect(&addresses[..]).await?;
                socket.set_nodelay(true)?;
                Ok(Outside::Tcp(socket))
            }
        }
    };
    tokio::time::timeout(PATIENCE, opening).await.map_err(|_| io::ErrorKind::TimedOut)?
}

/// A UDP socket that talks to one address.
struct Connected {
    socket: Arc<UdpSocket>,
    buffer: Vec<u8>,
}

impl End for Connected {
    async fn receive(&mut self) -> io::Result<Bytes> {
        loop {
            match self.socket.recv(&mut self.buffer).await {
                Ok(length) => return Ok(Bytes::copy_from_slice(&self.buffer[..length])),
                // An earlier datagram found nobody (ICMP); somebody may come.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Sink for Arc<UdpSocket> {
    async fn send(&self, payload: &[u8]) -> io::Result<()> {
        UdpSocket::send(self, payload).await.map(|_| ())
    }
}

/// Sends back every datagram, until the stream ends.
async fn echo(mut exchange: Exchange) {
    let (sender, mut receiver) = exchange.flow();
    if exchange.respond(Answer::Accepted).await.is_err() {
        return;
    }
    let mut byte = [0];
    let over = exchange.receive.read(&mut byte);
    tokio::pin!(over);
    loop {
        tokio::select! {
            payload = receiver.receive() => {
                let mut buffer = sender.buffer(payload.len());
                buffer.extend_from_slice(&payload);
                if sender.send(buffer.freeze()).is_err() {
                    return;
                }
            }
            _ = &mut over => return,
        }
    }
}

/// Gives the other side a stream for every connection to a listener that it asked for, until it ends its request.
async fn listen(bind: &Bind, mut exchange: Exchange, listeners: &Listeners, observer: &Observer) {
    let peer = exchange.peer();
    // Lives longer than the listener below.
    let turn = listeners.take_over(bind, peer).await;
    let listener = match Listener::bind(bind).await {
        Ok(listener) => listener,
        Err(error) => {
            let cause = Cause::of(&error);
            observer.notice(Notice::Failed { peer, what: format!("listening at {bind}"), cause });
            return exchange.end(Answer::Failed(cause)).await;
        }
    };
    let answer = async {
        exchange.respond(Answer::Accepted).await?;
        let port = listener.port().to_be_bytes();
        exchange.send.write_all(&port).await.map_err(|_| RequestError::Session)
    };
    if answer.await.is_err() {
        return;
    }
    observer.notice(Notice::Served { peer, what: format!("listening at {}", listener.bind_shown()) });
    let opener = Reverse { hub: exchange.hub().clone(), listener: exchange.id() };
    let mut byte = [0];
    tokio::select! {
        () = listener.run(opener, observer.clone()) => {}
        _ = exchange.receive.read(&mut byte) => {}
        () = turn.stop.notified() => {}
    }
}

/// What is listened for on behalf of peers, in all sessions of a process. A cheap handle.
///
/// A peer that asks for a place that it has already gets it: the one that had it may have died without a word, and its session would live on
/// for a quarter of an hour.
#[derive(Debug, Clone, Default)]
pub struct Listeners(Arc<Mutex<HashMap<Bind, Held>>>);

#[derive(Debug)]
struct Held {
    peer: PeerId,
    stop: Arc<Notify>,
    /// Closed once the place is free.
    ended: watch::Receiver<()>,
}

/// The right to a place; given back when it is dropped.
struct Turn {
    stop: Arc<Notify>,
    _held: watch::Sender<()>,
}

impl Listeners {
    /// Ends what the same peer had there. What others have is left alone: whoever wants it as well is told that it is in use.
    async fn take_over(&self, bind: &Bind, peer: PeerId) -> Turn {
        let (held, ended) = watch::channel(());
        let turn = Turn { stop: Arc::new(Notify::new()), _held: held };
        let mut older = {
            let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            all.retain(|_, held| held.ended.has_changed().is_ok());
            // Port 0 is another one each time.
            let lasting = !matches!(bind, Bind::Address(_, address) if address.port() == 0);
            if !lasting || all.get(bind).is_some_and(|held| held.peer != peer) {
                return turn;
            }
            all.insert(bind.clone(), Held { peer, stop: turn.stop.clone(), ended })
        };
        if let Some(older) = &mut older {
            older.stop.notify_one();
            // An error is the end of the other turn.
            while older.ended.changed().await.is_ok() {}
        }
        turn
    }
}

/// Streams for connections to a listener of the other side's.
#[derive(Clone)]
struct Reverse {
    hub: Hub,
    listener: u64,
}

impl Opener for Reverse {
    async fn open(&self) -> Result<Exchange, RequestError> {
        self.hub.request(&Request::Connection { listener: self.listener }).await
    }

    fn suspect(&self) {}

    fn shown(&self) -> String {
        "the other side".into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(seed: u8) -> PeerId {
        PeerId::from_bytes([seed; 32])
    }

    #[tokio::test]
    async fn a_peer_takes_its_own_place_over_and_nobody_elses() {
        let listeners = Listeners::default();
        let bind: Bind = "9000".parse().unwrap();
        let first = listeners.take_over(&bind, id(1)).await;
        // Another peer does not disturb it.
        drop(listeners.take_over(&bind, id(2)).await);
        let second = tokio::spawn({
            let (listeners, bind) = (listeners.clone(), bind.clone());
            async move { listeners.take_over(&bind, id(1)).await }
        });
        first.stop.notified().await;
        assert!(!second.is_finished(), "the place is not free yet");
        drop(first);
        let second = second.await.unwrap();
        drop(second);
        drop(listeners.take_over(&bind, id(2)).await);
    }
}
