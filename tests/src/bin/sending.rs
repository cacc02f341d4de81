//! File transfers against what they are made of, interleaved in one run and with the programs that people use: one large file against `peer bench`, and
//! many small files against `tar | peer connect`. Both sides are on one host, and by default all files in memory.

#![forbid(unsafe_code)]

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::{Parser, ValueEnum};
use end_to_end::data::produce;
use end_to_end::figures::Figures;
use end_to_end::process::{PATIENCE, Program, binary};
use end_to_end::world::World;
use netsim::{Host, RouterKind, SiteConfig};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::signal::Signal;
use nix::sys::time::TimeVal;
use serde_json::Value;
use tempfile::TempDir;

/// Files against `peer bench` and `tar`, interleaved.
#[derive(Debug, Parser)]
struct Arguments {
    /// Transfers of each kind.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Megabytes of the large file.
    #[arg(long, default_value_t = 1000)]
    megabytes: u64,
    /// Small files.
    #[arg(long, default_value_t = 10_000)]
    files: usize,
    /// Seconds of each `peer bench`.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Where the files are: better a tmpfs, or the disk is what is measured.
    #[arg(long, default_value = "/dev/shm")]
    folder: PathBuf,
    /// Only this part.
    #[arg(long, value_enum)]
    only: Option<Part>,
    /// Fail when a median is under its bound, not only when a run goes wrong.
    #[arg(long)]
    strict: bool,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// One large file.
    Large,
    /// Many small ones.
    Small,
}

const PATIENCE_FOR_BULK: Duration = Duration::from_secs(180);

/// One host with both sides on it: the direct path is its loopback.
struct Home {
    world: World,
    host: Host,
    id: String,
}

impl Home {
    fn new() -> anyhow::Result<Self> {
        let mut world = World::new(1)?;
        let host = world.lab.add_site("a", SiteConfig::new(RouterKind::Public))?.host(0);
        let mut command = host.command(binary("peer")?);
        let output = command.args(["id", "--key"]).arg(world.key("a")).output()?;
        let id = String::from_utf8(output.stdout)?.trim().to_owned();
        Ok(Self { world, host, id })
    }

    /// The side that waits, ready; its id.
    fn waiting(&self, event: &str, arguments: &[&str]) -> anyhow::Result<(Program, String)> {
        let all = [&arguments[..1], &["--no-port-mapping"], &arguments[1..]].concat();
        let mut program = self.world.peer(&self.host, "b", &all)?;
        let id = program.named(event)?["id"].as_str().context("an id")?.to_owned();
        Ok((program, id))
    }

    fn dialling(&self, arguments: &[&str]) -> anyhow::Result<Program> {
        let all = [&arguments[..1], &["--no-port-mapping"], &arguments[1..]].concat();
        self.world.peer(&self.host, "a", &all)
    }

    /// Goodput in bits per second, and CPU seconds of both sides per gigabyte.
    fn by_bench(&self, seconds: f64) -> anyhow::Result<(f64, f64)> {
        let before = cpu_of_children()?;
        let (mut listener, id) = self.waiting("listening", &["listen", "--bench", "--allow", &self.id])?;
        let seconds = seconds.to_string();
        let mut bench = self.dialling(&["bench", "--direction", "up", "--seconds", &seconds, &id])?;
        let mut said = String::new();
        bench.stdout()?.read_to_string(&mut said)?;
        ensure!(bench.wait(PATIENCE)?.success(), "{said}");
        listener.signal(Signal::SIGTERM)?;
        listener.wait(PATIENCE)?;
        let measured: Value = serde_json::from_str(said.lines().last().context("figures")?)?;
        let up = &measured["up"];
        ensure!(up["path"] == "direct" && up["path_before"] == "direct", "{measured}");
        let rate = up["bits_per_second"].as_f64().context("a rate")?;
        let bytes = up["bytes"].as_f64().context("bytes")?;
        Ok((rate, (cpu_of_children()? - before) / (bytes / 1e9)))
    }

