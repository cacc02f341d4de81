//! Set up once: what a person does on two fresh machines, and what goes wrong on the way.

use std::io::Read as _;
use std::path::PathBuf;
use std::process::Output;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use end_to_end::process::{PATIENCE, Program, binary};
use end_to_end::world::World;
use libtest_mimic::Trial;
use netsim::{Host, RouterKind, SiteConfig};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("setup::six_commands_lead_to_a_forwarded_port", six_commands),
        trial("setup::an_alias_stands_for_an_id_everywhere", an_alias_stands_for_an_id),
        trial("setup::an_invitation_for_one_is_spent", an_invitation_for_one_is_spent),
        trial("setup::an_invitation_expires", an_invitation_expires),
        trial("setup::an_invitation_is_taken_while_a_listener_runs", taken_while_a_listener_runs),
        trial("setup::trust_survives_a_kill", trust_survives_a_kill),
        trial("setup::who_is_trusted_no_more_is_refused", trusted_no_more),
        trial("setup::a_ticket_is_enough_to_connect", a_ticket_is_enough),
        trial("setup::list_tells_who_is_online_and_the_last_path", list_tells),
        trial("setup::settings_have_their_order", settings_have_their_order),
        trial("setup::without_a_server_init_is_named", without_a_server),
        trial("setup::a_wrong_configuration_is_named_with_its_line", a_wrong_configuration),
        trial("setup::names_that_nobody_has_are_errors", names_that_nobody_has),
        trial("setup::what_may_not_be_written_is_named", what_may_not_be_written),
    ]
}

/// Two homes behind NATs, without any delay.
pub(crate) fn homes() -> anyhow::Result<(World, Host, Host)> {
    homes_behind(RouterKind::EimApdf, Duration::ZERO)
}

/// Two homes behind such NATs, this far from the middle.
fn homes_behind(kind: RouterKind, delay: Duration) -> anyhow::Result<(World, Host, Host)> {
    let mut world = World::new(6)?;
    let config = || SiteConfig::new(kind);
    let config = || if delay.is_zero() { config() } else { config().delay(delay) };
    let a = world.lab.add_site("a", config())?;
    let b = world.lab.add_site("b", config())?;
    Ok((world, a.host(0), b.host(0)))
}

/// Two machines that are set up; `laptop` is `a`'s, `nas` is `b`'s, and `laptop` has a ticket of `nas` that it has not shown yet.
pub(crate) fn friends() -> anyhow::Result<(World, Host, Host)> {
    friends_behind(RouterKind::EimApdf, Duration::ZERO)
}

/// The same behind such NATs, this far from the middle.
pub(crate) fn friends_behind(kind: RouterKind, delay: Duration) -> anyhow::Result<(World, Host, Host)> {
    let (world, a, b) = homes_behind(kind, delay)?;
    befriend(&world, &a, &b)?;
    Ok((world, a, b))
}

/// Sets up `laptop` on `a` and `nas` on `b`.
pub(crate) fn befriend(world: &World, a: &Host, b: &Host) -> anyhow::Result<()> {
    let address = world.address.clone();
    world.done(b, "nas", &["init", &address])?;
    world.done(a, "laptop", &["init", &address])?;
    let ticket = world.done(b, "nas", &["invite", "--once", "--name", "laptop"])?;
    world.done(a, "laptop", &["trust", &ticket, "--as", "nas"])?;
    Ok(())
}

/// Starts a listener of `nas` and waits until it is registered.
pub(crate) fn listen(world: &World, host: &Host, arguments: &[&str]) -> anyhow::Result<Program> {
    let mut program = world.person(host, "nas", &[&["listen"], arguments].concat())?;
    program.named("listening")?;
    Ok(program)
}

/// A web server that shows a file `hello` with these words.
pub(crate) fn web_server(
    host: &Host,
    words: &str,
) -> anyhow::Result<(netsim::HostChild, tempfile::TempDir, u16)> {
    web_server_at(host, words, 0)
}

