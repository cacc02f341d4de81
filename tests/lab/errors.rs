//! What goes wrong, each as a person meets it: the exit code, the cause and the next step in words, the same with `--json`, and nothing on standard
//! output. What takes a transfer or a terminal to go wrong is with those (`sending`, `chat`).

use std::path::Path;
use std::process::{Output, Stdio};

use anyhow::{Context as _, ensure};
use end_to_end::process::{PATIENCE, Program, binary};
use end_to_end::world::World;
use libtest_mimic::Trial;
use netsim::{Host, Lab};
use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::setup::homes;
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("errors::names_and_words", names_and_words),
        trial("errors::peers_that_are_not_there", not_there),
        trial("errors::peers_that_refuse", refuse),
        trial("errors::ports", ports),
        trial("errors::files_without_permission", files_without_permission),
        trial("errors::full_disks", full_disks),
        trial("errors::a_server_that_is_not_there", no_server),
        trial("errors::of_the_server", of_the_server),
        trial("errors::whoever_reads_has_had_enough", nobody_reads),
        trial("errors::standard_output_has_data_only", data_only),
    ]
}

const NOBODY: &str = "aebagbafaydqqcikbmga2dqpcaireeyuculbogazdinryhi6d4qa";

/// How a command line fails.
struct Case<'a> {
    /// What stands before the program: a shell's redirection, fewer permissions.
    wrapper: &'a [&'a str],
    arguments: &'a [&'a str],
    code: i32,
    /// The cause, and the next step.
    words: &'a [&'a str],
}

