//! What the programs give to shells and to `man`.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use end_to_end::process::binary;
use tempfile::TempDir;

const ID: &str = "aebagbafaydqqcikbmga2dqpcaireeyuculbogazdinryhi6d4qa";

/// A home in which `nas` is known, and the folder of the programs.
struct Home(TempDir);

impl Home {
    fn new() -> Self {
        let home = Self(TempDir::new().unwrap());
        let named = home.command(&binary("peer").unwrap()).args(["alias", "nas", ID]).output().unwrap();
        assert!(named.status.success(), "{named:?}");
        home
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        for (name, part) in
            [("XDG_CONFIG_HOME", "config"), ("XDG_DATA_HOME", "data"), ("XDG_STATE_HOME", "state")]
        {
            command.env(name, self.0.path().join(part));
        }
        let programs = binary("peer").unwrap();
        let path = std::env::var("PATH").unwrap();
        command.env("PATH", format!("{}:{path}", programs.parent().unwrap().display()));
        command.current_dir(self.0.path()).stdin(Stdio::null());
        command
    }
}

/// What bash offers for the last of these words.
fn offered(home: &Home, words: &[&str]) -> Vec<String> {
    // As `complete -F` calls it: the words, which of them, and the command, the word and the one before it.
    const ASK: &str = r#"
        source <("$1" completions bash) || exit 1
        complete -p "$1" >/dev/null || exit 1
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_TYPE=9 COMP_LINE="$*" COMP_POINT=${#COMP_LINE}
        "_clap_complete_$1" "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
        printf '%s\n' "${COMPREPLY[@]}"
    "#;
    let mut command = home.command(Path::new("bash"));
    let output = command.args(["--norc", "-c", ASK, "bash"]).args(words).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{words:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn bash_completes_commands_options_aliases_and_files() {
    let home = Home::new();
    fs::write(home.0.path().join("notes.txt"), "").unwrap();
    let all = offered(&home, &["peer", ""]);
    for command in ["chat", "connect", "send", "completions"] {
        assert!(all.iter().any(|one| one == command), "no {command} in {all:?}");
    }
    assert_eq!(offered(&home, &["peer", "ch"]), ["chat"]);
    assert_eq!(offered(&home, &["peer", "chat", "--li"]), ["--listen"]);
    assert_eq!(offered(&home, &["peer", "completions", "b"]), ["bash"]);
    // Wherever a peer is named.
    for words in [
        &["chat", "n"][..],
        &["connect", "n"],
        &["forward", "n"],
        &["ping", "--count", "3", "n"],
        &["listen", "--allow", "n"],
        &["receive", "--from", "n"],
        &["untrust", "n"],
        &["ssh-proxy", "n"],
        &["explain", "n"],
    ] {
        assert_eq!(offered(&home, &[&["peer"], words].concat()), ["nas"], "{words:?}");
    }
    assert_eq!(offered(&home, &["peer", "send", "x", "n"]), ["nas", "notes.txt"]);
    assert_eq!(offered(&home, &["rendezvous", "ser"]), ["serve"]);
    assert_eq!(offered(&home, &["rendezvous", "serve", "--relay"]), ["--relay-threads"]);
}

#[test]
fn every_shell_has_a_script() {
    let home = Home::new();
    for program in ["peer", "rendezvous"] {
        for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
            let mut command = home.command(&binary(program).unwrap());
            let output = command.args(["completions", shell]).output().unwrap();
            assert!(output.status.success() && output.stderr.is_empty(), "{program} {shell}: {output:?}");
            let script = String::from_utf8(output.stdout).unwrap();
            let variable = format!("{}_COMPLETE", program.to_uppercase());
            assert!(script.contains(&variable) && script.contains(program), "{script}");
            // No path of this machine: scripts are for packages.
            assert!(!script.contains("target/"), "{script}");
        }
    }
}

/// The commands that `--help` lists.
fn commands(home: &Home, program: &str) -> Vec<String> {
    let help = home.command(&binary(program).unwrap()).arg("--help").output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let list = help.split("Commands:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    let starts = list.lines().filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    let names = starts.filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help");
    names.map(str::to_owned).collect()
}

#[test]
fn every_command_has_a_page_that_groff_takes_without_a_warning() {
    let home = Home::new();
    for program in ["peer", "rendezvous"] {
        let folder = home.0.path().join(format!("man of {program}"));
        let mut command = home.command(&binary(program).unwrap());
        let output = command.arg("man").arg(&folder).output().unwrap();
        assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
        let mut wanted: Vec<String> =
            commands(&home, program).iter().map(|name| format!("{program}-{name}.1")).collect();
        assert!(wanted.len() >= 4, "{wanted:?}");
        wanted.push(format!("{program}.1"));
        for name in wanted {
            let page = folder.join(&name);
            let text = fs::read_to_string(&page).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(text.contains(".SH NAME") && text.contains(".SH SYNOPSIS"), "{name}: {text}");
            let groff = Command::new("groff").args(["-man", "-Tutf8", "-ww", "-z"]).arg(&page).output();
            let groff = groff.expect("groff is installed by `make tools`");
            assert!(groff.status.success() && groff.stderr.is_empty(), "{name}: {groff:?}");
        }
    }
}

#[test]
fn examples_stand_in_the_pages_as_they_are_typed() {
    let home = Home::new();
    let page = home.command(&binary("peer").unwrap()).args(["man"]).output().unwrap();
    let file = home.0.path().join("peer.1");
    fs::write(&file, page.stdout).unwrap();
    let mut groff = Command::new("groff");
    let shown = groff.args(["-man", "-Tascii", "-P-cbou", "-rLL=100n"]).arg(&file).output().unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    for words in [
        "EXAMPLES",
        "  peer forward nas -L 8080:localhost:80\n",
        "peer listen < backup.tar\n",
        "peer-chat(1)",
    ] {
        assert!(shown.contains(words), "no {words:?} in {shown}");
    }
}
