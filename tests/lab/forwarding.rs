//! Forwarded ports between two NATed homes: what people run through them, and how they fail and recover.

use std::io::{BufRead as _, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use end_to_end::process::{PATIENCE, Program, binary};
use end_to_end::world::World;
use libtest_mimic::Trial;
use netsim::Host;
use nix::sys::signal::Signal;

use crate::setup::{curl, fetch, friends, listen, web_server};
use crate::trial;

/// Connections at once.
const MANY: usize = 500;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("forwarding::http", http),
        trial("forwarding::dns_over_udp", dns_over_udp),
        trial("forwarding::socks5_with_names_of_the_other_side", socks5),
        trial("forwarding::socks5_carries_datagrams", socks5_datagrams),
        trial("forwarding::unix_sockets_at_both_ends", unix_sockets),
        trial("forwarding::a_port_there_leads_here", a_port_there_leads_here),
        trial("forwarding::half_closed_and_broken_connections", half_closed_and_broken),
        trial("forwarding::five_hundred_connections_at_once", five_hundred),
        trial("forwarding::what_is_not_allowed_is_refused", what_is_not_allowed),
        trial("forwarding::the_configuration_names_who_gets_what", the_configuration_names_who),
        trial("forwarding::a_port_in_use_is_named", a_port_in_use),
        trial("forwarding::a_port_without_permission_is_named", a_port_without_permission),
        trial("forwarding::an_offline_peer_is_named", an_offline_peer),
        trial("forwarding::comes_back_after_the_listener_was_killed", comes_back),
    ]
}

/// Starts `peer forward nas`; where it listens, in the order of the arguments.
pub(crate) fn forward(
    world: &World,
    host: &Host,
    arguments: &[&str],
) -> anyhow::Result<(Program, Vec<String>)> {
    let all = [&["forward", "nas"], arguments].concat();
    let mut program = world.person(host, "laptop", &all)?;
    let places = arguments.iter().filter(|argument| ["-L", "-R", "-D"].contains(argument)).count();
    let mut at = Vec::new();
    for _ in 0..places {
        let event = program.later(|event| event["event"] == "forwarding", PATIENCE)?;
        at.push(event["at"].as_str().context("a place")?.to_owned());
    }
    Ok((program, at))
}

fn http() -> anyhow::Result<()> {
    let (world, a, b) = friends()?;
    let (_web, files, port) = web_server(&b, "hello")?;
    let big: Vec<u8> = (0..5_000_000_u32).map(|number| number.to_le_bytes()[1]).collect();
    std::fs::write(files.path().join("big"), &big)?;
    let _listener = listen(&world, &b, &["--allow-forward", &format!("localhost:{port}")])?;
    let local = format!("8080:localhost:{port}");
    // By address as well: `localhost` stands for the loopback addresses.
    let numeric = format!("0:127.0.0.1:{port}");
    let (_forward, at) = forward(&world, &a, &["-L", &local, "-L", &numeric])?;
    ensure!(at[0] == "127.0.0.1:8080", "{at:?}");
    for at in &at {
        ensure!(fetch(&a, &[&format!("http://{at}/hello")])? == "hello");
    }
    let got = curl(&a, &["http://localhost:8080/big"])?;
    ensure!(got.stdout == big, "{} bytes of {}", got.stdout.len(), big.len());
    Ok(())
}

/// A responder that answers a query with its id and `length` bytes in all; the length stands in the query.
pub(crate) fn responder(host: &Host) -> anyhow::Result<SocketAddr> {
    let socket = host.run(|| UdpSocket::bind("127.0.0.1:0"))?;
    let address = socket.local_addr()?;
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        // Ends with the lab: its namespace goes, and with it nobody asks any more.
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let [first, second, high, low, ..] = buffer[..length] else { continue };
            let wanted = usize::from(u16::from_be_bytes([high, low]));
            let mut answer = vec![first, second];
            answer.resize(wanted.max(2), 7);
            let _ = socket.send_to(&answer, from);
        }
    });
    Ok(address)
}

fn query(id: u16, length: u16) -> [u8; 4] {
    let ([a, b], [c, d]) = (id.to_be_bytes(), length.to_be_bytes());
    [a, b, c, d]
}

