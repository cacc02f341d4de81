//! File transfers against what they are made of, interleaved in one run: one large file against the raw goodput of the same kind of session, and many
//! small files against `tar | peer connect`. All files are in memory (a tmpfs), on both sides.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::Parser;
use end_to_end::bulk::{Cost, Place, close, cpu, session, transfer};
use end_to_end::data::produce;
use end_to_end::figures::Figures;
use end_to_end::process::{PATIENCE, Program, binary};
use end_to_end::world::World;
use netsim::{Host, RouterKind, SiteConfig};
use peer::transfer::{Consent, Manifest, Progress, Source, receive, send};
use tempfile::TempDir;

/// Files against streams, interleaved.
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
    /// Where the files are: better a tmpfs, or the disk is what is measured.
    #[arg(long, default_value = "/dev/shm")]
    folder: PathBuf,
    /// Fail when a median is over its bound, not only when a run goes wrong.
    #[arg(long)]
    strict: bool,
}

const PATIENCE_FOR_BULK: Duration = Duration::from_secs(180);

struct Willing;

impl Consent for Willing {
    async fn accept(&mut self, _: &Manifest) -> bool {
        true
    }

    async fn replace(&mut self, _: &[String]) -> bool {
        false
    }
}

/// Sends one file into an empty folder.
fn send_file(
    place: &Place,
    from: &peer::Session,
    to: &peer::Session,
    file: &Path,
    folder: &Path,
) -> anyhow::Result<Cost> {
    let (from, to, source) = (from.clone(), to.clone(), Source::collect(&[file.to_owned()])?);
    let target = TempDir::new_in(folder)?;
    let path = target.path().to_owned();
    let (start, cpu_start) = (Instant::now(), cpu()?);
    let receiving = place.runtimes[1].spawn(async move {
        let (writing, mut reading) = to.accept_bi().await?;
        reading.read_exact(&mut [0]).await?;
        let received = receive(writing, reading, &path, &mut Willing, &Arc::<Progress>::default()).await?;
        anyhow::Ok((received.received, Instant::now()))
    });
    let sending = place.runtimes[0].spawn(async move {
        let (mut writing, reading) = from.open_bi().await?;
        writing.write_all(&[0]).await?;
        send(writing, reading, &source, &Arc::<Progress>::default()).await?;
        anyhow::Ok(())
    });
    let patiently = |task| async move { tokio::time::timeout(PATIENCE_FOR_BULK, task).await };
    let (received, end) = place.runtimes[1].block_on(patiently(receiving))???;
    let patiently = |task| async move { tokio::time::timeout(PATIENCE_FOR_BULK, task).await };
    place.runtimes[0].block_on(patiently(sending))???;
    ensure!(received == 1, "{received} files");
    Ok(Cost { seconds: (end - start).as_secs_f64(), cpu: cpu()? - cpu_start })
}

