//! Whether a rendezvous server can be registered with, over QUIC and under its own key.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::{Connection, ConnectionError, Endpoint};
use rendezvous_wire::candidate::Mapping;
use rendezvous_wire::message::{
    Decoder, IntroductionPolicy, Notice, Register, Registered, Request, close_code, encode,
};
use rendezvous_wire::{KeyPair, RendezvousAddress, SIGNALLING_ALPN, tls};
use tokio::task::JoinSet;

use crate::link::is_wrong_key;
use crate::resolve::ATTEMPT_DELAY;
use crate::signalling::ServerError;

/// How long one address may take.
const PATIENCE: Duration = Duration::from_secs(3);

/// A registration that worked, already ended again.
#[derive(Debug, Clone)]
pub(super) struct Signalling {
    /// Where the server answered.
    pub(super) address: SocketAddr,
    pub(super) rtt: Duration,
    pub(super) registered: Registered,
}

/// Registers under a key made for this, so that a running peer's own registration is left alone.
pub(super) async fn register(
    server: &RendezvousAddress,
    addresses: &[SocketAddr],
) -> Result<Signalling, ServerError> {
    let mut attempts = JoinSet::new();
    for (order, address) in addresses.iter().copied().enumerate() {
        let server = server.clone();
        attempts.spawn(async move {
            tokio::time::sleep(ATTEMPT_DELAY * order as u32).await;
            tokio::time::timeout(PATIENCE, attempt(&server, address)).await.ok()?
        });
    }
    let mut failure = ServerError::Unreachable { host: server.host.clone(), port: server.port };
    while let Some(attempt) = attempts.join_next().await {
        match attempt {
            Ok(Some(Ok(signalling))) => return Ok(signalling),
            Ok(Some(Err(error))) => failure = error,
            Ok(None) | Err(_) => {}
        }
    }
    Err(failure)
}

/// `None`: nothing came back.
async fn attempt(server: &RendezvousAddress, address: SocketAddr) -> Option<Result<Signalling, ServerError>> {
    let key = KeyPair::generate().ok()?;
    let any: SocketAddr = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().ok()?;
    let endpoint = Endpoint::client(any).ok()?;
    let tls = tls::client_config(&key, server.id, SIGNALLING_ALPN).ok()?;
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls).ok()?;
    let config = quinn::ClientConfig::new(Arc::new(crypto));
    let start = Instant::now();
    let host = server.host.clone();
    let connection = match endpoint.connect_with(config, address, "rendezvous").ok()?.await {
        Ok(connection) => connection,
        Err(error) if is_wrong_key(&error) => {
            return Some(Err(ServerError::WrongKey { host, id: server.id }));
        }
        Err(ConnectionError::ApplicationClosed(close)) => {
            return Some(Err(refused(host, &close.reason)));
        }
        Err(_) => return None,
    };
    let rtt = connection.rtt().min(start.elapsed());
    let registered = exchange(&connection).await;
    let result = match (registered, connection.close_reason()) {
        (Ok(registered), _) => Ok(Signalling { address, rtt, registered }),
        (Err(_), Some(ConnectionError::ApplicationClosed(close))) => Err(refused(host, &close.reason)),
        (Err(cause), _) => Err(ServerError::Lost { host, cause }),
    };
    connection.close(close_code::SHUTDOWN.into(), b"");
    endpoint.wait_idle().await;
    Some(result)
}

fn refused(host: String, reason: &[u8]) -> ServerError {
    ServerError::Refused { host, reason: String::from_utf8_lossy(reason).into_owned() }
}

/// Registers, admitting nobody.
async fn exchange(connection: &Connection) -> Result<Registered, String> {
    let register = Register {
        instance: rand::random(),
        candidates: Vec::new(),
        mapping: Mapping::Unknown,
        policy: IntroductionPolicy::Only(Vec::new()),
    };
    let words = |error: &dyn std::fmt::Display| error.to_string();
    let (mut send, mut receive) = connection.open_bi().await.map_err(|error| words(&error))?;
    let bytes = encode(&Request::Register(register)).map_err(|error| words(&error))?;
    send.write_all(&bytes).await.map_err(|error| words(&error))?;
    let mut decoder = Decoder::default();
    loop {
        match receive.read_chunk(16 * 1024, true).await.map_err(|error| words(&error))? {
            Some(chunk) => decoder.extend(&chunk.bytes),
            None => return Err("the server ended the stream".to_owned()),
        }
        while let Some(notice) = decoder.poll::<Notice>().map_err(|error| words(&error))? {
            if let Notice::Registered(registered) = notice {
                return Ok(registered);
            }
        }
    }
}
