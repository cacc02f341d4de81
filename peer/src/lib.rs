//! Peer-to-peer QUIC sessions between machines behind NATs.
//!
//! An [`Endpoint`] registers with rendezvous servers under its key. [`Endpoint::connect`] gives a [`Session`] with the machine that holds another
//! key: over the server's relay from the first datagram, and over a direct path as soon as one is proven, with no reconnect. A session is a
//! [`quinn::Connection`].
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use peer::{Endpoint, KeyPair, PeerId};
//!
//! let server = "rv://aebagbafaydqqcikbmga2dqpcaireeyuculbogazdinryhi6d4qa@vps.example".parse()?;
//! let endpoint = Endpoint::builder().identity(KeyPair::generate()?).server(server).bind().await?;
//! let target: PeerId = "aebagbafaydqqcikbmga2dqpcaireeyuculbogazdinryhi6d4qa".parse()?;
//! let session = endpoint.connect(target).await?;
//! let (mut send, mut receive) = session.open_bi().await?;
//! send.write_all(b"hello").await?;
//! # Ok(())
//! # }
//! ```
//!
//! [`daemon`] has several programs share one endpoint and its sessions.
//!
//! [`service`] lets the two sides ask things of each other in a session, [`forward`] carries ports and sockets through one,
//! [`transfer`] files and folders, [`chat`] lines of text, and [`mod@bench`] measures what one carries.
//!
//! Inside: [`Endpoint`] and [`Session`] are handles; one *driver* task owns everything that changes (registrations, introductions, the
//! connectivity agents of `peer-agent`) and steers the path socket under quinn.

#![forbid(unsafe_code)]

mod backoff;
mod config;

mod driver;
mod endpoint;
mod explain;
mod gather;
mod keep_alive;
mod link;
mod network;
mod portmap;
mod resolve;
mod server_changes;
mod session;
mod signalling;
mod socket;
mod tunnel;

pub mod bench;
pub mod chat;
pub mod daemon;
pub mod doctor;
pub mod forward;
pub mod identity;
pub mod reflection;
pub mod service;
pub mod transfer;

pub use endpoint::{BindError, Builder, ConnectError, Endpoint, OnlineError};
pub use explain::{Explanation, Verdict};
pub use peer_agent::{CheckError, PairReport, PairState, Rung, RungReport};
pub use portmap::{Mapped, Protocol as PortMappingProtocol};
pub use rendezvous_wire::address::ParseAddressError;
pub use rendezvous_wire::candidate::{CandidateKind, Mapping, PortAllocation};
pub use rendezvous_wire::message::{IntroductionPolicy, Limit};
pub use rendezvous_wire::ticket::{MAX_TICKET_SERVERS, ParseTicketError, UnwritableTicket};
pub use rendezvous_wire::{InviteSecret, KeyPair, PeerId, RendezvousAddress, Ticket, Token};
pub use server_changes::{ServerChange, ServerChanges, ServerStanding, ServerState, Standing};
pub use session::{Path, PathTraffic, RelayTransport, Session, Timeline};
pub use signalling::ServerError;
pub use tunnel::proxy::ProxyError;

/// The QUIC implementation whose types sessions are made of.
pub use quinn;
