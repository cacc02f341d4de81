//! Mappings asked of routers, which run `miniupnpd` as many home routers do.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use end_to_end::process::{PATIENCE, Program, binary};
use end_to_end::world::{SITE_DELAY, World};
use libtest_mimic::Trial;
use netsim::{Host, PortMapped, PortMapping, RouterKind, Site, SiteConfig};
use nix::sys::signal::Signal;
use peer::Endpoint;

use crate::dialling::{on, runtime};
use crate::trial;

const PROTOCOLS: [(&str, PortMapping); 4] = [
    ("any", PortMapping::ALL),
    ("upnp", PortMapping::UPNP),
    ("nat-pmp", PortMapping::NAT_PMP),
    ("pcp", PortMapping::PCP),
];

/// Seconds: what tests can wait for. UPnP and NAT-PMP routers grant it; PCP has 120 at least (RFC 6887, section 15).
const SHORT_LEASE: &str = "20";

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for (name, offered) in PROTOCOLS {
        for dialler in [true, false] {
            let side = if dialler { "dialler" } else { "listener" };
            trials.push(trial(format!("portmap::apdm_with_apdm_by_{name}_of_the_{side}"), move || {
                becomes_direct(offered, dialler)
            }));
        }
        trials.push(trial(format!("portmap::removed_at_the_end_by_{name}"), move || {
            removed_at_the_end(offered)
        }));
        // The other program asks by UPnP or NAT-PMP.
        if offered.upnp || offered.nat_pmp {
            let name = format!("portmap::what_others_have_stays_with_{name}");
            trials.push(trial(name, move || others_stay(offered)));
        }
    }
    for (name, offered) in [("upnp", PortMapping::UPNP), ("nat-pmp", PortMapping::NAT_PMP)] {
        trials.push(trial(format!("portmap::made_again_after_a_restart_by_{name}"), move || {
            made_again_after_a_restart(offered)
        }));
        trials.push(trial(format!("portmap::a_killed_peers_lease_runs_out_by_{name}"), move || {
            a_killed_peers_lease_runs_out(offered)
        }));
    }
    trials.push(trial("portmap::without_a_gateway_nothing_is_said_or_held_up", without_a_gateway));
    trials.push(trial("portmap::not_asked_for_where_it_is_not_wanted", not_wanted));
    trials.push(trial("portmap::the_doctor_tells", the_doctor_tells));
    trials
}

fn mapping_site(kind: RouterKind, offered: PortMapping) -> SiteConfig {
    SiteConfig::new(kind).delay(SITE_DELAY).port_mapping(offered)
}

fn mappings(site: &Site) -> anyhow::Result<Vec<PortMapped>> {
    Ok(site.port_mapper().context("a site with a port mapper")?.mappings()?)
}

/// Waits until the router's mappings are as `wanted`, and tells how long that took.
fn until(
    site: &Site,
    patience: Duration,
    wanted: impl Fn(&[PortMapped]) -> bool,
) -> anyhow::Result<Duration> {
    let start = Instant::now();
    loop {
        let found = mappings(site)?;
        if wanted(&found) {
            return Ok(start.elapsed());
        }
        ensure!(start.elapsed() < patience, "after {patience:?}: {found:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn one(found: &[PortMapped]) -> bool {
    found.len() == 1
}

/// Two networks between which nothing but the relay works otherwise.
fn becomes_direct(offered: PortMapping, dialler_maps: bool) -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let mapping = world.lab.add_site("a", mapping_site(RouterKind::Apdm, offered))?;
    let other = world.lab.add_site("b", SiteConfig::new(RouterKind::Apdm).delay(SITE_DELAY))?;
    let (dialler, listener) = if dialler_maps { (&mapping, &other) } else { (&other, &mapping) };
    let (_listening, id) = world.listener(&listener.host(0), "b", &["--echo"])?;
    if !dialler_maps {
        until(&mapping, PATIENCE, one)?;
    }
    // A dialler dials before its router has answered: the mapping joins the two all the same.
    let mut peer = world.peer(&dialler.host(0), "a", &["connect", &id])?;
    let stdin = peer.stdin()?;
    let path = peer.event(|event| event["path"] == "direct", PATIENCE)?;
    ensure!(path["rung"] == "port-mapped", "{path}");
    ensure!(one(&mappings(&mapping)?));
    drop(stdin);
    peer.named("closed")?;
    ensure!(peer.wait(PATIENCE)?.success());
    if dialler_maps {
        let left = mappings(&mapping)?;
        ensure!(left.is_empty(), "{left:?}");
    }
    Ok(())
}

fn removed_at_the_end(offered: PortMapping) -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let site = world.lab.add_site("a", mapping_site(RouterKind::Apdm, offered))?;
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let (mut listener, _) = world.listener(&site.host(0), "a", &["--echo"])?;
        until(&site, PATIENCE, one)?;
        listener.signal(signal)?;
        let status = listener.wait(PATIENCE)?;
        ensure!(status.code() == Some(0), "{signal}: {status}");
        let left = mappings(&site)?;
        ensure!(left.is_empty(), "{signal}: {left:?}");
    }
    Ok(())
}

