//! Troubles that overlap on a line, lines that change, and reboots after which ports are others.

mod common;

use std::net::UdpSocket;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use common::{TestResult, is_silent, receive, trial, udp};
use netsim::{Direction, Impairment, Lab, LinkError, RouterKind, SiteConfig, Trouble, enter_user_namespace};

const MS: Duration = Duration::from_millis(1);

fn main() -> ExitCode {
    enter_user_namespace().expect("the lab needs root or user namespaces");
    common::run(vec![
        trial("troubles_overlap_and_end_one_by_one", troubles_overlap_and_end_one_by_one),
        trial("a_line_changes_while_it_is_used", a_line_changes_while_it_is_used),
        trial("a_line_without_impairment_cannot_change", a_line_without_impairment_cannot_change),
        trial("ports_are_others_after_such_a_reboot", ports_are_others_after_such_a_reboot),
    ])
}

fn passes(from: &UdpSocket, to: &UdpSocket, length: usize) -> bool {
    from.send_to(&vec![0; length], to.local_addr().expect("bound")).expect("sent");
    !is_silent(to)
}

fn troubles_overlap_and_end_one_by_one() -> TestResult {
    let mut lab = Lab::new(1)?;
    let server = lab.add_server("server")?;
    let [a, b, c] = ["a", "b", "c"]
        .map(|name| lab.add_site(name, SiteConfig::new(RouterKind::Public)).expect("there is room"));
    let outside = udp(&server, server.ipv4(), 9);
    let [at_a, at_b, at_c] = [&a, &b, &c].map(|site| udp(&site.host(0), site.host(0).ipv4(), 9));
    let cut = Trouble::CutFrom(b.clone(), Direction::Up);
    let narrow = Trouble::NarrowTo(c.clone(), 1280);
    // Whether a's packets reach b, b's a, long ones c, and short ones the server.
    for (troubles, expected) in [
        (vec![], [true, true, true, true]),
        (vec![cut.clone()], [false, true, true, true]),
        (vec![cut.clone(), narrow.clone()], [false, true, false, true]),
        (vec![narrow.clone()], [true, true, false, true]),
        (vec![Trouble::CutFrom(b.clone(), Direction::Down)], [true, false, true, true]),
        (vec![Trouble::NoUdp, cut], [false; 4]),
        (vec![Trouble::Cut(Direction::Down), narrow], [true, false, false, true]),
        (vec![], [true, true, true, true]),
    ] {
        a.set_troubles(&troubles)?;
        let seen = [
            passes(&at_a, &at_b, 100),
            passes(&at_b, &at_a, 100),
            passes(&at_a, &at_c, 1300),
            passes(&at_a, &outside, 100),
        ];
        assert_eq!(seen, expected, "{troubles:?}");
        assert!(passes(&at_a, &at_c, 1200) != troubles.iter().any(|one| matches!(one, Trouble::NoUdp)));
    }
    Ok(())
}

fn a_line_changes_while_it_is_used() -> TestResult {
    let mut lab = Lab::new(1)?;
    let server = lab.add_server("server")?;
    let site = lab.add_site("a", SiteConfig::new(RouterKind::Public).delay(5 * MS))?;
    let (inside, outside) = (udp(&site.host(0), site.host(0).ipv4(), 9), udp(&server, server.ipv4(), 9));
    let slow = Impairment::none().delay(150 * MS);
    for (up, least) in [(slow, 150 * MS), (Impairment::none().delay(5 * MS), 5 * MS)] {
        site.impair(up, Impairment::none())?;
        let start = Instant::now();
        inside.send_to(b"?", outside.local_addr()?)?;
        receive(&outside)?;
        assert!((least..least + 120 * MS).contains(&start.elapsed()), "{:?}", start.elapsed());
    }
    site.impair(Impairment::none(), Impairment::none().loss(1.0))?;
    assert!(passes(&inside, &outside, 10) && !passes(&outside, &inside, 10));
    Ok(())
}

fn a_line_without_impairment_cannot_change() -> TestResult {
    let mut lab = Lab::new(1)?;
    let site = lab.add_site("a", SiteConfig::new(RouterKind::Public))?;
    let refused = site.impair(Impairment::none(), Impairment::none());
    assert!(matches!(refused, Err(LinkError::Unimpaired)), "{refused:?}");
    Ok(())
}

fn ports_are_others_after_such_a_reboot() -> TestResult {
    use RouterKind as K;
    for kind in [K::EimApdf, K::EimEif, K::EimAdf, K::CarrierEim, K::Apdm] {
        let mut lab = Lab::new(1)?;
        let server = lab.add_server("server")?;
        let site = lab.add_site("a", SiteConfig::new(kind))?;
        let inside = udp(&site.host(0), site.host(0).ipv4(), 40_000);
        let outside = [7, 9].map(|port| udp(&server, server.ipv4(), port));
        let mut ports = Vec::new();
        for round in 0..3 {
            let mut mapped = [0; 2];
            for (socket, port) in outside.iter().zip(&mut mapped) {
                inside.send_to(b"?", socket.local_addr()?)?;
                let (_, from) = receive(socket)?;
                socket.send_to(b"!", from)?;
                receive(&inside)?;
                *port = from.port();
            }
            assert_eq!(mapped[0] == mapped[1], kind != K::Apdm, "{kind}, round {round}: {mapped:?}");
            assert!(!ports.contains(&mapped[0]), "{kind}, round {round}: {} again", mapped[0]);
            ports.push(mapped[0]);
            site.reboot_with_other_ports()?;
        }
    }
    Ok(())
}
