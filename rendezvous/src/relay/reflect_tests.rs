use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use rendezvous_wire::message::RegistrationId;
use rendezvous_wire::stun::Key;

use super::*;
use crate::limits::Rate;
use crate::relay::table::Change;

const A: RegistrationId = RegistrationId(0xa);
const T: TransactionId = TransactionId([0x5a; 12]);

struct Server {
    table: Table,
    strangers: SourceBuckets,
    now: Instant,
}

impl Server {
    fn new(reflecting: Rate) -> Self {
        let mut table = Table::new(Duration::from_secs(60), Rate::new(1_000_000, 1_000_000));
        table.apply(Change::Admit { registration: A, key: key() });
        Self { table, strangers: SourceBuckets::new(reflecting, [1, 2]), now: Instant::now() }
    }

    fn generous() -> Self {
        Self::new(Rate::new(1_000_000_000, 1_000_000))
    }

    fn handle(&mut self, datagram: &[u8], from: &str) -> Reaction {
        let flow = Flow { remote: from.parse().unwrap(), local: None, socket: 0 };
        handle_stun(&mut self.table, &mut self.strangers, datagram, flow, self.now)
    }

    fn error(&mut self, datagram: &[u8]) -> Option<u16> {
        let answer = self.handle(datagram, V4).answer?;
        let received = Received::parse(answer.as_ref()).unwrap();
        assert_eq!(received.class(), Class::Error);
        received.error_code()
    }
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
    assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
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
    assert_eq!((bound.sequence, bound.flow.remote), (2, V6.parse().unwrap()));
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
            let Some(answer) = server.handle(&datagram, from).answer else { continue };
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
