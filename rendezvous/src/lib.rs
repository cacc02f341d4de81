//! The rendezvous server: reflection, registration, introductions and relay.
//!
//! Peers find each other through it; it never sees what they say. It learns their addresses, and who meets whom.
//!
//! ```no_run
//! # async fn example() -> Result<(), rendezvous::StartError> {
//! let server = rendezvous::Server::builder().port(0).reflection_ports([0, 0]).start().await?;
//! println!("{}", server.address());
//! server.shutdown().await;
//! # Ok(())
//! # }
//! ```
//!
//! Pure cores, without clock, socket or task, in which every decision is made:
//!
//! | module | what |
//! |---|---|
//! | [`directory`] | who is registered, and open to whom |
//! | [`introductions`] | introductions, and the channels that live and die with them |
//! | [`limits`] | what one peer, one source, and all of them may use |
//! | [`usage`] | what the relay has carried this month |
//! | [`broker`] | the three together, with leases |
//! | [`relay::table`], [`relay::reflect`], [`relay::runs`] | bindings, answers to STUN, and what may be forwarded where |
//!
//! Beside them [`admission`] decides who may register, [`store`] keeps that, [`control`] is how an operator asks a running server, [`config`] reads the configuration, [`keyfile`] keeps the server's key, and [`hosts`] judges its addresses.
//!
//! Shells around them: `signalling` (QUIC on UDP 443), `stream` (TLS on TCP 443), `owner` (the one task that owns the broker),
//! `relay::shard` (a thread per core on UDP 3478 and 3479), and [`Server`], which starts and stops them all.

#![forbid(unsafe_code)]

pub mod admission;
pub mod broker;
pub mod checkup;
pub mod config;
pub mod control;
pub mod directory;
pub mod hosts;
pub mod introductions;
pub mod keyfile;
pub mod limits;
mod meeting;
mod overflow;
mod owner;
mod ports;
pub mod relay;
mod server;
mod signalling;
pub mod store;
mod stream;
pub mod usage;

pub use config::Config;
pub use limits::Limits;
pub use ports::{BindError, Transport};
pub use relay::count::RelayCount;
pub use server::{Builder, Ports, Server, StartError, TlsPort};
pub use signalling::EndpointError;
pub use stream::StreamError;