fn dns_over_udp() -> anyhow::Result<()> {
    let (world, a, b) = friends()?;
    let port = responder(&b)?.port();
    let _listener = listen(&world, &b, &["--allow-forward", &format!("udp:localhost:{port}")])?;
    let (_forward, at) = forward(&world, &a, &["-L", &format!("udp:0:localhost:{port}")])?;
    let place = at[0].strip_prefix("udp:").context("a UDP place")?.to_owned();
    // Several resolvers, each with queries of several sizes: within a QUIC datagram, and beyond.
    for client in 0..4 {
        let socket = a.run(|| UdpSocket::bind("127.0.0.1:0"))?;
        for (number, length) in [60, 512, 1232, 4096, 40_000, 60].into_iter().enumerate() {
            ask(&socket, &place, client * 100 + number as u16, length)?;
        }
    }
    Ok(())
}

/// Asks a responder; as a resolver does, again when there is no answer.
pub(crate) fn resolve(host: &Host, place: &str, id: u16, length: u16) -> anyhow::Result<()> {
    let socket = host.run(|| UdpSocket::bind("127.0.0.1:0"))?;
    ask(&socket, place, id, length)
}

pub(crate) fn ask(socket: &UdpSocket, place: &str, id: u16, length: u16) -> anyhow::Result<()> {
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut buffer = vec![0; 65_536];
    let answered = (0..3).find_map(|_| {
        socket.send_to(&query(id, length), place).ok()?;
        let count = socket.recv(&mut buffer).ok()?;
        (count == usize::from(length) && buffer[..2] == id.to_be_bytes()).then_some(())
    });
    answered.with_context(|| format!("no answer of {length} bytes"))
}

fn socks5() -> anyhow::Result<()> {
    let (world, a, b) = friends()?;
    let (_web, _files, port) = web_server(&b, "by socks")?;
    let _listener = listen(
        &world,
        &b,
        &["--allow-forward", &format!("localhost:{port}"), "--allow-forward", "127.0.0.1:1"],
    )?;
    let (mut forward, at) = forward(&world, &a, &["-D", "0"])?;
    let proxy = format!("socks5h://{}", at[0]);
    let url = format!("http://localhost:{port}/hello");
    ensure!(fetch(&a, &["--proxy", &proxy, &url])? == "by socks");
    // curl's code 97: the proxy said no; its words name the reply (RFC 1928, section 6).
    let refused = curl(&a, &["--proxy", &proxy, "http://example.org:81/"])?;
    ensure!(refused.status.code() == Some(97), "{refused:?}");
    ensure!(String::from_utf8_lossy(&refused.stderr).contains("(2)"), "not `not allowed`: {refused:?}");
    let nobody = curl(&a, &["--proxy", &proxy, "http://127.0.0.1:1/"])?;
    ensure!(String::from_utf8_lossy(&nobody.stderr).contains("(5)"), "not `refused`: {nobody:?}");
    let told =
        forward.event(|event| event["event"] == "not_forwarded" && event["reason"] == "refused", PATIENCE)?;
    ensure!(told["to"] == "example.org:81", "{told}");
    Ok(())
}

fn socks5_datagrams() -> anyhow::Result<()> {
    let (world, a, b) = friends()?;
    let port = responder(&b)?.port();
    let _listener = listen(&world, &b, &["--allow-forward", "udp:localhost:*"])?;
    let (_forward, at) = forward(&world, &a, &["-D", "0"])?;
    let mut control = a.run(|| TcpStream::connect(&at[0]))?;
    control.set_read_timeout(Some(PATIENCE))?;
    control.write_all(&[5, 1, 0])?;
    let mut method = [0; 2];
    control.read_exact(&mut method)?;
    ensure!(method == [5, 0], "{method:?}");
    control.write_all(&[5, 3, 0, 1, 0, 0, 0, 0, 0, 0])?;
    let mut reply = [0; 10];
    control.read_exact(&mut reply)?;
    ensure!(reply[..4] == [5, 0, 0, 1], "{reply:?}");
    let relay = SocketAddr::from((
        [reply[4], reply[5], reply[6], reply[7]],
        u16::from_be_bytes([reply[8], reply[9]]),
    ));
    let socket = a.run(|| UdpSocket::bind("127.0.0.1:0"))?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut header = vec![0, 0, 0, 3, 9];
    header.extend(b"localhost");
    header.extend(port.to_be_bytes());
    let datagram = [&header[..], &query(77, 900)].concat();
    let mut buffer = [0; 2048];
    let answer = (0..3).find_map(|_| {
        socket.send_to(&datagram, relay).ok()?;
        socket.recv(&mut buffer).ok()
    });
    let count = answer.context("no answer")?;
    ensure!(count == header.len() + 900 && buffer[..header.len()] == header[..], "{count}");
    ensure!(buffer[header.len()..][..2] == 77_u16.to_be_bytes());
    Ok(())
}

