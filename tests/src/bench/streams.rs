//! Lanes of which one end or both are TLS streams.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use bytes::BytesMut;
use rendezvous_wire::candidate::Mapping;
use rendezvous_wire::message::{
    Introduce, IntroductionPolicy, Notice, Purpose, Register, Request, RequestId, decode, encode,
};
use rendezvous_wire::stream::{Backlog, Decoder, Record, put_binding, put_message};
use rendezvous_wire::{KeyPair, PeerId, SIGNALLING_ALPN, tls};
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, StreamOwned};

use super::contender::Server;
use super::lanes::{Outcome, Socket};

const PATIENCE: Duration = Duration::from_secs(2);
const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// Bytes read at a time.
const READ: usize = 64 * 1024;
/// Datagrams on their way in one lane: half of what the server keeps for a stream.
const STEP: usize = 100;

/// A peer registered over a stream.
pub struct StreamPeer {
    stream: StreamOwned<ClientConnection, TcpStream>,
    decoder: Decoder,
    id: PeerId,
}

impl StreamPeer {
    fn register(server: &Server) -> anyhow::Result<Self> {
        let key = KeyPair::generate()?;
        let config = tls::client_config(&key, server.registrar.id(), SIGNALLING_ALPN)?;
        let connection =
            ClientConnection::new(Arc::new(config), ServerName::try_from("rendezvous")?.to_owned())?;
        let tcp = TcpStream::connect(SocketAddr::new(HERE, server.tls_port))?;
        tcp.set_nodelay(true)?;
        tcp.set_read_timeout(Some(PATIENCE))?;
        tcp.set_write_timeout(Some(PATIENCE))?;
        let stream = StreamOwned::new(connection, tcp);
        let mut peer = Self { stream, decoder: Decoder::default(), id: key.id() };
        let says = Register {
            instance: rand::random(),
            candidates: Vec::new(),
            mapping: Mapping::Unknown,
            policy: IntroductionPolicy::Anyone,
        };
        let mut out = BytesMut::new();
        put_binding(1, &mut out);
        put_message(&encode(&Request::Register(says))?, &mut out);
        peer.stream.write_all(&out)?;
        loop {
            match peer.record()? {
                Some(Record::Message(body)) => match decode(&body)? {
                    Notice::Registered(_) => return Ok(peer),
                    other => bail!("{other:?} instead of a registration"),
                },
                Some(Record::Binding(_)) => {}
                other => bail!("{other:?} instead of a registration"),
            }
        }
    }

    /// A channel to this peer: its header.
    fn introduce(&mut self, target: PeerId) -> anyhow::Result<[u8; 4]> {
        let introduce =
            Introduce { request: RequestId(1), target, purpose: Purpose::Session, first_flight: Vec::new() };
        let mut out = BytesMut::new();
        put_message(&encode(&Request::Introduce(introduce))?, &mut out);
        self.stream.write_all(&out)?;
        loop {
            match self.record()? {
                Some(Record::Message(body)) => match decode(&body)? {
                    Notice::Introduction(introduction) => return Ok(introduction.channel.header()),
                    other => bail!("{other:?} instead of an introduction"),
                },
                Some(Record::Binding(_)) => {}
                other => bail!("{other:?} instead of an introduction"),
            }
        }
    }