/// The same at this port.
pub(crate) fn web_server_at(
    host: &Host,
    words: &str,
    port: u16,
) -> anyhow::Result<(netsim::HostChild, tempfile::TempDir, u16)> {
    let directory = tempfile::tempdir()?;
    std::fs::write(directory.path().join("hello"), words)?;
    let mut command = host.command("python3");
    let port = port.to_string();
    command.args(["-u", "-m", "http.server", &port, "--bind", "127.0.0.1"]).current_dir(directory.path());
    let mut server =
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::null()).spawn()?;
    // "Serving HTTP on 127.0.0.1 port 40001 (...".
    let mut said = String::new();
    let mut line = std::io::BufReader::new(server.stdout.take().context("its output")?);
    std::io::BufRead::read_line(&mut line, &mut said)?;
    let port = said.split("port ").nth(1).and_then(|rest| rest.split(' ').next()).context("a port")?;
    Ok((server, directory, port.parse()?))
}

pub(crate) fn curl(host: &Host, arguments: &[&str]) -> anyhow::Result<Output> {
    let mut command = host.command("curl");
    command.args(["--silent", "--show-error", "--max-time", "20", "--noproxy", ""]).args(arguments);
    for variable in
        ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "http_proxy", "NO_PROXY", "no_proxy"]
    {
        command.env_remove(variable);
    }
    Ok(command.output()?)
}