/// RFC 6886, section 3.3, by hand: `port` outside to 6000 inside, for ten minutes.
fn map_by_nat_pmp(host: &Host, port: u16) -> anyhow::Result<()> {
    let socket = host.run(|| UdpSocket::bind((host.ipv4(), 0)))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut request = vec![0, 1, 0, 0];
    request.extend([6000, port].iter().flat_map(|port: &u16| port.to_be_bytes()));
    request.extend(600_u32.to_be_bytes());
    socket.send_to(&request, (Ipv4Addr::new(192, 168, 1, 1), 5351))?;
    let mut answer = [0; 16];
    socket.recv(&mut answer)?;
    ensure!(answer[..4] == [0, 129, 0, 0] && answer[10..12] == port.to_be_bytes(), "{answer:?}");
    Ok(())
}

/// The same by UPnP, and by another program than ours.
fn map_by_upnp(host: &Host, port: u16) -> anyhow::Result<()> {
    let inside = SocketAddr::from((host.ipv4(), 6000));
    on(&runtime(host)?, async move {
        let gateway = igd_next::aio::tokio::search_gateway(igd_next::SearchOptions::default()).await?;
        gateway.add_port(igd_next::PortMappingProtocol::UDP, port, inside, 600, "another program").await?;
        Ok(())
    })
}

/// The port that we would like is another host's; or another program's of our own host.
fn others_stay(offered: PortMapping) -> anyhow::Result<()> {
    const PORT: u16 = 5000;
    for owner in [1, 0] {
        let mut world = World::new(1)?;
        let site = world.lab.add_site("a", mapping_site(RouterKind::Apdm, offered).hosts(2))?;
        match offered.upnp {
            true => map_by_upnp(&site.host(owner), PORT)?,
            false => map_by_nat_pmp(&site.host(owner), PORT)?,
        }
        let theirs = mappings(&site)?;
        ensure!(one(&theirs) && theirs[0].port == PORT, "{theirs:?}");
        let (address, host) = (world.address.clone(), site.host(0));
        let runtime = runtime(&host)?;
        let endpoint = on(&runtime, async move {
            let local: SocketAddr = (Ipv4Addr::UNSPECIFIED, PORT).into();
            let endpoint = Endpoint::builder().server(address.parse()?).address(local).bind().await?;
            endpoint.online().await?;
            Ok(endpoint)
        })?;
        until(&site, PATIENCE, |found| found.len() == 2)?;
        let found = mappings(&site)?;
        let ours: Vec<_> = found.iter().filter(|mapping| !theirs.contains(mapping)).collect();
        ensure!(found.contains(&theirs[0]) && ours.len() == 1, "{found:?}");
        ensure!(ours[0].inside == format!("{}:{PORT}", host.ipv4()).parse()?, "{found:?}");
        on(&runtime, async move {
            endpoint.close().await;
            Ok(())
        })?;
        ensure!(mappings(&site)? == theirs, "after the end: {:?}", mappings(&site)?);
    }
    Ok(())
}

