use super::*;
use crate::tests::origin;

fn target_address() -> SocketAddr {
    "203.0.113.7:4000".parse().unwrap()
}

/// Runs to the end; every action with its time.
fn run(part: Part, seed: u64) -> Vec<(Duration, Action)> {
    let start = origin();
    let mut birthday = Birthday::new(part, target_address(), seed, start);
    let mut actions = Vec::new();
    while let Some(now) = birthday.poll_timeout() {
        while let Some(action) = birthday.poll(now) {
            actions.push((now - start, action));
        }
    }
    actions
}

#[test]
fn only_one_hard_side_with_one_easy_side_probes() {
    use Mapping::{EndpointIndependent as I, Unknown as U};
    let [d, s, p] = [PortAllocation::Random, PortAllocation::Sequential, PortAllocation::Preserving]
        .map(Mapping::AddressAndPortDependent);
    assert_eq!(Part::of(d, I), Some(Part::Hard));
    assert_eq!(Part::of(I, d), Some(Part::Easy));
    for (local, remote) in [(d, d), (I, I), (U, d), (d, U), (U, U), (I, U), (I, s), (p, I), (s, d)] {
        assert_eq!(Part::of(local, remote), None);
    }
}

#[test]
fn the_easy_side_keeps_its_budget_and_never_probes_a_port_twice() {
    let actions = run(Part::Easy, 1);
    assert_eq!(actions.len(), PROBES * ATTEMPTS as usize);
    for attempt in actions.chunks(PROBES) {
        let ports: BTreeSet<u16> = attempt
            .iter()
            .map(|(_, action)| match action {
                Action::Probe(address) => address.port(),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(ports.len(), PROBES);
        assert!(ports.iter().all(|port| *port >= FIRST_PORT));
        let length = attempt[PROBES - 1].0 - attempt[0].0;
        assert!(length >= PROBE_INTERVAL * (PROBES as u32 - 1) && length < ATTEMPT, "{length:?}");
    }
    // Never more than one attempt's entries in any 30 s.
    for (index, (time, _)) in actions.iter().enumerate() {
        let recent = actions[..=index].iter().filter(|(other, _)| *time - *other < Duration::from_secs(30));
        assert!(recent.count() <= PROBES);
    }
}

#[test]
fn late_wake_ups_cost_few_probes_and_make_no_flood() {
    let start = origin();
    let mut birthday = Birthday::new(Part::Easy, target_address(), 1, start);
    let mut now = start + START;
    let mut by_turn = 0;
    while now < start + START + TURN {
        let burst = std::iter::from_fn(|| birthday.poll(now)).count();
        assert!(burst <= 11, "{burst}");
        by_turn += burst;
        // A machine that is busy with something else.
        now += Duration::from_millis(if by_turn.is_multiple_of(3) { 45 } else { 3 });
    }
    assert_eq!(by_turn, PROBES);
    now += Duration::from_mins(1);
    assert!(std::iter::from_fn(|| birthday.poll(now)).count() <= 11);
}

#[test]
fn the_hard_side_knocks_near_from_every_socket_before_any_knocks_far() {
    let actions = run(Part::Hard, 1);
    let attempts: Vec<_> = actions.split(|(_, action)| *action == Action::Close).collect();
    assert_eq!(attempts.len(), ATTEMPTS as usize + 1, "all are closed at the end, and none before");
    let mut first = attempts[0];
    for wave in &WAVES {
        let knocks = first.split_off(..wave.sockets).expect("a whole wave");
        for (index, (time, action)) in knocks.iter().enumerate() {
            assert_eq!(*action, Action::Knock(index, target_address(), wave.reach));
            let begin = START + wave.at;
            assert!(*time >= begin && *time < begin + Duration::from_millis(600));
        }
    }
    assert_eq!(first, []);
}

#[test]
fn far_knocks_come_when_the_probes_are_through() {
    let last_probe = run(Part::Easy, 1)[PROBES - 1].0;
    let is_far = |(_, action): &&(Duration, Action)| matches!(action, Action::Knock(.., Reach::Far));
    let knocks = run(Part::Hard, 1);
    let first_far = knocks.iter().find(is_far).expect("a far knock").0;
    assert!(first_far >= last_probe + Duration::from_millis(500), "{first_far:?} {last_probe:?}");
}

#[test]
fn an_accepting_router_of_the_easy_side_remembers_few_enough() {
    // Every probe, and every socket's far knocks, which come from one port each; a registration, checks and the relay take a dozen.
    const { assert!(PROBES + FAR_SOCKETS + 12 < 1024) };
}

/// The actions of the first attempt.
fn first(part: Part, seed: u64) -> Vec<(Duration, Action)> {
    let start = origin();
    let mut birthday = Birthday::new(part, target_address(), seed, start);
    let mut actions = Vec::new();
    while let Some(now) = birthday.poll_timeout().filter(|now| *now < start + START + ATTEMPT) {
        actions.extend(std::iter::from_fn(|| birthday.poll(now)).map(|action| (now - start, action)));
    }
    actions
}

/// The share of seeds in which the two meet. The hard side's NAT gives random ports when the sockets knock near, the easy side begins so much earlier; an
/// accepting one gives none that was probed before.
fn share_met(early: Duration, accepts: bool) -> f64 {
    const SEEDS: u64 = 400;
    let knocks = first(Part::Hard, 1);
    let met = |seed: &u64| {
        let mut random = StdRng::seed_from_u64(seed + 1_000_000);
        let mut probes = first(Part::Easy, *seed).into_iter().peekable();
        let (mut mapped, mut probed) = (BTreeSet::new(), BTreeSet::new());
        for (at, _) in &knocks[..SOCKETS] {
            while let Some((_, Action::Probe(to))) = probes.next_if(|(probe, _)| *probe < *at + early) {
                if mapped.contains(&to.port()) {
                    return true;
                }
                probed.insert(to.port());
            }
            let mut ports = std::iter::repeat_with(|| random.random_range(FIRST_PORT..=u16::MAX));
            mapped.extend(ports.find(|port| !(accepts && probed.contains(port))));
        }
        probes.any(|(_, action)| matches!(action, Action::Probe(to) if mapped.contains(&to.port())))
    };
    (0..SEEDS).filter(met).count() as f64 / SEEDS as f64
}

#[test]
fn the_two_meet_as_often_as_the_formula_says_whatever_the_routers_remember() {
    for (early, accepts) in [(0, false), (0, true), (300, false), (300, true)] {
        let early = Duration::from_millis(early);
        // Probes that come before the sockets, on average half of those of the half second in which these open, are for nothing.
        let lost = (early + OPEN_INTERVAL * SOCKETS as u32 / 2).div_duration_f64(PROBE_INTERVAL);
        let formula = 1.0 - (1.0 - SOCKETS as f64 / 64_512.0).powf(PROBES as f64 - lost);
        assert!(formula > 0.99, "{formula}");
        let share = share_met(early, accepts);
        // Four standard deviations.
        let slack = 4.0 * (formula * (1.0 - formula) / 400.0).sqrt();
        assert!((share - formula).abs() <= slack, "{share} of {formula} with {early:?} {accepts}");
    }
}

#[test]
fn a_host_so_deep_inside_that_near_knocks_make_no_mapping_finds_a_door() {
    let met = (0..400).filter(|seed| {
        let mut random = StdRng::seed_from_u64(seed + 2_000_000);
        let doors: BTreeSet<u16> = first(Part::Easy, *seed)
            .iter()
            .filter_map(|(_, action)| match action {
                Action::Probe(to) => Some(to.port()),
                _ => None,
            })
            .collect();
        (0..FAR_SOCKETS).any(|_| doors.contains(&random.random_range(FIRST_PORT..=u16::MAX)))
    });
    // 94.7 %.
    let met = met.count();
    assert!((361..=395).contains(&met), "{met} of 400");
}

#[test]
fn stopping_ends_it_and_closes_what_is_open() {
    let start = origin();
    let mut birthday = Birthday::new(Part::Hard, target_address(), 1, start);
    assert_eq!(birthday.stop(false, start), None);
    let mut birthday = Birthday::new(Part::Hard, target_address(), 1, start);
    assert!(birthday.poll(start + START).is_some());
    assert_eq!(birthday.stop(true, start + START), Some(Action::Close));
    assert_eq!(birthday.poll_timeout(), None);
}

#[test]
fn the_target_is_a_mapped_address_before_a_host_one_and_never_a_private_one() {
    use rendezvous_wire::{Candidate, CandidateKind};
    let candidate = |kind, text: &str| Candidate::new(kind, text.parse().unwrap(), 1);
    let host = candidate(CandidateKind::Host, "192.168.1.2:7");
    let public = candidate(CandidateKind::Host, "198.51.100.2:7");
    let mapped = candidate(CandidateKind::ServerReflexive, "198.51.100.3:7");
    assert_eq!(target(&[host, public, mapped]), Some(mapped.address));
    assert_eq!(target(&[host, public]), Some(public.address));
    assert_eq!(target(&[host]), None);
}
