//! `peer send` and `peer receive` between two homes: what arrives is what was sent, whatever happens on the way.

use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use end_to_end::data::{consume, produce};
use end_to_end::process::{PATIENCE, Program, binary};
use end_to_end::terminal::Terminal;
use end_to_end::world::World;
use libtest_mimic::Trial;
use netsim::{Direction, Host, RouterKind, Site, SiteConfig};
use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::setup::{friends, listen};
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("sending::a_folder_arrives_as_it_was", a_folder_arrives_as_it_was),
        trial("sending::a_sparse_file_of_4_gib_survives_every_interruption", interruptions),
        trial("sending::a_full_disk_is_named_and_nothing_is_lost", a_full_disk),
        trial("sending::a_folder_that_cannot_be_written_is_named", a_locked_folder),
        trial("sending::nobody_is_taken_from_unasked", nobody_is_taken_from_unasked),
        trial("sending::a_person_is_asked", a_person_is_asked),
        trial("sending::friends_use_their_names", friends_use_their_names),
        trial("sending::a_listener_takes_no_files", a_listener_takes_no_files),
        trial("sending::a_ping_keeps_no_sender_waiting", a_ping_keeps_no_sender_waiting),
        trial("sending::what_is_there_is_kept", what_is_there_is_kept),
        trial("sending::a_sender_waits_for_its_receiver", a_sender_waits),
        trial("sending::an_interrupted_receiver_says_how_to_go_on", interrupted_by_hand),
    ]
}

/// Enough for a transfer in a debug build on a busy machine.
const TRANSFER: Duration = Duration::from_secs(120);

/// Small files.
const FILES: usize = 10_000;

struct Homes {
    world: World,
    a: Host,
    b: Host,
    site_b: Site,
    from: TempDir,
    to: TempDir,
    id_a: String,
    id_b: String,
}

impl Homes {
    fn new(seed: u64) -> anyhow::Result<Self> {
        Self::with_files_in(&std::env::temp_dir(), seed)
    }

    fn with_files_in(folder: &Path, seed: u64) -> anyhow::Result<Self> {
        let mut world = World::new(seed)?;
        let a = world.lab.add_site("a", SiteConfig::new(RouterKind::EimApdf))?.host(0);
        let site_b = world.lab.add_site("b", SiteConfig::new(RouterKind::EimApdf))?;
        let b = site_b.host(0);
        let mut ids = Vec::new();
        for (host, name) in [(&a, "a"), (&b, "b")] {
            let key = world.key(name);
            let key = key.to_str().context("a temporary path in UTF-8")?;
            let mut program = host.command(binary("peer")?);
            let output = program.args(["id", "--key", key]).output()?;
            ids.push(String::from_utf8(output.stdout)?.trim().to_owned());
        }
        let (id_b, id_a) = (ids.pop().context("an id")?, ids.pop().context("an id")?);
        Ok(Self {
            world,
            a,
            b,
            site_b,
            from: TempDir::new_in(folder)?,
            to: TempDir::new_in(folder)?,
            id_a,
            id_b,
        })
    }

    /// `peer receive --from` the other home, ready.
    fn receiver(&self, more: &[&str]) -> anyhow::Result<Program> {
        let to = self.to.path().to_str().context("a temporary path in UTF-8")?;
        let arguments = [&["receive", "--from", &self.id_a], more, &[to]].concat();
        let mut program = self.world.peer(&self.b, "b", &arguments)?;
        program.named("receiving")?;
        Ok(program)
    }

    fn sender(&self, names: &[&str], more: &[&str]) -> anyhow::Result<Program> {
        let paths: Vec<String> =
            names.iter().map(|name| self.from.path().join(name).display().to_string()).collect();
        let mut arguments = vec!["send"];
        arguments.extend(more);
        arguments.extend(paths.iter().map(String::as_str));
        arguments.push(&self.id_b);
        self.world.peer(&self.a, "a", &arguments)
    }
}

fn number(event: &Value, name: &str) -> anyhow::Result<u64> {
    event[name].as_u64().with_context(|| format!("{name} in {event}"))
}

