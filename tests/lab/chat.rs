//! `peer chat` between two homes: at terminals, in pipes, over changes of path and the loss of sessions.

use std::io::{BufReader, Write as _};
use std::process::Stdio;

use anyhow::{Context as _, ensure};
use end_to_end::process::{PATIENCE, Program, binary};
use end_to_end::terminal::Terminal;
use end_to_end::world::{SITE_DELAY, World};
use libtest_mimic::Trial;
use netsim::{Direction, Host, RouterKind};
use nix::sys::signal::Signal;

use crate::setup::{friends, friends_behind, listen};
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("chat::two_people_talk_over_changes_of_path", two_people_talk),
        trial("chat::what_arrives_harms_no_terminal", what_arrives_harms_no_terminal),
        trial("chat::lines_go_in_and_lines_come_out", lines_go_in_and_come_out),
        trial("chat::a_line_that_waits_is_told_of_and_arrives_once", a_line_that_waits),
        trial("chat::every_line_arrives_once_through_an_outage", once_through_an_outage),
        trial("chat::both_may_call_at_once", both_may_call_at_once),
        trial("chat::who_is_not_trusted_is_refused", who_is_not_trusted),
        trial("chat::who_talks_already_is_busy", who_talks_already_is_busy),
        trial("chat::interruption_leaves_the_terminal_as_it_was", interruption),
    ]
}

const CTRL_C: &str = "\u{3}";
const CTRL_D: &str = "\u{4}";

/// A row ends with this: a time of day stands before it.
fn has(rows: &[String], words: &str) -> bool {
    rows.iter().any(|row| row.ends_with(words))
}

/// `name` at a terminal.
fn terminal(world: &World, host: &Host, name: &str, arguments: &[&str]) -> anyhow::Result<Terminal> {
    let arguments = [&["chat"], arguments].concat();
    Terminal::start_in(host, &binary("peer")?, &arguments, &world.home(name)?)
}

/// Waits until `said` ends a row.
fn sees(terminal: &mut Terminal, said: &str) -> anyhow::Result<()> {
    terminal.shows(|rows| has(rows, said), PATIENCE).with_context(|| format!("waiting for {said:?}"))
}

/// Two that have just met, at terminals.
fn meeting(world: &World, laptop: &Host, nas: &Host) -> anyhow::Result<(Terminal, Terminal)> {
    let mut at_nas = terminal(world, nas, "nas", &["--listen"])?;
    at_nas.shows(|rows| rows.iter().any(|row| row.contains("waiting for a call: peer chat ")), PATIENCE)?;
    let mut at_laptop = terminal(world, laptop, "laptop", &["nas"])?;
    at_laptop.shows(|rows| rows.iter().any(|row| row.contains("* nas is here, ")), PATIENCE)?;
    at_nas.shows(|rows| rows.iter().any(|row| row.contains("* laptop is here, ")), PATIENCE)?;
    Ok((at_laptop, at_nas))
}

fn two_people_talk() -> anyhow::Result<()> {
    let (world, laptop, nas) = friends_behind(RouterKind::EimApdf, SITE_DELAY)?;
    let (mut at_laptop, mut at_nas) = meeting(&world, &laptop, &nas)?;
    let direct = |rows: &[String]| {
        rows.iter()
            .any(|row| row.contains("on a direct path now") || row.contains("is here, on a direct path"))
    };
    at_laptop.press("hello\r")?;
    sees(&mut at_nas, "laptop: hello")?;
    sees(&mut at_laptop, "you: hello")?;
    at_laptop.shows(direct, PATIENCE)?;
    // A line that comes while another is typed stands above it, and tears nothing.
    at_laptop.press("half a th")?;
    at_laptop.shows(|rows| rows.last().is_some_and(|row| row == "> half a th"), PATIENCE)?;
    at_nas.press("an interruption\r")?;
    sees(&mut at_laptop, "nas: an interruption")?;
    at_laptop.shows(|rows| rows.last().is_some_and(|row| row == "> half a th"), PATIENCE)?;
    at_laptop.press("ought\r")?;
    sees(&mut at_nas, "laptop: half a thought")?;
    // The direct path dies; they talk on, and are told.
    let sites = world.lab.sites();
    sites[0].cut_between(&sites[1], Direction::Both)?;
    at_nas.press("still there?\r")?;
    sees(&mut at_laptop, "nas: still there?")?;
    at_laptop.press("still here\r")?;
    sees(&mut at_nas, "laptop: still here")?;
    sees(&mut at_laptop, "* nas is reached over the relay now")?;
    sites[0].restore()?;
    sees(&mut at_laptop, "* nas is on a direct path now")?;
    at_laptop.press("/path\r")?;
    at_laptop.shows(|rows| rows.iter().any(|row| row.contains("* direct ")), PATIENCE)?;
    at_laptop.press("/quit\r")?;
    let status = at_laptop.wait(PATIENCE)?;
    ensure!(status.success(), "/quit: {status}");
    sees(&mut at_nas, "* laptop has left")?;
    // Whoever waited goes on waiting.
    let mut again = terminal(&world, &laptop, "laptop", &["nas"])?;
    sees(&mut again, "* calling nas")?;
    again.press("back\r")?;
    sees(&mut at_nas, "laptop: back")?;
    at_nas.press(CTRL_D)?;
    let status = at_nas.wait(PATIENCE)?;
    ensure!(status.success(), "Ctrl-D: {status}");
    sees(&mut again, "* nas has left")
}

