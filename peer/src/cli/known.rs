//! `peer trust`, `untrust`, `alias` and `list`: the peers that are known.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use clap::Args;
use peer::{IntroductionPolicy, PeerId, RendezvousAddress, Ticket};
use serde_json::json;
use tokio::task::JoinSet;

use super::home::last;
use super::home::peers::{Alias, Known};
use super::report::Report;
use super::settings::{self, EndpointArguments, PeerName, Settings, find};
use super::{Failure, interrupted, print_line};

pub(super) const TRUST_EXAMPLES: &str = "\
Examples:
  peer trust TICKET --as nas
      Remember where it leads to; its secret is shown when the two next meet.
  peer trust PEER --as laptop

A trusted peer may use what is served to trusted peers, and nothing else.";

pub(super) const UNTRUST_EXAMPLES: &str = "\
Example:
  peer untrust laptop";

pub(super) const ALIAS_EXAMPLES: &str = "\
Example:
  peer alias nas PEER

An alias may stand wherever the id of a peer may.";

pub(super) const LIST_EXAMPLES: &str = "\
Examples:
  peer list
  peer list --online
      Ask each whether it is there; takes a few seconds. The daemon does it where it runs.
  peer list --json | jq .

A server does not tell who is online: whoever is not, and whoever does not accept you, look
the same.";

/// How long a peer may take to be reached for `--online`.
const PATIENCE: Duration = Duration::from_secs(8);

#[derive(Debug, Args)]
pub(super) struct TrustArguments {
    /// An id, a ticket, or an alias.
    #[arg(value_name = "PEER|TICKET")]
    peer: PeerName,
    /// The name to know it by.
    #[arg(long = "as", value_name = "ALIAS")]
    alias: Option<Alias>,
    /// Say what happens as a JSON object.
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Debug, Args)]
pub(super) struct UntrustArguments {
    /// An id or an alias.
    peer: PeerName,
    /// Say what happens as a JSON object.
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Debug, Args)]
pub(super) struct AliasArguments {
    /// The name.
    alias: Alias,
    /// An id, a ticket, or another alias.
    peer: PeerName,
    /// Say what happens as a JSON object.
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Debug, Args)]
pub(super) struct ListArguments {
    /// Ask each whether it is there.
    #[arg(long)]
    online: bool,
    #[command(flatten)]
    pub(super) endpoint: EndpointArguments,
}

/// Keeps and trusts whom a ticket leads to.
pub(super) fn keep_ticket(ticket: &Ticket, alias: Option<&Alias>) -> Result<(), Failure> {
    settings::update_peers(|peers| {
        if let Some(alias) = alias {
            peers.name(ticket.peer, alias.clone())?;
        }
        peers.keep(ticket);
        peers.trust(ticket.peer);
        Ok(())
    })
}

pub(super) fn trust(arguments: &TrustArguments) -> Result<(), Failure> {
    let id = match &arguments.peer {
        PeerName::Ticket(ticket) => {
            keep_ticket(ticket, arguments.alias.as_ref())?;
            ticket.peer
        }
        name => {
            let id = who(name)?;
            settings::update_peers(|peers| {
                if let Some(alias) = &arguments.alias {
                    peers.name(id, alias.clone())?;
                }
                peers.trust(id);
                Ok(())
            })?;
            id
        }
    };
    let alias = arguments.alias.as_ref().map(ToString::to_string);
    let name = alias.as_ref().map_or_else(|| id.to_string(), |alias| format!("{alias} ({id})"));
    let fields = json!({ "peer": id.to_string(), "alias": alias });
    Report::new(arguments.json).say("trusted", fields, &format!("{name} is trusted"));
    Ok(())
}

pub(super) fn untrust(arguments: &UntrustArguments) -> Result<(), Failure> {
    let id = who(&arguments.peer)?;
    let was = settings::update_peers(|peers| Ok(peers.untrust(id)))?;
    let words = if was { format!("{id} is trusted no more") } else { format!("{id} was not trusted") };
    Report::new(arguments.json).say("untrusted", json!({ "peer": id.to_string(), "was": was }), &words);
    Ok(())
}

pub(super) fn alias(arguments: &AliasArguments) -> Result<(), Failure> {
    let id = who(&arguments.peer)?;
    settings::update_peers(|peers| {
        if let PeerName::Ticket(ticket) = &arguments.peer {
            peers.keep(ticket);
        }
        peers.name(id, arguments.alias.clone())
    })?;
    let fields = json!({ "peer": id.to_string(), "alias": arguments.alias.to_string() });
    Report::new(arguments.json).say("alias", fields, &format!("{} is {id}", arguments.alias));
    Ok(())
}

fn who(name: &PeerName) -> Result<PeerId, Failure> {
    let peers = super::home::peers::Peers::load(&settings::home()?.peers)?;
    Ok(find(&peers, name)?.id)
}

/// Whether a peer is there, as far as anybody can tell.
#[derive(Debug, Clone)]
enum Presence {
    NotAsked,
    Online(Option<peer::Path>),
    Unreached,
}

