//! A SOCKS5 listener (RFC 1928): CONNECT and UDP ASSOCIATE, without authentication. The other side resolves names.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use bytes::Bytes;
use fast_socks5::server::Socks5ServerProtocol;
use fast_socks5::util::target_addr::TargetAddr;
use fast_socks5::{ReplyError, Socks5Command, UdpHeaderError, new_udp_header, parse_udp_request};
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::datagrams::{MAX_DATAGRAM, Sink};
use super::link::{Link, To};
use super::listen::{Flows, Listener, Opener as _, answered, carry_datagrams};
use super::spec::{Protocol, Target};
use super::{Notice, Observer, streams};
use crate::service::{Cause, RequestError};

/// Clients at a time; further ones wait in the kernel's queue.
const MAX_CLIENTS: usize = 1024;

/// How long a client may take to say what it wants.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(10);

/// Takes clients, for ever.
pub(super) async fn run(listener: Listener, link: Link, observer: Observer) {
    let Some(listener) = listener.into_tcp() else { return };
    let room = Arc::new(Semaphore::new(MAX_CLIENTS));
    let mut clients = JoinSet::new();
    loop {
        while clients.try_join_next().is_some() {}
        let Ok(permit) = room.clone().acquire_owned().await else { return };
        let Ok((socket, _)) = listener.accept().await else {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            continue;
        };
        let (link, observer) = (link.clone(), observer.clone());
        clients.spawn(async move {
            let _permit = permit;
            if let Err(error) = serve(socket, link, observer).await {
                tracing::debug!(%error, "a SOCKS5 client's connection ended early");
            }
        });
    }
}

type Outcome = Result<(), Box<dyn std::error::Error + Send + Sync>>;

async fn serve(socket: TcpStream, link: Link, observer: Observer) -> Outcome {
    socket.set_nodelay(true)?;
    let (local, client) = (socket.local_addr()?, socket.peer_addr()?);
    let greeting = async {
        let protocol = Socks5ServerProtocol::accept_no_auth(socket).await?;
        protocol.read_command().await
    };
    let late = |_| io::Error::from(io::ErrorKind::TimedOut);
    let (protocol, command, address) = tokio::time::timeout(PATIENCE, greeting).await.map_err(late)??;
    match command {
        Socks5Command::TCPConnect => {
            let Some(target) = target(Protocol::Tcp, &address) else {
                return Ok(protocol.reply_error(&ReplyError::AddressTypeNotSupported).await?);
            };
            let to = To { link, target: Arc::new(target) };
            let opened = async {
                let mut exchange = to.open().await?;
                answered(&mut exchange.receive, &to).await?;
                Ok::<_, RequestError>(exchange)
            };
            match opened.await {
                Ok(exchange) => {
                    // The address at the other side is its own affair.
                    let socket = protocol.reply_success(unspecified(local)).await?;
                    streams::join(socket, exchange.send, exchange.receive, streams::AtOnce).await?;
                }
                Err(error) => {
                    protocol.reply_error(&reply(&error)).await?;
                    observer.notice(Notice::NotForwarded { to: to.shown(), error });
                }
            }
        }
        Socks5Command::UDPAssociate => {
            let relay = Arc::new(UdpSocket::bind((local.ip(), 0)).await?);
            let mut socket = protocol.reply_success(relay.local_addr()?).await?;
            let mut byte = [0];
            // The association lasts as long as the connection (section 6).
            tokio::select! {
                () = associate(relay, client.ip(), &link, &observer) => {}
                _ = socket.read(&mut byte) => {}
            }
        }
        Socks5Command::TCPBind => protocol.reply_error(&ReplyError::CommandNotSupported).await?,
    }
    Ok(())
}

/// What a client is told of an address that it has no use for.
fn unspecified(local: SocketAddr) -> SocketAddr {
    let ip: IpAddr =
        if local.is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    SocketAddr::new(ip, 0)
}

fn target(protocol: Protocol, address: &TargetAddr) -> Option<Target> {
    let (host, port) = match address {
        TargetAddr::Ip(address) => (address.ip().to_string(), address.port()),
        TargetAddr::Domain(name, port) => (name.clone(), *port),
    };
    let target = Target::Host { protocol, host, port };
    target.is_sound().then_some(target)
}

/// Section 6.
fn reply(error: &RequestError) -> ReplyError {
    match error {
        RequestError::Refused => ReplyError::ConnectionNotAllowed,
        RequestError::Failed(Cause::ConnectionRefused) => ReplyError::ConnectionRefused,
        RequestError::Failed(Cause::Unreachable | Cause::NotFound) => ReplyError::HostUnreachable,
        RequestError::Failed(Cause::TimedOut) => ReplyError::ConnectionTimeout,
        RequestError::Failed(_) => ReplyError::GeneralFailure,
        RequestError::Session => ReplyError::NetworkUnreachable,
    }
}

/// Carries a client's datagrams (section 7), a flow for each target. The first datagram from the client's address fixes its port.
async fn associate(relay: Arc<UdpSocket>, client: IpAddr, link: &Link, observer: &Observer) {
    let mut flows = Flows::new();
    let mut buffer = vec![0; MAX_DATAGRAM];
    let mut source = None;
    loop {
        let Ok((length, from)) = relay.recv_from(&mut buffer).await else { continue };
        if from.ip() != client || *source.get_or_insert(from) != from {
            continue;
        }
        // Fragments are dropped, as the section allows.
        let Ok((0, address, payload)) = parse_udp_request(&buffer[..length]).await else { continue };
        let Some(target) = target(Protocol::Udp, &address) else { continue };
        let Ok(header) = header(&address) else { continue };
        flows.give(&target, Bytes::copy_from_slice(payload), |queue| {
            let to = To { link: link.clone(), target: Arc::new(target.clone()) };
            carry_datagrams(queue, Back { relay: relay.clone(), client: from, header }, to, observer.clone())
        });
    }
}

fn header(address: &TargetAddr) -> Result<Vec<u8>, UdpHeaderError> {
    match address {
        TargetAddr::Ip(address) => new_udp_header(*address),
        TargetAddr::Domain(name, port) => new_udp_header((name.as_str(), *port)),
    }
}

/// Back to a client, with the target's address in front.
struct Back {
    relay: Arc<UdpSocket>,
    client: SocketAddr,
    header: Vec<u8>,
}

impl Sink for Back {
    async fn send(&self, payload: &[u8]) -> io::Result<()> {
        let datagram = [&self.header, payload].concat();
        self.relay.send_to(&datagram, self.client).await.map(|_| ())
    }
}