    /// The same for a file into an empty folder. The time is what the sender tells: from the session to the last word of the receiver, which has
    /// verified everything and has it on disk.
    fn by_send(&self, file: &Path, folder: &Path) -> anyhow::Result<(f64, f64)> {
        let before = cpu_of_children()?;
        let target = TempDir::new_in(folder)?;
        let to = target.path().to_str().context("a path in UTF-8")?;
        let (mut receiver, id) = self.waiting("receiving", &["receive", "--from", &self.id, to])?;
        let mut sender = self.dialling(&["send", file.to_str().context("a path in UTF-8")?, &id])?;
        let sent = sender.event(|event| event["event"] == "sent", PATIENCE_FOR_BULK)?;
        ensure!(sender.wait(PATIENCE)?.success() && receiver.wait(PATIENCE)?.success());
        ensure!(sent["direct"] == true, "{sent}");
        let bytes = std::fs::metadata(file)?.len() as f64;
        let seconds = sent["seconds"].as_f64().context("a time")?;
        Ok((bytes * 8.0 / seconds, (cpu_of_children()? - before) / (bytes / 1e9)))
    }

    /// A shell script on the host, with the program's path as `"$0"` and its arguments as `"$@"`.
    fn shell(&self, name: &str, script: &str, arguments: &[&str]) -> anyhow::Result<Program> {
        let key = self.world.key(name);
        let mut command = self.host.command("sh");
        command.args(["-c", script]).arg(binary("peer")?).args(arguments);
        command.env("PEER_SERVER", &self.world.address).env("PEER_KEY", &key);
        command.env("PEER_PORT_MAPPING", "false").envs(self.world.home(name)?);
        Program::of_command(command, script)
    }

    /// Seconds from the session to the last file in its place.
    fn tree_by_tar(&self, from: &Path, to: &Path) -> anyhow::Result<f64> {
        let (from, to) = (from.display(), to.display());
        let unpack =
            format!("\"$0\" \"$@\" < /dev/null | tar -C {to} -x && echo '{{\"event\":\"unpacked\"}}' >&2");
        let mut listener = self.shell("b", &unpack, &["listen", "--json"])?;
        let id = listener.named("listening")?["id"].as_str().context("an id")?.to_owned();
        let pack = format!("tar -C {from} -c tree | \"$0\" \"$@\"");
        let mut peer = self.shell("a", &pack, &["connect", "--json", &id])?;
        peer.event(|event| event["event"] == "connected", PATIENCE)?;
        let start = Instant::now();
        listener.event(|event| event["event"] == "unpacked", PATIENCE_FOR_BULK)?;
        let seconds = start.elapsed().as_secs_f64();
        ensure!(peer.wait(PATIENCE)?.success());
        Ok(seconds)
    }

    fn tree_by_send(&self, from: &Path, to: &Path) -> anyhow::Result<f64> {
        let to = to.to_str().context("a path in UTF-8")?;
        let (mut receiver, id) = self.waiting("receiving", &["receive", "--from", &self.id, to])?;
        let tree = from.join("tree");
        let mut peer = self.dialling(&["send", tree.to_str().context("a path in UTF-8")?, &id])?;
        peer.event(|event| event["event"] == "connected", PATIENCE)?;
        let start = Instant::now();
        receiver.event(|event| event["event"] == "received", PATIENCE_FOR_BULK)?;
        let seconds = start.elapsed().as_secs_f64();
        ensure!(peer.wait(PATIENCE)?.success());
        Ok(seconds)
    }
}

/// User and system time of programs that have run and ended.
fn cpu_of_children() -> anyhow::Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let seconds = |time: TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
}

/// Has the system find memory for a file: where it has to ask for it first, as in a virtual machine that gives back what it does not use, a first write
/// costs several times a second one.
fn warm(folder: &Path, bytes: u64) -> anyhow::Result<()> {
    let mut file = tempfile::tempfile_in(folder)?;
    std::io::copy(&mut std::io::repeat(0).take(bytes), &mut file)?;
    Ok(())
}

