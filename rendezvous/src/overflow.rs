//! Datagrams that the kernel drops at the relay's sockets.

use std::convert::Infallible;
use std::io;
use std::net::UdpSocket;
use std::time::Duration;

use tracing::warn;

use crate::ports::Port;

/// How often drops are looked for. The log tells of them once in that time, whatever their number.
const PERIOD: Duration = Duration::from_secs(60);

/// Second handles of the relay's sockets.
#[derive(Debug, Default)]
pub(crate) struct Overflow {
    sockets: Vec<UdpSocket>,
}

impl Overflow {
    pub(crate) fn of(ports: &[Port]) -> io::Result<Self> {
        let sockets = ports.iter().flat_map(|port| port.sockets.iter().flatten());
        Ok(Self { sockets: sockets.map(UdpSocket::try_clone).collect::<io::Result<_>>()? })
    }

    /// How many datagrams the kernel has dropped so far.
    pub(crate) fn count(&self) -> u64 {
        let drops = self.sockets.iter().map(|socket| rendezvous_batch::drops(socket).unwrap_or(0));
        drops.map(u64::from).sum()
    }

    /// Warns of drops as they come.
    pub(crate) async fn watch(&self) -> Infallible {
        let mut told = 0;
        loop {
            tokio::time::sleep(PERIOD).await;
            let count = self.count();
            let fresh = count.saturating_sub(told);
            if fresh > 0 {
                warn!(
                    dropped = fresh,
                    "the kernel dropped datagrams for the relay: its socket buffers were full; give it more CPU, or more than \
                     `sysctl net.core.rmem_max` allows now"
                );
            }
            told = count;
        }
    }
}
