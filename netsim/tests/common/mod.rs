//! What the tests share.
#![allow(dead_code, reason = "each test program uses a part")]

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::ExitCode;
use std::time::Duration;

use libtest_mimic::{Arguments, Failed, Trial};
use netsim::Host;

/// Longer than anything in a lab takes that happens at all.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);
/// How long to wait for what may not happen; ways without a line's delay take well below a millisecond, and a busy machine adds to that.
pub(crate) const SILENCE: Duration = Duration::from_millis(500);

pub(crate) type TestResult = Result<(), Box<dyn std::error::Error>>;

/// A trial from a function that may fail.
pub(crate) fn trial(name: impl Into<String>, test: impl FnOnce() -> TestResult + Send + 'static) -> Trial {
    Trial::test(name, || test().map_err(|error| Failed::from(error.to_string())))
}

/// Runs trials; to be called after `enter_user_namespace`.
pub(crate) fn run(trials: Vec<Trial>) -> ExitCode {
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// A UDP socket in a host that waits for [`PATIENCE`].
pub(crate) fn udp(host: &Host, address: impl Into<IpAddr>, port: u16) -> UdpSocket {
    let address = SocketAddr::new(address.into(), port);
    let socket = host.run(|| UdpSocket::bind(address)).expect("the host has this address");
    socket.set_read_timeout(Some(PATIENCE)).expect("not zero");
    socket
}

/// What arrives at a socket, and from where.
pub(crate) fn receive(socket: &UdpSocket) -> std::io::Result<(Vec<u8>, SocketAddr)> {
    let mut buffer = vec![0; 2048];
    let (length, from) = socket.recv_from(&mut buffer)?;
    buffer.truncate(length);
    Ok((buffer, from))
}

/// Whether nothing arrives at a socket.
pub(crate) fn is_silent(socket: &UdpSocket) -> bool {
    socket.set_read_timeout(Some(SILENCE)).expect("not zero");
    let silent = receive(socket).is_err();
    socket.set_read_timeout(Some(PATIENCE)).expect("not zero");
    silent
}
