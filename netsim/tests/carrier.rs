//! Customers of one carrier, in the lab and in the model: what they see of each other.

mod common;

use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use common::{TestResult, is_silent, receive, trial, udp};
use netsim::model::{HostId, Network, Protocol, What};
use netsim::{BuildError, Lab, RouterKind, SiteConfig, enter_user_namespace};

fn main() -> ExitCode {
    enter_user_namespace().expect("the lab needs root or user namespaces");
    let mut trials = Vec::new();
    for (kind, hairpin) in [
        (RouterKind::CarrierEim, false),
        (RouterKind::CarrierEim, true),
        (RouterKind::CarrierApdm, false),
        (RouterKind::CarrierApdm, true),
    ] {
        let name = if hairpin { "hairpins" } else { "does_not_hairpin" };
        let name = format!("customers_of_a_{kind}_that_{name}").replace('-', "_");
        trials.push(trial(name, move || customers(kind, hairpin)));
    }
    trials.push(trial("customers_share_the_line", customers_share_the_line));
    trials.push(trial("customers_meet_over_ipv6", customers_meet_over_ipv6));
    trials.push(trial("who_has_no_carrier_has_no_customers", who_has_no_carrier_has_no_customers));
    common::run(trials)
}

/// The ports of the two customers.
const PORTS: [u16; 2] = [40_000, 40_001];

/// What there is to see.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    /// Where a server sees the two.
    addresses: [IpAddr; 2],
    /// Where the second hears the first from, once both have sent to the other's reflexive endpoint as the server saw it.
    at_reflexive: Option<IpAddr>,
    /// The same with the addresses between home and carrier.
    at_carrier_side: Option<SocketAddr>,
}

fn configs(kind: RouterKind, hairpin: bool) -> [SiteConfig; 2] {
    // Homes that differ, so that a packet which comes out at the wrong one is lost.
    [
        SiteConfig::new(kind).hairpin(hairpin),
        SiteConfig::new(RouterKind::EimApdf).lan([192, 168, 2, 0].into()),
    ]
}

fn carrier_side() -> [SocketAddr; 2] {
    [([100, 64, 0, 2], PORTS[0]).into(), ([100, 64, 0, 3], PORTS[1]).into()]
}

fn in_the_lab(kind: RouterKind, hairpin: bool) -> Result<Seen, Box<dyn std::error::Error>> {
    let mut lab = Lab::new(1)?;
    let server = lab.add_server("server")?;
    let [first, second] = configs(kind, hairpin);
    let first = lab.add_site("a", first)?;
    let second = lab.add_site_behind("b", second, &first)?;
    assert_eq!(second.wan_ipv4(), first.wan_ipv4());
    let reflector = udp(&server, server.ipv4(), 3478);
    let mut sockets = Vec::new();
    let mut reflexive = Vec::new();
    for (site, port) in [&first, &second].into_iter().zip(PORTS) {
        let host = site.host(0);
        let socket = udp(&host, host.ipv4(), port);
        socket.send_to(b"who am I?", reflector.local_addr()?)?;
        reflexive.push(receive(&reflector)?.1);
        assert_eq!(host.reflexive_ipv4(), reflexive[reflexive.len() - 1].ip());
        sockets.push(socket);
    }
    let meet = |at: [SocketAddr; 2]| {
        sockets[0].send_to(b"opens", at[1])?;
        sockets[1].send_to(b"opens", at[0])?;
        // Whether it arrives or not, the other's router has let it out by then.
        is_silent(&sockets[0]);
        sockets[0].send_to(b"hello", at[1])?;
        let mut heard = None;
        sockets[1].set_read_timeout(Some(common::SILENCE))?;
        while let Ok((what, from)) = receive(&sockets[1]) {
            heard = if what == b"hello" { Some(from) } else { heard };
        }
        Ok::<_, std::io::Error>(heard)
    };
    Ok(Seen {
        addresses: [reflexive[0].ip(), reflexive[1].ip()],
        at_reflexive: meet([reflexive[0], reflexive[1]])?.map(|from| from.ip()),
        at_carrier_side: meet(carrier_side())?,
    })
}

/// Everything that comes to a socket within a while.
fn arrivals(network: &mut Network, host: HostId) -> Vec<(Vec<u8>, SocketAddr)> {
    let until = network.now() + Duration::from_millis(100);
    let mut heard = Vec::new();
    while let Some(arrival) = network.poll(until) {
        if let (true, What::Packet(packet)) = (arrival.host == host, arrival.what) {
            heard.push((packet.payload, packet.source));
        }
    }
    heard
}

