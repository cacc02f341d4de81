//! Bulk goodput of a session on the direct path against a plain quinn endpoint, interleaved in one run: on one machine without any
//! delay (CPU time counts), and over a line of 80 ms RTT with no rate limit (goodput counts). And on one machine without delay, a session
//! over the relay against one on the direct path.

#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::Parser;
use end_to_end::figures::Figures;
use end_to_end::process::PATIENCE;
use end_to_end::world::{SITE_DELAY, World};
use futures_util::StreamExt as _;
use netsim::{Host, RouterKind, SiteConfig};
use peer::Endpoint;
use quinn::{Connection, TransportConfig, VarInt};
use rendezvous_wire::{KeyPair, tls};
use tokio::runtime::Runtime;

/// Session against plain quinn, interleaved.
#[derive(Debug, Parser)]
struct Arguments {
    /// Transfers of each kind in each place.
    #[arg(long, default_value_t = 7)]
    runs: usize,
    /// Megabytes of a transfer on the line without delay.
    #[arg(long, default_value_t = 1000)]
    megabytes: u64,
    /// Megabytes of a transfer on the line of 80 ms.
    #[arg(long, default_value_t = 400)]
    megabytes_far: u64,
    /// Fail when a median is over its bound, not only when a run goes wrong.
    #[arg(long)]
    strict: bool,
}

const ALPN: &[u8] = b"plain";
const WINDOW: u32 = 32 << 20;

/// Two hosts of a lab, each with a runtime of one thread in it.
struct Place {
    world: World,
    hosts: [Host; 2],
    runtimes: [Runtime; 2],
}

impl Place {
    fn new(kind: RouterKind, delay: Duration) -> anyhow::Result<Self> {
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

    fn on<T: Send + 'static>(
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

/// A UDP socket with the buffers that our endpoint asks for: a comparison of sockets' drops would be none of quinn.
fn socket() -> std::io::Result<std::net::UdpSocket> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None)?;
    socket.set_nonblocking(true)?;
    socket.set_send_buffer_size(4 << 20)?;
    socket.set_recv_buffer_size(4 << 20)?;
    socket.bind(&SocketAddr::from(([0, 0, 0, 0], 0)).into())?;
    Ok(socket.into())
}

fn plain_endpoint(server: Option<quinn::ServerConfig>) -> std::io::Result<quinn::Endpoint> {
    quinn::Endpoint::new(quinn::EndpointConfig::default(), server, socket()?, Arc::new(quinn::TokioRuntime))
}

/// Plain quinn with the same windows, the same TLS, the same MTU bound and the same socket buffers.
fn plain(place: &Place) -> anyhow::Result<(Connection, Connection, Vec<quinn::Endpoint>)> {
    let (own, other) = (KeyPair::generate()?, KeyPair::generate()?);
    let mut transport = TransportConfig::default();
    let mut mtu = quinn::MtuDiscoveryConfig::default();
    mtu.upper_bound(1448);
    transport
        .receive_window(VarInt::from_u32(WINDOW))
        .stream_receive_window(VarInt::from_u32(WINDOW / 2))
        .send_window(u64::from(WINDOW))
        .mtu_discovery_config(Some(mtu));
    let transport = Arc::new(transport);
    let server_tls = tls::server_config(&other, Some(own.id()), ALPN)?;
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(
        quinn::crypto::rustls::QuicServerConfig::try_from(server_tls)?,
    ));
    server.transport_config(transport.clone());
    let client_tls = tls::client_config(&own, other.id(), ALPN)?;
    let mut client =
        quinn::ClientConfig::new(Arc::new(quinn::crypto::rustls::QuicClientConfig::try_from(client_tls)?));
    client.transport_config(transport);
    let listening = place.on(1, async move { Ok(plain_endpoint(Some(server))?) })?;
    let address = SocketAddr::new(place.hosts[1].ipv4().into(), listening.local_addr()?.port());
    let accepting = listening.clone();
    let accept =
        place.runtimes[1].spawn(async move { anyhow::Ok(accepting.accept().await.context("open")?.await?) });
    let (dialling, dialled) = place.on(0, async move {
        let endpoint = plain_endpoint(None)?;
        let connection = endpoint.connect_with(client, address, "plain")?.await?;
        Ok((endpoint, connection))
    })?;
    let accepted = place.runtimes[1].block_on(accept)??;
    Ok((dialled, accepted, vec![dialling, listening]))
}

/// A session of ours that is on its direct path, or on the relay where no direct path is possible.
fn session(place: &Place, direct: bool) -> anyhow::Result<(peer::Session, peer::Session, Vec<Endpoint>)> {
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

/// What a transfer took.
struct Cost {
    seconds: f64,
    cpu: f64,
}

/// User and system time of this process so far, in seconds. The programs in between (the lab's routers) are the kernel's, and the server
/// is a process of its own.
fn cpu() -> anyhow::Result<f64> {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF)?;
    let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
}