fn unix_sockets() -> anyhow::Result<()> {
    let (world, a, b) = friends()?;
    let place = tempfile::tempdir()?;
    let path = |name: &str| place.path().join(name).to_str().map(str::to_owned).context("UTF-8");
    let (near, far) = (path("near.sock")?, path("far.sock")?);
    let there = std::os::unix::net::UnixListener::bind(&far)?;
    std::thread::spawn(move || {
        for stream in there.incoming().map_while(Result::ok) {
            let mut line = String::new();
            let _ = std::io::BufReader::new(&stream).read_line(&mut line);
            let _ = (&stream).write_all(line.to_uppercase().as_bytes());
        }
    });
    let _listener = listen(&world, &b, &["--allow-forward", &far])?;
    let specification = format!("{near}:{far}");
    let ask = |near: &str| -> anyhow::Result<String> {
        let mut stream = std::os::unix::net::UnixStream::connect(near)?;
        stream.write_all(b"over sockets\n")?;
        let mut heard = String::new();
        stream.read_to_string(&mut heard)?;
        Ok(heard)
    };
    let (mut first, _) = forward(&world, &a, &["-L", &specification])?;
    ensure!(ask(&near)? == "OVER SOCKETS\n");
    // What a killed one leaves behind is in nobody's way.
    first.signal(Signal::SIGKILL)?;
    first.wait(PATIENCE)?;
    let (mut second, _) = forward(&world, &a, &["-L", &specification])?;
    ensure!(ask(&near)? == "OVER SOCKETS\n");
    second.signal(Signal::SIGTERM)?;
    ensure!(second.wait(PATIENCE)?.success() && !std::path::Path::new(&near).exists());
    Ok(())
}

fn a_port_there_leads_here() -> anyhow::Result<()> {
    let (world, a, b) = friends()?;
    let (_web, _files, port) = web_server(&a, "from the laptop")?;
    let names = responder(&a)?.port();
    let allow = ["--allow-listen", "127.0.0.1:9000", "--allow-listen", "udp:127.0.0.1:9053"];
    let mut listener = listen(&world, &b, &allow)?;
    let (web, dns) = (format!("9000:localhost:{port}"), format!("udp:9053:localhost:{names}"));
    let (mut forward, at) = forward(&world, &a, &["-R", &web, "-R", &dns])?;
    ensure!(at[0] == "127.0.0.1:9000", "{at:?}");
    ensure!(fetch(&b, &["http://localhost:9000/hello"])? == "from the laptop");
    resolve(&b, "127.0.0.1:9053", 5, 700)?;
    // One that dies without a word is in nobody's way.
    forward.signal(Signal::SIGKILL)?;
    forward.wait(PATIENCE)?;
    let (mut forward, _) = self::forward(&world, &a, &["-R", &web, "-R", &dns])?;
    ensure!(fetch(&b, &["http://localhost:9000/hello"])? == "from the laptop");
    // It listens no longer than it is asked to.
    forward.signal(Signal::SIGTERM)?;
    forward.wait(PATIENCE)?;
    listener.named("closed")?;
    ensure!(b.run(|| TcpStream::connect("127.0.0.1:9000")).is_err(), "still listening");
    // Elsewhere it may not.
    let mut other = world.person(&a, "laptop", &["forward", "nas", "-R", "9001:localhost:1"])?;
    let error = other.named("error")?;
    ensure!(
        error["message"].as_str().is_some_and(|words| words.contains("9001") && words.contains("refused")),
        "{error}"
    );
    ensure!(other.wait(PATIENCE)?.code() == Some(6));
    Ok(())
}

/// A server that does with a connection what the first byte says: `e` tell how much came before the end; `r` break it.
fn moody(host: &Host) -> anyhow::Result<u16> {
    let listener = host.run(|| TcpListener::bind("127.0.0.1:0"))?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let mut kind = [0];
                let _ = stream.read_exact(&mut kind);
                if kind == *b"e" {
                    let mut rest = Vec::new();
                    let _ = stream.read_to_end(&mut rest);
                    let _ = stream.write_all(rest.len().to_string().as_bytes());
                } else {
                    let _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
                }
            });
        }
    });
    Ok(port)
}