/// A large file against `peer bench`.
fn large(arguments: &Arguments) -> anyhow::Result<f64> {
    let home = Home::new()?;
    let folder = TempDir::new_in(&arguments.folder)?;
    let (file, bytes) = (folder.path().join("large"), arguments.megabytes * 1_000_000);
    produce(1, bytes, &mut std::fs::File::create(&file)?)?;
    let (mut transfers, mut benches) =
        ([Figures::default(), Figures::default()], [Figures::default(), Figures::default()]);
    let mut ratio = Figures::default();
    for run in 0..arguments.runs {
        let measure = |of_file: bool| {
            warm(folder.path(), bytes)?;
            if of_file { home.by_send(&file, folder.path()) } else { home.by_bench(arguments.seconds) }
        };
        // Each goes first in half of the runs.
        let first = measure(run % 2 == 0)?;
        let second = measure(run % 2 != 0)?;
        let (sent, bench) = if run % 2 == 0 { (first, second) } else { (second, first) };
        for (figures, (rate, cpu)) in [(&mut transfers, &sent), (&mut benches, &bench)] {
            figures[0].push(rate / 1e6);
            figures[1].push(*cpu);
        }
        ratio.push(sent.0 / bench.0);
    }
    println!(
        "\nOne file of {} MB in {}, {} of each in turn: median (least to greatest)",
        arguments.megabytes,
        arguments.folder.display(),
        arguments.runs
    );
    println!("  peer send    {:>24.0} Mbit/s   {:.3} CPU s/GB, both sides", transfers[0], transfers[1]);
    println!("  peer bench   {:>24.0} Mbit/s   {:.3} CPU s/GB, both sides", benches[0], benches[1]);
    println!("  send/bench  goodput {ratio:.3}");
    Ok(ratio.median())
}

/// A tree of small files: a few hundred bytes to a few kilobytes.
fn tree(top: &Path, count: usize) -> anyhow::Result<()> {
    for number in 0..count {
        let folder = top.join(format!("{:03}", number / 100));
        if number % 100 == 0 {
            std::fs::create_dir_all(&folder)?;
        }
        let mut file = std::fs::File::create(folder.join(format!("{number}.txt")))?;
        produce(number as u64, (number as u64 * 37) % 8000, &mut file)?;
    }
    Ok(())
}

/// Many small files against `tar`.
fn small(arguments: &Arguments) -> anyhow::Result<f64> {
    let home = Home::new()?;
    let folder = TempDir::new_in(&arguments.folder)?;
    tree(&folder.path().join("tree"), arguments.files)?;
    let (mut sent, mut packed, mut ratio) = (Figures::default(), Figures::default(), Figures::default());
    for run in 0..arguments.runs {
        let measure = |by_send: bool| -> anyhow::Result<f64> {
            let target = TempDir::new_in(&arguments.folder)?;
            let seconds = match by_send {
                true => home.tree_by_send(folder.path(), target.path())?,
                false => home.tree_by_tar(folder.path(), target.path())?,
            };
            let folders = std::fs::read_dir(target.path().join("tree"))?.count();
            ensure!(folders == arguments.files.div_ceil(100), "{folders} folders arrived");
            Ok(seconds)
        };
        let first = measure(run % 2 == 0)?;
        let second = measure(run % 2 != 0)?;
        let (send, tar) = if run % 2 == 0 { (first, second) } else { (second, first) };
        sent.push(arguments.files as f64 / send);
        packed.push(arguments.files as f64 / tar);
        ratio.push(tar / send);
    }
    println!(
        "\n{} files of 0 to 8 kB in {}, {} times each in turn: median (least to greatest)",
        arguments.files,
        arguments.folder.display(),
        arguments.runs
    );
    println!("  peer send           {sent:>24.0} files/s, verified");
    println!("  tar | peer connect  {packed:>24.0} files/s");
    println!("  send/tar  {ratio:.3}");
    Ok(ratio.median())
}

fn bench(arguments: &Arguments) -> anyhow::Result<bool> {
    let wanted = |part| arguments.only.is_none_or(|only| only == part);
    let mut results = Vec::new();
    if wanted(Part::Large) {
        results.push(("one large file, of the goodput of peer bench", large(arguments)?, 0.85));
    }
    if wanted(Part::Small) {
        results.push(("many small files, of tar", small(arguments)?, 0.5));
    }
    println!();
    for (what, value, bound) in &results {
        println!("  {} {what}: {value:.3}, at least {bound}", if value >= bound { "ok  " } else { "MISS" });
    }
    Ok(results.iter().all(|(_, value, bound)| value >= bound))
}

fn main() -> ExitCode {
    end_to_end::program::main("sending", |arguments: Arguments| Ok(bench(&arguments)? || !arguments.strict))
}
