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

/// A file in the state directory.
fn configure(state: &Path, text: &str) -> std::path::PathBuf {
    let path = state.join("rendezvous.toml");
    std::fs::write(&path, text).unwrap();
    path
}

const LOCAL: &str = "[network]\nlisten = [\"127.0.0.1\"]\nport = 0\nreflection_ports = [0, 0]\n";

#[test]
fn the_default_configuration_is_printed_and_can_be_used() {
    let state = tempfile::tempdir().unwrap();
    let output = run(program(state.path()).args(["config", "default"]));
    assert!(output.status.success());
    let path = configure(state.path(), &String::from_utf8(output.stdout).unwrap());
    let shown =
        |config: &Path| run(program(state.path()).args(["config", "show", "--config"]).arg(config)).stdout;
    let empty = state.path().join("empty.toml");
    std::fs::write(&empty, "").unwrap();
    assert_eq!(String::from_utf8(shown(&path)).unwrap(), String::from_utf8(shown(&empty)).unwrap());
}

#[test]
fn a_configuration_that_is_missing_or_wrong_stops_every_command_and_is_named() {
    let state = tempfile::tempdir().unwrap();
    let wrong = configure(state.path(), "[network]\nport = 443\nhost = \"a\"\n");
    for command in ["serve", "check", "peers", "id"] {
        let missing = run(program(state.path()).args([command, "--config", "/nonexistent.toml"]));
        let said = String::from_utf8(missing.stderr).unwrap();
        assert!(missing.status.code() == Some(1) && said.contains("/nonexistent.toml"), "{command}: {said}");
        let unknown = run(program(state.path()).args([command, "--config"]).arg(&wrong));
        let said = String::from_utf8(unknown.stderr).unwrap();
        assert!(
            unknown.status.code() == Some(1) && said.contains("line 3") && said.contains("`host`"),
            "{command}: {said}"
        );
    }
}

#[test]
fn a_flag_goes_before_the_configuration_and_a_signal_has_it_read_again() {
    let state = tempfile::tempdir().unwrap();
    let path = configure(state.path(), &LOCAL.replace("port = 0\n", "port = 1\n"));
    let mut child = program(state.path())
        .args(["serve", "--port", "0", "--json", "-q", "--config"])
        .arg(&path)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = || {
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        serde_json::from_str::<serde_json::Value>(&line).expect("a line of JSON")
    };
    assert_ne!(line()["signalling_port"], 1);
    let hang_up = || Command::new("kill").args(["-HUP", &child.id().to_string()]).status().unwrap();
    configure(
        state.path(),
        &format!("drain_seconds = 3\n{LOCAL}relay_threads = 9\n[limits]\nregistrations = 0\n"),
    );
    assert!(hang_up().success());
    let reloaded = line();
    assert_eq!(reloaded["event"], "reloaded");
    assert_eq!(reloaded["changed"], serde_json::json!(["drain_seconds", "limits.registrations"]));
    assert_eq!(reloaded["waiting"], serde_json::json!(["network.relay_threads"]));
    // What cannot be read changes nothing, and ends nothing.
    configure(state.path(), "nonsense");
    assert!(hang_up().success());
    let stats = run(program(state.path()).args(["stats", "--json", "--state-dir"]).arg(state.path()));
    assert!(stats.status.success(), "{stats:?}");
    assert!(Command::new("kill").arg(child.id().to_string()).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_check_finds_what_is_wrong_and_what_a_running_server_holds_is_not() {
    let state = tempfile::tempdir().unwrap();
    let serving = serve(state.path());
    let ports = &serving.ready["reflection_ports"];
    let text = format!(
        "[network]\nlisten = [\"127.0.0.1\"]\nport = {}\nreflection_ports = [{}, {}]\n",
        serving.ready["signalling_port"], ports[0], ports[1]
    );
    let path = configure(state.path(), &text);
    let check = |state: &Path| {
        let output = run(program(state).args(["check", "--json", "--config"]).arg(&path));
        let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        (output.status.code(), found)
    };
    let (code, found) = check(state.path());
    assert_eq!((code, &found["wrong"]), (Some(0), &0.into()), "{found}");
    assert!(found["findings"].to_string().contains("this machine reaches UDP"), "{found}");
    // Another server's state, and these ports are taken.
    let other = tempfile::tempdir().unwrap();
    let (code, found) = check(other.path());
    assert_eq!(code, Some(1));
    assert!(found["wrong"].as_u64().unwrap() >= 3 && found.to_string().contains("ss -ulpn"), "{found}");
}

#[test]
fn commands_speak_to_a_running_server_and_say_so_when_there_is_none() {
    let state = tempfile::tempdir().unwrap();
    let id = PeerId::from_bytes([7; 32]).to_string();
    let absent = run(program(state.path()).arg("peers"));
    assert_eq!(absent.status.code(), Some(1));
    assert!(String::from_utf8(absent.stderr).unwrap().contains("rendezvous serve"));

    let serving = serve(state.path());
    let command = |arguments: &[&str]| {
        let output = run(program(state.path()).args(arguments));
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let json = |arguments: &[&str]| -> serde_json::Value {
        serde_json::from_str(&command(&[arguments, &["--json"]].concat())).unwrap()
    };
    assert_eq!(json(&["ban", &id, "--for", "1d", "--reason", "too loud"])["changed"], true);
    assert!(command(&["ban"]).contains("too loud"));
    assert_eq!(json(&["ban"])["banned"][0]["peer"], id);
    assert!(command(&["unban", &id]).contains("banned no more"));
    assert!(command(&["unban", &id]).contains("was not banned"));
    assert!(command(&["admit", &id, "--note", "the laptop"]).contains("may register"));
    assert_eq!(json(&["admit"])["admitted"][0]["note"], "the laptop");
    assert_eq!(json(&["admit", &id, "--withdraw"])["changed"], true);
    let made = json(&["token", "new", "--uses", "3", "--expires", "7d"]);
    let address = made["token"]["address"].as_str().unwrap();
    let (server, token) = address.split_once('#').unwrap();
    assert_eq!(server, serving.ready["address"]);
    token.parse::<rendezvous_wire::Token>().unwrap();
    assert!(!command(&["token", "list"]).contains(token), "shown once");
    assert_eq!(json(&["token", "withdraw", "1"])["changed"], true);
    assert_eq!(json(&["token", "withdraw", "1"])["changed"], false);
    assert!(command(&["peers"]).contains("nobody"));
    assert!(command(&["sessions"]).contains("nobody"));
    assert!(command(&["stats"]).contains("registrations"));
    // Nobody else may ask: here that can be tried by root alone, who can become somebody else.
    if nix::unistd::geteuid().is_root() {
        use std::os::unix::fs::PermissionsExt as _;
        use std::os::unix::process::CommandExt as _;
        let socket = state.path().join("control.sock");
        for (path, mode) in [(state.path(), 0o755), (&socket, 0o666)] {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        }
        // The program itself may lie where nobody else may look: a copy that everybody may run.
        let copy = state.path().join("rendezvous");
        std::fs::copy(env!("CARGO_BIN_EXE_rendezvous"), &copy).unwrap();
        std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o755)).unwrap();
        let mut asking = Command::new(&copy);
        asking.args(["peers", "--state-dir"]).arg(state.path()).uid(65534).gid(65534).env_clear();
        let denied = run(asking.stderr(Stdio::piped()));
        assert_eq!(denied.status.code(), Some(1));
        let said = String::from_utf8(denied.stderr).unwrap();
        assert!(said.contains("sudo"), "{said}");
    }
}
