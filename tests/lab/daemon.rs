//! `peer up`: commands of one machine share its registration and its sessions, and whatever becomes of the daemon is told.

use std::fs::Permissions;
use std::io::{Read as _, Write as _};
use std::net::UdpSocket;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, ensure};
use end_to_end::process::{PATIENCE, Program, binary};
use end_to_end::world::World;
use libtest_mimic::Trial;
use netsim::Host;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::forwarding::{ask, forward, resolve, responder};
use crate::setup::{config_file, curl, failed, fetch, friends, homes, listen, web_server};
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("daemon::commands_share_one_session", share_one_session),
        trial("daemon::everything_is_forwarded_by_way_of_it", everything_is_forwarded),
        trial("daemon::a_command_ends_with_its_own_streams_only", ends_its_own_streams),
        trial("daemon::both_sides_share_the_session_that_one_has_opened", both_sides_share),
        trial("daemon::conversations_and_measurements_go_by_way_of_it", conversations_and_measurements),
        trial("daemon::one_that_was_killed_is_told_and_replaced", killed_and_replaced),
        trial("daemon::one_that_was_killed_at_the_other_side_is_found_again", killed_at_the_other_side),
        trial("daemon::nobody_else_is_spoken_to", nobody_else),
        trial("daemon::a_changed_configuration_holds_while_a_session_lives", reload),
        trial("daemon::there_is_one_and_whoever_needs_it_is_told", there_is_one),
        trial("daemon::it_ends_in_good_order", ends_in_good_order),
        trial("daemon::a_forward_outlives_a_server_with_and_without", || {
            outlives_a_server(true)?;
            outlives_a_server(false)
        }),
    ]
}

/// Starts a daemon and waits until it is registered.
fn up(world: &World, host: &Host, name: &str) -> anyhow::Result<Program> {
    let mut program = world.person(host, name, &["up"])?;
    program.named("up")?;
    program.named("registered")?;
    Ok(program)
}

fn status(world: &World, host: &Host, name: &str) -> anyhow::Result<Value> {
    Ok(serde_json::from_str(&world.done(host, name, &["status", "--json"])?)?)
}

/// The status, once it is what is wanted.
fn status_with(
    world: &World,
    host: &Host,
    name: &str,
    wanted: impl Fn(&Value) -> bool,
) -> anyhow::Result<Value> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = status(world, host, name)?;
        if wanted(&status) {
            return Ok(status);
        }
        ensure!(Instant::now() < deadline, "{status}");
    }
}

/// Adds to what a machine serves.
fn serves(world: &World, name: &str, forward: &str) -> anyhow::Result<()> {
    let path = config_file(world, name)?;
    let before = std::fs::read_to_string(&path)?;
    let entry = format!("{before}\n[[serve]]\nto = \"trusted\"\nforward = [{forward:?}]\n");
    Ok(std::fs::write(&path, entry)?)
}

fn control(world: &World, name: &str) -> anyhow::Result<PathBuf> {
    let [.., (_, run)] = world.home(name)?;
    Ok(Path::new(&run).join("peer/control.sock"))
}

/// What a machine's one session has.
fn only_session(status: &Value) -> anyhow::Result<&Value> {
    let sessions = status["sessions"].as_array().context("sessions")?;
    ensure!(sessions.len() == 1, "not one session: {status}");
    Ok(&sessions[0])
}

/// Sends words through a pipe and hears them again.
fn echoed(peer: &mut Program, words: &str) -> anyhow::Result<()> {
    peer.stdin()?.write_all(words.as_bytes())?;
    let mut heard = String::new();
    peer.stdout()?.read_to_string(&mut heard)?;
    ensure!(heard == words, "{heard:?}");
    let status = peer.wait(PATIENCE)?;
    ensure!(status.success(), "{status}; it said {:?}", peer.said());
    Ok(())
}

