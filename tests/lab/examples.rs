//! Every example of every `--help` is run, between two homes, with names in place of those that it cannot know.
//!
//! A command needs an entry in [`RUNNERS`]: one without, one without an example, and an example that its runner cannot make sense of all fail.

mod running;
mod server;
mod stage;

use anyhow::{Context as _, bail, ensure};
use end_to_end::process::binary;
use end_to_end::terminal::Terminal;
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::reach::SshServer;
use crate::setup::{fetch, web_server_at};
use crate::trial;
use running::PATIENCE;
use stage::{Stage, output_file};

/// Runs one example of a command.
type Runner = fn(&Stage, &str) -> anyhow::Result<()>;

/// How the examples of each command are run, and what proves that they do what they say.
const RUNNERS: &[(&str, Runner)] = &[
    ("init", init),
    ("id", id),
    ("invite", invite),
    ("trust", trust),
    ("untrust", untrust),
    ("alias", alias),
    ("list", list),
    ("listen", listen),
    ("connect", connect),
    ("forward", forward),
    ("ssh-proxy", ssh_proxy),
    ("ping", ping),
    ("send", send),
    ("receive", receive),
    ("chat", chat),
    ("up", up),
    ("status", status),
    ("reload", reload),
    ("down", down),
    ("bench", bench),
    ("explain", explain),
    ("doctor", doctor),
    ("completions", completions),
    ("man", man),
];

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("examples::no_command_is_left_out", no_command_is_left_out),
        trial("examples::peer", run_all_of_peer),
        trial("examples::rendezvous", server::run_all),
    ];
    for (name, runner) in RUNNERS {
        trials.push(trial(format!("examples::peer_{name}"), move || run_all(name, *runner)));
    }
    trials
}

