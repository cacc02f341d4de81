//! What `peer forward` adds to a request: a plain TCP proxy (socat) and a forwarded port in front of the same server, on one machine and without any
//! delay, asked in turn.

#![forbid(unsafe_code)]

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context as _, ensure};
use clap::Parser;
use end_to_end::figures::Figures;
use end_to_end::process::{PATIENCE, Program};
use end_to_end::world::World;
use netsim::{Host, HostChild, RouterKind, SiteConfig};

/// Requests that are not counted.
const WARM_UP: usize = 50;

/// Socat against a forwarded port, in turn.
#[derive(Debug, Parser)]
struct Arguments {
    /// Requests of each kind.
    #[arg(long, default_value_t = 2000)]
    requests: usize,
    /// Bytes of a request, and of its answer.
    #[arg(long, default_value_t = 200)]
    bytes: usize,
    /// Connections that are open at once, each with a request under way.
    #[arg(long, default_value_t = 500)]
    connections: usize,
    /// Requests of each of them.
    #[arg(long, default_value_t = 20)]
    rounds: usize,
    /// Fail when the median of what is added is over this, in microseconds.
    #[arg(long)]
    most: Option<u64>,
}

fn main() -> ExitCode {
    if let Err(error) = netsim::enter_user_namespace() {
        eprintln!("no lab: {error}");
        return ExitCode::FAILURE;
    }
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("forward: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A server that sends back what it gets.
fn server(host: &Host) -> anyhow::Result<u16> {
    let listener = host.run(|| TcpListener::bind("127.0.0.1:0"))?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let _ = stream.set_nodelay(true);
                let mut buffer = [0; 65_536];
                while let Ok(count @ 1..) = stream.read(&mut buffer) {
                    if stream.write_all(&buffer[..count]).is_err() {
                        return;
                    }
                }
            });
        }
    });
    Ok(port)
}

fn socat(host: &Host, port: u16) -> anyhow::Result<(HostChild, u16)> {
    let own = host.run(|| TcpListener::bind("127.0.0.1:0"))?.local_addr()?.port();
    let mut command = host.command("socat");
    command.arg(format!("TCP-LISTEN:{own},bind=127.0.0.1,fork,reuseaddr,nodelay"));
    command.arg(format!("TCP:127.0.0.1:{port},nodelay")).stdin(Stdio::null());
    let child = command.spawn().context("socat is needed")?;
    let deadline = Instant::now() + PATIENCE;
    while host.run(|| TcpStream::connect(("127.0.0.1", own))).is_err() {
        ensure!(Instant::now() < deadline, "socat does not listen");
        std::thread::yield_now();
    }
    Ok((child, own))
}

fn forwarded(world: &World, host: &Host, port: u16) -> anyhow::Result<(Program, Program, u16)> {
    let allow = format!("localhost:{port}");
    world.done(host, "far", &["init", &world.address])?;
    let ticket = world.done(host, "far", &["invite"])?;
    let mut listener =
        world.person(host, "far", &["listen", "--no-port-mapping", "--allow-forward", &allow])?;
    listener.named("listening")?;
    let local = format!("0:localhost:{port}");
    let mut forward = world.person(host, "near", &["forward", "--no-port-mapping", &ticket, "-L", &local])?;
    let at = forward.named("forwarding")?["at"].as_str().context("a place")?.to_owned();
    forward.event(|event| event["path"] == "direct", PATIENCE)?;
    let own = at.rsplit(':').next().context("a port")?.parse()?;
    Ok((listener, forward, own))
}

fn connect(port: u16) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn ask(stream: &mut TcpStream, bytes: &mut [u8]) -> anyhow::Result<()> {
    stream.write_all(bytes)?;
    Ok(stream.read_exact(bytes)?)
}

/// Asks at each place in turn, over one connection or over a fresh one for each request; in microseconds.
fn measure(arguments: &Arguments, ports: &[u16], fresh: bool) -> anyhow::Result<Vec<Figures>> {
    let mut bytes = vec![7; arguments.bytes];
    let mut streams = ports.iter().map(|port| connect(*port)).collect::<Result<Vec<_>, _>>()?;
    let mut figures = vec![Figures::default(); ports.len()];
    for number in 0..arguments.requests + WARM_UP {
        for (index, port) in ports.iter().enumerate() {
            let start = Instant::now();
            if fresh {
                streams[index] = connect(*port)?;
            }
            ask(&mut streams[index], &mut bytes)?;
            let time = start.elapsed();
            if number >= WARM_UP {
                figures[index].push(time.as_secs_f64() * 1e6);
            }
        }
    }
    Ok(figures)
}

/// Many connections at once: all have a request under way, and each gets its own bytes back. Requests a second.
fn many(arguments: &Arguments, port: u16) -> anyhow::Result<f64> {
    let mut streams =
        (0..arguments.connections).map(|_| connect(port)).collect::<anyhow::Result<Vec<TcpStream>>>()?;
    let words = |stream: usize, round: usize| -> Vec<u8> {
        let own = (stream * arguments.rounds + round).to_le_bytes();
        own.iter().copied().cycle().take(arguments.bytes).collect()
    };
    // Until the last of them has answered they do not all stand.
    for stream in &mut streams {
        ask(stream, &mut [1])?;
    }
    let start = Instant::now();
    for round in 0..arguments.rounds {
        for (number, stream) in streams.iter_mut().enumerate() {
            stream.write_all(&words(number, round))?;
        }
        for (number, stream) in streams.iter_mut().enumerate() {
            let mut heard = vec![0; arguments.bytes];
            stream.read_exact(&mut heard).with_context(|| format!("connection {number}"))?;
            ensure!(heard == words(number, round), "connection {number} got another one's bytes");
        }
    }
    Ok((arguments.connections * arguments.rounds) as f64 / start.elapsed().as_secs_f64())
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let host = world.lab.add_site("a", SiteConfig::new(RouterKind::Public))?.host(0);
    let port = server(&host)?;
    let (_socat, through_socat) = socat(&host, port)?;
    let (_listener, _forward, through_us) = forwarded(&world, &host, port)?;
    let ports = [port, through_socat, through_us];
    println!("{} requests of {} bytes each, in turn; microseconds", arguments.requests, arguments.bytes);
    println!("{:<34} {:>7} {:>7} {:>7}", "", "p50", "p90", "p99");
    let mut added = 0.0;
    for (what, fresh) in [("a connection and its request", true), ("a request on one connection", false)] {
        let figures = host.run(|| measure(arguments, &ports, fresh))?;
        println!("{what}");
        for (name, figures) in ["no proxy", "socat", "peer forward"].into_iter().zip(&figures) {
            let [p50, p90, p99] = [0.5, 0.9, 0.99].map(|share| figures.quantile(share));
            println!("  {name:<32} {p50:>7.0} {p90:>7.0} {p99:>7.0}");
        }
        added = figures[2].median() - figures[1].median();
        println!("  peer forward adds {added:.0} to socat");
    }
    println!("{} connections at once, {} requests of each", arguments.connections, arguments.rounds);
    for (name, port) in [("no proxy", port), ("socat", through_socat), ("peer forward", through_us)] {
        let rate = host.run(|| many(arguments, port))?;
        println!("  {name:<32} {rate:>7.0} requests/s");
    }
    ensure!(arguments.most.is_none_or(|most| added <= most as f64), "{added:.0} us were added to a request");
    Ok(())
}
