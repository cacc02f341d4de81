//! The programs that are held against each other.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use tempfile::TempDir;

use super::lanes::{Lane, Socket};
use super::registrar::Registrar;
use super::subject::{Place, Subject};
use super::turn;
use crate::process::binary;

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// A program under test with lanes through it.
pub struct Contender {
    /// As it is called in the results.
    pub name: &'static str,
    /// The program.
    pub subject: Subject,
    /// Through it.
    pub lanes: Vec<Lane>,
    /// Where it answers Binding requests.
    pub stun: SocketAddr,
    /// Whether its Binding requests come from ever new addresses, as a public server's do.
    pub strangers: bool,
    turn: bool,
    _registrar: Option<Registrar>,
    _state: Option<TempDir>,
}

/// Registrations from one address: as many homes behind one carrier NAT, and few enough for sixteen introductions a second of each.
const PER_SOURCE: usize = 16;

/// Our server's process, with what a peer must know.
pub struct Server {
    /// The process.
    pub subject: Subject,
    /// A client of it.
    pub registrar: Registrar,
    /// The TCP port for streams.
    pub tls_port: u16,
    state: TempDir,
}

impl Server {
    /// Starts `rendezvous serve` on free ports of 127.0.0.1.
    ///
    /// # Errors
    ///
    /// When it does not get ready.
    pub fn start(place: Place, threads: usize) -> anyhow::Result<Self> {
        let state = TempDir::new()?;
        let directory = state.path().to_str().context("a temporary path in UTF-8")?;
        let threads = threads.to_string();
        let arguments = [
            "serve",
            "--json",
            "--state-dir",
            directory,
            "--listen",
            "127.0.0.1",
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--reflection-ports",
            "0,0",
            "--relay-threads",
            &threads,
        ];
        let mut subject = Subject::start(&binary("rendezvous")?, &arguments, place)?;
        let ready: Value = serde_json::from_str(&subject.line()?)?;
        let address = ready["address"].as_str().context("an address")?.parse()?;
        let reflection = ready["reflection_ports"][0].as_u64().context("a port")?;
        let tls_port = u16::try_from(ready["tls_port"].as_u64().context("a TCP port")?)?;
        let registrar = Registrar::new(address, u16::try_from(reflection)?, PER_SOURCE)?;
        Ok(Self { subject, registrar, tls_port, state })
    }

    /// Stops it; what it has counted.
    ///
    /// # Errors
    ///
    /// When it does not tell.
    pub fn stop(self) -> anyhow::Result<Value> {
        let Self { mut subject, registrar, state, .. } = self;
        subject.terminate()?;
        let stopped: Value = serde_json::from_str(&subject.line()?)?;
        drop((registrar, state));
        Ok(stopped["relay"].clone())
    }
}

impl Contender {
    /// Our server with this many relay threads, and registrations, bindings and introductions for the lanes.
    ///
    /// # Errors
    ///
    /// When the server does not start, or refuses.
    pub fn ours(place: Place, threads: usize, lanes: usize) -> anyhow::Result<Self> {
        let Server { subject, mut registrar, state, .. } = Server::start(place, threads)?;
        let lanes = (0..lanes).map(|_| registrar.lane()).collect::<anyhow::Result<_>>()?;
        let stun = registrar.relay;
        let (registrar, state) = (Some(registrar), Some(state));
        Ok(Self {
            name: "rendezvous",
            subject,
            lanes,
            stun,
            strangers: true,
            turn: false,
            _registrar: registrar,
            _state: state,
        })
    }

