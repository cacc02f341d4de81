//! The program does what its help says. It enters its own user namespace, so the usual harness will do.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn netsim() -> Command {
    Command::new(env!("CARGO_BIN_EXE_netsim"))
}

fn run(arguments: &[&str]) -> Output {
    netsim().args(arguments).output().expect("netsim starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_probe_that_agrees_succeeds() {
    let output = run(&["probe", "eim-adf", "--input", "reject", "--json"]);
    let reports: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(reports[0]["agrees"], true, "{reports}");
    assert_eq!(reports[0]["observed"]["filtering"], "address-dependent");
    assert!(output.status.success());
}

#[test]
fn programs_run_in_their_hosts_and_the_first_failure_is_the_result() {
    let output = run(&[
        "run",
        "--site",
        "a=eim-apdf,hosts=2",
        "--server",
        "s",
        "a.1:ip -brief address show eth0",
        "a:echo to $NETSIM_S; exit 7",
        "s&:sleep 1000",
    ]);
    let stdout = text(&output.stdout);
    assert!(stdout.contains("[a] to 203.0.113.10\n"), "{stdout}");
    assert!(
        stdout.lines().any(|line| line.starts_with("[a.1] eth0") && line.contains("192.168.1.11/24")),
        "{stdout}"
    );
    assert_eq!(output.status.code(), Some(7));
}

#[test]
fn a_mistake_is_answered_with_what_there_is() {
    let output = run(&["run", "--site", "a=public", "b:true"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("there are: a"), "{}", text(&output.stderr));
    let output = run(&["topology", "--site", "a=full-cone"]);
    assert!(text(&output.stderr).contains("eim-eif"), "{}", text(&output.stderr));
    let output = run(&["topology", "--site", "a=public,delay=20"]);
    assert!(text(&output.stderr).contains("needs a unit"), "{}", text(&output.stderr));
}

#[test]
fn a_missing_tool_is_named_with_its_package() {
    let tools = tempfile::tempdir().expect("a directory");
    let sleep =
        ["/usr/bin/sleep", "/bin/sleep"].into_iter().find(|path| fs::exists(path).is_ok_and(|there| there));
    symlink(sleep.expect("sleep"), tools.path().join("sleep")).expect("a link");
    let output = netsim().arg("topology").env("PATH", tools.path()).output().expect("netsim starts");
    let stderr = text(&output.stderr);
    assert!(stderr.contains("`ip`") && stderr.contains("iproute2"), "{stderr}");
}

#[test]
fn a_signal_ends_everything() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let marker = format!("NETSIM_TEST_MARKER=cli-{signal}-{}", std::process::id());
        let (key, value) = marker.split_once('=').expect("there is one");
        // A background job may have inherited that SIGINT is ignored, and the lab would respect that.
        let mut lab = Command::new("env")
            .args(["--default-signal=INT,TERM", env!("CARGO_BIN_EXE_netsim")])
            .args(["run", "--site", "a=public", "a:sleep 1000 & echo up; wait"])
            .env(key, value)
            .stdout(Stdio::piped())
            .spawn()
            .expect("netsim starts");
        let mut line = String::new();
        BufReader::new(lab.stdout.take().expect("piped")).read_line(&mut line).expect("its output");
        assert_eq!(line, "[a] up\n");
        kill(Pid::from_raw(lab.id().cast_signed()), signal).expect("it runs");
        assert!(!lab.wait().expect("it ends").success());
        let deadline = Instant::now() + Duration::from_secs(5);
        while anyone_has(&marker) {
            assert!(Instant::now() < deadline, "programs are left after {signal}");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Whether any process was started with this variable.
fn anyone_has(variable: &str) -> bool {
    fs::read_dir("/proc").expect("/proc").flatten().any(|entry| {
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|found| found == variable.as_bytes())
    })
}
