//! A peer's stream, from its registration to its end.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use rendezvous_wire::message::{self, MessageError, Notice, Register, Request, close_code};
use rendezvous_wire::stream::{Decoder, Record, RecordError, put_binding, put_close, put_message};
use rendezvous_wire::{ADMISSION_ALPN, PeerId, Token, tls};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::sync::mpsc::{self, UnboundedReceiver, unbounded_channel};
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;
use tokio_rustls::server::TlsStream;

use super::outlet::Outlet;
use super::{Admitted, Streams};
use crate::admission::Refusal;
use crate::admission::gate::WORK_TIME;
use crate::broker::{Departure, StreamBinding};
use crate::directory::RegisterError;
use crate::limits::Bucket;
use crate::owner::{Event, Line, Outbox, Seat, mailbox};
use crate::relay::bell::Entrance;
use crate::relay::shard::{Command, StreamFrames};
use crate::relay::table::StreamId;
use crate::signalling::{IDLE_TIMEOUT, MESSAGES, REGISTER_TIMEOUT, Shared, Unregistered};

/// Bytes read at a time: few of a peer that waits, which then costs little, and more of one that sends much.
const READ: (usize, usize) = (2 * 1024, 32 * 1024);

/// How long the last words may take.
const FAREWELL: Duration = Duration::from_millis(500);

