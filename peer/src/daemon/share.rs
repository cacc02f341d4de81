//! One command's use of a session.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::{BufMut as _, Bytes, BytesMut};
use quinn::{Connection, ConnectionError, Side, VarInt};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::close;
use super::line::{Hearer, Teller};
use super::message::{Ask, News, Tell, Who};
use super::server::Host;
use super::sessions::Held;
use super::splice::{Halves, splice};
use super::status::CommandStatus;
use crate::service::{FlowSender, Header, PIPE, Request, read_header};
use crate::session::Path;

/// How often it is looked whether the longest datagram has another length, or something was heard; the path's changes are told at once.
const LOOK: Duration = Duration::from_secs(1);

/// The id of a session's stream may take so many bytes more than that of the command's.
const LONGER_ID: usize = 4;

/// Most bytes of an id before a datagram.
const ID_LEN: usize = 10;

/// A datagram of the stream with this id.
pub(super) fn numbered(stream: u64, payload: &[u8]) -> Bytes {
    let mut buffer = BytesMut::with_capacity(payload.len() + ID_LEN);
    let mut id = [0; ID_LEN];
    buffer.put_slice(postcard::to_slice(&stream, &mut id).unwrap_or_default());
    buffer.put_slice(payload);
    buffer.freeze()
}

/// A stream that a peer has opened, and what stood at its beginning.
pub(super) struct Brought {
    pub(super) header: Vec<u8>,
    pub(super) halves: Halves,
}

impl Brought {
    pub(super) fn pipe(halves: Halves) -> Self {
        Self { header: vec![PIPE], halves }
    }

    pub(super) fn request(request: &Request, halves: Halves) -> Self {
        Self { header: request.encode(), halves }
    }
}

/// See the module's documentation.
pub(super) struct Share {
    pub(super) number: u64,
    who: Who,
    since: SystemTime,
    held: Arc<Held>,
    /// To the command.
    connection: Connection,
    flows: Mutex<HashMap<u64, Flow>>,
    /// How many streams of the command's have been taken.
    taken: watch::Sender<u64>,
    streams: AtomicUsize,
}