fn conversations_and_measurements() -> anyhow::Result<()> {
    let (world, laptop, nas) = friends()?;
    let _nas_daemon = up(&world, &nas, "nas")?;
    let _daemon = up(&world, &laptop, "laptop")?;
    let mut there = world.person(&nas, "nas", &["chat", "--listen"])?;
    there.named("listening")?;
    let mut here = world.person(&laptop, "laptop", &["chat", "nas"])?;
    let mut input = here.stdin()?;
    input.write_all(b"hello\n")?;
    drop(input);
    let status = here.wait(PATIENCE)?;
    ensure!(status.success(), "{status}; it said {:?}", here.said());
    let mut heard = String::new();
    there.stdout()?.read_to_string(&mut heard)?;
    ensure!(heard.contains("\"text\":\"hello\""), "{heard:?}");
    let mut measured = world.person(&nas, "nas", &["listen", "--bench"])?;
    measured.named("listening")?;
    let short = ["bench", "nas", "--seconds", "0.5", "--direction", "up"];
    let mut bench = world.person(&laptop, "laptop", &short)?;
    let mut printed = String::new();
    bench.stdout()?.read_to_string(&mut printed)?;
    ensure!(bench.wait(PATIENCE)?.success(), "{:?}", bench.said());
    ensure!(printed.contains("\"direction\":\"up\""), "{printed}");
    only_session(&status_with(&world, &laptop, "laptop", |status| {
        status["sessions"][0]["peer"].is_string()
    })?)?;
    Ok(())
}

fn share_one_session() -> anyhow::Result<()> {
    let (world, laptop, nas) = friends()?;
    let (_web, _files, port) = web_server(&nas, "from the nas")?;
    serves(&world, "nas", &format!("localhost:{port}"))?;
    let _nas_daemon = up(&world, &nas, "nas")?;
    let _daemon = up(&world, &laptop, "laptop")?;
    let (mut forward, at) = forward(&world, &laptop, &["-L", &format!("0:localhost:{port}")])?;
    let url = format!("http://{}/hello", at[0]);
    ensure!(fetch(&laptop, &[&url])? == "from the nas");
    ensure!(forward.named("registered")?["daemon"].is_u64(), "not by the daemon");
    // The daemon tells of the paths as an endpoint of one's own does.
    forward.event(|event| event["event"] == "path" && event["path"] == "direct", PATIENCE)?;

    let echo = listen(&world, &nas, &["--echo"])?;
    let mut held = world.person(&laptop, "laptop", &["connect", "--verbose", "nas"])?;
    held.named("path")?;
    let mut proxy = world.person(&laptop, "laptop", &["ssh-proxy", "nas", &port.to_string()])?;
    proxy.stdin()?.write_all(b"GET /hello HTTP/1.0\r\n\r\n")?;
    let mut page = String::new();
    proxy.stdout()?.read_to_string(&mut page)?;
    ensure!(page.ends_with("from the nas") && proxy.wait(PATIENCE)?.success(), "{page:?}");
    world.done(&laptop, "laptop", &["ping", "nas", "--count", "2", "--interval", "0.05"])?;
    let (from, to) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let file = from.path().join("file");
    std::fs::write(&file, vec![7; 3_000_000])?;
    let to_path = to.path().to_str().context("UTF-8")?;
    let mut receiver = world.person(&nas, "nas", &["receive", "--from", "laptop", to_path])?;
    receiver.named("receiving")?;
    world.done(&laptop, "laptop", &["send", file.to_str().context("UTF-8")?, "nas"])?;
    receiver.named("received")?;
    ensure!(receiver.wait(PATIENCE)?.success());
    ensure!(std::fs::read(to.path().join("file"))? == vec![7; 3_000_000], "another file arrived");

    let before = status(&world, &laptop, "laptop")?;
    let session = only_session(&before)?;
    let commands: Vec<_> =
        session["commands"].as_array().context("commands")?.iter().map(|one| &one["command"]).collect();
    ensure!(commands.len() == 2 && commands.contains(&&"forward nas".into()), "{before}");
    ensure!(session["alias"] == "nas" && session["direct"] == true && session["dialled"] == true, "{before}");
    ensure!(
        before["servers"][0]["state"] == "registered" && before["servers"][0]["over"] == "udp",
        "{before}"
    );
    let relayed = session["bytes"]["relayed_sent"].as_u64().context("bytes")?;
    ensure!(relayed > 0, "it was relayed first: {before}");
    fetch(&laptop, &[&url])?;
    let after = status(&world, &laptop, "laptop")?;
    let direct = |status: &Value| {
        let bytes = &status["sessions"][0]["bytes"];
        Some((bytes["direct_sent"].as_u64()?, bytes["direct_received"].as_u64()?))
    };
    let (before, after) = (direct(&before).context("bytes")?, direct(&after).context("bytes")?);
    ensure!(after.0 > before.0 && after.1 > before.1 + 12, "{before:?}, then {after:?}");
    // At the other side it is one as well.
    let theirs = status(&world, &nas, "nas")?;
    ensure!(only_session(&theirs)?["dialled"] == false, "{theirs}");
    ensure!(theirs["serves"][0]["to"][0] == "trusted" && theirs["accepted"].as_u64() > Some(0), "{theirs}");
    ensure!(theirs["waiting"][0]["command"] == "listen", "{theirs}");
    // For people.
    let shown = world.done(&laptop, "laptop", &["status"])?;
    ensure!(shown.contains("session with nas (") && shown.contains("used by peer forward nas"), "{shown}");
    echoed(&mut held, "through the same session")?;
    ensure!(held.named("explained")?["verdict"] == "direct");
    drop(echo);
    let known: Value =
        serde_json::from_str(&world.done(&laptop, "laptop", &["list", "--online", "--json"])?)?;
    ensure!(known["peers"][0]["online"] == true, "{known}");
    let explained = world.run(&laptop, "laptop", &["explain", "nas"])?;
    let said = String::from_utf8_lossy(&explained.stderr);
    ensure!(explained.status.success() && said.contains("direct"), "{said}");
    only_session(&status(&world, &laptop, "laptop")?)?;
    // Nobody listens for pipes any more, and a command of one's own needs no daemon.
    let mut refused = world.person(&laptop, "laptop", &["connect", "nas"])?;
    ensure!(refused.wait(PATIENCE)?.code() == Some(6), "{:?}", refused.said());
    ensure!(status(&world, &nas, "nas")?["refused"]["laptop"] == 1);
    let mut alone = world.person(&laptop, "laptop", &["ping", "nas", "--alone", "--count", "1"])?;
    ensure!(alone.wait(PATIENCE)?.success() && alone.named("registered")?["daemon"].is_null());
    Ok(())
}

