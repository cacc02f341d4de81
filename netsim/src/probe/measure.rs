//! One measurement per line of [`Behaviour`].

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};

use super::traffic::{Echo, Endpoint, Machine, Place as _};
use super::{Behaviour, ProbeError};
use crate::router::{Filtering, InputPolicy, Mapping, PortAllocation};

/// Further than any way through the lab.
const MOST_HOPS: u32 = 8;

/// A subject and those who look at it. What is expected decides only how long to wait for it.
pub(super) struct Bench<M: Machine> {
    /// Whom the subject talks to, at two addresses.
    pub(super) server: M,
    /// Whom it does not.
    pub(super) outsider: M,
    pub(super) subject: M::Site,
    pub(super) witness: M::Site,
}

impl<M: Machine> Bench<M> {
    pub(super) fn observe(&self, expected: &Behaviour) -> Result<Behaviour, ProbeError> {
        let host = self.subject.host(0);
        let udp = self.udp_leaves(expected.udp)?;
        let hops = self.hops(expected)?;
        let reflexive = if udp { self.reflexive(&host)? } else { Vec::new() };
        let mapping = mapping(&reflexive);
        let eim = mapping == Some(Mapping::EndpointIndependent);
        Ok(Behaviour {
            nats: hops.iter().filter(|hop| hop.is_private() || is_shared(**hop)).count(),
            mapping,
            filtering: if udp { Some(self.filtering(expected)?) } else { None },
            allocation: (mapping == Some(Mapping::AddressAndPortDependent)).then(|| allocation(&reflexive)),
            hairpin: if eim { Some(self.hairpin(expected.hairpin == Some(true))?) } else { None },
            port_preserved: udp.then(|| reflexive.iter().all(|(own, seen)| own.port() == seen.port())),
            shared_port: if udp { Some(self.shared_port(mapping)?) } else { None },
            udp,
            tcp_web: host.connects(&self.server, 443, expected.tcp_web)?,
            tcp_other: host.connects(&self.server, 8443, expected.tcp_other)?,
            input: self.input(expected.input)?,
            poisoned: if eim { Some(self.poisoned()?) } else { None },
            low_ttl: if udp { self.low_ttl(&hops)? } else { None },
        })
    }

    /// Two addresses with two ports each.
    fn reflectors(&self) -> io::Result<Vec<Endpoint<M>>> {
        let second = self.server.second_ipv4().expect("servers have two addresses");
        let addresses = [self.server.ipv4(), second];
        addresses
            .iter()
            .flat_map(|address| [(*address, 3478), (*address, 3479)])
            .map(|(address, port)| Endpoint::bind(&self.server, address, port))
            .collect()
    }

    fn udp_leaves(&self, expected: bool) -> io::Result<bool> {
        let (inside, outside) = (Endpoint::on(&self.subject.host(0))?, Endpoint::on(&self.server)?);
        inside.send("leaves", outside.address)?;
        Ok(outside.receive("leaves", expected)?.is_some())
    }

    /// The routers from a host to beyond its site, as they report themselves when a TTL ends there.
    fn hops(&self, expected: &Behaviour) -> io::Result<Vec<Ipv4Addr>> {
        let inside = Endpoint::on(&self.subject.host(0))?;
        let target = SocketAddrV4::new(self.witness.host(0).ipv4(), 9);
        let mut hops = Vec::new();
        for ttl in 1..=MOST_HOPS {
            inside.send_with_ttl("hop", target, ttl)?;
            match inside.icmp_error(expected.udp || ttl == 1)? {
                Some(hop) => hops.push(hop),
                None => break,
            }
            if hops.last() == Some(&self.edge()) {
                break;
            }
        }
        Ok(hops)
    }

    /// The first router beyond the site.
    fn edge(&self) -> Ipv4Addr {
        let [a, b, c, _] = self.subject.wan_ipv4().octets();
        Ipv4Addr::new(a, b, c, 1)
    }

    /// The own and the reflexive endpoint of one socket, toward every reflector.
    fn reflexive(&self, host: &M) -> io::Result<Vec<(SocketAddrV4, SocketAddrV4)>> {
        let inside = Endpoint::on(host)?;
        let mut seen = Vec::new();
        for reflector in self.reflectors()? {
            if let Some(reflexive) = exchange(&inside, &reflector)? {
                seen.push((inside.address, reflexive));
            }
        }
        Ok(seen)
    }

