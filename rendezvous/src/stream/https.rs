//! What those see who come to TCP 443 and are no peers: a page that says what this is, and `/healthz`.

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use rendezvous_wire::tls;
use rustls::ServerConfig;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::version::TLS13;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::server::TlsStream;

use super::StreamError;

/// How long a request may take to arrive.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a connection may take in all, its answer included.
const LIFETIME: Duration = Duration::from_secs(15);

/// Bytes of a request line with its headers: the least that hyper allows, and plenty.
const HEADER_BYTES: usize = 8_192;

/// Headers of a request.
const HEADERS: usize = 32;

const PAGE: &str = "This is a rendezvous server: it introduces peers to one another, and relays what they cannot send directly.\n\
                    There is nothing to see here with a browser. /healthz tells whether it works.\n";

/// An ephemeral key and a certificate that it has signed itself: whoever wants to know this server for sure pins its rv:// id.
pub(super) fn tls_config(host: &str) -> Result<ServerConfig, StreamError> {
    let made = rcgen::generate_simple_self_signed([host.to_owned()])?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
    let mut config = ServerConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// Why there was no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum HttpsError {
    #[error("HTTP: {0}")]
    Http(#[from] hyper::Error),
    #[error("the request took too long")]
    TimedOut,
}

/// Answers one request. What is no HTTP is closed.
pub(super) async fn serve(stream: TlsStream<TcpStream>) -> Result<(), HttpsError> {
    let answering = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(HEADER_BYTES)
        .max_headers(HEADERS)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service_fn(answer));
    timeout(LIFETIME, answering).await.map_err(|_| HttpsError::TimedOut)??;
    Ok(())
}

async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    Ok(response(request.method(), request.uri().path()))
}

fn response(method: &Method, path: &str) -> Response<Full<Bytes>> {
    let (status, body) = match path {
        "/healthz" => (StatusCode::OK, "ok\n"),
        "/" => (StatusCode::OK, PAGE),
        _ => (StatusCode::NOT_FOUND, "not found\n"),
    };
    let (status, body) = match *method {
        Method::GET | Method::HEAD => (status, body),
        _ => (StatusCode::METHOD_NOT_ALLOWED, "GET and HEAD only\n"),
    };
    let mut response = Response::new(Full::new(Bytes::from_static(body.as_bytes())));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if status == StatusCode::METHOD_NOT_ALLOWED {
        headers.insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_has_its_answer() {
        for (method, path, expected) in [
            (Method::GET, "/healthz", 200),
            (Method::HEAD, "/healthz", 200),
            (Method::GET, "/", 200),
            (Method::GET, "/admin", 404),
            (Method::GET, "/healthz/", 404),
            (Method::POST, "/healthz", 405),
        ] {
            assert_eq!(response(&method, path).status(), expected, "{method} {path}");
        }
    }
}
