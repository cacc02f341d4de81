//! The rest of a household: flows that have nothing to do with us.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use netsim::Host;

/// A host that opens new flows all the time, each with a socket of its own, until it is dropped.
pub struct Household {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Household {
    /// `flows` new ones a second from `host` to a port of `target` at which nobody listens.
    ///
    /// # Errors
    ///
    /// When a socket cannot be opened in the host.
    pub fn start(host: &Host, target: SocketAddr, flows: u32) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (host, stopping) = (host.clone(), stop.clone());
        let socket = move || host.run(|| UdpSocket::bind("0.0.0.0:0"));
        let first = socket().context("a socket of the household")?;
        first.send_to(b"anything", target)?;
        let thread = std::thread::spawn(move || {
            while !stopping.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_secs(1) / flows.max(1));
                if let Ok(socket) = socket() {
                    let _ = socket.send_to(b"anything", target);
                }
            }
        });
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Household {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