/// Starts `peer chat` with pipes, with `--json`.
fn chat(world: &World, host: &Host, name: &str, arguments: &[&str]) -> anyhow::Result<Program> {
    world.person(host, name, &[&["chat"], arguments].concat())
}

fn what_arrives_harms_no_terminal() -> anyhow::Result<()> {
    let (world, laptop, nas) = friends()?;
    let mut at_nas = terminal(&world, &nas, "nas", &["--listen"])?;
    at_nas.shows(|rows| rows.iter().any(|row| row.contains("waiting for a call")), PATIENCE)?;
    let mut program = chat(&world, &laptop, "laptop", &["nas"])?;
    program.stdin()?.write_all("\u{1b}]0;owned\u{7}\u{1b}[2Ja\u{9b}31mb\u{202e}c\rd\n".as_bytes())?;
    sees(&mut at_nas, r"laptop: \u{1b}]0;owned\u{7}\u{1b}[2Ja\u{9b}31mb\u{202e}c\u{d}d")?;
    for harm in ["\u{1b}]0;", "\u{1b}[2J", "\u{9b}", "\u{202e}"] {
        ensure!(!at_nas.raw().contains(harm), "{harm:?} reached the terminal");
    }
    ensure!(program.wait(PATIENCE)?.success());
    Ok(())
}

/// 20,000 lines, far more than may wait at a time.
fn lines_go_in_and_come_out() -> anyhow::Result<()> {
    const LINES: usize = 20_000;
    let (world, laptop, nas) = friends()?;
    let mut listener = chat(&world, &nas, "nas", &["--listen"])?.ready()?;
    let mut back = listener.stdin()?;
    back.write_all("ünder way\n".as_bytes())?;
    let all: Vec<String> =
        (0..LINES).map(|number| format!("line {number}, {}", "x".repeat(number % 90))).collect();
    let mut heard = BufReader::new(listener.stdout()?);
    let last = all[LINES - 1].clone();
    let hearing = std::thread::spawn(move || until(&mut heard, &last));
    let said = tempfile::NamedTempFile::new()?;
    std::fs::write(&said, all.join("\n") + "\n")?;
    let mut command = laptop.command(binary("peer")?);
    command.args(["chat", "nas"]).envs(world.home("laptop")?).stdin(std::fs::File::open(&said)?);
    // The end of the input is the end of the conversation, once everything is delivered.
    let output = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?.wait_with_output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.stdout == "ünder way\n".as_bytes(),
        "{:?}: {words}",
        String::from_utf8_lossy(&output.stdout)
    );
    let arrived = hearing.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
    ensure!(arrived == all, "{} lines arrived", arrived.len());
    ensure!(listener.wait(PATIENCE)?.success());
    Ok(())
}

/// The lines that have come, as `--json` prints them, until `last`.
fn until(output: &mut impl std::io::BufRead, last: &str) -> anyhow::Result<Vec<String>> {
    let mut all = Vec::new();
    loop {
        let mut line = String::new();
        ensure!(output.read_line(&mut line)? > 0, "it ended; {all:?}");
        let line: serde_json::Value = serde_json::from_str(&line)?;
        ensure!(line["event"] == "line", "{line}");
        let text = line["text"].as_str().context("a text")?.to_owned();
        let end = text == last;
        all.push(text);
        if end {
            return Ok(all);
        }
    }
}

