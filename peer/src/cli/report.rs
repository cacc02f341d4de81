//! What happens, in words or as JSON, on standard error: standard output is for data.

use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use peer::daemon::Explained;
use peer::forward::Notice;
use peer::service::RequestError;
use peer::{Explanation, PairReport, Path, PeerId, ServerChange, ServerState, Session};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::connect::follow;
use super::home::peers::Alias;
use super::home::{Home, last};

/// Where events go.
#[derive(Debug, Clone)]
pub(super) struct Report {
    json: bool,
    /// Words are for those who ask for them.
    quiet: bool,
    /// Whoever shows words in place of standard error.
    screen: Option<mpsc::UnboundedSender<(String, String)>>,
    start: Instant,
    /// Where the last paths are kept.
    last: Option<Arc<PathBuf>>,
}

pub(super) fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

fn path_json(path: &Path) -> Value {
    match path {
        Path::Direct { local, remote, kind, rung, rtt } => json!({
            "path": "direct", "local": local, "remote": remote, "kind": kind.name(), "rung": rung.name(), "rtt_ms": ms(*rtt),
        }),
        Path::Relayed { relay, over } => json!({ "path": "relayed", "relay": relay, "over": over.name() }),
        _ => json!({ "path": "other" }),
    }
}

fn pair_json(pair: &PairReport) -> Value {
    json!({
        "remote": pair.path.remote,
        "kind": pair.remote_kind.name(),
        "selected": pair.selected,
        "error": pair.error.map(|error| error.to_string()),
        "checks_sent": pair.checks_sent,
        "checks_answered": pair.checks_answered,
        "checks_received": pair.checks_received,
        "rtt_ms": pair.rtt.map(ms),
    })
}

impl Report {
    pub(super) fn new(json: bool) -> Self {
        Self { json, quiet: false, screen: None, start: Instant::now(), last: None }
    }

    /// The same, keeping the last paths there.
    pub(super) fn noting(self, home: Option<&Home>) -> Self {
        Self { last: home.map(|home| Arc::new(home.last.clone())), ..self }
    }

    /// The same, saying nothing in words but errors.
    pub(super) fn quiet(self) -> Self {
        Self { quiet: true, ..self }
    }

    /// The same, with words, and the names of their events, for somebody else to show. An error that ends a command is not among them.
    pub(super) fn shown_by(self, screen: mpsc::UnboundedSender<(String, String)>) -> Self {
        Self { screen: Some(screen), ..self }
    }

    /// Something that needs no more than its name and its words.
    pub(super) fn say(&self, event: &str, fields: Value, words: &str) {
        self.emit(event, fields, words);
    }

    pub(super) fn is_json(&self) -> bool {
        self.json
    }

    fn emit(&self, event: &str, mut fields: Value, words: &str) {
        if self.json {
            fields["event"] = event.into();
            fields["ms"] = ms(self.start.elapsed()).into();
            tell(&fields);
        } else if let (Some(screen), true) = (&self.screen, event != "error") {
            // Nobody shows anything any more when the command is about to end.
            let _ = screen.send((event.to_owned(), words.to_owned()));
        } else if !self.quiet || event == "error" {
            tell(&format_args!("peer: {words}"));
        }
    }

    pub(super) fn registered(&self, id: PeerId) {
        self.emit("registered", json!({ "id": id.to_string() }), &format!("registered as {id}"));
    }

    /// The daemon is.
    pub(super) fn registered_by(&self, id: PeerId, pid: u32) {
        let words = format!("registered as {id}, by the daemon (process {pid})");
        self.emit("registered", json!({ "id": id.to_string(), "daemon": pid }), &words);
    }

    pub(super) fn listening(&self, id: PeerId, servers: &[peer::RendezvousAddress]) {
        let servers: Vec<_> = servers.iter().map(|server| format!("--server {}", server.quoted())).collect();
        let words = format!("reach me with: peer connect {} {id}", servers.join(" "));
        self.emit("listening", json!({ "id": id.to_string() }), &words);
    }

