//! The near side: connections are taken, and each gets a stream.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quinn::RecvStream;
use tokio::net::{TcpListener, TcpStream, UdpSocket, UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

use super::datagrams::{self, End, MAX_DATAGRAM, Sink};
use super::spec::{Bind, Protocol};
use super::streams::{self, JoinError, Ready, Socket, Writer as _};
use super::{Notice, Observer};
use crate::service::{Exchange, RequestError, read_answer};

/// Connections of one listener at a time; further ones wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 1024;

/// Flows of one UDP listener at a time; datagrams of further ones are dropped until one is idle.
const MAX_FLOWS: usize = 1024;

/// Datagrams of one flow that wait for its stream.
const FLOW_QUEUE: usize = 64;

/// Taking connections is tried again this long after the system had no room for one.
const NO_ROOM: Duration = Duration::from_millis(100);

/// A request that is not answered for this long casts doubt on the session. Well above a round trip, and the time of a name's resolution.
const DOUBT: Duration = Duration::from_secs(3);

/// Where streams come from.
pub(super) trait Opener: Clone + Send + Sync + 'static {
    /// A stream whose request has been made, and has yet to be answered.
    fn open(&self) -> impl Future<Output = Result<Exchange, RequestError>> + Send;

    /// An answer is long in coming.
    fn suspect(&self);

    /// What is at the far end, in words.
    fn shown(&self) -> String;
}

/// A place where connections are taken.
#[derive(Debug)]
pub(super) struct Listener {
    socket: Kind,
    bind: Bind,
}

#[derive(Debug)]
enum Kind {
    Tcp(TcpListener),
    Udp(UdpSocket),
    Unix(UnixListener, RemoveAtEnd),
}

/// A socket's file.
#[derive(Debug)]
struct RemoveAtEnd(PathBuf);

impl Drop for RemoveAtEnd {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Listener {
    /// Listens.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub(super) async fn bind(bind: &Bind) -> io::Result<Self> {
        match bind {
            Bind::Address(Protocol::Tcp, address) => {
                let socket = TcpListener::bind(address).await?;
                let bind = Bind::Address(Protocol::Tcp, socket.local_addr()?);
                Ok(Self { socket: Kind::Tcp(socket), bind })
            }
            Bind::Address(Protocol::Udp, address) => {
                let socket = UdpSocket::bind(address).await?;
                let bind = Bind::Address(Protocol::Udp, socket.local_addr()?);
                Ok(Self { socket: Kind::Udp(socket), bind })
            }
            Bind::Unix(path) => {
                let listener = match UnixListener::bind(path) {
                    Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_left_over(path).await => {
                        std::fs::remove_file(path)?;
                        UnixListener::bind(path)?
                    }
                    bound => bound?,
                };
                let remove = RemoveAtEnd(path.into());
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
                Ok(Self { socket: Kind::Unix(listener, remove), bind: bind.clone() })
            }
        }
    }

    /// The port; 0 for a Unix socket.
    pub(super) fn port(&self) -> u16 {
        match &self.bind {
            Bind::Address(_, address) => address.port(),
            Bind::Unix(_) => 0,
        }
    }

    /// Where it listens, with the port that the system chose.
    pub(super) fn bind_shown(&self) -> &Bind {
        &self.bind
    }

    /// The TCP socket, if it is one.
    pub(super) fn into_tcp(self) -> Option<TcpListener> {
        match self.socket {
            Kind::Tcp(socket) => Some(socket),
            _ => None,
        }
    }

    /// Takes connections, for ever. What it has begun ends when it is dropped.
    pub(super) async fn run(self, opener: impl Opener, observer: Observer) {
        match self.socket {
            Kind::Tcp(listener) => take(listener, opener, observer).await,
            Kind::Unix(listener, _remove) => take(listener, opener, observer).await,
            Kind::Udp(socket) => take_datagrams(Arc::new(socket), opener, observer).await,
        }
    }
}

/// Whether a socket's file is there and nobody listens at it: its owner was killed.
async fn is_left_over(path: &str) -> bool {
    let socket = std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    socket && UnixStream::connect(path).await.is_err_and(refused)
}

/// A listening stream socket.
trait Accept: Send + Sync {
    type Socket: Socket + 'static;

    fn take(&self) -> impl Future<Output = io::Result<Self::Socket>> + Send;
}

impl Accept for TcpListener {
    type Socket = TcpStream;

    async fn take(&self) -> io::Result<TcpStream> {
        let (socket, _) = self.accept().await?;
        socket.set_nodelay(true)?;
        Ok(socket)
    }
}

impl Accept for UnixListener {
    type Socket = UnixStream;

    async fn take(&self) -> io::Result<UnixStream> {
        Ok(self.accept().await?.0)
    }
}