fn everything_is_forwarded() -> anyhow::Result<()> {
    let (world, laptop, nas) = friends()?;
    let (_web, files, port) = web_server(&nas, "hello")?;
    let (_own_web, _own_files, own_port) = web_server(&laptop, "from the laptop")?;
    let big: Vec<u8> = (0..5_000_000_u32).map(|number| number.to_le_bytes()[1]).collect();
    std::fs::write(files.path().join("big"), &big)?;
    let (names, own_names) = (responder(&nas)?.port(), responder(&laptop)?.port());
    let _nas_daemon = up(&world, &nas, "nas")?;
    let _daemon = up(&world, &laptop, "laptop")?;
    // What the daemon does not serve a listener does, by way of the daemon.
    let _listener = listen(
        &world,
        &nas,
        &[
            "--allow-forward",
            &format!("localhost:{port}"),
            "--allow-forward",
            &format!("udp:localhost:{names}"),
            "--allow-listen",
            "127.0.0.1:9000",
            "--allow-listen",
            "udp:127.0.0.1:9053",
        ],
    )?;
    let arguments = [
        "-L",
        &format!("0:localhost:{port}"),
        "-L",
        &format!("udp:0:localhost:{names}"),
        "-D",
        "0",
        "-R",
        &format!("9000:localhost:{own_port}"),
        "-R",
        &format!("udp:9053:localhost:{own_names}"),
    ];
    let (mut forward, at) = forward(&world, &laptop, &arguments)?;
    let got = curl(&laptop, &[&format!("http://{}/big", at[0])])?;
    ensure!(got.stdout == big, "{} bytes of {}", got.stdout.len(), big.len());
    let place = at[1].strip_prefix("udp:").context("a UDP place")?;
    let socket = laptop.run(|| UdpSocket::bind("127.0.0.1:0"))?;
    // Within a datagram of the path, and beyond.
    for (number, length) in (0..).zip([60, 1100, 1232, 4096, 40_000, 60]) {
        ask(&socket, place, number, length)?;
    }
    let proxy = format!("socks5h://{}", at[2]);
    ensure!(fetch(&laptop, &["--proxy", &proxy, &format!("http://localhost:{port}/hello")])? == "hello");
    ensure!(fetch(&nas, &["http://localhost:9000/hello"])? == "from the laptop");
    resolve(&nas, "127.0.0.1:9053", 5, 700)?;
    // With the command ends what listens for it.
    forward.signal(Signal::SIGINT)?;
    ensure!(forward.wait(PATIENCE)?.success());
    let deadline = Instant::now() + PATIENCE;
    while nas.run(|| std::net::TcpStream::connect("127.0.0.1:9000")).is_ok() {
        ensure!(Instant::now() < deadline, "still listening");
    }
    Ok(())
}

