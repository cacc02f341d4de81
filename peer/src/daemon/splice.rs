//! A stream of a command joined to a stream of the session, and what each end does to it done to the other.

use quinn::{Connection, ReadError, RecvStream, SendStream, VarInt, WriteError};
use tokio::sync::watch;

use crate::service::{BROKEN, FlowReceiver};

/// Taken at once from a stream.
const CHUNK: usize = 64 * 1024;

/// Whether the other side has everything of a stream: `None` while nobody knows.
pub(super) type Delivered = watch::Sender<Option<bool>>;

/// A stream's two halves.
pub(super) type Halves = (SendStream, RecvStream);

/// A sending half that is reset, not ended, when nobody has ended it: the command is gone.
struct Out(Option<SendStream>);

impl Out {
    fn reset(mut self, code: VarInt) {
        if let Some(mut send) = self.0.take() {
            let _ = send.reset(code);
        }
    }
}

impl Drop for Out {
    fn drop(&mut self) {
        if let Some(send) = &mut self.0 {
            let _ = send.reset(BROKEN.into());
        }
    }
}

/// A receiving half that is stopped when nobody reads it any more; no-one hears of it where it has ended.
struct In(RecvStream);

impl Drop for In {
    fn drop(&mut self) {
        let _ = self.0.stop(BROKEN.into());
    }
}

/// Carries bytes both ways, and the session's datagrams of this stream to the command, until both directions have ended. To be dropped when either
/// connection is over.
pub(super) async fn splice(
    command: Halves,
    session: Halves,
    mut flow: FlowReceiver,
    to_command: &Connection,
    delivered: Delivered,
) {
    let local = u64::from(command.0.id());
    let (command_out, command_in) = (Out(Some(command.0)), In(command.1));
    let (session_out, session_in) = (Out(Some(session.0)), In(session.1));
    let up = async {
        let all = pump(command_in, session_out).await;
        delivered.send_replace(Some(all));
    };
    let both = async {
        tokio::join!(up, pump(session_in, command_out));
    };
    let datagrams = async {
        loop {
            let payload = flow.receive().await;
            // One that does not fit the command's queue is lost, as on any network.
            let _ = to_command.send_datagram(super::share::numbered(local, &payload));
        }
    };
    tokio::select! {
        () = both => {}
        () = datagrams => {}
    }
}

/// Carries bytes one way. True when the far end has all of them, or wants no more.
async fn pump(mut from: In, mut to: Out) -> bool {
    let Some(send) = &mut to.0 else { return false };
    let stopped = send.stopped();
    tokio::pin!(stopped);
    loop {
        let chunk = tokio::select! {
            chunk = from.0.read_chunk(CHUNK, true) => chunk,
            stop = &mut stopped => {
                if let Ok(Some(code)) = stop {
                    let _ = from.0.stop(code);
                    to.0 = None;
                    return true;
                }
                return false;
            }
        };
        let written = match chunk {
            Ok(Some(chunk)) => send.write_chunk(chunk.bytes).await,
            Ok(None) => {
                let _ = send.finish();
                // What is finished is no longer to be reset.
                let _finished = to.0.take();
                return stopped.await.is_ok();
            }
            Err(ReadError::Reset(code)) => {
                to.reset(code);
                return false;
            }
            Err(_) => return false,
        };
        match written {
            Ok(()) => {}
            Err(WriteError::Stopped(code)) => {
                let _ = from.0.stop(code);
                to.0 = None;
                return true;
            }
            Err(_) => return false,
        }
    }
}