type Reader = ReadHalf<TlsStream<TcpStream>>;
type Writer = WriteHalf<TlsStream<TcpStream>>;

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConversationError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("no key was proven")]
    Identity,
    #[error("no registration came")]
    NotRegistered,
    #[error("{0}")]
    Record(#[from] RecordError),
    #[error("{0}")]
    Message(#[from] MessageError),
    // In these words the peer is told.
    #[error("{0}")]
    Refused(#[from] RegisterError),
    #[error("{0}")]
    NotAdmitted(#[from] Refusal),
    #[error("{1}")]
    Told(u32, String),
    #[error("the peer has finished")]
    Finished,
    #[error("the peer has gone without a word")]
    Gone,
    #[error("nothing has come for too long")]
    Idle,
    #[error("the server is going away")]
    Stopping,
}

impl ConversationError {
    /// What the peer is told, where it still listens.
    fn close_code(&self) -> Option<u32> {
        match self {
            Self::Record(_) | Self::Message(_) | Self::Identity => Some(close_code::MALFORMED),
            Self::NotRegistered => Some(close_code::NOT_REGISTERED),
            Self::Refused(_) | Self::NotAdmitted(_) => Some(close_code::REFUSED),
            Self::Told(code, _) => Some(*code),
            Self::Stopping => Some(close_code::SHUTDOWN),
            Self::Io(_) | Self::Finished | Self::Gone | Self::Idle => None,
        }
    }

    fn departure(&self) -> Departure {
        match self {
            Self::Finished => Departure::Goodbye,
            _ => Departure::Lost,
        }
    }
}

pub(super) async fn serve(
    stream: TlsStream<TcpStream>,
    remote: SocketAddr,
    admitted: Admitted,
) -> Result<(), ConversationError> {
    let session = stream.get_ref().1;
    let able = session.alpn_protocol() == Some(ADMISSION_ALPN);
    let peer = session.peer_certificates().and_then(tls::proven_identity);
    let peer = peer.ok_or(ConversationError::Identity)?;
    let streams = admitted.streams.clone();
    let (reader, mut writer) = tokio::io::split(stream);
    let error = converse((peer, able), remote, reader, &mut writer, &streams, admitted).await;
    if let Some(code) = error.close_code() {
        let mut last = BytesMut::new();
        put_close(code, &error.to_string(), &mut last);
        let _ = timeout(FAREWELL, async {
            writer.write_all(&last).await?;
            writer.shutdown().await
        })
        .await;
    }
    Err(error)
}

async fn converse(
    (peer, able): (PeerId, bool),
    remote: SocketAddr,
    reader: Reader,
    writer: &mut Writer,
    streams: &Streams,
    mut admitted: Admitted,
) -> ConversationError {
    let shared = &streams.shared;
    let unregistered = Unregistered::count(&shared.unregistered);
    let mut records = Records { reader, decoder: Decoder::default(), read: READ.0 };
    let (number, shard) = streams.next();
    let stream = StreamId(number);
    let first = match timeout(REGISTER_TIMEOUT, registration(&mut records)).await {
        Ok(Ok(first)) => first,
        Ok(Err(error)) => return error,
        Err(_) => return ConversationError::NotRegistered,
    };
    let (sequence, token, says) = first;
    if let Err(error) = admit((peer, able), remote, token, &mut records, writer, shared).await {
        return error;
    }

    let outlet = Arc::new(Outlet::new());
    // Before the registration, whose binding sends frames here.
    let _announced = Announced::new(streams, stream, &outlet);
    let (close, told) = unbounded_channel();
    let most = shared.limits.load().queued_bytes;
    let (mailbox, outbox) = mailbox(Line::Stream { remote, close }, most, able);
    let (answer, registered) = oneshot::channel();
    let binding = Some(StreamBinding { stream, sequence });
    let event = Event::Register { peer, says, mailbox, binding, answer };
    if shared.events.send(event).await.is_err() {
        return ConversationError::Stopping;
    }
    let seat = match registered.await {
        Ok(Ok(seat)) => seat,
        Ok(Err(refused)) => return refused.into(),
        Err(_) => return ConversationError::Stopping,
    };
    drop(unregistered);
    admitted.registered();

    let (confirm, confirmed) = mpsc::channel(1);
    let reading = Reading { records, seat, stream, sequence, shard, streams, confirm };
    let error = tokio::select! {
        error = reading.run() => error,
        error = write(writer, outbox, confirmed, &outlet) => error,
        error = told_to_end(told, streams.closing.clone()) => error,
    };
    let _ = shared.events.send(Event::Departed(seat, error.departure())).await;
    error
}

/// The relay threads know the stream until this is dropped.
struct Announced<'a>(&'a Streams, StreamId);

impl<'a> Announced<'a> {
    fn new(streams: &'a Streams, stream: StreamId, outlet: &Arc<Outlet>) -> Self {
        for shard in &streams.shards {
            shard.tell(Command::Stream(stream, outlet.clone()));
        }
        Self(streams, stream)
    }
}

impl Drop for Announced<'_> {
    fn drop(&mut self) {
        for shard in &self.0.shards {
            shard.tell(Command::StreamGone(self.1));
        }
    }
}

/// The binding and the registration that a stream begins with, and the token that may come before the latter.
async fn registration(records: &mut Records) -> Result<(u64, Option<Token>, Register), ConversationError> {
    let Record::Binding(sequence) = records.next().await? else {
        return Err(ConversationError::NotRegistered);
    };
    let mut token = None;
    let mut first = records.message().await?;
    if let Request::Present(presented) = first {
        token = Some(presented);
        first = records.message().await?;
    }
    match first {
        Request::Register(says) => Ok((sequence, token, says)),
        _ => Err(ConversationError::NotRegistered),
    }
}

/// Has the peer work where there are many, and judged.
async fn admit(
    (peer, able): (PeerId, bool),
    remote: SocketAddr,
    token: Option<Token>,
    records: &mut Records,
    writer: &mut Writer,
    shared: &Shared,
) -> Result<(), ConversationError> {
    if let Some(work) = shared.gate.work(peer, able)? {
        let body = message::encode(&Notice::Challenge(work.challenge))?;
        let mut record = BytesMut::new();
        put_message(&body, &mut record);
        writer.write_all(&record).await?;
        writer.flush().await?;
        match timeout(WORK_TIME, records.message()).await {
            Ok(Ok(Request::Solve(solution))) if work.is_done_by(solution) => {}
            Ok(Err(error)) => return Err(error),
            Ok(Ok(_)) | Err(_) => return Err(Refusal::Work.into()),
        }
    }
    if shared.gate.take_lapsed(peer) {
        shared.events.send(Event::Unban(peer)).await.map_err(|_| ConversationError::Stopping)?;
    }
    Ok(shared.gate.judge(peer, remote.ip(), token.as_ref()).await?)
}

async fn told_to_end(
    mut told: UnboundedReceiver<(u32, String)>,
    mut closing: watch::Receiver<bool>,
) -> ConversationError {
    tokio::select! {
        // Without a sender the owner is gone.
        told = told.recv() => told.map_or(ConversationError::Stopping, |(code, reason)| ConversationError::Told(code, reason)),
        _ = closing.wait_for(|closing| *closing) => ConversationError::Stopping,
    }
}

/// Cuts what is read into records.
struct Records {
    reader: Reader,
    decoder: Decoder,
    /// Bytes to be read next.
    read: usize,
}

impl Records {
    async fn next(&mut self) -> Result<Record, ConversationError> {
        loop {
            if let Some(record) = self.decoder.poll()? {
                return Ok(record);
            }
            let buffer = self.decoder.buffer();
            if buffer.is_empty() && buffer.capacity() > 2 * self.read {
                *buffer = BytesMut::new();
            }
            buffer.reserve(self.read);
            match timeout(IDLE_TIMEOUT, self.reader.read_buf(buffer)).await {
                Ok(Ok(0)) => return Err(ConversationError::Gone),
                Ok(Ok(length)) if length >= self.read => self.read = (2 * self.read).min(READ.1),
                Ok(Ok(length)) if length < self.read / 4 => self.read = (self.read / 2).max(READ.0),
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return Err(error.into()),
                Err(_) => return Err(ConversationError::Idle),
            }
        }
    }
}

impl Records {
    /// The next one, which has to be a message; bindings that are renewed meanwhile mean nothing yet.
    async fn message(&mut self) -> Result<Request, ConversationError> {
        loop {
            match self.next().await? {
                Record::Message(body) => return Ok(message::decode(&body)?),
                Record::Binding(_) => {}
                _ => return Err(ConversationError::NotRegistered),
            }
        }
    }
}

/// The half that reads.
struct Reading<'a> {
    records: Records,
    seat: Seat,
    stream: StreamId,
    sequence: u64,
    shard: &'a Entrance,
    streams: &'a Streams,
    confirm: mpsc::Sender<u64>,
}