fn ends_its_own_streams() -> anyhow::Result<()> {
    let (world, laptop, nas) = friends()?;
    let _nas_daemon = up(&world, &nas, "nas")?;
    let _daemon = up(&world, &laptop, "laptop")?;
    let mut echo = listen(&world, &nas, &["--echo"])?;
    let mut first = world.person(&laptop, "laptop", &["connect", "nas"])?;
    let mut second = world.person(&laptop, "laptop", &["connect", "nas"])?;
    let (mut to_first, mut from_first) = (first.stdin()?, first.stdout()?);
    for (number, letter) in [b'a', b'b'].iter().enumerate() {
        let mut heard = [0];
        to_first.write_all(&[*letter])?;
        from_first.read_exact(&mut heard)?;
        ensure!(heard == [*letter], "{heard:?}");
        if number == 0 {
            second.named("path")?;
            echo.event(|event| event["event"] == "connected", PATIENCE)?;
            second.signal(Signal::SIGINT)?;
            let status = second.wait(PATIENCE)?;
            ensure!(status.code() == Some(130), "{status}");
            status_with(&world, &laptop, "laptop", |status| {
                status["sessions"][0]["commands"].as_array().is_some_and(|commands| commands.len() == 1)
            })?;
        }
    }
    drop(to_first);
    ensure!(first.wait(PATIENCE)?.success());
    only_session(&status(&world, &laptop, "laptop")?)?;
    Ok(())
}

fn both_sides_share() -> anyhow::Result<()> {
    let (world, laptop, nas) = friends()?;
    world.done(&laptop, "laptop", &["trust", &world.done(&nas, "nas", &["id"])?])?;
    serves(&world, "laptop", "localhost:1")?;
    serves(&world, "nas", "localhost:1")?;
    let _nas_daemon = up(&world, &nas, "nas")?;
    let _daemon = up(&world, &laptop, "laptop")?;
    world.done(&laptop, "laptop", &["ping", "nas", "--count", "1"])?;
    world.done(&nas, "nas", &["ping", "laptop", "--count", "1"])?;
    let (ours, theirs) = (status(&world, &laptop, "laptop")?, status(&world, &nas, "nas")?);
    ensure!(only_session(&ours)?["dialled"] == true, "{ours}");
    ensure!(only_session(&theirs)?["dialled"] == false, "{theirs}");
    // A program that is no daemon is not asked for what the machine serves.
    let _alone = world.person(&nas, "nas", &["forward", "laptop", "--alone", "-L", "0:localhost:1"])?;
    status_with(&world, &laptop, "laptop", |status| {
        status["sessions"].as_array().is_some_and(|sessions| sessions.len() == 2)
    })?;
    world.done(&laptop, "laptop", &["ping", "nas", "--count", "1"])?;
    Ok(())
}

