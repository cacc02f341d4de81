//! One session's requests and datagrams.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use quinn::{RecvStream, SendDatagramError, SendStream};
use rendezvous_wire::PeerId;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::{Answer, MAX_REQUEST, PIPE, REFUSED, REQUEST, Request, RequestError};
use crate::session::Session;

/// How long a stream may take to say what it is for.
const PATIENCE: Duration = Duration::from_secs(10);

/// Datagrams of one flow that wait to be taken; more are dropped, as a full socket would.
const FLOW_QUEUE: usize = 256;

/// Most bytes that the id takes in front of a datagram.
const ID_LEN: usize = 10;

type Flows = Arc<Mutex<HashMap<u64, mpsc::Sender<Bytes>>>>;

/// A session whose streams say what they are for. A cheap handle.
#[derive(Debug, Clone)]
pub struct Hub(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    session: Session,
    flows: Flows,
    pump: JoinHandle<()>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.pump.abort();
    }
}

/// A stream that the other side has opened and that has yet to say what it is for.
#[derive(Debug)]
pub struct Opening {
    hub: Hub,
    send: SendStream,
    receive: RecvStream,
}

/// What a stream is for.
#[derive(Debug)]
#[non_exhaustive]
pub enum Incoming {
    /// A plain pipe.
    Pipe(SendStream, RecvStream),
    /// A request that waits for its answer.
    Request(Request, Exchange),
}

/// Why a stream could not say what it is for.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// It ended or broke first, or took too long.
    #[error("a stream ended before it said what it is for")]
    Ended,
    /// Something that this version does not know; it was refused.
    #[error("the other side wants something that this version does not know")]
    Unknown,
}

/// A request and its stream, at either side.
#[derive(Debug)]
pub struct Exchange {
    hub: Hub,
    /// What goes to the other side.
    pub send: SendStream,
    /// What comes from it.
    pub receive: RecvStream,
}

impl Hub {
    /// Takes over the session's streams and datagrams. Must be called inside a tokio runtime.
    pub fn new(session: Session) -> Self {
        let flows = Flows::default();
        let (connection, table) = (session.connection().clone(), flows.clone());
        let pump = tokio::spawn(async move {
            while let Ok(datagram) = connection.read_datagram().await {
                let Ok((id, rest)) = postcard::take_from_bytes::<u64>(&datagram) else { continue };
                let payload = datagram.slice_ref(rest);
                if let Some(flow) = lock(&table).get(&id) {
                    // A full queue drops.
                    let _ = flow.try_send(payload);
                }
            }
        });
        Self(Arc::new(Inner { session, flows, pump }))
    }

    /// The session.
    pub fn session(&self) -> &Session {
        &self.0.session
    }

    /// Opens a stream with a request. Data may be written at once; the answer comes by [`Exchange::answer`].
    ///
    /// # Errors
    ///
    /// When the session is over.
    pub async fn request(&self, request: &Request) -> Result<Exchange, RequestError> {
        let (mut send, receive) = self.session().open_bi().await.map_err(|_| RequestError::Session)?;
        send.write_all(&request.encode()).await.map_err(|_| RequestError::Session)?;
        Ok(Exchange { hub: self.clone(), send, receive })
    }

    /// Makes a request and waits for its answer.
    ///
    /// # Errors
    ///
    /// When it is not accepted.
    pub async fn ask(&self, request: &Request) -> Result<Exchange, RequestError> {
        let mut exchange = self.request(request).await?;
        exchange.answer().await?;
        Ok(exchange)
    }

    /// The next stream that the other side opens.
    ///
    /// # Errors
    ///
    /// When the session is over.
    pub async fn accept(&self) -> Result<Opening, quinn::ConnectionError> {
        let (send, receive) = self.session().accept_bi().await?;
        Ok(Opening { hub: self.clone(), send, receive })
    }

    /// Shows whether the other side is still there and understands us: true when it answers within `patience`.
    pub async fn answers(&self, patience: Duration) -> bool {
        matches!(tokio::time::timeout(patience, self.ask(&Request::Ping)).await, Ok(Ok(_)))
    }

    /// The datagrams of the stream with this id.
    pub(crate) fn flow(&self, id: u64) -> (FlowSender, FlowReceiver) {
        let (sender, incoming) = mpsc::channel(FLOW_QUEUE);
        lock(&self.0.flows).insert(id, sender);
        (FlowSender { hub: self.clone(), id }, FlowReceiver { hub: self.clone(), id, incoming })
    }
}

impl Opening {
    /// Waits until the stream says what it is for. What this version does not know is refused.
    ///
    /// # Errors
    ///
    /// When there is nothing to be done with the stream.
    pub async fn read(mut self) -> Result<Incoming, ReadError> {
        let body = match tokio::time::timeout(PATIENCE, read_header(&mut self.receive)).await {
            Err(_) | Ok(Err(_)) => return Err(ReadError::Ended),
            Ok(Ok(Header::Pipe)) => return Ok(Incoming::Pipe(self.send, self.receive)),
            Ok(Ok(Header::Unknown)) => None,
            Ok(Ok(Header::Request(body))) => Request::decode(&body),
        };
        let exchange = Exchange { hub: self.hub, send: self.send, receive: self.receive };
        match body {
            Some(request) => Ok(Incoming::Request(request, exchange)),
            None => {
                exchange.refuse().await;
                Err(ReadError::Unknown)
            }
        }
    }
}