/// What a web server says, and nothing else.
pub(crate) fn fetch(host: &Host, arguments: &[&str]) -> anyhow::Result<String> {
    let output = curl(host, arguments)?;
    ensure!(output.status.success(), "curl: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// The run must have failed with this code, and its words must hold all of these.
pub(crate) fn failed(output: &Output, code: i32, words: &[&str]) -> anyhow::Result<()> {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(code), "{}: {said}", output.status);
    ensure!(output.stdout.is_empty(), "words on standard output");
    for word in words {
        ensure!(said.contains(word), "no {word:?} in {said:?}");
    }
    Ok(())
}

/// The README's path of a first-time user; the seventh command is the proof.
fn six_commands() -> anyhow::Result<()> {
    let (world, laptop, nas) = homes()?;
    let (_web, _files, port) = web_server(&nas, "from the nas")?;
    let address = world.address.clone();
    let id = world.done(&nas, "nas", &["init", &address])?;
    world.done(&laptop, "laptop", &["init", &address])?;
    let ticket = world.done(&nas, "nas", &["invite", "--once", "--name", "laptop"])?;
    world.done(&laptop, "laptop", &["trust", &ticket, "--as", "nas"])?;
    let mut listener = listen(&world, &nas, &["--allow-forward", &format!("localhost:{port}")])?;
    let mut forward =
        world.person(&laptop, "laptop", &["forward", "nas", "-L", &format!("8080:localhost:{port}")])?;
    forward.named("forwarding")?;
    ensure!(fetch(&laptop, &["http://localhost:8080/hello"])? == "from the nas");
    ensure!(forward.named("invited")?["peer"] == id.as_str());
    listener.named("redeemed")?;
    let known = world.done(&nas, "nas", &["list"])?;
    ensure!(known.starts_with("laptop") && known.contains("  trusted"), "{known}");
    for (program, code) in [(&mut forward, 0), (&mut listener, 0)] {
        program.signal(Signal::SIGTERM)?;
        let status = program.wait(PATIENCE)?;
        ensure!(status.code() == Some(code), "{status}");
    }
    Ok(())
}

fn an_alias_stands_for_an_id() -> anyhow::Result<()> {
    let (world, a, b) = friends()?;
    let _listener = listen(&world, &b, &["--echo"])?;
    let mut peer = world.person(&a, "laptop", &["connect", "nas"])?;
    std::io::Write::write_all(&mut peer.stdin()?, b"by name")?;
    let mut heard = String::new();
    peer.stdout()?.read_to_string(&mut heard)?;
    ensure!(heard == "by name" && peer.wait(PATIENCE)?.success(), "{heard:?}");
    let mut explain = world.person(&a, "laptop", &["explain", "nas"])?;
    explain.named("explained")?;
    world.done(&a, "laptop", &["alias", "cellar", "nas"])?;
    let mut peer = world.person(&a, "laptop", &["connect", "cellar"])?;
    peer.named("connected")?;
    failed(&world.run(&a, "laptop", &["connect", "nas"])?, 2, &["nas", "peer list"])
}

/// Connects as `name` with a listener that serves trusted peers only; how it ends.
fn try_ping(world: &World, host: &Host, name: &str, whom: &str) -> anyhow::Result<(Option<i32>, String)> {
    let arguments = ["ping", whom, "--count", "2", "--interval", "0.05"];
    let output = world.run(host, name, &arguments)?;
    Ok((output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned()))
}

fn an_invitation_for_one_is_spent() -> anyhow::Result<()> {
    let (world, a, b) = homes()?;
    let address = world.address.clone();
    for (host, name) in [(&b, "nas"), (&a, "first"), (&a, "second")] {
        world.done(host, name, &["init", &address])?;
    }
    let ticket = world.done(&b, "nas", &["invite", "--once"])?;
    // The listener lets anyone in, so that what is refused is the invitation.
    let mut listener = listen(&world, &b, &["--echo"])?;
    for name in ["first", "second"] {
        world.done(&a, name, &["trust", &ticket, "--as", "nas"])?;
    }
    let (code, said) = try_ping(&world, &a, "first", "nas")?;
    ensure!(code == Some(0), "{code:?}: {said}");
    let (code, said) = try_ping(&world, &a, "second", "nas")?;
    ensure!(code == Some(6) && said.contains("spent"), "{code:?}: {said}");
    listener.named("not_redeemed")?;
    // Showing it again does no harm to the one who was taken.
    let (code, said) = try_ping(&world, &a, "first", &ticket)?;
    ensure!(code == Some(0), "{code:?}: {said}");
    Ok(())
}

fn an_invitation_expires() -> anyhow::Result<()> {
    let (world, a, b) = homes()?;
    let address = world.address.clone();
    world.done(&b, "nas", &["init", &address])?;
    world.done(&a, "laptop", &["init", &address])?;
    let ticket = world.done(&b, "nas", &["invite", "--expires", "2s"])?;
    let _listener = listen(&world, &b, &["--echo"])?;
    let deadline = Instant::now() + PATIENCE;
    while world.done(&b, "nas", &["list"])?.contains("invitation") {
        ensure!(Instant::now() < deadline, "still open");
        std::thread::sleep(Duration::from_millis(100));
    }
    let (code, said) = try_ping(&world, &a, "laptop", &ticket)?;
    ensure!(code == Some(6) && said.contains("expired"), "{code:?}: {said}");
    Ok(())
}

/// A listener for trusted peers only opens its door to strangers when there is an invitation, and closes it when that is spent.
fn taken_while_a_listener_runs() -> anyhow::Result<()> {
    let (world, a, b) = homes()?;
    let address = world.address.clone();
    for (host, name) in [(&b, "nas"), (&a, "laptop"), (&a, "stranger")] {
        world.done(host, name, &["init", &address])?;
    }
    let _listener = listen(&world, &b, &["--allow-forward", "localhost:80"])?;
    let id = world.done(&b, "nas", &["id"])?;
    let (code, said) = try_ping(&world, &a, "stranger", &id)?;
    ensure!(code == Some(4) && said.contains("does not accept you"), "{code:?}: {said}");
    let ticket = world.done(&b, "nas", &["invite", "--once"])?;
    let until = |name: &str, whom: &str, wanted: i32| {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (code, said) = try_ping(&world, &a, name, whom)?;
            if code == Some(wanted) {
                return anyhow::Ok(());
            }
            ensure!(Instant::now() < deadline, "{name}: not {wanted} but {code:?}: {said}");
        }
    };
    until("laptop", &ticket, 0)?;
    until("stranger", &id, 4)?;
    until("laptop", &id, 0)
}

