//! The commands as a person meets them: what they print, how they fail, how they end.

use std::io::{Read as _, Write as _};

use anyhow::{Context as _, ensure};
use end_to_end::process::{PATIENCE, Program};
use end_to_end::world::World;
use libtest_mimic::Trial;
use netsim::{RouterKind, SiteConfig};
use nix::sys::signal::Signal;

use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("commands::an_offline_target_is_named", an_offline_target_is_named),
        trial("commands::a_peer_that_does_not_admit_us_looks_offline", not_admitted_looks_offline),
        trial("commands::a_server_with_another_key_is_refused", another_server_key),
        trial("commands::an_unreachable_server_is_named", an_unreachable_server_is_named),
        trial("commands::a_peer_does_not_dial_itself", a_peer_does_not_dial_itself),
        trial("commands::a_listener_pipes_both_ways", a_listener_pipes_both_ways),
        trial("commands::the_listener_may_speak_first", the_listener_may_speak_first),
        trial("commands::a_command_runs_for_every_session", a_command_runs_for_every_session),
        trial("commands::the_end_of_the_command_ends_the_dialler", the_end_of_the_command_ends_the_dialler),
        trial("commands::signals_end_every_program_cleanly", signals_end_every_program_cleanly),
        trial("commands::a_listener_comes_back_to_a_restarted_server", comes_back),
        trial("commands::a_session_outlives_the_server_once_direct", outlives_the_server),
    ]
}

fn world() -> anyhow::Result<(World, netsim::Host, netsim::Host)> {
    let mut world = World::new(2)?;
    let a = world.lab.add_site("a", SiteConfig::new(RouterKind::EimApdf))?;
    let b = world.lab.add_site("b", SiteConfig::new(RouterKind::EimApdf))?;
    Ok((world, a.host(0), b.host(0)))
}

/// The program must fail with this code, and its message must hold all of `words`.
fn fails(program: &mut Program, code: i32, words: &[&str]) -> anyhow::Result<()> {
    let error = program.named("error")?;
    let message = error["message"].as_str().context("a message")?;
    for word in words {
        ensure!(message.contains(word), "no {word:?} in {message:?}");
    }
    let status = program.wait(PATIENCE)?;
    ensure!(status.code() == Some(code), "{status} with {message:?}");
    Ok(())
}

const NOBODY: &str = "aebagbafaydqqcikbmga2dqpcaireeyuculbogazdinryhi6d4qa";

fn an_offline_target_is_named() -> anyhow::Result<()> {
    let (world, a, _) = world()?;
    fails(&mut world.peer(&a, "a", &["connect", NOBODY])?, 4, &[NOBODY, "not online", "peer listen"])
}

fn not_admitted_looks_offline() -> anyhow::Result<()> {
    let (world, a, b) = world()?;
    let (_listening, id) = world.listener(&b, "b", &["--echo", "--allow", NOBODY])?;
    fails(&mut world.peer(&a, "a", &["connect", &id])?, 4, &[&id, "not online", "does not accept you"])
}

fn another_server_key() -> anyhow::Result<()> {
    let (world, a, _) = world()?;
    let (_, place) = world.address.split_once('@').context("an address with @")?;
    let wrong = format!("rv://{NOBODY}@{place}");
    let mut peer = world.peer_with_server(&a, "a", &wrong, &["connect", NOBODY])?;
    fails(&mut peer, 3, &["another key", NOBODY])
}

fn an_unreachable_server_is_named() -> anyhow::Result<()> {
    let (world, a, b) = world()?;
    let nobody_there = format!("rv://{NOBODY}@{}", b.reflexive_ipv4());
    let mut peer = world.peer_with_server(&a, "a", &nobody_there, &["listen", "--echo"])?;
    fails(&mut peer, 3, &["no answer", &b.reflexive_ipv4().to_string(), "UDP port 443"])
}

fn a_peer_does_not_dial_itself() -> anyhow::Result<()> {
    let (world, a, _) = world()?;
    let (_listening, id) = world.listener(&a, "a", &["--echo"])?;
    fails(&mut world.peer(&a, "a", &["connect", &id])?, 1, &["itself"])
}

fn a_listener_pipes_both_ways() -> anyhow::Result<()> {
    let (world, a, b) = world()?;
    let (mut listener, id) = world.listener(&b, "b", &[])?;
    let mut peer = world.peer(&a, "a", &["connect", &id])?;
    peer.stdin()?.write_all(b"from the dialler")?;
    listener.stdin()?.write_all(b"from the listener")?;
    let (mut at_listener, mut at_peer) = (String::new(), String::new());
    listener.stdout()?.read_to_string(&mut at_listener)?;
    peer.stdout()?.read_to_string(&mut at_peer)?;
    ensure!(
        at_listener == "from the dialler" && at_peer == "from the listener",
        "{at_listener:?} {at_peer:?}"
    );
    ensure!(peer.wait(PATIENCE)?.success() && listener.wait(PATIENCE)?.success());
    Ok(())
}

