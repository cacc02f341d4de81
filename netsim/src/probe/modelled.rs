//! The machines of the [model](crate::model), for the same probe.

use std::cell::RefCell;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::measure::Bench;
use super::traffic::{Echo, Machine, Place};
use super::{Behaviour, ProbeError};
use crate::model::{Arrival, HostId, Network, Protocol, SiteId, What};
use crate::router::{Router, RouterKind};
use crate::site::SiteConfig;

/// How long to wait for anything: virtual time is free.
const PATIENCE: Duration = Duration::from_secs(1);

/// Builds a modelled internet with a site like this one, of two hosts, and finds out what its routers do: what [`observe`](super::observe)
/// does in the lab.
///
/// # Errors
///
/// When a socket of the probe fails, which it does not.
pub fn observe_model(config: SiteConfig, expected: &Behaviour, seed: u64) -> Result<Behaviour, ProbeError> {
    let config = config.hosts(2);
    // The model has no epoch of its own; no two instants but their distance matters.
    let mut network = Network::new(seed, Instant::now());
    let (server, outsider) = (network.add_server(), network.add_server());
    let subject = network.add_site(&config);
    let witness = SiteConfig::new(RouterKind::Public);
    let witness_site = network.add_site(&witness);
    let world = Rc::new(World { network: RefCell::new(network), inbox: RefCell::default() });
    let site =
        |id, config: &SiteConfig| ModelSite { world: world.clone(), id, routers: config.routers.clone() };
    let host = |host| ModelHost { world: world.clone(), host };
    let bench = Bench {
        server: host(server),
        outsider: host(outsider),
        subject: site(subject, &config),
        witness: site(witness_site, &witness),
    };
    bench.observe(expected)
}

#[derive(Debug)]
struct World {
    network: RefCell<Network>,
    /// What came to sockets that were not looked at.
    inbox: RefCell<Vec<Arrival>>,
}

impl World {
    /// The first arrival at a socket that `wanted` makes something of, from the past or within [`PATIENCE`].
    fn wait<T>(&self, host: HostId, socket: SocketAddr, wanted: impl Fn(&What) -> Option<T>) -> Option<T> {
        let take = |arrival: &Arrival| {
            if (arrival.host, arrival.socket) == (host, socket) { wanted(&arrival.what) } else { None }
        };
        let mut inbox = self.inbox.borrow_mut();
        if let Some(place) = inbox.iter().position(|arrival| take(arrival).is_some()) {
            return take(&inbox.remove(place));
        }
        let mut network = self.network.borrow_mut();
        let deadline = network.now() + PATIENCE;
        while let Some(arrival) = network.poll(deadline) {
            match take(&arrival) {
                Some(found) => return Some(found),
                None => inbox.push(arrival),
            }
        }
        None
    }
}

#[derive(Debug, Clone)]
struct ModelHost {
    world: Rc<World>,
    host: HostId,
}

#[derive(Debug)]
struct ModelSite {
    world: Rc<World>,
    id: SiteId,
    routers: Vec<Router>,
}

#[derive(Debug)]
struct ModelSocket {
    host: ModelHost,
    protocol: Protocol,
    address: SocketAddr,
}

impl Drop for ModelSocket {
    fn drop(&mut self) {
        self.host.world.network.borrow_mut().close(self.host.host, self.protocol, self.address);
    }
}

impl Place for ModelSite {
    type Machine = ModelHost;

    fn host(&self, index: usize) -> ModelHost {
        ModelHost { world: self.world.clone(), host: self.world.network.borrow().host(self.id, index) }
    }

    fn wan_ipv4(&self) -> Ipv4Addr {
        self.world.network.borrow().wan_ipv4(self.id)
    }

    fn routers(&self) -> &[Router] {
        &self.routers
    }
}