/// A large file against a stream.
fn large(arguments: &Arguments) -> anyhow::Result<f64> {
    let place = Place::new(RouterKind::Public, Duration::ZERO)?;
    let folder = TempDir::new_in(&arguments.folder)?;
    let (file, bytes) = (folder.path().join("large"), arguments.megabytes * 1_000_000);
    produce(1, bytes, &mut std::fs::File::create(&file)?)?;
    let (mut files, mut streams) =
        ([Figures::default(), Figures::default()], [Figures::default(), Figures::default()]);
    let mut ratio = Figures::default();
    for run in 0..arguments.runs {
        let measure = |of_file: bool| -> anyhow::Result<Cost> {
            let (dialled, accepted, endpoints) = session(&place, true)?;
            let cost = if of_file {
                send_file(&place, &dialled, &accepted, &file, folder.path())?
            } else {
                transfer(&place, &dialled, &accepted, bytes)?
            };
            close(&place, &dialled, endpoints)?;
            Ok(cost)
        };
        // Each goes first in half of the runs.
        let first = measure(run % 2 == 0)?;
        let second = measure(run % 2 != 0)?;
        let (sent, raw) = if run % 2 == 0 { (first, second) } else { (second, first) };
        for (figures, cost) in [(&mut files, &sent), (&mut streams, &raw)] {
            figures[0].push(bytes as f64 * 8e-6 / cost.seconds);
            figures[1].push(cost.cpu / (bytes as f64 / 1e9));
        }
        ratio.push(raw.seconds / sent.seconds);
    }
    println!(
        "\nOne file of {} MB, {} of each in turn: median (least to greatest)",
        arguments.megabytes, arguments.runs
    );
    println!("  transfer     {:>24.0} Mbit/s   {:.3} CPU s/GB", files[0], files[1]);
    println!("  raw stream   {:>24.0} Mbit/s   {:.3} CPU s/GB", streams[0], streams[1]);
    println!("  transfer/raw  goodput {ratio:.3}");
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

struct Homes {
    world: World,
    a: Host,
    b: Host,
}

impl Homes {
    /// A shell script in a host, with the program's arguments but for the last of them as `"$@"`.
    fn shell(&self, host: &Host, name: &str, script: &str, arguments: &[&str]) -> anyhow::Result<Program> {
        let key = self.world.key(name);
        let mut command = host.command("sh");
        command.args(["-c", script]).arg(binary("peer")?).args(arguments);
        command.env("PEER_SERVER", &self.world.address).env("PEER_KEY", &key);
        Program::of_command(command, script)
    }

    /// Seconds from the session to the last file in its place.
    fn by_tar(&self, from: &Path, to: &Path) -> anyhow::Result<f64> {
        let (from, to) = (from.display(), to.display());
        let unpack =
            format!("\"$0\" \"$@\" < /dev/null | tar -C {to} -x && echo '{{\"event\":\"unpacked\"}}' >&2");
        let mut listener = self.shell(&self.b, "b", &unpack, &["listen", "--json"])?;
        let id = listener.named("listening")?["id"].as_str().context("an id")?.to_owned();
        let pack = format!("tar -C {from} -c tree | \"$0\" \"$@\"");
        let mut peer = self.shell(&self.a, "a", &pack, &["connect", "--json", &id])?;
        peer.event(|event| event["path"] == "direct" || event["event"] == "connected", PATIENCE)?;
        let start = Instant::now();
        listener.event(|event| event["event"] == "unpacked", PATIENCE_FOR_BULK)?;
        let seconds = start.elapsed().as_secs_f64();
        ensure!(peer.wait(PATIENCE)?.success());
        Ok(seconds)
    }

    fn by_send(&self, from: &Path, to: &Path, sender: &str) -> anyhow::Result<f64> {
        let to = to.to_str().context("a path in UTF-8")?;
        let run = "exec \"$0\" \"$@\"";
        let mut receiver = self.shell(&self.b, "b", run, &["receive", "--json", "--from", sender, to])?;
        let id = receiver.named("receiving")?["id"].as_str().context("an id")?.to_owned();
        let tree = from.join("tree");
        let tree = tree.to_str().context("a path in UTF-8")?;
        let mut peer = self.shell(&self.a, "a", run, &["send", "--json", tree, &id])?;
        peer.event(|event| event["event"] == "connected", PATIENCE)?;
        let start = Instant::now();
        receiver.event(|event| event["event"] == "received", PATIENCE_FOR_BULK)?;
        let seconds = start.elapsed().as_secs_f64();
        ensure!(peer.wait(PATIENCE)?.success());
        Ok(seconds)
    }
}

/// Many small files against `tar`.
fn small(arguments: &Arguments) -> anyhow::Result<f64> {
    let mut world = World::new(1)?;
    let a = world.lab.add_site("a", SiteConfig::new(RouterKind::Public))?.host(0);
    let b = world.lab.add_site("b", SiteConfig::new(RouterKind::Public))?.host(0);
    let homes = Homes { world, a, b };
    let folder = TempDir::new_in(&arguments.folder)?;
    tree(&folder.path().join("tree"), arguments.files)?;
    let mut output = homes.a.command(binary("peer")?);
    let output = output.args(["id", "--key"]).arg(homes.world.key("a")).output()?;
    let sender = String::from_utf8(output.stdout)?.trim().to_owned();
    let (mut sent, mut packed, mut ratio) = (Figures::default(), Figures::default(), Figures::default());
    for run in 0..arguments.runs {
        let measure = |by_send: bool| -> anyhow::Result<f64> {
            let target = TempDir::new_in(&arguments.folder)?;
            let seconds = match by_send {
                true => homes.by_send(folder.path(), target.path(), &sender)?,
                false => homes.by_tar(folder.path(), target.path())?,
            };
            let files = std::fs::read_dir(target.path().join("tree"))?.count();
            ensure!(files == arguments.files.div_ceil(100), "{files} folders arrived");
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
        "\n{} files of 0 to 8 kB, {} times each in turn: median (least to greatest)",
        arguments.files, arguments.runs
    );
    println!("  peer send           {sent:>24.0} files/s, verified");
    println!("  tar | peer connect  {packed:>24.0} files/s");
    println!("  send/tar  {ratio:.3}");
    Ok(ratio.median())
}

fn bench(arguments: &Arguments) -> anyhow::Result<bool> {
    let bounds = [
        ("one large file, of the raw goodput", large(arguments)?, 0.85),
        ("many small files, of tar", small(arguments)?, 0.5),
    ];
    println!();
    for (what, value, bound) in bounds {
        println!("  {} {what}: {value:.3}, at least {bound}", if value >= bound { "ok  " } else { "MISS" });
    }
    Ok(bounds.iter().all(|(_, value, bound)| value >= bound))
}

fn main() -> ExitCode {
    end_to_end::program::main("sending", |arguments: Arguments| Ok(bench(&arguments)? || !arguments.strict))
}
