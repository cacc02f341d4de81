use rendezvous_wire::stun::TransactionId;

use super::*;

const LEASE: Duration = Duration::from_secs(60);
const A: RegistrationId = RegistrationId(0xa);
const B: RegistrationId = RegistrationId(0xb);
const C: RegistrationId = RegistrationId(0xc);

fn key(of: RegistrationId) -> Key {
    Key::new(&format!("password-of-{:x}", of.0)).unwrap()
}

fn flow(port: u16) -> Flow {
    Flow { remote: SocketAddr::from(([198, 51, 100, 1], port)), local: None, socket: 0 }
}

fn channel(number: u32) -> Channel {
    Channel::new(number).unwrap()
}

/// Three registrations, A and B joined by channel 1.
fn table() -> Table {
    let mut table = Table::new(LEASE, Rate::new(64, 16));
    for registration in [A, B, C] {
        table.apply(Change::Admit {
            registration,
            key: key(registration),
            peer: PeerId::from_bytes([registration.0 as u8; 32]),
        });
    }
    table.apply(Change::Open { channel: channel(1), members: [A, B] });
    table
}

fn datagram(registration: RegistrationId, sequence: u64, key: &Key) -> Vec<u8> {
    BindRequest { registration, sequence }.encode(TransactionId([3; 12]), key).unwrap()
}

fn bind(table: &mut Table, datagram: &[u8], flow: Flow, now: Instant) -> &'static str {
    let message = Received::parse(datagram).unwrap();
    let request = BindRequest::from_username(message.username().unwrap()).unwrap();
    match table.bind(request, &message, flow, now) {
        Binding::Bound(..) => "bound",
        Binding::Repeated(_) => "repeated",
        Binding::Unauthenticated => "unauthenticated",
        Binding::Ignored => "ignored",
    }
}

#[test]
fn nothing_is_forwarded_until_both_are_bound() {
    let now = Instant::now();
    let mut table = table();
    assert_eq!(table.route(channel(1), flow(1).remote, now), None);
    assert_eq!(bind(&mut table, &datagram(A, 1, &key(A)), flow(1), now), "bound");
    assert_eq!(table.route(channel(1), flow(1).remote, now), None);
    assert_eq!(bind(&mut table, &datagram(B, 1, &key(B)), flow(2), now), "bound");
    assert_eq!(table.route(channel(1), flow(1).remote, now), Some(flow(2).into()));
    assert_eq!(table.route(channel(1), flow(2).remote, now), Some(flow(1).into()));
    assert_eq!(bind(&mut table, &datagram(C, 1, &key(C)), flow(3), now), "bound");
    assert_eq!(table.route(channel(1), flow(3).remote, now), None, "bound, but not a member");
    assert_eq!(table.route(channel(2), flow(1).remote, now), None, "a channel that nobody opened");
}

#[test]
fn only_the_registrations_own_key_binds() {
    let now = Instant::now();
    let mut table = table();
    assert_eq!(bind(&mut table, &datagram(A, 1, &key(B)), flow(1), now), "unauthenticated");
    let unknown = RegistrationId(0xd);
    assert_eq!(bind(&mut table, &datagram(unknown, 1, &key(unknown)), flow(1), now), "unauthenticated");
    table.apply(Change::Remove(A));
    assert_eq!(bind(&mut table, &datagram(A, 1, &key(A)), flow(1), now), "unauthenticated");
}

#[test]
fn a_replayed_request_does_not_bind_another_address() {
    let now = Instant::now();
    let mut table = table();
    let (first, second) = (datagram(A, 7, &key(A)), datagram(A, 8, &key(A)));
    assert_eq!(bind(&mut table, &datagram(B, 1, &key(B)), flow(2), now), "bound");
    assert_eq!(bind(&mut table, &first, flow(1), now), "bound");
    assert_eq!(bind(&mut table, &first, flow(66), now), "ignored");
    assert_eq!(bind(&mut table, &first, flow(1), now), "repeated");
    assert_eq!(bind(&mut table, &second, flow(9), now), "bound");
    assert_eq!(bind(&mut table, &first, flow(1), now), "ignored");
    assert_eq!(table.route(channel(1), flow(2).remote, now), Some(flow(9).into()));
    assert_eq!(table.route(channel(1), flow(1).remote, now), None, "the old address is bound no more");
}

#[test]
fn a_replay_is_refused_by_a_thread_that_heard_of_the_request_from_another() {
    let now = Instant::now();
    let (mut here, mut there) = (table(), table());
    let request = datagram(A, 7, &key(A));
    let message = Received::parse(&request).unwrap();
    let Binding::Bound(bound, _) =
        here.bind(BindRequest { registration: A, sequence: 7 }, &message, flow(1), now)
    else {
        panic!("not bound")
    };
    there.apply(Change::Bound(bound));
    assert_eq!(bind(&mut there, &request, flow(66), now), "ignored");
    let old = Bound { sequence: 6, via: flow(5).into(), ..bound };
    there.apply(Change::Bound(old));
    assert_eq!(bind(&mut there, &datagram(B, 1, &key(B)), flow(2), now), "bound");
    assert_eq!(
        there.route(channel(1), flow(2).remote, now),
        Some(flow(1).into()),
        "older news changes nothing"
    );
}

