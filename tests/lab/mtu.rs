//! Paths of different MTU beneath one transfer: the narrower one is no black hole.

use std::io::{Read as _, Write as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use end_to_end::process::{PATIENCE, Program};
use end_to_end::world::{SITE_DELAY, World};
use libtest_mimic::Trial;
use netsim::{Direction, RouterKind, SiteConfig};

use crate::trial;

/// Of the narrow path: what IPv6 asks of every link at least (RFC 8200, section 5).
const NARROW: u16 = 1280;

/// Bits per second of either home's line: less than a debug build can fill.
const RATE: u64 = 20_000_000;

/// The longest stall that a switch may cost on a machine that is busy with other tests; alone it is half a second at the most, and what is printed says
/// how long it was.
const MOST: Duration = Duration::from_secs(3);

/// How long each path is used.
const PHASE: Duration = Duration::from_secs(4);

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for (narrow, relay) in [("relay", true), ("direct_path", false)] {
        for (way, upload) in [("upload", true), ("download", false)] {
            let name = format!("mtu::{way}_over_a_{narrow}_of_{NARROW}_and_back");
            trials.push(trial(name, move || moves(relay, upload)));
        }
    }
    trials
}

/// When bytes came.
#[derive(Default)]
struct Arrivals(Mutex<Vec<(Instant, usize)>>);

impl Arrivals {
    fn note(&self, bytes: usize) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((Instant::now(), bytes));
    }

    /// The longest time without any, of which the end is within these bounds, and the bytes of that time.
    fn stall(&self, from: Instant, to: Instant) -> (Duration, usize) {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let within: Vec<_> = all.iter().filter(|(at, _)| (from..=to).contains(at)).collect();
        let mut last = all.iter().rfind(|(at, _)| *at < from).map_or(from, |(at, _)| *at);
        let moments = within.iter().map(|(at, _)| *at).chain([to]);
        let stall = moments.map(|at| at - std::mem::replace(&mut last, at)).max().unwrap_or_default();
        (stall, within.iter().map(|(_, bytes)| bytes).sum())
    }
}

fn moves(relay: bool, upload: bool) -> anyhow::Result<()> {
    let mut world = World::new(3)?;
    let config = || SiteConfig::new(RouterKind::EimApdf).delay(SITE_DELAY).rate(RATE);
    let (a, b) = (world.lab.add_site("a", config())?, world.lab.add_site("b", config())?);
    a.narrow((!relay).then_some(&b), NARROW)?;
    b.narrow((!relay).then_some(&a), NARROW)?;
    if !relay {
        // QUIC is to know the wide path first.
        a.cut_between(&b, Direction::Both)?;
    }
    let (mut listener, id) = world.listener(&b.host(0), "b", &[])?;
    let mut peer = world.peer(&a.host(0), "a", &["connect", &id])?;
    let (from, to): (&mut Program, &mut Program) =
        if upload { (&mut peer, &mut listener) } else { (&mut listener, &mut peer) };
    let (mut input, mut output) = (from.stdin()?, to.stdout()?);
    drop(to.stdin()?);
    let (stop, arrivals) = (Arc::new(AtomicBool::new(false)), Arc::new(Arrivals::default()));
    let (stopping, arriving) = (stop.clone(), arrivals.clone());
    let writer = std::thread::spawn(move || {
        let block = [7; 16 * 1024];
        let mut total = 0;
        while !stopping.load(Ordering::Relaxed) {
            input.write_all(&block)?;
            total += block.len();
        }
        Ok::<_, std::io::Error>(total)
    });
    let reader = std::thread::spawn(move || {
        let (mut block, mut total) = ([0; 64 * 1024], 0);
        loop {
            match output.read(&mut block)? {
                0 => return Ok::<_, std::io::Error>(total),
                count => {
                    arriving.note(count);
                    total += count;
                }
            }
        }
    });
    let direct = |peer: &mut Program, listener: &mut Program| {
        for program in [peer, listener] {
            program.event(|event| event["path"] == "direct", PATIENCE)?;
        }
        // QUIC has found the MTU of the path.
        std::thread::sleep(PHASE);
        anyhow::Ok(())
    };
    let leave = || {
        let cut = Instant::now();
        a.cut_between(&b, Direction::Both)?;
        std::thread::sleep(PHASE);
        anyhow::Ok(arrivals.stall(cut, Instant::now()))
    };
    let (away, over_the_relay, home) = if relay {
        direct(&mut peer, &mut listener)?;
        let (away, over_the_relay) = leave()?;
        let back = Instant::now();
        a.restore()?;
        std::thread::sleep(PHASE);
        (away, over_the_relay, arrivals.stall(back, Instant::now()).0)
    } else {
        std::thread::sleep(PHASE);
        let there = Instant::now();
        a.restore()?;
        direct(&mut peer, &mut listener)?;
        let (home, _) = arrivals.stall(there, Instant::now());
        let (away, over_the_relay) = leave()?;
        (away, over_the_relay, home)
    };
    stop.store(true, Ordering::Relaxed);
    let sent = writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
    let received = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
    ensure!(sent == received, "{received} of {sent} bytes arrived");
    ensure!(peer.wait(PATIENCE)?.success());
    let paths = peer.said().iter().filter(|event| event["event"] == "path");
    let paths: Vec<_> =
        paths.map(|event| event["path"].as_str().context("a path")).collect::<Result<_, _>>()?;
    let report = format!(
        "to the relay {away:?}, {over_the_relay} bytes; to the direct path {home:?}; {received} bytes; {paths:?}"
    );
    println!("{report}");
    ensure!(paths == ["relayed", "direct", "relayed", "direct"][..if relay { 4 } else { 3 }], "{report}");
    ensure!(away.max(home) <= MOST, "{report}");
    // A black hole carries nothing; how much of the line is used on a busy machine is another question.
    let least = (RATE / 8 / 32 * PHASE.as_secs()) as usize;
    ensure!(over_the_relay >= least && received >= 3 * least, "{report}");
    Ok(())
}
