use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use rendezvous_wire::message::RegistrationId;
use rendezvous_wire::stun::Key;
use rendezvous_wire::stun::behaviour::DiscoveryRequest;

use super::*;
use crate::limits::Rate;
use crate::relay::table;
use crate::relay::table::Via;

const A: RegistrationId = RegistrationId(0xa);
const T: TransactionId = TransactionId([0x5a; 12]);

struct Server {
    table: Table,
    strangers: SourceBuckets,
    origins: Origins,
    now: Instant,
}

impl Server {
    fn new(reflecting: Rate) -> Self {
        let mut table = Table::new(Duration::from_secs(60), Rate::new(1_000_000, 1_000_000));
        table.apply(table::Change::Admit {
            registration: A,
            key: key(),
            peer: rendezvous_wire::PeerId::from_bytes([1; 32]),
        });
        let strangers = SourceBuckets::new(reflecting, [1, 2]);
        Self { table, strangers, origins: origins(true), now: Instant::now() }
    }

    fn generous() -> Self {
        Self::new(Rate::new(1_000_000_000, 1_000_000))
    }

    fn handle(&mut self, datagram: &[u8], from: &str) -> Reaction {
        let remote: SocketAddr = from.parse().unwrap();
        let ipv4 = remote.ip().to_canonical().is_ipv4();
        let flow = Flow { remote, local: Some(address(at(0, ipv4)).ip()), socket: usize::from(!ipv4) };
        handle_stun(&mut self.table, &mut self.strangers, &self.origins, datagram, flow, self.now)
    }

    fn error(&mut self, datagram: &[u8]) -> Option<u16> {
        let answer = self.handle(datagram, V4).answer?;
        let received = Received::parse(answer.as_ref()).unwrap();
        assert_eq!(received.class(), Class::Error);
        received.error_code()
    }
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// The server's own addresses: the one that peers use, and the one with both changes.
fn at(place: usize, ipv4: bool) -> &'static str {
    match ipv4 {
        true => ["203.0.113.10:3478", "203.0.113.11:3479"][place],
        false => ["[2001:db8:1::10]:3478", "[2001:db8:1::11]:3479"][place],
    }
}

/// Of a server with one address of each family, or two.
fn origins(two: bool) -> Origins {
    let sockets = ["0.0.0.0:3478", "[::]:3478", "0.0.0.0:3479", "[::]:3479"].map(address);
    let pairs = [true, false].map(|ipv4| [at(0, ipv4), at(1, ipv4)].map(|text| address(text).ip()));
    Origins::new(sockets.to_vec(), if two { pairs.to_vec() } else { Vec::new() })
}

const V4: &str = "198.51.100.7:40000";
const V6: &str = "[2001:db8::9]:40000";

fn key() -> Key {
    Key::new("a-password-of-some-length").unwrap()
}

fn bind_request(sequence: u64) -> Vec<u8> {
    BindRequest { registration: A, sequence }.encode(T, &key()).unwrap()
}