/// A stream's numbers and datagrams.
struct Flow {
    /// Its id in the session.
    real: u64,
    sender: FlowSender,
    delivered: watch::Receiver<Option<bool>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Only whole entries are put in and taken out.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Share {
    pub(super) fn new(number: u64, who: Who, held: Arc<Held>, connection: Connection) -> Arc<Self> {
        Arc::new(Self {
            number,
            who,
            since: SystemTime::now(),
            held,
            connection,
            flows: Mutex::default(),
            taken: watch::Sender::new(0),
            streams: AtomicUsize::new(0),
        })
    }

    pub(super) fn status(&self) -> CommandStatus {
        CommandStatus {
            command: self.who.command.clone(),
            pid: self.who.pid,
            since: super::sessions::rfc3339(self.since),
            streams: self.streams.load(Ordering::Relaxed),
        }
    }

    /// Passes everything on until the command or the session is over, or `brought` is, where the share is for that alone.
    pub(super) async fn run(
        self: Arc<Self>,
        host: &impl Host,
        teller: Teller<Tell>,
        mut hearer: Hearer<Ask>,
        brought: Option<Brought>,
    ) {
        let session = self.held.session().clone();
        let mut streams = JoinSet::new();
        let side = if brought.is_some() { Side::Server } else { Side::Client };
        let mut lone = JoinSet::new();
        if let Some(brought) = brought {
            lone.spawn(self.clone().bring(brought));
        }
        let taking = async {
            while let Ok(halves) = self.connection.accept_bi().await {
                while streams.try_join_next().is_some() {}
                let share = self.clone();
                // Datagrams and questions may follow at once.
                streams.spawn(async move { share.take(halves, side).await });
            }
        };
        let asking = async {
            while let Some(ask) = hearer.hear().await {
                self.answer(host, ask, &teller).await;
            }
        };
        tokio::select! {
            () = taking => {}
            // Its process has ended.
            () = asking => {}
            () = self.datagrams() => {}
            () = self.tell_news(&teller) => {}
            _ = lone.join_next(), if side == Side::Server => {
                self.connection.close(VarInt::from_u32(0), b"");
            }
            error = session.closed() => {
                teller.tell(&Tell::Ended).await;
                let (code, reason) = match &error {
                    ConnectionError::ApplicationClosed(close) => (close.error_code, close.reason.to_vec()),
                    error => (VarInt::from_u32(close::SESSION_LOST), error.to_string().into_bytes()),
                };
                self.connection.close(code, &reason);
            }
        }
        // What is under way breaks off; a close that has been said already stands.
        lone.shutdown().await;
        streams.shutdown().await;
        self.connection.close(VarInt::from_u32(0), b"");
    }

    /// The daemon ends.
    pub(super) fn end(&self) {
        self.connection.close(VarInt::from_u32(close::DAEMON_ENDS), b"the daemon has ended");
    }

    /// A stream that the command has opened.
    async fn take(self: Arc<Self>, mut halves: Halves, side: Side) {
        let local = u64::from(halves.0.id());
        let delivered = watch::Sender::new(None);
        let session = self.held.session();
        let opened = session.open_bi().await;
        let joined = match opened {
            Ok(opened) => {
                let real = u64::from(opened.0.id());
                let flow = self.enter(local, real, delivered.subscribe());
                Some((opened, flow))
            }
            Err(_) => None,
        };
        self.taken.send_modify(|taken| *taken += 1);
        let Some((mut opened, flow)) = joined else {
            let _ = halves.0.reset(crate::service::BROKEN.into());
            let _ = halves.1.stop(crate::service::BROKEN.into());
            return;
        };
        let real = u64::from(opened.0.id());
        // What listens on behalf of a peer names its streams by the numbers that the command knows.
        let translated = match side {
            Side::Server => self.translate(&mut halves, &mut opened).await,
            Side::Client => true,
        };
        if translated {
            splice(halves, opened, flow, &self.connection, delivered).await;
        }
        self.leave(local, real);
    }

    /// Passes the beginning of a stream on, with the listener's number in the session.
    async fn translate(&self, command: &mut Halves, session: &mut Halves) -> bool {
        let header = match read_header(&mut command.1).await {
            Ok(Header::Pipe) => vec![PIPE],
            Ok(Header::Request(body)) => match Request::decode(&body) {
                Some(Request::Connection { listener }) => {
                    let listener = lock(&self.flows).get(&listener).map_or(listener, |flow| flow.real);
                    Request::Connection { listener }.encode()
                }
                Some(request) => request.encode(),
                None => return false,
            },
            Ok(Header::Unknown) | Err(_) => return false,
        };
        session.0.write_all(&header).await.is_ok()
    }

    /// A stream that the peer has opened.
    pub(super) async fn bring(self: Arc<Self>, brought: Brought) {
        let real = u64::from(brought.halves.0.id());
        let Ok(mut opened) = self.connection.open_bi().await else { return };
        let local = u64::from(opened.0.id());
        let delivered = watch::Sender::new(None);
        let flow = self.enter(local, real, delivered.subscribe());
        if opened.0.write_all(&brought.header).await.is_ok() {
            splice(opened, brought.halves, flow, &self.connection, delivered).await;
        }
        self.leave(local, real);
    }

    /// Before anything is passed on: what the other side says of it may come at once.
    fn enter(
        self: &Arc<Self>,
        local: u64,
        real: u64,
        delivered: watch::Receiver<Option<bool>>,
    ) -> crate::service::FlowReceiver {
        let (sender, receiver) = self.held.hub().flow(real);
        lock(&self.flows).insert(local, Flow { real, sender, delivered });
        self.held.own(real, local, self);
        self.streams.fetch_add(1, Ordering::Relaxed);
        receiver
    }

    fn leave(&self, local: u64, real: u64) {
        lock(&self.flows).remove(&local);
        self.held.disown(real);
        self.streams.fetch_sub(1, Ordering::Relaxed);
    }

    /// Passes the command's datagrams on.
    async fn datagrams(&self) {
        while let Ok(datagram) = self.connection.read_datagram().await {
            let Ok((local, payload)) = postcard::take_from_bytes::<u64>(&datagram) else { continue };
            let sender = lock(&self.flows).get(&local).map(|flow| flow.sender.clone());
            let Some(sender) = sender else { continue };
            let mut buffer = sender.buffer(payload.len());
            buffer.extend_from_slice(payload);
            // One that has become too long on its way here is lost; the command knows the new bound by now.
            let _ = sender.send(buffer.freeze());
        }
    }

    /// What is beneath now.
    pub(super) fn present(held: &Held) -> News {
        let (path, exhausted) = held.session().news();
        Self::news(held, *path.borrow(), *exhausted.borrow())
    }

    fn news(held: &Held, path: Option<Path>, exhausted: bool) -> News {
        let width = held.session().max_datagram_size();
        let width = width.map(|width| width.saturating_sub(LONGER_ID));
        News { path: path.map(Into::into), exhausted, width, heard: held.session().heard() }
    }

    async fn tell_news(&self, teller: &Teller<Tell>) {
        let (mut path, mut exhausted) = self.held.session().news();
        let mut told = None;
        let mut look = tokio::time::interval(LOOK);
        loop {
            let news = Self::news(&self.held, *path.borrow_and_update(), *exhausted.borrow_and_update());
            if told.as_ref() != Some(&news) {
                if !teller.tell(&Tell::News { news: news.clone() }).await {
                    return;
                }
                told = Some(news);
            }
            tokio::select! {
                Ok(()) = path.changed() => {}
                Ok(()) = exhausted.changed() => {}
                _ = look.tick() => {}
            }
        }
    }

    async fn answer(&self, host: &impl Host, ask: Ask, teller: &Teller<Tell>) {
        match ask {
            Ask::Explain { number } => {
                let explanation = self.held.session().explain().await;
                let explained = explanation.map(|explanation| host.explained(&explanation));
                teller.tell(&Tell::Explained { number, explained }).await;
            }
            Ask::Deliver { stream } => {
                // The command knows that we have it, and may ask before we have looked at it.
                let mut taken = self.taken.subscribe();
                let initiated_by_command = stream & 1 == 0;
                if initiated_by_command {
                    let _ = taken.wait_for(|taken| *taken > stream >> 2).await;
                }
                let delivered = lock(&self.flows).get(&stream).map(|flow| flow.delivered.clone());
                let teller = teller.clone();
                tokio::spawn(async move {
                    let all = match delivered {
                        Some(mut delivered) => {
                            let known = delivered.wait_for(Option::is_some).await;
                            known.is_ok_and(|all| *all == Some(true))
                        }
                        // It was over before.
                        None => true,
                    };
                    teller.tell(&Tell::Delivered { stream, all }).await;
                });
            }
            _ => {}
        }
    }
}
