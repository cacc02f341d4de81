//! `rendezvous check`.

use anyhow::bail;
use clap::Args;
use rendezvous::checkup::{self, Gravity};
use serde_json::json;

use super::{State, print};

pub(super) const EXAMPLES: &str = "\
Examples:
  rendezvous check
  rendezvous check --config ./rendezvous.toml --json

Looks at the configuration, the key and the store, the ports, the way to itself, limits of files
and buffers, and the clock. Ends with 1 if something is wrong.";

#[derive(Debug, Args)]
pub(super) struct Check {
    #[command(flatten)]
    state: State,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
}

impl Check {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let (config, from) = self.state.read()?;
        let (directory, socket) = (self.state.directory(&config)?, self.state.socket(&config)?);
        let findings = checkup::run(&config, &directory, &socket);
        let wrong = findings.iter().filter(|finding| finding.gravity == Gravity::Wrong).count();
        let from = from.map(|path| path.display().to_string());
        if self.json {
            print(&json!({ "config": from, "findings": findings, "wrong": wrong }).to_string())?;
        } else {
            let from = from.unwrap_or_else(|| "no file, all defaults".to_owned());
            let mut text = format!("ok     configuration: {from}\n");
            for finding in &findings {
                text.push_str(&format!("{finding}\n"));
            }
            print(&text)?;
        }
        match wrong {
            0 => Ok(()),
            1 => bail!("one thing is wrong"),
            wrong => bail!("{wrong} things are wrong"),
        }
    }
}
