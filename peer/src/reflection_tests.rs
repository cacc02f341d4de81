//! The reflection client against answers made by hand.

use std::net::IpAddr;

use super::*;
use rendezvous_wire::candidate::PortAllocation;

const KEY: &str = "0123456789abcdefghijkl";

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn reflection(now: Instant) -> Reflection {
    let destinations = [(0, address("198.51.100.1:3478")), (0, address("198.51.100.1:3479"))];
    let observed = address("203.0.113.5:1000");
    Reflection::new(RegistrationId(7), KEY, (observed, 4000), &destinations, 0, 1, now).unwrap()
}

/// Answers what is due, each destination with its own mapped port.
fn answer(reflection: &mut Reflection, ports: [u16; 2], now: Instant) {
    answer_from(reflection, address("203.0.113.5:1").ip(), ports, now);
}

fn answer_from(reflection: &mut Reflection, ip: IpAddr, ports: [u16; 2], now: Instant) {
    while let Some(transmit) = reflection.poll_transmit(now) {
        let request = Received::parse(&transmit.datagram).unwrap();
        let bind = request.username().is_some();
        let port = ports[usize::from(transmit.destination.port() == 3479)];
        let key = Key::new(KEY).unwrap();
        let mapped = SocketAddr::new(ip, port);
        let response = stun::binding_success(request.transaction(), mapped, bind.then_some(&key)).unwrap();
        let response = Received::parse(&response).unwrap();
        assert!(reflection.handle_response(transmit.destination, &response, now));
    }
}

#[test]
fn equal_mappings_are_endpoint_independent_and_others_are_not() {
    let now = Instant::now();
    let mut same = reflection(now);
    assert_eq!(same.mapping(), Mapping::Unknown);
    answer(&mut same, [1000, 1000], now);
    assert_eq!(same.mapping(), Mapping::EndpointIndependent);
    assert!(same.is_bound() && same.is_settled());
    assert_eq!(same.mapped(), [(0, address("203.0.113.5:1000"))]);
    for (ports, allocation) in [
        ([1001, 1002], PortAllocation::Sequential),
        ([31_001, 9002], PortAllocation::Random),
        ([4000, 9002], PortAllocation::Preserving),
    ] {
        let mut other = reflection(now);
        answer(&mut other, ports, now);
        assert_eq!(other.mapping(), Mapping::AddressAndPortDependent(allocation));
    }
}

#[test]
fn what_flows_of_other_times_show_does_not_unsay_what_the_first_have_shown() {
    let start = Instant::now();
    for (first, expected) in [
        ([1000, 1000], Mapping::EndpointIndependent),
        ([1002, 1004], Mapping::AddressAndPortDependent(PortAllocation::Sequential)),
        ([4000, 9002], Mapping::AddressAndPortDependent(PortAllocation::Preserving)),
        ([31_001, 9002], Mapping::AddressAndPortDependent(PortAllocation::Random)),
    ] {
        let mut reflection = reflection(start);
        answer(&mut reflection, first, start);
        assert_eq!(reflection.mapping(), expected);
        // Bindings that do not last until the next keep-alive: each is another then.
        let mut ports = [2000, 2002];
        for now in (1..20).map(|round| start + round * SAFE) {
            answer(&mut reflection, ports, now);
            assert_eq!(reflection.mapping(), expected, "{ports:?}");
            ports = [ports[1] + 200, ports[0]];
        }
    }
}

#[test]
fn another_address_is_another_nat() {
    let start = Instant::now();
    let mut reflection = reflection(start);
    answer(&mut reflection, [1000, 1000], start);
    let elsewhere = address("203.0.113.77:1").ip();
    answer_from(&mut reflection, elsewhere, [31_001, 9002], start + SAFE);
    let random = Mapping::AddressAndPortDependent(PortAllocation::Random);
    assert_eq!(reflection.mapping(), random);
}

#[test]
fn bind_sequences_grow_and_requests_are_repeated_until_answered() {
    let mut now = Instant::now();
    let mut reflection = reflection(now);
    let mut last = 0;
    for _ in 0..20 {
        while let Some(transmit) = reflection.poll_transmit(now) {
            let request = Received::parse(&transmit.datagram).unwrap();
            if let Some(bind) = request.username().and_then(BindRequest::from_username) {
                assert!(bind.sequence > last);
                last = bind.sequence;
            }
        }
        let next = reflection.poll_timeout().unwrap();
        assert!(next > now && next - now <= Duration::from_secs(4));
        now = next;
    }
    answer(&mut reflection, [9, 9], now);
    assert!(reflection.poll_timeout().unwrap() - now > Duration::from_secs(13));
}