impl Reading<'_> {
    async fn run(mut self) -> ConversationError {
        let mut pace = Bucket::default();
        loop {
            let handled = match self.records.next().await {
                Ok(Record::Message(body)) => self.message(&body, &mut pace).await,
                Ok(Record::Frames { bytes, segment }) => {
                    let frames = StreamFrames { from: self.stream, bytes, segment };
                    self.shard.forward(frames).await.map_err(|_| ConversationError::Stopping)
                }
                Ok(Record::Binding(sequence)) => self.bind(sequence, &mut pace).await,
                Ok(Record::Close { .. }) => Err(ConversationError::Finished),
                Err(error) => Err(error),
            };
            if let Err(error) = handled {
                return error;
            }
        }
    }

    async fn message(&self, body: &[u8], pace: &mut Bucket) -> Result<(), ConversationError> {
        let request = message::decode(body)?;
        keep(pace).await;
        self.tell(Event::Request(self.seat, request)).await
    }

    async fn bind(&mut self, sequence: u64, pace: &mut Bucket) -> Result<(), ConversationError> {
        keep(pace).await;
        // An older one is none: a stream renews, or binds anew.
        self.sequence = self.sequence.max(sequence);
        let binding = StreamBinding { stream: self.stream, sequence: self.sequence };
        self.tell(Event::Bound(self.seat, binding)).await?;
        // The writer has the last one still to confirm: that confirms both.
        let _ = self.confirm.try_send(self.sequence);
        Ok(())
    }

    async fn tell(&self, event: Event) -> Result<(), ConversationError> {
        self.streams.shared.events.send(event).await.map_err(|_| ConversationError::Stopping)
    }
}

/// Waits until a message more is within the pace.
async fn keep(pace: &mut Bucket) {
    while !pace.take(MESSAGES, Instant::now()) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Writes notices and confirmations before frames, and all that waits at once.
async fn write(
    writer: &mut Writer,
    mut outbox: Outbox,
    mut confirmed: mpsc::Receiver<u64>,
    outlet: &Outlet,
) -> ConversationError {
    let mut small = BytesMut::new();
    let mut frames = BytesMut::new();
    loop {
        let mut first: Option<Bytes> = None;
        tokio::select! {
            notice = outbox.next() => match notice {
                Some(notice) => first = Some(notice),
                None => return ConversationError::Stopping,
            },
            Some(sequence) = confirmed.recv() => put_binding(sequence, &mut small),
            () = outlet.filled() => {}
        }
        let mut written = 0;
        let notices = std::iter::from_fn(|| first.take().or_else(|| outbox.try_next()));
        for notice in notices {
            put_message(&notice, &mut small);
            written += notice.len();
        }
        frames = outlet.take(frames);
        let writing = async {
            for bytes in [&small, &frames] {
                writer.write_all(bytes).await?;
            }
            writer.flush().await
        };
        if let Err(error) = writing.await {
            return error.into();
        }
        outbox.written(written);
        small.clear();
    }
}
