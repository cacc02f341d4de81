//! A web server behind any NAT, without a port: HTTP/1.1 by hyper, each stream of a session a connection.
//!
//!     cargo run --example http -- rv://…                # prints its id, and answers until stopped
//!     cargo run --example http -- rv://… PEER /status   # asks it, prints the answer's body

use std::convert::Infallible;

use http_body_util::{BodyExt as _, Empty, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use peer::{Endpoint, PeerId, Session};

type Error = Box<dyn std::error::Error + Send + Sync>;

/// Most bytes of an answer that is taken.
const MOST: usize = 1 << 20;

async fn answer(request: Request<Incoming>, peer: PeerId) -> Result<Response<Full<Bytes>>, Infallible> {
    // Whoever asks has proven its key: no password, no cookie.
    let (status, words) = match request.uri().path() {
        "/status" => (StatusCode::OK, format!("well, and you, {peer}?\n")),
        path => (StatusCode::NOT_FOUND, format!("there is no {path}; try /status\n")),
    };
    let mut response = Response::new(Full::from(words));
    *response.status_mut() = status;
    Ok(response)
}

async fn serve(endpoint: &Endpoint) -> Result<(), Error> {
    println!("{}", endpoint.id());
    while let Some(session) = endpoint.accept().await {
        tokio::spawn(serve_session(session));
    }
    Ok(())
}

async fn serve_session(session: Session) {
    let peer = session.peer();
    while let Ok((send, receive)) = session.accept_bi().await {
        let stream = TokioIo::new(tokio::io::join(receive, send));
        let service = hyper::service::service_fn(move |request| answer(request, peer));
        tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(stream, service));
    }
}

async fn ask(endpoint: &Endpoint, peer: PeerId, path: &str) -> Result<(), Error> {
    let session = endpoint.connect(peer).await?;
    let (send, receive) = session.open_bi().await?;
    let stream = TokioIo::new(tokio::io::join(receive, send));
    let (mut requests, connection) = hyper::client::conn::http1::handshake(stream).await?;
    tokio::spawn(connection);
    let request = Request::get(path).header("host", peer.to_string()).body(Empty::<Bytes>::new())?;
    let response = requests.send_request(request).await?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MOST).collect().await?.to_bytes();
    print!("{}", String::from_utf8_lossy(&body));
    if status.is_success() { Ok(()) } else { Err(format!("the answer is {status}").into()) }
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (server, target) = match arguments.as_slice() {
        [server] => (server, None),
        [server, peer, path] => (server, Some((peer.parse()?, path))),
        _ => return Err("usage: http SERVER, or http SERVER PEER PATH".into()),
    };
    // With a key of its own for each run; a real program keeps one, see `peer::identity`.
    let endpoint = Endpoint::builder().server(server.parse()?).bind().await?;
    endpoint.online().await?;
    let outcome = match target {
        Some((peer, path)) => ask(&endpoint, peer, path).await,
        None => serve(&endpoint).await,
    };
    endpoint.close().await;
    outcome
}