const fn case<'a>(arguments: &'a [&'a str], code: i32, words: &'a [&'a str]) -> Case<'a> {
    Case { wrapper: &[], arguments, code, words }
}

/// Two machines; `laptop` is set up and knows nobody.
struct Place {
    world: World,
    a: Host,
    b: Host,
    folder: TempDir,
}

impl Place {
    fn new() -> anyhow::Result<Self> {
        let (world, a, b) = homes()?;
        world.done(&a, "laptop", &["init", &world.address])?;
        Ok(Self { world, a, b, folder: TempDir::new()? })
    }

    fn run(&self, name: &str, case: &Case<'_>, json: bool) -> anyhow::Result<Output> {
        let program = binary("peer")?;
        let mut command = match case.wrapper {
            [] => self.a.command(program),
            [wrapper, rest @ ..] => {
                let mut command = self.a.command(wrapper);
                command.args(rest).arg(program);
                command
            }
        };
        command.arg(case.arguments[0]).args(json.then_some("--json")).args(&case.arguments[1..]);
        command.current_dir(self.folder.path()).envs(self.world.home(name)?);
        for variable in ["PEER_SERVER", "PEER_KEY", "RUST_LOG", "HTTPS_PROXY", "https_proxy"] {
            command.env_remove(variable);
        }
        Ok(command.output()?)
    }

    /// Each must fail as it says, in words and as JSON.
    fn fail(&self, name: &str, cases: &[Case<'_>]) -> anyhow::Result<()> {
        for case in cases {
            for json in [false, true] {
                let output = self.run(name, case, json)?;
                check(&output, case, json).with_context(|| format!("{:?}, JSON: {json}", case.arguments))?;
            }
        }
        Ok(())
    }
}

fn check(output: &Output, case: &Case<'_>, json: bool) -> anyhow::Result<()> {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(case.code), "{}: {said}", output.status);
    ensure!(output.stdout.is_empty(), "on standard output: {:?}", String::from_utf8_lossy(&output.stdout));
    let message = if json {
        let lines = said.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>();
        let lines = lines.with_context(|| format!("not all of it is JSON: {said}"))?;
        let error = lines.last().context("nothing is said")?;
        ensure!(error["event"] == "error" && error["code"] == case.code, "{error}");
        error["message"].as_str().context("a message")?.to_owned()
    } else {
        ensure!(!said.contains("panicked") && !said.contains('\u{1b}'), "{said}");
        said.into_owned()
    };
    for word in case.words {
        ensure!(message.contains(word), "no {word:?} in {message:?}");
    }
    Ok(())
}

fn names_and_words() -> anyhow::Result<()> {
    let place = Place::new()?;
    place.world.done(&place.a, "laptop", &["alias", "me", NOBODY])?;
    let short = &NOBODY[..51];
    let init: &[&str] = &["no rendezvous server", "peer init rv://", "--server"];
    place.fail(
        "fresh",
        &[
            case(&["connect", NOBODY], 2, init),
            case(&["chat", NOBODY], 2, init),
            case(&["chat", "--listen"], 2, init),
            case(&["connect", "nas"], 2, &["no peer with the alias nas", "peer alias nas PEER"]),
        ],
    )?;
    place.fail(
        "laptop",
        &[
            case(&["connect", short], 2, &["invalid value", short, "52 characters"]),
            case(&["ping", "no such thing"], 2, &["neither an alias, nor the id of a peer, nor a ticket"]),
            case(&["chat", "nas"], 2, &["no peer with the alias nas", "`peer list`"]),
            case(&["chat"], 2, &["<PEER>", "--help"]),
            case(&["chat", "--listen", "me"], 2, &["cannot be used with", "--help"]),
            case(&["trust", "rvt1qqqqqqqqqq"], 2, &["checksum"]),
            case(&["init", "http://vps.example"], 2, &["rv://"]),
            case(&["untrust", "nas"], 2, &["alias nas", "`peer list`"]),
            case(&["alias", "me", short], 2, &["52 characters"]),
            case(
                &["alias", "me", "aeaqcaibaeaqcaibaeaqcaibaeaqcaibaeaqcaibaeaqcaibaeaq"],
                2,
                &["me is taken", "Choose another"],
            ),
            case(&["ping", NOBODY, "--interval", "0"], 2, &["from 0.01 to 3600"]),
            case(&["forward", "me"], 2, &["nothing to forward", "-L 8080:localhost:80"]),
            case(&["forward", "me", "-L", "8080"], 2, &["8080", "--help"]),
            case(&["send", "nothing", "me"], 2, &["nothing", "No such file", "FILE... PEER"]),
            case(&["receive"], 2, &["--from PEER", "terminal"]),
            case(&["listen", "--colour"], 2, &["--colour", "--help"]),
            case(&["invite", "--withdraw", "12345678"], 2, &["12345678", "`peer list`"]),
        ],
    )
}

fn not_there() -> anyhow::Result<()> {
    let place = Place::new()?;
    let words: &[&str] = &[NOBODY, "is not online", "or does not accept you", "`peer listen`"];
    place.fail(
        "laptop",
        &[
            case(&["connect", NOBODY], 4, words),
            case(&["ping", NOBODY], 4, words),
            case(&["explain", NOBODY], 4, words),
            case(&["ssh-proxy", NOBODY], 4, words),
            case(&["forward", NOBODY, "-L", "0:localhost:80"], 4, words),
            case(&["send", "--wait", "0", "/etc/hosts", NOBODY], 4, words),
            case(&["chat", "--wait", "0", NOBODY], 4, words),
        ],
    )
}

fn refuse() -> anyhow::Result<()> {
    let place = Place::new()?;
    let world = &place.world;
    let nas = world.done(&place.b, "nas", &["init", &world.address])?;
    let laptop = world.done(&place.a, "laptop", &["id"])?;
    world.done(&place.b, "nas", &["trust", &laptop, "--as", "laptop"])?;
    let arguments = ["listen", "--allow-forward", "localhost:80", "--allow-listen", "127.0.0.1:80"];
    let mut listener = world.person(&place.b, "nas", &arguments)?;
    listener.named("listening")?;
    place.fail(
        "laptop",
        &[
            case(&["connect", &nas], 6, &["refused", "peer listen --allow-forward"]),
            case(&["ssh-proxy", &nas], 6, &["localhost:22", "refused", "peer listen --allow-forward"]),
            case(&["forward", &nas, "-R", "81:localhost:80"], 6, &["does not listen at", "refused"]),
            case(&["send", "/etc/hosts", &nas], 6, &["takes no files", "`peer receive`"]),
            case(&["chat", &nas], 6, &["does not talk", "`peer chat`"]),
        ],
    )?;
    // What is allowed, and does not work.
    place.fail(
        "laptop",
        &[case(
            &["forward", &nas, "-R", "80:nowhere.invalid:80", "-L", "1.2.3.4:0:localhost:80"],
            1,
            &["1.2.3.4", "no address of this machine"],
        )],
    )
}

/// Without any of root's rights; what root owns is one's own.
const ORDINARY: &[&str] = &["setpriv", "--bounding-set=-all", "--inh-caps=-all"];

/// How a command line of an ordinary user fails.
const fn ordinary<'a>(arguments: &'a [&'a str], words: &'a [&'a str]) -> Case<'a> {
    Case { wrapper: ORDINARY, arguments, code: 1, words }
}

/// What is said of a file that may not be read or written.
const fn denied(what: &str) -> [&str; 4] {
    [what, "ermission denied", "ls -ld", "another place"]
}

fn ports() -> anyhow::Result<()> {
    let place = Place::new()?;
    let taken = place.a.run(|| std::net::TcpListener::bind("127.0.0.1:0"))?;
    let taken_at = format!("{}:localhost:80", taken.local_addr()?.port());
    let ordinary = ["forward", NOBODY, "-L", "80:localhost:80"];
    place.fail(
        "laptop",
        &[
            case(&["forward", NOBODY, "-L", &taken_at], 1, &["in use", "choose another port"]),
            Case {
                wrapper: ORDINARY,
                ..case(&ordinary, 1, &["127.0.0.1:80", "ermission denied", "below 1024"])
            },
        ],
    )
}

fn set_mode(path: &Path, mode: u32) -> anyhow::Result<()> {
    Ok(std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode))?)
}

fn files_without_permission() -> anyhow::Result<()> {
    let place = Place::new()?;
    let path = |name: &str| place.folder.path().join(name).to_str().map(str::to_owned).context("UTF-8");
    let (locked, key, garbage, secret) =
        (path("locked")?, path("key.pem")?, path("garbage.pem")?, path("secret")?);
    std::fs::create_dir(&locked)?;
    for file in [&key, &garbage, &secret] {
        std::fs::write(file, "this is no key")?;
    }
    set_mode(Path::new(&locked), 0o500)?;
    for file in [&key, &secret] {
        set_mode(Path::new(file), 0o000)?;
    }
    let (inside, new_key) = (format!("{locked}/Downloads"), format!("{locked}/new.pem"));
    place.fail(
        "laptop",
        &[
            ordinary(&["id", "--key", &key], &denied(&key)),
            ordinary(&["id", "--key", &new_key], &denied(&locked)),
            ordinary(&["receive", "--from", NOBODY, &inside], &denied(&inside)),
            ordinary(&["send", "--wait", "0", &secret, NOBODY], &denied(&secret)),
            case(&["id", "--key", &garbage], 1, &[&garbage, "no usable key", "backup", "move it away"]),
        ],
    )?;
    // The files of the person.
    let [(_, config), (_, data), ..] = place.world.home("laptop")?;
    let config = format!("{config}/peer/config.toml");
    set_mode(Path::new(&config), 0o000)?;
    place.fail("laptop", &[ordinary(&["list"], &denied(&config))])?;
    set_mode(Path::new(&config), 0o600)?;
    let peers = format!("{data}/peer/peers.toml");
    std::fs::write(&peers, "damaged")?;
    place.fail("laptop", &[case(&["list"], 1, &[&peers, "damaged", "backup", "move it away"])])?;
    std::fs::remove_file(&peers)?;
    let data = format!("{data}/peer");
    set_mode(Path::new(&data), 0o500)?;
    place.fail("laptop", &[ordinary(&["alias", "nas", NOBODY], &["ermission denied", &data, "ls -ld"])])?;
    // Pages, which have no --json.
    let (arguments, words) = (["man", &inside], denied(&inside));
    let man = ordinary(&arguments, &words);
    check(&place.run("laptop", &man, false)?, &man, false)
}

/// A folder on a disk that is full.
const FULL: &[&str] = &[
    "unshare",
    "--mount",
    "sh",
    "-c",
    "mount -t tmpfs -o size=64k none full && { cat /dev/zero >full/all 2>/dev/null; exec \"$0\" \"$@\"; }",
];

const fn full<'a>(arguments: &'a [&'a str], words: &'a [&'a str]) -> Case<'a> {
    Case { wrapper: FULL, arguments, code: 1, words }
}

fn full_disks() -> anyhow::Result<()> {
    let place = Place::new()?;
    std::fs::create_dir(place.folder.path().join("full"))?;
    place
        .fail("laptop", &[full(&["id", "--key", "full/key.pem"], &["full", "No space left", "Make room"])])?;
    for arguments in [&["man", "full/man"][..], &["man", "full"]] {
        let case = full(arguments, &["full", "No space left", "Make room"]);
        check(&place.run("laptop", &case, false)?, &case, false)?;
    }
    // Nor is there room for what is printed.
    const OUTPUT: &[&str] = &["sh", "-c", "exec \"$0\" \"$@\" >/dev/full"];
    for arguments in [&["id"][..], &["invite"], &["list"]] {
        let words = &["standard output cannot be written", "No space left"];
        place.world.done(&place.a, "laptop", &["alias", "somebody", NOBODY])?;
        place.fail("laptop", &[Case { wrapper: OUTPUT, arguments, code: 1, words }])?;
    }
    Ok(())
}

fn no_server() -> anyhow::Result<()> {
    let mut place = Place::new()?;
    place.world.server.signal(Signal::SIGTERM)?;
    place.world.server.wait(PATIENCE)?;
    place.fail("laptop", &[case(&["ping", NOBODY], 3, &["no answer", "UDP port 443"])])
}

/// `rendezvous` has no `--json` for what goes wrong: its journal is for people.
fn of_the_server() -> anyhow::Result<()> {
    let mut lab = Lab::new(7)?;
    let host = lab.add_server("vps")?;
    let folder = TempDir::new()?;
    let state = folder.path().join("state").to_str().context("UTF-8")?.to_owned();
    let locked = folder.path().join("locked").to_str().context("UTF-8")?.to_owned();
    std::fs::create_dir(&locked)?;
    set_mode(Path::new(&locked), 0o500)?;
    let run = |wrapper: &[&str], arguments: &[&str]| -> anyhow::Result<Output> {
        let words: Vec<String> = wrapper.iter().map(|word| (*word).to_owned()).collect();
        let program = binary("rendezvous")?.display().to_string();
        let all: Vec<String> = words
            .into_iter()
            .chain([program])
            .chain(arguments.iter().map(|word| (*word).to_owned()))
            .collect();
        Ok(host.command(&all[0]).args(&all[1..]).env_remove("RUST_LOG").output()?)
    };
    let serve = ["serve", "--state-dir", &state];
    let _first = Program::start(&host, "rendezvous", &[&serve[..], &["--json"]].concat(), false)?.ready()?;
    for (wrapper, arguments, code, words) in [
        (&[][..], &serve[..], 1, &["UDP", "443", "ss -ulpn", "--port"][..]),
        (ORDINARY, &[&serve[..], &["--port", "80"]].concat(), 1, &["80", "setcap", "--port"]),
        (
            ORDINARY,
            &["serve", "--state-dir", &format!("{locked}/x")],
            1,
            &[&locked, "ermission denied", "--state-dir"],
        ),
        (&[], &["serve", "--reflection-ports", "1"], 2, &["two ports", "3478,3479"]),
        (&[], &["serve", "--listen", "192.0.2.99", "--state-dir", &state], 1, &["192.0.2.99", "ip address"]),
        (&[], &["sreve"], 2, &["sreve", "serve"]),
    ] {
        let output = run(wrapper, arguments)?;
        let case = Case { wrapper, arguments, code, words };
        check(&output, &case, false).with_context(|| format!("rendezvous {arguments:?}"))?;
    }
    Ok(())
}

trait Ready: Sized {
    fn ready(self) -> anyhow::Result<Self>;
}

impl Ready for Program {
    fn ready(mut self) -> anyhow::Result<Self> {
        self.named("ready")?;
        Ok(self)
    }
}

/// A reader that goes away, as `head` does, is no error, and no panic.
fn nobody_reads() -> anyhow::Result<()> {
    let place = Place::new()?;
    place.world.done(&place.a, "laptop", &["alias", "somebody", NOBODY])?;
    // The pipe is closed before anything is written: what comes from `sleep` holds the program up that long.
    const CLOSED: &str = "set -o pipefail; exec 3>&1; \"$0\" \"$@\" 2>&3 3>&- | exec 3>&-";
    for arguments in [&["id"][..], &["list"], &["invite"], &["completions", "bash"], &["man"], &["--help"]] {
        let output = place.run(
            "laptop",
            &Case { wrapper: &["bash", "-c", CLOSED], arguments, code: 0, words: &[] },
            false,
        )?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(!said.contains("panicked") && !said.contains("roken pipe"), "{arguments:?}: {said}");
        ensure!(output.status.success(), "{arguments:?}: {}: {said}", output.status);
    }
    // Nobody hears what is said either.
    const DEAF: &str = "exec \"$0\" \"$@\" 2>/dev/full";
    let case = Case { wrapper: &["sh", "-c", DEAF], arguments: &["ping", NOBODY], code: 4, words: &[] };
    let output = place.run("laptop", &case, false)?;
    ensure!(output.status.code() == Some(4), "{}", output.status);
    Ok(())
}

/// With everything that may be said, standard output has what was asked for, and nothing else; nor is there a colour in either where there is no
/// terminal, or where nobody wants one.
fn data_only() -> anyhow::Result<()> {
    let place = Place::new()?;
    let world = &place.world;
    let nas = world.done(&place.b, "nas", &["init", &world.address])?;
    let mut listener = world.person(&place.b, "nas", &["listen", "--echo"])?;
    listener.named("listening")?;
    world.done(&place.a, "laptop", &["alias", "nas", &nas])?;
    let id = world.done(&place.a, "laptop", &["id"])?;
    type Proof<'a> = Box<dyn Fn(&str) -> bool + 'a>;
    let empty = || -> Proof<'static> { Box::new(str::is_empty) };
    let lines: [(&[&str], Proof<'_>); 12] = [
        (&["id"], Box::new(|output| output.trim_end() == id)),
        (&["init", &world.address], Box::new(|output| output.trim_end() == id)),
        (&["invite"], Box::new(|output| output.starts_with("rvt1") && output.lines().count() == 1)),
        (&["trust", "nas"], empty()),
        (&["untrust", "nas"], empty()),
        (&["alias", "nas", &nas], empty()),
        (
            &["list"],
            Box::new(|output| {
                output.lines().all(|line| line.starts_with("nas ") || line.starts_with("invitation "))
            }),
        ),
        (
            &["ping", "nas", "--count", "2", "--interval", "0.05"],
            Box::new(|output| output.lines().all(|line| line.contains(" ms") || line.contains(" answered"))),
        ),
        (&["connect", "nas"], empty()),
        (&["explain", "nas"], empty()),
        (&["doctor"], Box::new(|output| output.contains("Mapping") || output.contains("mapping"))),
        (&["completions", "bash"], Box::new(|output| output.contains("complete "))),
    ];
    for (arguments, proof) in &lines {
        for verbose in [false, true] {
            let more: &[&str] = if verbose { &["-vv"] } else { &[] };
            let arguments = [arguments, more].concat();
            let output = world.run(&place.a, "laptop", &arguments)?;
            let (data, said) = (String::from_utf8(output.stdout)?, String::from_utf8_lossy(&output.stderr));
            ensure!(output.status.success(), "{arguments:?}: {}: {said}", output.status);
            ensure!(proof(&data), "{arguments:?}: on standard output: {data}");
            ensure!(
                !data.contains('\u{1b}') && !said.contains('\u{1b}'),
                "{arguments:?}: coloured: {data}{said}"
            );
        }
    }
    coloured(&place)
}

/// At a terminal colours come unless `NO_COLOR` is set.
fn coloured(place: &Place) -> anyhow::Result<()> {
    for (variables, wanted) in [(&[][..], true), (&["NO_COLOR=1"], false), (&["TERM=dumb"], false)] {
        let line = format!("env {} {} list -vv --online", variables.join(" "), binary("peer")?.display());
        let mut command = place.a.command("script");
        command.args(["--quiet", "--return", "--command", &line, "/dev/null"]).stdin(Stdio::null());
        command.env("TERM", "xterm").env_remove("NO_COLOR").env_remove("RUST_LOG");
        let output = command.envs(place.world.home("laptop")?).output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(said.contains("nas"), "{said}");
        ensure!(said.contains("\u{1b}[") == wanted, "{variables:?}: {said:?}");
    }
    Ok(())
}
