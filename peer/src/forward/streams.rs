//! A connection outside joined to a stream inside.

use std::io;
use std::time::Duration;

use bytes::BytesMut;
use quinn::{RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream, tcp, unix};

use crate::service::{BROKEN, RequestError};

/// Read at once from a connection, and taken at once from a stream.
const CHUNK: usize = 64 * 1024;

/// Below this a read buffer is replaced: what is left of it is too little for a read.
const LEAST: usize = 4 * 1024;

/// Why a joined connection ended early.
#[derive(Debug, thiserror::Error)]
pub(super) enum JoinError {
    /// The other side of the session did not take it.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The connection outside broke.
    #[error(transparent)]
    Outside(#[from] io::Error),
    /// The stream inside broke, or the session.
    #[error("the session or the other side's connection broke")]
    Inside,
}

/// When what comes from the other side may be passed on.
pub(super) trait Ready: Send {
    /// Waits until then, reading whatever the stream begins with.
    fn ready(self, receive: &mut RecvStream) -> impl Future<Output = Result<(), RequestError>> + Send;
}

/// At once: nothing goes before the data.
pub(super) struct AtOnce;

impl Ready for AtOnce {
    async fn ready(self, _: &mut RecvStream) -> Result<(), RequestError> {
        Ok(())
    }
}

/// A stream socket.
pub(super) trait Socket: Send {
    type Reader: AsyncRead + Unpin + Send;
    type Writer: Writer;

    fn split(self) -> (Self::Reader, Self::Writer);
}

/// The writing half of one.
pub(super) trait Writer: AsyncWrite + Unpin + Send {
    /// Drops it so that the far end learns that the connection broke, where the protocol can say so.
    fn abort(self);
}

impl Socket for TcpStream {
    type Reader = tcp::OwnedReadHalf;
    type Writer = tcp::OwnedWriteHalf;

    fn split(self) -> (Self::Reader, Self::Writer) {
        self.into_split()
    }
}

impl Writer for tcp::OwnedWriteHalf {
    fn abort(self) {
        // A close without lingering is a reset (tcp(7)).
        let _ = socket2::SockRef::from(self.as_ref()).set_linger(Some(Duration::ZERO));
        self.forget();
    }
}

impl Socket for UnixStream {
    type Reader = unix::OwnedReadHalf;
    type Writer = unix::OwnedWriteHalf;

    fn split(self) -> (Self::Reader, Self::Writer) {
        self.into_split()
    }
}

impl Writer for unix::OwnedWriteHalf {
    fn abort(self) {
        self.forget();
    }
}

/// Carries bytes both ways until both have ended, or one has broken; then the other is broken too. Nothing is written outside before
/// `ready`.
pub(super) async fn join(
    socket: impl Socket,
    mut send: SendStream,
    mut receive: RecvStream,
    ready: impl Ready,
) -> Result<(), JoinError> {
    let (mut reader, mut writer) = socket.split();
    let inward = carry_in(&mut reader, &mut send);
    let outward = async {
        ready.ready(&mut receive).await?;
        carry_out(&mut receive, &mut writer).await
    };
    let outcome = tokio::try_join!(inward, outward);
    if outcome.is_err() {
        // Whatever has ended already is not disturbed by these.
        let _ = send.reset(BROKEN.into());
        let _ = receive.stop(BROKEN.into());
        writer.abort();
    }
    outcome.map(|_| ())
}

async fn carry_in(reader: &mut (impl AsyncRead + Unpin), send: &mut SendStream) -> Result<(), JoinError> {
    let mut buffer = BytesMut::new();
    loop {
        if buffer.capacity() < LEAST {
            buffer = BytesMut::with_capacity(CHUNK);
        }
        if reader.read_buf(&mut buffer).await? == 0 {
            // Fails only on a stream that is over.
            let _ = send.finish();
            return Ok(());
        }
        send.write_chunk(buffer.split().freeze()).await.map_err(|_| JoinError::Inside)?;
    }
}

async fn carry_out(
    receive: &mut RecvStream,
    writer: &mut (impl AsyncWrite + Unpin),
) -> Result<(), JoinError> {
    loop {
        match receive.read_chunk(CHUNK, true).await.map_err(|_| JoinError::Inside)? {
            Some(chunk) => writer.write_all(&chunk.bytes).await?,
            None => {
                // The far end may have closed already.
                let _ = writer.shutdown().await;
                return Ok(());
            }
        }
    }
}
