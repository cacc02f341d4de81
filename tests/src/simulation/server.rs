//! The rendezvous server's pure core over the model: what its shells do, without sockets and threads.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Instant;

use netsim::model::{HostId, Network, Packet, Protocol};
use rendezvous::broker::{Action, Broker};
use rendezvous::limits::SourceBuckets;
use rendezvous::relay::origin::Origins;
use rendezvous::relay::reflect::handle_stun;
use rendezvous::relay::runs::{Run, runs};
use rendezvous::relay::table::{Flow, Table, Via};
use rendezvous::{Limits, broker::RegisteredTwice};
use rendezvous_wire::PeerId;
use rendezvous_wire::message::{Decoder, Notice, RegistrationId, Request, encode};

use super::pipe::{self, Pipe};

/// The ports of the server.
pub(super) const SIGNALLING: u16 = 443;
pub(super) const REFLECTION: [u16; 2] = [3478, 3479];

/// A signalling connection.
#[derive(Debug)]
struct Line {
    pipe: Pipe,
    decoder: Decoder,
    peer: PeerId,
    registration: Option<RegistrationId>,
    /// Where it is seen to come from.
    observed: SocketAddr,
}

/// The server.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) host: HostId,
    broker: Broker,
    table: Table,
    strangers: SourceBuckets,
    origins: Origins,
    lines: BTreeMap<u64, Line>,
    /// Every address that has bound.
    bound: BTreeSet<SocketAddr>,
    /// What must never have happened.
    pub(super) violations: Vec<String>,
}

impl Server {
    pub(super) fn new(host: HostId, network: &mut Network, seed: u64) -> Self {
        let limits = Limits::default();
        let mut secret = [0; 32];
        secret[..8].copy_from_slice(&seed.to_be_bytes());
        for port in [SIGNALLING].into_iter().chain(REFLECTION) {
            for any in ["0.0.0.0", "[::]"] {
                let address = format!("{any}:{port}").parse().expect("an address");
                network.bind(host, Protocol::Udp, address).expect("a free port");
            }
        }
        Self {
            host,
            table: Table::new(limits.lease, limits.binding),
            strangers: SourceBuckets::new(limits.reflecting, [seed, !seed]),
            origins: Origins::default(),
            broker: Broker::new(limits, REFLECTION, secret),
            lines: BTreeMap::new(),
            bound: BTreeSet::new(),
            violations: Vec::new(),
        }
    }

    /// A datagram has come.
    pub(super) fn handle(&mut self, packet: &Packet, network: &mut Network, now: Instant) {
        if packet.destination.port() == SIGNALLING {
            self.handle_signalling(packet, now);
        } else {
            self.handle_relay(packet, network, now);
        }
        self.act(network, now);
    }

    pub(super) fn handle_timeout(&mut self, network: &mut Network, now: Instant) {
        self.broker.handle_timeout(now);
        for line in self.lines.values_mut() {
            line.pipe.handle_timeout(now);
        }
        self.act(network, now);
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        let lines = self.lines.values().filter_map(|line| line.pipe.poll_timeout());
        lines.chain(self.broker.poll_timeout()).min()
    }

    fn handle_signalling(&mut self, packet: &Packet, now: Instant) {
        let Some(connection) = pipe::connection(&packet.payload) else { return };
        let line = self.lines.entry(connection).or_insert_with(|| Line {
            pipe: Pipe::new(connection, false, now),
            decoder: Decoder::default(),
            // Its number is its key: proving it is TLS's business.
            peer: peer_id(connection),
            registration: None,
            observed: packet.source,
        });
        line.observed = packet.source;
        let bytes = line.pipe.handle(&packet.payload, now);
        line.decoder.extend(&bytes);
        loop {
            let Some(line) = self.lines.get_mut(&connection) else { return };
            match line.decoder.poll::<Request>() {
                Ok(None) => return,
                Ok(Some(request)) => self.handle_request(connection, request, now),
                Err(error) => return self.violations.push(format!("a peer sent no message: {error}")),
            }
        }
    }