fn half_closed_and_broken() -> anyhow::Result<()> {
    let (world, a, b) = friends()?;
    let port = moody(&b)?;
    let _listener = listen(&world, &b, &["--allow-forward", "localhost:*"])?;
    let (_forward, at) = forward(&world, &a, &["-L", &format!("0:localhost:{port}"), "-L", "0:localhost:1"])?;
    let connect = |at: &str| -> anyhow::Result<TcpStream> {
        let stream = a.run(|| TcpStream::connect(at))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    };
    let mut stream = connect(&at[0])?;
    stream.write_all(b"e")?;
    stream.write_all(&[0; 100_000])?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut heard = String::new();
    stream.read_to_string(&mut heard)?;
    ensure!(heard == "100000", "{heard:?}");
    // A broken connection there is a broken connection here, not a clean end.
    let mut stream = connect(&at[0])?;
    stream.write_all(b"r")?;
    let end = stream.read(&mut [0]);
    ensure!(end.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset), "{end:?}");
    // So is one to where nobody listens.
    let end = connect(&at[1])?.read(&mut [0]);
    ensure!(end.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset), "{end:?}");
    Ok(())
}

fn five_hundred() -> anyhow::Result<()> {
    let (world, a, b) = friends()?;
    let port = moody(&b)?;
    let _listener = listen(&world, &b, &["--allow-forward", "localhost:*"])?;
    let (_forward, at) = forward(&world, &a, &["-L", &format!("0:localhost:{port}")])?;
    let mut streams = Vec::new();
    for number in 0..MANY {
        let mut stream = a.run(|| TcpStream::connect(&at[0]))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"e")?;
        stream.write_all(&vec![1; number])?;
        streams.push(stream);
    }
    // All stand before the first one ends.
    for (number, mut stream) in streams.into_iter().enumerate() {
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut heard = String::new();
        stream.read_to_string(&mut heard).with_context(|| format!("connection {number}"))?;
        ensure!(heard == number.to_string(), "connection {number}: {heard:?}");
    }
    Ok(())
}

fn what_is_not_allowed() -> anyhow::Result<()> {
    let (world, a, b) = friends()?;
    let (_web, _files, port) = web_server(&b, "secret")?;
    let mut listener = listen(&world, &b, &["--allow-forward", "localhost:1"])?;
    let (mut forward, at) = forward(&world, &a, &["-L", &format!("0:localhost:{port}")])?;
    ensure!(!curl(&a, &[&format!("http://{}/hello", at[0])])?.status.success());
    // Both ends say so; the one that asks is told nothing more.
    let told = forward.named("not_forwarded")?;
    ensure!(told["reason"] == "refused" && told["message"] == "refused", "{told}");
    ensure!(listener.named("denied")?["what"] == format!("localhost:{port}").as_str());
    // A listener that forwards takes no pipes.
    let mut pipe = world.person(&a, "laptop", &["connect", "nas"])?;
    let error = pipe.named("error")?;
    ensure!(error["message"].as_str().is_some_and(|words| words.contains("refused")), "{error}");
    ensure!(pipe.wait(PATIENCE)?.code() == Some(6));
    let mut ssh = world.person(&a, "laptop", &["ssh-proxy", "nas", "2222"])?;
    ensure!(ssh.wait(PATIENCE)?.code() == Some(6));
    // One that pipes or echoes forwards nothing.
    drop(listener);
    let _listener = listen(&world, &b, &["--echo"])?;
    let mut ssh = world.person(&a, "laptop", &["ssh-proxy", "nas", "22"])?;
    ensure!(ssh.wait(PATIENCE)?.code() == Some(6));
    Ok(())
}

