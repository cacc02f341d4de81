//! What a lab promises apart from its routers: everyone is reached, labs do not meet, nothing is left behind.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::panic::catch_unwind;
use std::path::Path;
use std::process::{Command, ExitCode, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::{PATIENCE, TestResult, is_silent, receive, trial, udp};
use netsim::{Direction, EnterError, Host, Lab, RouterKind, SiteConfig, enter_user_namespace};

/// Makes this program a lab of its own instead: what to do, and a word to find its processes by.
const ROLE: &str = "NETSIM_TEST_ROLE";

fn main() -> ExitCode {
    let role = std::env::var(ROLE);
    if role.as_deref() == Ok("threads") {
        return enter_beside_a_thread();
    }
    enter_user_namespace().expect("the lab needs root or user namespaces");
    if let Ok(role) = role {
        return play(&role);
    }
    common::run(vec![
        trial("every_kind_reaches_a_server_over_ipv4_and_ipv6", every_kind_reaches_a_server),
        trial("hosts_of_one_site_reach_each_other_directly", hosts_of_one_site_reach_each_other),
        trial("isolated_hosts_reach_the_internet_alone", isolated_hosts_reach_the_internet_alone),
        trial("ipv6_hosts_are_behind_a_firewall", ipv6_hosts_are_behind_a_firewall),
        trial("labs_side_by_side_do_not_meet", labs_side_by_side_do_not_meet),
        trial("a_cut_works_in_each_direction_and_heals", a_cut_works_in_each_direction_and_heals),
        trial("a_host_moves_with_its_sockets", a_host_moves_with_its_sockets),
        trial("a_cut_between_two_sites_leaves_the_servers", a_cut_between_two_sites_leaves_the_servers),
        trial("a_router_that_reboots_forgets", a_router_that_reboots_forgets),
        trial("a_dropped_child_is_killed", a_dropped_child_is_killed),
        trial("a_program_behaves_as_with_std", a_program_behaves_as_with_std),
        trial("nothing_is_left_after_a_drop", nothing_is_left_after_a_drop),
        trial("nothing_is_left_after_a_panic", nothing_is_left_after_a_panic),
        trial("nothing_is_left_after_a_kill", nothing_is_left_after_a_kill),
        trial("an_ordinary_user_can_build_a_lab", an_ordinary_user_can_build_a_lab),
        // Whoever has the rights already needs no user namespace, and meets no error.
        trial("a_process_with_threads_is_told_what_is_wrong", a_process_with_threads_is_told_what_is_wrong)
            .with_ignored_flag(!is_root_of_the_machine()),
    ])
}

/// What this program does when it is the lab under test.
fn play(role: &str) -> ExitCode {
    match role {
        "hold" => hold("hold"),
        "reach" => {
            let mut lab = Lab::new(1).expect("a lab");
            let server = lab.add_server("server").expect("a server");
            let config = SiteConfig::new(RouterKind::EimAdf).delay(Duration::from_millis(1)).ipv6(true);
            let host = lab.add_site("a", config).expect("a site").host(0);
            let families = [IpAddr::from(server.ipv4()), server.ipv6().expect("servers have IPv6").into()];
            let reached = families.into_iter().all(|address| connects(&host, &server, address));
            if reached { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        other => panic!("no role is called {other}"),
    }
}

fn enter_beside_a_thread() -> ExitCode {
    let (release, held) = std::sync::mpsc::channel::<()>();
    let thread = thread::spawn(move || held.recv());
    let refused = matches!(enter_user_namespace(), Err(EnterError::Threads));
    drop(release);
    let ended = thread.join().is_ok();
    if refused && ended { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Builds a lab with programs in it, tells its namespaces, and waits to be killed.
fn hold(marker: &str) -> ExitCode {
    let mut lab = Lab::new(1).expect("a lab");
    let config = SiteConfig::new(RouterKind::CarrierEim).delay(Duration::from_millis(1));
    let host = lab.add_site("a", config).expect("a site").host(0);
    let _child = start_family(&host, marker);
    println!("{}", held_namespaces("self").into_iter().collect::<Vec<_>>().join(" "));
    loop {
        thread::park();
    }
}

/// A program with a child of its own, and a grandchild that nobody waits for. Returns once all are running.
fn start_family(host: &Host, marker: &str) -> netsim::HostChild {
    let mut child = host
        .command("sh")
        .args(["-c", "(sleep 1000 &); sleep 1000 & echo started; wait"])
        .env("NETSIM_TEST_MARKER", marker)
        .stdout(Stdio::piped())
        .spawn()
        .expect("sh");
    let mut line = String::new();
    BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("its output");
    assert_eq!(line, "started\n");
    child
}

/// Processes that were started with this marker in their environment.
fn marked_processes(marker: &str) -> Vec<String> {
    let wanted = format!("NETSIM_TEST_MARKER={marker}");
    processes()
        .filter(|process| {
            let environment = fs::read(format!("/proc/{process}/environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|variable| variable == wanted.as_bytes())
        })
        .collect()
}

fn processes() -> impl Iterator<Item = String> {
    let entries = fs::read_dir("/proc").expect("/proc").flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
}

/// The network namespaces that a process keeps by file descriptors.
fn held_namespaces(process: &str) -> BTreeSet<String> {
    let Ok(descriptors) = fs::read_dir(format!("/proc/{process}/fd")) else { return BTreeSet::new() };
    let targets = descriptors.flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
    targets.map(|target| target.display().to_string()).filter(|name| name.starts_with("net:[")).collect()
}

/// Whether any process keeps one of these namespaces, by a file descriptor or by being in it.
fn anyone_keeps(namespaces: &BTreeSet<String>) -> bool {
    processes().any(|process| {
        let inside = fs::read_link(Path::new("/proc").join(&process).join("ns/net"));
        let inside = inside.is_ok_and(|name| namespaces.contains(&name.display().to_string()));
        inside || !held_namespaces(&process).is_disjoint(namespaces)
    })
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn connects(from: &Host, to: &Host, address: IpAddr) -> bool {
    let address = (address, 443).into();
    // A program that another test is just starting has for a moment what was open here: the listener before, perhaps.
    let deadline = Instant::now() + PATIENCE;
    let _listener = loop {
        match to.run(|| TcpListener::bind(address)) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < deadline => {}
            bound => break bound.expect("the host has this address"),
        }
    };
    from.run(|| TcpStream::connect_timeout(&address, PATIENCE)).is_ok()
}

fn every_kind_reaches_a_server() -> TestResult {
    let mut lab = Lab::new(1)?;
    let server = lab.add_server("server")?;
    for kind in RouterKind::ALL {
        let host = lab.add_site(kind.name(), SiteConfig::new(kind).ipv6(true))?.host(0);
        assert!(connects(&host, &server, server.ipv4().into()), "{kind} over IPv4");
        let ipv6 = server.ipv6().expect("servers have IPv6");
        assert!(connects(&host, &server, ipv6.into()), "{kind} over IPv6");
    }
    Ok(())
}

fn hosts_of_one_site_reach_each_other() -> TestResult {
    let mut lab = Lab::new(1)?;
    let site = lab.add_site("a", SiteConfig::new(RouterKind::UdpBlocked).hosts(2))?;
    let [one, two] = [0, 1].map(|index| udp(&site.host(index), site.host(index).ipv4(), 9));
    one.send_to(b"hello", two.local_addr()?)?;
    assert_eq!(receive(&two)?.1, one.local_addr()?);
    Ok(())
}

fn isolated_hosts_reach_the_internet_alone() -> TestResult {
    let mut lab = Lab::new(1)?;
    let server = lab.add_server("server")?;
    let site = lab.add_site("a", SiteConfig::new(RouterKind::EimApdf).hosts(2).isolated(true))?;
    let [one, two] = [0, 1].map(|index| udp(&site.host(index), site.host(index).ipv4(), 9));
    one.send_to(b"hello", two.local_addr()?)?;
    two.send_to(b"hello", one.local_addr()?)?;
    assert!(is_silent(&two) && is_silent(&one), "past the isolation");
    assert!([0, 1].iter().all(|index| connects(&site.host(*index), &server, server.ipv4().into())));
    Ok(())
}

fn ipv6_hosts_are_behind_a_firewall() -> TestResult {
    let mut lab = Lab::new(1)?;
    let server = lab.add_server("server")?;
    let host = lab.add_site("a", SiteConfig::new(RouterKind::EimEif).ipv6(true))?.host(0);
    let [here, there] = [host.ipv6(), server.ipv6()].map(|address| address.expect("both have IPv6"));
    let (inside, outside) = (udp(&host, here, 9), udp(&server, there, 9));
    outside.send_to(b"unasked", inside.local_addr()?)?;
    assert!(is_silent(&inside));
    inside.send_to(b"hello", outside.local_addr()?)?;
    let (_, from) = receive(&outside)?;
    assert_eq!(from, inside.local_addr()?);
    outside.send_to(b"asked", from)?;
    assert_eq!(receive(&inside)?.0, b"asked");
    Ok(())
}

fn labs_side_by_side_do_not_meet() -> TestResult {
    let mut labs = [Lab::new(1)?, Lab::new(1)?];
    let sockets = labs.each_mut().map(|lab| {
        let server = lab.add_server("server").expect("a server");
        let site = lab.add_site("a", SiteConfig::new(RouterKind::EimApdf)).expect("a site");
        (udp(&site.host(0), site.host(0).ipv4(), 40_000), udp(&server, server.ipv4(), 3478))
    });
    let [(inside, outside), (_, elsewhere)] = &sockets;
    assert_eq!(outside.local_addr()?, elsewhere.local_addr()?, "the same addresses in both labs");
    inside.send_to(b"hello", outside.local_addr()?)?;
    assert_eq!(receive(outside)?.0, b"hello");
    assert!(is_silent(elsewhere));
    Ok(())
}

fn a_cut_works_in_each_direction_and_heals() -> TestResult {
    let mut lab = Lab::new(1)?;
    let server = lab.add_server("server")?;
    let site = lab.add_site("a", SiteConfig::new(RouterKind::Public))?;
    let (inside, outside) = (udp(&site.host(0), site.host(0).ipv4(), 9), udp(&server, server.ipv4(), 9));
    let passes = |from: &std::net::UdpSocket, to: &std::net::UdpSocket| {
        from.send_to(b"?", to.local_addr().expect("bound")).expect("sent");
        !is_silent(to)
    };
    for (direction, up, down) in
        [(Direction::Up, false, true), (Direction::Down, true, false), (Direction::Both, false, false)]
    {
        site.cut(direction)?;
        assert_eq!((passes(&inside, &outside), passes(&outside, &inside)), (up, down), "{direction:?}");
    }
    site.restore()?;
    assert!(passes(&inside, &outside) && passes(&outside, &inside));
    Ok(())
}

fn a_host_moves_with_its_sockets() -> TestResult {
    let mut lab = Lab::new(1)?;
    let server = lab.add_server("s")?;
    let home = lab.add_site("a", SiteConfig::new(RouterKind::EimApdf).ipv6(true))?;
    let away = lab.add_site("b", SiteConfig::new(RouterKind::EimApdf).ipv6(true))?;
    let reflector = udp(&server, server.ipv4(), 3478);
    let host = home.host(0);
    let socket = host.run(|| std::net::UdpSocket::bind("0.0.0.0:40000"))?;
    let mut at = host.clone();
    for site in [&away, &home, &away] {
        at = lab.move_host(&at, site)?;
        assert!(site.hosts().iter().all(|host| host.ipv4() != at.ipv4()), "{}", at.ipv4());
        socket.send_to(b"here", reflector.local_addr()?)?;
        let (_, seen) = receive(&reflector)?;
        assert_eq!(seen.ip(), site.wan_ipv4());
        assert_eq!(at.reflexive_ipv4(), site.wan_ipv4());
        reflector.send_to(b"there", seen)?;
        receive(&socket)?;
        let v6 = at.ipv6().expect("both sites have IPv6");
        assert!(connects(&at, &server, server.ipv6().expect("servers have it").into()), "from {v6}");
    }
    Ok(())
}

fn a_cut_between_two_sites_leaves_the_servers() -> TestResult {
    let mut lab = Lab::new(1)?;
    let server = lab.add_server("server")?;
    let sites = [
        lab.add_site("a", SiteConfig::new(RouterKind::Public))?,
        lab.add_site("b", SiteConfig::new(RouterKind::Public))?,
    ];
    let [here, there] = sites.each_ref().map(|site| udp(&site.host(0), site.host(0).ipv4(), 9));
    let outside = udp(&server, server.ipv4(), 9);
    let passes = |from: &std::net::UdpSocket, to: &std::net::UdpSocket| {
        from.send_to(b"?", to.local_addr().expect("bound")).expect("sent");
        !is_silent(to)
    };
    for (direction, up, down) in
        [(Direction::Up, false, true), (Direction::Down, true, false), (Direction::Both, false, false)]
    {
        sites[0].cut_between(&sites[1], direction)?;
        assert_eq!((passes(&here, &there), passes(&there, &here)), (up, down), "{direction:?}");
        assert!(passes(&here, &outside) && passes(&outside, &here), "the server, {direction:?}");
    }
    sites[0].restore()?;
    assert!(passes(&here, &there) && passes(&there, &here));
    Ok(())
}

fn a_router_that_reboots_forgets() -> TestResult {
    for kind in [RouterKind::EimApdf, RouterKind::EimEif, RouterKind::Apdm, RouterKind::ApdmPreserving] {
        let mut lab = Lab::new(1)?;
        let server = lab.add_server("server")?;
        let site = lab.add_site("a", SiteConfig::new(kind))?;
        let (inside, outside) =
            (udp(&site.host(0), site.host(0).ipv4(), 9000), udp(&server, server.ipv4(), 9));
        inside.send_to(b"?", outside.local_addr()?)?;
        let (_, mapped) = receive(&outside)?;
        outside.send_to(b"!", mapped)?;
        assert_eq!(receive(&inside)?.0, b"!");
        site.reboot()?;
        // Not the count, which is 1 at times although this flow is gone.
        let flows = site.conntrack()?;
        assert!(!flows.iter().any(|flow| flow.contains("udp")), "{kind}: {flows:?}");
        outside.send_to(b"!", mapped)?;
        assert!(is_silent(&inside), "{kind}: still open");
        inside.send_to(b"?", outside.local_addr()?)?;
        let (_, again) = receive(&outside)?;
        assert_eq!(mapped == again, kind != RouterKind::Apdm, "{kind}: {mapped}, then {again}");
    }
    Ok(())
}

fn a_dropped_child_is_killed() -> TestResult {
    let mut lab = Lab::new(1)?;
    let server = lab.add_server("server")?;
    let child = server.command("sleep").arg("1000").spawn()?;
    let process = format!("/proc/{}", child.id());
    assert!(Path::new(&process).exists());
    drop(child);
    assert!(!Path::new(&process).exists());
    Ok(())
}

fn a_program_behaves_as_with_std() -> TestResult {
    let mut lab = Lab::new(1)?;
    let server = lab.add_server("server")?;
    let output =
        server.command("sh").args(["-c", "echo $WORD; echo bad >&2; exit 3"]).env("WORD", "good").output()?;
    assert_eq!((output.stdout.as_slice(), output.stderr.as_slice()), (&b"good\n"[..], &b"bad\n"[..]));
    assert_eq!(output.status.code(), Some(3));
    let addresses = server.command("ip").args(["-brief", "address"]).output()?;
    assert!(String::from_utf8(addresses.stdout)?.contains(&server.ipv4().to_string()));
    let missing = server.command("/no/such/program").spawn();
    assert_eq!(missing.err().map(|error| error.kind()), Some(std::io::ErrorKind::NotFound));
    drop(lab);
    assert!(server.command("true").spawn().is_err(), "the lab is gone");
    Ok(())
}

fn nothing_is_left_after_a_drop() -> TestResult {
    let mut lab = Lab::new(1)?;
    let host = lab.add_site("a", SiteConfig::new(RouterKind::EimApdf))?.host(0);
    let child = start_family(&host, "drop");
    assert!(marked_processes("drop").len() >= 3, "the program, its child and its grandchild");
    drop(lab);
    // The handle has not reaped its program yet; a zombie has no environment.
    wait_until("the end of all programs", || marked_processes("drop").is_empty());
    drop(child);
    Ok(())
}

fn nothing_is_left_after_a_panic() -> TestResult {
    let panicked = catch_unwind(|| {
        let mut lab = Lab::new(1).expect("a lab");
        let host = lab.add_site("a", SiteConfig::new(RouterKind::EimApdf)).expect("a site").host(0);
        let _child = start_family(&host, "panic");
        panic!("expected by the test");
    });
    assert!(panicked.is_err());
    wait_until("the end of all programs", || marked_processes("panic").is_empty());
    Ok(())
}

fn nothing_is_left_after_a_kill() -> TestResult {
    let mut lab = Command::new("/proc/self/exe").env(ROLE, "hold").stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    BufReader::new(lab.stdout.take().expect("piped")).read_line(&mut line)?;
    let namespaces: BTreeSet<String> = line.split_whitespace().map(str::to_owned).collect();
    assert!(namespaces.len() >= 5, "core, edge, two routers, host: {namespaces:?}");
    assert!(anyone_keeps(&namespaces) && marked_processes("hold").len() >= 3);
    lab.kill()?;
    lab.wait()?;
    wait_until("the end of all programs", || marked_processes("hold").is_empty());
    wait_until("the end of all namespaces", || !anyone_keeps(&namespaces));
    Ok(())
}

/// This program again in another role, as nobody where we are root of the machine.
fn again_as_ordinary_user(role: &str) -> std::io::Result<Output> {
    let mut again = Command::new("/proc/self/exe");
    if is_root_of_the_machine() {
        again.uid(65_534).gid(65_534);
    }
    again.env(ROLE, role).stderr(Stdio::piped()).spawn()?.wait_with_output()
}

/// Not only of a user namespace, which maps fewer users.
fn is_root_of_the_machine() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    nix::unistd::geteuid().is_root() && map.split_whitespace().eq(["0", "0", "4294967295"])
}

fn an_ordinary_user_can_build_a_lab() -> TestResult {
    let output = again_as_ordinary_user("reach")?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn a_process_with_threads_is_told_what_is_wrong() -> TestResult {
    let output = again_as_ordinary_user("threads")?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
