//! Routers that make mappings at the request of hosts, asked here byte by byte.

mod common;

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::process::ExitCode;

use common::{TestResult, is_silent, receive, trial, udp};
use netsim::{Host, Lab, PortMapped, PortMapping, RouterKind, Site, SiteConfig, enter_user_namespace};

fn main() -> ExitCode {
    enter_user_namespace().expect("the lab needs root or user namespaces");
    let mut trials = Vec::new();
    for kind in [RouterKind::Apdm, RouterKind::ApdmSequential, RouterKind::EimApdf, RouterKind::EimEif] {
        for (name, offered, ask) in PROTOCOLS {
            trials.push(trial(format!("{kind}_lets_in_what_{name}_asked_for"), move || {
                lets_in(kind, offered, ask)
            }));
        }
    }
    trials.push(trial("what_is_not_offered_is_not_answered", what_is_not_offered_is_not_answered));
    trials.push(trial("a_carriers_customer_gets_no_mapping", a_carriers_customer_gets_no_mapping));
    trials.push(trial("mappings_outlive_the_daemon_and_not_its_next_start", mappings_outlive_the_daemon));
    common::run(trials)
}

/// The ports inside and outside.
const INSIDE: u16 = 5000;
const OUTSIDE: u16 = 40_000;

type Ask = fn(&Host, Ipv4Addr) -> Option<Vec<u8>>;

const PROTOCOLS: [(&str, PortMapping, Ask); 3] = [
    ("upnp", PortMapping::UPNP, upnp),
    ("nat-pmp", PortMapping::NAT_PMP, nat_pmp),
    ("pcp", PortMapping::PCP, pcp),
];

fn lab(kind: RouterKind, offered: PortMapping) -> Result<(Lab, Host, Site), netsim::BuildError> {
    let mut lab = Lab::new(1)?;
    let server = lab.add_server("server")?;
    let site = lab.add_site("a", SiteConfig::new(kind).port_mapping(offered))?;
    Ok((lab, server, site))
}

/// The router's address in a LAN that was not configured.
const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 1);

fn lets_in(kind: RouterKind, offered: PortMapping, ask: Ask) -> TestResult {
    let (_lab, server, site) = lab(kind, offered)?;
    let host = site.host(0);
    let (inside, outside) = (udp(&host, host.ipv4(), INSIDE), udp(&server, server.ipv4(), 9));
    let mapped = SocketAddr::from((site.wan_ipv4(), OUTSIDE));
    outside.send_to(b"too early", mapped)?;
    assert!(is_silent(&inside), "the port was open before");
    ask(&host, site.wan_ipv4()).ok_or("the router refused, or said nothing")?;
    let mapper = site.port_mapper().ok_or("no port mapper")?;
    let expected = PortMapped { port: OUTSIDE, inside: format!("{}:{INSIDE}", host.ipv4()).parse()? };
    assert_eq!(mapper.mappings()?, [expected]);
    // The early packet may have left a flow that goes to the router itself; another socket has none.
    let outside = udp(&server, server.ipv4(), 10);
    outside.send_to(b"hello", mapped)?;
    let (hello, from) = receive(&inside)?;
    assert_eq!((&hello[..], from), (&b"hello"[..], outside.local_addr()?));
    inside.send_to(b"welcome", from)?;
    assert_eq!(receive(&outside)?, (b"welcome".to_vec(), mapped));
    Ok(())
}

fn what_is_not_offered_is_not_answered() -> TestResult {
    for (name, offered, _) in PROTOCOLS {
        let (_lab, _server, site) = lab(RouterKind::Apdm, offered)?;
        for (other, _, ask) in PROTOCOLS {
            let answered = ask(&site.host(0), site.wan_ipv4()).is_some();
            assert_eq!(answered, name == other, "{other} where {name} is offered");
        }
    }
    Ok(())
}

fn a_carriers_customer_gets_no_mapping() -> TestResult {
    let (_lab, _server, site) = lab(RouterKind::CarrierEim, PortMapping::ALL)?;
    for (name, _, ask) in PROTOCOLS {
        assert_eq!(ask(&site.host(0), site.wan_ipv4()), None, "{name}");
    }
    assert_eq!(site.port_mapper().ok_or("no port mapper")?.mappings()?, []);
    Ok(())
}

