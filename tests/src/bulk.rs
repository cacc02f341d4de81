//! Bulk transfers within one process: two hosts of a lab, a session between them, and what a transfer costs.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use futures_util::StreamExt as _;
use netsim::{Host, RouterKind, SiteConfig};
use peer::Endpoint;
use quinn::Connection;
use tokio::runtime::Runtime;

use crate::process::PATIENCE;
use crate::world::World;

/// Two hosts of a lab, each with a runtime of one thread in it.
pub struct Place {
    /// The lab.
    pub world: World,
    /// The hosts.
    pub hosts: [Host; 2],
    /// A runtime in each.
    pub runtimes: [Runtime; 2],
}

impl Place {
    /// Two hosts behind routers of that kind, so far from each other one-way.
    ///
    /// # Errors
    ///
    /// When the lab cannot be made.
    pub fn new(kind: RouterKind, delay: Duration) -> anyhow::Result<Self> {
        let mut world = World::new(1)?;
        let mut config = SiteConfig::new(kind);
        if !delay.is_zero() {
            config = config.delay(delay);
        }
        let a = world.lab.add_site("a", config.clone())?.host(0);
        let b = world.lab.add_site("b", config)?.host(0);
        let runtimes = [runtime(&a)?, runtime(&b)?];
        Ok(Self { world, hosts: [a, b], runtimes })
    }

    /// Runs it on one side, with patience.
    ///
    /// # Errors
    ///
    /// Its own, and when it takes too long.
    pub fn on<T: Send + 'static>(
        &self,
        side: usize,
        future: impl Future<Output = anyhow::Result<T>> + Send + 'static,
    ) -> anyhow::Result<T> {
        let task = self.runtimes[side].spawn(future);
        self.runtimes[side].block_on(async { tokio::time::timeout(PATIENCE, task).await })??
    }
}

fn runtime(host: &Host) -> anyhow::Result<Runtime> {
    let host = host.clone();
    Ok(tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .on_thread_start(move || host.enter().expect("a thread may enter its lab's namespace"))
        .enable_all()
        .build()?)
}

/// A session of ours that is on its direct path, or on the relay where no direct path is possible.
///
/// # Errors
///
/// When there is none.
pub fn session(place: &Place, direct: bool) -> anyhow::Result<(peer::Session, peer::Session, Vec<Endpoint>)> {
    let server = place.world.address.clone();
    let open = move |server: String| async move {
        let endpoint = Endpoint::builder().server(server.parse()?).bind().await?;
        endpoint.online().await?;
        anyhow::Ok(endpoint)
    };
    let dialling = place.on(0, open(server.clone()))?;
    let listening = place.on(1, open(server))?;
    let (target, accepting) = (listening.id(), listening.clone());
    let accept = place.runtimes[1].spawn(async move { accepting.accept().await.context("open") });
    let dial = dialling.clone();
    let dialled = place.on(0, async move {
        let session = dial.connect(target).await?;
        if !direct {
            return Ok(session);
        }
        let mut changes = session.path_changes();
        while let Some(path) = changes.next().await {
            if path.is_direct() {
                return Ok(session);
            }
        }
        anyhow::bail!("never direct")
    })?;
    let accepted = place.runtimes[1].block_on(accept)??;
    Ok((dialled, accepted, vec![dialling, listening]))
}

/// Ends a session of ours, and the endpoints with it.
///
/// # Errors
///
/// When an endpoint does not close.
pub fn close(place: &Place, dialled: &Connection, endpoints: Vec<Endpoint>) -> anyhow::Result<()> {
    dialled.close(0u8.into(), b"");
    for (side, endpoint) in endpoints.into_iter().enumerate() {
        place.on(side, async move {
            endpoint.close().await;
            Ok(())
        })?;
    }
    Ok(())
}

/// What a transfer took.
pub struct Cost {
    /// From the first byte's writing to the last one's reading.
    pub seconds: f64,
    /// CPU time of this process, in seconds.
    pub cpu: f64,
}

/// User and system time of this process so far, in seconds. The programs in between (the lab's routers) are the kernel's, and the server
/// is a process of its own.
///
/// # Errors
///
/// What the system says.
pub fn cpu() -> anyhow::Result<f64> {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF)?;
    let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
}

/// Sends `bytes` on one stream from the dialler to the listener and waits until all of it has arrived.
///
/// # Errors
///
/// When it does not.
pub fn transfer(place: &Place, from: &Connection, to: &Connection, bytes: u64) -> anyhow::Result<Cost> {
    let (from, to) = (from.clone(), to.clone());
    let (start, cpu_start) = (Instant::now(), cpu()?);
    let receive = place.runtimes[1].spawn(async move {
        let mut stream = to.accept_uni().await?;
        let mut total = 0;
        while let Some(chunk) = stream.read_chunk(1 << 20, true).await? {
            total += chunk.bytes.len() as u64;
        }
        anyhow::Ok((total, Instant::now()))
    });
    let send = place.runtimes[0].spawn(async move {
        let mut stream = from.open_uni().await?;
        let block = bytes::Bytes::from(vec![0x5a; 1 << 20]);
        let mut left = bytes;
        while left > 0 {
            let count = left.min(1 << 20);
            stream.write_chunk(block.slice(..count as usize)).await?;
            left -= count;
        }
        stream.finish()?;
        let _ = stream.stopped().await;
        anyhow::Ok(())
    });
    let limit = Duration::from_secs(120);
    let (received, end) =
        place.runtimes[1].block_on(async { tokio::time::timeout(limit, receive).await })???;
    place.runtimes[0].block_on(async { tokio::time::timeout(limit, send).await })???;
    ensure!(received == bytes, "{received} of {bytes} bytes");
    Ok(Cost { seconds: (end - start).as_secs_f64(), cpu: cpu()? - cpu_start })
}
