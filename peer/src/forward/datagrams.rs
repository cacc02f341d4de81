//! A flow of datagrams joined to a stream inside.
//!
//! They travel as QUIC datagrams: none waits for another that was lost, and none is sent twice, as programs that use UDP expect. What is too
//! long for one on the present path goes over the flow's own stream, as does everything before the other side has accepted the
//! flow: a datagram that overtook the request would be lost, and a resolver would wait for seconds.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use quinn::{RecvStream, SendStream};

use super::streams::{JoinError, Ready};
use crate::service::{Exchange, FlowSender};

/// Longest UDP payload.
pub(super) const MAX_DATAGRAM: usize = 65_507;

/// A flow with nothing in either direction for this long is over (RFC 4787, REQ-5: not less than two minutes).
const IDLE: Duration = Duration::from_secs(120);

/// The outside of a flow.
pub(super) trait End: Send + Sync {
    /// The next datagram from outside.
    fn receive(&mut self) -> impl Future<Output = io::Result<Bytes>> + Send;
}

/// Where datagrams go to, outside.
pub(super) trait Sink: Send + Sync {
    fn send(&self, payload: &[u8]) -> impl Future<Output = io::Result<()>> + Send;
}

/// When something last happened, and whether the other side has accepted.
struct State {
    start: Instant,
    active: AtomicU64,
    accepted: AtomicBool,
}

impl State {
    fn touch(&self) {
        self.active.store(self.start.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    async fn idle(&self) {
        loop {
            let end = self.start + Duration::from_millis(self.active.load(Ordering::Relaxed)) + IDLE;
            if end <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(end.into()).await;
        }
    }
}

/// Carries datagrams both ways until the flow is idle, the stream ends or either side breaks. `ready` is over when the other side has
/// accepted.
pub(super) async fn join(
    end: impl End,
    sink: impl Sink,
    exchange: Exchange,
    ready: impl Ready,
) -> Result<(), JoinError> {
    let state = State { start: Instant::now(), active: AtomicU64::new(0), accepted: AtomicBool::new(false) };
    let (outbound, mut inbound) = exchange.flow();
    let Exchange { mut send, mut receive, .. } = exchange;
    let inward = carry_in(end, &outbound, &mut send, &state);
    let framed = async {
        ready.ready(&mut receive).await?;
        state.accepted.store(true, Ordering::Relaxed);
        frames(&mut receive, &sink, &state).await
    };
    let outward = async {
        loop {
            let payload = inbound.receive().await;
            state.touch();
            // As on any path, what cannot be delivered is lost.
            let _ = sink.send(&payload).await;
        }
    };
    let outcome = tokio::select! {
        outcome = inward => outcome,
        outcome = framed => outcome,
        () = outward => Ok(()),
        () = state.idle() => Ok(()),
    };
    let _ = send.finish();
    outcome
}

async fn carry_in(
    mut end: impl End,
    flow: &FlowSender,
    send: &mut SendStream,
    state: &State,
) -> Result<(), JoinError> {
    loop {
        let payload = end.receive().await?;
        state.touch();
        if state.accepted.load(Ordering::Relaxed) {
            let mut buffer = flow.buffer(payload.len());
            buffer.extend_from_slice(&payload);
            if flow.send(buffer.freeze())? {
                continue;
            }
        }
        let Ok(length) = u16::try_from(payload.len()) else { continue };
        let mut frame = BytesMut::with_capacity(payload.len() + 2);
        frame.extend_from_slice(&length.to_be_bytes());
        frame.extend_from_slice(&payload);
        send.write_chunk(frame.freeze()).await.map_err(|_| JoinError::Inside)?;
    }
}

/// Delivers what comes over the stream.
async fn frames(receive: &mut RecvStream, sink: &impl Sink, state: &State) -> Result<(), JoinError> {
    let mut buffer = Vec::new();
    loop {
        let mut length = [0; 2];
        match receive.read_exact(&mut length).await {
            Ok(()) => {}
            Err(quinn::ReadExactError::FinishedEarly(0)) => return Ok(()),
            Err(_) => return Err(JoinError::Inside),
        }
        buffer.resize(usize::from(u16::from_be_bytes(length)), 0);
        receive.read_exact(&mut buffer).await.map_err(|_| JoinError::Inside)?;
        state.touch();
        let _ = sink.send(&buffer).await;
    }
}