/// Everything about a tree that is to be kept.
fn listing(root: &Path) -> anyhow::Result<Vec<String>> {
    fn list(root: &Path, path: &Path, into: &mut Vec<String>) -> anyhow::Result<()> {
        let mut entries = fs::read_dir(path)?.collect::<Result<Vec<_>, _>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let (path, metadata) = (entry.path(), entry.metadata()?);
            let name = path.strip_prefix(root)?.to_owned();
            let kept = (metadata.mode() & 0o777, metadata.mtime(), metadata.mtime_nsec());
            if metadata.is_symlink() {
                into.push(format!("{name:?} -> {:?}", fs::read_link(&path)?));
            } else if metadata.is_dir() {
                into.push(format!("{name:?}/ {kept:?}"));
                list(root, &path, into)?;
            } else {
                into.push(format!("{name:?} {kept:?} {:?}", consume(&mut fs::File::open(&path)?)?));
            }
        }
        Ok(())
    }
    let mut lines = Vec::new();
    list(root, root, &mut lines)?;
    Ok(lines)
}

/// Files of a few hundred bytes to a few kilobytes, in folders of a hundred.
fn many_files(top: &Path, count: usize) -> anyhow::Result<()> {
    for number in 0..count {
        let folder = top.join(format!("{:03}", number / 100));
        if number % 100 == 0 {
            fs::create_dir_all(&folder)?;
        }
        let mut file = fs::File::create(folder.join(format!("{number}.txt")))?;
        produce(number as u64, (number as u64 * 37) % 5000, &mut file)?;
    }
    Ok(())
}

fn a_folder_arrives_as_it_was() -> anyhow::Result<()> {
    // In memory where there is such a place: the receiver waits until all is on disk, whatever else the disk has to do.
    let memory = Path::new("/dev/shm");
    let homes = if memory.is_dir() { Homes::with_files_in(memory, 31)? } else { Homes::new(31)? };
    let top = homes.from.path().join("folder");
    many_files(&top, FILES)?;
    fs::create_dir(top.join("empty"))?;
    fs::write(top.join("run.sh"), "#!/bin/sh\n")?;
    fs::set_permissions(top.join("run.sh"), fs::Permissions::from_mode(0o750))?;
    symlink("000/1.txt", top.join("link"))?;
    symlink("/etc/passwd", top.join("way-out"))?;
    let mut receiver = homes.receiver(&[])?;
    let mut sender = homes.sender(&["folder"], &[])?;
    let left_out = sender.named("left_out")?;
    ensure!(left_out["path"].as_str().is_some_and(|path| path.ends_with("way-out")), "{left_out}");
    let sent = sender.event(|event| event["event"] == "sent", TRANSFER)?;
    ensure!(sender.wait(PATIENCE)?.success(), "{sent}");
    let received = receiver.named("received")?;
    ensure!(receiver.wait(PATIENCE)?.success(), "{received}");
    ensure!(number(&received, "received")? == FILES as u64 + 1, "{received}");
    fs::remove_file(top.join("way-out"))?;
    // Removing it has changed the folder's date.
    let date = fs::metadata(homes.to.path().join("folder"))?.modified()?;
    fs::File::open(&top)?.set_modified(date)?;
    ensure!(listing(homes.from.path())? == listing(homes.to.path())?, "another tree has arrived");
    // Once more: nothing is carried.
    let mut receiver = homes.receiver(&[])?;
    let mut sender = homes.sender(&["folder"], &[])?;
    let sent = sender.event(|event| event["event"] == "sent", TRANSFER)?;
    ensure!(number(&sent, "carried")? == 0, "{sent}");
    ensure!(sender.wait(PATIENCE)?.success() && receiver.wait(PATIENCE)?.success());
    Ok(())
}

/// Megabytes of data in the sparse file, in as many places as the test interrupts, and a few more.
const ISLAND: u64 = 24 << 20;
const ISLANDS: u64 = 5;
const SPARSE: u64 = 4 << 30;

fn make_sparse(path: &Path) -> anyhow::Result<()> {
    let file = fs::File::create(path)?;
    file.set_len(SPARSE)?;
    let mut data = Vec::new();
    for island in 0..ISLANDS {
        data.clear();
        produce(island, ISLAND, &mut data)?;
        file.write_all_at(&data, island * (SPARSE / ISLANDS) + 12_345)?;
    }
    Ok(())
}

