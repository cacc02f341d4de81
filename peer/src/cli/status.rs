//! `peer status`, `peer reload` and `peer down`: the daemon, seen from outside.

use clap::Args;
use peer::daemon::{self, CommandStatus, ServerStatus, SessionStatus, Status};
use serde_json::json;

use super::report::Report;
use super::settings::ControlArguments;
use super::transfers::size;
use super::{Failure, print_line};

pub(super) const STATUS_EXAMPLES: &str = "\
Examples:
  peer status
  peer status --json

Bytes are those of the datagrams that carry the session, headers and retransmissions included.";

pub(super) const RELOAD_EXAMPLES: &str = "\
Example:
  peer reload";

pub(super) const DOWN_EXAMPLES: &str = "\
Example:
  peer down

It returns when the daemon has ended; so have the commands that used it, but for `peer forward` and
`peer send`, which wait for another.";

#[derive(Debug, Args)]
pub(super) struct ControlledArguments {
    #[command(flatten)]
    control: ControlArguments,
    /// Print a JSON object.
    #[arg(long)]
    pub(super) json: bool,
}

pub(super) async fn status(arguments: &ControlledArguments) -> Result<(), Failure> {
    let status = daemon::status(&arguments.control.place()?).await?;
    if arguments.json {
        print_line(serde_json::to_string(&status).map_err(Failure::failed)?)
    } else {
        print_line(shown(&status).trim_end())
    }
}

pub(super) async fn reload(arguments: &ControlledArguments) -> Result<(), Failure> {
    daemon::reload(&arguments.control.place()?).await?;
    Report::new(arguments.json).say("reloaded", json!({}), "the daemon has read its configuration again");
    Ok(())
}

pub(super) async fn down(arguments: &ControlledArguments) -> Result<(), Failure> {
    daemon::down(&arguments.control.place()?).await?;
    Report::new(arguments.json).say("down", json!({}), "the daemon has ended");
    Ok(())
}

/// For people.
fn shown(status: &Status) -> String {
    let mut lines = vec![format!(
        "daemon {} (process {}), up since {}, as {}",
        status.version, status.pid, status.since, status.id
    )];
    lines.extend(status.servers.iter().map(server));
    if status.sessions.is_empty() {
        lines.push("no sessions".to_owned());
    }
    for one in &status.sessions {
        session(one, &mut lines);
    }
    lines.extend(status.waiting.iter().map(|waiting| format!("waiting for peers: {}", command(waiting))));
    let serving = &status.serving;
    for serves in &serving.serves {
        let to = serves.to.join(", ");
        for (what, places) in [("serves", &serves.forward), ("listens for", &serves.listen)] {
            if !places.is_empty() {
                lines.push(match what {
                    "serves" => format!("serves {to}: {}", places.join(", ")),
                    _ => format!("listens for {to}: {}", places.join(", ")),
                });
            }
        }
        if serves.bench {
            lines.push(format!("may be measured by {to}"));
        }
    }
    if serving.serves.is_empty() {
        lines.push("serves nothing".to_owned());
    }
    if let Some(problem) = &serving.problem {
        lines.push(format!("the configuration is wrong, and what was served before is: {problem}"));
    }
    let refused: Vec<String> =
        serving.refused.iter().map(|(peer, count)| format!("{peer} {count}")).collect();
    let refused = if refused.is_empty() { "none".to_owned() } else { refused.join(", ") };
    lines.push(format!("requests served: {}, refused: {refused}", serving.accepted));
    lines.join("\n") + "\n"
}

fn server(server: &ServerStatus) -> String {
    let host = &server.server.host;
    match (&server.over, &server.message) {
        (Some(over), _) => format!("server {host}: {} over {}", server.state, over.to_uppercase()),
        (None, Some(message)) => format!("server {host}: {}: {message}", server.state),
        (None, None) => format!("server {host}: {}", server.state),
    }
}

fn session(session: &SessionStatus, lines: &mut Vec<String>) {
    let name = match &session.alias {
        Some(alias) => format!("{alias} ({})", session.peer),
        None => session.peer.to_string(),
    };
    let path = session.path.as_deref().unwrap_or("no path");
    let begun = if session.dialled { "opened" } else { "accepted" };
    lines.push(format!("session with {name}, {begun} {}", session.since));
    lines.push(format!("  {path}; round trip {:.1} ms", session.rtt_ms));
    let bytes = &session.bytes;
    lines.push(format!(
        "  direct: {} sent, {} received; relayed: {} sent, {} received",
        size(bytes.direct_sent),
        size(bytes.direct_received),
        size(bytes.relayed_sent),
        size(bytes.relayed_received)
    ));
    lines.extend(session.commands.iter().map(|one| format!("  used by {}", command(one))));
    if session.served > 0 {
        lines.push(format!("  streams served for the other side: {}", session.served));
    }
}

fn command(command: &CommandStatus) -> String {
    let streams = match command.streams {
        0 => String::new(),
        1 => ", 1 stream".to_owned(),
        count => format!(", {count} streams"),
    };
    format!("peer {} (process {}) since {}{streams}", command.command, command.pid, command.since)
}