fn killed_and_replaced() -> anyhow::Result<()> {
    let (world, laptop, nas) = friends()?;
    let (_web, _files, port) = web_server(&nas, "still there")?;
    serves(&world, "nas", &format!("localhost:{port}"))?;
    let _nas_daemon = up(&world, &nas, "nas")?;
    let _echo = listen(&world, &nas, &["--echo"])?;
    let mut daemon = up(&world, &laptop, "laptop")?;
    let (mut forward, at) = forward(&world, &laptop, &["-L", &format!("0:localhost:{port}")])?;
    let url = format!("http://{}/hello", at[0]);
    ensure!(fetch(&laptop, &[&url])? == "still there");
    let mut peer = world.person(&laptop, "laptop", &["connect", "nas"])?;
    peer.named("path")?;
    let mut waiting = world.person(&laptop, "laptop", &["listen", "--echo"])?;
    waiting.named("listening")?;
    daemon.signal(Signal::SIGKILL)?;
    daemon.wait(PATIENCE)?;
    for command in [&mut peer, &mut waiting] {
        let error = command.named("error")?;
        let words = error["message"].as_str().context("a message")?;
        ensure!(words.contains("the daemon (process") && words.contains("`peer up`"), "{words}");
        let status = command.wait(PATIENCE)?;
        ensure!(status.code() == Some(5), "{status}: {words}");
    }
    let retry = forward.named("retry")?;
    ensure!(retry["message"].as_str().is_some_and(|words| words.contains("no daemon runs")), "{retry}");
    failed(&world.run(&laptop, "laptop", &["status"])?, 7, &["no daemon runs", "peer up"])?;
    ensure!(control(&world, "laptop")?.exists(), "nobody has removed the socket");
    // Others go on alone.
    world.done(&laptop, "laptop", &["ping", "nas", "--count", "1"])?;
    let _daemon = up(&world, &laptop, "laptop")?;
    let deadline = Instant::now() + PATIENCE;
    while !curl(&laptop, &[&url])?.status.success() {
        ensure!(Instant::now() < deadline, "not forwarded again");
    }
    let status = status(&world, &laptop, "laptop")?;
    ensure!(only_session(&status)?["commands"][0]["command"] == "forward nas", "{status}");
    Ok(())
}

/// Its successor knows nothing of the session that ours still has.
fn killed_at_the_other_side() -> anyhow::Result<()> {
    let (world, laptop, nas) = friends()?;
    let (_web, _files, port) = web_server(&nas, "again")?;
    serves(&world, "nas", &format!("localhost:{port}"))?;
    let mut nas_daemon = up(&world, &nas, "nas")?;
    let _daemon = up(&world, &laptop, "laptop")?;
    let (mut forward, at) = forward(&world, &laptop, &["-L", &format!("0:localhost:{port}")])?;
    let url = format!("http://{}/hello", at[0]);
    ensure!(fetch(&laptop, &[&url])? == "again");
    nas_daemon.signal(Signal::SIGKILL)?;
    nas_daemon.wait(PATIENCE)?;
    let _nas_daemon = up(&world, &nas, "nas")?;
    world.done(&laptop, "laptop", &["ping", "nas", "--count", "1"])?;
    let deadline = Instant::now() + 2 * PATIENCE;
    while !curl(&laptop, &[&url])?.status.success() {
        ensure!(Instant::now() < deadline, "not forwarded again");
    }
    forward.named("lost")?;
    Ok(())
}

