//! Channels of a TURN server (RFC 8656), without credentials.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context as _, bail, ensure};

use super::lanes::{Lane, Socket};

const COOKIE: u32 = 0x2112_a442;
const ALLOCATE: u16 = 0x0003;
const CHANNEL_BIND: u16 = 0x0009;
const SUCCESS: u16 = 0x0100;
const REQUESTED_TRANSPORT: u16 = 0x0019;
const CHANNEL_NUMBER: u16 = 0x000c;
const XOR_PEER_ADDRESS: u16 = 0x0012;
const CHANNEL: u16 = 0x4000;

/// A lane from an allocation's client over its channel to a peer. The payload must always be of `payload` bytes, a multiple of 4.
///
/// # Errors
///
/// When the server refuses.
pub fn lane(server: SocketAddr, payload: usize) -> anyhow::Result<Lane> {
    let here = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let (from, into) = (Socket::bind(here)?, Socket::bind(here)?);
    // UDP is protocol 17.
    ask(&from, server, ALLOCATE, &[(REQUESTED_TRANSPORT, &[17, 0, 0, 0])])?;
    let SocketAddr::V4(peer) = into.address()? else { bail!("an IPv4 socket has an IPv4 address") };
    let port = peer.port() ^ (COOKIE >> 16) as u16;
    let ip = u32::from(*peer.ip()) ^ COOKIE;
    let address = [&[0, 1][..], &port.to_be_bytes(), &ip.to_be_bytes()].concat();
    let [high, low] = CHANNEL.to_be_bytes();
    ask(&from, server, CHANNEL_BIND, &[(CHANNEL_NUMBER, &[high, low, 0, 0]), (XOR_PEER_ADDRESS, &address)])?;
    let length = u16::try_from(payload)?.to_be_bytes();
    Ok(Lane { from, to: server, header: [high, low, length[0], length[1]], into })
}

fn ask(socket: &Socket, server: SocketAddr, method: u16, attributes: &[(u16, &[u8])]) -> anyhow::Result<()> {
    let mut body = Vec::new();
    for (kind, value) in attributes {
        body.extend_from_slice(&kind.to_be_bytes());
        body.extend_from_slice(&u16::try_from(value.len())?.to_be_bytes());
        body.extend_from_slice(value);
    }
    let mut request = method.to_be_bytes().to_vec();
    request.extend_from_slice(&u16::try_from(body.len())?.to_be_bytes());
    request.extend_from_slice(&COOKIE.to_be_bytes());
    request.extend_from_slice(&rand::random::<[u8; 12]>());
    request.extend_from_slice(&body);
    let answer = socket.ask(server, &request)?;
    let kind = u16::from_be_bytes(*answer.first_chunk().context("an answer")?);
    ensure!(kind == method | SUCCESS, "the TURN server refuses: {answer:02x?}");
    Ok(())
}
