//! A server that shares its TCP port 443 with web sites: whatever is in front of it routes by the name in the TLS handshake and sees no more.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddrV4, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context as _, ensure};
use end_to_end::cell::Network;
use end_to_end::process::PATIENCE;
use end_to_end::world::{SERVER_NAME, World};
use libtest_mimic::Trial;
use netsim::{Host, RouterKind};
use rustls::server::Acceptor;

use crate::tcp::{Asking, failure, path};
use crate::trial;

const HTTPS: u16 = 443;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("reverse_proxy::the_server_is_reached_by_its_name", || by_name(RouterKind::UdpBlocked)),
        trial("reverse_proxy::that_passes_on_no_udp_costs_no_more_than_the_head_start", || {
            by_name(RouterKind::EimApdf)
        }),
        trial("reverse_proxy::nothing_is_reached_without_a_name", without_a_name),
    ]
}

/// A reverse proxy on TCP port 443 of `front` that passes on what is meant for [`SERVER_NAME`] and closes everything else.
struct Router {
    passed: Arc<AtomicUsize>,
    refused: Arc<AtomicUsize>,
}

impl Router {
    fn start(front: &Host, server: SocketAddrV4) -> io::Result<Self> {
        let listener = front.run(|| TcpListener::bind(SocketAddrV4::new(front.ipv4(), HTTPS)))?;
        let router = Self { passed: Arc::default(), refused: Arc::default() };
        let (passed, refused, front) = (router.passed.clone(), router.refused.clone(), front.clone());
        // It ends with the process; the lab that it is part of may go before.
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let (passed, refused, front) = (passed.clone(), refused.clone(), front.clone());
                thread::spawn(move || match route(client, &front, server) {
                    Ok(()) => passed.fetch_add(1, Ordering::Relaxed),
                    Err(_) => refused.fetch_add(1, Ordering::Relaxed),
                });
            }
        });
        Ok(router)
    }
}

/// Reads the name that the client asks for and joins it to the server if that is the one. Returns when both are joined.
fn route(mut client: TcpStream, front: &Host, server: SocketAddrV4) -> io::Result<()> {
    client.set_read_timeout(Some(PATIENCE))?;
    let (mut acceptor, mut seen) = (Acceptor::default(), Vec::new());
    let accepted = loop {
        let mut piece = [0; 4096];
        let length = client.read(&mut piece)?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        seen.extend_from_slice(&piece[..length]);
        acceptor.read_tls(&mut &piece[..length])?;
        let accepted = acceptor.accept().map_err(|(error, _)| io::Error::other(error))?;
        if let Some(accepted) = accepted {
            break accepted;
        }
    };
    if accepted.client_hello().server_name() != Some(SERVER_NAME) {
        return Err(io::ErrorKind::NotFound.into());
    }
    client.set_read_timeout(None)?;
    let mut upstream = front.run(|| TcpStream::connect(server))?;
    upstream.write_all(&seen)?;
    for (mut from, mut to) in
        [(client.try_clone()?, upstream.try_clone()?), (upstream.try_clone()?, client.try_clone()?)]
    {
        thread::spawn(move || {
            let _ = io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Write);
        });
    }
    Ok(())
}

/// A world whose server is reached over TCP through another host alone; that host, and what is in front there.
fn behind_a_router(kind: RouterKind) -> anyhow::Result<(World, [Host; 3], Router)> {
    let mut world = World::new(11)?;
    let front = world.lab.add_server("front")?;
    let router = Router::start(&front, SocketAddrV4::new(world.server_host.ipv4(), HTTPS))?;
    let a = world.lab.add_site("a", Network::new(kind).site())?.host(0);
    let b = world.lab.add_site("b", Network::new(RouterKind::EimApdf).site())?.host(0);
    Ok((world, [a, b, front], router))
}

fn by_name(kind: RouterKind) -> anyhow::Result<()> {
    let (world, [a, b, front], router) = behind_a_router(kind)?;
    let (_listening, id) = world.listener(&b, "b", &["--echo"])?;
    let addresses = [front.ipv4().into()];
    let mut asking = Asking::new(world.peer_with_server_name(&a, "a", &addresses, &["connect", &id])?)?;
    asking.ask("by name")?;
    path(&mut asking.peer, "relayed", Some("tcp"), PATIENCE)?;
    asking.end()?;
    // And the other way round: who has come by name is dialled.
    let mut listener = world.peer_with_server_name(&a, "a", &addresses, &["listen", "--echo"])?;
    let id = listener.named("listening")?["id"].as_str().context("an id")?.to_owned();
    let mut asking = Asking::new(world.peer(&b, "c", &["connect", &id])?)?;
    asking.ask("to whom has come by name")?;
    asking.end()?;
    let (passed, refused) = (router.passed.load(Ordering::Relaxed), router.refused.load(Ordering::Relaxed));
    ensure!(passed >= 2 && refused == 0, "{passed} passed, {refused} refused");
    Ok(())
}

/// A client that knows the address alone names nobody, and is told what it met.
fn without_a_name() -> anyhow::Result<()> {
    let (world, [a, _, front], router) = behind_a_router(RouterKind::UdpBlocked)?;
    let (id, _) = world.address.split_once('@').context("an address with @")?;
    let address = format!("{id}@{}", front.ipv4());
    let message = failure(world.peer_with_server(&a, "a", &address, &["listen"])?)?;
    ensure!(message.contains(&front.ipv4().to_string()), "{message}");
    ensure!(
        router.passed.load(Ordering::Relaxed) == 0 && router.refused.load(Ordering::Relaxed) > 0,
        "{message}"
    );
    Ok(())
}