#[test]
fn a_short_keep_alive_renews_the_signalling_binding_too() {
    let start = Instant::now();
    let signalling = address("198.51.100.1:443");
    for (interval, renews) in [(4, true), (60, false)] {
        let interval = Duration::from_secs(interval);
        let mut reflection = reflection(start);
        answer(&mut reflection, [1000, 1000], start);
        reflection.set_keep_alive(interval, signalling, start);
        let mut now = start;
        let mut last = BTreeMap::from([3478, 3479, 443].map(|port| (port, start)));
        while now < start + Duration::from_secs(600) {
            now = reflection.poll_timeout().unwrap();
            while let Some(transmit) = reflection.poll_transmit(now) {
                let message = Received::parse(&transmit.datagram).unwrap();
                let before = last.insert(transmit.destination.port(), now).unwrap();
                // The first comes as the pause before was still another.
                assert!(now - before <= interval.max(SAFE), "{transmit:?} after {:?}", now - before);
                if transmit.destination == signalling {
                    assert_eq!(message.class(), Class::Indication);
                    continue;
                }
                let key = Key::new(KEY).unwrap();
                let key = message.username().is_some().then_some(&key);
                let response =
                    stun::binding_success(message.transaction(), address("203.0.113.5:1000"), key).unwrap();
                let response = Received::parse(&response).unwrap();
                assert!(reflection.handle_response(transmit.destination, &response, now));
                // Answered at once, it is silent for the whole interval, or a little less.
                assert!(reflection.poll_timeout().unwrap() - now <= interval);
            }
        }
        assert_eq!(last[&443] > start, renews);
    }
}

#[test]
fn a_new_binding_is_no_sign_of_a_dependent_mapping() {
    let mut now = Instant::now();
    let mut reflection = reflection(now);
    answer(&mut reflection, [1000, 1000], now);
    // The router was started anew, and gives another port, to everybody the same.
    now += SAFE;
    answer(&mut reflection, [2000, 2000], now);
    assert_eq!(reflection.mapping(), Mapping::EndpointIndependent);
    assert_eq!(reflection.mapped(), [(0, address("203.0.113.5:2000"))]);
}

#[test]
fn in_another_network_everything_is_asked_at_once_and_nothing_old_is_told() {
    let mut now = Instant::now();
    let mut reflection = reflection(now);
    answer(&mut reflection, [1000, 1000], now);
    now += Duration::from_secs(1);
    assert!(reflection.poll_timeout().unwrap() > now);
    reflection.handle_network_change(now);
    assert_eq!(reflection.poll_timeout(), Some(now));
    assert!(!reflection.is_bound() && reflection.mapped().is_empty());
    answer(&mut reflection, [3000, 3000], now);
    assert_eq!(reflection.mapping(), Mapping::EndpointIndependent);
}

#[test]
fn one_silent_destination_does_not_hold_up_the_rest_for_long() {
    let mut now = Instant::now();
    let mut reflection = reflection(now);
    let transmit = reflection.poll_transmit(now).unwrap();
    let request = Received::parse(&transmit.datagram).unwrap();
    let key = Key::new(KEY).unwrap();
    let answer =
        stun::binding_success(request.transaction(), address("203.0.113.5:1000"), Some(&key)).unwrap();
    assert!(reflection.handle_response(transmit.destination, &Received::parse(&answer).unwrap(), now));
    assert!(reflection.is_bound() && !reflection.is_settled());
    for _ in 0..2 {
        assert!(reflection.poll_transmit(now).is_some());
        now += RTO;
    }
    assert!(reflection.is_settled());
}

/// Registered over IPv6, at a server that has IPv4 as well.
fn of_both_families(now: Instant) -> Reflection {
    let destinations =
        ["[2001:db8::1]:3478", "[2001:db8::1]:3479", "198.51.100.1:3478", "198.51.100.1:3479"].map(address);
    let destinations = [0, 0, 1, 1].into_iter().zip(destinations).collect::<Vec<_>>();
    let observed = address("[2001:db8:5::5]:4006");
    Reflection::new(RegistrationId(7), KEY, (observed, 4000), &destinations, 0, 1, now).unwrap()
}

