//! How a program reaches peers, and is reached.

use rendezvous_wire::message::IntroductionPolicy;
use rendezvous_wire::{PeerId, RendezvousAddress};

use super::DaemonError;
use super::client::{Client, Serving};
use super::message::Wanted;
use crate::endpoint::{ConnectError, Endpoint};
use crate::server_changes::ServerChanges;
use crate::session::Session;

/// How a program reaches peers: by an endpoint of its own, or by the daemon's. What uses it need not know which. A cheap handle.
#[derive(Debug, Clone)]
pub enum Access {
    /// By its own.
    Own(Endpoint),
    /// By the daemon's: sessions are shares of the daemon's sessions.
    Daemon(Client, Option<std::sync::Arc<Serving>>),
}

impl From<Endpoint> for Access {
    fn from(endpoint: Endpoint) -> Self {
        Self::Own(endpoint)
    }
}

impl From<Client> for Access {
    fn from(client: Client) -> Self {
        Self::Daemon(client, None)
    }
}

impl Access {
    /// The daemon's, taking what peers bring for this program.
    ///
    /// # Errors
    ///
    /// When the daemon is gone.
    pub async fn serving(
        client: Client,
        wanted: Wanted,
        policy: IntroductionPolicy,
    ) -> Result<Self, DaemonError> {
        let serving = client.serve(wanted, policy).await?;
        Ok(Self::Daemon(client, Some(serving.into())))
    }

    /// The key that peers know it by.
    pub fn id(&self) -> PeerId {
        match self {
            Self::Own(endpoint) => endpoint.id(),
            Self::Daemon(client, _) => client.id(),
        }
    }

    /// Opens a session with that peer.
    ///
    /// # Errors
    ///
    /// See [`ConnectError`].
    pub async fn connect(&self, peer: PeerId) -> Result<Session, ConnectError> {
        match self {
            Self::Own(endpoint) => endpoint.connect(peer).await,
            Self::Daemon(client, _) => client.open(peer).await,
        }
    }

    /// The next session that a peer has opened, or in which it has opened a stream that the daemon leaves to this program. `None` when that is over.
    pub async fn accept(&self) -> Option<Session> {
        match self {
            Self::Own(endpoint) => endpoint.accept().await,
            Self::Daemon(_, Some(serving)) => serving.accept().await,
            Self::Daemon(_, None) => std::future::pending().await,
        }
    }

    /// Changes who may be introduced.
    pub async fn set_policy(&self, policy: IntroductionPolicy) {
        match self {
            Self::Own(endpoint) => endpoint.set_policy(policy).await,
            Self::Daemon(_, Some(serving)) => serving.set_policy(policy).await,
            Self::Daemon(_, None) => {}
        }
    }

    /// What becomes of the rendezvous servers from now on.
    pub fn server_changes(&self) -> ServerChanges {
        match self {
            Self::Own(endpoint) => endpoint.server_changes(),
            Self::Daemon(client, _) => client.server_changes(),
        }
    }

    /// The daemon, where it is one's.
    pub fn daemon(&self) -> Option<&Client> {
        match self {
            Self::Own(_) => None,
            Self::Daemon(client, _) => Some(client),
        }
    }

    /// Whether it takes what peers bring.
    pub fn is_serving(&self) -> bool {
        matches!(self, Self::Daemon(_, Some(_)))
    }

    /// Where the daemon registers, where it is one's.
    pub fn servers(&self) -> Option<&[RendezvousAddress]> {
        self.daemon().map(Client::servers)
    }

    /// Ends it in good order. The daemon's sessions go on; the shares of them end with their last handles.
    pub async fn close(&self) {
        match self {
            Self::Own(endpoint) => endpoint.close().await,
            Self::Daemon(..) => {}
        }
    }
}