fn made_again_after_a_restart(offered: PortMapping) -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let site = world.lab.add_site("a", mapping_site(RouterKind::Apdm, offered))?;
    let other = world.lab.add_site("b", SiteConfig::new(RouterKind::Apdm).delay(SITE_DELAY))?;
    let (mut listener, id) =
        world.listener(&site.host(0), "b", &["--echo", "--port-mapping-lease", SHORT_LEASE])?;
    until(&site, PATIENCE, one)?;
    let mut peer = world.peer(&other.host(0), "a", &["connect", &id])?;
    let mut stdin = peer.stdin()?;
    peer.event(|event| event["path"] == "direct", PATIENCE)?;
    let mapper = site.port_mapper().context("a port mapper")?;
    mapper.kill();
    std::io::Write::write_all(&mut stdin, b"while the daemon is dead, ")?;
    mapper.start()?;
    ensure!(mappings(&site)?.is_empty());
    // The renewal is due after half of the lease at the least; a round that met the daemon dead has another after 30 s.
    until(&site, Duration::from_secs(60), one)?;
    std::io::Write::write_all(&mut stdin, b"and when it is back")?;
    drop(stdin);
    let mut echo = String::new();
    std::io::Read::read_to_string(&mut peer.stdout()?, &mut echo)?;
    ensure!(echo == "while the daemon is dead, and when it is back", "{echo:?}");
    ensure!(peer.wait(PATIENCE)?.success());
    let errors = listener.said().iter().filter(|event| event["event"] == "error").count();
    ensure!(errors == 0, "{:?}", listener.said());
    Ok(())
}

fn a_killed_peers_lease_runs_out(offered: PortMapping) -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let site = world.lab.add_site("a", mapping_site(RouterKind::Apdm, offered))?;
    let (listener, _) =
        world.listener(&site.host(0), "a", &["--echo", "--port-mapping-lease", SHORT_LEASE])?;
    until(&site, PATIENCE, one)?;
    listener.signal(Signal::SIGKILL)?;
    // The daemon looks for what has run out every few seconds.
    until(&site, Duration::from_secs(60), <[PortMapped]>::is_empty)?;
    Ok(())
}

/// Ten times what an end takes.
const AT_ONCE: Duration = Duration::from_secs(3);

fn without_a_gateway() -> anyhow::Result<()> {
    // A router that has never heard of it, one that is itself behind a NAT, and none.
    let sites = [
        SiteConfig::new(RouterKind::Apdm),
        SiteConfig::new(RouterKind::CarrierEim).port_mapping(PortMapping::ALL),
        SiteConfig::new(RouterKind::Public),
    ];
    for config in sites {
        let mut world = World::new(1)?;
        let site = world.lab.add_site("a", config)?;
        let other = world.lab.add_site("b", SiteConfig::new(RouterKind::EimApdf))?;
        let (_listening, id) = world.listener(&other.host(0), "b", &["--echo"])?;
        let mut command = site.host(0).command(binary("peer")?);
        let key = world.key("a");
        let key = key.to_str().context("a temporary path in UTF-8")?;
        command.args(["connect", "--server", &world.address, "--key", key, &id]).env_remove("RUST_LOG");
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let start = Instant::now();
        let output = child.wait_with_output()?;
        let took = start.elapsed();
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success() && took < AT_ONCE, "{took:?}: {said}");
        ensure!(said.lines().all(|line| line.starts_with("peer: ")), "{said}");
    }
    Ok(())
}

fn not_wanted() -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let site = world.lab.add_site("a", mapping_site(RouterKind::Apdm, PortMapping::ALL).hosts(2))?;
    let (_unmapped, id) = world.listener(&site.host(0), "b", &["--echo", "--no-port-mapping"])?;
    // Whoever starts later, and is mapped, tells when the first would have been.
    let (_mapped, _) = world.listener(&site.host(1), "a", &["--echo"])?;
    until(&site, PATIENCE, |found| !found.is_empty())?;
    let found = mappings(&site)?;
    ensure!(one(&found) && *found[0].inside.ip() == site.host(1).ipv4(), "{id}: {found:?}");
    Ok(())
}

fn the_doctor_tells() -> anyhow::Result<()> {
    for (name, offered) in &PROTOCOLS[1..] {
        let mut world = World::new(1)?;
        let site = world.lab.add_site("a", mapping_site(RouterKind::Apdm, *offered))?;
        let arguments = ["doctor", "--json", "--server", &world.address];
        let mut doctor = Program::start(&site.host(0), "peer", &arguments, false)?;
        let report = doctor.event(|event| event["event"] == "diagnosis", PATIENCE * 3)?;
        ensure!(report["port_mapping"] == *name && report["verdict"] == "everybody", "{report}");
        ensure!(mappings(&site)?.is_empty(), "given back");
    }
    Ok(())
}