/// What a stream says that it is for.
pub(crate) enum Header {
    Pipe,
    Request(Vec<u8>),
    Unknown,
}

/// Reads the beginning of a stream.
pub(crate) async fn read_header(receive: &mut RecvStream) -> Result<Header, quinn::ReadExactError> {
    let mut kind = [0];
    receive.read_exact(&mut kind).await?;
    match kind[0] {
        PIPE => Ok(Header::Pipe),
        REQUEST => {
            let mut length = [0; 2];
            receive.read_exact(&mut length).await?;
            let length = usize::from(u16::from_be_bytes(length));
            if length > MAX_REQUEST {
                return Ok(Header::Unknown);
            }
            let mut body = vec![0; length];
            receive.read_exact(&mut body).await?;
            Ok(Header::Request(body))
        }
        _ => Ok(Header::Unknown),
    }
}

impl Exchange {
    /// The session that it belongs to.
    pub fn hub(&self) -> &Hub {
        &self.hub
    }

    /// The other side.
    pub fn peer(&self) -> PeerId {
        self.hub.session().peer()
    }

    /// The stream's id, the same at both sides.
    pub fn id(&self) -> u64 {
        self.send.id().into()
    }

    /// Waits for the other side's answer.
    ///
    /// # Errors
    ///
    /// When the request is not accepted.
    pub async fn answer(&mut self) -> Result<(), RequestError> {
        read_answer(&mut self.receive).await
    }

    /// Answers the other side.
    ///
    /// # Errors
    ///
    /// When the session is over, or the other side does not want to know any more.
    pub async fn respond(&mut self, answer: Answer) -> Result<(), RequestError> {
        self.send.write_all(&answer.to_bytes()).await.map_err(|_| RequestError::Session)
    }

    /// Answers that it is refused, and ends the stream.
    pub async fn refuse(self) {
        self.end(Answer::Refused).await;
    }

    /// Answers and ends the stream.
    pub async fn end(mut self, answer: Answer) {
        if self.respond(answer).await.is_ok() {
            let _ = self.send.finish();
        }
        let _ = self.receive.stop(REFUSED.into());
    }

    /// The stream alone.
    pub(crate) fn into_halves(self) -> (SendStream, RecvStream) {
        (self.send, self.receive)
    }

    /// The datagrams of this stream.
    pub fn flow(&self) -> (FlowSender, FlowReceiver) {
        self.hub.flow(self.id())
    }
}

/// Reads an answer from the beginning of a stream.
pub(crate) async fn read_answer(receive: &mut RecvStream) -> Result<(), RequestError> {
    let mut bytes = [0; 2];
    receive.read_exact(&mut bytes).await.map_err(|_| RequestError::Session)?;
    Answer::from_bytes(bytes).into_result()
}

/// The datagrams that belong to one stream: how they are sent.
#[derive(Debug, Clone)]
pub struct FlowSender {
    hub: Hub,
    id: u64,
}

/// The datagrams that belong to one stream: how they arrive. Those that come while it is not held are lost.
#[derive(Debug)]
pub struct FlowReceiver {
    hub: Hub,
    id: u64,
    incoming: mpsc::Receiver<Bytes>,
}

impl FlowSender {
    /// A buffer that a datagram's payload can be appended to, for [`send`](Self::send).
    pub fn buffer(&self, capacity: usize) -> BytesMut {
        let mut buffer = BytesMut::with_capacity(capacity + ID_LEN);
        let mut id = [0; ID_LEN];
        buffer.put_slice(postcard::to_slice(&self.id, &mut id).unwrap_or_default());
        buffer
    }

    /// Sends what was appended to a [`buffer`](Self::buffer). False when it is too long for a datagram on this path, and has not been sent.
    ///
    /// # Errors
    ///
    /// When the session is over or takes no datagrams.
    pub fn send(&self, buffer: Bytes) -> Result<bool, RequestError> {
        match self.hub.session().send_datagram(buffer) {
            Ok(()) => Ok(true),
            Err(SendDatagramError::TooLarge) => Ok(false),
            Err(_) => Err(RequestError::Session),
        }
    }
}

impl FlowReceiver {
    /// The next datagram; never ends before it is dropped.
    pub async fn receive(&mut self) -> Bytes {
        match self.incoming.recv().await {
            Some(payload) => payload,
            None => std::future::pending().await,
        }
    }
}

impl Drop for FlowReceiver {
    fn drop(&mut self) {
        lock(&self.hub.0.flows).remove(&self.id);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Only whole entries are put in and taken out.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