/// The other side is killed: what is said meanwhile is late, and reaches its successor, once.
fn a_line_that_waits() -> anyhow::Result<()> {
    let (world, laptop, nas) = friends()?;
    let mut first = chat(&world, &nas, "nas", &["--listen"])?;
    first.named("listening")?;
    let mut program = chat(&world, &laptop, "laptop", &["nas"])?;
    let mut input = program.stdin()?;
    writeln!(input, "to the first")?;
    let mut heard = BufReader::new(first.stdout()?);
    ensure!(until(&mut heard, "to the first")? == ["to the first"]);
    // What it says next comes behind its acknowledgement.
    writeln!(first.stdin()?, "I heard")?;
    until(&mut BufReader::new(program.stdout()?), "I heard")?;
    first.signal(Signal::SIGKILL)?;
    first.wait(PATIENCE)?;
    writeln!(input, "to the second\nand more")?;
    ensure!(program.named("late")?["text"] == "to the second");
    let mut second = chat(&world, &nas, "nas", &["--listen"])?;
    let mut heard = BufReader::new(second.stdout()?);
    let delivered = program.named("delivered")?;
    ensure!(
        delivered["text"] == "to the second" && delivered["after_ms"].as_f64() > Some(5000.0),
        "{delivered}"
    );
    writeln!(input, "the end")?;
    let all = until(&mut heard, "the end")?;
    ensure!(all == ["to the second", "and more", "the end"], "{all:?}");
    drop(input);
    ensure!(program.wait(PATIENCE)?.success() && second.wait(PATIENCE)?.success());
    Ok(())
}

/// No network for longer than a session is believed in: lines go both ways, each arrives once, in order.
fn once_through_an_outage() -> anyhow::Result<()> {
    let (world, laptop, nas) = friends()?;
    let mut listener = chat(&world, &nas, "nas", &["--listen"])?;
    listener.named("listening")?;
    let mut program = chat(&world, &laptop, "laptop", &["nas"])?;
    program.named("here")?;
    let (mut to_nas, mut to_laptop) = (program.stdin()?, listener.stdin()?);
    let (mut at_nas, mut at_laptop) = (BufReader::new(listener.stdout()?), BufReader::new(program.stdout()?));
    let mut say = |number: u32| -> anyhow::Result<()> {
        writeln!(to_nas, "{number}")?;
        Ok(writeln!(to_laptop, "{number}")?)
    };
    (0..10).try_for_each(&mut say)?;
    let site = &world.lab.sites()[1];
    site.cut(Direction::Both)?;
    (10..20).try_for_each(&mut say)?;
    program.named("late")?;
    // It is asked whether it is there, and does not answer.
    program.named("silent")?;
    (20..30).try_for_each(&mut say)?;
    site.restore()?;
    (30..40).try_for_each(&mut say)?;
    let all: Vec<String> = (0..40).map(|number| number.to_string()).collect();
    ensure!(until(&mut at_nas, "39")? == all && until(&mut at_laptop, "39")? == all);
    program.named("delivered")?;
    Ok(())
}

fn both_may_call_at_once() -> anyhow::Result<()> {
    let (world, laptop, nas) = friends()?;
    // The ticket is used first: `nas` knows `laptop` by name from then on.
    let waiting = listen(&world, &nas, &["--echo"])?;
    world.done(&laptop, "laptop", &["ping", "nas", "--count", "1"])?;
    stop(waiting)?;
    for round in 0..3 {
        let mut one = chat(&world, &laptop, "laptop", &["nas"])?;
        let mut other = chat(&world, &nas, "nas", &["laptop"])?;
        writeln!(one.stdin()?, "from the laptop, {round}")?;
        // Its input stays open.
        let mut input = other.stdin()?;
        writeln!(input, "from the nas")?;
        let mut heard = BufReader::new(other.stdout()?);
        ensure!(until(&mut heard, &format!("from the laptop, {round}"))?.len() == 1);
        ensure!(one.wait(PATIENCE)?.success() && other.wait(PATIENCE)?.success(), "round {round}");
    }
    Ok(())
}

