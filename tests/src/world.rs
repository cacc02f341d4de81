//! A lab with a rendezvous server in it.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use netsim::{Host, Lab};
use tempfile::TempDir;

use crate::process::Program;

/// One-way delay of a site's line, unless a test needs another: 20 ms to the middle, 40 ms from site to site.
pub const SITE_DELAY: Duration = Duration::from_millis(20);

/// What the server's host is called where it has a name.
pub const SERVER_NAME: &str = "rendezvous.example";

/// A lab, a rendezvous server on its internet, and a place for keys.
pub struct World {
    /// The lab; sites are added to it.
    pub lab: Lab,
    /// The server's host.
    pub server_host: Host,
    /// The server.
    pub server: Program,
    /// The server's `rv://` address.
    pub address: String,
    directory: TempDir,
}

impl World {
    /// Starts the server and waits until it is ready.
    ///
    /// # Errors
    ///
    /// When the lab or the server cannot be started.
    pub fn new(seed: u64) -> anyhow::Result<Self> {
        Self::start(seed, true, false)
    }

    /// The same with a server whose `rv://` address names it in both families.
    ///
    /// # Errors
    ///
    /// When the lab or the server cannot be started.
    pub fn of_both_families(seed: u64) -> anyhow::Result<Self> {
        Self::start(seed, true, true)
    }

    /// The same with a server that knows of one of its host's addresses only.
    ///
    /// # Errors
    ///
    /// When the lab or the server cannot be started.
    pub fn with_one_address(seed: u64) -> anyhow::Result<Self> {
        Self::start(seed, false, false)
    }

    fn start(seed: u64, two_addresses: bool, both_families: bool) -> anyhow::Result<Self> {
        let directory = TempDir::new()?;
        let mut lab = Lab::new(seed)?;
        let server_host = lab.add_server("rendezvous")?;
        let (server, mut address) =
            start_server(&server_host, &directory.path().join("server"), two_addresses)?;
        if both_families {
            let ipv6 = server_host.ipv6().context("servers have IPv6")?;
            address = format!("{address},[{ipv6}]");
        }
        Ok(Self { lab, server_host, server, address, directory })
    }

    /// Kills the server without a word and starts it again with the same key.
    ///
    /// # Errors
    ///
    /// When it does not get ready again.
    pub fn restart_server(&mut self) -> anyhow::Result<()> {
        self.kill_server()?;
        self.start_server_again()
    }

    /// Kills the server without a word.
    ///
    /// # Errors
    ///
    /// When it does not end.
    pub fn kill_server(&mut self) -> anyhow::Result<()> {
        self.server.signal(nix::sys::signal::Signal::SIGKILL)?;
        self.server.wait(crate::process::PATIENCE)?;
        Ok(())
    }

    /// Has the server run by this configuration from now on.
    ///
    /// # Errors
    ///
    /// When it does not get ready again.
    pub fn configure_server(&mut self, config: &str) -> anyhow::Result<()> {
        self.kill_server()?;
        let path = self.directory.path().join("rendezvous.toml");
        std::fs::write(&path, config)?;
        let path = path.to_str().context("a temporary path in UTF-8")?;
        let state = self.server_state();
        let (server, _) = start_server_with(&self.server_host, &state, true, &["--config", path])?;
        self.server = server;
        Ok(())
    }

    /// Where the server keeps its key and its store.
    pub fn server_state(&self) -> PathBuf {
        self.directory.path().join("server")
    }

    /// Tells the server to stop, and waits until it has.
    ///
    /// # Errors
    ///
    /// When it does not end.
    pub fn stop_server(&mut self) -> anyhow::Result<()> {
        self.server.signal(nix::sys::signal::Signal::SIGTERM)?;
        self.server.wait(crate::process::PATIENCE)?;
        Ok(())
    }

    /// Starts a server that has been killed, with the same key.
    ///
    /// # Errors
    ///
    /// When it does not get ready again.
    pub fn start_server_again(&mut self) -> anyhow::Result<()> {
        let (server, address) = start_server(&self.server_host, &self.directory.path().join("server"), true)?;
        anyhow::ensure!(address == self.address, "another address after the restart: {address}");
        self.server = server;
        Ok(())
    }

    /// One more server, on a host of its own; it and its address.
    ///
    /// # Errors
    ///
    /// When it does not get ready.
    pub fn another_server(&mut self, name: &str) -> anyhow::Result<(Program, String)> {
        let host = self.lab.add_server(name)?;
        start_server(&host, &self.directory.path().join(name), true)
    }

    /// The key file of a peer.
    pub fn key(&self, name: &str) -> PathBuf {
        self.directory.path().join(name).join("key.pem")
    }

