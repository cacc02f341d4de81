//! What IPv6 is like at a site, in the lab and in the model.

mod common;

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use common::{SILENCE, TestResult, receive, trial, udp};
use netsim::model::{HostId, Network, Protocol, What};
use netsim::{Host, Ipv6, Lab, RouterKind, SiteConfig, enter_user_namespace};

fn main() -> ExitCode {
    enter_user_namespace().expect("the lab needs root or user namespaces");
    let mut trials = Vec::new();
    for ipv6 in Ipv6::ALL {
        for kind in [RouterKind::EimApdf, RouterKind::CarrierApdm, RouterKind::Firewall] {
            let name = format!("ipv6_{ipv6}_behind_{kind}").replace('-', "_");
            trials.push(trial(name, move || is_as_named(ipv6, kind)));
        }
    }
    trials.push(trial("broken_ipv6_works_on_the_lan", broken_ipv6_works_on_the_lan));
    common::run(trials)
}

/// What there is to see of a family; `None` when the host has no address of it.
type Seen = Option<Reach>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reach {
    /// A server answers.
    out: bool,
    /// The server is heard at another port, without having been asked.
    unasked: bool,
}

fn expected(ipv6: Ipv6) -> [Seen; 2] {
    let filtered = Reach { out: true, unasked: false };
    let v6 = match ipv6 {
        Ipv6::Firewall | Ipv6::Only => Some(filtered),
        Ipv6::Open => Some(Reach { out: true, unasked: true }),
        Ipv6::Broken => Some(Reach { out: false, unasked: false }),
        _ => None,
    };
    [(ipv6 != Ipv6::Only).then_some(filtered), v6]
}

fn is_as_named(ipv6: Ipv6, kind: RouterKind) -> TestResult {
    let config = SiteConfig::new(kind).ipv6(ipv6);
    assert_eq!(in_the_lab(config.clone())?, expected(ipv6), "the lab");
    assert_eq!(in_the_model(&config), expected(ipv6), "the model");
    Ok(())
}

fn of_family(addresses: &[IpAddr], ipv4: bool) -> Option<IpAddr> {
    addresses.iter().copied().find(|address| address.is_ipv4() == ipv4)
}

fn in_the_lab(config: SiteConfig) -> Result<[Seen; 2], Box<dyn std::error::Error>> {
    let mut lab = Lab::new(1)?;
    let server = lab.add_server("server")?;
    let host = lab.add_site("a", config)?.host(0);
    let hears = |socket: &UdpSocket| {
        socket.set_read_timeout(Some(SILENCE)).expect("not zero");
        receive(socket).ok()
    };
    let family = |ipv4| {
        let inside = udp(&host, of_family(&host.addresses(), ipv4)?, 9);
        let theirs = of_family(&server.addresses(), ipv4).expect("servers have both");
        let [asked, other] = [9, 10].map(|port| udp(&server, theirs, port));
        inside.send_to(b"hello", asked.local_addr().ok()?).ok()?;
        let heard = hears(&asked);
        let reflexive = heard.as_ref().map_or_else(|| inside.local_addr().expect("bound"), |(_, from)| *from);
        asked.send_to(b"answer", reflexive).ok()?;
        let out = hears(&inside).is_some();
        other.send_to(b"unasked", reflexive).ok()?;
        Some(Reach { out: out && heard.is_some(), unasked: hears(&inside).is_some() })
    };
    Ok([family(true), family(false)])
}

fn in_the_model(config: &SiteConfig) -> [Seen; 2] {
    let mut network = Network::new(1, Instant::now());
    let server = network.add_server();
    let site = network.add_site(config);
    let host = network.host(site, 0);
    let mut family = |ipv4| {
        let inside = SocketAddr::new(of_family(network.addresses(host), ipv4)?, 9);
        let theirs = of_family(network.addresses(server), ipv4).expect("servers have both");
        let [asked, other] = [9, 10].map(|port| SocketAddr::new(theirs, port));
        for (machine, socket) in [(host, inside), (server, asked), (server, other)] {
            network.bind(machine, Protocol::Udp, socket).expect("free");
        }
        network.send(host, inside, asked, None, b"hello".to_vec());
        let heard = hears(&mut network, server);
        let reflexive = heard.unwrap_or(inside);
        network.send(server, asked, reflexive, None, b"answer".to_vec());
        let out = hears(&mut network, host).is_some();
        network.send(server, other, reflexive, None, b"unasked".to_vec());
        let unasked = hears(&mut network, host).is_some();
        Some(Reach { out: out && heard.is_some(), unasked })
    };
    [family(true), family(false)]
}

/// From where a datagram comes to a machine within a while.
fn hears(network: &mut Network, machine: HostId) -> Option<SocketAddr> {
    let until = network.now() + Duration::from_millis(100);
    while let Some(arrival) = network.poll(until) {
        if let (true, What::Packet(packet)) = (arrival.host == machine, arrival.what) {
            return Some(packet.source);
        }
    }
    None
}

fn broken_ipv6_works_on_the_lan() -> TestResult {
    let mut lab = Lab::new(1)?;
    let site = lab.add_site("a", SiteConfig::new(RouterKind::EimApdf).hosts(2).ipv6(Ipv6::Broken))?;
    let socket = |host: Host| udp(&host, host.ipv6().expect("it has addresses"), 9);
    let [one, two] = [0, 1].map(|index| socket(site.host(index)));
    one.send_to(b"hello", two.local_addr()?)?;
    assert_eq!(receive(&two)?.1, one.local_addr()?);
    Ok(())
}