/// What a program prints when it is asked for help.
fn help(program: &str, command: &[&str]) -> anyhow::Result<String> {
    let output = std::process::Command::new(binary(program)?).args(command).arg("--help").output()?;
    ensure!(output.status.success(), "{command:?} --help: {}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

/// The commands that a help lists.
fn commands(help: &str) -> anyhow::Result<Vec<&str>> {
    let list = help.split("Commands:\n").nth(1).context("a list of commands")?;
    let list = list.split("\n\n").next().unwrap_or_default();
    let own = list.lines().filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    Ok(own.filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help").collect())
}

/// The examples of a help: the lines below the heading that are indented by two, up to the next empty line. What is indented further explains.
fn examples(help: &str) -> Vec<&str> {
    let start = ["\nExample:\n", "\nExamples:\n"].iter().find_map(|heading| help.split(heading).nth(1));
    let block = start.unwrap_or_default().split("\n\n").next().unwrap_or_default();
    let own = block.lines().filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    own.map(str::trim).collect()
}

fn no_command_is_left_out() -> anyhow::Result<()> {
    let help = help("peer", &[])?;
    let known: Vec<&str> = RUNNERS.iter().map(|(name, _)| *name).collect();
    for command in commands(&help)? {
        ensure!(
            known.contains(&command),
            "`peer {command}` has no runner for its examples in tests/lab/examples.rs"
        );
        let help = self::help("peer", &[command])?;
        ensure!(!examples(&help).is_empty(), "`peer {command} --help` has no example");
    }
    for name in known {
        ensure!(commands(&help)?.contains(&name), "there is no `peer {name}`");
    }
    Ok(())
}

/// The examples of one command, each on a stage of its own.
fn run_all(name: &str, runner: Runner) -> anyhow::Result<()> {
    let help = help("peer", &[name])?;
    let examples = examples(&help);
    ensure!(!examples.is_empty(), "`peer {name} --help` has no example");
    for example in examples {
        ensure!(example.contains(&format!("peer {name}")), "{example} is no example of {name}");
        run(example, runner)?;
    }
    Ok(())
}

/// Those of `peer --help` are of all commands.
fn run_all_of_peer() -> anyhow::Result<()> {
    let help = help("peer", &[])?;
    let examples = examples(&help);
    ensure!(examples.len() >= 10, "{examples:?}");
    for example in examples {
        let (_, command) = example.split_once("peer ").context("an example of peer")?;
        let name = command.split_whitespace().next().unwrap_or_default();
        let runner = RUNNERS.iter().find(|(known, _)| *known == name);
        run(example, runner.with_context(|| format!("{example}: no runner"))?.1)?;
    }
    Ok(())
}

fn run(example: &str, runner: Runner) -> anyhow::Result<()> {
    let stage = Stage::new(example)?;
    runner(&stage, example).with_context(|| format!("the example `{example}`"))
}

fn init(stage: &Stage, example: &str) -> anyhow::Result<()> {
    let printed = stage.fresh(example)?.done()?;
    ensure!(printed.trim().len() == 52, "{printed:?} is no id");
    ensure!(stage.fresh("peer id")?.done()? == printed);
    let list = stage.fresh("peer list")?.done()?;
    ensure!(list.starts_with("nas ") == example.contains("--as nas"), "{list}");
    Ok(())
}

fn id(stage: &Stage, example: &str) -> anyhow::Result<()> {
    let printed: Value = serde_json::from_str(&stage.laptop(example)?.done()?)?;
    ensure!(printed["id"] == stage.laptop_id.as_str(), "{printed}");
    Ok(())
}

fn invite(stage: &Stage, example: &str) -> anyhow::Result<()> {
    let before = stage.nas("peer invite")?.done()?;
    let printed = stage.nas(example)?.done()?;
    let withdraws = example.contains("--withdraw");
    ensure!(printed.starts_with("rvt1") != withdraws, "{printed}");
    // An invitation that was taken back is gone from the list, with those of before.
    let list = stage.nas("peer list")?.done()?;
    ensure!(list.contains("invitation") != withdraws, "{list}");
    ensure!(before != printed, "the same ticket twice");
    Ok(())
}

fn trust(stage: &Stage, example: &str) -> anyhow::Result<()> {
    stage.fresh(example)?.done()?;
    let (_, alias) = example.split_once("--as ").context("an alias")?;
    let list = stage.fresh("peer list")?.done()?;
    ensure!(list.starts_with(alias) && list.contains("  trusted"), "{list}");
    Ok(())
}

fn untrust(stage: &Stage, example: &str) -> anyhow::Result<()> {
    stage.nas(example)?.done()?;
    let list = stage.nas("peer list")?.done()?;
    ensure!(list.contains("laptop") && list.contains("not trusted"), "{list}");
    Ok(())
}

fn alias(stage: &Stage, example: &str) -> anyhow::Result<()> {
    stage.fresh(example)?.done()?;
    let list = stage.fresh("peer list")?.done()?;
    ensure!(list.starts_with("nas ") && list.contains(&stage.nas_id), "{list}");
    Ok(())
}

fn list(stage: &Stage, example: &str) -> anyhow::Result<()> {
    let _echo = stage.nas_waits("peer listen --echo", "reach me with")?;
    let printed = stage.laptop(example)?.done()?;
    if example.contains("--json") {
        let printed: Value = serde_json::from_str(&printed)?;
        ensure!(printed["peers"][0]["alias"] == "nas", "{printed}");
        return Ok(());
    }
    ensure!(printed.starts_with("nas ") && printed.contains(&stage.nas_id), "{printed}");
    ensure!(printed.contains("  online") == example.contains("--online"), "{printed}");
    Ok(())
}

fn listen(stage: &Stage, example: &str) -> anyhow::Result<()> {
    if example.contains("--serve") {
        stage.serve("to = \"trusted\"\nforward = [\"localhost:80\"]")?;
    }
    let mut listener = stage.nas_waits(example, "reach me with")?;
    let connect = || stage.laptop("echo hello | peer connect nas");
    if let Some(file) = output_file(example) {
        listener.close_input();
        connect()?.done()?;
        listener.ends(0)?;
        ensure!(stage.at_nas(file)? == "hello\n", "other words arrived");
        return Ok(());
    }
    if let Some((_, file)) = example.split_once(" < ") {
        let printed = connect()?.done()?;
        ensure!(printed == stage.at_nas(file)?, "{printed:?} came");
        return listener.ends(0);
    }
    if example.contains("--echo") {
        ensure!(connect()?.done()? == "hello\n", "no echo");
    } else if example.contains(" -- ") {
        let printed = connect()?.done()?;
        ensure!(printed.contains("load average"), "{printed:?} is not what uptime says");
    } else if example.contains("--bench") {
        let printed = stage.laptop("peer bench nas --seconds 0.2 --direction up")?.done()?;
        ensure!(printed.contains("\nup "), "{printed}");
    } else if example.contains("localhost:80") || example.contains("--serve") {
        let _web = web_server_at(&stage.nas_host, "from the nas", 80)?;
        let forward = stage.laptop_waits("peer forward nas -L 8080:localhost:80", "listening at")?;
        ensure!(fetch(&stage.laptop_host, &["http://localhost:8080/hello"])? == "from the nas");
        forward.stop(Signal::SIGTERM, 0)?;
    } else if example.contains("--allow-listen 127.0.0.1:8000-8010") {
        let _web = web_server_at(&stage.laptop_host, "from the laptop", 3000)?;
        let forward =
            stage.laptop_waits("peer forward nas -R 8005:localhost:3000", "the other side listens at")?;
        ensure!(fetch(&stage.nas_host, &["http://localhost:8005/hello"])? == "from the laptop");
        forward.stop(Signal::SIGTERM, 0)?;
    } else {
        bail!("nothing proves that it does what it says");
    }
    listener.stop(Signal::SIGTERM, 0)
}

fn connect(stage: &Stage, example: &str) -> anyhow::Result<()> {
    if let Some(file) = output_file(example) {
        let listener = stage.nas_waits("peer listen < backup.tar", "reach me with")?;
        let mut program = stage.laptop(example)?;
        program.close_input();
        program.done()?;
        ensure!(stage.at_laptop(file)? == stage.at_nas("backup.tar")?, "other words arrived");
        return listener.ends(0);
    }
    let _echo = stage.nas_waits("peer listen --echo", "reach me with")?;
    let printed = stage.laptop(example)?.done()?;
    let wanted = match example.split_once(" < ") {
        Some((_, file)) => stage.at_laptop(file)?,
        None => "hello\n".to_owned(),
    };
    ensure!(printed == wanted, "{printed:?} came back");
    Ok(())
}

fn forward(stage: &Stage, example: &str) -> anyhow::Result<()> {
    const LISTEN: &str = "peer listen --allow-forward '*:*' --allow-forward 'udp:*:*' \
                          --allow-forward /run/docker.sock --allow-listen 127.0.0.1:9000";
    let listener = stage.nas_waits(LISTEN, "reach me with")?;
    let _web = web_server_at(&stage.nas_host, "from the nas", 80)?;
    let _own = web_server_at(&stage.laptop_host, "from the laptop", 3000)?;
    let count = ["-L ", "-R ", "-D "].iter().map(|flag| example.matches(flag).count()).sum::<usize>();
    ensure!(count > 0, "it forwards nothing");
    let forward = stage.laptop(example)?;
    for _ in 0..count {
        forward.says(if example.contains("-R ") { "listens at" } else { "listening at" })?;
    }
    if example.contains("8080:localhost:80") {
        ensure!(fetch(&stage.laptop_host, &["http://localhost:8080/hello"])? == "from the nas");
    } else if example.contains("-R 9000:localhost:3000") {
        ensure!(fetch(&stage.nas_host, &["http://localhost:9000/hello"])? == "from the laptop");
    } else if example.contains("-D 1080") {
        let through = ["--proxy", "socks5h://localhost:1080", "http://localhost/hello"];
        ensure!(fetch(&stage.laptop_host, &through)? == "from the nas");
    } else {
        // Where they lead to is not in this lab; that all of them stand is told.
        ensure!(count > 1, "nothing proves that it does what it says");
    }
    forward.stop(Signal::SIGTERM, 0)?;
    listener.stop(Signal::SIGTERM, 0)
}

fn ssh_proxy(stage: &Stage, example: &str) -> anyhow::Result<()> {
    let server = SshServer::start(&stage.nas_host, Some(22))?;
    let _listener = stage.nas_waits("peer listen --allow-forward localhost:22", "reach me with")?;
    // As it stands, with what lets us in, as root, and something to do there.
    let options = format!("ssh {} -o ", server.options().join(" "));
    let line = example.replace("ssh -o ", &options).replace("me@nas", "root@nas echo hello");
    ensure!(line.contains(" peer ssh-proxy ") || line.contains("'peer ssh-proxy "), "{line}");
    let printed = stage.laptop(&line)?.done()?;
    ensure!(printed == "hello\n", "{printed:?}");
    Ok(())
}

fn ping(stage: &Stage, example: &str) -> anyhow::Result<()> {
    let _echo = stage.nas_waits("peer listen --echo", "reach me with")?;
    let printed = stage.laptop(example)?.done()?;
    let wanted = if example.contains("--json") { "\"rtt_ms\":[" } else { " answered, " };
    ensure!(printed.contains(wanted), "{printed}");
    Ok(())
}

fn send(stage: &Stage, example: &str) -> anyhow::Result<()> {
    let receiver = stage.nas_waits("peer receive --from laptop incoming", "send to me with")?;
    stage.laptop(example)?.done()?;
    receiver.ends(0)?;
    let files: Vec<&str> = ["photos/one.jpg", "report.pdf", "big.iso"]
        .into_iter()
        .filter(|file| example.contains(file.split('/').next().unwrap_or(file)))
        .collect();
    ensure!(!files.is_empty(), "it sends what is not on the stage");
    for file in files {
        ensure!(stage.at_nas(&format!("incoming/{file}"))? == stage.at_laptop(file)?, "{file} differs");
    }
    Ok(())
}

fn receive(stage: &Stage, example: &str) -> anyhow::Result<()> {
    let folder = example.split_whitespace().last().unwrap_or_default();
    let arrived = || -> anyhow::Result<()> {
        ensure!(
            stage.at_nas(&format!("{folder}/report.pdf"))? == stage.at_laptop("report.pdf")?,
            "it differs"
        );
        Ok(())
    };
    if example.contains("--from") {
        let receiver = stage.nas_waits(example, "send to me with")?;
        stage.laptop("peer send report.pdf nas")?.done()?;
        arrived()?;
        let forever = example.contains("--forever");
        return if forever { receiver.stop(Signal::SIGTERM, 0) } else { receiver.ends(0) };
    }
    // Without --from somebody is asked, at a terminal.
    let place = stage.nas_path(folder)?;
    let arguments: Vec<&str> = example.split_whitespace().skip(1).collect();
    let (_, options) = arguments.split_last().context("a folder")?;
    let arguments = [options, &[place.as_str()]].concat();
    let home = stage.world.home("nas")?;
    let mut terminal = Terminal::start_in(&stage.nas_host, &binary("peer")?, &arguments, &home)?;
    terminal.wait_for("send to me with", PATIENCE)?;
    let sender = stage.laptop("peer send report.pdf nas")?;
    terminal.wait_for("Take it? [y/N]", PATIENCE)?;
    terminal.answer("y")?;
    sender.done()?;
    ensure!(terminal.wait(PATIENCE)?.success(), "it failed");
    arrived()
}

fn chat(stage: &Stage, example: &str) -> anyhow::Result<()> {
    if example.contains("--listen") {
        let listener = stage.nas_waits(example, "waiting for a call")?;
        stage.laptop("echo hello | peer chat nas")?.done()?;
        let printed = listener.done()?;
        ensure!(printed == "hello\n", "{printed:?}");
        return Ok(());
    }
    let listener = stage.nas_waits("peer chat --listen", "waiting for a call")?;
    let mut program = stage.laptop(example)?;
    let wanted = if example.contains("echo") { "backup done\n" } else { "hello\n" };
    program.types("hello\n")?;
    program.done()?;
    let printed = listener.done()?;
    ensure!(printed == wanted, "{printed:?}");
    Ok(())
}

fn up(stage: &Stage, example: &str) -> anyhow::Result<()> {
    let daemon = stage.nas_waits(example, "up as")?;
    let status = stage.nas("peer status")?.done()?;
    ensure!(status.contains("serves nothing"), "{status}");
    daemon.stop(Signal::SIGTERM, 0)
}

fn status(stage: &Stage, example: &str) -> anyhow::Result<()> {
    let daemon = stage.nas_waits("peer up", "registered")?;
    let printed = stage.nas(example)?.done()?;
    if example.contains("--json") {
        let printed: Value = serde_json::from_str(&printed)?;
        ensure!(printed["servers"][0]["state"] == "registered", "{printed}");
    } else {
        ensure!(printed.contains("registered over UDP"), "{printed}");
    }
    daemon.stop(Signal::SIGTERM, 0)
}

fn reload(stage: &Stage, example: &str) -> anyhow::Result<()> {
    let daemon = stage.nas_waits("peer up", "up as")?;
    stage.nas(example)?.done()?;
    daemon.says("the configuration was read again")?;
    daemon.stop(Signal::SIGTERM, 0)
}

fn down(stage: &Stage, example: &str) -> anyhow::Result<()> {
    let daemon = stage.nas_waits("peer up", "up as")?;
    stage.nas(example)?.done()?;
    daemon.ends(0)
}

fn bench(stage: &Stage, example: &str) -> anyhow::Result<()> {
    let listener = stage.nas_waits("peer listen --bench", "reach me with")?;
    let printed = stage.laptop(example)?.done()?;
    let wanted = if example.contains("--json") { "\"direction\":\"down\"" } else { "\ndown " };
    ensure!(printed.contains(wanted), "{printed}");
    listener.stop(Signal::SIGTERM, 0)
}

fn explain(stage: &Stage, example: &str) -> anyhow::Result<()> {
    let _echo = stage.nas_waits("peer listen --echo", "reach me with")?;
    let program = stage.laptop(example)?;
    program.says("direct")?;
    program.done()?;
    Ok(())
}

fn doctor(stage: &Stage, example: &str) -> anyhow::Result<()> {
    let printed = stage.laptop(example)?.done()?;
    let Some(file) = output_file(example) else {
        ensure!(printed.contains("ndpoint-independent"), "{printed}");
        return Ok(());
    };
    let report: Value = serde_json::from_str(&stage.at_laptop(file)?)?;
    ensure!(report["ipv4"]["mapping"] == "endpoint-independent", "{report}");
    Ok(())
}

fn completions(stage: &Stage, example: &str) -> anyhow::Result<()> {
    let printed = stage.laptop(example)?.done()?;
    let script = output_file(example).map_or(Ok(printed), |file| stage.at_laptop(file))?;
    ensure!(script.contains("PEER_COMPLETE"), "{script}");
    Ok(())
}

fn man(stage: &Stage, example: &str) -> anyhow::Result<()> {
    stage.laptop(example)?.done()?;
    let page = output_file(example).map_or_else(|| "target/man/peer-chat.1".to_owned(), str::to_owned);
    ensure!(stage.at_laptop(&page)?.contains(".SH EXAMPLES"), "{page}");
    Ok(())
}