    fn filtering(&self, expected: &Behaviour) -> io::Result<Filtering> {
        let [contacted, other_port] = [Endpoint::on(&self.server)?, Endpoint::on(&self.server)?];
        let other_address = Endpoint::on(&self.outsider)?;
        let inside = Endpoint::on(&self.subject.host(0))?;
        let Some(reflexive) = exchange(&inside, &contacted)? else {
            return Ok(Filtering::AddressAndPortDependent);
        };
        other_address.send("other address", reflexive)?;
        let expects =
            |filterings: &[Filtering]| expected.filtering.is_some_and(|it| filterings.contains(&it));
        if inside.receive("other address", expects(&[Filtering::EndpointIndependent]))?.is_some() {
            return Ok(Filtering::EndpointIndependent);
        }
        other_port.send("other port", reflexive)?;
        let address_dependent = expects(&[Filtering::EndpointIndependent, Filtering::AddressDependent]);
        Ok(match inside.receive("other port", address_dependent)? {
            Some(_) => Filtering::AddressDependent,
            None => Filtering::AddressAndPortDependent,
        })
    }

    /// Two hosts with one source port, first one after the other, then, where the mapping is kept apart from the
    /// kernel's flows, each with a first destination of its own, which is where flows could share a port.
    fn shared_port(&self, mapping: Option<Mapping>) -> io::Result<bool> {
        let reflectors = self.reflectors()?;
        let in_turn: Vec<_> = [0, 1].iter().flat_map(|host| [0, 1, 2, 3].map(|to| (*host, to))).collect();
        let crosswise = vec![(0, 0), (1, 1), (1, 0), (0, 1), (0, 2), (1, 3), (1, 2), (0, 3)];
        let keeps_bindings = self.subject.routers().iter().any(crate::router::Router::needs_binding_maps);
        let orders = if keeps_bindings { vec![in_turn, crosswise] } else { vec![in_turn] };
        for order in orders {
            if !self.shares_port(mapping, &reflectors, &order)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn shares_port(
        &self,
        mapping: Option<Mapping>,
        reflectors: &[Endpoint<M>],
        order: &[(usize, usize)],
    ) -> io::Result<bool> {
        let first = Endpoint::on(&self.subject.host(0))?;
        let other = self.subject.host(1);
        let inside = [&first, &Endpoint::bind(&other, other.ipv4(), first.port())?];
        let mut seen = [Vec::new(), Vec::new()];
        for (host, to) in order {
            match exchange(inside[*host], &reflectors[*to])? {
                Some(reflexive) => seen[*host].push((inside[*host].address, reflexive)),
                None => return Ok(false),
            }
        }
        let apart = seen[0].iter().all(|(_, one)| seen[1].iter().all(|(_, two)| one != two));
        let alike = seen.iter().all(|seen| self::mapping(seen) == mapping);
        if mapping != Some(Mapping::EndpointIndependent) {
            return Ok(alike);
        }
        // Each mapping still leads to its own host.
        for (index, tag) in ["for the first", "for the second"].iter().enumerate() {
            reflectors[0].send(tag, seen[index][0].1)?;
            if inside[index].receive(tag, true)?.is_none() {
                return Ok(false);
            }
        }
        Ok(alike && apart)
    }

    /// Both hosts send to the other's reflexive endpoint; whether the later one arrives.
    fn hairpin(&self, expected: bool) -> io::Result<bool> {
        let reflector = Endpoint::on(&self.server)?;
        let inside = [Endpoint::on(&self.subject.host(0))?, Endpoint::on(&self.subject.host(1))?];
        let [one, two] = [exchange(&inside[0], &reflector)?, exchange(&inside[1], &reflector)?];
        let (Some(one), Some(two)) = (one, two) else { return Ok(false) };
        inside[0].send("opens", two)?;
        inside[1].send("hairpin", one)?;
        Ok(inside[0].receive("hairpin", expected)?.is_some())
    }

    /// Asks the outermost router from the internet, at a port that nobody has.
    fn input(&self, expected: InputPolicy) -> io::Result<InputPolicy> {
        let outside = Endpoint::on(&self.outsider)?;
        let wan = self.subject.wan_ipv4();
        outside.send("anybody?", SocketAddrV4::new(wan, 9))?;
        let answered = expected != InputPolicy::Drop;
        let unreachable = outside.icmp_error(answered)?.is_some();
        Ok(match (unreachable, self.outsider.ping(wan, answered)?) {
            (true, Echo::Reply) => InputPolicy::Accept,
            (_, Echo::Unreachable) | (true, Echo::Silence) => InputPolicy::Reject,
            (false, _) => InputPolicy::Drop,
        })
    }

    /// Lets a packet come in before the first one goes out between the same two endpoints.
    fn poisoned(&self) -> io::Result<bool> {
        let (inside, outside) = (Endpoint::on(&self.subject.host(0))?, Endpoint::on(&self.outsider)?);
        outside.send("early", SocketAddrV4::new(self.subject.wan_ipv4(), inside.port()))?;
        // The way in is shorter than one there and back, which takes the same routers.
        let other = Endpoint::on(&self.outsider)?;
        exchange(&Endpoint::on(&self.subject.host(0))?, &other)?;
        Ok(exchange(&inside, &outside)?.is_none_or(|reflexive| reflexive.port() != inside.port()))
    }

    /// The TTL that ends at the edge, if a packet sent with it stays away from the witness.
    fn low_ttl(&self, hops: &[Ipv4Addr]) -> io::Result<Option<usize>> {
        let Some(ttl) = hops.iter().position(|hop| *hop == self.edge()).map(|index| index + 1) else {
            return Ok(None);
        };
        let (inside, witness) = (Endpoint::on(&self.subject.host(0))?, Endpoint::on(&self.witness.host(0))?);
        inside.send_with_ttl("low", witness.address, u32::try_from(ttl).unwrap_or(u32::MAX))?;
        let low_arrived = witness.receive("low", false)?.is_some();
        inside.send("full", witness.address)?;
        let full_arrived = witness.receive("full", true)?.is_some();
        Ok((full_arrived && !low_arrived).then_some(ttl))
    }
}

/// A packet out and one back. The reflexive endpoint of `inside`, if both arrive.
fn exchange<M: Machine>(inside: &Endpoint<M>, outside: &Endpoint<M>) -> io::Result<Option<SocketAddrV4>> {
    inside.send("ask", outside.address)?;
    let Some(reflexive) = outside.receive("ask", true)? else { return Ok(None) };
    outside.send("answer", reflexive)?;
    Ok(inside.receive("answer", true)?.map(|_| reflexive))
}

/// How own endpoints were mapped toward the reflectors: two addresses, two ports each, in any order.
fn mapping(seen: &[(SocketAddrV4, SocketAddrV4)]) -> Option<Mapping> {
    let (own, first) = seen.first()?;
    if own.ip() == first.ip() {
        return None;
    }
    if seen.iter().all(|(_, reflexive)| reflexive == first) {
        return Some(Mapping::EndpointIndependent);
    }
    let by_address = seen.chunks(2).all(|ports| ports[0].1 == ports[ports.len() - 1].1);
    Some(if by_address { Mapping::AddressDependent } else { Mapping::AddressAndPortDependent })
}

/// Which ports one socket's flows got, in the order in which they began.
fn allocation(seen: &[(SocketAddrV4, SocketAddrV4)]) -> PortAllocation {
    let steps: Vec<u16> =
        seen.windows(2).map(|pair| pair[1].1.port().wrapping_sub(pair[0].1.port())).collect();
    match steps.first() {
        _ if seen.iter().any(|(own, seen)| own.port() == seen.port()) => PortAllocation::Preserving,
        Some(step) if steps.iter().all(|other| other == step) => PortAllocation::Sequential { step: *step },
        _ => PortAllocation::Random,
    }
}

/// Whether an address is of the range between carriers and their customers (RFC 6598).
fn is_shared(address: Ipv4Addr) -> bool {
    let [a, b, ..] = address.octets();
    a == 100 && b & 0xc0 == 64
}
