//! What a command works with: flags, then the environment, then the configuration, then defaults; and whom a name stands for.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use peer::daemon::{self, Access, Client, DaemonError, Wanted};
use peer::service::{Hub, Request, RequestError};
use peer::{
    Endpoint, IntroductionPolicy, InviteSecret, KeyPair, PeerId, RendezvousAddress, Session, Ticket, Token,
    identity,
};
use serde_json::json;

use super::home::Home;
use super::home::config::Config;
use super::home::peers::{Alias, Peers, PeersError};
use super::report::Report;
use super::{Failure, exit, interrupted};

/// Which key.
#[derive(Debug, Args)]
pub(super) struct KeyArguments {
    /// The key file; made when it does not exist [default: peer/key.pem in the user's data directory].
    #[arg(long, env = "PEER_KEY", value_name = "FILE")]
    key: Option<PathBuf>,
}

/// What all commands that go on line have in common.
#[derive(Debug, Args)]
pub(super) struct EndpointArguments {
    /// The rendezvous server, as it printed its address; may be given more than once [default: those of `peer init`].
    #[arg(long, env = "PEER_SERVER", value_name = "RV_ADDRESS", value_delimiter = ' ')]
    server: Vec<RendezvousAddress>,
    /// A token that the server's operator has given out, for servers that `peer init` has none for.
    #[arg(long, env = "PEER_TOKEN", value_name = "TOKEN", hide_env_values = true)]
    token: Option<Token>,
    #[command(flatten)]
    key: KeyArguments,
    /// Do not ask the router for a port mapping (PCP, NAT-PMP, UPnP).
    #[arg(long)]
    no_port_mapping: bool,
    /// Whether to ask for one [default: true].
    #[arg(long, env = "PEER_PORT_MAPPING", value_name = "BOOL", hide = true)]
    port_mapping: Option<bool>,
    /// Seconds that the router is asked to keep it without renewal.
    #[arg(long, value_name = "SECONDS", hide = true)]
    port_mapping_lease: Option<u64>,
    /// Do without the daemon (`peer up`), even where it runs.
    #[arg(long)]
    alone: bool,
    #[command(flatten)]
    control: ControlArguments,
    /// Write what happens as JSON objects, one a line, to standard error.
    #[arg(long)]
    pub(super) json: bool,
}

/// Which daemon.
#[derive(Debug, Args)]
pub(super) struct ControlArguments {
    /// The daemon's socket [default: peer/control.sock in the user's runtime directory].
    #[arg(long, env = "PEER_CONTROL", value_name = "SOCKET")]
    control: Option<PathBuf>,
}

impl ControlArguments {
    pub(super) fn place(&self) -> Result<PathBuf, Failure> {
        let place = self.control.clone().or_else(daemon::default_place);
        place.ok_or_else(|| {
            Failure::failed(anyhow::anyhow!(
                "there is no home directory for the daemon's socket; name one with --control"
            ))
        })
    }
}

/// A peer as people write it: an alias, an id or a ticket.
#[derive(Debug, Clone)]
pub(super) enum PeerName {
    Id(PeerId),
    Alias(Alias),
    Ticket(Box<Ticket>),
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => id.fmt(f),
            Self::Alias(alias) => alias.fmt(f),
            // Its secret is for nobody's eyes.
            Self::Ticket(ticket) => ticket.peer.fmt(f),
        }
    }
}

/// Longer than any alias: meant to be an id.
const LONGEST_ALIAS: usize = 32;

impl FromStr for PeerName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if Ticket::looks_like(text) {
            return text
                .parse()
                .map(|ticket| Self::Ticket(Box::new(ticket)))
                .map_err(|error| error.to_string());
        }
        if text.len() > LONGEST_ALIAS {
            return text.parse().map(Self::Id).map_err(|error| error.to_string());
        }
        text.parse()
            .map(Self::Alias)
            .map_err(|_| "neither an alias, nor the id of a peer, nor a ticket".into())
    }
}

