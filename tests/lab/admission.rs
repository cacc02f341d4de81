//! What people see of a server's admission, from a peer's side.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use end_to_end::process::{PATIENCE, binary};
use end_to_end::world::World;
use libtest_mimic::Trial;
use netsim::{Host, RouterKind, SiteConfig};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("admission::a_token_lets_in_and_a_ban_puts_out", || token_and_ban(RouterKind::EimApdf)),
        trial("admission::the_same_over_tcp", || token_and_ban(RouterKind::UdpBlocked)),
        trial("admission::peers_work_in_a_flood_of_newcomers", peers_work),
    ]
}

/// A server with this configuration, and a home.
fn world(kind: RouterKind, config: &str) -> anyhow::Result<(World, Host)> {
    let mut world = World::new(6)?;
    world.configure_server(config)?;
    let a = world.lab.add_site("a", SiteConfig::new(kind))?;
    Ok((world, a.host(0)))
}

/// A command to the running server; its answer.
fn ask(world: &World, arguments: &[&str]) -> anyhow::Result<Value> {
    let mut command = world.server_host.command(binary("rendezvous")?);
    let output =
        command.args(arguments).arg("--json").arg("--state-dir").arg(world.server_state()).output()?;
    ensure!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn token_and_ban(kind: RouterKind) -> anyhow::Result<()> {
    let (world, a) = world(kind, "[admission]\nmode = \"token\"\n")?;
    let address = world.address.clone();
    world.done(&a, "one", &["init", &address])?;
    let refused = world.run(&a, "one", &["listen", "--echo"])?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(!refused.status.success() && said.contains("token") && said.contains("peer init"), "{said}");

    let made = ask(&world, &["token", "new"])?;
    let token = made["token"]["token"].as_str().context("a token")?;
    let with_token = format!("{address}#{token}");
    world.done(&a, "one", &["init", &with_token])?;
    let mut listener = world.person(&a, "one", &["listen", "--echo"])?;
    let id = listener.named("listening")?["id"].as_str().context("an id")?.to_owned();
    let peers = ask(&world, &["peers"])?;
    ensure!(peers["peers"][0]["peer"] == id.as_str(), "{peers}");

    world.done(&a, "two", &["init", &with_token])?;
    let late = world.run(&a, "two", &["listen", "--echo"])?;
    let said = String::from_utf8_lossy(&late.stderr);
    ensure!(!late.status.success() && said.contains("used up"), "{said}");

    ask(&world, &["ban", &id, "--reason", "too loud"])?;
    let lost = |event: &Value| event["event"] == "server" && event["state"] == "lost";
    listener.event(lost, PATIENCE)?;
    ensure!(ask(&world, &["peers"])?["peers"] == json!([]), "it is there still");
    let banned = world.run(&a, "one", &["ping", &id])?;
    let said = String::from_utf8_lossy(&banned.stderr);
    ensure!(!banned.status.success() && said.contains("too loud"), "{said}");
    ask(&world, &["unban", &id])?;
    // It comes back by itself, with no need for the token, which is spent.
    let deadline = Instant::now() + PATIENCE * 2;
    while ask(&world, &["peers"])?["peers"][0]["peer"] != id.as_str() {
        ensure!(Instant::now() < deadline, "it is not back");
        std::thread::sleep(Duration::from_millis(200));
    }
    listener.signal(Signal::SIGTERM)?;
    listener.wait(PATIENCE)?;
    Ok(())
}

fn peers_work() -> anyhow::Result<()> {
    let config = "[admission]\nwork_above = 1\nwork_bits = 12\nwork_most_bits = 14\n";
    let (world, a) = world(RouterKind::EimApdf, config)?;
    // Newcomers are counted over ten seconds: the eleventh has to work, where they come within a second or two; on a busy machine a later one.
    for number in 0..60 {
        let (program, _) = world.listener(&a, &format!("key-{number}"), &["--echo"])?;
        drop(program);
        let stats = ask(&world, &["stats"])?;
        if stats["stats"]["challenged"].as_u64() > Some(1) {
            return Ok(());
        }
    }
    anyhow::bail!("sixty newcomers, and nobody was asked for work")
}
