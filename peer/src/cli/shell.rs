//! What shells and `man` know of the commands: `peer completions` and `peer man`.

use std::any::TypeId;
use std::ffi::OsStr;
use std::io::Write as _;
use std::path::PathBuf;

use clap::{Args, Command, CommandFactory as _};
use clap_complete::engine::{ArgValueCandidates, CompletionCandidate, PathCompleter, ValueCompleter as _};
use clap_complete::env::{CompleteEnv, Shells};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};

use super::home::Home;
use super::home::peers::Peers;
use super::settings::PeerName;
use super::{Arguments, Failure};

/// Set by the scripts when they ask what a word may become.
const VARIABLE: &str = "PEER_COMPLETE";

pub(super) const COMPLETIONS_EXAMPLES: &str = "\
Examples:
  peer completions bash
      In ~/.bashrc: source <(peer completions bash)
  peer completions zsh > _peer
  peer completions fish > peer.fish
      In ~/.config/fish/completions.

The script asks this program, so that aliases are completed as well.";

pub(super) const MAN_EXAMPLES: &str = "\
Examples:
  peer man target/man
      A page for each command; read one by man -l target/man/peer-chat.1
  peer man > peer.1";

#[derive(Debug, Args)]
pub(super) struct CompletionsArguments {
    /// The shell.
    #[arg(value_parser = ["bash", "elvish", "fish", "powershell", "zsh"])]
    shell: String,
}

#[derive(Debug, Args)]
pub(super) struct ManArguments {
    /// The folder for all pages; made when it does not exist [default: print that of `peer` itself].
    #[arg(value_name = "FOLDER")]
    folder: Option<PathBuf>,
}

/// Answers a script that asks what a word may become, and ends then. Before any thread is started.
pub(crate) fn complete() {
    CompleteEnv::with_factory(command).var(VARIABLE).complete();
}

/// The command line, with names of peers wherever a peer is named.
fn command() -> Command {
    with_names(Arguments::command())
}

fn with_names(command: Command) -> Command {
    let peer = TypeId::of::<PeerName>();
    let command = command.mut_args(|argument| {
        if argument.get_value_parser().type_id() == peer {
            argument.add(ArgValueCandidates::new(aliases))
        } else {
            argument
        }
    });
    command.mut_subcommands(with_names)
}

/// The aliases that are known. Nobody can be told of what goes wrong.
fn aliases() -> Vec<CompletionCandidate> {
    let peers = Home::find().and_then(|home| Peers::load(&home.peers).ok()).unwrap_or_default();
    let named = peers.known.iter().filter_map(|known| Some((known.alias.as_ref()?, known.id)));
    named
        .map(|(alias, id)| CompletionCandidate::new(alias.to_string()).help(Some(id.to_string().into())))
        .collect()
}

/// What may stand where files end and a peer comes last.
pub(super) fn file_or_peer(current: &OsStr) -> Vec<CompletionCandidate> {
    let start = current.to_string_lossy();
    let mut all = aliases();
    all.retain(|alias| alias.get_value().to_string_lossy().starts_with(&*start));
    all.extend(PathCompleter::any().complete(current));
    all
}

pub(super) fn completions(arguments: &CompletionsArguments) -> Result<(), Failure> {
    let shells = Shells::builtins();
    let Some(shell) = shells.completer(&arguments.shell) else {
        return Err(Failure::failed(anyhow::anyhow!("{} is no shell that is known", arguments.shell)));
    };
    let mut script = Vec::new();
    shell.write_registration(VARIABLE, "peer", "peer", "peer", &mut script).map_err(Failure::failed)?;
    super::print(&script)
}

pub(super) fn man(arguments: &ManArguments) -> Result<(), Failure> {
    let mut command = Arguments::command();
    command.build();
    let Some(folder) = &arguments.folder else { return super::print(&page(&command)) };
    let written = |path: PathBuf, page: &[u8]| {
        std::fs::write(&path, page).map_err(|error| {
            Failure::of_file(format_args!("{} cannot be written: {error}", path.display()), Some(&error))
        })
    };
    std::fs::create_dir_all(folder).map_err(|error| {
        Failure::of_file(format_args!("{} cannot be made: {error}", folder.display()), Some(&error))
    })?;
    let commands = command.get_subcommands().filter(|command| command.get_name() != "help");
    for command in commands.chain([&command]) {
        let name = command.get_display_name().unwrap_or(command.get_name());
        written(folder.join(format!("{name}.1")), &page(command))?;
    }
    Ok(())
}

/// A page: what `--help` says, its examples under a heading and as they stand.
fn page(command: &Command) -> Vec<u8> {
    let name = command.get_display_name().unwrap_or(command.get_name());
    let man = Man::new(command.clone())
        .title(name)
        .source(format!("peer {}", env!("CARGO_PKG_VERSION")))
        .manual("User Commands");
    let mut page = Vec::new();
    // Into memory; never fails.
    let _ = man.render_title(&mut page);
    let _ = man.render_name_section(&mut page);
    let _ = man.render_synopsis_section(&mut page);
    let _ = man.render_description_section(&mut page);
    let _ = man.render_options_section(&mut page);
    if command.has_subcommands() {
        let _ = man.render_subcommands_section(&mut page);
    }
    let after = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let _ = after_help(&after).to_writer(&mut page);
    let _ = page.write_all(see_also(command).to_roff().as_bytes());
    page
}

fn after_help(text: &str) -> Roff {
    let mut roff = Roff::new();
    let mut notes = false;
    for paragraph in text.split("\n\n") {
        let (examples, rest) = match paragraph.split_once('\n') {
            Some((heading @ ("Example:" | "Examples:"), examples)) => (Some((heading, examples)), ""),
            _ => (None, paragraph),
        };
        if let Some((_, examples)) = examples {
            roff.control("SH", ["EXAMPLES"]).control("nf", []);
            for line in examples.lines() {
                roff.text([roman(line)]);
            }
            roff.control("fi", []);
        } else {
            if !std::mem::replace(&mut notes, true) {
                roff.control("SH", ["NOTES"]);
            } else {
                roff.control("PP", []);
            }
            roff.text([roman(rest.replace('\n', " "))]);
        }
    }
    roff
}

fn see_also(command: &Command) -> Roff {
    let mut roff = Roff::new();
    let pages = if command.has_subcommands() {
        let names = command.get_subcommands().filter(|command| command.get_name() != "help");
        names.map(|command| format!("peer-{}(1)", command.get_name())).collect::<Vec<_>>().join(", ")
    } else {
        "peer(1)".to_owned()
    };
    roff.control("SH", ["SEE ALSO"]).text([roman(pages)]);
    roff
}
