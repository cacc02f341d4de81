//! One of a host's processes probes at a time: the router that has to remember the probes is the same for all of them.

use peer_agent::{Gate, Permit};

/// The gate that all endpoints of this host, or of this network namespace, share.
pub(super) fn host_wide() -> Gate {
    Box::new(acquire)
}

/// A name in Linux's abstract socket namespace can be bound once, is per network namespace, as is the router in front of it, and frees itself when its
/// holder dies.
#[cfg(target_os = "linux")]
fn acquire() -> Option<Permit> {
    use std::os::linux::net::SocketAddrExt as _;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let name = SocketAddr::from_abstract_name("rendezvous-peer-probing").ok()?;
    match UnixDatagram::bind_addr(&name) {
        Ok(held) => Some(Box::new(held)),
        Err(error) => {
            tracing::debug!(%error, "another process of this host is probing");
            None
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn acquire() -> Option<Permit> {
    Some(Box::new(()))
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn one_holds_it_at_a_time() {
        let mut gate = host_wide();
        let held = gate();
        assert!(held.is_some() && gate().is_none());
        drop(held);
        assert!(gate().is_some());
    }
}