/// The run must fail with this code and these words.
fn fails(
    world: &World,
    host: &Host,
    name: &str,
    arguments: &[&str],
    code: i32,
    words: &[&str],
) -> anyhow::Result<()> {
    let mut program = chat(world, host, name, arguments)?;
    writeln!(program.stdin()?, "hello?")?;
    let error = program.named("error")?;
    let message = error["message"].as_str().context("a message")?;
    for word in words {
        ensure!(message.contains(word), "no {word:?} in {message:?}");
    }
    let status = program.wait(PATIENCE)?;
    ensure!(status.code() == Some(code), "{status} with {message:?}");
    Ok(())
}

fn who_is_not_trusted() -> anyhow::Result<()> {
    let (world, laptop, nas) = friends()?;
    world.done(&laptop, "stranger", &["init", &world.address])?;
    let id = world.done(&nas, "nas", &["id"])?;
    // Nobody is there; one that has nothing to say hears of it as well.
    fails(&world, &laptop, "laptop", &["nas", "--wait", "0"], 4, &["not online"])?;
    let silent = world.run(&laptop, "laptop", &["chat", "nas", "--wait", "0"])?;
    ensure!(silent.status.code() == Some(4), "{}", silent.status);
    // Whoever is there does not talk.
    let echo = listen(&world, &nas, &["--echo"])?;
    fails(&world, &laptop, "laptop", &["nas", "--wait", "0"], 6, &["does not talk", "peer chat"])?;
    stop(echo)?;
    // Only trusted peers are introduced; with an open invitation everyone is, and refused.
    let listener = chat(&world, &nas, "nas", &["--listen"])?.ready()?;
    fails(&world, &laptop, "stranger", &[&id, "--wait", "0"], 4, &["not online"])?;
    stop(listener)?;
    world.done(&nas, "nas", &["invite"])?;
    let mut listener = chat(&world, &nas, "nas", &["--listen"])?.ready()?;
    fails(&world, &laptop, "stranger", &[&id, "--wait", "0"], 6, &["does not talk"])?;
    listener.named("denied")?;
    // With --from only those.
    stop(listener)?;
    let _listener = chat(&world, &nas, "nas", &["--listen", "--from", &id])?.ready()?;
    fails(&world, &laptop, "laptop", &["nas", "--wait", "0"], 4, &["not online"])
}

/// Ends it, so that the server knows.
fn stop(mut program: Program) -> anyhow::Result<()> {
    program.signal(Signal::SIGTERM)?;
    program.wait(PATIENCE)?;
    Ok(())
}

trait Ready: Sized {
    /// Once it waits for a call.
    fn ready(self) -> anyhow::Result<Self>;
}

impl Ready for Program {
    fn ready(mut self) -> anyhow::Result<Self> {
        self.named("listening")?;
        Ok(self)
    }
}

fn who_talks_already_is_busy() -> anyhow::Result<()> {
    let (world, laptop, nas) = friends()?;
    world.done(&laptop, "third", &["init", &world.address])?;
    let third = world.done(&laptop, "third", &["id"])?;
    world.done(&nas, "nas", &["trust", &third])?;
    let id = world.done(&nas, "nas", &["id"])?;
    let mut listener = chat(&world, &nas, "nas", &["--listen"])?.ready()?;
    let mut program = chat(&world, &laptop, "laptop", &["nas"])?;
    program.named("here")?;
    fails(&world, &laptop, "third", &[&id, "--wait", "0"], 6, &["talking with somebody else"])?;
    // The first is not disturbed.
    writeln!(program.stdin()?, "just us")?;
    ensure!(until(&mut BufReader::new(listener.stdout()?), "just us")?.len() == 1);
    ensure!(program.wait(PATIENCE)?.success());
    Ok(())
}

fn interruption() -> anyhow::Result<()> {
    let (world, laptop, nas) = friends()?;
    let (mut at_laptop, mut at_nas) = meeting(&world, &laptop, &nas)?;
    at_laptop.press("unfinished")?;
    at_laptop.press(CTRL_C)?;
    let status = at_laptop.wait(PATIENCE)?;
    ensure!(status.code() == Some(130), "Ctrl-C: {status}");
    // The prompt is gone, and the cursor is at the beginning of a row.
    sees(&mut at_nas, "* laptop has left")?;
    at_nas.press("too late\r")?;
    sees(&mut at_nas, "you: too late")?;
    at_nas.press("/quit\r")?;
    let status = at_nas.wait(PATIENCE)?;
    ensure!(status.code() == Some(5), "with a line that nobody heard: {status}");
    ensure!(at_nas.raw().contains("1 line was not delivered"), "{}", at_nas.raw());
    Ok(())
}
