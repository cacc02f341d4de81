//! The examples of the library, as the first lines of each say, between two homes.

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail, ensure};
use end_to_end::process::binary;
use end_to_end::world::World;
use libtest_mimic::Trial;
use netsim::{Host, HostChild};
use tempfile::TempDir;

use crate::setup::homes;
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("library::every_example_does_what_its_head_says", every_example),
        trial("library::another_protocol_fails_in_the_handshake", another_protocol),
    ]
}

/// The command lines in the first lines of an example: what is behind `cargo run --example NAME --`, without comments.
fn command_lines(source: &str, name: &str) -> Vec<String> {
    let start = format!("//!     cargo run --example {name} -- ");
    let lines = source.lines().filter_map(|line| line.strip_prefix(&start));
    lines.map(|line| line.split('#').next().unwrap_or_default().trim().to_owned()).collect()
}

/// Where `cargo test` has built it.
fn example(name: &str) -> anyhow::Result<PathBuf> {
    let programs = binary("peer")?;
    let path = programs.with_file_name("examples").join(name);
    ensure!(path.is_file(), "the example {name} is not built: run `cargo build -p peer --examples` first");
    Ok(path)
}

/// The side that waits: its id comes first.
fn waits(
    host: &Host,
    name: &str,
    arguments: &[String],
    folder: &Path,
) -> anyhow::Result<(HostChild, String)> {
    let mut command = host.command(example(name)?);
    command.args(arguments).current_dir(folder).stdout(Stdio::piped());
    let mut child = command.spawn()?;
    let mut output = BufReader::new(child.stdout.take().context("standard output is piped")?);
    let mut id = String::new();
    output.read_line(&mut id)?;
    std::thread::spawn(move || output.read_to_end(&mut Vec::new()));
    Ok((child, id.trim().to_owned()))
}

fn calls(host: &Host, name: &str, arguments: &[String], folder: &Path) -> anyhow::Result<Output> {
    Ok(host.command(example(name)?).args(arguments).current_dir(folder).output()?)
}

/// With the server and the peer in place of what stands for them.
fn words(world: &World, line: &str, id: &str) -> Vec<String> {
    let word = |word: &str| match word {
        "rv://…" => world.address.clone(),
        "PEER" => id.to_owned(),
        word => word.to_owned(),
    };
    line.split_whitespace().map(word).collect()
}

fn every_example() -> anyhow::Result<()> {
    let (world, a, b) = homes()?;
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../peer/examples");
    let mut count = 0;
    for entry in std::fs::read_dir(sources)? {
        let path = entry?.path();
        let name = path.file_stem().and_then(|name| name.to_str()).context("UTF-8")?;
        run(&world, &a, &b, name, &std::fs::read_to_string(&path)?)
            .with_context(|| format!("the example {name}"))?;
        count += 1;
    }
    ensure!(count >= 4, "{count} examples");
    Ok(())
}

fn run(world: &World, a: &Host, b: &Host, name: &str, source: &str) -> anyhow::Result<()> {
    let lines = command_lines(source, name);
    let [waiting, calling] = lines.as_slice() else { bail!("its head names {} command lines", lines.len()) };
    let (here, there) = (TempDir::new()?, TempDir::new()?);
    std::fs::create_dir(here.path().join("photos"))?;
    for file in ["photos/one.jpg", "report.pdf"] {
        std::fs::write(here.path().join(file), format!("this is {file}"))?;
    }
    let (_waits, id) = waits(b, name, &words(world, waiting, ""), there.path())?;
    let output = calls(a, name, &words(world, calling, &id), here.path())?;
    let (printed, said) = (String::from_utf8(output.stdout)?, String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{}: {said}", output.status);
    match name {
        "echo" => ensure!(printed == "hello\n", "{printed:?}"),
        "http" => ensure!(printed.starts_with("well, and you, "), "{printed:?}"),
        "custom_alpn" => {
            let there: u64 = printed.trim().parse()?;
            let here = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
            ensure!(here.abs_diff(there) < 600, "{printed:?} is not the time");
        }
        "file_transfer" => {
            ensure!(printed.contains("bytes were carried"), "{printed:?}");
            let arrived = std::fs::read_to_string(there.path().join("incoming/photos/one.jpg"))?;
            ensure!(arrived == "this is photos/one.jpg", "{arrived:?}");
        }
        _ => bail!("nothing proves that it does what it says: teach tests/lab/library.rs"),
    }
    Ok(())
}

fn another_protocol() -> anyhow::Result<()> {
    let (world, a, b) = homes()?;
    let folder = TempDir::new()?;
    let (_waits, id) = waits(&b, "custom_alpn", std::slice::from_ref(&world.address), folder.path())?;
    let output = calls(&a, "echo", &words(&world, "rv://… PEER hello", &id), folder.path())?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && output.stdout.is_empty(), "they understood each other: {said}");
    ensure!(said.contains("handshake") || said.contains("Handshake"), "{said}");
    Ok(())
}