/// A Binding request with these attributes, given as type and value.
fn request(attributes: &[(u16, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (kind, value) in attributes {
        body.extend_from_slice(&kind.to_be_bytes());
        body.extend_from_slice(&(value.len() as u16).to_be_bytes());
        body.extend_from_slice(value);
        body.resize(body.len().next_multiple_of(4), 0);
    }
    let mut bytes = BINDING_REQUEST.to_vec();
    bytes.extend_from_slice(&(body.len() as u16).to_be_bytes());
    bytes.extend_from_slice(&MAGIC_COOKIE);
    bytes.extend_from_slice(&T.0);
    bytes.extend_from_slice(&body);
    bytes
}

#[test]
fn bare_answers_are_those_of_the_codec_byte_for_byte() {
    let mut rng = StdRng::seed_from_u64(1);
    for _ in 0..2_000 {
        let mut transaction = TransactionId([0; 12]);
        rng.fill_bytes(&mut transaction.0);
        let ip = if rng.random() {
            IpAddr::from(rng.random::<[u8; 4]>())
        } else {
            IpAddr::from(rng.random::<[u8; 16]>()).to_canonical()
        };
        let mapped = SocketAddr::new(ip, rng.random());
        let expected = stun::binding_success(transaction, mapped, None).unwrap();
        assert_eq!(bare_answer(transaction, mapped).as_ref(), expected, "{mapped}");
        assert_eq!(bare_request(&stun::binding_request(transaction).unwrap()), Some(transaction));
    }
}

#[test]
fn the_crc_is_the_one_of_the_standard() {
    assert_eq!(crc32fast::hash(b"123456789"), 0xcbf4_3926);
}

#[test]
fn a_bare_request_learns_its_address() {
    let mut server = Server::generous();
    for from in [V4, V6] {
        for datagram in [stun::binding_request(T).unwrap(), request(&[])] {
            let answer = server.handle(&datagram, from).answer.unwrap();
            let received = Received::parse(answer.as_ref()).unwrap();
            assert_eq!((received.class(), received.transaction()), (Class::Success, T));
            assert_eq!(received.mapped_address(), Some(from.parse().unwrap()));
        }
    }
    let mapped = server.handle(&request(&[]), "[::ffff:198.51.100.7]:9").answer.unwrap();
    let mapped = Received::parse(mapped.as_ref()).unwrap().mapped_address();
    assert_eq!(mapped, Some("198.51.100.7:9".parse().unwrap()));
}

#[test]
fn a_bind_request_binds_and_is_answered_under_its_key() {
    let mut server = Server::generous();
    for _retransmission in 0..2 {
        let reaction = server.handle(&bind_request(1), V4);
        let answer = reaction.answer.unwrap();
        let received = Received::parse(answer.as_ref()).unwrap();
        assert!(received.verify(&key()));
        assert_eq!(received.mapped_address(), Some(V4.parse().unwrap()));
    }
    let reaction = server.handle(&bind_request(1), V6);
    assert!(reaction.answer.is_none() && reaction.bound.is_none(), "a replay gets no answer");
    let bound = server.handle(&bind_request(2), V6).bound.unwrap();
    let Via::Udp(flow) = bound.via else { panic!("{bound:?}") };
    assert_eq!((bound.sequence, flow.remote), (2, V6.parse().unwrap()));
}

fn discovery(change: (bool, bool), response_port: Option<u16>) -> Vec<u8> {
    let change = Change { ip: change.0, port: change.1 };
    let padded = response_port.is_none();
    DiscoveryRequest { transaction: T, change, response_port, padded }.encode().unwrap()
}

#[test]
fn answers_come_from_where_they_were_asked_to() {
    let mut server = Server::generous();
    for from in [V4, V6] {
        let ipv4 = from == V4;
        let [first, both] = [0, 1].map(|place| address(at(place, ipv4)));
        for (change, expected) in [
            ((false, false), first),
            ((false, true), SocketAddr::new(first.ip(), both.port())),
            ((true, false), SocketAddr::new(both.ip(), first.port())),
            ((true, true), both),
        ] {
            let reaction = server.handle(&discovery(change, None), from);
            let over = reaction.over.unwrap();
            assert_eq!((over.local, over.remote), (Some(expected.ip()), address(from)));
            assert_eq!(server.origins.of(over), Some(expected));
            let answer = reaction.answer.unwrap();
            let received = Received::parse(answer.as_ref()).unwrap();
            assert_eq!(received.mapped_address(), Some(address(from)));
            assert_eq!(received.response_origin(), Some(expected));
            assert_eq!(received.other_address(), Some(both), "whatever the change");
            assert!(received.is_padded());
        }
    }
}

#[test]
fn a_server_with_one_address_changes_the_port_alone() {
    let mut server = Server { origins: origins(false), ..Server::generous() };
    for change in [(true, false), (true, true)] {
        let answer = server.handle(&discovery(change, None), V4).answer.unwrap();
        let received = Received::parse(answer.as_ref()).unwrap();
        assert_eq!(received.error_code(), Some(420));
    }
    let reaction = server.handle(&discovery((false, true), None), V4);
    assert_eq!(server.origins.of(reaction.over.unwrap()), Some(address("203.0.113.10:3479")));
    let answer = reaction.answer.unwrap();
    assert_eq!(Received::parse(answer.as_ref()).unwrap().other_address(), None);
}

#[test]
fn another_port_of_the_same_address_may_have_the_answer() {
    let mut server = Server::generous();
    for (port, goes) in [(40_001, true), (40_000, true), (1024, true), (1023, false), (53, false), (0, false)]
    {
        let reaction = server.handle(&discovery((false, false), Some(port)), V4);
        let answer = reaction.answer.unwrap();
        let received = Received::parse(answer.as_ref()).unwrap();
        if goes {
            let to = SocketAddr::new(address(V4).ip(), port);
            assert_eq!((received.class(), reaction.over.unwrap().remote), (Class::Success, to));
            assert_eq!(received.mapped_address(), Some(address(V4)));
        } else {
            assert_eq!((received.error_code(), reaction.over), (Some(400), None), "port {port}");
        }
    }
    let both = request(&[(0x0027, &[0x9c, 0x41, 0, 0]), (0x0026, b"abcd")]);
    assert_eq!(server.error(&both), Some(400), "RESPONSE-PORT and PADDING (RFC 5780, section 7.5)");
    let mut poor = Server::new(Rate::new(2, 1));
    let asked = discovery((true, true), None);
    assert_eq!((0..10).filter(|_| poor.handle(&asked, V4).answer.is_some()).count(), 2);
}

#[test]
fn what_is_wrong_is_said() {
    let mut server = Server::generous();
    assert_eq!(server.error(&request(&[(0x7ffe, b"abc"), (0xfffe, b"")])), Some(420));
    assert_eq!(server.error(&request(&[(0x0006, b"name")])), Some(400), "USERNAME without integrity");
    let wrong = Key::new("another-password").unwrap();
    let forged = BindRequest { registration: A, sequence: 1 }.encode(T, &wrong).unwrap();
    assert_eq!(server.error(&forged), Some(401));
    let stranger = BindRequest { registration: RegistrationId(9), sequence: 1 }.encode(T, &key()).unwrap();
    assert_eq!(server.error(&stranger), Some(401));
}

#[test]
fn what_is_not_a_request_gets_no_answer() {
    let mut server = Server::generous();
    let good = stun::binding_request(T).unwrap();
    let with = |place: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[place] = byte;
        bytes
    };
    let success = stun::binding_success(T, V4.parse().unwrap(), None).unwrap();
    let silent = [
        ("no magic cookie", with(4, 0)),
        ("a wrong fingerprint", with(27, good[27] ^ 1)),
        ("an indication", with(1, 0x11)),
        ("another method", with(1, 0x03)),
        ("a length that is not its own", with(3, 4)),
        ("cut short", good[..19].to_vec()),
        ("an answer", success),
        ("nothing", Vec::new()),
    ];
    for (what, datagram) in silent {
        assert!(server.handle(&datagram, V4).answer.is_none(), "{what}");
    }
}

#[test]
fn strangers_are_rationed_and_registered_peers_are_not() {
    let mut server = Server::new(Rate::new(3, 1));
    let bare = stun::binding_request(T).unwrap();
    let answered = (0..10).filter(|_| server.handle(&bare, V4).answer.is_some()).count();
    assert_eq!(answered, 3);
    assert!(server.error(&request(&[(0x7ffe, b"")])).is_none(), "errors count as well");
    assert!(server.handle(&bind_request(1), V4).answer.is_some());
    assert!(server.handle(&bare, V6).answer.is_some(), "another source has its own");
}

/// Bytes of IP and UDP headers, which a victim's line carries as well.
fn on_the_wire(from: &str, payload: usize) -> usize {
    payload + if from.starts_with('[') { 48 } else { 28 }
}

#[test]
fn no_datagram_makes_it_panic_or_amplify() {
    let seeds = [
        stun::binding_request(T).unwrap(),
        request(&[]),
        request(&[(0x7ffe, b""), (0x7ffd, b""), (0x7ffc, b"")]),
        request(&[(0x0006, b"name")]),
        request(&[(0x8022, b"some software")]),
        discovery((true, true), None),
        discovery((false, true), None),
        discovery((false, false), Some(40_001)),
        request(&[(0x0003, &[0, 0, 0, 6])]),
        request(&[(0x0026, b"")]),
        bind_request(5),
        stun::binding_error(T, 401, &[], None).unwrap(),
    ];
    let mut answers = 0;
    for seed in 0..40 {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut server = Server::generous();
        for round in 0..1_500 {
            let mut datagram = match rng.random_range(0..4) {
                0 => (0..rng.random_range(0..200)).map(|_| rng.random()).collect(),
                _ => seeds[rng.random_range(0..seeds.len())].clone(),
            };
            for _ in 0..rng.random_range(0..4) {
                match rng.random_range(0..3) {
                    0 if !datagram.is_empty() => {
                        let place = rng.random_range(0..datagram.len());
                        datagram[place] = rng.random();
                    }
                    1 => datagram.truncate(rng.random_range(0..=datagram.len())),
                    _ => datagram.extend((0..rng.random_range(0..12)).map(|_| rng.random::<u8>())),
                }
            }
            let from = if rng.random() { V4 } else { V6 };
            let reaction = server.handle(&datagram, from);
            if let Some(over) = reaction.over {
                assert_eq!(over.remote.ip(), address(from).ip(), "nobody else is answered");
            }
            let Some(answer) = reaction.answer else { continue };
            answers += 1;
            let received = Received::parse(answer.as_ref()).expect("answers are well-formed");
            if !received.has_integrity() {
                let (asked, sent) =
                    (on_the_wire(from, datagram.len()), on_the_wire(from, answer.as_ref().len()));
                assert!(sent * 2 <= asked * 3, "seed {seed}, round {round}: {asked} bytes became {sent}");
            }
        }
    }
    assert!(answers > 1_000, "only {answers} answers: the test has lost its subject");
}