/// What a part, or a file, has on disk.
fn on_disk(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.blocks() * 512)
}

/// Waits until so much of the part is on disk: what has been written there by then is verified and need not come again.
fn until_on_disk(part: &Path, bytes: u64) -> anyhow::Result<u64> {
    let deadline = std::time::Instant::now() + TRANSFER;
    loop {
        let there = on_disk(part);
        if there >= bytes {
            return Ok(there);
        }
        ensure!(std::time::Instant::now() < deadline, "{there} of {bytes} bytes after {TRANSFER:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Bytes that one interruption may cost: the group that was being gathered, and what the file system counts differently.
const COST: u64 = 4 << 20;

fn interruptions() -> anyhow::Result<()> {
    let homes = Homes::new(32)?;
    let path = homes.from.path().join("disk.img");
    make_sparse(&path)?;
    let part: PathBuf = homes.to.path().join("disk.img.peer-part");
    let target = homes.to.path().join("disk.img");
    let data = ISLAND * ISLANDS;
    let mut receiver = homes.receiver(&[])?;
    let mut sender = homes.sender(&["disk.img"], &[])?;
    // The sender is killed; the receiver stays and takes up with the next one.
    until_on_disk(&part, ISLAND / 2)?;
    sender.signal(Signal::SIGKILL)?;
    sender.wait(PATIENCE)?;
    let kept = on_disk(&part);
    let mut sender = homes.sender(&["disk.img"], &[])?;
    // The receiver is killed; the sender goes on when there is another.
    until_on_disk(&part, kept + ISLAND)?;
    receiver.signal(Signal::SIGKILL)?;
    receiver.wait(PATIENCE)?;
    let kept_then = on_disk(&part);
    let mut receiver = homes.receiver(&[])?;
    // The line is cut for longer than the sender believes in a silent receiver, and comes back.
    until_on_disk(&part, kept_then + ISLAND)?;
    homes.site_b.cut(Direction::Both)?;
    sender.event(
        |event| {
            event["event"] == "waiting"
                && event["message"].as_str().is_some_and(|words| words.contains("nothing was heard"))
        },
        TRANSFER,
    )?;
    homes.site_b.restore()?;
    let sent = sender.event(|event| event["event"] == "sent", TRANSFER)?;
    ensure!(sender.wait(PATIENCE)?.success(), "{sent}");
    let received = receiver.named("received")?;
    ensure!(receiver.wait(PATIENCE)?.success(), "{received}");
    // The last receiver was given what was not on disk when the one before it was killed, and what the cut cost.
    let carried = number(&received, "carried")?;
    ensure!(carried <= data - kept_then + COST, "{carried} carried after {kept_then} of {data} were there");
    let (size, there) = (fs::metadata(&target)?.len(), on_disk(&target));
    ensure!(size == SPARSE && there < data + COST, "{size} bytes, {there} on disk");
    ensure!(!part.exists());
    let same = consume(&mut fs::File::open(&path)?)? == consume(&mut fs::File::open(&target)?)?;
    ensure!(same, "another file has arrived");
    Ok(())
}

/// A small file system in a mount namespace of the receiver's own.
fn a_full_disk() -> anyhow::Result<()> {
    const SMALL: &str = "mount -t tmpfs -o size=24m none \"$0\" && \"$@\"; code=$?; \
                         mount -o remount,size=200m \"$0\" && \"$@\" && sha256sum \"$0/file\"; echo $code";
    let homes = Homes::new(33)?;
    let mut file = fs::File::create(homes.from.path().join("file"))?;
    let digest = produce(1, 60 << 20, &mut file)?;
    let (to, key) = (homes.to.path().to_owned(), homes.world.key("b"));
    // Twice in one file system that has grown in between; then what it holds, and how the first one ended.
    let mut command = homes.b.command("unshare");
    command.args(["--mount", "sh", "-c", SMALL]).arg(&to).arg(binary("peer")?);
    command.args(["receive", "--json", "--server", &homes.world.address, "--from", &homes.id_a, "--key"]);
    command.arg(&key).arg(&to);
    let mut receiver = Program::of_command(command, "peer receive")?;
    receiver.named("receiving")?;
    let mut sender = homes.sender(&["file"], &[])?;
    let error = receiver.event(|event| event["event"] == "error", TRANSFER)?;
    let message = error["message"].as_str().context("a message")?;
    ensure!(message.contains("disk is full") && message.contains("file"), "{message}");
    let error = sender.event(|event| event["event"] == "error", TRANSFER)?;
    let message = error["message"].as_str().context("a message")?;
    ensure!(message.contains("disk is full") && message.contains("kept"), "{message}");
    ensure!(sender.wait(PATIENCE)?.code() == Some(1));
    receiver.later(|event| event["event"] == "receiving", PATIENCE)?;
    let mut sender = homes.sender(&["file"], &[])?;
    let sent = sender.event(|event| event["event"] == "sent", TRANSFER)?;
    ensure!(sender.wait(PATIENCE)?.success());
    let carried = number(&sent, "carried")?;
    ensure!(carried <= (60 << 20) - (16 << 20), "{carried} were carried again");
    let mut said = String::new();
    std::io::Read::read_to_string(&mut receiver.stdout()?, &mut said)?;
    let expected: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    ensure!(said.starts_with(&expected), "{said:?}");
    ensure!(said.trim_end().ends_with('1'), "how the first one ended: {said:?}");
    Ok(())
}

/// A folder in which even root may write nothing: in a file system that is read-only there.
fn a_locked_folder() -> anyhow::Result<()> {
    const LOCKED: &str = "mount -t tmpfs -o ro none \"$0\" && exec \"$@\"";
    let homes = Homes::new(34)?;
    fs::write(homes.from.path().join("file"), "content")?;
    let (to, key) = (homes.to.path().to_owned(), homes.world.key("b"));
    let mut command = homes.b.command("unshare");
    command.args(["--mount", "sh", "-c", LOCKED]).arg(&to).arg(binary("peer")?);
    command.args(["receive", "--json", "--server", &homes.world.address, "--from", &homes.id_a, "--key"]);
    command.arg(&key).arg(&to);
    let mut receiver = Program::of_command(command, "peer receive")?;
    receiver.named("receiving")?;
    let mut sender = homes.sender(&["file"], &[])?;
    for (program, words) in [(&mut receiver, "may not be written"), (&mut sender, "may not write")] {
        let error = program.named("error")?;
        ensure!(error["message"].as_str().is_some_and(|message| message.contains(words)), "{error}");
        ensure!(program.wait(PATIENCE)?.code() == Some(1));
    }
    Ok(())
}

/// Without a terminal to ask at somebody must be named; who is not named looks at somebody who is offline.
fn nobody_is_taken_from_unasked() -> anyhow::Result<()> {
    let homes = Homes::new(35)?;
    fs::write(homes.from.path().join("file"), "content")?;
    let mut receiver = homes.world.peer(&homes.b, "b", &["receive"])?;
    let error = receiver.named("error")?;
    ensure!(error["message"].as_str().is_some_and(|message| message.contains("--from PEER")), "{error}");
    ensure!(receiver.wait(PATIENCE)?.code() == Some(2));
    let to = homes.to.path().to_str().context("a temporary path in UTF-8")?;
    let mut receiver = homes.world.peer(&homes.b, "b", &["receive", "--from", &homes.id_b, to])?;
    receiver.named("receiving")?;
    let mut sender = homes.sender(&["file"], &["--wait", "0"])?;
    let error = sender.named("error")?;
    ensure!(error["message"].as_str().is_some_and(|message| message.contains("not online")), "{error}");
    ensure!(sender.wait(PATIENCE)?.code() == Some(4));
    ensure!(fs::read_dir(homes.to.path())?.count() == 0);
    Ok(())
}

/// At a terminal: who, how many and how large; no is no, and yes is yes to what was shown.
fn a_person_is_asked() -> anyhow::Result<()> {
    let homes = Homes::new(39)?;
    fs::write(homes.from.path().join("file"), "theirs")?;
    fs::write(homes.from.path().join("other"), "x".repeat(3000))?;
    fs::write(homes.to.path().join("file"), "mine!!")?;
    let (key, to) = (homes.world.key("b"), homes.to.path().display().to_string());
    let key = key.to_str().context("a temporary path in UTF-8")?;
    let arguments = ["receive", "--server", &homes.world.address, "--key", key, &to];
    let mut receiver = Terminal::start(&homes.b, &binary("peer")?, &arguments)?;
    receiver.wait_for("send to me with", PATIENCE)?;
    let mut sender = homes.sender(&["file", "other"], &[])?;
    receiver.wait_for(&format!("{} offers 2 files, 2.94 KiB: file, other", homes.id_a), PATIENCE)?;
    receiver.wait_for("Take it? [y/N]", PATIENCE)?;
    receiver.answer("no")?;
    let error = sender.named("error")?;
    ensure!(error["message"].as_str().is_some_and(|message| message.contains("refused")), "{error}");
    ensure!(sender.wait(PATIENCE)?.code() == Some(6));
    ensure!(fs::read_dir(homes.to.path())?.count() == 1);
    let mut sender = homes.sender(&["file", "other"], &[])?;
    receiver.wait_for("Take it? [y/N]", PATIENCE)?;
    receiver.answer("y")?;
    receiver.wait_for("these are here and differ: file. Replace them? [y/N]", PATIENCE)?;
    ensure!(fs::read_to_string(homes.to.path().join("file"))? == "mine!!");
    receiver.answer("yes")?;
    ensure!(sender.wait(PATIENCE)?.success());
    receiver.wait_for("2 files received and verified", PATIENCE)?;
    ensure!(fs::read_to_string(homes.to.path().join("file"))? == "theirs");
    Ok(())
}

/// Two machines that were set up: a server from the configuration, aliases on both sides, and the invitation shown to a receiver. A trusted
/// peer is asked about like any other.
fn friends_use_their_names() -> anyhow::Result<()> {
    let (world, laptop, nas) = friends()?;
    let (from, to) = (TempDir::new()?, TempDir::new()?);
    let (file, to_path) = (from.path().join("file").display().to_string(), to.path().display().to_string());
    fs::write(&file, "by name")?;
    // It shows its invitation, and is trusted and asked about.
    let mut receiver =
        Terminal::start_in(&nas, &binary("peer")?, &["receive", &to_path], &world.home("nas")?)?;
    receiver.wait_for("send to me with", PATIENCE)?;
    let mut sender = world.person(&laptop, "laptop", &["send", &file, "nas"])?;
    sender.named("invited")?;
    receiver.wait_for("laptop offers 1 file, 7 B: file", PATIENCE)?;
    receiver.wait_for("Take it? [y/N]", PATIENCE)?;
    ensure!(fs::read_dir(to.path())?.count() == 0, "something was written unasked");
    receiver.answer("y")?;
    ensure!(sender.wait(PATIENCE)?.success());
    receiver.wait_for("1 file received and verified", PATIENCE)?;
    ensure!(fs::read_to_string(to.path().join("file"))? == "by name");
    // The invitation has given it a name there.
    ensure!(world.done(&nas, "nas", &["list"])?.starts_with("laptop"));
    fs::write(&file, "unasked")?;
    let arguments = ["receive", "--from", "laptop", "--overwrite", &to_path];
    let mut receiver = world.person(&nas, "nas", &arguments)?;
    receiver.named("receiving")?;
    let mut sender = world.person(&laptop, "laptop", &["send", &file, "nas"])?;
    ensure!(sender.wait(PATIENCE)?.success() && receiver.wait(PATIENCE)?.success());
    ensure!(fs::read_to_string(to.path().join("file"))? == "unasked");
    let output = world.run(&laptop, "laptop", &["send", &file, "nobody"])?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(2) && said.contains("no peer with the alias nobody"), "{said}");
    Ok(())
}

fn a_listener_takes_no_files() -> anyhow::Result<()> {
    let (world, laptop, nas) = friends()?;
    let from = TempDir::new()?;
    let file = from.path().join("file").display().to_string();
    fs::write(&file, "content")?;
    let _listener = listen(&world, &nas, &["--echo"])?;
    let mut sender = world.person(&laptop, "laptop", &["send", &file, "nas"])?;
    let error = sender.named("error")?;
    ensure!(error["message"].as_str().is_some_and(|message| message.contains("peer receive")), "{error}");
    ensure!(sender.wait(PATIENCE)?.code() == Some(6));
    Ok(())
}

/// A session that wants something else does not take the place of one that brings files.
fn a_ping_keeps_no_sender_waiting() -> anyhow::Result<()> {
    let homes = Homes::new(40)?;
    fs::write(homes.from.path().join("file"), "content")?;
    let mut receiver = homes.receiver(&[])?;
    let mut ping =
        homes.world.peer(&homes.a, "a", &["ping", "--count", "3", "--interval", "0.05", &homes.id_b])?;
    ensure!(ping.wait(PATIENCE)?.success());
    let mut sender = homes.sender(&["file"], &[])?;
    ensure!(sender.wait(PATIENCE)?.success() && receiver.wait(PATIENCE)?.success());
    ensure!(fs::read_to_string(homes.to.path().join("file"))? == "content");
    Ok(())
}

fn what_is_there_is_kept() -> anyhow::Result<()> {
    let homes = Homes::new(36)?;
    fs::write(homes.from.path().join("file"), "theirs")?;
    fs::write(homes.from.path().join("other"), "new")?;
    let target = homes.to.path().join("file");
    fs::write(&target, "mine!!")?;
    let mut receiver = homes.receiver(&[])?;
    let mut sender = homes.sender(&["file", "other"], &[])?;
    let error = receiver.named("error")?;
    let message = error["message"].as_str().context("a message")?;
    ensure!(message.contains("file") && message.contains("--overwrite"), "{message}");
    ensure!(receiver.wait(PATIENCE)?.code() == Some(1) && sender.wait(PATIENCE)?.code() == Some(1));
    ensure!(fs::read_to_string(&target)? == "mine!!");
    ensure!(fs::read_to_string(homes.to.path().join("other"))? == "new");
    let mut receiver = homes.receiver(&["--overwrite"])?;
    let mut sender = homes.sender(&["file", "other"], &[])?;
    ensure!(receiver.wait(PATIENCE)?.success() && sender.wait(PATIENCE)?.success());
    ensure!(fs::read_to_string(&target)? == "theirs");
    Ok(())
}

fn a_sender_waits() -> anyhow::Result<()> {
    let homes = Homes::new(37)?;
    fs::write(homes.from.path().join("file"), "content")?;
    let mut sender = homes.sender(&["file"], &[])?;
    sender.named("waiting")?;
    let mut receiver = homes.receiver(&[])?;
    ensure!(sender.wait(PATIENCE)?.success() && receiver.wait(PATIENCE)?.success());
    ensure!(fs::read_to_string(homes.to.path().join("file"))? == "content");
    Ok(())
}

fn interrupted_by_hand() -> anyhow::Result<()> {
    let homes = Homes::new(38)?;
    produce(1, 80 << 20, &mut fs::File::create(homes.from.path().join("file"))?)?;
    let part = homes.to.path().join("file.peer-part");
    let mut receiver = homes.receiver(&[])?;
    let mut sender = homes.sender(&["file"], &[])?;
    until_on_disk(&part, 8 << 20)?;
    for program in [&mut sender, &mut receiver] {
        program.signal(Signal::SIGINT)?;
        let error = program.named("error")?;
        let message = error["message"].as_str().context("a message")?;
        ensure!(message.contains("interrupted") && message.contains("kept"), "{message}");
        ensure!(program.wait(PATIENCE)?.code() == Some(130), "{message}");
    }
    let kept = on_disk(&part);
    let mut receiver = homes.receiver(&[])?;
    let mut sender = homes.sender(&["file"], &[])?;
    let sent = sender.event(|event| event["event"] == "sent", TRANSFER)?;
    ensure!(sender.wait(PATIENCE)?.success() && receiver.wait(PATIENCE)?.success());
    let carried = number(&sent, "carried")?;
    ensure!(carried <= (80 << 20) - kept + COST, "{carried} carried, {kept} were there");
    Ok(())
}
