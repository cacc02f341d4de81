//! Byte streams joined to QUIC streams.

use std::io;

use peer::Session;
use peer::quinn::{ReadError, RecvStream, SendStream, Side};
use peer::service::{Hub, Incoming, PIPE, REFUSED};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::gate::Gate;

const BUFFER: usize = 256 * 1024;

/// The stream that the two sides' standard inputs and outputs meet on: opened by the QUIC client, whichever side dialled. Until it is there,
/// the gate answers requests; without one all are refused.
pub(super) async fn meet(session: &Session, gate: Option<&Gate>) -> anyhow::Result<(SendStream, RecvStream)> {
    if session.side() == Side::Client {
        let (mut send, receive) = session.open_bi().await?;
        send.write_all(&[PIPE]).await?;
        return Ok((send, receive));
    }
    let hub = Hub::new(session.clone());
    loop {
        match hub.accept().await?.read().await? {
            Incoming::Pipe(send, receive) => return Ok((send, receive)),
            Incoming::Request(request, exchange) => match gate {
                Some(gate) => gate.answer(request, exchange).await,
                None => exchange.refuse().await,
            },
            _ => {}
        }
    }
}

/// Tells the other side that there is nothing to join its pipe to.
pub(super) fn refuse(mut send: SendStream, mut receive: RecvStream) {
    let _ = send.reset(REFUSED.into());
    let _ = receive.stop(REFUSED.into());
}

/// Whether a pipe broke because the other side takes none.
pub(super) fn is_refused(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(ReadError::Reset(code)) if *code == REFUSED.into())
}

/// Sends all of `input`, ends the stream, and waits until the other side has all of it.
pub(super) async fn upload(mut input: impl AsyncRead + Unpin, mut send: SendStream) -> anyhow::Result<u64> {
    let mut buffer = vec![0; BUFFER];
    let mut total = 0;
    let stopped = send.stopped();
    tokio::pin!(stopped);
    loop {
        let count = tokio::select! {
            count = input.read(&mut buffer) => count?,
            // The other side has heard enough; that is its right.
            Ok(_) = &mut stopped => return Ok(total),
        };
        if count == 0 {
            break;
        }
        if let Err(error) = send.write_all(&buffer[..count]).await {
            return match error {
                peer::quinn::WriteError::Stopped(_) => Ok(total),
                error => Err(error.into()),
            };
        }
        total += count as u64;
    }
    send.finish()?;
    // An error here is the session's, and the reading half tells it.
    let _ = send.stopped().await;
    Ok(total)
}

/// Writes everything that arrives to `output`; tells when the first byte has.
pub(super) async fn download(
    mut receive: RecvStream,
    mut output: impl AsyncWrite + Unpin,
    mut first: impl FnMut(),
) -> anyhow::Result<u64> {
    let mut total = 0;
    while let Some(chunk) = receive.read_chunk(BUFFER, true).await? {
        if total == 0 {
            first();
        }
        total += chunk.bytes.len() as u64;
        match output.write_all(&chunk.bytes).await {
            // The reader of our output has had enough, as `head` has.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(total),
            written => written?,
        }
        output.flush().await?;
    }
    Ok(total)
}

/// Sends back what arrives.
pub(super) async fn echo(mut send: SendStream, mut receive: RecvStream) -> anyhow::Result<u64> {
    let mut total = 0;
    while let Some(chunk) = receive.read_chunk(BUFFER, true).await? {
        total += chunk.bytes.len() as u64;
        send.write_chunk(chunk.bytes).await?;
    }
    send.finish()?;
    let _ = send.stopped().await;
    Ok(total)
}
