//! Arguments, and what is printed.

mod check;
mod live;
mod serve;
mod shell;

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;

use anyhow::anyhow;
use clap::{Args, Parser, Subcommand};
use rendezvous::config::{self, Config, ConfigError};
use rendezvous::{control, keyfile};
use tracing_subscriber::EnvFilter;

pub(crate) use shell::complete;

const EXAMPLES: &str = "\
Examples:
  rendezvous serve
      On a VPS, with UDP 443, 3478 and 3479 and TCP 443 open.
  rendezvous check
      Whether machine and configuration are in order, and what to do if not.
  rendezvous config default > /etc/rendezvous.toml
      The configuration file, with every default.
  rendezvous token new --expires 7d
      Lets one peer in, where mode = \"token\".
  rendezvous peers
      Who is there.
  rendezvous ban ID --reason \"too loud\"
  rendezvous id
      Print this server's id.";

/// Introduces peers to one another, and relays what they cannot send directly.
#[derive(Debug, Parser)]
#[command(version, after_help = EXAMPLES)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// Log more; twice for everything.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Log warnings and errors only.
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the server until SIGINT or SIGTERM; SIGHUP reads the configuration again.
    #[command(after_help = serve::EXAMPLES)]
    Serve(serve::Serve),
    /// Say whether configuration and machine are in order, and what to do if not.
    #[command(after_help = check::EXAMPLES)]
    Check(check::Check),
    /// Print the configuration file with all defaults, or what is in force.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print the server's id, making its key if there is none yet.
    #[command(after_help = "Example:\n  rendezvous id --state-dir state")]
    Id(State),
    #[command(flatten)]
    Live(live::Live),
    /// Print what a shell needs to complete commands and options.
    #[command(after_help = shell::COMPLETIONS_EXAMPLE)]
    Completions(shell::Completions),
    /// Write the man pages.
    #[command(after_help = shell::MAN_EXAMPLE)]
    Man(shell::Man),
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Print the file with every default, and a word on each.
    #[command(after_help = "Example:\n  rendezvous config default > /etc/rendezvous.toml")]
    Default,
    /// Print what a configuration comes to, as JSON, one key a line.
    #[command(after_help = "Example:\n  rendezvous config show --config ./rendezvous.toml")]
    Show(State),
}

/// Where things are.
#[derive(Debug, Clone, Args)]
struct State {
    /// The configuration file [default: /etc/rendezvous.toml, where there is one].
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where the server keeps its key and its store [default: directory in the configuration, else $STATE_DIRECTORY, else rendezvous in the
    /// user's data directory].
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

impl Arguments {
    pub(crate) fn init_logging(&self) {
        let default = match (self.quiet, self.verbose) {
            // quinn-udp warns with addresses, which belong at DEBUG.
            (true, _) => "warn,quinn_udp=error",
            (false, 0) => "info,quinn_udp=error",
            (false, 1) => "info,rendezvous=debug",
            (false, _) => "debug,rendezvous=trace",
        };
        let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
        // https://no-color.org
        let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let ansi = io::stderr().is_terminal() && !refused;
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(ansi).init();
    }

    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self.command {
            Command::Serve(serve) => serve.run(),
            Command::Check(check) => check.run(),
            Command::Config(ConfigCommand::Default) => Ok(print(config::DEFAULT)?),
            Command::Config(ConfigCommand::Show(state)) => show(&state),
            Command::Id(state) => {
                let (config, _) = state.read()?;
                print(&keyfile::load_or_create(&state.directory(&config)?)?.id().to_string())?;
                Ok(())
            }
            Command::Live(live) => live.run(),
            Command::Completions(completions) => completions.run(),
            Command::Man(man) => man.run(),
        }
    }
}

impl State {
    /// The configuration, and where it came from.
    fn read(&self) -> Result<(Config, Option<PathBuf>), ConfigError> {
        Config::find(self.config.as_deref())
    }

    fn directory(&self, config: &Config) -> anyhow::Result<PathBuf> {
        if let Some(directory) = self.state_dir.as_ref().or(config.state.directory.as_ref()) {
            return Ok(directory.clone());
        }
        // systemd separates several with colons; the first is ours.
        if let Some(directories) = std::env::var_os("STATE_DIRECTORY")
            && let Some(first) = std::env::split_paths(&directories).next().filter(|path| path.is_absolute())
        {
            return Ok(first);
        }
        directories::ProjectDirs::from("", "", "rendezvous").map(|own| own.data_dir().to_owned()).ok_or_else(
            || anyhow!("there is no home directory to keep the key in; name one with --state-dir"),
        )
    }

    /// The socket of the live commands.
    fn socket(&self, config: &Config) -> anyhow::Result<PathBuf> {
        match &config.state.control_socket {
            Some(socket) => Ok(socket.clone()),
            None => Ok(self.directory(config)?.join(control::SOCKET_NAME)),
        }
    }
}

fn show(state: &State) -> anyhow::Result<()> {
    let (config, _) = state.read()?;
    let lines: Vec<String> = config.keys().iter().map(|(key, value)| format!("{key} = {value}")).collect();
    Ok(print(&lines.join("\n"))?)
}

/// Prints and flushes: whoever waits for the line reads a pipe.
fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    if !text.ends_with('\n') {
        out.write_all(b"\n")?;
    }
    out.flush()
}
