//! All relay threads: made, told, ended together.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::thread::JoinHandle;

use tokio::sync::mpsc::UnboundedSender;
use tracing::warn;

use super::bell::Entrance;
use super::count::Meter;
use super::shard::{Command, Links, Office, Report, Shard};
use super::table::Table;
use crate::limits::{Limits, SourceBuckets};
use crate::overflow::Overflow;
use crate::ports;
use crate::server::keys;

/// The relay threads; they stop when this is dropped.
#[derive(Debug, Default)]
pub(crate) struct Relay {
    pub(crate) shards: Vec<Entrance>,
    threads: Vec<JoinHandle<()>>,
    pub(crate) meter: Meter,
    pub(crate) overflow: Arc<Overflow>,
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Relay {
    pub(crate) fn start(
        ports: [ports::Port; 2],
        pairs: Vec<[IpAddr; 2]>,
        threads: usize,
        limits: &Limits,
        reports: UnboundedSender<Report>,
    ) -> io::Result<Self> {
        let mut columns: Vec<Vec<_>> = (0..threads).map(|_| Vec::new()).collect();
        let overflow = Arc::new(Overflow::of(&ports)?);
        for sockets in ports.into_iter().flat_map(|port| port.sockets) {
            for (column, socket) in columns.iter_mut().zip(sockets) {
                column.push(socket);
            }
        }
        let made = columns.into_iter().map(|sockets| Shard::new(sockets, pairs.clone()));
        let (entrances, shards): (Vec<_>, Vec<_>) = made.collect::<io::Result<Vec<_>>>()?.into_iter().unzip();
        let meter = Meter::new(overflow.clone());
        let mut relay = Self { shards: entrances, threads: Vec::new(), meter, overflow };
        for (number, shard) in shards.into_iter().enumerate() {
            let mut others = relay.shards.clone();
            others.swap_remove(number);
            let counters = relay.meter.add();
            let office = Office {
                table: Table::new(limits.lease, limits.binding),
                strangers: SourceBuckets::new(limits.reflecting, keys()),
                links: Links { shards: others, reports: reports.clone(), number },
                counters,
            };
            relay.threads.push(shard.spawn(number, office)?);
        }
        Ok(relay)
    }

    pub(crate) fn stop(&self) {
        for shard in &self.shards {
            shard.tell(Command::Stop);
        }
    }

    pub(crate) fn join(&mut self) {
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                warn!("a relay thread has panicked");
            }
        }
    }
}