fn nobody_else() -> anyhow::Result<()> {
    const NOBODY: &str = "65534";
    let (world, laptop, _) = homes()?;
    world.done(&laptop, "laptop", &["init", &world.address])?;
    let mut daemon = up(&world, &laptop, "laptop")?;
    let path = control(&world, "laptop")?;
    let mode = |path: &Path| anyhow::Ok(std::fs::metadata(path)?.mode() & 0o777);
    ensure!(mode(&path)? == 0o600 && mode(path.parent().context("a folder")?)? == 0o700);
    drop(status(&world, &laptop, "laptop")?);
    daemon.signal(Signal::SIGTERM)?;
    ensure!(daemon.wait(PATIENCE)?.success());

    let able = laptop.command("setpriv").args(["--reuid", NOBODY, "--clear-groups", "true"]).output()?;
    if !able.status.success() {
        println!("there is no other user here: {}", String::from_utf8_lossy(&able.stderr).trim());
        return Ok(());
    }
    // Where everybody may go, and a program that everybody may run.
    let place = tempfile::tempdir()?;
    let (run, program) = (place.path().join("run"), place.path().join("peer"));
    std::fs::copy(binary("peer")?, &program)?;
    let socket = run.join("control.sock");
    let shown = socket.to_str().context("UTF-8")?;
    let mut daemon = world.person(&laptop, "laptop", &["up", "--control", shown])?;
    daemon.named("up")?;
    let as_nobody = || -> anyhow::Result<std::process::Output> {
        let mut command = laptop.command("setpriv");
        command.args(["--reuid", NOBODY, "--clear-groups"]).arg(&program);
        command.args(["status", "--control", shown]).env("HOME", place.path()).env_remove("RUST_LOG");
        Ok(command.output()?)
    };
    std::fs::set_permissions(place.path(), Permissions::from_mode(0o755))?;
    failed(&as_nobody()?, 1, &["another user's", "--control"])?;
    // Even where somebody has opened the folder and the socket.
    std::fs::set_permissions(&run, Permissions::from_mode(0o755))?;
    std::fs::set_permissions(&socket, Permissions::from_mode(0o666))?;
    failed(&as_nobody()?, 1, &["another user's", "--control"])?;
    world.done(&laptop, "laptop", &["status", "--control", shown])?;
    Ok(())
}

fn reload() -> anyhow::Result<()> {
    let (world, laptop, nas) = friends()?;
    let (_web, _files, port) = web_server(&nas, "added")?;
    let mut nas_daemon = up(&world, &nas, "nas")?;
    let _daemon = up(&world, &laptop, "laptop")?;
    let (mut forward, at) = forward(&world, &laptop, &["-L", &format!("0:localhost:{port}")])?;
    let url = format!("http://{}/hello", at[0]);
    ensure!(!curl(&laptop, &[&url])?.status.success(), "served without being named");
    ensure!(forward.named("not_forwarded")?["reason"] == "refused");
    serves(&world, "nas", &format!("localhost:{port}"))?;
    nas_daemon.named("reloaded")?;
    ensure!(fetch(&laptop, &[&url])? == "added");
    // What is wrong is told, and changes nothing.
    let path = config_file(&world, "nas")?;
    let before = std::fs::read_to_string(&path)?;
    std::fs::write(&path, format!("{before}\nwrong = 1\n"))?;
    nas_daemon.named("not_reloaded")?;
    ensure!(fetch(&laptop, &[&url])? == "added");
    let shown = status(&world, &nas, "nas")?;
    ensure!(shown["problem"].as_str().is_some_and(|words| words.contains("wrong")), "{shown}");
    failed(
        &world.run(
            &nas,
            "nas",
            &["reload", "--control", control(&world, "nas")?.to_str().context("UTF-8")?],
        )?,
        1,
        &["wrong"],
    )?;
    let sessions = forward.said().iter().filter(|event| event["event"] == "connected").count();
    ensure!(sessions == 1, "{sessions} sessions");
    // And taken away again, by SIGHUP.
    std::fs::write(
        &path,
        before.split("[[serve]]\nto = \"trusted\"\nforward = [\"localhost").next().context("a part")?,
    )?;
    nas_daemon.signal(Signal::SIGHUP)?;
    status_with(&world, &nas, "nas", |status| status["serves"].as_array().is_some_and(Vec::is_empty))?;
    ensure!(!curl(&laptop, &[&url])?.status.success(), "still served");
    let shown = status(&world, &nas, "nas")?;
    ensure!(shown["refused"]["laptop"].as_u64() >= Some(2) && shown["problem"].is_null(), "{shown}");
    Ok(())
}

