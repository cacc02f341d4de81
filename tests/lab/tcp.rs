//! Networks that let no UDP through: registration and relay over TCP, straight or through a proxy, and the way back to UDP.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddrV4, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use end_to_end::cell::Network;
use end_to_end::data::{consume, produce};
use end_to_end::process::{PATIENCE, Program};
use end_to_end::world::{SITE_DELAY, World};
use libtest_mimic::Trial;
use netsim::{Host, HostChild, RouterKind, Site};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::dialling::{ask, echo, endpoint, on, runtime};
use crate::trial;

/// Traffic that is unanswered has the relay asked, and after a second at most it is in doubt; TCP and TLS take two round trips more. The rest is for a
/// busy machine.
const TAKEOVER: Duration = Duration::from_secs(8);

/// UDP is tried again after 5 s at first, up to half as much later, then after twice as long.
const RETURN: Duration = Duration::from_secs(45);

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("tcp::a_transfer_over_two_streams_comes_whole", transfer),
        trial("tcp::a_session_moves_to_udp_when_it_can_and_then_to_a_direct_path", back_to_udp),
        trial("tcp::a_relayed_session_moves_to_tcp_when_udp_dies", over_to_tcp),
        trial("tcp::a_relay_that_is_deaf_to_udp_is_reached_over_tcp", deaf_relay),
        trial("tcp::a_listener_comes_back_to_a_restarted_server", comes_back),
        trial("tcp::a_listener_that_ends_is_offline_at_once", says_goodbye),
        trial("tcp::a_proxy_is_the_only_way_out", through_a_proxy),
        trial("tcp::a_proxy_that_refuses_is_named", proxy_refuses),
        trial("tcp::health_is_told_over_https", health),
        trial("tcp::a_server_without_tcp_is_missed_by_name", without_tcp),
    ];
    for (a, b) in [
        (RouterKind::UdpBlocked, RouterKind::EimApdf),
        (RouterKind::EimApdf, RouterKind::UdpBlocked),
        (RouterKind::UdpBlocked, RouterKind::UdpBlocked),
    ] {
        trials.push(trial(format!("tcp::first_byte_of_{a}_with_{b}_comes_as_soon_as_over_udp"), move || {
            first_byte(a, b)
        }));
    }
    trials
}

fn home(world: &mut World, name: &str, kind: RouterKind) -> anyhow::Result<Site> {
    Ok(world.lab.add_site(name, Network::new(kind).site())?)
}

/// Waits for a path that is like this.
pub(crate) fn path(
    program: &mut Program,
    path: &str,
    over: Option<&str>,
    patience: Duration,
) -> anyhow::Result<Value> {
    let wanted = |event: &Value| {
        event["event"] == "path" && event["path"] == path && over.is_none_or(|over| event["over"] == over)
    };
    program.event(wanted, patience).with_context(|| format!("waiting for {path} over {over:?}"))
}

/// Registered peers: no session can begin sooner over any relay than after 4(a + b), and TCP adds nothing to that.
fn first_byte(a: RouterKind, b: RouterKind) -> anyhow::Result<()> {
    /// Times what no system that introduces through a server can beat.
    const RATIO: f64 = 1.3;
    /// Noise is one-sided.
    const DIALS: usize = 5;
    let mut world = World::new(7)?;
    let (a, b) = (home(&mut world, "a", a)?, home(&mut world, "b", b)?);
    let (dialling, listening) = (runtime(&a.host(0))?, runtime(&b.host(0))?);
    let listener = on(&listening, endpoint(world.address.clone()))?;
    let target = listener.id();
    listening.spawn(async move {
        while let Some(session) = listener.accept().await {
            tokio::spawn(echo(session));
        }
    });
    let mut took = Vec::new();
    for _ in 0..DIALS {
        let address = world.address.clone();
        took.push(on(&dialling, async move {
            let dialler = endpoint(address).await?;
            let start = Instant::now();
            let session = dialler.connect(target).await?;
            ensure!(ask(&session, "first").await? == "first");
            let took = start.elapsed();
            ensure!(session.path().is_some_and(|path| !path.is_direct()), "{:?}", session.path());
            dialler.close().await;
            Ok(took)
        })?);
    }
    took.sort_unstable();
    let (limit, handshakes) = (8 * SITE_DELAY, 4 * SITE_DELAY);
    let bound = limit.mul_f64(RATIO) + handshakes;
    ensure!(took[DIALS / 2] <= bound, "{took:?}, where {bound:?} is the most");
    Ok(())
}