fn mappings_outlive_the_daemon() -> TestResult {
    let (_lab, _server, site) = lab(RouterKind::Apdm, PortMapping::ALL)?;
    let mapper = site.port_mapper().ok_or("no port mapper")?;
    nat_pmp(&site.host(0), site.wan_ipv4()).ok_or("no mapping")?;
    mapper.kill();
    assert_eq!(mapper.mappings()?.len(), 1);
    assert_eq!(nat_pmp(&site.host(0), site.wan_ipv4()), None);
    mapper.start()?;
    assert_eq!(mapper.mappings()?, []);
    nat_pmp(&site.host(0), site.wan_ipv4()).ok_or("no mapping after the restart")?;
    assert_eq!(mapper.mappings()?.len(), 1);
    Ok(())
}

/// Sends a request to port 5351 and takes the answer.
fn ask(host: &Host, request: &[u8]) -> Option<Vec<u8>> {
    let socket = udp(host, host.ipv4(), 0);
    socket.set_read_timeout(Some(std::time::Duration::from_secs(1))).ok()?;
    socket.send_to(request, (ROUTER, 5351)).ok()?;
    receive(&socket).ok().map(|(answer, _)| answer)
}

/// RFC 6886, section 3.3.
fn nat_pmp(host: &Host, _: Ipv4Addr) -> Option<Vec<u8>> {
    let mut request = vec![0, 1, 0, 0];
    request.extend([INSIDE, OUTSIDE].iter().flat_map(|port| port.to_be_bytes()));
    request.extend(600_u32.to_be_bytes());
    ask(host, &request).filter(|answer| answer[..4] == [0, 129, 0, 0])
}

/// RFC 6887, section 11.1.
fn pcp(host: &Host, wan: Ipv4Addr) -> Option<Vec<u8>> {
    let mut request = vec![2, 1, 0, 0];
    request.extend(600_u32.to_be_bytes());
    request.extend(host.ipv4().to_ipv6_mapped().octets());
    request.extend([7; 12]);
    request.extend([17, 0, 0, 0]);
    request.extend([INSIDE, OUTSIDE].iter().flat_map(|port| port.to_be_bytes()));
    request.extend(Ipv4Addr::UNSPECIFIED.to_ipv6_mapped().octets());
    let answer = ask(host, &request).filter(|answer| answer[..4] == [2, 129, 0, 0])?;
    assert_eq!(answer[44..60], wan.to_ipv6_mapped().octets());
    Some(answer)
}

/// Found as UPnP Device Architecture 1.1 has it (1.3.2), asked as WANIPConnection has it (2.4.16).
fn upnp(host: &Host, _: Ipv4Addr) -> Option<Vec<u8>> {
    let socket: UdpSocket = udp(host, host.ipv4(), 0);
    socket.set_read_timeout(Some(std::time::Duration::from_secs(2))).ok()?;
    let search = "M-SEARCH * HTTP/1.1\r\nHOST: 239.255.255.250:1900\r\nMAN: \"ssdp:discover\"\r\nMX: 1\r\n\
                  ST: urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\n\r\n";
    socket.send_to(search.as_bytes(), "239.255.255.250:1900").ok()?;
    let (found, _) = receive(&socket).ok()?;
    let found = String::from_utf8(found).ok()?;
    let (_, location) = found.split_once("LOCATION: http://")?;
    let place: SocketAddr = location.split('/').next()?.parse().ok()?;
    let fields = [
        ("RemoteHost", String::new()),
        ("ExternalPort", OUTSIDE.to_string()),
        ("Protocol", "UDP".into()),
        ("InternalPort", INSIDE.to_string()),
        ("InternalClient", host.ipv4().to_string()),
        ("Enabled", "1".into()),
        ("PortMappingDescription", "test".into()),
        ("LeaseDuration", "600".into()),
    ];
    let fields: String = fields.iter().map(|(key, value)| format!("<New{key}>{value}</New{key}>")).collect();
    let service = "urn:schemas-upnp-org:service:WANIPConnection:1";
    let body = format!(
        "<?xml version=\"1.0\"?><s:Envelope xmlns:s=\"http://schemas.xmlsoap.org/soap/envelope/\"><s:Body>\
         <u:AddPortMapping xmlns:u=\"{service}\">{fields}</u:AddPortMapping></s:Body></s:Envelope>"
    );
    let request = format!(
        "POST /ctl/IPConn HTTP/1.1\r\nHost: {place}\r\nContent-Type: text/xml\r\nConnection: close\r\n\
         SOAPAction: \"{service}#AddPortMapping\"\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut stream = host.run(|| TcpStream::connect(place)).ok()?;
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    answer.starts_with(b"HTTP/1.1 200").then_some(answer)
}
