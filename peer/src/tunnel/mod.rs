//! A rendezvous server over TCP, for networks that let no UDP through: its messages and its relay's frames in one TLS stream.
//!
//! | module | what |
//! |---|---|
//! | `mod` | the stream at work: one task that reads and writes it |
//! | [`dial`] | how it comes to be, straight or through a proxy |
//! | [`proxy`] | HTTP proxies that the environment names |
//! | [`outlet`] | the frames that wait for it |

pub(crate) mod dial;
pub(crate) mod outlet;
pub(crate) mod proxy;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use rendezvous_wire::message::{self, Notice, close_code};
use rendezvous_wire::stream::{Decoder, Record, put_binding, put_close, put_message};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};

use crate::driver::Event;
use crate::socket::PathSocket;
use dial::Dialled;
use outlet::Outlet;

/// Bytes read at a time.
const READ: usize = 64 * 1024;

/// Notices that may wait for whoever takes them; the stream waits beyond that.
const NOTICES: usize = 64;

/// Requests that may wait for the stream.
const REQUESTS: usize = 64;

/// How often the binding is renewed, which keeps the stream alive: the same as on QUIC. NATs forget an idle TCP connection no sooner than after two
/// hours by RFC 5382, REQ-5, and after some minutes in the field; but the server forgets a silent peer.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// A stream with nothing coming in for so long is dead (three keep-alives).
const IDLE: Duration = Duration::from_secs(45);

/// How long the goodbye may take.
const FAREWELL: Duration = Duration::from_millis(500);

/// The relay's end of a stream: closed with a goodbye when dropped.
pub(crate) struct Tunnel {
    /// What the server, or the proxy, is connected to as.
    pub(crate) address: SocketAddr,
    /// Whether that is a proxy's.
    pub(crate) through_proxy: bool,
    pub(crate) outlet: Arc<Outlet>,
    /// Has the binding renewed at once, which the server answers.
    ask: Arc<Notify>,
    _open: watch::Sender<()>,
}

impl Tunnel {
    /// Asks the server for an answer: an [`Event::StreamAnswered`].
    pub(crate) fn ask(&self) {
        self.ask.notify_one();
    }
}

/// The messages' end.
pub(crate) struct Conversation {
    requests: mpsc::Sender<Bytes>,
    notices: mpsc::Receiver<Result<Notice, End>>,
}

/// How a stream has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum End {
    /// The server has said why.
    Closed { code: u32, reason: String },
    /// Anything else, in words.
    Broken(String),
}

impl Conversation {
    /// Sends what [`message::encode`] gave. False: the stream has ended.
    pub(crate) async fn send(&mut self, encoded: Vec<u8>) -> bool {
        self.requests.send(encoded.into()).await.is_ok()
    }

    /// The next notice. Cancel-safe.
    pub(crate) async fn receive(&mut self) -> Result<Notice, End> {
        let gone = || Err(End::Broken("the stream has ended".to_owned()));
        self.notices.recv().await.unwrap_or_else(gone)
    }
}

/// Puts a stream to work: it binds under `sequence` first. Whoever `answers` names hears when the server, of that number, has answered. `alive` is
/// held for as long as it is.
pub(crate) fn start(
    dialled: Dialled,
    sequence: u64,
    socket: Arc<PathSocket>,
    answers: (usize, mpsc::Sender<Event>),
    alive: watch::Receiver<()>,
) -> (Tunnel, Conversation) {
    let (requests, outgoing) = mpsc::channel(REQUESTS);
    let (incoming, notices) = mpsc::channel(NOTICES);
    let (open, closed) = watch::channel(());
    let outlet = Arc::new(Outlet::new());
    let ask = Arc::new(Notify::new());
    let address = dialled.address;
    let (reader, writer) = tokio::io::split(dialled.stream);
    let reading = Reading { reader, decoder: Decoder::default(), address, socket, incoming, answers };
    let writing = Writing { writer, sequence, outgoing, outlet: outlet.clone(), ask: ask.clone() };
    tokio::spawn(async move {
        run(reading, writing, closed).await;
        drop(alive);
    });
    let tunnel = Tunnel { address, through_proxy: dialled.through_proxy, outlet, ask, _open: open };
    (tunnel, Conversation { requests, notices })
}