    /// The bare forwarder.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub fn bare(place: Place, gro: bool, lanes: usize) -> anyhow::Result<Self> {
        let arguments: &[&str] = if gro { &["relay", "--gro"] } else { &["relay"] };
        let mut subject = Subject::start(&binary("bare")?, arguments, place)?;
        let to = SocketAddr::new(HERE, subject.line()?.parse()?);
        let mut channels = String::new();
        let mut made = Vec::new();
        for number in 0..u32::try_from(lanes)? {
            let (from, into) = (Socket::bind(HERE)?, Socket::bind(HERE)?);
            channels.push_str(&format!("{number} {} {}\n", from.address()?, into.address()?));
            let [_, a, b, c] = number.to_be_bytes();
            made.push(Lane { from, to, header: [0x20, a, b, c], into });
        }
        subject.tell(&channels)?;
        ensure!(subject.line()? == "ready", "the bare forwarder does not forward");
        let name = if gro { "bare GRO/GSO" } else { "bare mmsg" };
        Ok(Self {
            name,
            subject,
            lanes: made,
            stun: to,
            strangers: true,
            turn: false,
            _registrar: None,
            _state: None,
        })
    }

    /// The bare STUN responder.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub fn responder(place: Place) -> anyhow::Result<Self> {
        let mut subject = Subject::start(&binary("bare")?, &["stun"], place)?;
        let stun = SocketAddr::new(HERE, subject.line()?.parse()?);
        let lanes = Vec::new();
        Ok(Self {
            name: "bare mmsg",
            subject,
            lanes,
            stun,
            strangers: true,
            turn: false,
            _registrar: None,
            _state: None,
        })
    }

    /// coturn as its defaults are, with one relay thread, UDP alone and without credentials; lanes over its channels.
    ///
    /// # Errors
    ///
    /// When it is not installed, does not answer, or refuses.
    pub fn coturn(place: Place, lanes: usize) -> anyhow::Result<Self> {
        let state = TempDir::new()?;
        let directory = state.path().to_str().context("a temporary path in UTF-8")?;
        let stun = SocketAddr::new(HERE, free_port()?);
        let (port, log, pid, database) = (
            stun.port().to_string(),
            format!("{directory}/log"),
            format!("{directory}/pid"),
            format!("{directory}/db"),
        );
        let arguments = [
            "-n",
            "--no-auth",
            "--no-cli",
            "--no-tls",
            "--no-dtls",
            "--no-tcp",
            "--allow-loopback-peers",
            "-m",
            "1",
            "--listening-ip",
            "127.0.0.1",
            "--relay-ip",
            "127.0.0.1",
            "--listening-port",
            &port,
            "--simple-log",
            "--log-file",
            &log,
            "--no-stdout-log",
            "--pidfile",
            &pid,
            "--userdb",
            &database,
        ];
        let mut subject = Subject::start("turnserver".as_ref(), &arguments, place)?;
        subject.drain();
        // It tells nobody when it is ready. A datagram to a port without a socket is lost, and so is asked again.
        let probe = Socket::bind(HERE)?;
        let request = *b"\0\x01\0\0\x21\x12\xa4\x42............";
        let soon = Duration::from_millis(50);
        let answered = (0..400).any(|_| probe.ask_within(soon, stun, &request).is_ok());
        ensure!(answered, "turnserver does not answer");
        let lanes = (0..lanes).map(|_| turn::lane(stun, 64)).collect::<anyhow::Result<_>>()?;
        Ok(Self {
            name: "coturn",
            subject,
            lanes,
            stun,
            strangers: true,
            turn: true,
            _registrar: None,
            _state: Some(state),
        })
    }

    /// Prepares the lanes for this payload: TURN's header tells its length.
    pub fn set_payload(&mut self, payload: usize) {
        if self.turn {
            for lane in &mut self.lanes {
                lane.header[2..].copy_from_slice(&(payload as u16).to_be_bytes());
            }
        }
    }

    /// Whether it coalesces and segments.
    pub fn batches(&self) -> bool {
        !self.turn && self.name != "bare mmsg"
    }
}

fn free_port() -> std::io::Result<u16> {
    Ok(std::net::UdpSocket::bind((HERE, 0))?.local_addr()?.port())
}