/// A peer, and what is known of how to reach it.
#[derive(Debug, Clone)]
pub(super) struct Found {
    pub(super) id: PeerId,
    /// Where it registers, when a ticket said so.
    pub(super) servers: Vec<RendezvousAddress>,
    /// To be shown first.
    pub(super) secret: Option<InviteSecret>,
}

/// What is settled before a command begins.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) home: Option<Home>,
    pub(super) config: Config,
    pub(super) servers: Vec<RendezvousAddress>,
    /// For servers that the configuration has none for.
    token: Option<Token>,
    /// Whether they were named for this run.
    named: bool,
    pub(super) key: PathBuf,
    /// The daemon's socket; `None`: no daemon is wanted.
    control: Option<PathBuf>,
    port_mapping: bool,
    port_mapping_lease: Option<Duration>,
}

fn configuration() -> Result<(Option<Home>, Config), Failure> {
    let home = Home::find();
    let config = match &home {
        Some(home) => Config::load(&home.config)?,
        None => Config::default(),
    };
    Ok((home, config))
}

impl KeyArguments {
    pub(super) fn load(&self) -> Result<KeyPair, Failure> {
        let (_, config) = configuration()?;
        Ok(identity::load_or_create(&self.path(&config)?)?)
    }

    fn path(&self, config: &Config) -> Result<PathBuf, Failure> {
        match self.key.as_ref().or(config.key.as_ref()) {
            Some(path) => Ok(path.clone()),
            None => Ok(identity::default_path()?),
        }
    }
}

/// The servers of a flag or the environment, else those of the configuration, else none.
pub(super) fn servers(named: &[RendezvousAddress]) -> Result<Vec<RendezvousAddress>, Failure> {
    if named.is_empty() { Ok(configuration()?.1.servers) } else { Ok(named.to_vec()) }
}

/// What is said where there is no server to go to.
pub(super) fn no_server() -> Failure {
    let error = anyhow::anyhow!(
        "no rendezvous server is named. Run `peer init rv://...` once, with the address that the server printed, or give --server"
    );
    Failure { code: exit::USAGE, error }
}

impl EndpointArguments {
    /// Reads the configuration and settles what counts.
    pub(super) fn settle(&self) -> Result<Settings, Failure> {
        let (home, config) = configuration()?;
        let servers = if self.server.is_empty() { config.servers.clone() } else { self.server.clone() };
        let asked = if self.no_port_mapping { Some(false) } else { self.port_mapping };
        Ok(Settings {
            servers,
            token: self.token.clone(),
            named: !self.server.is_empty(),
            control: if self.alone { None } else { self.control.place().ok() },
            key: self.key.path(&config)?,
            port_mapping: asked.or(config.port_mapping).unwrap_or(true),
            port_mapping_lease: self.port_mapping_lease.map(Duration::from_secs),
            home,
            config,
        })
    }

    /// The daemon's socket, for the daemon.
    pub(super) fn place(&self) -> Result<PathBuf, Failure> {
        if self.alone {
            let error = anyhow::anyhow!("--alone is to do without a daemon; this is the daemon");
            return Err(Failure { code: exit::USAGE, error });
        }
        self.control.place()
    }

    pub(super) fn report(&self, settings: &Settings) -> Report {
        Report::new(self.json).noting(settings.home.as_ref())
    }
}

impl Settings {
    /// The peers that are known.
    pub(super) fn peers(&self) -> Result<Peers, Failure> {
        match &self.home {
            Some(home) => Ok(Peers::load(&home.peers)?),
            None => Ok(Peers::default()),
        }
    }

    /// Whom a name stands for.
    pub(super) fn find(&self, name: &PeerName) -> Result<Found, Failure> {
        let peers = self.peers()?;
        find(&peers, name)
    }

    /// A way to reach `found`: the daemon's, where one runs for this identity and knows a server of theirs, else an endpoint as of [`open`](Self::open).
    /// `command` is what the daemon shows of us.
    pub(super) async fn access(
        &self,
        policy: IntroductionPolicy,
        found: Option<&Found>,
        report: &Report,
        command: &str,
    ) -> Result<Access, Failure> {
        match self.daemon(found, command, report).await? {
            Some(client) => Ok(client.into()),
            None => Ok(self.open(policy, found, report).await?.into()),
        }
    }

