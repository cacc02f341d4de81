//! A NAT as RFC 4787 describes it.

use std::net::{IpAddr, SocketAddr};

/// RFC 4787, section 4.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mapping {
    /// Endpoint-independent.
    Eim,
    /// Address-and-port-dependent.
    Apdm,
}

/// RFC 4787, section 5.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filtering {
    /// Endpoint-independent.
    Eif,
    /// Address-dependent.
    Adf,
    /// Address-and-port-dependent.
    Apdf,
}

#[derive(Debug)]
struct Binding {
    inside: SocketAddr,
    outside: SocketAddr,
    /// The destination that it is for; any when `None`.
    to: Option<SocketAddr>,
    contacted: Vec<SocketAddr>,
}

#[derive(Debug)]
pub struct Nat {
    pub ip: IpAddr,
    pub hairpin: bool,
    mapping: Mapping,
    filtering: Filtering,
    bindings: Vec<Binding>,
    next_port: u16,
}

impl Nat {
    pub fn new(ip: IpAddr, mapping: Mapping, filtering: Filtering) -> Self {
        Self { ip, hairpin: true, mapping, filtering, bindings: Vec::new(), next_port: 20_000 }
    }

    /// Translates the source of an outbound datagram.
    pub fn outbound(&mut self, inside: SocketAddr, to: SocketAddr) -> SocketAddr {
        let key = (self.mapping == Mapping::Apdm).then_some(to);
        let known = self.bindings.iter().position(|binding| binding.inside == inside && binding.to == key);
        let index = known.unwrap_or_else(|| {
            self.next_port += 7;
            let outside = SocketAddr::new(self.ip, self.next_port);
            self.bindings.push(Binding { inside, outside, to: key, contacted: Vec::new() });
            self.bindings.len() - 1
        });
        let binding = &mut self.bindings[index];
        if !binding.contacted.contains(&to) {
            binding.contacted.push(to);
        }
        binding.outside
    }

    /// Translates the destination of an inbound datagram, if it may come in.
    pub fn inbound(&self, from: SocketAddr, to: SocketAddr) -> Option<SocketAddr> {
        let binding = self.bindings.iter().find(|binding| binding.outside == to)?;
        let allowed = match self.filtering {
            Filtering::Eif => true,
            Filtering::Adf => binding.contacted.iter().any(|known| known.ip() == from.ip()),
            Filtering::Apdf => binding.contacted.contains(&from),
        };
        allowed.then_some(binding.inside)
    }

    /// Whose an outside address is.
    pub fn inside(&self, outside: SocketAddr) -> Option<SocketAddr> {
        self.bindings.iter().find(|binding| binding.outside == outside).map(|binding| binding.inside)
    }

    /// Forgets every binding, as after a reboot: the next ones have other ports.
    pub fn reboot(&mut self) {
        self.bindings.clear();
        self.next_port += 1000;
    }
}
