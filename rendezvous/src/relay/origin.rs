//! From which of the server's addresses and ports an answer leaves (RFC 5780, section 6.1). Pure.

use std::net::{IpAddr, SocketAddr};

use rendezvous_wire::stun::behaviour::Change;

use super::table::Flow;

/// The addresses of the relay's sockets, and which of the server's addresses stand in for each other.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Origins {
    sockets: Vec<SocketAddr>,
    pairs: Vec<[IpAddr; 2]>,
}

impl Origins {
    /// `sockets` are the addresses to which the sockets are bound, in the order of [`Flow::socket`]; each of `pairs` is two
    /// addresses of one family, both of which are served.
    pub fn new(sockets: Vec<SocketAddr>, pairs: Vec<[IpAddr; 2]>) -> Self {
        Self { sockets, pairs }
    }

    /// The address that the other side of a flow sends to, as far as it is known.
    pub fn of(&self, flow: Flow) -> Option<SocketAddr> {
        let bound = self.sockets.get(flow.socket)?;
        let named = (!bound.ip().is_unspecified()).then_some(bound.ip());
        Some(SocketAddr::new(flow.local.map(|ip| ip.to_canonical()).or(named)?, bound.port()))
    }

    /// The flow over which to answer, and its address. `None`: the server cannot answer from there.
    pub fn changed(&self, flow: Flow, change: Change) -> Option<(Flow, SocketAddr)> {
        let mut origin = self.of(flow)?;
        if change.ip {
            origin.set_ip(self.stand_in(origin.ip())?);
        }
        if change.port {
            let other = |socket: &&SocketAddr| socket.port() != origin.port();
            origin.set_port(self.sockets.iter().find(other)?.port());
        }
        let socket = self.sockets.iter().position(|socket| serves(*socket, origin))?;
        Some((Flow { local: Some(origin.ip()), socket, ..flow }, origin))
    }

    /// Where answers with both changes come from: OTHER-ADDRESS (RFC 5780, section 7.4).
    pub fn other(&self, flow: Flow) -> Option<SocketAddr> {
        self.changed(flow, Change { ip: true, port: true }).map(|(_, origin)| origin)
    }

    fn stand_in(&self, ip: IpAddr) -> Option<IpAddr> {
        self.pairs.iter().find_map(|[one, other]| match ip {
            _ if ip == *one => Some(*other),
            _ if ip == *other => Some(*one),
            _ => None,
        })
    }
}

/// Whether a socket bound to `socket` can send from `origin`.
fn serves(socket: SocketAddr, origin: SocketAddr) -> bool {
    let anywhere = socket.ip().is_unspecified() && socket.is_ipv4() == origin.is_ipv4();
    socket.port() == origin.port() && (anywhere || socket.ip() == origin.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn flow(socket: usize, local: Option<&str>) -> Flow {
        Flow { remote: address("198.51.100.7:40000"), local: local.map(|ip| ip.parse().unwrap()), socket }
    }

    const BOTH: Change = Change { ip: true, port: true };
    const IP: Change = Change { ip: true, port: false };
    const PORT: Change = Change { ip: false, port: true };

    #[test]
    fn one_socket_for_all_addresses_answers_from_each() {
        let sockets = ["0.0.0.0:3478", "[::]:3478", "0.0.0.0:3479", "[::]:3479"].map(address);
        let pair = ["203.0.113.10", "203.0.113.11"].map(|ip| ip.parse().unwrap());
        let origins = Origins::new(sockets.to_vec(), vec![pair]);
        let at = flow(0, Some("203.0.113.10"));
        for (change, socket, expected) in [
            (Change::default(), 0, "203.0.113.10:3478"),
            (PORT, 2, "203.0.113.10:3479"),
            (IP, 0, "203.0.113.11:3478"),
            (BOTH, 2, "203.0.113.11:3479"),
        ] {
            let (over, origin) = origins.changed(at, change).unwrap();
            assert_eq!((over.socket, origin), (socket, address(expected)));
            assert_eq!((over.local, over.remote), (Some(origin.ip()), at.remote));
        }
        assert_eq!(origins.other(flow(2, Some("203.0.113.11"))), Some(address("203.0.113.10:3478")));
        assert_eq!(origins.other(flow(1, Some("2001:db8::1"))), None, "no pair of that family");
        assert_eq!(origins.other(flow(0, Some("203.0.113.99"))), None, "a third address");
        assert_eq!(origins.of(flow(0, None)), None);
    }

    #[test]
    fn a_socket_for_each_address_answers_from_its_own() {
        let sockets =
            ["203.0.113.10:3478", "203.0.113.11:3478", "203.0.113.10:3479", "203.0.113.11:3479"].map(address);
        let pair = ["203.0.113.10", "203.0.113.11"].map(|ip| ip.parse().unwrap());
        let origins = Origins::new(sockets.to_vec(), vec![pair]);
        let socket = |from, change| origins.changed(flow(from, None), change).map(|(over, _)| over.socket);
        assert_eq!([IP, PORT, BOTH].map(|change| socket(0, change)), [Some(1), Some(2), Some(3)]);
        assert_eq!([IP, PORT, BOTH].map(|change| socket(3, change)), [Some(2), Some(1), Some(0)]);
    }

    #[test]
    fn one_address_still_has_two_ports() {
        let origins = Origins::new(["0.0.0.0:3478", "0.0.0.0:3479"].map(address).to_vec(), Vec::new());
        let at = flow(1, Some("203.0.113.10"));
        assert_eq!(origins.changed(at, PORT).map(|(_, at)| at), Some(address("203.0.113.10:3478")));
        assert_eq!((origins.changed(at, IP), origins.other(at)), (None, None));
    }
}