fn the_configuration_names_who() -> anyhow::Result<()> {
    let (world, a, b) = friends()?;
    let (_web, _files, port) = web_server(&b, "as configured")?;
    world.done(&a, "other", &["init", &world.address])?;
    let id = world.done(&b, "nas", &["id"])?;
    world.done(&a, "other", &["alias", "nas", &id])?;
    let [(_, config), ..] = world.home("nas")?;
    let path = std::path::Path::new(&config).join("peer/config.toml");
    let text = std::fs::read_to_string(&path)?;
    let serve = format!(
        "{text}\n[[serve]]\nto = \"laptop\"\nforward = \"localhost:{port}\"\n\n[[serve]]\nto = \"anyone\"\nforward = [\"localhost:1\"]\n"
    );
    std::fs::write(&path, serve)?;
    let _listener = listen(&world, &b, &["--serve"])?;
    let url = |at: &str| format!("http://{at}/hello");
    let (_forward, at) = forward(&world, &a, &["-L", &format!("0:localhost:{port}")])?;
    ensure!(fetch(&a, &[&url(&at[0])])? == "as configured");
    let mut other = world.person(
        &a,
        "other",
        &["forward", "nas", "-L", &format!("0:localhost:{port}"), "-L", "0:localhost:1"],
    )?;
    let place = |event: serde_json::Value| event["at"].as_str().map(str::to_owned).context("a place");
    let first = place(other.later(|event| event["event"] == "forwarding", PATIENCE)?)?;
    let second = place(other.later(|event| event["event"] == "forwarding", PATIENCE)?)?;
    ensure!(!curl(&a, &[&url(&first)])?.status.success() && !curl(&a, &[&url(&second)])?.status.success());
    for reason in ["refused", "connection_refused"] {
        other.event(|event| event["event"] == "not_forwarded" && event["reason"] == reason, PATIENCE)?;
    }
    Ok(())
}

fn a_port_in_use() -> anyhow::Result<()> {
    let (world, a, _) = friends()?;
    let taken = a.run(|| TcpListener::bind("127.0.0.1:0"))?;
    let port = taken.local_addr()?.port().to_string();
    let mut forward =
        world.person(&a, "laptop", &["forward", "nas", "-L", &format!("{port}:localhost:80")])?;
    let error = forward.named("error")?;
    let words = error["message"].as_str().unwrap_or_default();
    ensure!(words.contains(&port) && words.contains("another port"), "{error}");
    ensure!(forward.wait(PATIENCE)?.code() == Some(1));
    Ok(())
}

fn a_port_without_permission() -> anyhow::Result<()> {
    let (world, a, _) = friends()?;
    let mut command = a.command("setpriv");
    command.args(["--bounding-set=-all", "--inh-caps=-all"]).arg(binary("peer")?);
    command.args(["forward", "nas", "-L", "80:localhost:80"]).envs(world.home("laptop")?);
    let output = command.env_remove("PEER_SERVER").output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1), "{}: {said}", output.status);
    ensure!(
        said.contains("127.0.0.1:80") && said.contains("ermission denied") && said.contains("1024"),
        "{said}"
    );
    Ok(())
}

fn an_offline_peer() -> anyhow::Result<()> {
    let (world, a, _) = friends()?;
    for arguments in
        [&["forward", "nas", "-L", "0:localhost:80"][..], &["ping", "nas"], &["ssh-proxy", "nas"]]
    {
        let mut program = world.person(&a, "laptop", arguments)?;
        let error = program.named("error")?;
        ensure!(error["message"].as_str().is_some_and(|words| words.contains("not online")), "{error}");
        ensure!(program.wait(PATIENCE)?.code() == Some(4));
    }
    Ok(())
}

/// The far side dies without a word and comes back: the forwarder notices when it is used, says so, and goes on.
fn comes_back() -> anyhow::Result<()> {
    let (world, a, b) = friends()?;
    let (_web, _files, port) = web_server(&b, "still there")?;
    let allow = ["--allow-forward", &format!("localhost:{port}")];
    let mut listener = listen(&world, &b, &allow)?;
    let (mut forward, at) = forward(&world, &a, &["-L", &format!("0:localhost:{port}")])?;
    let url = format!("http://{}/hello", at[0]);
    ensure!(fetch(&a, &[&url])? == "still there");
    listener.signal(Signal::SIGKILL)?;
    listener.wait(PATIENCE)?;
    let _listener = listen(&world, &b, &allow)?;
    // In doubt after 3 s, given up after 5 more; then a new introduction.
    let deadline = std::time::Instant::now() + 2 * PATIENCE;
    loop {
        let got = curl(&a, &[&url])?;
        if got.status.success() {
            ensure!(got.stdout == b"still there");
            break;
        }
        ensure!(std::time::Instant::now() < deadline, "not back: {got:?}");
    }
    forward.named("lost")?;
    let connections = forward.said().iter().filter(|event| event["event"] == "connected").count();
    ensure!(connections >= 2, "{connections} sessions");
    Ok(())
}
