//! A host moves to another router while a session runs: new address, another NAT, the same QUIC connection.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use end_to_end::process::PATIENCE;
use end_to_end::pulse::Pulse;
use end_to_end::world::{SITE_DELAY, World};
use libtest_mimic::Trial;
use netsim::{Host, RouterKind, Site, SiteConfig};
use nix::sys::signal::Signal;

use crate::trial;

/// The longest time between two echoes that a move may cost, on a machine that is busy with other tests. On one that is not it is a fifth of a second; the
/// tests print it.
const GAP: Duration = Duration::from_secs(3);

/// After so long it must be as if nothing had happened.
const UNDISTURBED: Duration = Duration::from_secs(4);

pub(crate) fn trials() -> Vec<Trial> {
    use Side::{Dialler, Listener};
    vec![
        trial("roaming::ten_moves_of_the_dialler", || moves(&[Dialler], 10)),
        trial("roaming::moves_of_the_listener", || moves(&[Listener], 4)),
        trial("roaming::both_move_at_the_same_moment", || moves(&[Dialler, Listener], 4)),
        trial("roaming::the_dialler_sleeps", || sleeps(&[Dialler])),
        trial("roaming::the_listener_sleeps", || sleeps(&[Listener])),
        trial("roaming::both_sleep", || sleeps(&[Dialler, Listener])),
    ]
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Dialler,
    Listener,
}

/// How long a process is stopped. `make sleep` has it stopped for ten minutes.
fn slumber() -> anyhow::Result<Duration> {
    let seconds = std::env::var("LAB_SLEEP_SECONDS").map_or(Ok(30), |text| text.parse())?;
    Ok(Duration::from_secs(seconds))
}

/// A process that is stopped and goes on is to the rest of the world what a machine is whose lid is closed and opened.
fn sleeps(sides: &[Side]) -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let dialler = site(&mut world, "a", RouterKind::EimApdf)?;
    let listener = site(&mut world, "b", RouterKind::EimApdf)?;
    let (listening, id) = world.listener(&listener.host(0), "b", &["--echo"])?;
    let peer = world.peer(&dialler.host(0), "a", &["connect", &id])?;
    let mut pulse = Pulse::start(peer)?;
    pulse.next_path("direct", PATIENCE)?;
    pulse.echo_after(Instant::now(), PATIENCE)?;
    pulse.peer.said();
    let signal = |pulse: &Pulse, signal| {
        sides.iter().try_for_each(|side| match side {
            Side::Dialler => pulse.peer.signal(signal),
            Side::Listener => listening.signal(signal),
        })
    };
    signal(&pulse, Signal::SIGSTOP)?;
    std::thread::sleep(slumber()?);
    let woken = Instant::now();
    signal(&pulse, Signal::SIGCONT)?;
    let heard = pulse.heard_after(woken + Duration::from_millis(1), PATIENCE)?;
    let echo = pulse.echo_after(woken, PATIENCE)?;
    eprintln!("{sides:?} slept: the first echo after {heard:?}, that of a new message after {echo:?}");
    ensure!(echo <= GAP, "no echo until {echo:?} after waking");
    pulse.next_path("direct", PATIENCE)?;
    pulse.finish(PATIENCE)?;
    Ok(())
}

fn site(world: &mut World, name: &str, kind: RouterKind) -> anyhow::Result<Site> {
    Ok(world.lab.add_site(name, SiteConfig::new(kind).delay(SITE_DELAY))?)
}

fn moves(sides: &[Side], times: usize) -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let mut hosts: Vec<(Host, Vec<Site>)> = Vec::new();
    for name in ["a", "b"] {
        let homes = [
            site(&mut world, name, RouterKind::EimApdf)?,
            site(&mut world, &format!("{name}-cafe"), RouterKind::EimAdf)?,
            site(&mut world, &format!("{name}-mobile"), RouterKind::CarrierEim)?,
        ];
        hosts.push((homes[0].host(0), homes.to_vec()));
    }
    let (_listening, id) = world.listener(&hosts[1].0, "b", &["--echo"])?;
    let peer = world.peer(&hosts[0].0, "a", &["connect", &id])?;
    let mut pulse = Pulse::start(peer)?;
    pulse.next_path("direct", PATIENCE)?;
    pulse.echo_after(Instant::now(), PATIENCE)?;
    for number in 1..=times {
        pulse.peer.said();
        let moment = Instant::now();
        let lab = &world.lab;
        std::thread::scope(|scope| {
            let moving = hosts.iter_mut().zip([Side::Dialler, Side::Listener]);
            let moving = moving.filter(|(_, side)| sides.contains(side)).map(|((host, homes), _)| {
                scope.spawn(move || {
                    *host = lab.move_host(host, &homes[number % homes.len()])?;
                    anyhow::Ok(())
                })
            });
            let moving: Vec<_> = moving.collect();
            moving.into_iter().try_for_each(|moved| match moved.join() {
                Ok(moved) => moved,
                Err(panic) => std::panic::resume_unwind(panic),
            })
        })?;
        let took = moment.elapsed();
        pulse.next_path("direct", PATIENCE).with_context(|| format!("after move {number}"))?;
        let direct = moment.elapsed();
        pulse.echo_after(Instant::now() + Duration::from_millis(800), PATIENCE)?;
        let (gap, undisturbed) = (pulse.longest_gap(moment)?, pulse.undisturbed_after(moment));
        eprintln!(
            "move {number} took {took:?}: gap {gap:?}, undisturbed after {undisturbed:?}, direct after {direct:?}"
        );
        ensure!(gap <= GAP + took, "move {number}: a gap of {gap:?}");
        ensure!(undisturbed <= UNDISTURBED + took, "move {number}: undisturbed only after {undisturbed:?}");
    }
    pulse.finish(PATIENCE)?;
    Ok(())
}
