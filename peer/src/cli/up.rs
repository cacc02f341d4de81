//! `peer up`: the daemon.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use clap::Args;
use peer::daemon::{Access, Daemon, Explained, Host, ServesStatus, ServingStatus};
use peer::forward::{Notice, Observer};
use peer::service::{Exchange, Request};
use peer::{Endpoint, Explanation, IntroductionPolicy, PeerId, Session, identity};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use super::connect::follow;
use super::gate::{Gate, Grant, Stamp, stamp_of};
use super::home::config::Config;
use super::home::peers::Peers;
use super::report::{self, Report};
use super::settings::{EndpointArguments, Settings};
use super::{Failure, follow_servers, interrupted, listen};

pub(super) const EXAMPLES: &str = "\
Examples:
  peer up
      Until stopped. Under systemd: deploy/peer.service, systemctl --user enable --now peer.
  peer status
  peer down

While it runs, connect, forward, ssh-proxy, send, ping, explain and list use its sessions, one with
each peer; listen and receive are handed what peers bring for them. --alone does without it.
It serves what stands under [[serve]] in the configuration, to whom it is to be served, and takes
open invitations. A changed configuration holds at once, but for its servers and its key.";

/// How often it is looked whether the configuration has changed.
const LOOK: Duration = Duration::from_secs(1);

/// Peers whose refused requests are counted by name; those of others are counted together.
const MOST_REFUSED: usize = 1000;

/// Under which name those of others are.
const OTHERS: &str = "others";

#[derive(Debug, Args)]
pub(super) struct UpArguments {
    #[command(flatten)]
    pub(super) endpoint: EndpointArguments,
}

pub(super) async fn run(arguments: UpArguments, verbose: bool) -> Result<(), Failure> {
    let place = arguments.endpoint.place()?;
    let settings = arguments.endpoint.settle()?;
    let report = arguments.endpoint.report(&settings);
    // Nobody is to wait for a daemon that will not be; and the lock is on the key.
    settings.require_server(None)?;
    let key = identity::load_or_create(&settings.key)?;
    let daemon = Daemon::listen(&place, &settings.key)?;
    let host = Arc::new(Served::new(&settings, &report)?);
    let endpoint = settings.bind(host.gate.policy(), None).await?;
    follow_servers(&Access::from(endpoint.clone()), &report, verbose);
    ready();
    let fields = json!({ "id": endpoint.id().to_string(), "control": place, "pid": std::process::id() });
    report.say("up", fields, &format!("up as {}; commands use {}", endpoint.id(), place.display()));
    let stop = async {
        tokio::select! {
            () = registering(&endpoint, &report) => {}
            () = host.watch() => {}
            // Stopping it is how it ends.
            () = interrupted() => {}
        }
    };
    let end = daemon.run(&endpoint, key, settings.servers.clone(), host.clone(), stop).await;
    endpoint.close().await;
    report.say("down", json!({}), "down");
    drop(daemon);
    // Whoever has asked for it is told now.
    drop(end);
    Ok(())
}

/// Tells systemd, where it wants to know.
fn ready() {
    #[cfg(target_os = "linux")]
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        tracing::debug!(%error, "systemd is not told");
    }
}

/// Tells whether it is registered; it goes on trying in any case. Never ends.
async fn registering(endpoint: &Endpoint, report: &Report) {
    match endpoint.online().await {
        Ok(()) => report.registered(endpoint.id()),
        Err(error) => {
            let words = format!("{error}; trying again until it works");
            report.say("not_registered", json!({ "message": error.to_string() }), &words);
        }
    }
    std::future::pending::<()>().await;
}

/// What is served.
struct Served {
    gate: Gate,
    report: Report,
    config: Option<PathBuf>,
    peers: Option<PathBuf>,
    tally: Arc<Mutex<Tally>>,
    /// Of the configuration that was read last.
    stamp: Mutex<Stamp>,
}

/// What has become of requests.
#[derive(Debug, Default)]
struct Tally {
    accepted: u64,
    refused: BTreeMap<PeerId, u64>,
    refused_others: u64,
    problem: Option<String>,
}