/// Far more than any queue on the way holds.
fn transfer() -> anyhow::Result<()> {
    const LENGTH: u64 = 20_000_000;
    let mut world = World::new(3)?;
    let a = home(&mut world, "a", RouterKind::UdpBlocked)?.host(0);
    let b = home(&mut world, "b", RouterKind::UdpBlocked)?.host(0);
    let (mut listener, id) = world.listener(&b, "b", &[])?;
    let mut peer = world.peer(&a, "a", &["connect", &id])?;
    let (mut to_peer, mut from_peer) = (peer.stdin()?, peer.stdout()?);
    let (mut to_listener, mut from_listener) = (listener.stdin()?, listener.stdout()?);
    // Both ways at once.
    let up = std::thread::spawn(move || produce(3, LENGTH, &mut to_peer));
    let down = std::thread::spawn(move || produce(4, LENGTH, &mut to_listener));
    let received_down = std::thread::spawn(move || consume(&mut from_peer));
    let received_up = consume(&mut from_listener)?;
    let joined = |_| anyhow::anyhow!("a thread panicked");
    ensure!(received_up == (LENGTH, up.join().map_err(joined)??), "other bytes came up");
    ensure!(
        received_down.join().map_err(joined)?? == (LENGTH, down.join().map_err(joined)??),
        "other bytes came down"
    );
    ensure!(peer.wait(PATIENCE)?.success() && listener.wait(PATIENCE)?.success());
    for program in [&mut peer, &mut listener] {
        path(program, "relayed", Some("tcp"), Duration::ZERO)?;
        let connections = program.said().iter().filter(|event| event["event"] == "connected").count();
        ensure!(connections == 1, "{connections} connections");
    }
    Ok(())
}

/// A dialler that has a session with an echoing listener, and asks through it.
pub(crate) struct Asking {
    pub(crate) peer: Program,
    stdin: std::process::ChildStdin,
    stdout: std::process::ChildStdout,
}

impl Asking {
    pub(crate) fn new(mut peer: Program) -> anyhow::Result<Self> {
        let (stdin, stdout) = (peer.stdin()?, peer.stdout()?);
        Ok(Self { peer, stdin, stdout })
    }

    pub(crate) fn ask(&mut self, text: &str) -> anyhow::Result<()> {
        self.stdin.write_all(text.as_bytes())?;
        self.stdin.flush()?;
        let mut heard = vec![0; text.len()];
        self.stdout.read_exact(&mut heard)?;
        ensure!(heard == text.as_bytes(), "{:?}", String::from_utf8_lossy(&heard));
        Ok(())
    }

    /// Ends it; it had one connection only.
    pub(crate) fn end(mut self) -> anyhow::Result<()> {
        drop(self.stdin);
        ensure!(self.peer.wait(PATIENCE)?.success(), "not a clean end");
        let said = self.peer.said();
        let connections = said.iter().filter(|event| event["event"] == "connected").count();
        ensure!(connections == 1, "{connections} connections: {said:?}");
        Ok(())
    }
}

