//! Transfers across a change of path: nothing lost, nothing repeated, one connection.

use anyhow::{Context as _, ensure};
use end_to_end::data::{consume, produce};
use end_to_end::process::{PATIENCE, Program};
use end_to_end::world::{SITE_DELAY, World};
use libtest_mimic::Trial;
use netsim::{RouterKind, SiteConfig};

use crate::trial;

/// Enough that the path changes long before the end.
const LENGTH: u64 = 200_000_000;

/// 200 MB at 20 Mbit/s: far slower than the lab is even on a busy machine.
const TRANSFER_PATIENCE: std::time::Duration = std::time::Duration::from_secs(80);

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("transfer::upload_of_200_mb_moves_to_the_direct_path", || transfer(true)),
        trial("transfer::download_of_200_mb_moves_to_the_direct_path", || transfer(false)),
    ]
}

fn transfer(upload: bool) -> anyhow::Result<()> {
    let mut world = World::new(3)?;
    let config = || SiteConfig::new(RouterKind::EimApdf).delay(SITE_DELAY);
    let a = world.lab.add_site("a", config())?.host(0);
    let b = world.lab.add_site("b", config())?.host(0);
    let (mut listener, id) = world.listener(&b, "b", &[])?;
    let mut peer = world.peer(&a, "a", &["connect", &id])?;
    let (from, to): (&mut Program, &mut Program) =
        if upload { (&mut peer, &mut listener) } else { (&mut listener, &mut peer) };
    let (mut input, mut output) = (from.stdin()?, to.stdout()?);
    // The other direction ends at once.
    drop(to.stdin()?);
    let writer = std::thread::spawn(move || produce(3, LENGTH, &mut input));
    let (length, received) = consume(&mut output)?;
    let sent = writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
    ensure!(length == LENGTH, "{length} bytes arrived");
    ensure!(received == sent, "other bytes arrived than were sent");
    ensure!(peer.wait(TRANSFER_PATIENCE)?.success());
    listener.wait(PATIENCE)?;
    for (side, program) in [("dialler", &mut peer), ("listener", &mut listener)] {
        let said = program.said();
        let index = |wanted: &dyn Fn(&serde_json::Value) -> bool| said.iter().position(wanted);
        let relayed = index(&|event| event["event"] == "path" && event["path"] == "relayed");
        let direct = index(&|event| event["event"] == "path" && event["path"] == "direct");
        let closed = index(&|event| event["event"] == "closed");
        // Whoever is dialled hears of the session with the end of the handshake; the path may be direct by then.
        let relayed = if side == "listener" { relayed.or(Some(0)) } else { relayed };
        let (relayed, direct, closed) = (
            relayed.with_context(|| format!("{side}: never relayed: {said:?}"))?,
            direct.with_context(|| format!("{side}: never direct: {said:?}"))?,
            closed.with_context(|| format!("{side}: not closed: {said:?}"))?,
        );
        ensure!(relayed < direct && direct < closed, "{side}: {said:?}");
        let connections = said.iter().filter(|event| event["event"] == "connected").count();
        ensure!(connections == 1, "{side}: {connections} connections");
    }
    Ok(())
}