#[test]
fn the_newest_binding_wins_be_it_a_stream_or_not() {
    let start = Instant::now();
    let mut table = table();
    let stream =
        |sequence, at| Change::Bound(Bound { registration: A, sequence, via: Via::Stream(StreamId(4)), at });
    bind(&mut table, &datagram(B, 1, &key(B)), flow(2), start);
    bind(&mut table, &datagram(A, 1, &key(A)), flow(1), start);
    table.apply(stream(2, start));
    assert_eq!(table.route(channel(1), flow(2).remote, start), Some(Via::Stream(StreamId(4))));
    assert_eq!(table.route(channel(1), StreamId(4), start), Some(flow(2).into()));
    assert_eq!(table.route(channel(1), StreamId(5), start), None, "another stream");
    assert_eq!(table.route(channel(1), flow(1).remote, start), None, "bound no more");
    assert_eq!(bind(&mut table, &datagram(A, 1, &key(A)), flow(1), start), "ignored");
    // The stream renews its binding under the same sequence.
    let later = start + LEASE / 2;
    bind(&mut table, &datagram(B, 2, &key(B)), flow(2), later);
    table.apply(stream(2, later));
    assert_eq!(table.route(channel(1), StreamId(4), start + LEASE), Some(flow(2).into()));
    assert_eq!(bind(&mut table, &datagram(A, 3, &key(A)), flow(1), later), "bound");
    table.apply(stream(2, later + LEASE / 4));
    assert_eq!(table.route(channel(1), flow(2).remote, later), Some(flow(1).into()));
}

#[test]
fn a_binding_lives_as_long_as_its_lease() {
    let start = Instant::now();
    let mut table = table();
    bind(&mut table, &datagram(A, 1, &key(A)), flow(1), start);
    bind(&mut table, &datagram(B, 1, &key(B)), flow(2), start);
    let almost = start + LEASE - Duration::from_millis(1);
    assert_eq!(table.route(channel(1), flow(1).remote, almost), Some(flow(2).into()));
    assert_eq!(table.route(channel(1), flow(1).remote, start + LEASE), None);
    bind(&mut table, &datagram(A, 2, &key(A)), flow(1), almost);
    assert_eq!(table.route(channel(1), flow(1).remote, start + LEASE), None, "the other end has lapsed");
    bind(&mut table, &datagram(B, 2, &key(B)), flow(2), start + LEASE);
    assert_eq!(table.route(channel(1), flow(1).remote, start + LEASE), Some(flow(2).into()));
    let lapsed = start + 2 * LEASE;
    assert_eq!(bind(&mut table, &datagram(A, 2, &key(A)), flow(1), lapsed), "ignored");
}

#[test]
fn a_channel_opened_later_knows_the_bindings() {
    let now = Instant::now();
    let mut table = table();
    bind(&mut table, &datagram(A, 1, &key(A)), flow(1), now);
    bind(&mut table, &datagram(C, 1, &key(C)), flow(3), now);
    table.apply(Change::Open { channel: channel(2), members: [C, A] });
    assert_eq!(table.route(channel(2), flow(1).remote, now), Some(flow(3).into()));
    table.apply(Change::Close(channel(2)));
    assert_eq!(table.route(channel(2), flow(1).remote, now), None);
    table.apply(Change::Remove(A));
    assert_eq!(table.channels(), 0, "a registration takes its channels with it");
}

#[test]
fn fresh_bind_requests_beyond_the_rate_are_ignored() {
    let now = Instant::now();
    let mut table = Table::new(LEASE, Rate::new(3, 1));
    table.apply(Change::Admit { registration: A, key: key(A), peer: PeerId::from_bytes([1; 32]) });
    for _ in 0..10 {
        assert_eq!(bind(&mut table, &datagram(A, 9, &key(B)), flow(1), now), "unauthenticated");
    }
    let outcomes: Vec<_> =
        (1..=5).map(|n| bind(&mut table, &datagram(A, n, &key(A)), flow(1), now)).collect();
    assert_eq!(outcomes, ["bound", "bound", "bound", "ignored", "ignored"]);
    assert_eq!(bind(&mut table, &datagram(A, 3, &key(A)), flow(1), now), "repeated");
    let later = now + Duration::from_secs(1);
    assert_eq!(bind(&mut table, &datagram(A, 6, &key(A)), flow(1), later), "bound");
}
