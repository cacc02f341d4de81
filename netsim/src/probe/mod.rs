//! Proof that a router does what its name says: traffic from the inside and the outside, and what became of it.

mod measure;
mod modelled;
mod table;
mod traffic;

use std::io;

use serde::Serialize;

use crate::lab::{BuildError, Lab};
use crate::router::{Filtering, InputPolicy, Mapping, PortAllocation, RouterKind};
use crate::site::SiteConfig;
use crate::tool::ToolError;

pub use modelled::observe_model;
pub use table::table;

/// What can be seen of a router by sending packets through it and at it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Behaviour {
    /// How many NATs are on the way out, told by the addresses of the hops.
    pub nats: usize,
    /// How source endpoints are mapped; `None` if they are not, or no UDP leaves.
    pub mapping: Option<Mapping>,
    /// Who may send in; `None` if no UDP leaves.
    pub filtering: Option<Filtering>,
    /// Which port a flow gets where every destination sees another; `None` elsewhere.
    pub allocation: Option<PortAllocation>,
    /// Whether the reflexive port is the host's own; `None` if no UDP leaves.
    pub port_preserved: Option<bool>,
    /// Whether two hosts that use the same source port at the same time are both served, each with a mapping of
    /// the kind above; `None` if no UDP leaves.
    pub shared_port: Option<bool>,
    /// Whether two hosts reach each other at their reflexive endpoints once both have tried (RFC 4787, section 6); `None` unless they have
    /// endpoint-independent ones.
    pub hairpin: Option<bool>,
    /// Whether UDP leaves.
    pub udp: bool,
    /// Whether TCP leaves to port 443.
    pub tcp_web: bool,
    /// Whether TCP leaves to other ports.
    pub tcp_other: bool,
    /// What the outermost router does with packets for nobody, seen from the internet.
    pub input: InputPolicy,
    /// Whether a packet that comes in before the first one goes out makes the mapping lose the host's own port;
    /// `None` where the port is not kept anyhow.
    pub poisoned: Option<bool>,
    /// The TTL at which a packet crosses its own routers and dies before any other site; `None` if no UDP leaves.
    pub low_ttl: Option<usize>,
}

impl Behaviour {
    /// What a router of this kind with this policy has to do. Written out rather than derived from how it is
    /// built.
    pub fn expected(kind: RouterKind, input: InputPolicy) -> Self {
        use Filtering as F;
        use Mapping as M;
        const EIM: Option<Mapping> = Some(M::EndpointIndependent);
        const APDM: Option<Mapping> = Some(M::AddressAndPortDependent);
        let (nats, mapping, filtering, low_ttl) = match kind {
            RouterKind::Public => (0, None, Some(F::EndpointIndependent), 2),
            RouterKind::EimEif => (1, EIM, Some(F::EndpointIndependent), 2),
            RouterKind::EimAdf => (1, EIM, Some(F::AddressDependent), 2),
            RouterKind::EimApdf => (1, EIM, Some(F::AddressAndPortDependent), 2),
            RouterKind::Apdm | RouterKind::ApdmSequential | RouterKind::ApdmPreserving => {
                (1, APDM, Some(F::AddressAndPortDependent), 2)
            }
            RouterKind::Firewall => (0, None, Some(F::AddressAndPortDependent), 2),
            RouterKind::UdpBlocked => (1, None, None, 2),
            RouterKind::CarrierEim => (2, EIM, Some(F::AddressAndPortDependent), 3),
            RouterKind::CarrierApdm => (2, APDM, Some(F::AddressAndPortDependent), 3),
        };
        let udp = kind != RouterKind::UdpBlocked;
        let allocation = match kind {
            RouterKind::ApdmSequential => PortAllocation::Sequential { step: 1 },
            RouterKind::ApdmPreserving => PortAllocation::Preserving,
            _ => PortAllocation::Random,
        };
        Self {
            nats,
            mapping,
            filtering,
            allocation: (mapping == APDM).then_some(allocation),
            hairpin: (mapping == EIM).then_some(false),
            port_preserved: udp.then_some(mapping != APDM),
            shared_port: udp.then_some(true),
            udp,
            tcp_web: true,
            tcp_other: udp,
            input: if kind == RouterKind::Public { InputPolicy::Accept } else { input },
            poisoned: (mapping == EIM).then_some(input == InputPolicy::Accept),
            low_ttl: udp.then_some(low_ttl),
        }
    }
}

/// What a probe of one kind found.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// The kind.
    pub kind: RouterKind,
    /// Whether it did what it has to.
    pub agrees: bool,
    /// What it has to do.
    pub expected: Behaviour,
    /// What it did.
    pub observed: Behaviour,
}

/// Why a probe came to no result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// The lab could not be built.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// A tool failed.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// A socket could not be used.
    #[error("a socket of the probe failed")]
    Socket(#[from] io::Error),
}

/// Builds a lab with a router of this kind and finds out what it does.
///
/// ```no_run
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use netsim::{InputPolicy, RouterKind, probe};
///
/// let report = probe::probe(RouterKind::EimAdf, InputPolicy::Drop, 1)?;
/// assert!(report.agrees);
/// println!("{}", probe::table(&[report]));
/// # Ok(())
/// # }
/// ```
///
/// # Errors
///
/// When the lab cannot be built or the probe's own sockets fail; not when the router misbehaves.
pub fn probe(kind: RouterKind, input: InputPolicy, seed: u64) -> Result<Report, ProbeError> {
    let expected = Behaviour::expected(kind, input);
    let observed = observe(SiteConfig::new(kind).input(input), &expected, seed)?;
    Ok(Report { kind, agrees: expected == observed, expected, observed })
}

/// Builds a lab with a site like this one, of two hosts, and finds out what its routers do.
///
/// What is `expected` decides only how long to wait for a packet before it counts as lost.
///
/// # Errors
///
/// As [`probe`].
pub fn observe(config: SiteConfig, expected: &Behaviour, seed: u64) -> Result<Behaviour, ProbeError> {
    let mut lab = Lab::new(seed)?;
    let bench = measure::Bench {
        server: lab.add_server("server")?,
        outsider: lab.add_server("outsider")?,
        subject: lab.add_site("subject", config.hosts(2))?,
        witness: lab.add_site("witness", SiteConfig::new(RouterKind::Public))?,
    };
    bench.observe(expected)
}