impl Tally {
    fn refuse(&mut self, peer: PeerId) {
        if self.refused.len() < MOST_REFUSED || self.refused.contains_key(&peer) {
            *self.refused.entry(peer).or_default() += 1;
        } else {
            self.refused_others += 1;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change leaves it whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Served {
    fn new(settings: &Settings, report: &Report) -> Result<Self, Failure> {
        let config = settings.home.as_ref().map(|home| home.config.clone());
        let stamp = config.as_deref().and_then(stamp_of);
        let grants = listen::configured(&settings.config, &settings.peers()?, report);
        let tally = Arc::<Mutex<Tally>>::default();
        let (counted, told) = (tally.clone(), report.clone());
        let observer = Observer::new(move |notice: Notice| {
            match &notice {
                Notice::Served { .. } => lock(&counted).accepted += 1,
                Notice::Denied { peer, .. } => lock(&counted).refuse(*peer),
                _ => {}
            }
            told.forwarding(&notice);
        });
        let gate = Gate::new(settings.home.clone(), grants, Vec::new(), false, report)?.observed(observer);
        Ok(Self {
            gate,
            report: report.clone(),
            config,
            peers: settings.home.as_ref().map(|home| home.peers.clone()),
            tally,
            stamp: Mutex::new(stamp),
        })
    }

    /// Reads the configuration again on SIGHUP, and when it has changed. Never ends.
    async fn watch(&self) {
        let mut hangup = signal(SignalKind::hangup()).ok();
        loop {
            let told = async {
                match &mut hangup {
                    Some(hangup) => hangup.recv().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = told => {}
                () = tokio::time::sleep(LOOK) => {
                    if self.config.as_deref().and_then(stamp_of) == *lock(&self.stamp) {
                        continue;
                    }
                }
            }
            // What is wrong with it has been told, and is shown by `peer status`.
            let _ = self.reload();
        }
    }

    fn read(&self) -> Result<Vec<Grant>, String> {
        let Some(path) = &self.config else { return Ok(Vec::new()) };
        *lock(&self.stamp) = stamp_of(path);
        let config = Config::load(path).map_err(|error| error.to_string())?;
        let peers = match &self.peers {
            Some(path) => Peers::load(path).map_err(|error| error.to_string())?,
            None => Peers::default(),
        };
        Ok(listen::configured(&config, &peers, &self.report))
    }
}

impl Host for Served {
    fn policy(&self) -> IntroductionPolicy {
        self.gate.policy()
    }

    fn takes(&self, peer: PeerId, request: &Request) -> bool {
        self.gate.takes(peer, request)
    }

    async fn answer(&self, request: Request, exchange: Exchange) {
        if let Request::Files = request {
            self.refused(exchange.peer(), "files");
        }
        self.gate.answer(request, exchange).await;
    }

    fn refused(&self, peer: PeerId, what: &str) {
        lock(&self.tally).refuse(peer);
        self.report.forwarding(&Notice::Denied { peer, what: what.to_owned() });
    }

    fn connected(&self, session: &Session) {
        self.report.connected(session);
        tokio::spawn(follow(session.clone(), self.report.clone()));
    }

    fn ended(&self, session: &Session) {
        let stats = session.stats();
        self.report.closed(session, stats.udp_tx.bytes, stats.udp_rx.bytes);
    }

    fn alias(&self, peer: PeerId) -> Option<String> {
        self.gate.alias(peer)
    }

    fn explained(&self, explanation: &Explanation) -> Explained {
        report::explained(explanation)
    }

    fn serving(&self) -> ServingStatus {
        let tally = lock(&self.tally);
        let named = tally.refused.iter().map(|(peer, count)| (self.gate.name(*peer), *count));
        let others = (tally.refused_others > 0).then(|| (OTHERS.to_owned(), tally.refused_others));
        let grants = self.gate.grants();
        let serves = grants.iter().map(|grant| ServesStatus {
            to: grant.to.iter().map(ToString::to_string).collect(),
            forward: grant.rules.forward.iter().map(ToString::to_string).collect(),
            listen: grant.rules.listen.iter().map(ToString::to_string).collect(),
            bench: grant.bench,
        });
        ServingStatus {
            serves: serves.collect(),
            accepted: tally.accepted,
            refused: named.chain(others).collect(),
            problem: tally.problem.clone(),
        }
    }

    fn reload(&self) -> Result<(), String> {
        let outcome = self.read().map(|grants| {
            let count = grants.len();
            self.gate.set_grants(grants);
            count
        });
        lock(&self.tally).problem = outcome.as_ref().err().cloned();
        match outcome {
            Ok(count) => {
                let words = format!("the configuration was read again: {count} entries under [[serve]]");
                self.report.say("reloaded", json!({ "serves": count }), &words);
                Ok(())
            }
            Err(message) => {
                let words = format!("{message}; what was served before goes on to be served");
                self.report.say("not_reloaded", json!({ "message": message }), &words);
                Err(message)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_counted_by_peer_as_far_as_there_is_room() {
        let id = |seed: u32| {
            let mut bytes = [0; 32];
            bytes[..4].copy_from_slice(&seed.to_be_bytes());
            PeerId::from_bytes(bytes)
        };
        let mut tally = Tally::default();
        for seed in 0..2 * MOST_REFUSED as u32 {
            tally.refuse(id(seed));
        }
        tally.refuse(id(0));
        assert_eq!((tally.refused.len(), tally.refused_others), (MOST_REFUSED, MOST_REFUSED as u64));
        assert_eq!(tally.refused[&id(0)], 2);
    }
}