/// Sends `bytes` on one stream from the dialler to the listener and waits until all of it has arrived.
fn transfer(place: &Place, from: &Connection, to: &Connection, bytes: u64) -> anyhow::Result<Cost> {
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

#[derive(Default)]
struct Measured {
    goodput: Figures,
    cpu_per_gb: Figures,
}

impl Measured {
    fn add(&mut self, cost: &Cost, bytes: u64) {
        self.goodput.push(bytes as f64 * 8e-6 / cost.seconds);
        self.cpu_per_gb.push(cost.cpu / (bytes as f64 / 1e9));
    }
}

/// One place: session and plain quinn in turn. Fresh connections each time, so that both begin with slow start.
fn compare(name: &str, delay: Duration, runs: usize, bytes: u64) -> anyhow::Result<(f64, f64)> {
    let place = Place::new(RouterKind::Public, delay)?;
    let (mut ours, mut theirs) = (Measured::default(), Measured::default());
    let (mut goodput_ratio, mut cpu_ratio) = (Figures::default(), Figures::default());
    for run in 0..runs {
        let measure_session = || -> anyhow::Result<Cost> {
            let (dialled, accepted, endpoints) = session(&place, true)?;
            let cost = transfer(&place, &dialled, &accepted, bytes)?;
            dialled.close(0u8.into(), b"");
            for (side, endpoint) in endpoints.into_iter().enumerate() {
                place.on(side, async move {
                    endpoint.close().await;
                    Ok(())
                })?;
            }
            Ok(cost)
        };
        let measure_plain = || -> anyhow::Result<Cost> {
            let (dialled, accepted, endpoints) = plain(&place)?;
            let cost = transfer(&place, &dialled, &accepted, bytes)?;
            for endpoint in endpoints {
                endpoint.close(0u8.into(), b"");
            }
            Ok(cost)
        };
        // Each goes first in half of the runs.
        let (session, plain) = if run % 2 == 0 {
            let session = measure_session()?;
            (session, measure_plain()?)
        } else {
            let plain = measure_plain()?;
            (measure_session()?, plain)
        };
        ours.add(&session, bytes);
        theirs.add(&plain, bytes);
        goodput_ratio.push(plain.seconds / session.seconds);
        cpu_ratio.push(session.cpu / plain.cpu);
    }
    println!(
        "\n{name}, {} MB, {runs} transfers of each in turn: median (least to greatest)",
        bytes / 1_000_000
    );
    println!("  session      {:>24.0} Mbit/s   {:.3} CPU s/GB", ours.goodput, ours.cpu_per_gb);
    println!("  plain quinn  {:>24.0} Mbit/s   {:.3} CPU s/GB", theirs.goodput, theirs.cpu_per_gb);
    println!("  session/plain  goodput {goodput_ratio:.3}, CPU {cpu_ratio:.3}");
    Ok((goodput_ratio.median(), cpu_ratio.median()))
}

/// A session over the relay against one on the direct path: behind routers that make either the only possibility.
fn compare_relayed(runs: usize, bytes: u64) -> anyhow::Result<f64> {
    let places = [RouterKind::EimEif, RouterKind::Apdm].map(|kind| Place::new(kind, Duration::ZERO));
    let [direct, relayed] = places;
    let places = [(direct?, true), (relayed?, false)];
    let mut figures = [Figures::default(), Figures::default()];
    let mut ratio = Figures::default();
    for run in 0..runs {
        let mut seconds = [0.0; 2];
        // Each goes first in half of the runs.
        for which in [run % 2, 1 - run % 2] {
            let (place, direct) = &places[which];
            let (dialled, accepted, endpoints) = session(place, *direct)?;
            seconds[which] = transfer(place, &dialled, &accepted, bytes)?.seconds;
            ensure!(
                dialled.path().is_some_and(|path| path.is_direct()) == *direct,
                "the transfer ended on another path"
            );
            figures[which].push(bytes as f64 * 8e-6 / seconds[which]);
            dialled.close(0u8.into(), b"");
            for (side, endpoint) in endpoints.into_iter().enumerate() {
                place.on(side, async move {
                    endpoint.close().await;
                    Ok(())
                })?;
            }
        }
        ratio.push(seconds[0] / seconds[1]);
    }
    println!(
        "\nThe relay, no delay, {} MB, {runs} transfers of each in turn: median (least to greatest)",
        bytes / 1_000_000
    );
    println!("  direct       {:>24.0} Mbit/s", figures[0]);
    println!("  relayed      {:>24.0} Mbit/s", figures[1]);
    println!("  relayed/direct  goodput {ratio:.3}");
    Ok(ratio.median())
}

fn bench(arguments: &Arguments) -> anyhow::Result<bool> {
    let (goodput, cpu) =
        compare("No delay", Duration::ZERO, arguments.runs, arguments.megabytes * 1_000_000)?;
    let (far, _) =
        compare("80 ms RTT, no rate limit", SITE_DELAY, arguments.runs, arguments.megabytes_far * 1_000_000)?;
    let relayed = compare_relayed(arguments.runs, arguments.megabytes * 1_000_000)?;
    let bounds = [
        ("goodput over the relay, of the direct path's", relayed, relayed >= 0.8, "at least 0.8"),
        ("goodput without delay, of plain quinn", goodput, goodput >= 0.97, "at least 0.97"),
        ("CPU per byte without delay, of plain quinn", cpu, cpu <= 1.05, "at most 1.05"),
        ("goodput at 80 ms, of plain quinn", far, far >= 0.9, "at least 0.9"),
    ];
    println!();
    for (what, value, good, bound) in bounds {
        println!("  {} {what}: {value:.3}, {bound}", if good { "ok  " } else { "MISS" });
    }
    Ok(bounds.iter().all(|(_, _, good, _)| *good))
}

fn main() -> ExitCode {
    end_to_end::program::main("goodput", |arguments: Arguments| Ok(bench(&arguments)? || !arguments.strict))
}