fn in_the_model(kind: RouterKind, hairpin: bool) -> Seen {
    let mut network = Network::new(1, Instant::now());
    let server = network.add_server();
    let [first, second] = configs(kind, hairpin);
    let first = network.add_site(&first);
    let second = network.add_site_behind(first, &second);
    let reflector = SocketAddr::new(network.addresses(server)[0], 3478);
    network.bind(server, Protocol::Udp, reflector).unwrap();
    let hosts = [network.host(first, 0), network.host(second, 0)];
    let sockets = [0, 1].map(|side| {
        let socket = SocketAddr::new(network.addresses(hosts[side])[0], PORTS[side]);
        network.bind(hosts[side], Protocol::Udp, socket).unwrap()
    });
    let reflexive = [0, 1].map(|side| {
        network.send(hosts[side], sockets[side], reflector, None, b"who am I?".to_vec());
        arrivals(&mut network, server)[0].1
    });
    let mut meet = |at: [SocketAddr; 2]| {
        network.send(hosts[0], sockets[0], at[1], None, b"opens".to_vec());
        arrivals(&mut network, hosts[1]);
        network.send(hosts[1], sockets[1], at[0], None, b"opens".to_vec());
        arrivals(&mut network, hosts[0]);
        network.send(hosts[0], sockets[0], at[1], None, b"hello".to_vec());
        let heard = arrivals(&mut network, hosts[1]);
        heard.iter().find(|(what, _)| what == b"hello").map(|(_, from)| *from)
    };
    Seen {
        at_reflexive: meet(reflexive).map(|from| from.ip()),
        at_carrier_side: meet(carrier_side()),
        addresses: reflexive.map(|endpoint| endpoint.ip()),
    }
}

fn customers(kind: RouterKind, hairpin: bool) -> TestResult {
    let wan = IpAddr::from([198, 18, 1, 2]);
    let expected = Seen {
        addresses: [wan, wan],
        // With address-and-port-dependent mapping neither comes from where the server saw it.
        at_reflexive: (hairpin && kind == RouterKind::CarrierEim).then_some(wan),
        at_carrier_side: Some(carrier_side()[0]),
    };
    assert_eq!(in_the_lab(kind, hairpin)?, expected, "the lab");
    assert_eq!(in_the_model(kind, hairpin), expected, "the model");
    Ok(())
}

/// The delay of the line is the carrier's, whatever the second customer's configuration says.
fn customers_share_the_line() -> TestResult {
    const DELAY: Duration = Duration::from_millis(20);
    let mut lab = Lab::new(1)?;
    let server = lab.add_server("server")?;
    let first = lab.add_site("a", SiteConfig::new(RouterKind::CarrierEim).delay(DELAY))?;
    let second = lab.add_site_behind("b", SiteConfig::new(RouterKind::EimApdf), &first)?.host(0);
    let (inside, outside) = (udp(&second, second.ipv4(), 9), udp(&server, server.ipv4(), 9));
    let start = Instant::now();
    inside.send_to(b"there", outside.local_addr()?)?;
    outside.send_to(b"and back", receive(&outside)?.1)?;
    receive(&inside)?;
    assert!(start.elapsed() >= 2 * DELAY, "only {:?}", start.elapsed());
    first.cut(netsim::Direction::Both)?;
    inside.send_to(b"again", outside.local_addr()?)?;
    assert!(is_silent(&outside), "past a line that was cut");
    Ok(())
}

fn customers_meet_over_ipv6() -> TestResult {
    let mut lab = Lab::new(1)?;
    let server = lab.add_server("server")?;
    let first = lab.add_site("a", SiteConfig::new(RouterKind::CarrierEim).ipv6(true))?;
    let second = lab.add_site_behind("b", SiteConfig::new(RouterKind::EimApdf).ipv6(true), &first)?;
    let hosts = [first.host(0), second.host(0), server];
    let [one, two, outside] = hosts.map(|host| udp(&host, host.ipv6().expect("all have IPv6"), 9));
    for [from, to] in [[&one, &outside], [&two, &outside], [&outside, &two]] {
        from.send_to(b"hello", to.local_addr()?)?;
        assert_eq!(receive(to)?.1, from.local_addr()?);
    }
    one.send_to(b"opens", two.local_addr()?)?;
    assert!(is_silent(&two), "past a firewall");
    two.send_to(b"hello", one.local_addr()?)?;
    assert_eq!(receive(&one)?.1, two.local_addr()?);
    Ok(())
}

fn who_has_no_carrier_has_no_customers() -> TestResult {
    let mut lab = Lab::new(1)?;
    let home = lab.add_site("home", SiteConfig::new(RouterKind::EimApdf))?;
    let carrier = lab.add_site("carrier", SiteConfig::new(RouterKind::CarrierEim))?;
    let refused = |result| matches!(result, Err(BuildError::Unsupported(name)) if name == "customer");
    let config = SiteConfig::new(RouterKind::EimApdf);
    assert!(refused(lab.add_site_behind("customer", config.clone(), &home)));
    assert!(refused(lab.add_site_behind("customer", config.clone().ipv6(true), &carrier)));
    assert!(refused(lab.add_site_behind("customer", SiteConfig::new(RouterKind::Firewall), &carrier)));
    lab.add_site_behind("customer", config, &carrier)?;
    Ok(())
}