fn trust_survives_a_kill() -> anyhow::Result<()> {
    let (world, a, b) = friends()?;
    let arguments = ["--allow-forward", "localhost:80"];
    let mut listener = listen(&world, &b, &arguments)?;
    let (code, said) = try_ping(&world, &a, "laptop", "nas")?;
    ensure!(code == Some(0), "{code:?}: {said}");
    listener.signal(Signal::SIGKILL)?;
    listener.wait(PATIENCE)?;
    let _listener = listen(&world, &b, &arguments)?;
    let (code, said) = try_ping(&world, &a, "laptop", "nas")?;
    ensure!(code == Some(0), "{code:?}: {said}");
    let known = world.done(&b, "nas", &["list"])?;
    ensure!(known.contains("  trusted") && !known.contains("invitation"), "{known}");
    Ok(())
}

fn trusted_no_more() -> anyhow::Result<()> {
    let (world, a, b) = friends()?;
    let (_web, _files, port) = web_server(&b, "hello")?;
    let _listener = listen(&world, &b, &["--allow-forward", &format!("localhost:{port}")])?;
    let mut forward =
        world.person(&a, "laptop", &["forward", "nas", "-L", &format!("0:localhost:{port}")])?;
    let at = forward.named("forwarding")?["at"].as_str().context("a place")?.to_owned();
    ensure!(fetch(&a, &[&format!("http://{at}/hello")])? == "hello");
    world.done(&b, "nas", &["untrust", "laptop"])?;
    let refused = curl(&a, &[&format!("http://{at}/hello")])?;
    ensure!(!refused.status.success(), "still served");
    let told = forward.named("not_forwarded")?;
    ensure!(told["reason"] == "refused", "{told}");
    Ok(())
}

fn a_ticket_is_enough() -> anyhow::Result<()> {
    let (world, a, b) = homes()?;
    let address = world.address.clone();
    world.done(&b, "nas", &["init", &address])?;
    let ticket = world.done(&b, "nas", &["invite"])?;
    let _listener = listen(&world, &b, &["--", "echo", "enough"])?;
    // A machine that was never set up: the ticket names the server.
    let output = world.run(&a, "fresh", &["connect", &ticket.to_uppercase()])?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && output.stdout == b"enough\n", "{}: {said}", output.status);
    Ok(())
}

fn list_tells() -> anyhow::Result<()> {
    let (world, a, b) = friends()?;
    let listener = listen(&world, &b, &["--echo"])?;
    world.done(&a, "laptop", &["ping", "nas", "--count", "2"])?;
    let list = |arguments: &[&str]| -> anyhow::Result<Value> {
        let arguments = [&["list", "--json"], arguments].concat();
        Ok(serde_json::from_str(&world.done(&a, "laptop", &arguments)?)?)
    };
    let known = list(&[])?["peers"][0].clone();
    ensure!(known["alias"] == "nas" && known["trusted"] == true && known["online"].is_null(), "{known}");
    ensure!(known["last"]["at"].is_string() && known["last"]["path"].is_string(), "{known}");
    ensure!(list(&["--online"])?["peers"][0]["online"] == true);
    drop(listener);
    ensure!(list(&["--online"])?["peers"][0]["online"] == false);
    Ok(())
}

/// A flag goes before the environment, that before the configuration.
fn settings_have_their_order() -> anyhow::Result<()> {
    let (world, a, _) = homes()?;
    let nobody = format!("rv://aebagbafaydqqcikbmga2dqpcaireeyuculbogazdinryhi6d4qa@{}", a.ipv4());
    let ticket = |environment: Option<&str>, flag: Option<&str>| -> anyhow::Result<peer::Ticket> {
        let mut command = a.command(binary("peer")?);
        command.args(["invite"]).envs(world.home("laptop")?).env_remove("PEER_SERVER");
        command.envs(environment.map(|server| ("PEER_SERVER", server)));
        command.args(flag.map(|server| ["--server", server]).into_iter().flatten());
        let output = command.output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?.trim().parse()?)
    };
    world.done(&a, "laptop", &["init", &world.address])?;
    ensure!(ticket(None, None)?.servers[0].to_string() == world.address);
    ensure!(ticket(Some(&nobody), None)?.servers[0].to_string() == nobody);
    ensure!(ticket(Some(&nobody), Some(&world.address))?.servers[0].to_string() == world.address);
    Ok(())
}