    /// Starts `peer` with this world's server and the key of `name`; `arguments` begin with the command.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn peer(&self, host: &Host, name: &str, arguments: &[&str]) -> anyhow::Result<Program> {
        self.peer_with_server(host, name, &self.address, arguments)
    }

    /// The same with a server address of the caller's choice.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn peer_with_server(
        &self,
        host: &Host,
        name: &str,
        server: &str,
        arguments: &[&str],
    ) -> anyhow::Result<Program> {
        self.peer_in(host, name, server, arguments, &[])
    }

    /// The same with these variables in its environment.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn peer_in(
        &self,
        host: &Host,
        name: &str,
        server: &str,
        arguments: &[&str],
        environment: &[(&str, &str)],
    ) -> anyhow::Result<Program> {
        let key = self.key(name);
        let key = key.to_str().context("a temporary path in UTF-8")?;
        let home = self.home(name)?;
        let environment: Vec<_> = home
            .iter()
            .map(|(name, path)| (*name, path.as_str()))
            .chain(environment.iter().copied())
            .collect();
        Program::start_in(host, "peer", &with_server(arguments, server, key), true, &environment)
    }

    /// The variables that give `name` a home of its own.
    ///
    /// # Errors
    ///
    /// Never where temporary paths are in UTF-8.
    pub fn home(&self, name: &str) -> anyhow::Result<[(&'static str, String); 4]> {
        let place = |part: &str| {
            let path = self.directory.path().join(name).join(part);
            path.to_str().map(str::to_owned).context("a temporary path in UTF-8")
        };
        let names = [
            ("XDG_CONFIG_HOME", "config"),
            ("XDG_DATA_HOME", "data"),
            ("XDG_STATE_HOME", "state"),
            ("XDG_RUNTIME_DIR", "run"),
        ];
        let [config, data, state, run] = names.map(|(name, part)| place(part).map(|path| (name, path)));
        Ok([config?, data?, state?, run?])
    }

    /// Starts `peer` as a person does who has set it up, with nothing but `--json` added; `arguments` begin with the command.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn person(&self, host: &Host, name: &str, arguments: &[&str]) -> anyhow::Result<Program> {
        let home = self.home(name)?;
        let environment: Vec<_> = home.iter().map(|(name, path)| (*name, path.as_str())).collect();
        let arguments = [&[arguments[0], "--json"], &arguments[1..]].concat();
        Program::start_in(host, "peer", &arguments, true, &environment)
    }

    /// Runs `peer` to its end as a person does, with nothing added.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn run(&self, host: &Host, name: &str, arguments: &[&str]) -> anyhow::Result<std::process::Output> {
        let mut command = host.command(crate::process::binary("peer")?);
        command.args(arguments).envs(self.home(name)?);
        for variable in ["PEER_SERVER", "PEER_KEY", "PEER_CONTROL", "RUST_LOG", "HTTPS_PROXY", "https_proxy"]
        {
            command.env_remove(variable);
        }
        Ok(command.output()?)
    }

    /// Runs `peer` to its end, which must be a good one; its standard output without the last line's end.
    ///
    /// # Errors
    ///
    /// When it cannot be started or fails.
    pub fn done(&self, host: &Host, name: &str, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.run(host, name, arguments)?;
        let (words, said) = (String::from_utf8(output.stdout)?, String::from_utf8_lossy(&output.stderr));
        anyhow::ensure!(output.status.success(), "peer {}: {}: {said}", arguments.join(" "), output.status);
        Ok(words.trim_end().to_owned())
    }

    /// The same where the server goes by the name of [`SERVER_NAME`], which has these addresses.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn peer_with_server_name(
        &self,
        host: &Host,
        name: &str,
        addresses: &[IpAddr],
        arguments: &[&str],
    ) -> anyhow::Result<Program> {
        let hosts = self.directory.path().join(format!("{name}.hosts"));
        let lines: Vec<String> =
            addresses.iter().map(|address| format!("{address} {SERVER_NAME}\n")).collect();
        std::fs::write(&hosts, lines.concat())?;
        let (id, _) = self.address.split_once('@').context("an address with @")?;
        let (server, key) = (format!("{id}@{SERVER_NAME}"), self.key(name));
        let key = key.to_str().context("a temporary path in UTF-8")?;
        Program::start_with_hosts(host, &hosts, "peer", &with_server(arguments, &server, key), true)
    }

    /// Starts a listener and waits until it is registered; its id.
    ///
    /// # Errors
    ///
    /// When it does not register.
    pub fn listener(&self, host: &Host, name: &str, arguments: &[&str]) -> anyhow::Result<(Program, String)> {
        let all: Vec<&str> = ["listen"].iter().chain(arguments).copied().collect();
        let mut program = self.peer(host, name, &all)?;
        let id = program.named("listening")?["id"].as_str().context("an id")?.to_owned();
        Ok((program, id))
    }
}

fn with_server<'a>(arguments: &[&'a str], server: &'a str, key: &'a str) -> Vec<&'a str> {
    [&[arguments[0], "--json", "--server", server, "--key", key], &arguments[1..]].concat()
}

/// Starts `rendezvous serve` and waits until it says its address. With both addresses of its host it can have behaviour discovery
/// answered from either.
///
/// # Errors
///
/// When it does not get ready.
pub fn start_server(
    host: &Host,
    state: &std::path::Path,
    two_addresses: bool,
) -> anyhow::Result<(Program, String)> {
    start_server_with(host, state, two_addresses, &[])
}

fn start_server_with(
    host: &Host,
    state: &std::path::Path,
    two_addresses: bool,
    more: &[&str],
) -> anyhow::Result<(Program, String)> {
    let state = state.to_str().context("a temporary path in UTF-8")?;
    let ip = host.ipv4().to_string();
    let second = [host.second_ipv4().map(IpAddr::from), host.second_ipv6().map(IpAddr::from)];
    let second: Vec<String> = second.into_iter().flatten().map(|ip| ip.to_string()).collect();
    let second = second.join(",");
    let mut arguments = vec!["serve", "--json", "--state-dir", state, "--host", &ip];
    if two_addresses {
        arguments.extend(["--alternate-ip", &second]);
    }
    arguments.extend(more);
    let mut server = Program::start(host, "rendezvous", &arguments, false)?;
    let address = server.named("ready")?["address"].as_str().context("an address")?.to_owned();
    Ok((server, address))
}