    /// The next record; `None` when none comes.
    fn record(&mut self) -> anyhow::Result<Option<Record>> {
        loop {
            if let Some(record) = self.decoder.poll()? {
                return Ok(Some(record));
            }
            let buffer = self.decoder.buffer();
            let filled = buffer.len();
            buffer.resize(filled + READ, 0);
            let read = self.stream.read(&mut buffer[filled..]);
            buffer.truncate(filled + read.as_ref().unwrap_or(&0));
            match read {
                Ok(0) => bail!("the server has ended a stream"),
                Ok(_) => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    return Ok(None);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// How many of the `expected` frames of this size have come.
    fn take(&mut self, expected: usize, size: usize) -> anyhow::Result<usize> {
        let mut got = 0;
        while got < expected {
            match self.record()? {
                Some(Record::Frames { bytes, segment }) => {
                    ensure!(segment == size && bytes.len() % size == 0, "frames of {segment} bytes");
                    got += bytes.len() / size;
                }
                // An introduction for the other end of it.
                Some(_) => {}
                None => break,
            }
        }
        ensure!(got <= expected, "{got} frames came out where {expected} went in");
        Ok(got)
    }
}

/// An end of a lane.
enum End {
    Udp(Socket),
    Stream(Box<StreamPeer>),
}

/// What an end is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Datagrams.
    Udp,
    /// Records in TLS.
    Stream,
}

/// One way through our server.
pub struct StreamLane {
    from: End,
    into: End,
    header: [u8; 4],
    to: SocketAddr,
}

impl StreamLane {
    /// A lane from an end of one kind to one of the other.
    ///
    /// # Errors
    ///
    /// When the server refuses.
    pub fn new(server: &mut Server, from: Kind, into: Kind) -> anyhow::Result<Self> {
        let to = server.registrar.relay;
        let (header, from, into) = match (from, into) {
            (Kind::Udp, Kind::Udp) => bail!("no stream"),
            (Kind::Udp, Kind::Stream) => {
                let (socket, peer) = (Socket::bind(HERE)?, StreamPeer::register(server)?);
                let header = server.registrar.introduced(&socket, peer.id)?;
                (header, End::Udp(socket), End::Stream(Box::new(peer)))
            }
            (Kind::Stream, Kind::Udp) => {
                let (mut peer, socket) = (StreamPeer::register(server)?, Socket::bind(HERE)?);
                let id = server.registrar.bound(&socket)?;
                (peer.introduce(id)?, End::Stream(Box::new(peer)), End::Udp(socket))
            }
            (Kind::Stream, Kind::Stream) => {
                let (mut one, other) = (StreamPeer::register(server)?, StreamPeer::register(server)?);
                let header = one.introduce(other.id)?;
                (header, End::Stream(Box::new(one)), End::Stream(Box::new(other)))
            }
        };
        Ok(Self { from, into, header, to })
    }

    fn send(&mut self, payload: usize, together: usize) -> anyhow::Result<usize> {
        let size = payload + self.header.len();
        let mut frame = self.header.to_vec();
        frame.resize(size, 0x5a);
        let batch = frame.repeat(together);
        let batches = STEP / together;
        match &mut self.from {
            End::Udp(socket) => {
                for _ in 0..batches {
                    socket.tell_segments(self.to, &batch, size)?;
                }
            }
            End::Stream(peer) => {
                let mut backlog = Backlog::new(usize::MAX);
                for _ in 0..batches {
                    backlog.push_frames(&batch, size);
                }
                peer.stream.write_all(&backlog.take(BytesMut::new()))?;
            }
        }
        Ok(batches * together)
    }
}

/// Sends at least `count` datagrams over the lanes, `together` of them in a record or with segmentation offload. `buffers` are those of a
/// [`Generator`](super::lanes::Generator).
///
/// # Errors
///
/// The system's. What is lost is counted.
pub fn load(
    buffers: &mut [u8],
    lanes: &mut [StreamLane],
    payload: usize,
    together: usize,
    count: usize,
) -> anyhow::Result<Outcome> {
    let start = Instant::now();
    let mut outcome = Outcome::default();
    while outcome.sent < count {
        // Two at a time: what is in flight does not grow with the lanes.
        for pair in lanes.chunks_mut(2) {
            let sent = pair.iter_mut().map(|lane| lane.send(payload, together));
            let sent = sent.collect::<anyhow::Result<Vec<_>>>()?;
            for (lane, sent) in pair.iter_mut().zip(sent) {
                let got = match &mut lane.into {
                    End::Udp(socket) => socket.take(buffers, sent, Some(payload))?,
                    End::Stream(peer) => peer.take(sent, payload + 4)?,
                };
                outcome.sent += sent;
                outcome.lost += sent.checked_sub(got).context("more came out than went in")?;
            }
        }
    }
    outcome.took = start.elapsed();
    Ok(outcome)
}
