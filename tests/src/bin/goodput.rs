//! Bulk goodput of a session on the direct path against a plain quinn endpoint, interleaved in one run: on one machine without any
//! delay (CPU time counts), and over a line of 80 ms RTT with no rate limit (goodput counts). And on one machine without delay, a session
//! over the relay against one on the direct path.

#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::Parser;
use end_to_end::bulk::{Cost, Place, close, session, transfer};
use end_to_end::figures::Figures;
use end_to_end::world::SITE_DELAY;
use netsim::RouterKind;
use quinn::{Connection, TransportConfig, VarInt};
use rendezvous_wire::{KeyPair, tls};

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
            close(&place, &dialled, endpoints)?;
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
            close(place, &dialled, endpoints)?;
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
