//! The way into a relay thread for the rest of the server: what it is told waits in queues, and a bell wakes it from its wait for datagrams.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mio::{Registry, Token, Waker};
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender, unbounded_channel};
use tracing::error;

use super::shard::{Command, StreamFrames};

/// Records of frames that may wait for a thread; streams wait beyond that, and TCP tells their peers.
const INLET: usize = 64;

/// Tells one relay thread.
#[derive(Debug, Clone)]
pub(crate) struct Entrance {
    commands: UnboundedSender<Command>,
    frames: mpsc::Sender<StreamFrames>,
    bell: Arc<Bell>,
}

/// The thread's own end.
#[derive(Debug)]
pub(super) struct Inside {
    commands: UnboundedReceiver<Command>,
    frames: mpsc::Receiver<StreamFrames>,
    bell: Arc<Bell>,
}

/// A thread that has not been listening to its bell since it last rang is woken once, whatever it is told meanwhile.
#[derive(Debug)]
struct Bell {
    waker: Waker,
    rung: AtomicBool,
}

/// The relay thread has ended.
#[derive(Debug, thiserror::Error)]
#[error("the relay thread has ended")]
pub(crate) struct Ended;

/// Both ends; `token` of `registry` is the bell's.
pub(super) fn entrance(registry: &Registry, token: Token) -> io::Result<(Entrance, Inside)> {
    let bell = Arc::new(Bell { waker: Waker::new(registry, token)?, rung: AtomicBool::new(false) });
    let (commands, told) = unbounded_channel();
    let (frames, taken) = mpsc::channel(INLET);
    let inside = Inside { commands: told, frames: taken, bell: bell.clone() };
    Ok((Entrance { commands, frames, bell }, inside))
}

impl Entrance {
    /// Has the thread do this before it handles what comes to its sockets from now on.
    pub(crate) fn tell(&self, command: Command) {
        // A thread that has ended obeys nobody.
        if self.commands.send(command).is_ok() {
            self.bell.ring();
        }
    }

    /// Hands over frames that came on a stream, as soon as there is room.
    pub(crate) async fn forward(&self, frames: StreamFrames) -> Result<(), Ended> {
        self.frames.send(frames).await.map_err(|_| Ended)?;
        self.bell.ring();
        Ok(())
    }
}

impl Bell {
    fn ring(&self) {
        if !self.rung.swap(true, Ordering::AcqRel)
            && let Err(error) = self.waker.wake()
        {
            error!(%error, "a relay thread cannot be woken");
        }
    }
}

impl Inside {
    /// Whether the bell has rung since the last time. What is asked for after this may be in the queues, and what is told after this rings
    /// again.
    pub(super) fn has_rung(&self) -> bool {
        // Most of the time nothing has, and reading leaves the cache line shared.
        self.bell.rung.load(Ordering::Acquire) && self.bell.rung.swap(false, Ordering::AcqRel)
    }

    /// The next command that waits.
    pub(super) fn command(&mut self) -> Option<Command> {
        self.commands.try_recv().ok()
    }

    /// The next frames that wait.
    pub(super) fn frames(&mut self) -> Option<StreamFrames> {
        self.frames.try_recv().ok()
    }
}