impl ModelHost {
    fn bind(&self, protocol: Protocol, address: Ipv4Addr, port: u16) -> io::Result<ModelSocket> {
        let bound = self.world.network.borrow_mut().bind(self.host, protocol, (address, port).into());
        let address = bound.map_err(|error| io::Error::new(io::ErrorKind::AddrInUse, error))?;
        Ok(ModelSocket { host: self.clone(), protocol, address })
    }

    fn ipv4_addresses(&self) -> Vec<Ipv4Addr> {
        let network = self.world.network.borrow();
        let v4 = network.addresses(self.host).iter().filter_map(|ip| match ip {
            IpAddr::V4(ip) => Some(*ip),
            IpAddr::V6(_) => None,
        });
        v4.collect()
    }
}

impl ModelSocket {
    fn send_to(&self, payload: &[u8], to: SocketAddr, ttl: Option<u32>) {
        let ttl = ttl.map(|ttl| u8::try_from(ttl).unwrap_or(u8::MAX));
        let mut network = self.host.world.network.borrow_mut();
        network.send_as(self.protocol, self.host.host, self.address, to, ttl, payload.to_vec());
    }

    fn wait<T>(&self, wanted: impl Fn(&What) -> Option<T>) -> Option<T> {
        self.host.world.wait(self.host.host, self.address, wanted)
    }

    fn wait_for(&self, tag: &[u8]) -> Option<SocketAddr> {
        self.wait(|what| match what {
            What::Packet(packet) if packet.payload == tag => Some(packet.source),
            _ => None,
        })
    }
}

impl Machine for ModelHost {
    type Site = ModelSite;
    type Socket = ModelSocket;

    fn ipv4(&self) -> Ipv4Addr {
        self.ipv4_addresses()[0]
    }

    fn second_ipv4(&self) -> Option<Ipv4Addr> {
        self.ipv4_addresses().get(1).copied()
    }

    fn open(&self, address: Ipv4Addr, port: u16) -> io::Result<(ModelSocket, SocketAddrV4)> {
        let socket = self.bind(Protocol::Udp, address, port)?;
        let at = SocketAddrV4::new(address, socket.address.port());
        Ok((socket, at))
    }

    fn send(socket: &ModelSocket, payload: &[u8], to: SocketAddrV4, ttl: Option<u32>) -> io::Result<()> {
        socket.send_to(payload, to.into(), ttl);
        Ok(())
    }

    fn receive(socket: &ModelSocket, tag: &[u8], _expected: bool) -> io::Result<Option<SocketAddrV4>> {
        Ok(socket.wait_for(tag).and_then(|source| match source {
            SocketAddr::V4(source) => Some(source),
            SocketAddr::V6(_) => None,
        }))
    }

    fn icmp_error(socket: &ModelSocket, _expected: bool) -> io::Result<Option<Ipv4Addr>> {
        Ok(socket.wait(|what| match what {
            What::Error { reporter: IpAddr::V4(reporter) } => Some(*reporter),
            _ => None,
        }))
    }

    fn ping(&self, target: Ipv4Addr, _expected: bool) -> io::Result<Echo> {
        let socket = self.bind(Protocol::Echo, self.ipv4(), 0)?;
        socket.send_to(b"ping", (target, 0).into(), None);
        let answer = socket.wait(|what| match what {
            What::EchoReply => Some(Echo::Reply),
            What::Error { .. } => Some(Echo::Unreachable),
            What::Packet(_) => None,
        });
        Ok(answer.unwrap_or(Echo::Silence))
    }

    fn connects(&self, to: &Self, port: u16, _expected: bool) -> io::Result<bool> {
        let listener = to.bind(Protocol::Tcp, to.ipv4(), port)?;
        let socket = self.bind(Protocol::Tcp, self.ipv4(), 0)?;
        socket.send_to(b"connect", listener.address, None);
        let Some(source) = listener.wait_for(b"connect") else { return Ok(false) };
        listener.send_to(b"accept", source, None);
        Ok(socket.wait_for(b"accept").is_some())
    }
}