async fn run(mut reading: Reading, mut writing: Writing, mut closed: watch::Receiver<()>) {
    let end = tokio::select! {
        end = reading.run() => end,
        error = writing.run() => End::Broken(error.to_string()),
        // Without its sender: the relay's end was dropped.
        _ = closed.changed() => {
            let _ = timeout(FAREWELL, writing.say_goodbye()).await;
            return;
        }
    };
    tracing::debug!(?end, address = %reading.address, "a stream has ended");
    // Whoever has moved on does not want to know.
    let _ = reading.incoming.send(Err(end)).await;
}

struct Reading {
    reader: ReadHalf<dial::Stream>,
    decoder: Decoder,
    address: SocketAddr,
    socket: Arc<PathSocket>,
    incoming: mpsc::Sender<Result<Notice, End>>,
    answers: (usize, mpsc::Sender<Event>),
}

impl Reading {
    async fn run(&mut self) -> End {
        loop {
            match self.decoder.poll() {
                Ok(None) => {}
                Ok(Some(Record::Frames { bytes, segment })) => {
                    self.socket.receive_frames(self.address, &bytes, segment);
                    continue;
                }
                Ok(Some(Record::Message(body))) => match message::decode(&body) {
                    Ok(notice) => {
                        // Without a receiver signalling has moved on, and this stream only relays.
                        let _ = self.incoming.send(Ok(notice)).await;
                        continue;
                    }
                    Err(error) => {
                        return End::Broken(format!("the server does not speak this protocol: {error}"));
                    }
                },
                Ok(Some(Record::Binding(_))) => {
                    let (server, events) = &self.answers;
                    // A driver that is too busy to hear of this one hears of the next.
                    let _ = events.try_send(Event::StreamAnswered { server: *server });
                    continue;
                }
                Ok(Some(Record::Close { code, reason })) => return End::Closed { code, reason },
                Err(error) => {
                    return End::Broken(format!("the server does not speak this protocol: {error}"));
                }
            }
            let buffer = self.decoder.buffer();
            buffer.reserve(READ);
            match timeout(IDLE, self.reader.read_buf(buffer)).await {
                Ok(Ok(0)) => return End::Broken("the server ended the stream".to_owned()),
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return End::Broken(error.to_string()),
                Err(_) => return End::Broken(format!("nothing has come for {} s", IDLE.as_secs())),
            }
        }
    }
}

struct Writing {
    writer: WriteHalf<dial::Stream>,
    sequence: u64,
    outgoing: mpsc::Receiver<Bytes>,
    outlet: Arc<Outlet>,
    ask: Arc<Notify>,
}

impl Writing {
    /// Writes requests before frames, and all that waits at once. Ends with an error only.
    async fn run(&mut self) -> std::io::Error {
        let mut keep_alive = interval_at(Instant::now() + KEEP_ALIVE, KEEP_ALIVE);
        keep_alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut small = BytesMut::new();
        let mut frames = BytesMut::new();
        put_binding(self.sequence, &mut small);
        loop {
            tokio::select! {
                Some(request) = self.outgoing.recv() => put_message(&request, &mut small),
                () = self.outlet.filled() => {}
                () = self.ask.notified() => put_binding(self.sequence, &mut small),
                _ = keep_alive.tick() => put_binding(self.sequence, &mut small),
            }
            while let Ok(request) = self.outgoing.try_recv() {
                put_message(&request, &mut small);
            }
            frames = self.outlet.take(frames);
            let writing = async {
                for bytes in [&small, &frames] {
                    self.writer.write_all(bytes).await?;
                }
                self.writer.flush().await
            };
            if let Err(error) = writing.await {
                return error;
            }
            small.clear();
        }
    }

    /// What was asked last, and that it was the last. Nothing if that stands in the middle of a record: then the stream just ends.
    async fn say_goodbye(&mut self) -> std::io::Result<()> {
        let mut last = BytesMut::new();
        while let Ok(request) = self.outgoing.try_recv() {
            put_message(&request, &mut last);
        }
        put_close(close_code::SHUTDOWN, "", &mut last);
        self.writer.write_all(&last).await?;
        self.writer.shutdown().await
    }
}
