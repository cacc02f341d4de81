//! A mapping asked of the router, for peers that plain checks do not reach: PCP (RFC 6887), NAT-PMP (RFC 6886), UPnP Internet Gateway Device.
//!
//! It is begun in the background when the endpoint opens and delays nothing. What comes of it is offered as one more candidate, of kind
//! [`PortMapped`](rendezvous_wire::candidate::CandidateKind::PortMapped).
//! One that comes after an introduction serves the next one.
//!
//! - Only for IPv4, and only from a private address: elsewhere there is nothing to map.
//! - Only where the router's own address is one of the Internet. Behind a second NAT a mapping at the first lets nobody in, so it is given back.
//! - Mappings of others stay as they are: PCP and NAT-PMP gateways give another port then; with UPnP we look first.
//! - Always for a limited time. A UPnP router that makes permanent mappings only (error 725) is asked for none: a crash would leave it open.
//!
//! | module | what |
//! |---|---|
//! | `schedule` | when to ask whom for what. Pure |
//! | `requests` | the three protocols, by the crates that speak them |
//! | `gateway` | who the router is |

mod gateway;
mod requests;
mod schedule;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::{Duration, Instant};

use rand::Rng as _;
use rendezvous_wire::candidate::is_probeable;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::driver::Event;

use requests::Requests;
use schedule::{Action, Schedule};

pub(crate) use schedule::LEASE;

/// How long giving a mapping back may hold up the end of an endpoint; a router of the LAN takes a few milliseconds.
const GOODBYE: Duration = Duration::from_millis(500);

/// The same where none may have been made.
const SHORT_GOODBYE: Duration = Duration::from_millis(100);

/// By what a mapping was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Protocol {
    /// RFC 6887.
    Pcp,
    /// RFC 6886.
    NatPmp,
    /// UPnP Internet Gateway Device, WANIPConnection.
    Upnp,
}

impl Protocol {
    const FIRST: Self = Self::Pcp;

    /// The one to try when this one has failed.
    const fn next(self) -> Option<Self> {
        match self {
            Self::Pcp => Some(Self::NatPmp),
            Self::NatPmp => Some(Self::Upnp),
            Self::Upnp => None,
        }
    }

    /// A short name for programs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pcp => "pcp",
            Self::NatPmp => "nat-pmp",
            Self::Upnp => "upnp",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pcp => "PCP",
            Self::NatPmp => "NAT-PMP",
            Self::Upnp => "UPnP",
        })
    }
}

/// A mapping in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapped {
    /// By what it was asked for.
    pub protocol: Protocol,
    /// Where packets from outside are taken.
    pub external: SocketAddrV4,
}

/// Whether a router's address is one at which the Internet reaches it.
fn is_reachable(external: SocketAddrV4) -> bool {
    let ip = external.ip();
    is_probeable(SocketAddr::V4(external)) && !ip.is_private() && !is_shared(*ip)
}

/// Whether a host with this address has a router that translates.
fn is_translated(ip: Ipv4Addr) -> bool {
    ip.is_private() || is_shared(ip)
}

/// Whether an address is of the range between carriers and their customers (RFC 6598).
fn is_shared(ip: Ipv4Addr) -> bool {
    ip.octets()[0] == 100 && ip.octets()[1] & 0xc0 == 64
}

/// The task that keeps the mapping of an endpoint. Dropping it leaves the mapping to its lease.
#[derive(Debug)]
pub(crate) struct PortMapper {
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl PortMapper {
    /// Keeps a mapping for the socket bound to `local`, and tells the driver what becomes of it.
    pub(crate) fn start(local: SocketAddrV4, lease: Duration, events: mpsc::Sender<Event>) -> Self {
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(keep(local, lease, events, stopped));
        Self { stop: Some(stop), task }
    }

    /// Begins to give the mapping back.
    pub(crate) fn stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // Fails when the task has ended, and then there is nothing to stop.
            let _ = stop.send(());
        }
    }

    /// Waits, for a moment, until it has been given back.
    pub(crate) async fn stopped(mut self) {
        self.stop();
        // It has bounds of its own.
        let _ = (&mut self.task).await;
    }
}