#[test]
fn the_other_family_is_measured_beside_that_of_the_relay() {
    let now = Instant::now();
    for (ports, mapping) in [
        ([1000, 1000], Mapping::EndpointIndependent),
        ([4000, 9002], Mapping::AddressAndPortDependent(PortAllocation::Preserving)),
    ] {
        let mut reflection = of_both_families(now);
        while let Some(transmit) = reflection.poll_transmit(now) {
            let request = Received::parse(&transmit.datagram).unwrap();
            let key = Key::new(KEY).unwrap();
            let key = request.username().is_some().then_some(&key);
            let mapped = if transmit.socket == 0 {
                address("[2001:db8:5::5]:4006")
            } else {
                SocketAddr::new(
                    [203, 0, 113, 5].into(),
                    ports[usize::from(transmit.destination.port() == 3479)],
                )
            };
            let response = stun::binding_success(request.transaction(), mapped, key).unwrap();
            let response = Received::parse(&response).unwrap();
            assert!(reflection.handle_response(transmit.destination, &response, now));
        }
        assert!(reflection.is_settled());
        assert_eq!(reflection.mapping(), mapping);
        let mapped = reflection.mapped();
        assert!(mapped.iter().any(|(_, mapped)| mapped.is_ipv4()), "{mapped:?}");
    }
}

#[test]
fn a_family_that_does_not_work_is_left_alone() {
    let start = Instant::now();
    let mut reflection = of_both_families(start);
    let (mut now, mut asked) = (start, 0);
    while now < start + Duration::from_secs(600) {
        while let Some(transmit) = reflection.poll_transmit(now) {
            if transmit.socket == 1 {
                asked += 1;
                continue;
            }
            let request = Received::parse(&transmit.datagram).unwrap();
            let key = Key::new(KEY).unwrap();
            let key = request.username().is_some().then_some(&key);
            let mapped = address("[2001:db8:5::5]:4006");
            let response = stun::binding_success(request.transaction(), mapped, key).unwrap();
            let response = Received::parse(&response).unwrap();
            assert!(reflection.handle_response(transmit.destination, &response, now));
        }
        now = reflection.poll_timeout().unwrap();
    }
    assert!(reflection.is_settled());
    // One round at each of two ports, then a keep-alive's pace: 40 in ten minutes.
    let most = 2 * (MAX_REQUESTS + 600 / SAFE.as_secs() as u32);
    assert!((2 * MAX_REQUESTS..=most).contains(&asked), "{asked}");
}

#[test]
fn a_relay_that_does_not_know_us_says_so() {
    let now = Instant::now();
    let mut reflection = reflection(now);
    let transmit = reflection.poll_transmit(now).unwrap();
    let transaction = Received::parse(&transmit.datagram).unwrap().transaction();
    assert!(!reflection.is_disowned());
    let answer = stun::binding_error(transaction, stun::error_code::UNAUTHENTICATED, &[], None).unwrap();
    assert!(reflection.handle_response(transmit.destination, &Received::parse(&answer).unwrap(), now));
    assert!(reflection.is_disowned() && !reflection.is_bound());
}

#[test]
fn a_forged_answer_binds_nothing() {
    let now = Instant::now();
    let mut reflection = reflection(now);
    let transmit = reflection.poll_transmit(now).unwrap();
    let transaction = Received::parse(&transmit.datagram).unwrap().transaction();
    let mapped = address("192.0.2.66:6");
    for key in [None, Some(Key::new("anotherpasswordanother").unwrap())] {
        let forged = stun::binding_success(transaction, mapped, key.as_ref()).unwrap();
        let forged = Received::parse(&forged).unwrap();
        assert!(!reflection.handle_response(transmit.destination, &forged, now));
    }
    let right = stun::binding_success(transaction, mapped, Some(&Key::new(KEY).unwrap())).unwrap();
    let right = Received::parse(&right).unwrap();
    assert!(!reflection.handle_response(address("192.0.2.1:3478"), &right, now), "another source");
    assert!(reflection.handle_response(transmit.destination, &right, now));
}