/// Takes stream connections.
async fn take(listener: impl Accept, opener: impl Opener, observer: Observer) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(permit) = room.clone().acquire_owned().await else { return };
        match listener.take().await {
            Ok(socket) => {
                let (opener, observer) = (opener.clone(), observer.clone());
                connections.spawn(async move {
                    let _permit = permit;
                    carry(socket, opener, observer).await;
                });
            }
            Err(error) => {
                tracing::debug!(%error, "a connection could not be taken");
                tokio::time::sleep(NO_ROOM).await;
            }
        }
    }
}

async fn carry(socket: impl Socket, opener: impl Opener, observer: Observer) {
    let outcome = match opener.open().await {
        Ok(exchange) => streams::join(socket, exchange.send, exchange.receive, Answered(&opener)).await,
        Err(error) => {
            socket.split().1.abort();
            Err(error.into())
        }
    };
    tell(outcome, &opener, &observer);
}

/// After the answer to the stream's request.
struct Answered<'a, O>(&'a O);

impl<O: Opener> Ready for Answered<'_, O> {
    async fn ready(self, receive: &mut RecvStream) -> Result<(), RequestError> {
        answered(receive, self.0).await
    }
}

/// Waits for an answer; casts doubt on the session when it is long in coming.
pub(super) async fn answered(receive: &mut RecvStream, opener: &impl Opener) -> Result<(), RequestError> {
    let answer = read_answer(receive);
    tokio::pin!(answer);
    tokio::select! {
        answer = &mut answer => answer,
        () = tokio::time::sleep(DOUBT) => {
            opener.suspect();
            answer.await
        }
    }
}

fn tell(outcome: Result<(), JoinError>, opener: &impl Opener, observer: &Observer) {
    match outcome {
        Err(JoinError::Request(error)) => observer.notice(Notice::NotForwarded { to: opener.shown(), error }),
        Err(error) => tracing::debug!(%error, "a forwarded connection ended early"),
        Ok(()) => {}
    }
}

/// Datagrams of one source.
pub(super) struct Source(pub(super) mpsc::Receiver<Bytes>);

impl End for Source {
    async fn receive(&mut self) -> io::Result<Bytes> {
        self.0.recv().await.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

/// Back to one source.
struct Back {
    socket: Arc<UdpSocket>,
    source: SocketAddr,
}

impl Sink for Back {
    async fn send(&self, payload: &[u8]) -> io::Result<()> {
        self.socket.send_to(payload, self.source).await.map(|_| ())
    }
}

/// Flows by what tells them apart, each with a task.
pub(super) struct Flows<K> {
    queues: HashMap<K, mpsc::Sender<Bytes>>,
    tasks: JoinSet<K>,
}

impl<K: Clone + Eq + std::hash::Hash + Send + 'static> Flows<K> {
    pub(super) fn new() -> Self {
        Self { queues: HashMap::new(), tasks: JoinSet::new() }
    }

    /// Gives a datagram to its flow; a new one is begun with `begin`. One too many is dropped, as is one whose flow is slow.
    pub(super) fn give<F: Future<Output = ()> + Send + 'static>(
        &mut self,
        key: &K,
        payload: Bytes,
        begin: impl FnOnce(Source) -> F,
    ) {
        while let Some(ended) = self.tasks.try_join_next() {
            if let Ok(key) = ended {
                self.queues.remove(&key);
            }
        }
        if let Some(queue) = self.queues.get(key) {
            let _ = queue.try_send(payload);
        } else if self.queues.len() < MAX_FLOWS {
            let (queue, source) = mpsc::channel(FLOW_QUEUE);
            let _ = queue.try_send(payload);
            self.queues.insert(key.clone(), queue);
            let (key, flow) = (key.clone(), begin(Source(source)));
            self.tasks.spawn(async move {
                flow.await;
                key
            });
        }
    }
}

async fn take_datagrams(socket: Arc<UdpSocket>, opener: impl Opener, observer: Observer) {
    let mut flows = Flows::new();
    let mut buffer = vec![0; MAX_DATAGRAM];
    loop {
        // Errors here are of earlier datagrams that found nobody.
        let Ok((length, from)) = socket.recv_from(&mut buffer).await else { continue };
        let payload = Bytes::copy_from_slice(&buffer[..length]);
        flows.give(&from, payload, |source| {
            let (opener, observer) = (opener.clone(), observer.clone());
            let back = Back { socket: socket.clone(), source: from };
            async move {
                carry_datagrams(source, back, opener, observer).await;
            }
        });
    }
}

pub(super) async fn carry_datagrams(
    source: Source,
    back: impl Sink,
    opener: impl Opener,
    observer: Observer,
) {
    let outcome = match opener.open().await {
        Ok(exchange) => datagrams::join(source, back, exchange, Answered(&opener)).await,
        Err(error) => Err(error.into()),
    };
    tell(outcome, &opener, &observer);
}
