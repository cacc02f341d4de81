//! What shells and `man` know of the program.

use std::io::{self, Write as _};
use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, CommandFactory as _};
use clap_complete::env::{CompleteEnv, Shells};

use super::Arguments;

pub(super) const COMPLETIONS_EXAMPLE: &str = "\
Example:
  rendezvous completions bash
      In ~/.bashrc: source <(rendezvous completions bash)";

pub(super) const MAN_EXAMPLE: &str = "Example:\n  rendezvous man target/man";

/// Set by the scripts when they ask what a word may become.
const COMPLETE: &str = "RENDEZVOUS_COMPLETE";

#[derive(Debug, Args)]
pub(super) struct Completions {
    /// The shell.
    #[arg(value_parser = ["bash", "elvish", "fish", "powershell", "zsh"])]
    shell: String,
}

#[derive(Debug, Args)]
pub(super) struct Man {
    /// The folder for them; made when it does not exist.
    folder: PathBuf,
}

/// Answers a script that asks what a word may become, and ends then. Before any thread is started.
pub(crate) fn complete() {
    CompleteEnv::with_factory(Arguments::command).var(COMPLETE).complete();
}

impl Completions {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let shells = Shells::builtins();
        let shell = &self.shell;
        let completer =
            shells.completer(shell).with_context(|| format!("{shell} is no shell that is known"))?;
        let mut script = Vec::new();
        completer.write_registration(COMPLETE, "rendezvous", "rendezvous", "rendezvous", &mut script)?;
        Ok(io::stdout().write_all(&script)?)
    }
}

impl Man {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        std::fs::create_dir_all(&self.folder)
            .and_then(|()| clap_mangen::generate_to(Arguments::command(), &self.folder))
            .with_context(|| format!("the pages cannot be written to {}", self.folder.display()))
    }
}