    /// A rendezvous server is lost, or there again. Without `--json` only `verbose` tells.
    pub(super) fn server(&self, change: &ServerChange, verbose: bool) {
        let host = &change.server.host;
        let (state, words) = match &change.state {
            ServerState::Registered => ("registered", format!("registered at {host}")),
            ServerState::Silent => ("silent", format!("the rendezvous server at {host} does not answer")),
            ServerState::Answers => ("answers", format!("the rendezvous server at {host} answers again")),
            ServerState::Leaving(seconds) => {
                ("leaving", format!("the rendezvous server at {host} goes away in {seconds} s"))
            }
            ServerState::Limited(limit) => ("limited", format!("the rendezvous server at {host}: {limit}")),
            ServerState::Lost(error) => ("lost", error.to_string()),
            _ => return,
        };
        if self.json || verbose {
            self.emit("server", json!({ "server": change.server.to_string(), "state": state }), &words);
        }
    }

    pub(super) fn receiving(&self, id: PeerId, servers: &[peer::RendezvousAddress]) {
        let servers: Vec<_> = servers.iter().map(|server| format!("--server {}", server.quoted())).collect();
        let words = format!("send to me with: peer send {} FILE... {id}", servers.join(" "));
        self.emit("receiving", json!({ "id": id.to_string() }), &words);
    }

    /// A session stands; on which path is told by [`path`](Self::path).
    pub(super) fn connected(&self, session: &Session) {
        let peer = session.peer();
        self.emit("connected", json!({ "peer": peer.to_string() }), &format!("session with {peer}"));
    }

    /// A listener that is to give what the configuration says, which says nothing.
    pub(super) fn nothing_served(&self) {
        let words =
            "the configuration names nothing to serve; add [[serve]] to it, as `peer listen --help` shows";
        self.emit("nothing_served", json!({}), words);
    }

    /// The configuration serves somebody who is not known.
    pub(super) fn nobody_of_that_name(&self, alias: &Alias) {
        let words = format!(
            "the configuration serves {alias}, but no peer has that alias yet; `peer list` shows those that have one"
        );
        self.emit("unknown_alias", json!({ "alias": alias.to_string() }), &words);
    }

    /// Something about forwarding.
    pub(super) fn forwarding(&self, notice: &Notice) {
        match notice {
            Notice::Listening { at, to, remote } => {
                let fields = json!({
                    "at": at.to_string(), "to": to.as_ref().map(ToString::to_string), "remote": remote,
                });
                let to = to.as_ref().map_or_else(|| "SOCKS5".to_owned(), ToString::to_string);
                let place = if *remote { "the other side listens at" } else { "listening at" };
                self.emit("forwarding", fields, &format!("{place} {at} for {to}"));
            }
            Notice::Connected(session) => {
                self.connected(session);
                tokio::spawn(follow(session.clone(), self.clone()));
            }
            Notice::Lost { peer } => {
                let words = format!("the session with {peer} has ended; opening another");
                self.emit("lost", json!({ "peer": peer.to_string() }), &words);
            }
            Notice::Retry { error, after } => {
                let fields = json!({ "message": error.to_string(), "after_ms": ms(*after) });
                self.emit("retry", fields, &format!("{error}; trying again in {:.1} s", after.as_secs_f64()));
            }
            Notice::NotForwarded { to, error } => {
                let fields = json!({ "to": to, "reason": reason(error), "message": error.to_string() });
                self.emit("not_forwarded", fields, &format!("{to}: {error}"));
            }
            Notice::Served { peer, what } => {
                let fields = json!({ "peer": peer.to_string(), "what": what });
                if self.json {
                    self.emit("served", fields, "");
                } else {
                    tracing::info!(%peer, what, "served");
                }
            }
            Notice::Denied { peer, what } => {
                let fields = json!({ "peer": peer.to_string(), "what": what });
                self.emit("denied", fields, &format!("refused to {peer}: {what}"));
            }
            Notice::Failed { peer, what, cause } => {
                let fields = json!({ "peer": peer.to_string(), "what": what, "reason": cause.name() });
                self.emit("not_served", fields, &format!("{what}, for {peer}: {cause}"));
            }
            _ => {}
        }
    }

    /// A peer has shown the secret of an invitation.
    pub(super) fn redeemed(&self, peer: PeerId, taken: bool) {
        let (event, words) = if taken {
            ("redeemed", format!("{peer} has used an invitation and is trusted from now on"))
        } else {
            ("not_redeemed", format!("refused to {peer}: an invitation that is spent, expired or unknown"))
        };
        self.emit(event, json!({ "peer": peer.to_string() }), &words);
    }

