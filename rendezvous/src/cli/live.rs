//! What is asked of a running server.

use std::time::Duration;

use anyhow::bail;
use clap::{Args, Subcommand};
use rendezvous::control::{self, Answer, Question};
use rendezvous_wire::PeerId;
use serde::Serialize;
use serde_json::json;

use super::{State, print};

/// Commands to a running server.
#[derive(Debug, Subcommand)]
pub(super) enum Live {
    /// Let a peer in whatever the mode, for good; list whom you have let in.
    #[command(after_help = "\
Examples:
  rendezvous admit ID --note \"the laptop\"
  rendezvous admit ID --withdraw
      Who is registered stays so until its connection ends; `ban` ends it.
  rendezvous admit
      List.")]
    Admit(Admit),
    /// Ban a peer: what it has ends at once, its relayed sessions with it; list the bans.
    #[command(after_help = "\
Examples:
  rendezvous ban ID --reason \"too loud\" --for 1d
  rendezvous ban
      List.")]
    Ban(Ban),
    /// Take a ban back.
    #[command(after_help = "Example:\n  rendezvous unban ID")]
    Unban(Unban),
    /// Tokens, each of which lets so many peers in.
    #[command(subcommand)]
    Token(Token),
    /// Who is registered.
    #[command(after_help = "Examples:\n  rendezvous peers\n  rendezvous peers --json")]
    Peers(Asking),
    /// Who has been introduced to whom, with a relay channel.
    #[command(after_help = "Example:\n  rendezvous sessions")]
    Sessions(Asking),
    /// Numbers.
    #[command(after_help = "Examples:\n  rendezvous stats\n  rendezvous stats --json")]
    Stats(Asking),
}

/// Whom to ask, and how to answer.
#[derive(Debug, Args)]
pub(super) struct Asking {
    #[command(flatten)]
    state: State,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct Admit {
    /// The peer's id; without one, list.
    peer: Option<PeerId>,
    /// For yourself.
    #[arg(long, value_name = "TEXT", default_value = "", requires = "peer")]
    note: String,
    /// Take it back.
    #[arg(long, requires = "peer", conflicts_with = "note")]
    withdraw: bool,
    #[command(flatten)]
    asking: Asking,
}

#[derive(Debug, Args)]
pub(super) struct Ban {
    /// The peer's id; without one, list.
    peer: Option<PeerId>,
    /// For how long: 30m, 12h, 1d [default: until `unban`].
    #[arg(long = "for", value_name = "DURATION", value_parser = humantime::parse_duration, requires = "peer")]
    lasts: Option<Duration>,
    /// What the peer is told.
    #[arg(long, value_name = "TEXT", default_value = "", value_parser = parse_reason, requires = "peer")]
    reason: String,
    #[command(flatten)]
    asking: Asking,
}

#[derive(Debug, Args)]
pub(super) struct Unban {
    /// The peer's id.
    peer: PeerId,
    #[command(flatten)]
    asking: Asking,
}

#[derive(Debug, Subcommand)]
pub(super) enum Token {
    /// Make one, and print it, which nothing does again.
    #[command(after_help = "\
Examples:
  rendezvous token new
  rendezvous token new --uses 20 --expires 7d --note \"the club\"

On the peer's machine: peer init rv://...#TOKEN")]
    New(NewToken),
    /// List them.
    #[command(after_help = "Example:\n  rendezvous token list")]
    List(Asking),
    /// Take one back. Whom it has let in stays: see `rendezvous admit`.
    #[command(after_help = "Example:\n  rendezvous token withdraw 3")]
    Withdraw(WithdrawToken),
}

#[derive(Debug, Args)]
pub(super) struct NewToken {
    /// How many peers it lets in.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    uses: u32,
    /// For how long it may be used: 30m, 12h, 7d [default: until it is withdrawn].
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    expires: Option<Duration>,
    /// For yourself.
    #[arg(long, value_name = "TEXT", default_value = "")]
    note: String,
    #[command(flatten)]
    asking: Asking,
}

#[derive(Debug, Args)]
pub(super) struct WithdrawToken {
    /// Its number in `rendezvous token list`.
    number: u64,
    #[command(flatten)]
    asking: Asking,
}

/// What a peer is told has to fit the last words of a connection, with a date beside it.
fn parse_reason(text: &str) -> Result<String, String> {
    match text.len() {
        0..=120 if !text.chars().any(char::is_control) => Ok(text.to_owned()),
        0..=120 => Err("it is one line".into()),
        length => Err(format!("{length} bytes; 120 are the most")),
    }
}

impl Live {
    pub(super) fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Admit(Admit { peer: None, asking, .. }) => asking.ask(&Question::Admitted, String::new()),
            Self::Admit(Admit { peer: Some(peer), withdraw: true, asking, .. }) => {
                let done = format!("{peer} is on the list no more; {peer} was not on it");
                asking.ask(&Question::Withdraw { peer }, done)
            }
            Self::Admit(Admit { peer: Some(peer), note, asking, .. }) => {
                asking.ask(&Question::Admit { peer, note }, format!("{peer} may register; it could before"))
            }
            Self::Ban(Ban { peer: None, asking, .. }) => asking.ask(&Question::Banned, String::new()),
            Self::Ban(Ban { peer: Some(peer), lasts, reason, asking }) => {
                let seconds = lasts.map(|lasts| lasts.as_secs());
                let done = format!("{peer} is banned; it was already, and is as you say now");
                asking.ask(&Question::Ban { peer, seconds, reason }, done)
            }
            Self::Unban(Unban { peer, asking }) => {
                asking.ask(&Question::Unban { peer }, format!("{peer} is banned no more; it was not banned"))
            }
            Self::Token(Token::New(NewToken { uses, expires, note, asking })) => {
                let seconds = expires.map(|expires| expires.as_secs());
                asking.ask(&Question::NewToken { uses, seconds, note }, String::new())
            }
            Self::Token(Token::List(asking)) => asking.ask(&Question::Tokens, String::new()),
            Self::Token(Token::Withdraw(WithdrawToken { number, asking })) => {
                let done = format!("token {number} is withdrawn; there was no token {number}");
                asking.ask(&Question::WithdrawToken { number }, done)
            }
            Self::Peers(asking) => asking.ask(&Question::Peers, String::new()),
            Self::Sessions(asking) => asking.ask(&Question::Sessions, String::new()),
            Self::Stats(asking) => asking.ask(&Question::Stats, String::new()),
        }
    }
}