    /// A way to be reached, for what is wanted, and to reach whoever was `found`: by the daemon where one runs.
    pub(super) async fn serving(
        &self,
        policy: IntroductionPolicy,
        (wanted, found): (Wanted, Option<&Found>),
        report: &Report,
        command: &str,
    ) -> Result<Access, Failure> {
        match self.daemon(found, command, report).await? {
            Some(client) => {
                let serving = Access::serving(client, wanted, policy).await;
                Ok(serving?)
            }
            None => Ok(self.open(policy, found, report).await?.into()),
        }
    }

    /// The daemon, where there is one that is of use.
    pub(super) async fn daemon(
        &self,
        found: Option<&Found>,
        command: &str,
        report: &Report,
    ) -> Result<Option<Client>, Failure> {
        let Some(place) = &self.control else { return Ok(None) };
        // A machine that was never set up gets its key when it has a server.
        if !self.key.exists() {
            return Ok(None);
        }
        let key = identity::load_or_create(&self.key)?;
        let client = match Client::connect(place, key, command).await {
            Ok(client) => client,
            Err(error @ (DaemonError::NotRunning { .. } | DaemonError::Identity { .. })) => {
                tracing::debug!(%error, "alone");
                return Ok(None);
            }
            Err(error) => {
                report.say(
                    "alone",
                    json!({ "message": error.to_string() }),
                    &format!("{error}; going on alone"),
                );
                return Ok(None);
            }
        };
        let known = |server: &RendezvousAddress| client.servers().iter().any(|other| other.id == server.id);
        let theirs = found.map(|found| &found.servers).filter(|servers| !servers.is_empty());
        if (self.named && !self.servers.iter().all(known))
            || theirs.is_some_and(|servers| !servers.iter().any(known))
        {
            tracing::debug!("the daemon does not know the server: alone");
            return Ok(None);
        }
        report.registered_by(client.id(), client.pid());
        Ok(Some(client))
    }

    /// Registers, there and where `found` registers, or says why not. An interruption on the way is a failure.
    pub(super) async fn open(
        &self,
        policy: IntroductionPolicy,
        found: Option<&Found>,
        report: &Report,
    ) -> Result<Endpoint, Failure> {
        let endpoint = self.bind(policy, found).await?;
        let online = tokio::select! {
            online = endpoint.online() => online.map_err(Failure::from),
            () = interrupted() => Err(Failure::interrupted()),
        };
        if let Err(failure) = online {
            endpoint.close().await;
            return Err(failure);
        }
        report.registered(endpoint.id());
        Ok(endpoint)
    }

    /// There must be a server to go to.
    pub(super) fn require_server(&self, found: Option<&Found>) -> Result<(), Failure> {
        let none = self.servers.is_empty() && found.is_none_or(|found| found.servers.is_empty());
        if none { Err(no_server()) } else { Ok(()) }
    }

    /// Begins to register.
    pub(super) async fn bind(
        &self,
        policy: IntroductionPolicy,
        found: Option<&Found>,
    ) -> Result<Endpoint, Failure> {
        self.require_server(found)?;
        let key = identity::load_or_create(&self.key)?;
        let mut builder = Endpoint::builder().identity(key).policy(policy).port_mapping(self.port_mapping);
        if let Some(lease) = self.port_mapping_lease {
            builder = builder.port_mapping_lease(lease);
        }
        for server in &self.servers {
            builder = builder.server(server.clone());
            if let Some(token) = self.config.tokens.get(&server.id).or(self.token.as_ref()) {
                builder = builder.token(server.id, token.clone());
            }
        }
        // A ticket may well name our own.
        let mut ids: BTreeSet<PeerId> = self.servers.iter().map(|server| server.id).collect();
        let further = found.into_iter().flat_map(|found| &found.servers);
        for server in further.filter(|server| ids.insert(server.id)) {
            builder = builder.server(server.clone());
            if let Some(token) = self.config.tokens.get(&server.id) {
                builder = builder.token(server.id, token.clone());
            }
        }
        Ok(builder.bind().await?)
    }

