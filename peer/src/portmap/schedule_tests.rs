use super::*;

use Protocol::{NatPmp, Pcp, Upnp};

const PORT: u16 = 5000;

fn external() -> SocketAddrV4 {
    "8.7.6.5:5000".parse().unwrap()
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Jumps to the next wake-up and takes what is to be done then.
fn next(schedule: &mut Schedule, now: &mut Instant) -> Action {
    if let Some(action) = schedule.poll_action(*now) {
        return action;
    }
    *now = schedule.poll_timeout().expect("something to wait for").max(*now);
    schedule.poll_action(*now).expect("something to do at the time it named")
}

fn asks(protocol: Protocol) -> Action {
    Action::Map { protocol, external_port: PORT, renews: false }
}

fn renews(protocol: Protocol) -> Action {
    Action::Map { protocol, external_port: PORT, renews: true }
}

/// With a mapping by `protocol` that lives for ten minutes.
fn held(protocol: Protocol, now: &mut Instant) -> Schedule {
    let mut schedule = Schedule::new(PORT, 1, *now);
    while next(&mut schedule, now) != asks(protocol) {
        schedule.failed(Failure::Silence, *now);
    }
    schedule.granted(Granted { external: external(), lifetime: LEASE }, *now);
    schedule
}

#[test]
fn protocols_are_tried_in_their_order_at_once() {
    let start = Instant::now();
    let mut now = start;
    let mut schedule = Schedule::new(PORT, 1, now);
    for protocol in [Pcp, NatPmp, Upnp] {
        assert_eq!(next(&mut schedule, &mut now), asks(protocol));
        assert_eq!(schedule.poll_action(now), None, "one at a time");
        assert_eq!(schedule.poll_timeout(), None);
        schedule.failed(Failure::Refusal, now);
    }
    assert_eq!((schedule.poll_action(now), now), (None, start));
}

#[test]
fn rounds_without_success_become_rarer_and_never_end() {
    let mut now = Instant::now();
    let mut schedule = Schedule::new(PORT, 1, now);
    let mut pauses = Vec::new();
    for _ in 0..10 {
        for _ in 0..3 {
            next(&mut schedule, &mut now);
            schedule.failed(Failure::Silence, now);
        }
        pauses.push(schedule.poll_timeout().unwrap() - now);
    }
    assert_eq!(pauses[..3], [seconds(30), seconds(60), seconds(120)]);
    assert_eq!(pauses[9], LONGEST_BACK_OFF);
    // A success forgets all that.
    assert_eq!(next(&mut schedule, &mut now), asks(Pcp));
    schedule.granted(Granted { external: external(), lifetime: LEASE }, now);
    next(&mut schedule, &mut now);
    schedule.failed(Failure::Refusal, now);
    for _ in 0..3 {
        next(&mut schedule, &mut now);
        schedule.failed(Failure::Silence, now);
    }
    assert_eq!(schedule.poll_timeout().unwrap() - now, BACK_OFF);
}

#[test]
fn a_mapping_is_renewed_by_the_protocol_that_made_it_after_half_its_life() {
    for protocol in [Pcp, NatPmp, Upnp] {
        let mut now = Instant::now();
        let mut schedule = held(protocol, &mut now);
        for _ in 0..20 {
            let granted = now;
            assert_eq!(schedule.mapped(), Some(Mapped { protocol, external: external() }));
            assert_eq!(next(&mut schedule, &mut now), renews(protocol));
            let pause = (now - granted).as_secs();
            assert!((300..=375).contains(&pause), "{pause} s");
            schedule.granted(Granted { external: external(), lifetime: LEASE }, now);
        }
    }
}

#[test]
fn a_silent_gateway_is_asked_until_the_lease_ends_and_then_all_begins_anew() {
    let mut now = Instant::now();
    let mut schedule = held(NatPmp, &mut now);
    let expires = now + LEASE;
    let mut tries = 0;
    loop {
        let before = now;
        let action = next(&mut schedule, &mut now);
        if action == asks(Pcp) {
            break;
        }
        assert_eq!(action, renews(NatPmp));
        assert!(now < expires && schedule.mapped().is_some(), "the mapping holds as long as its lease");
        assert!(now - before >= SHORTEST_PAUSE);
        tries += 1;
        schedule.failed(Failure::Silence, now);
    }
    assert!((5..12).contains(&tries), "{tries} tries");
    assert_eq!((now, schedule.mapped()), (expires, None));
}

#[test]
fn a_refused_renewal_ends_the_mapping_at_once() {
    let mut now = Instant::now();
    let mut schedule = held(Upnp, &mut now);
    assert_eq!(next(&mut schedule, &mut now), renews(Upnp));
    schedule.failed(Failure::Refusal, now);
    assert_eq!(schedule.mapped(), None);
    assert_eq!(schedule.poll_action(now), Some(asks(Pcp)));
}

#[test]
fn another_address_or_port_after_a_renewal_is_taken_up() {
    let mut now = Instant::now();
    let mut schedule = held(Pcp, &mut now);
    next(&mut schedule, &mut now);
    let other: SocketAddrV4 = "9.8.7.6:40000".parse().unwrap();
    schedule.granted(Granted { external: other, lifetime: LEASE }, now);
    assert_eq!(schedule.mapped(), Some(Mapped { protocol: Pcp, external: other }));
    let renewal = Action::Map { protocol: Pcp, external_port: 40_000, renews: true };
    assert_eq!(next(&mut schedule, &mut now), renewal);
}

#[test]
fn a_mapping_behind_another_nat_or_without_a_lifetime_is_given_back() {
    let good = external().to_string();
    let cases = ["192.168.0.2:5000", "100.64.0.2:5000", "0.0.0.0:5000", "8.7.6.5:0", &good];
    for (external, lifetime) in cases.into_iter().zip([600, 600, 600, 600, 0]) {
        let mut now = Instant::now();
        let mut schedule = Schedule::new(PORT, 1, now);
        next(&mut schedule, &mut now);
        let external: SocketAddrV4 = external.parse().unwrap();
        schedule.granted(Granted { external, lifetime: seconds(lifetime) }, now);
        assert_eq!(schedule.mapped(), None, "{external}");
        let remove = Action::Remove { protocol: Pcp, external_port: external.port() };
        assert_eq!(schedule.poll_action(now), Some(remove));
        schedule.removed(now);
        assert_eq!(schedule.is_behind_another_nat(), lifetime > 0);
        assert_eq!(schedule.poll_timeout(), Some(now + BACK_OFF));
    }
}

#[test]
fn absurd_lifetimes_neither_flood_the_gateway_nor_overflow() {
    for (lifetime, least, most) in [(1, 4, 5), (u64::from(u32::MAX), 43_200, 54_000)] {
        let mut now = Instant::now();
        let mut schedule = Schedule::new(PORT, 1, now);
        next(&mut schedule, &mut now);
        schedule.granted(Granted { external: external(), lifetime: seconds(lifetime) }, now);
        let pause = (schedule.poll_timeout().unwrap() - now).as_secs();
        assert!((least..=most).contains(&pause), "{lifetime} s: {pause} s");
    }
}

#[test]
fn closing_gives_back_what_is_or_may_be_ours_and_asks_for_nothing_more() {
    let mut now = Instant::now();
    let mut schedule = held(NatPmp, &mut now);
    assert_eq!(schedule.close(), Some(Action::Remove { protocol: NatPmp, external_port: PORT }));
    schedule.granted(Granted { external: external(), lifetime: LEASE }, now);
    assert_eq!((schedule.mapped(), schedule.poll_timeout(), schedule.close()), (None, None, None));

    let mut schedule = Schedule::new(PORT, 1, now);
    assert_eq!(schedule.close(), None);
    let mut schedule = Schedule::new(PORT, 1, now);
    next(&mut schedule, &mut now);
    assert_eq!(schedule.close(), Some(Action::Remove { protocol: Pcp, external_port: PORT }));
}

#[test]
fn answers_that_nobody_waits_for_change_nothing() {
    let now = Instant::now();
    let mut schedule = Schedule::new(PORT, 1, now);
    schedule.granted(Granted { external: external(), lifetime: LEASE }, now);
    schedule.failed(Failure::Refusal, now);
    schedule.removed(now);
    assert_eq!((schedule.mapped(), schedule.poll_timeout()), (None, Some(now)));
}
