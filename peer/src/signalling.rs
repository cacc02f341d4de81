//! The signalling connection to one rendezvous server: connects, registers, carries messages, comes back when it is lost.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::{Connection, ConnectionError, RecvStream, SendStream, VarInt};
use rand::Rng as _;
use rendezvous_wire::message::{Decoder, Notice, Registered, Request, close_code, encode};
use rendezvous_wire::{KeyPair, RendezvousAddress, SIGNALLING_ALPN, tls};
use tokio::sync::{Notify, mpsc, oneshot};

use crate::driver::Event;
use crate::resolve::{ATTEMPT_DELAY, has_route, resolve};

/// How long one server address may take to finish a handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// First and longest pause before the next try; each is drawn from half to one and a half times its value, so that peers of a restarted
/// server do not come back all at once.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// QUIC keep-alive of the signalling connection, under the shortest common binding lifetime of 30 s.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// The connection is given up after this long without a word (three keep-alives).
const IDLE: Duration = Duration::from_secs(45);

/// Why a rendezvous server cannot be used at present.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// The host name has no address.
    #[error("{host} cannot be resolved: {cause}. Check the name, and that DNS works here")]
    Resolve {
        /// The name.
        host: String,
        /// What the resolver said.
        cause: String,
    },
    /// Nothing came back.
    #[error(
        "no answer from {host} on UDP port {port}. Is `rendezvous serve` running there, and is that UDP port open in its firewall and not blocked in this network?"
    )]
    Unreachable {
        /// The server's host.
        host: String,
        /// Its signalling port.
        port: u16,
    },
    /// Somebody answered who does not hold the server's key.
    #[error(
        "{host} answers, but with another key than {id}. Its key has changed, the address is wrong, or somebody is in between; compare with the rv:// address that `rendezvous` printed on its start"
    )]
    WrongKey {
        /// The server's host.
        host: String,
        /// The key that was expected.
        id: rendezvous_wire::PeerId,
    },
    /// The server closed the connection and said why.
    #[error("the rendezvous server at {host} refused: {reason}")]
    Refused {
        /// The server's host.
        host: String,
        /// The server's own words.
        reason: String,
    },
    /// The connection broke.
    #[error("the connection to the rendezvous server at {host} was lost: {cause}")]
    Lost {
        /// The server's host.
        host: String,
        /// What QUIC said.
        cause: String,
    },
}

/// Where a server is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// Where the signalling connection goes.
    pub(crate) signalling: SocketAddr,
    /// An address of the other family, where it has one. That it can be reached is not known.
    pub(crate) other: Option<SocketAddr>,
}

/// What the driver and a signalling task need of each other.
pub(crate) struct Signalling {
    pub(crate) index: usize,
    pub(crate) address: RendezvousAddress,
    pub(crate) identity: Arc<KeyPair>,
    pub(crate) quinn: quinn::Endpoint,
    pub(crate) events: mpsc::Sender<Event>,
    pub(crate) requests: mpsc::Receiver<Request>,
    /// The registration has turned out to be void.
    pub(crate) void: Arc<Notify>,
}

/// Whether the handshake failed over a key: QUIC carries TLS alerts as 0x100 + alert (RFC 9001, section 4.8), and 42 to 49 are
/// about certificates.
pub(crate) fn is_wrong_key(error: &ConnectionError) -> bool {
    let code = match error {
        ConnectionError::TransportError(error) => error.code,
        ConnectionError::ConnectionClosed(close) => close.error_code,
        _ => return false,
    };
    (0x100 + 42..=0x100 + 49).contains(&u64::from(code))
}

impl Signalling {
    /// Runs until the driver is gone.
    pub(crate) async fn run(mut self) {
        let mut pause = RETRY.0;
        loop {
            let error = match self.session().await {
                Ok(None) => return,
                Ok(Some(lost)) => {
                    pause = RETRY.0;
                    lost
                }
                Err(error) => error,
            };
            tracing::debug!(server = %self.address.host, %error, "signalling is down");
            if self.events.send(Event::ServerDown { server: self.index, error }).await.is_err() {
                return;
            }
            // What was asked of a connection that is gone is void: the driver asks again when it is back.
            let pause_now = pause.mul_f64(rand::rng().random_range(0.5..1.5));
            let until = tokio::time::Instant::now() + pause_now;
            loop {
                tokio::select! {
                    () = tokio::time::sleep_until(until) => break,
                    request = self.requests.recv() => if request.is_none() { return },
                }
            }
            pause = (pause * 2).min(RETRY.1);
        }
    }

    /// One connection from beginning to end. `None`: the driver is gone.
    async fn session(&mut self) -> Result<Option<ServerError>, ServerError> {
        let (connection, place) = self.connect().await?;
        let (mut send, receive) =
            connection.open_bi().await.map_err(|error| self.lost(&connection, &error.to_string()))?;
        let (reply, register) = oneshot::channel();
        let connected = Event::ServerConnected { server: self.index, reply };
        if self.events.send(connected).await.is_err() {
            return Ok(None);
        }
        let Ok(register) = register.await else { return Ok(None) };
        self.write(&connection, &mut send, &Request::Register(register)).await?;
        let reader = read(self.index, place, receive, self.events.clone());
        tokio::pin!(reader);
        loop {
            tokio::select! {
                () = self.void.notified() => {
                    let cause = "it no longer knows this registration".to_owned();
                    return Ok(Some(ServerError::Lost { host: self.address.host.clone(), cause }));
                }
                broken = &mut reader => return Ok(Some(self.lost(&connection, &broken))),
                request = self.requests.recv() => match request {
                    Some(request) => self.write(&connection, &mut send, &request).await?,
                    None => {
                        connection.close(close_code::SHUTDOWN.into(), b"");
                        return Ok(None);
                    }
                },
            }
        }
    }

