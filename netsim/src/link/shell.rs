//! Carries frames between the two ends of a line: packet sockets, a clock and a thread around two [`Queue`]s.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::prctl;
use nix::sys::time::TimeSpec;

use super::queue::{Impairment, Queue};
use crate::namespace::Namespace;
use crate::sys::{self, BATCH, FrameReader};

/// Why a line could not be emulated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// An end of the line could not be told to hand over packets as they would be on a wire.
    #[error("could not switch off the offloads of an interface")]
    Offload(#[source] io::Error),
    /// A packet socket or the thread that serves it could not be had.
    #[error("could not start the link emulator")]
    Start(#[source] io::Error),
    /// The line was built without any impairment.
    #[error(
        "this line has no emulator: give its site some impairment when it is added, a delay for instance"
    )]
    Unimpaired,
    /// The line has ended: an interface of it is gone.
    #[error("this line has ended")]
    Ended,
}

/// A running line. Dropping it ends its thread.
#[derive(Debug)]
pub(crate) struct Link {
    losses: Arc<AtomicU64>,
    changes: Sender<[Impairment; 2]>,
    /// The thread ends when this end closes.
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl Link {
    /// Makes an interface of the calling thread's namespace segment what it sends into a line.
    pub(crate) fn segment_before(interface: &str) -> io::Result<()> {
        sys::disable_offloads(interface)
    }

    /// Starts a line between the interfaces `site` and `internet` of a namespace.
    pub(crate) fn start(
        namespace: &Namespace,
        up: Impairment,
        down: Impairment,
        seed: u64,
    ) -> Result<Self, LinkError> {
        Self::try_start(namespace, up, down, seed).map_err(LinkError::Start)
    }

    fn try_start(namespace: &Namespace, up: Impairment, down: Impairment, seed: u64) -> io::Result<Self> {
        let (site, internet) = namespace
            .run(|| Ok::<_, io::Error>((sys::packet_socket("site")?, sys::packet_socket("internet")?)))??;
        let (stop, stopped) = UnixStream::pair()?;
        let losses = Arc::new(AtomicU64::new(0));
        let site = Arc::new(site);
        let internet = Arc::new(internet);
        let up = Way::new(Arc::clone(&site), Arc::clone(&internet), up, seed);
        let down = Way::new(internet, site, down, !seed);
        let (changes, changing) = mpsc::channel();
        let mut shell = Shell { ways: [up, down], stopped, changing, losses: Arc::clone(&losses) };
        let thread = thread::Builder::new().name("netsim-link".into()).spawn(move || shell.drive())?;
        Ok(Self { losses, changes, stop: Some(stop), thread: Some(thread) })
    }

    /// What it does to frames that enter it from now on.
    pub(crate) fn change(&self, up: Impairment, down: Impairment) -> Result<(), LinkError> {
        self.changes.send([up, down]).map_err(|_| LinkError::Ended)
    }

    /// Frames that did not make it to the other end so far.
    pub(crate) fn losses(&self) -> u64 {
        self.losses.load(Ordering::Relaxed)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed; the line is over either way.
            let _ = thread.join();
        }
    }
}

struct Shell {
    ways: [Way; 2],
    stopped: UnixStream,
    changing: Receiver<[Impairment; 2]>,
    losses: Arc<AtomicU64>,
}

impl Shell {
    fn drive(&mut self) {
        // Both only sharpen the clock; without the right to the second, a busy machine makes the line less exact.
        let _ = prctl::set_timerslack(1);
        let _ = sys::prefer_this_thread();
        let mut reader = FrameReader::new();
        // Ends when told to, or when an interface is gone and with it the line.
        while let Ok(true) = self.wait() {
            // They matter to frames alone, so that no change need wake us up.
            for changes in self.changing.try_iter() {
                for (way, impairment) in self.ways.iter_mut().zip(changes) {
                    way.queue.change(impairment);
                }
            }
            for way in &mut self.ways {
                if way.receive(&mut reader).is_err() {
                    return;
                }
                way.transmit();
            }
            let losses = self.ways.iter().map(Way::losses).sum();
            self.losses.store(losses, Ordering::Relaxed);
        }
    }

    /// Sleeps until a frame comes or one is due. False when the line is to end.
    fn wait(&self) -> Result<bool, Errno> {
        let wake_up = self.ways.iter().filter_map(|way| way.queue.poll_timeout()).min();
        let timeout = wake_up.map(|at| TimeSpec::from(at.saturating_duration_since(Instant::now())));
        let mut polled = [
            PollFd::new(self.stopped.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.ways[0].from.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.ways[1].from.as_fd(), PollFlags::POLLIN),
        ];
        match ppoll(&mut polled, timeout, None) {
            Ok(_) | Err(Errno::EINTR) => Ok(!polled[0].any().unwrap_or(true)),
            Err(errno) => Err(errno),
        }
    }
}

/// One direction.
struct Way {
    from: Arc<OwnedFd>,
    to: Arc<OwnedFd>,
    queue: Queue<Vec<u8>>,
    due: Vec<Vec<u8>>,
    unsent: u64,
}

impl Way {
    fn new(from: Arc<OwnedFd>, to: Arc<OwnedFd>, impairment: Impairment, seed: u64) -> Self {
        Self { from, to, queue: Queue::new(impairment, seed), due: Vec::with_capacity(BATCH), unsent: 0 }
    }

    /// Moves what waits at the socket into the queue, dated back to when the kernel received it.
    fn receive(&mut self, reader: &mut FrameReader) -> io::Result<()> {
        let (now, date) = (Instant::now(), SystemTime::now());
        let frames = match reader.read(&self.from) {
            Ok(frames) => frames,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        for (frame, received) in frames {
            if frame.is_empty() {
                self.unsent += 1;
                continue;
            }
            // A clock that is being set must not throw frames far into the past.
            let age = date.duration_since(received).unwrap_or_default().min(Duration::from_millis(100));
            self.queue.handle_frame(frame.to_vec(), now.checked_sub(age).unwrap_or(now));
        }
        Ok(())
    }

    /// Writes what is due to the other end.
    fn transmit(&mut self) {
        loop {
            let now = Instant::now();
            while self.due.len() < BATCH
                && let Some(frame) = self.queue.poll_frame(now)
            {
                self.due.push(frame);
            }
            if self.due.is_empty() {
                return;
            }
            match sys::write_frames(&self.to, &self.due) {
                Ok(sent) => drop(self.due.drain(..sent)),
                // The first one was refused: lost, like a frame that a switch has no room for.
                Err(_) => {
                    self.unsent += 1;
                    self.due.remove(0);
                }
            }
        }
    }

    fn losses(&self) -> u64 {
        self.queue.dropped() + self.unsent
    }
}