pub(super) async fn list(arguments: ListArguments) -> Result<(), Failure> {
    let settings = arguments.endpoint.settle()?;
    let peers = settings.peers()?;
    let last = settings.home.as_ref().map(|home| last::load(&home.last)).unwrap_or_default();
    let presence = if arguments.online && !peers.known.is_empty() {
        ask_all(&arguments, &peers.known).await?
    } else {
        vec![Presence::NotAsked; peers.known.len()]
    };
    let now = SystemTime::now();
    if arguments.endpoint.json {
        let known: Vec<_> = peers
            .known
            .iter()
            .zip(&presence)
            .map(|(known, presence)| {
                json!({
                    "id": known.id.to_string(),
                    "alias": known.alias.as_ref().map(ToString::to_string),
                    "trusted": known.trusted,
                    "online": match presence {
                        Presence::NotAsked => None,
                        Presence::Online(_) => Some(true),
                        Presence::Unreached => Some(false),
                    },
                    "last": last.get(&known.id.to_string()),
                })
            })
            .collect();
        let invites: Vec<_> = peers
            .invites(now)
            .map(|invite| {
                let name = invite.name.as_ref().map(ToString::to_string);
                json!({ "number": invite.short(), "once": invite.once, "expires": invite.expires, "name": name })
            })
            .collect();
        return print_line(json!({ "peers": known, "invites": invites }));
    }
    for (known, presence) in peers.known.iter().zip(&presence) {
        let alias = known.alias.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string);
        let trusted = if known.trusted { "trusted" } else { "not trusted" };
        let online = match presence {
            Presence::NotAsked => String::new(),
            Presence::Online(Some(path)) => format!("  online, {path}"),
            Presence::Online(None) => "  online".to_owned(),
            Presence::Unreached => "  not reached".to_owned(),
        };
        let last = last.get(&known.id.to_string());
        let last = last.map_or_else(String::new, |last| format!("  last {}: {}", last.at, last.path));
        print_line(format_args!("{alias:<12} {}  {trusted}{online}{last}", known.id))?;
    }
    for invite in peers.invites(now) {
        let once = if invite.once { "for one" } else { "for anyone who has it" };
        let expires = invite.expires.as_ref().map_or_else(String::new, |end| format!(", until {end}"));
        let name = invite.name.as_ref().map_or_else(String::new, |name| format!(", as {name}"));
        print_line(format_args!("invitation {}  {once}{expires}{name}", invite.short()))?;
    }
    if peers.known.is_empty() {
        let words = "no peers are known yet; `peer trust TICKET --as NAME` adds one";
        arguments.endpoint.report(&settings).say("nobody", json!({}), words);
    }
    Ok(())
}

async fn ask_all(arguments: &ListArguments, known: &[Known]) -> Result<Vec<Presence>, Failure> {
    let settings = arguments.endpoint.settle()?;
    let report = arguments.endpoint.report(&settings);
    let Some(daemon) = settings.daemon(None, "list", &report).await? else {
        return ask_alone(&settings, &report, known).await;
    };
    // Whoever registers elsewhere is not the daemon's to reach.
    let here = |known: &Known| {
        let theirs = known.servers();
        let ours = |server: &RendezvousAddress| daemon.servers().iter().any(|other| other.id == server.id);
        theirs.is_empty() || theirs.iter().any(ours)
    };
    let (reached, elsewhere): (Vec<_>, Vec<_>) = known.iter().cloned().partition(here);
    let ids: Vec<PeerId> = reached.iter().map(|known| known.id).collect();
    let asking = async {
        let paths = daemon.reach(&ids).await.map_err(Failure::from)?;
        let others = match elsewhere.is_empty() {
            true => Vec::new(),
            false => ask_alone(&settings, &report, &elsewhere).await?,
        };
        Ok::<_, Failure>((paths, others))
    };
    let (paths, others) = tokio::select! {
        asked = asking => asked?,
        () = interrupted() => return Err(Failure::interrupted()),
    };
    let presence =
        |path: Option<peer::Path>| path.map_or(Presence::Unreached, |path| Presence::Online(Some(path)));
    let found: BTreeMap<PeerId, Presence> = ids
        .into_iter()
        .zip(paths.into_iter().map(presence))
        .chain(elsewhere.iter().map(|known| known.id).zip(others))
        .collect();
    Ok(known.iter().map(|known| found.get(&known.id).cloned().unwrap_or(Presence::Unreached)).collect())
}

async fn ask_alone(settings: &Settings, report: &Report, known: &[Known]) -> Result<Vec<Presence>, Failure> {
    let everywhere = settings::Found {
        id: known[0].id,
        servers: known.iter().flat_map(Known::servers).collect(),
        secret: None,
    };
    let ids: Vec<PeerId> = known.iter().map(|known| known.id).collect();
    let endpoint = settings.open(IntroductionPolicy::Only(Vec::new()), Some(&everywhere), report).await?;
    let mut asking = JoinSet::new();
    for (index, id) in ids.iter().copied().enumerate() {
        let endpoint = endpoint.clone();
        asking.spawn(async move {
            match tokio::time::timeout(PATIENCE, endpoint.connect(id)).await {
                Ok(Ok(session)) => (index, Presence::Online(session.path())),
                _ => (index, Presence::Unreached),
            }
        });
    }
    let mut presence = vec![Presence::Unreached; ids.len()];
    let all = async {
        while let Some(asked) = asking.join_next().await {
            if let Ok((index, found)) = asked {
                presence[index] = found;
            }
        }
    };
    let outcome = tokio::select! {
        () = all => Ok(()),
        () = interrupted() => Err(Failure::interrupted()),
    };
    endpoint.close().await;
    outcome.map(|()| presence)
}
