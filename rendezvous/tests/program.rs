//! The program as its user meets it.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use rendezvous_wire::{PeerId, RendezvousAddress};

fn program(state: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rendezvous"));
    command.env("STATE_DIRECTORY", state).env_remove("RUST_LOG").stderr(Stdio::piped());
    command
}

fn run(command: &mut Command) -> Output {
    command.output().unwrap()
}

fn id(state: &Path) -> PeerId {
    let output = run(program(state).arg("id"));
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
}

/// A serving program, ended by dropping it at the latest.
struct Serving {
    child: Child,
    out: BufReader<ChildStdout>,
    ready: serde_json::Value,
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn serve(state: &Path) -> Serving {
    let arguments =
        ["serve", "--listen", "127.0.0.1", "--port", "0", "--reflection-ports", "0,0", "--json", "-q"];
    let mut child = program(state).args(arguments).stdout(Stdio::piped()).spawn().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    Serving { child, out, ready: serde_json::from_str(&line).expect("a line of JSON") }
}

fn end(mut serving: Serving, signal: &str) {
    let pid = serving.child.id().to_string();
    assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    assert_eq!(serving.child.wait().unwrap().code(), Some(0));
    let mut rest = String::new();
    serving.out.read_to_string(&mut rest).unwrap();
    let stopped: serde_json::Value = serde_json::from_str(&rest).unwrap();
    assert_eq!((&stopped["event"], &stopped["relay"]["overflowed"]), (&"stopped".into(), &0.into()));
}

#[test]
fn the_id_stays_and_is_in_the_address() {
    let state = tempfile::tempdir().unwrap();
    let id = id(state.path());
    assert_eq!(self::id(state.path()), id);
    let serving = serve(state.path());
    let address: RendezvousAddress = serving.ready["address"].as_str().unwrap().parse().unwrap();
    assert_eq!((address.id, address.host.as_str()), (id, "127.0.0.1"));
    assert_eq!(serving.ready["event"], "ready");
    assert_eq!(serving.ready["signalling_port"], address.port);
    assert_eq!(serving.ready["reflection_ports"].as_array().unwrap().len(), 2);
}

#[test]
fn a_signal_ends_it_cleanly() {
    let state = tempfile::tempdir().unwrap();
    end(serve(state.path()), "-TERM");
    end(serve(state.path()), "-INT");
}

#[test]
fn a_port_in_use_is_named_with_a_way_out() {
    let state = tempfile::tempdir().unwrap();
    let serving = serve(state.path());
    let port = serving.ready["signalling_port"].to_string();
    let output = run(program(state.path()).args(["serve", "--listen", "127.0.0.1", "--port", &port]));
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(message.contains(&port) && message.contains("--port"), "{message}");
}

#[test]
fn a_broken_key_file_is_named_and_kept() {
    let state = tempfile::tempdir().unwrap();
    let file = state.path().join("server.key");
    std::fs::write(&file, "not a key").unwrap();
    let output = run(program(state.path()).arg("id"));
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().contains("server.key"));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "not a key");
}

#[test]
fn wrong_usage_exits_with_two() {
    let state = tempfile::tempdir().unwrap();
    for arguments in [
        &["serve", "--reflection-ports", "3478"][..],
        &["serve", "--reflection-ports", "5,5"],
        &["serve", "--port", "70000"],
        &["serve", "--host", "no such host"],
        &["serve", "-v", "-q"],
        &["serves"],
        &[],
    ] {
        assert_eq!(run(program(state.path()).args(arguments)).status.code(), Some(2), "{arguments:?}");
    }
    for arguments in [&["--help"][..], &["serve", "--help"], &["--version"]] {
        assert_eq!(run(program(state.path()).args(arguments)).status.code(), Some(0), "{arguments:?}");
    }
}