impl Drop for PortMapper {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn keep(
    local: SocketAddrV4,
    lease: Duration,
    events: mpsc::Sender<Event>,
    mut stopped: oneshot::Receiver<()>,
) {
    let mut schedule = Schedule::new(local.port(), rand::rng().random(), Instant::now());
    let mut requests = Requests::new(local, lease);
    let mut told = None;
    loop {
        tokio::select! {
            () = step(&mut schedule, &mut requests) => {}
            // Told to stop, or the endpoint is gone.
            _ = &mut stopped => break,
        }
        let mapped = schedule.mapped();
        if mapped != told {
            told = mapped;
            match mapped {
                Some(mapped) => {
                    tracing::debug!(protocol = %mapped.protocol, external = %mapped.external, "port mapped");
                }
                None => tracing::debug!("no port mapping any more"),
            }
            if events.send(Event::PortMapped { mapped }).await.is_err() {
                break;
            }
        }
    }
    let patience = if schedule.mapped().is_some() { GOODBYE } else { SHORT_GOODBYE };
    if let Some(Action::Remove { protocol, external_port }) = schedule.close() {
        let removal = tokio::time::timeout(patience, requests.remove(protocol, external_port)).await;
        tracing::debug!(%protocol, in_time = removal.is_ok(), "port mapping given back");
    }
}

/// Waits for the next thing to do and does it.
async fn step(schedule: &mut Schedule, requests: &mut Requests) {
    let Some(action) = schedule.poll_action(Instant::now()) else {
        match schedule.poll_timeout() {
            Some(wake) => tokio::time::sleep_until(wake.into()).await,
            None => std::future::pending().await,
        }
        return;
    };
    match action {
        Action::Map { protocol, external_port, renews } => {
            let outcome = requests.map(protocol, external_port, renews).await;
            tracing::trace!(%protocol, renews, ?outcome, "port mapping");
            match outcome {
                Ok(granted) => schedule.granted(granted, Instant::now()),
                Err(failure) => schedule.failed(failure, Instant::now()),
            }
        }
        Action::Remove { protocol, external_port } => {
            requests.remove(protocol, external_port).await;
            schedule.removed(Instant::now());
        }
    }
}

/// What one round of asking has shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trial {
    /// Mapped, and given back.
    Mapped(Mapped),
    /// The router would map, and is itself behind a NAT.
    BehindAnotherNat,
    /// The router does not, or there is none.
    Nothing,
    /// The host has an address of the Internet.
    NotNeeded,
}

/// Asks for a mapping of `local` once, and gives it back.
pub(crate) async fn try_once(local: SocketAddrV4) -> Trial {
    if gateway::find(*local.ip()).is_some_and(|(_, own)| !is_translated(own)) {
        return Trial::NotNeeded;
    }
    let mut schedule = Schedule::new(local.port(), rand::rng().random(), Instant::now());
    let mut requests = Requests::new(local, LEASE);
    let began = Instant::now();
    while schedule.mapped().is_none() && schedule.poll_timeout().is_none_or(|wake| wake <= began) {
        step(&mut schedule, &mut requests).await;
    }
    let mapped = schedule.mapped();
    if let Some(Action::Remove { protocol, external_port }) = schedule.close() {
        requests.remove(protocol, external_port).await;
    }
    match mapped {
        Some(mapped) => Trial::Mapped(mapped),
        None if schedule.is_behind_another_nat() => Trial::BehindAnotherNat,
        None => Trial::Nothing,
    }
}

/// The IPv4 one of the path socket's addresses, where a router could know it.
pub(crate) fn mappable(addresses: &[SocketAddr]) -> Option<SocketAddrV4> {
    addresses.iter().find_map(|address| match address {
        SocketAddr::V4(address) if !IpAddr::from(*address.ip()).is_loopback() => Some(*address),
        _ => None,
    })
}