impl Asking {
    /// Asks and prints. `done` is what to say of something done, and behind a semicolon of something that was so already.
    fn ask(&self, question: &Question, done: String) -> anyhow::Result<()> {
        let (config, _) = self.state.read()?;
        let answer = control::ask(&self.state.socket(&config)?, question)?;
        if let Answer::Failed(reason) = answer {
            bail!("{reason}");
        }
        let text = if self.json { as_json(&answer) } else { as_text(&answer, &done) };
        Ok(print(&text)?)
    }
}

fn as_json(answer: &Answer) -> String {
    match answer {
        Answer::Done(changed) => json!({ "changed": changed }).to_string(),
        answer => json!(answer).to_string(),
    }
}

fn as_text(answer: &Answer, done: &str) -> String {
    match answer {
        Answer::Done(changed) => {
            let (now, already) = done.split_once("; ").unwrap_or((done, done));
            if *changed { now.to_owned() } else { already.to_owned() }
        }
        Answer::Failed(reason) => reason.clone(),
        Answer::Token(token) => format!(
            "{}\n\nToken {}, shown this once. On the peer's machine:\n\n    peer init '{}'",
            token.token, token.number, token.address
        ),
        Answer::Tokens(rows) => table(rows, "no tokens; see `rendezvous token new`"),
        Answer::Admitted(rows) => table(rows, "nobody was admitted by name or token"),
        Answer::Banned(rows) => table(rows, "nobody is banned"),
        Answer::Peers(rows) => table(rows, "nobody is registered"),
        Answer::Sessions(rows) => table(rows, "nobody has been introduced"),
        Answer::Stats(stats) => {
            let serde_json::Value::Object(numbers) = json!(stats) else { return String::new() };
            let lines: Vec<String> =
                numbers.iter().map(|(name, value)| format!("{name:<24} {}", plain(value))).collect();
            lines.join("\n")
        }
    }
}

/// Columns by the names of the fields.
fn table(rows: &[impl Serialize], empty: &str) -> String {
    let rows: Vec<serde_json::Map<String, serde_json::Value>> = rows
        .iter()
        .filter_map(|row| match json!(row) {
            serde_json::Value::Object(fields) => Some(fields),
            _ => None,
        })
        .collect();
    let Some(first) = rows.first() else { return empty.to_owned() };
    let names: Vec<&String> = first.keys().collect();
    let mut lines = vec![names.iter().map(|name| name.replace('_', " ")).collect::<Vec<_>>()];
    let cell = |row: &serde_json::Map<String, serde_json::Value>, name: &str| {
        row.get(name).map_or_else(String::new, plain)
    };
    lines.extend(rows.iter().map(|row| names.iter().map(|name| cell(row, name)).collect()));
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..names.len()).map(width).collect();
    let pad = |line: &Vec<String>| {
        let cells = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    lines.iter().map(pad).collect::<Vec<_>>().join("\n")
}

fn plain(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::Null => "-".to_owned(),
        serde_json::Value::String(text) if text.is_empty() => "-".to_owned(),
        serde_json::Value::String(text) => text.clone(),
        serde_json::Value::Number(number) if number.is_f64() => {
            format!("{:.1}", number.as_f64().unwrap_or(0.0))
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use rendezvous::control::BanRow;

    use super::*;

    #[test]
    fn a_table_has_a_column_for_each_field() {
        let row = |peer: &str, until: Option<&str>| BanRow {
            peer: peer.into(),
            since: "2026-11-21T10:00:00Z".into(),
            until: until.map(Into::into),
            reason: String::new(),
        };
        let text = table(&[row("abc", None), row("abcdef", Some("2026-11-22T10:00:00Z"))], "none");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[0].contains("peer") && lines[1].contains('-') && lines[2].contains("abcdef"), "{text}");
        assert_eq!(lines[1].find("2026"), lines[2].find("2026"), "{text}");
        assert_eq!(table(&[] as &[BanRow], "none"), "none");
    }
}
