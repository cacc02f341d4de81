//! What reaches the other machine itself: ssh through its proxy command, and ping.

use std::io::{BufRead as _, Read as _};
use std::net::TcpListener;
use std::process::Stdio;

use anyhow::{Context as _, ensure};
use end_to_end::process::{PATIENCE, binary};
use end_to_end::world::SITE_DELAY;
use libtest_mimic::Trial;
use netsim::{Host, HostChild, RouterKind};
use tempfile::TempDir;

use crate::setup::{friends, friends_behind, listen};
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("reach::ssh_through_proxy_command", ssh),
        trial("reach::ping_measures_a_direct_path", || ping(RouterKind::EimApdf, "direct")),
        trial("reach::ping_measures_the_relay", || ping(RouterKind::Apdm, "relayed")),
    ]
}

/// An SSH server on the loopback of a host, and what `ssh` needs to be let in.
pub(crate) struct SshServer {
    _process: HostChild,
    place: TempDir,
    pub(crate) port: u16,
}

impl SshServer {
    /// At this port, or any.
    pub(crate) fn start(host: &Host, port: Option<u16>) -> anyhow::Result<Self> {
        let place = tempfile::tempdir()?;
        std::fs::set_permissions(place.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let path = |name: &str| place.path().join(name).to_str().map(str::to_owned).context("UTF-8");
        let (host_key, key, config) = (path("host_key")?, path("key")?, path("sshd_config")?);
        for file in [&host_key, &key] {
            let made =
                host.command("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f", file]).output()?;
            ensure!(made.status.success(), "ssh-keygen: {}", String::from_utf8_lossy(&made.stderr));
        }
        std::fs::copy(format!("{key}.pub"), path("authorized")?)?;
        let port = match port {
            Some(port) => port,
            None => host.run(|| TcpListener::bind("127.0.0.1:0"))?.local_addr()?.port(),
        };
        let text = format!(
            "ListenAddress 127.0.0.1\nPort {port}\nHostKey {host_key}\nAuthorizedKeysFile {}\nPidFile none\n\
             PermitRootLogin yes\nPasswordAuthentication no\nUsePAM no\nStrictModes no\n",
            path("authorized")?
        );
        std::fs::write(&config, text)?;
        // It insists on this directory, which a service would have made.
        std::fs::create_dir_all("/run/sshd")?;
        let mut command = host.command("/usr/sbin/sshd");
        let mut process = command.args(["-D", "-e", "-f", &config]).stderr(Stdio::piped()).spawn()?;
        let mut said = std::io::BufReader::new(process.stderr.take().context("its words")?);
        let mut line = String::new();
        while !line.contains("Server listening") {
            line.clear();
            ensure!(said.read_line(&mut line)? > 0, "sshd did not start");
        }
        std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
        Ok(Self { _process: process, place, port })
    }

    /// What lets `ssh` in, unasked.
    pub(crate) fn options(&self) -> Vec<String> {
        let path = |name: &str| self.place.path().join(name).display().to_string();
        let known = format!("UserKnownHostsFile={}", path("known_hosts"));
        let key = path("key");
        let options =
            ["-F", "none", "-i", &key, "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=accept-new"];
        let more = ["-o", &known, "-o", "ConnectTimeout=30"];
        options.iter().chain(&more).map(|option| (*option).to_owned()).collect()
    }
}

fn ssh() -> anyhow::Result<()> {
    let (world, a, b) = friends()?;
    let server = SshServer::start(&b, None)?;
    let port = server.port.to_string();
    let _listener = listen(&world, &b, &["--allow-forward", &format!("localhost:{port}")])?;
    let proxy = format!("ProxyCommand={} ssh-proxy %h %p", binary("peer")?.display());
    let mut ssh = a.command("ssh");
    ssh.args(server.options()).args(["-o", &proxy, "-p", &port, "root@nas"]);
    ssh.arg("head -c 1000000 /dev/zero | wc -c; hostname >/dev/null; exit 7");
    let output = ssh.envs(world.home("laptop")?).env_remove("PEER_SERVER").env_remove("PEER_KEY").output()?;
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(7), "{}: {words}", output.status);
    ensure!(output.stdout == b"1000000\n", "{:?}: {words}", String::from_utf8_lossy(&output.stdout));
    Ok(())
}

fn ping(kind: RouterKind, way: &str) -> anyhow::Result<()> {
    let (world, a, b) = friends_behind(kind, SITE_DELAY)?;
    let _listener = listen(&world, &b, &["--echo"])?;
    let mut peer = world.person(&a, "laptop", &["ping", "nas", "--count", "20", "--interval", "0.1"])?;
    let mut text = String::new();
    peer.stdout()?.read_to_string(&mut text)?;
    ensure!(peer.wait(PATIENCE)?.success());
    let lines = text.lines().map(serde_json::from_str).collect::<Result<Vec<serde_json::Value>, _>>()?;
    let answered = lines.iter().filter(|line| line["event"] == "pong").count();
    ensure!(answered >= 15, "{text}");
    let summaries: Vec<_> = lines.iter().filter(|line| line["event"] == "summary").collect();
    let sent: u64 = summaries.iter().filter_map(|line| line["sent"].as_u64()).sum();
    ensure!(sent == 20, "{text}");
    let of_way = |line: &&&serde_json::Value| line["path"].as_str().is_some_and(|path| path.starts_with(way));
    let summary = summaries.iter().find(of_way).with_context(|| format!("no {way} path: {text}"))?;
    // 40 ms from site to site and back, over the server as well, whatever the machine adds.
    let least = summary["rtt_ms"][0].as_f64().context("an RTT")?;
    ensure!((79.0..1000.0).contains(&least), "{summary}");
    Ok(())
}