fn back_to_udp() -> anyhow::Result<()> {
    let mut world = World::new(5)?;
    let site = home(&mut world, "a", RouterKind::EimApdf)?;
    let b = home(&mut world, "b", RouterKind::EimApdf)?.host(0);
    site.cut_udp(&[])?;
    let (_listening, id) = world.listener(&b, "b", &["--echo"])?;
    let mut asking = Asking::new(world.peer(&site.host(0), "a", &["connect", &id])?)?;
    asking.ask("over TCP")?;
    path(&mut asking.peer, "relayed", Some("tcp"), PATIENCE)?;
    site.restore()?;
    path(&mut asking.peer, "relayed", Some("udp"), RETURN)?;
    asking.ask("over UDP")?;
    path(&mut asking.peer, "direct", None, PATIENCE)?;
    asking.ask("directly")?;
    asking.end()
}

fn over_to_tcp() -> anyhow::Result<()> {
    let mut world = World::new(6)?;
    let site = home(&mut world, "a", RouterKind::Apdm)?;
    let b = home(&mut world, "b", RouterKind::Apdm)?.host(0);
    let (_listening, id) = world.listener(&b, "b", &["--echo"])?;
    let mut asking = Asking::new(world.peer(&site.host(0), "a", &["connect", &id])?)?;
    asking.ask("over UDP")?;
    path(&mut asking.peer, "relayed", Some("udp"), PATIENCE)?;
    site.cut_udp(&[])?;
    let cut = Instant::now();
    asking.ask("over TCP")?;
    path(&mut asking.peer, "relayed", Some("tcp"), Duration::ZERO)?;
    let took = cut.elapsed();
    println!("TCP carries {} ms after UDP was blocked", took.as_millis());
    ensure!(took < TAKEOVER, "{took:?}");
    // Introductions go on as well: this one is asked of us over TCP.
    asking.end()
}

/// A network that lets out UDP to port 443 alone: signalling would work over it, the relay does not.
fn deaf_relay() -> anyhow::Result<()> {
    let mut world = World::new(4)?;
    let site = home(&mut world, "a", RouterKind::EimApdf)?;
    let b = home(&mut world, "b", RouterKind::EimApdf)?.host(0);
    site.cut_udp(&[3478, 3479])?;
    let (_listening, id) = world.listener(&b, "b", &["--echo"])?;
    let mut asking = Asking::new(world.peer(&site.host(0), "a", &["connect", &id])?)?;
    asking.ask("there?")?;
    // The host candidates are of no use here, but where signalling was seen is: a direct path may come of it.
    path(&mut asking.peer, "relayed", Some("tcp"), PATIENCE)?;
    asking.end()
}

/// Dials and gives the exit code.
fn dial(world: &World, host: &Host, id: &str) -> anyhow::Result<Option<i32>> {
    let mut peer = world.peer(host, "a", &["connect", id])?;
    peer.stdin()?.write_all(b"there?")?;
    let mut heard = String::new();
    peer.stdout()?.read_to_string(&mut heard)?;
    let code = peer.wait(PATIENCE)?.code();
    ensure!(code != Some(0) || heard == "there?", "{heard:?}");
    Ok(code)
}

fn comes_back() -> anyhow::Result<()> {
    let mut world = World::new(9)?;
    let a = home(&mut world, "a", RouterKind::EimApdf)?.host(0);
    let b = home(&mut world, "b", RouterKind::UdpBlocked)?.host(0);
    let (_listening, id) = world.listener(&b, "b", &["--echo"])?;
    world.restart_server()?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match dial(&world, &a, &id)? {
            Some(0) => return Ok(()),
            Some(4) => ensure!(Instant::now() < deadline, "not back in {PATIENCE:?}"),
            other => anyhow::bail!("exit code {other:?}"),
        }
    }
}