fn the_listener_may_speak_first() -> anyhow::Result<()> {
    let (world, a, b) = world()?;
    let (mut listener, id) = world.listener(&b, "b", &[])?;
    let mut peer = world.peer(&a, "a", &["connect", &id])?;
    let mut to_listener = listener.stdin()?;
    to_listener.write_all(b"welcome")?;
    let mut from_peer = peer.stdout()?;
    let mut heard = [0; 7];
    from_peer.read_exact(&mut heard)?;
    ensure!(&heard == b"welcome");
    Ok(())
}

fn a_command_runs_for_every_session() -> anyhow::Result<()> {
    let (world, a, b) = world()?;
    let (_listening, id) = world.listener(&b, "b", &["--", "tr", "a-z", "A-Z"])?;
    for text in ["one", "two"] {
        let mut peer = world.peer(&a, "a", &["connect", &id])?;
        peer.stdin()?.write_all(text.as_bytes())?;
        let mut heard = String::new();
        peer.stdout()?.read_to_string(&mut heard)?;
        ensure!(heard == text.to_uppercase(), "{heard:?}");
        ensure!(peer.wait(PATIENCE)?.success());
    }
    Ok(())
}

fn the_end_of_the_command_ends_the_dialler() -> anyhow::Result<()> {
    let (world, a, b) = world()?;
    let (_listening, id) = world.listener(&b, "b", &["--", "echo", "done"])?;
    let mut peer = world.peer(&a, "a", &["connect", &id])?;
    // Held open, as a terminal would be.
    let _stdin = peer.stdin()?;
    let mut heard = String::new();
    peer.stdout()?.read_to_string(&mut heard)?;
    ensure!(heard == "done\n", "{heard:?}");
    ensure!(peer.wait(PATIENCE)?.success());
    Ok(())
}

fn signals_end_every_program_cleanly() -> anyhow::Result<()> {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let (mut world, a, b) = world()?;
        let (mut listener, id) = world.listener(&b, "b", &["--echo"])?;
        let mut peer = world.peer(&a, "a", &["connect", &id])?;
        peer.named("connected")?;
        peer.signal(signal)?;
        let status = peer.wait(PATIENCE)?;
        ensure!(status.code() == Some(130), "connect: {status}");
        // The other side hears of it and goes on.
        listener.named("closed")?;
        listener.signal(signal)?;
        let status = listener.wait(PATIENCE)?;
        ensure!(status.code() == Some(0), "listen: {status}");
        world.server.signal(signal)?;
        let status = world.server.wait(PATIENCE)?;
        ensure!(status.code() == Some(0), "serve: {status}");
    }
    Ok(())
}

fn comes_back() -> anyhow::Result<()> {
    let (mut world, a, b) = world()?;
    let (_listening, id) = world.listener(&b, "b", &["--echo"])?;
    world.restart_server()?;
    // Noticed with the next keep-alive at the relay, within 15 s.
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        let mut peer = world.peer(&a, "a", &["connect", &id])?;
        peer.stdin()?.write_all(b"back?")?;
        let mut heard = String::new();
        peer.stdout()?.read_to_string(&mut heard)?;
        match peer.wait(PATIENCE)?.code() {
            Some(0) => {
                ensure!(heard == "back?", "{heard:?}");
                return Ok(());
            }
            Some(4) => ensure!(std::time::Instant::now() < deadline, "not back in {PATIENCE:?}"),
            other => anyhow::bail!("exit code {other:?}"),
        }
    }
}

fn outlives_the_server() -> anyhow::Result<()> {
    let (mut world, a, b) = world()?;
    let (_listening, id) = world.listener(&b, "b", &["--echo"])?;
    let mut peer = world.peer(&a, "a", &["connect", &id])?;
    peer.event(|event| event["path"] == "direct", PATIENCE)?;
    world.server.signal(Signal::SIGKILL)?;
    world.server.wait(PATIENCE)?;
    peer.stdin()?.write_all(b"still there")?;
    let mut heard = String::new();
    peer.stdout()?.read_to_string(&mut heard)?;
    ensure!(heard == "still there" && peer.wait(PATIENCE)?.success());
    Ok(())
}
