//! A lab of Linux network namespaces with iptables NAT, for people who test programs that traverse NAT.
//!
//! A [`Lab`] is an internet in miniature: servers at a core, and sites with a router, hosts behind it and an
//! access line. What a router does is described in the terms of RFC 4787 ([`Router`]); [`RouterKind`] names the
//! usual ones. Lines can be slow, lossy and narrow ([`Impairment`]) without the kernel's netem.
//!
//! Programs run in hosts as child processes ([`Host::command`]) or as threads of the test itself
//! ([`Host::run`], [`Host::enter`]).
//!
//! It needs `ip`, `iptables` and `nft` (Debian: iproute2, iptables, nftables), and root or a kernel that lets
//! ordinary users make user namespaces ([`enter_user_namespace`]). It touches nothing of the machine it runs
//! on, any number of labs run side by side, and nothing is left when the process ends, however it ends.

mod address;
mod host;
mod ipv6;
mod lab;
mod link;
pub mod model;
mod moving;
mod namespace;
mod outage;
mod port_mapping;
pub mod probe;
mod process;
mod router;
mod site;
mod sys;
mod tool;
mod trouble;
mod user_namespace;
mod wiring;

pub use host::Host;
pub use ipv6::Ipv6;
pub use lab::{BuildError, Lab};
pub use link::{Impairment, LinkError};
pub use port_mapping::{PortMapped, PortMapper, PortMapping};
pub use process::{HostChild, HostCommand};
pub use router::{Egress, Filtering, InputPolicy, Mapping, PortAllocation, Router, RouterKind, UnknownName};
pub use site::{Direction, Site, SiteConfig};
pub use tool::ToolError;
pub use trouble::Trouble;
pub use user_namespace::{EnterError, enter_user_namespace};
