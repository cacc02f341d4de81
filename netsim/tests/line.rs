//! Emulated lines delay, lose and narrow as configured, and carry what real lines carry.

mod common;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use common::{PATIENCE, TestResult, receive, trial, udp};
use netsim::{Host, Impairment, Lab, RouterKind, Site, SiteConfig, enter_user_namespace};
use nix::sys::socket::{setsockopt, sockopt};

const MS: Duration = Duration::from_millis(1);

fn main() -> ExitCode {
    enter_user_namespace().expect("the lab needs root or user namespaces");
    common::run(vec![
        trial("a_round_trip_takes_the_delay_twice", a_round_trip_takes_the_delay_twice),
        trial("each_direction_has_its_own_delay", each_direction_has_its_own_delay),
        trial("loss_is_as_configured_and_follows_the_seed", loss_is_as_configured_and_follows_the_seed),
        trial("the_rate_is_as_configured", the_rate_is_as_configured),
        trial("datagrams_sent_in_one_call_cross_one_by_one", datagrams_sent_in_one_call_cross_one_by_one),
        trial("a_stream_crosses_unharmed", a_stream_crosses_unharmed),
        trial("ipv6_crosses_a_line", ipv6_crosses_a_line),
    ])
}

fn lab(config: SiteConfig, seed: u64) -> Result<(Lab, Host, Site), netsim::BuildError> {
    let mut lab = Lab::new(seed)?;
    let server = lab.add_server("server")?;
    let site = lab.add_site("a", config)?;
    Ok((lab, server, site))
}

/// The shortest of a few round trips: what the line adds, without what a busy machine adds.
fn round_trip(inside: &UdpSocket, outside: &UdpSocket) -> std::io::Result<Duration> {
    let mut shortest = PATIENCE;
    for _ in 0..10 {
        let start = Instant::now();
        inside.send_to(b"there", outside.local_addr()?)?;
        let (_, from) = receive(outside)?;
        outside.send_to(b"back", from)?;
        receive(inside)?;
        shortest = shortest.min(start.elapsed());
    }
    Ok(shortest)
}

fn a_round_trip_takes_the_delay_twice() -> TestResult {
    let (_lab, server, site) = lab(SiteConfig::new(RouterKind::EimApdf).delay(20 * MS), 1)?;
    let (inside, outside) = (udp(&site.host(0), site.host(0).ipv4(), 0), udp(&server, server.ipv4(), 7));
    let trip = round_trip(&inside, &outside)?;
    assert!((40 * MS..60 * MS).contains(&trip), "{trip:?}");
    Ok(())
}

fn each_direction_has_its_own_delay() -> TestResult {
    let config = SiteConfig::new(RouterKind::Public).up(Impairment::none().delay(60 * MS));
    let (_lab, server, site) = lab(config, 1)?;
    let (inside, outside) = (udp(&site.host(0), site.host(0).ipv4(), 0), udp(&server, server.ipv4(), 7));
    let trip = round_trip(&inside, &outside)?;
    assert!((60 * MS..120 * MS).contains(&trip), "{trip:?}");
    Ok(())
}

fn loss_is_as_configured_and_follows_the_seed() -> TestResult {
    const SENT: u32 = 2_000;
    let arrived = |seed| -> Result<BTreeSet<u32>, Box<dyn std::error::Error>> {
        let config = SiteConfig::new(RouterKind::Public).up(Impairment::none().loss(0.3));
        let (_lab, server, site) = lab(config, seed)?;
        let (inside, outside) = (udp(&site.host(0), site.host(0).ipv4(), 0), udp(&server, server.ipv4(), 7));
        outside.set_nonblocking(true)?;
        let mut arrived = BTreeSet::new();
        for number in 0..SENT {
            inside.send_to(&number.to_be_bytes(), outside.local_addr()?)?;
            // The line says what it lost, so there is no need to guess how long to wait.
            while arrived.len() as u64 + site.link_losses() <= u64::from(number) {
                match receive(&outside) {
                    Ok((bytes, _)) => drop(arrived.insert(u32::from_be_bytes(bytes.as_slice().try_into()?))),
                    Err(_) => thread::yield_now(),
                }
            }
        }
        Ok(arrived)
    };
    let first = arrived(1)?;
    assert!((1_300..1_500).contains(&first.len()), "{} of {SENT}", first.len());
    assert_eq!(first, arrived(1)?, "the same seed");
    assert_ne!(first, arrived(2)?, "another seed");
    Ok(())
}

fn the_rate_is_as_configured() -> TestResult {
    // 100 frames of 1,442 bytes at 4 Mbit/s take 288 ms.
    let config = SiteConfig::new(RouterKind::Public).up(Impairment::none().rate(4_000_000));
    let (_lab, server, site) = lab(config, 1)?;
    let (inside, outside) = (udp(&site.host(0), site.host(0).ipv4(), 0), udp(&server, server.ipv4(), 7));
    let start = Instant::now();
    for _ in 0..100 {
        inside.send_to(&[0; 1_400], outside.local_addr()?)?;
    }
    for _ in 0..100 {
        receive(&outside)?;
    }
    let took = start.elapsed();
    assert!((288 * MS..600 * MS).contains(&took), "{took:?}");
    assert_eq!(site.link_losses(), 0);
    Ok(())
}

fn datagrams_sent_in_one_call_cross_one_by_one() -> TestResult {
    let (_lab, server, site) = lab(SiteConfig::new(RouterKind::EimApdf).delay(MS), 1)?;
    let (inside, outside) = (udp(&site.host(0), site.host(0).ipv4(), 0), udp(&server, server.ipv4(), 7));
    setsockopt(&inside, sockopt::UdpGsoSegment, &1_200)?;
    let sent: Vec<u8> = (0..30 * 1_200).map(|index: usize| (index / 1_200) as u8).collect();
    inside.send_to(&sent, outside.local_addr()?)?;
    for number in 0..30 {
        assert_eq!(receive(&outside)?.0, [number; 1_200]);
    }
    // The line loses what is longer than a packet may be.
    assert_eq!(site.link_losses(), 0);
    Ok(())
}

fn a_stream_crosses_unharmed() -> TestResult {
    let (_lab, server, site) = lab(SiteConfig::new(RouterKind::EimApdf).delay(MS).jitter(MS), 1)?;
    let address = SocketAddr::from((server.ipv4(), 443));
    let listener = server.run(|| TcpListener::bind(address))?;
    let mut stream = site.host(0).run(|| TcpStream::connect_timeout(&address, PATIENCE))?;
    let sent: Vec<u8> =
        (0..4_000_000_u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let received = thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let mut received = Vec::new();
            listener.accept()?.0.read_to_end(&mut received)?;
            Ok::<_, std::io::Error>(received)
        });
        stream.write_all(&sent)?;
        drop(stream);
        receiver.join().expect("it does not panic")
    })?;
    assert!(received == sent, "{} of {} bytes, or different ones", received.len(), sent.len());
    assert_eq!(site.link_losses(), 0);
    Ok(())
}

fn ipv6_crosses_a_line() -> TestResult {
    let (_lab, server, site) = lab(SiteConfig::new(RouterKind::EimApdf).ipv6(true).delay(20 * MS), 1)?;
    let [here, there] = [site.host(0).ipv6(), server.ipv6()].map(|address| address.expect("both have IPv6"));
    let (inside, outside) = (udp(&site.host(0), here, 0), udp(&server, there, 7));
    let trip = round_trip(&inside, &outside)?;
    assert!((40 * MS..60 * MS).contains(&trip), "{trip:?}");
    Ok(())
}
