//! The lab's internet as a model: the same sites, routers and lines in memory, on virtual time.
//!
//! A [`Network`] is built of the same [`SiteConfig`](crate::SiteConfig)s as a [`Lab`](crate::Lab), has the same addresses and hops, and does to packets what the
//! kernel does in the lab; the [probe](crate::probe) is held against both. It needs no rights and no clock: a second of virtual time costs
//! as much as the packets in it, about a microsecond each. The same seed and the same calls give the same packets.
//!
//! ```
//! use std::time::{Duration, Instant};
//! use netsim::model::{Network, Protocol, What};
//! use netsim::{RouterKind, SiteConfig};
//!
//! let start = Instant::now();
//! let mut network = Network::new(1, start);
//! let server = network.add_server();
//! let site = network.add_site(&SiteConfig::new(RouterKind::EimApdf).delay(Duration::from_millis(20)));
//! let host = network.host(site, 0);
//!
//! let listening = network.bind(server, Protocol::Udp, "0.0.0.0:3478".parse().unwrap()).unwrap();
//! let socket = network.bind(host, Protocol::Udp, "0.0.0.0:4000".parse().unwrap()).unwrap();
//! let to = (network.addresses(server)[0], listening.port()).into();
//! network.send(host, socket, to, None, b"hello".to_vec());
//!
//! let arrival = network.poll(start + Duration::from_secs(1)).unwrap();
//! assert_eq!(arrival.host, server);
//! assert!(matches!(arrival.what, What::Packet(packet) if packet.source == (network.wan_ipv4(site), 4000).into()));
//! assert!(network.now() - start >= Duration::from_millis(20));
//! ```
//!
//! # Where it differs from the lab
//!
//! Routers take no time, a LAN takes [`LAN_DELAY`]; names are resolved nowhere; ICMP errors come back the way they came, whatever is in between; TCP is one
//! packet each way. APDM with weaker filtering than APDF can be had here, and not in the lab.

mod conntrack;
mod gateway;
mod network;
mod packet;
mod topology;

pub use network::{Arrival, BindError, HostId, LAN_DELAY, Network, SiteId, Step, What};
pub use packet::{DEFAULT_TTL, Packet, Protocol};