    /// Shows the secret of an invitation, where there is one to show.
    pub(super) async fn show_secret(
        &self,
        hub: &Hub,
        found: &Found,
        report: &Report,
    ) -> Result<(), RequestError> {
        let Some(secret) = &found.secret else { return Ok(()) };
        let outcome = hub.ask(&Request::Invite(secret.clone())).await;
        if let (Some(home), Ok(_) | Err(RequestError::Refused)) = (&self.home, &outcome) {
            // Kept for longer it would be shown once more, which does no harm.
            let forgotten = Peers::update(&home.peers, |peers| {
                peers.secret_shown(found.id, secret);
                Ok(())
            });
            if let Err(error) = forgotten {
                tracing::warn!(%error, "the secret of the invitation stays where it is");
            }
        }
        outcome.map(|_| report.invited(found.id))
    }

    /// The same, in a session that is used for something else afterwards.
    pub(super) async fn introduce_oneself(
        &self,
        session: &Session,
        found: &Found,
        report: &Report,
    ) -> Result<(), Failure> {
        if found.secret.is_none() {
            return Ok(());
        }
        let hub = Hub::new(session.clone());
        self.show_secret(&hub, found, report).await.map_err(not_invited)
    }
}

/// Closes what a command has used. Where the daemon has ended meanwhile, that is what is told: all else follows from it.
pub(super) async fn conclude(access: &Access, outcome: Result<(), Failure>) -> Result<(), Failure> {
    access.close().await;
    let Some(client) = access.daemon() else { return outcome };
    let in_doubt = match &outcome {
        Ok(()) => false,
        Err(failure) => matches!(failure.code, exit::BROKEN | exit::FAILURE),
    };
    if in_doubt && client.is_lost().await {
        return Err(DaemonError::Gone { pid: client.pid() }.into());
    }
    outcome
}

/// What ends when nothing is brought any more: because the daemon has ended, if it is the daemon that brings it.
pub(super) fn brought_all(access: &Access) -> Result<(), Failure> {
    match access.daemon() {
        Some(client) => Err(DaemonError::Gone { pid: client.pid() }.into()),
        None => Ok(()),
    }
}

/// Whom a name stands for, among those.
pub(super) fn find(peers: &Peers, name: &PeerName) -> Result<Found, Failure> {
    let (id, known) = match name {
        PeerName::Id(id) => (*id, peers.get(*id)),
        PeerName::Alias(alias) => match peers.named(alias) {
            Some(known) => (known.id, Some(known)),
            None => return Err(unknown_alias(alias)),
        },
        PeerName::Ticket(ticket) => {
            let (servers, secret) = (ticket.servers.clone(), ticket.secret.clone());
            return Ok(Found { id: ticket.peer, servers, secret });
        }
    };
    Ok(Found {
        id,
        servers: known.map(super::home::peers::Known::servers).unwrap_or_default(),
        secret: known.and_then(super::home::peers::Known::secret),
    })
}

fn unknown_alias(alias: &Alias) -> Failure {
    let error = anyhow::anyhow!(
        "there is no peer with the alias {alias}. `peer list` shows the known ones; `peer alias {alias} PEER` names one"
    );
    Failure { code: exit::USAGE, error }
}

/// The invitation was not taken.
pub(super) fn not_invited(error: RequestError) -> Failure {
    match error {
        RequestError::Refused => Failure {
            code: exit::REFUSED,
            error: anyhow::anyhow!(
                "the invitation was refused: it is spent, expired or withdrawn. Ask for a new one"
            ),
        },
        error => Failure::request(error, "the invitation"),
    }
}

/// What a change of the known peers needs.
pub(super) fn update_peers<T>(
    change: impl FnOnce(&mut Peers) -> Result<T, PeersError>,
) -> Result<T, Failure> {
    Ok(Peers::update(&home()?.peers, change)?)
}

/// The place where everything is kept.
pub(super) fn home() -> Result<Home, Failure> {
    Home::find().ok_or_else(|| Failure {
        code: exit::FAILURE,
        error: anyhow::anyhow!("there is no home directory to keep settings in; set HOME"),
    })
}