    async fn write(
        &self,
        connection: &Connection,
        send: &mut SendStream,
        request: &Request,
    ) -> Result<(), ServerError> {
        match encode(request) {
            Ok(bytes) => {
                send.write_all(&bytes).await.map_err(|error| self.lost(connection, &error.to_string()))
            }
            Err(error) => {
                // Our own message is out of bounds: nothing to send, and no reason to drop the rest.
                tracing::warn!(%error, "message not sent");
                Ok(())
            }
        }
    }

    fn lost(&self, connection: &Connection, cause: &str) -> ServerError {
        let host = self.address.host.clone();
        match connection.close_reason() {
            Some(ConnectionError::ApplicationClosed(close))
                if close.error_code != VarInt::from_u32(close_code::SHUTDOWN) =>
            {
                ServerError::Refused { host, reason: String::from_utf8_lossy(&close.reason).into_owned() }
            }
            Some(ConnectionError::ApplicationClosed(_)) => {
                ServerError::Lost { host, cause: "it shut down".into() }
            }
            Some(error) if is_wrong_key(&error) => ServerError::WrongKey { host, id: self.address.id },
            Some(error) => ServerError::Lost { host, cause: error.to_string() },
            None => ServerError::Lost { host, cause: cause.to_owned() },
        }
    }

    /// Races the server's addresses, each with a head start over the next (RFC 8305).
    async fn connect(&self) -> Result<(Connection, Place), ServerError> {
        let host = self.address.host.clone();
        let addresses = resolve(&self.address).await?;
        let mut attempts = tokio::task::JoinSet::new();
        for &address in &addresses {
            let (reply, remote) = oneshot::channel();
            if self.events.send(Event::ServerAddress { address, reply }).await.is_err() {
                break;
            }
            let Ok(Some(synthetic)) = remote.await else { continue };
            let config = self.client_config();
            let quinn = self.quinn.clone();
            let order = attempts.len();
            attempts.spawn(async move {
                tokio::time::sleep(ATTEMPT_DELAY * order as u32).await;
                let connecting = quinn.connect_with(config?, synthetic, "rendezvous").ok()?;
                Some((tokio::time::timeout(HANDSHAKE_TIMEOUT, connecting).await, address))
            });
        }
        let mut failure = ServerError::Unreachable { host: host.clone(), port: self.address.port };
        while let Some(attempt) = attempts.join_next().await {
            match attempt {
                Ok(Some((Ok(Ok(connection)), signalling))) => {
                    let other = |address: &&SocketAddr| {
                        address.is_ipv4() != signalling.is_ipv4() && has_route(**address)
                    };
                    let other = addresses.iter().find(other).copied();
                    return Ok((connection, Place { signalling, other }));
                }
                Ok(Some((Ok(Err(error)), _))) if is_wrong_key(&error) => {
                    failure = ServerError::WrongKey { host: host.clone(), id: self.address.id };
                }
                Ok(_) | Err(_) => {}
            }
        }
        Err(failure)
    }

    fn client_config(&self) -> Option<quinn::ClientConfig> {
        let tls = tls::client_config(&self.identity, self.address.id, SIGNALLING_ALPN).ok()?;
        let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls).ok()?;
        let mut transport = quinn::TransportConfig::default();
        transport.keep_alive_interval(Some(KEEP_ALIVE));
        transport.max_idle_timeout(IDLE.try_into().ok());
        // One stream of small messages; small packets are all it needs.
        transport.mtu_discovery_config(None);
        transport.max_concurrent_bidi_streams(0u8.into());
        transport.max_concurrent_uni_streams(0u8.into());
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::new(transport));
        Some(config)
    }
}

/// Reads notices until the stream ends; says how it ended.
async fn read(server: usize, place: Place, mut receive: RecvStream, events: mpsc::Sender<Event>) -> String {
    let mut decoder = Decoder::default();
    loop {
        match receive.read_chunk(16 * 1024, true).await {
            Ok(Some(chunk)) => decoder.extend(&chunk.bytes),
            Ok(None) => return "the server ended the stream".into(),
            Err(error) => return error.to_string(),
        }
        loop {
            let event = match decoder.poll::<Notice>() {
                Ok(None) => break,
                Ok(Some(Notice::Registered(registered))) => up(server, place, registered),
                Ok(Some(notice)) => Event::Notice { server, notice },
                Err(error) => return format!("the server does not speak this protocol: {error}"),
            };
            if events.send(event).await.is_err() {
                return "shutting down".into();
            }
        }
    }
}

fn up(server: usize, place: Place, registered: Registered) -> Event {
    Event::ServerUp { server, place, registered }
}