    fn handle_request(&mut self, connection: u64, request: Request, now: Instant) {
        let Some(line) = self.lines.get_mut(&connection) else { return };
        match (line.registration, request) {
            (None, Request::Register(says)) => {
                match self.broker.handle_register(line.peer, line.observed, says, now) {
                    Ok(registration) => line.registration = Some(registration),
                    Err(error) => self.violations.push(format!("not registered: {error}")),
                }
            }
            (None, request) => self.violations.push(format!("{request:?} before registration")),
            (Some(from), request) => {
                self.look_again();
                if let Err(RegisteredTwice) = self.broker.handle_request(from, request, now) {
                    self.violations.push("registered twice".into());
                }
            }
        }
    }

    /// A NAT may have rebound since.
    fn look_again(&mut self) {
        for line in self.lines.values() {
            if let Some(registration) = line.registration {
                self.broker.handle_observed(registration, line.observed);
            }
        }
    }

    fn handle_relay(&mut self, packet: &Packet, network: &mut Network, now: Instant) {
        let socket = usize::from(packet.destination.port() == REFLECTION[1]);
        let flow = Flow { remote: packet.source, local: Some(packet.destination.ip()), socket };
        for run in runs(&packet.payload, packet.payload.len()) {
            match run {
                Run::Stun(datagram) => {
                    let reaction =
                        handle_stun(&mut self.table, &mut self.strangers, &self.origins, datagram, flow, now);
                    if let Some(bound) = reaction.bound {
                        if let Via::Udp(flow) = bound.via {
                            self.bound.insert(flow.remote);
                        }
                        self.broker.handle_bound(bound.registration, bound.at);
                    }
                    if let Some(answer) = reaction.answer {
                        self.send(network, flow, answer.as_ref().to_vec());
                    }
                }
                Run::Frames { channel, bytes, .. } => {
                    if let Some(Via::Udp(to)) = self.table.route(channel, packet.source, now) {
                        for address in [packet.source, to.remote] {
                            if !self.bound.contains(&address) {
                                self.violations.push(format!("relayed for {address}, which has never bound"));
                            }
                        }
                        self.send(network, to, bytes.to_vec());
                    }
                }
                Run::Other => {}
            }
        }
    }

    fn send(&self, network: &mut Network, to: Flow, bytes: Vec<u8>) {
        self.send_from(network, REFLECTION[to.socket], to.remote, bytes);
    }

    fn send_from(&self, network: &mut Network, port: u16, to: SocketAddr, bytes: Vec<u8>) {
        let any: std::net::IpAddr = if to.is_ipv4() {
            std::net::Ipv4Addr::UNSPECIFIED.into()
        } else {
            std::net::Ipv6Addr::UNSPECIFIED.into()
        };
        network.send(self.host, SocketAddr::new(any, port), to, None, bytes);
    }

    fn act(&mut self, network: &mut Network, now: Instant) {
        while let Some(action) = self.broker.poll_action() {
            match action {
                Action::Relay(change) => self.table.apply(change),
                Action::Notify(to, notice) => self.notify(to, &notice, now),
                Action::Evict(_) | Action::Dismiss(..) => self.violations.push("evicted".into()),
            }
        }
        for connection in self.lines.keys().copied().collect::<Vec<_>>() {
            while let Some((datagram, to)) = self.lines.get_mut(&connection).and_then(|line| {
                let datagram = line.pipe.poll_transmit()?;
                Some((datagram, line.observed))
            }) {
                self.send_from(network, SIGNALLING, to, datagram);
            }
        }
    }

    fn notify(&mut self, to: RegistrationId, notice: &Notice, now: Instant) {
        let Some(line) = self.lines.values_mut().find(|line| line.registration == Some(to)) else { return };
        match encode(notice) {
            Ok(bytes) => line.pipe.send(bytes, now),
            Err(error) => self.violations.push(format!("a notice exceeds its bounds: {error}")),
        }
    }
}

/// The key of the peer of this number.
pub(super) fn peer_id(number: u64) -> PeerId {
    PeerId::from_bytes([number as u8; 32])
}