fn without_a_server() -> anyhow::Result<()> {
    let (world, a, _) = homes()?;
    const NOBODY: &str = "aebagbafaydqqcikbmga2dqpcaireeyuculbogazdinryhi6d4qa";
    for arguments in [
        &["connect", NOBODY][..],
        &["listen", "--echo"],
        &["invite"],
        &["doctor"],
        &["ping", NOBODY],
        &["forward", NOBODY, "-L", "0:localhost:1"],
        &["ssh-proxy", NOBODY],
        &["send", "/etc/passwd", NOBODY],
        &["receive", "--from", NOBODY, "/tmp"],
    ] {
        failed(&world.run(&a, "fresh", arguments)?, 2, &["peer init rv://", "--server"])?;
    }
    Ok(())
}

pub(crate) fn config_file(world: &World, name: &str) -> anyhow::Result<PathBuf> {
    let [(_, config), ..] = world.home(name)?;
    Ok(PathBuf::from(config).join("peer/config.toml"))
}

fn a_wrong_configuration() -> anyhow::Result<()> {
    let (world, a, _) = homes()?;
    world.done(&a, "laptop", &["init", &world.address])?;
    let path = config_file(&world, "laptop")?;
    let before = std::fs::read_to_string(&path)?;
    let wrong = format!("{before}\nsevers = []\n");
    std::fs::write(&path, &wrong)?;
    let line = format!("line {}", wrong.lines().count());
    let shown = path.to_str().context("UTF-8")?;
    for arguments in [&["listen", "--echo"][..], &["id"], &["init", &world.address]] {
        failed(&world.run(&a, "laptop", arguments)?, 1, &[shown, &line, "severs"])?;
    }
    ensure!(std::fs::read_to_string(&path)? == wrong, "the file was changed");
    Ok(())
}

fn names_that_nobody_has() -> anyhow::Result<()> {
    let (world, a, _) = homes()?;
    world.done(&a, "laptop", &["init", &world.address])?;
    let run = |arguments: &[&str]| world.run(&a, "laptop", arguments);
    failed(&run(&["connect", "nas"])?, 2, &["no peer with the alias nas", "peer alias nas PEER"])?;
    failed(&run(&["ping", "no such thing"])?, 2, &["neither an alias"])?;
    failed(&run(&["connect", &"a".repeat(51)])?, 2, &["52 characters"])?;
    failed(&run(&["trust", "rvt1qqqqqqqqqq"])?, 2, &["checksum"])?;
    failed(&run(&["init", "http://vps.example"])?, 2, &["rv://"])?;
    failed(&run(&["untrust", "nas"])?, 2, &["alias nas"])?;
    failed(&run(&["invite", "--withdraw", "12345678"])?, 2, &["12345678", "peer list"])?;
    let id = world.done(&a, "laptop", &["id"])?;
    failed(&run(&["alias", "anyone", &id])?, 2, &["anyone"])?;
    world.done(&a, "laptop", &["alias", "me", &id])?;
    let other = "aebagbafaydqqcikbmga2dqpcaireeyuculbogazdinryhi6d4qa";
    failed(&run(&["alias", "me", other])?, 2, &["me is taken", &id])
}

fn what_may_not_be_written() -> anyhow::Result<()> {
    let (world, a, _) = homes()?;
    // Somebody without rights in a place that is somebody else's.
    let place = tempfile::tempdir()?;
    let home = place.path().join("home");
    std::fs::create_dir(&home)?;
    std::fs::set_permissions(&home, std::os::unix::fs::PermissionsExt::from_mode(0o500))?;
    let mut command = a.command("setpriv");
    command
        .args(["--bounding-set=-all", "--inh-caps=-all"])
        .arg(binary("peer")?)
        .args(["init", &world.address]);
    command.env("XDG_CONFIG_HOME", &home).env("XDG_DATA_HOME", &home).env("XDG_STATE_HOME", &home);
    failed(&command.output()?, 1, &[home.to_str().context("UTF-8")?, "ermission denied"])
}
