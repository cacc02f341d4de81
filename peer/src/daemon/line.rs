//! One end of a control socket: frames in and out.

use std::collections::VecDeque;
use std::io;
use std::marker::PhantomData;
use std::sync::Arc;

use bytes::{Buf as _, Bytes, BytesMut};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::message::{self, HEADER_LEN, Kind};
use super::packets::{Packets, Queues};

/// Control frames that may wait.
const QUEUE: usize = 64;

/// Read and written at once.
const CHUNK: usize = 256 * 1024;

/// What is said, and how.
#[derive(Debug)]
pub(super) struct Teller<T> {
    frames: mpsc::Sender<Vec<u8>>,
    says: PhantomData<fn(T)>,
}

impl<T> Clone for Teller<T> {
    fn clone(&self) -> Self {
        Self { frames: self.frames.clone(), says: PhantomData }
    }
}

impl<T: Serialize> Teller<T> {
    /// False when nobody hears it any more.
    pub(super) async fn tell(&self, message: &T) -> bool {
        self.frames.send(message::encode(message)).await.is_ok()
    }

    /// Says something else.
    pub(super) async fn tell_as(&self, message: &impl Serialize) -> bool {
        self.frames.send(message::encode(message)).await.is_ok()
    }

    /// What keeps the socket open.
    pub(super) fn into_frames(self) -> mpsc::Sender<Vec<u8>> {
        self.frames
    }

    /// The other end is gone.
    pub(super) async fn closed(&self) {
        self.frames.closed().await;
    }
}

/// What is heard; ends with the other end.
pub(super) struct Hearer<H> {
    frames: mpsc::Receiver<Bytes>,
    reading: JoinHandle<()>,
    hears: PhantomData<fn() -> H>,
}

impl<H> Drop for Hearer<H> {
    fn drop(&mut self) {
        self.reading.abort();
    }
}

impl<H: DeserializeOwned> Hearer<H> {
    /// The next message; `None` when the other end is gone, or says what is none.
    pub(super) async fn hear(&mut self) -> Option<H> {
        let frame = self.frames.recv().await?;
        message::decode(&frame).ok()
    }

    /// The next message, read as something else.
    pub(super) async fn hear_as<O: DeserializeOwned>(&mut self) -> Option<O> {
        let frame = self.frames.recv().await?;
        message::decode(&frame).ok()
    }
}

/// Both, and the packets.
pub(super) struct Line<T, H> {
    pub(super) teller: Teller<T>,
    pub(super) hearer: Hearer<H>,
    pub(super) packets: Packets,
}

impl<T, H> Line<T, H> {
    /// Takes over a socket; control frames of more than `most` bytes end it. It is closed once all [`Teller`]s and the packets are dropped, and what
    /// was said is written.
    pub(super) fn new(socket: UnixStream, most: usize) -> Self {
        let (reader, writer) = socket.into_split();
        let packets = Arc::new(Queues::default());
        let (said, saying) = mpsc::channel(QUEUE);
        let (heard, hearing) = mpsc::channel(QUEUE);
        tokio::spawn({
            let packets = packets.clone();
            async move {
                // An error is the other end's absence, which the reader sees as well.
                let _ = write(writer, saying, &packets).await;
                packets.close();
            }
        });
        let reading = tokio::spawn({
            let packets = packets.clone();
            let guard = Closing(packets.clone());
            async move {
                let _guard = guard;
                if let Err(error) = read(reader, heard, &packets, most).await {
                    tracing::debug!(%error, "the control socket");
                }
            }
        });
        let teller = Teller { frames: said, says: PhantomData };
        let hearer = Hearer { frames: hearing, reading, hears: PhantomData };
        Self { teller, hearer, packets: Packets(packets) }
    }
}

/// Nothing comes in any more, however that came about.
struct Closing(Arc<Queues>);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.close();
    }
}

async fn read(
    mut reader: OwnedReadHalf,
    heard: mpsc::Sender<Bytes>,
    packets: &Queues,
    most: usize,
) -> io::Result<()> {
    let malformed = |error| io::Error::new(io::ErrorKind::InvalidData, error);
    let mut buffer = BytesMut::with_capacity(CHUNK);
    loop {
        while let Some((kind, length)) = message::parse_header(&buffer, most).map_err(malformed)? {
            if buffer.len() < HEADER_LEN + length {
                buffer.reserve(HEADER_LEN + length - buffer.len());
                break;
            }
            buffer.advance(HEADER_LEN);
            let body = buffer.split_to(length).freeze();
            match kind {
                Kind::Packet => packets.arrived(body).await,
                // Whoever does not want to hear may want packets.
                Kind::Control => drop(heard.send(body).await),
            }
        }
        if buffer.capacity() - buffer.len() < HEADER_LEN {
            buffer.reserve(CHUNK);
        }
        if reader.read_buf(&mut buffer).await? == 0 {
            return Ok(());
        }
    }
}

async fn write(
    mut writer: OwnedWriteHalf,
    mut saying: mpsc::Receiver<Vec<u8>>,
    packets: &Queues,
) -> io::Result<()> {
    let mut buffer = BytesMut::with_capacity(CHUNK);
    let mut said_all = false;
    loop {
        tokio::select! {
            frame = saying.recv(), if !said_all => match frame {
                Some(frame) => put(&mut buffer, Kind::Control, &frame),
                None => said_all = true,
            },
            () = packets.leaving.notified() => {}
        }
        while let Ok(frame) = saying.try_recv() {
            put(&mut buffer, Kind::Control, &frame);
        }
        let (leaving, ended) = packets.take();
        put_all(&mut writer, &mut buffer, leaving).await?;
        writer.write_all(&buffer).await?;
        buffer.clear();
        if said_all && ended {
            return Ok(());
        }
    }
}

fn put(buffer: &mut BytesMut, kind: Kind, body: &[u8]) {
    buffer.extend_from_slice(&message::header(kind, body.len()));
    buffer.extend_from_slice(body);
}

async fn put_all(
    writer: &mut OwnedWriteHalf,
    buffer: &mut BytesMut,
    packets: VecDeque<Bytes>,
) -> io::Result<()> {
    for packet in packets {
        if buffer.len() + HEADER_LEN + packet.len() > CHUNK {
            writer.write_all(buffer).await?;
            buffer.clear();
        }
        put(buffer, Kind::Packet, &packet);
    }
    Ok(())
}