    /// The other side has taken our invitation.
    pub(super) fn invited(&self, peer: PeerId) {
        let words = format!("{peer} has taken the invitation and trusts this machine");
        self.emit("invited", json!({ "peer": peer.to_string() }), &words);
    }

    pub(super) fn path(&self, session: &Session, path: &Path) {
        let mut fields = path_json(path);
        fields["peer"] = session.peer().to_string().into();
        fields["since_dial_ms"] = ms(session.started().elapsed()).into();
        fields["timeline"] = timeline(session);
        if let Some(last) = self.last.clone() {
            let (peer, path) = (session.peer(), *path);
            // On a thread where waiting for a disk holds nothing up. What is lost is a line of `peer list`.
            tokio::task::spawn_blocking(move || last::note(&last, peer, &path));
        }
        let since = ms(session.started().elapsed());
        self.emit("path", fields, &format!("{path} (after {since:.0} ms)"));
    }

    pub(super) fn first_byte(&self, session: &Session) {
        if self.json {
            self.emit("first_byte", json!({ "since_dial_ms": ms(session.started().elapsed()) }), "");
        }
    }

    pub(super) fn closed(&self, session: &Session, sent: u64, received: u64) {
        let fields = json!({
            "peer": session.peer().to_string(),
            "sent": sent,
            "received": received,
            "connection": session.stable_id(),
            "path": session.path().as_ref().map(path_json),
            "timeline": timeline(session),
        });
        self.emit("closed", fields, &format!("done: {sent} bytes sent, {received} received"));
    }

    pub(super) fn seeking(&self) {
        self.emit(
            "seeking",
            json!({}),
            "looking for a direct path; this takes a few seconds where there is none",
        );
    }

    pub(super) fn explained(&self, explanation: &Explanation) {
        self.explained_as(explained(explanation));
    }

    /// The same, by way of the daemon.
    pub(super) fn explained_as(&self, explained: Explained) {
        self.emit("explained", explained.fields, &explained.words);
    }

    pub(super) fn stage(&self, stage: peer::doctor::Stage) {
        self.emit("stage", json!({ "stage": stage.name() }), &stage.to_string());
    }

    pub(super) fn session_failed(&self, peer: PeerId, error: &anyhow::Error) {
        let fields = json!({ "peer": peer.to_string(), "message": format!("{error:#}") });
        self.emit("session_failed", fields, &format!("the session with {peer} ended: {error:#}"));
    }

    /// What has ended the command, and its exit code.
    pub(super) fn failed(&self, error: &anyhow::Error, code: u8) {
        self.emit("error", json!({ "message": format!("{error:#}"), "code": code }), &format!("{error:#}"));
    }
}

/// An explanation as it is shown.
pub(super) fn explained(explanation: &Explanation) -> Explained {
    let verdict = explanation.verdict();
    let pairs: Vec<_> = explanation.pairs.iter().map(pair_json).collect();
    let fields = json!({
        "verdict": verdict.name(),
        "words": verdict.to_string(),
        "advice": explanation.advice(),
        "carrier": explanation.carrier,
        "local_mapping": explanation.local.name(),
        "remote_mapping": explanation.remote.name(),
        "pairs": pairs,
        "rungs": explanation.rungs.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "rung": explanation.rung.map(peer::Rung::name),
    });
    Explained { fields, words: explanation.to_string() }
}

/// A line on standard error. Where nobody reads that, work goes on.
fn tell(line: &dyn std::fmt::Display) {
    let line = format!("{line}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}

fn reason(error: &RequestError) -> &'static str {
    match error {
        RequestError::Refused => "refused",
        RequestError::Failed(cause) => cause.name(),
        _ => "session",
    }
}

fn timeline(session: &Session) -> Value {
    let timeline = session.timeline();
    json!({
        "introduced_ms": timeline.introduced.map(ms),
        "connected_ms": timeline.connected.map(ms),
        "proven_ms": timeline.proven.map(ms),
        "direct_ms": timeline.direct.map(ms),
    })
}