fn there_is_one() -> anyhow::Result<()> {
    let (world, laptop, _) = homes()?;
    let run = |arguments: &[&str]| world.run(&laptop, "laptop", arguments);
    failed(&run(&["up"])?, 2, &["peer init rv://", "--server"])?;
    world.done(&laptop, "laptop", &["init", &world.address])?;
    for command in ["status", "down", "reload"] {
        failed(&run(&[command])?, 7, &["no daemon runs", "control.sock", "peer up"])?;
    }
    let _daemon = up(&world, &laptop, "laptop")?;
    failed(&run(&["up"])?, 1, &["another daemon", "key.pem", "peer status", "peer down"])?;
    let elsewhere = tempfile::tempdir()?;
    let other = elsewhere.path().join("run/control.sock");
    let other = other.to_str().context("UTF-8")?;
    failed(&run(&["up", "--control", other])?, 1, &["another daemon", "key.pem"])?;
    let key = elsewhere.path().join("key.pem");
    failed(
        &run(&["up", "--key", key.to_str().context("UTF-8")?])?,
        1,
        &["another daemon listens", "control.sock"],
    )?;
    failed(&run(&["up", "--alone"])?, 2, &["--alone"])?;
    // Somebody else's place.
    std::fs::set_permissions(elsewhere.path(), Permissions::from_mode(0o755))?;
    let open = elsewhere.path().join("control.sock");
    let arguments =
        ["up", "--key", key.to_str().context("UTF-8")?, "--control", open.to_str().context("UTF-8")?];
    failed(&run(&arguments)?, 1, &["mode 0755", "chmod 700"])?;
    Ok(())
}

fn ends_in_good_order() -> anyhow::Result<()> {
    let (world, laptop, nas) = friends()?;
    let mut nas_daemon = up(&world, &nas, "nas")?;
    let _echo = listen(&world, &nas, &["--echo"])?;
    for signal in [None, Some(Signal::SIGTERM), Some(Signal::SIGINT)] {
        let mut daemon = up(&world, &laptop, "laptop")?;
        let mut peer = world.person(&laptop, "laptop", &["connect", "nas"])?;
        peer.named("path")?;
        match signal {
            Some(signal) => daemon.signal(signal)?,
            None => drop(world.done(&laptop, "laptop", &["down"])?),
        }
        let status = daemon.wait(PATIENCE)?;
        ensure!(status.success() && !control(&world, "laptop")?.exists(), "{status}");
        let error = peer.named("error")?;
        ensure!(error["message"].as_str().is_some_and(|words| words.contains("the daemon")), "{error}");
        ensure!(peer.wait(PATIENCE)?.code() == Some(5));
        // The other side hears of it at once.
        nas_daemon.later(|event| event["event"] == "closed", PATIENCE)?;
    }
    failed(&world.run(&laptop, "laptop", &["down"])?, 7, &["no daemon runs"])
}

fn outlives_a_server(with: bool) -> anyhow::Result<()> {
    let (mut world, laptop, nas) = friends()?;
    let (_web, _files, port) = web_server(&nas, "through it all")?;
    let _listener = listen(&world, &nas, &["--allow-forward", &format!("localhost:{port}")])?;
    let _daemon = with.then(|| up(&world, &laptop, "laptop")).transpose()?;
    let (mut forward, at) = forward(&world, &laptop, &["-L", &format!("0:localhost:{port}")])?;
    ensure!(forward.named("registered")?["daemon"].is_u64() == with);
    let url = format!("http://{}/hello", at[0]);
    ensure!(fetch(&laptop, &[&url])? == "through it all");
    world.restart_server()?;
    forward.later(|event| event["event"] == "server" && event["state"] != "registered", PATIENCE)?;
    forward.event(|event| event["event"] == "server" && event["state"] == "registered", PATIENCE)?;
    ensure!(fetch(&laptop, &[&url])? == "through it all");
    if with {
        let shown =
            status_with(&world, &laptop, "laptop", |status| status["servers"][0]["state"] == "registered")?;
        only_session(&shown)?;
    }
    Ok(())
}