fn says_goodbye() -> anyhow::Result<()> {
    let mut world = World::new(9)?;
    let a = home(&mut world, "a", RouterKind::EimApdf)?.host(0);
    let b = home(&mut world, "b", RouterKind::UdpBlocked)?.host(0);
    let (mut listener, id) = world.listener(&b, "b", &["--echo"])?;
    ensure!(dial(&world, &a, &id)? == Some(0));
    listener.signal(Signal::SIGINT)?;
    ensure!(listener.wait(PATIENCE)?.success());
    let start = Instant::now();
    ensure!(dial(&world, &a, &id)? == Some(4));
    ensure!(
        start.elapsed() < Duration::from_secs(5),
        "it took {:?} to hear that nobody is there",
        start.elapsed()
    );
    Ok(())
}

/// tinyproxy on the internet, with a user and a password.
struct TinyProxy {
    child: HostChild,
    address: SocketAddrV4,
    _directory: tempfile::TempDir,
}

impl TinyProxy {
    /// Connects to this port and to no other.
    fn start(host: &Host, connect_port: u16) -> anyhow::Result<Self> {
        const PORT: u16 = 8888;
        let directory = tempfile::TempDir::new()?;
        let file = directory.path().join("tinyproxy.conf");
        let text = format!(
            "Port {PORT}\nTimeout 600\nMaxClients 50\nLogLevel Error\nBasicAuth anna pass-word\nConnectPort {connect_port}\n"
        );
        std::fs::write(&file, text)?;
        let mut command = host.command("tinyproxy");
        command.arg("-d").arg("-c").arg(&file).stdout(std::process::Stdio::null());
        let child = command
            .spawn()
            .context("tinyproxy cannot be started: is the package tinyproxy-bin installed?")?;
        let address = SocketAddrV4::new(host.ipv4(), PORT);
        let deadline = Instant::now() + PATIENCE;
        while host.run(|| TcpStream::connect(address)).is_err() {
            ensure!(Instant::now() < deadline, "tinyproxy does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Self { child, address, _directory: directory })
    }
}

impl Drop for TinyProxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A world, a home from which nothing but a proxy can be reached, the proxy, and a second home.
fn behind_a_proxy(connect_port: u16) -> anyhow::Result<(World, Site, TinyProxy, Site)> {
    let mut world = World::new(8)?;
    let host = world.lab.add_server("proxy")?;
    let proxy = TinyProxy::start(&host, connect_port)?;
    let a = home(&mut world, "a", RouterKind::EimApdf)?;
    let b = home(&mut world, "b", RouterKind::EimApdf)?;
    a.cut_all_but(proxy.address)?;
    Ok((world, a, proxy, b))
}

fn through_a_proxy() -> anyhow::Result<()> {
    let (world, a, proxy, b) = behind_a_proxy(443)?;
    let (_listening, id) = world.listener(&b.host(0), "b", &["--echo"])?;
    let url = format!("http://anna:pass%2Dword@{}", proxy.address);
    let environment = [("HTTPS_PROXY", url.as_str())];
    let peer = world.peer_in(&a.host(0), "a", &world.address, &["connect", &id], &environment)?;
    let mut asking = Asking::new(peer)?;
    asking.ask("through the proxy")?;
    let relayed = path(&mut asking.peer, "relayed", Some("proxy"), PATIENCE)?;
    ensure!(relayed["relay"] == proxy.address.to_string(), "{relayed}");
    asking.end()?;
    // And the other way round: who is behind the proxy is dialled.
    let arguments = ["listen", "--echo"];
    let mut listener = world.peer_in(&a.host(0), "a", &world.address, &arguments, &environment)?;
    let id = listener.named("listening")?["id"].as_str().context("an id")?.to_owned();
    let mut asking = Asking::new(world.peer(&b.host(0), "c", &["connect", &id])?)?;
    asking.ask("into the proxy's network")?;
    asking.end()?;
    // The doctor finds the same way.
    let arguments = ["doctor", "--json", "--server", &world.address];
    let mut doctor = Program::start_in(&a.host(0), "peer", &arguments, false, &environment)?;
    let report = doctor.event(|event| event["event"] == "diagnosis", PATIENCE * 3)?;
    ensure!(report["tcp"] == "works-through-proxy" && report["verdict"] == "relay-only", "{report}");
    ensure!(doctor.wait(PATIENCE)?.success());
    Ok(())
}

/// What the program says when it gives up on the server.
pub(crate) fn failure(mut peer: Program) -> anyhow::Result<String> {
    let error = peer.named("error")?;
    let status = peer.wait(PATIENCE)?;
    ensure!(status.code() == Some(3), "{status}");
    Ok(error["message"].as_str().context("a message")?.to_owned())
}

fn proxy_refuses() -> anyhow::Result<()> {
    let (world, a, proxy, _) = behind_a_proxy(8443)?;
    let nobody = "127.0.0.1:9".to_owned();
    let (name, address) = (proxy.address.to_string(), proxy.address);
    for (url, proxy, words) in [
        (format!("http://{address}"), &name, "user name"),
        (format!("http://anna:wrong@{address}"), &name, "user name"),
        (format!("http://anna:pass%2Dword@{address}"), &name, "403"),
        (format!("http://{nobody}"), &nobody, "does not answer"),
    ] {
        let environment = [("https_proxy", url.as_str())];
        let peer = world.peer_in(&a.host(0), "a", &world.address, &["listen"], &environment)?;
        let message = failure(peer)?;
        ensure!(message.contains(words) && message.contains(proxy.as_str()), "{url}: {message}");
        ensure!(!message.contains("pass%2Dword") && !message.contains("pass-word"), "{message}");
    }
    // Without the proxy there is no way at all.
    let server = world.server_host.ipv4().to_string();
    let environment = [("https_proxy", "http://127.0.0.1:9"), ("no_proxy", server.as_str())];
    let peer = world.peer_in(&a.host(0), "a", &world.address, &["listen"], &environment)?;
    let message = failure(peer)?;
    ensure!(message.contains("UDP port 443") && message.contains("TCP port 443"), "{message}");
    Ok(())
}

fn health() -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let host = home(&mut world, "a", RouterKind::UdpBlocked)?.host(0);
    let ask = |path: &str| -> anyhow::Result<(String, String)> {
        let url = format!("https://{}{path}", world.server_host.ipv4());
        let arguments = ["--insecure", "--silent", "--show-error", "--noproxy", "*", "--max-time", "20"];
        let mut command = host.command("curl");
        command.args(arguments).args(["--write-out", "%{stderr}%{http_code}", &url]);
        let output = command.output().context("curl cannot be started")?;
        let text = |bytes| String::from_utf8(bytes).context("UTF-8");
        Ok((text(output.stdout)?, text(output.stderr)?))
    };
    for (path, body, code) in
        [("/healthz", "ok", "200"), ("/", "rendezvous server", "200"), ("/x", "not found", "404")]
    {
        let (heard, status) = ask(path)?;
        ensure!(heard.contains(body) && status == code, "{path}: {status}, {heard:?}");
    }
    Ok(())
}

/// A server whose TCP port is off: the message says what is missing.
fn without_tcp() -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let host = home(&mut world, "a", RouterKind::UdpBlocked)?.host(0);
    let second = world.lab.add_server("second")?;
    let directory = tempfile::TempDir::new()?;
    let state = directory.path().to_str().context("a temporary path in UTF-8")?;
    let ip = second.ipv4().to_string();
    let arguments = ["serve", "--json", "--state-dir", state, "--host", &ip, "--tls-port", "off"];
    let mut server = Program::start(&second, "rendezvous", &arguments, false)?;
    let ready = server.named("ready")?;
    ensure!(ready["tls_port"].is_null(), "{ready}");
    let address = ready["address"].as_str().context("an address")?;
    let message = failure(world.peer_with_server(&host, "a", address, &["listen"])?)?;
    ensure!(message.contains("UDP port 443") && message.contains("TCP port 443"), "{message}");
    Ok(())
}
