//! Behaviour discovery (RFC 5780) through real sockets: from where answers come, and to where they go.

mod common;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroUsize;

use common::*;
use rendezvous_wire::stun::behaviour::{Change, DiscoveryRequest};
use rendezvous_wire::stun::{Class, Received, TransactionId};
use tokio::net::UdpSocket;

const ALTERNATE: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2));

fn request(change: (bool, bool), response_port: Option<u16>) -> Vec<u8> {
    let change = Change { ip: change.0, port: change.1 };
    let transaction = TransactionId(rand::random());
    DiscoveryRequest { transaction, change, response_port, padded: response_port.is_none() }.encode().unwrap()
}

async fn answers_from_everywhere(server: &rendezvous::Server) {
    let ports = server.ports().reflection;
    for (to, ip, other_ip) in [(0, HERE, ALTERNATE), (1, HERE, ALTERNATE), (0, ALTERNATE, HERE)] {
        let (port, other_port) = (ports[to], ports[1 - to]);
        for (change, from) in [
            ((false, false), (ip, port)),
            ((false, true), (ip, other_port)),
            ((true, false), (other_ip, port)),
            ((true, true), (other_ip, other_port)),
        ] {
            let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            socket.send_to(&request(change, None), (ip, port)).await.unwrap();
            let bytes = receive(&socket, from.into()).await;
            let answer = Received::parse(&bytes).unwrap();
            assert_eq!(answer.mapped_address(), Some(socket.local_addr().unwrap()));
            assert_eq!(answer.response_origin(), Some(from.into()));
            assert_eq!(answer.other_address(), Some(SocketAddr::new(other_ip, other_port)));
        }
    }
}

#[tokio::test]
async fn a_socket_for_each_address_answers_from_it() {
    let threads = NonZeroUsize::new(2).unwrap();
    let server = builder().alternate(ALTERNATE).relay_threads(threads).start().await.unwrap();
    answers_from_everywhere(&server).await;
}

#[tokio::test]
async fn one_socket_for_all_addresses_answers_from_each() {
    let everywhere = rendezvous::Server::builder().port(0).reflection_ports([0, 0]).host("127.0.0.1");
    let server = everywhere.alternate(ALTERNATE).start().await.unwrap();
    answers_from_everywhere(&server).await;
}

#[tokio::test]
async fn another_port_of_the_sender_gets_the_answer() {
    let server = serve().await;
    let at = SocketAddr::new(HERE, server.ports().reflection[0]);
    let [asks, hears] =
        [UdpSocket::bind((HERE, 0)).await.unwrap(), UdpSocket::bind((HERE, 0)).await.unwrap()];
    asks.send_to(&request((false, false), Some(hears.local_addr().unwrap().port())), at).await.unwrap();
    let bytes = receive(&hears, at).await;
    let answer = Received::parse(&bytes).unwrap();
    assert_eq!(answer.mapped_address(), Some(asks.local_addr().unwrap()));

    asks.send_to(&request((false, false), Some(53)), at).await.unwrap();
    let bytes = receive(&asks, at).await;
    assert_eq!(Received::parse(&bytes).unwrap().error_code(), Some(400));
}

#[tokio::test]
async fn a_server_with_one_address_says_so() {
    let server = serve().await;
    let [first, second] = server.ports().reflection.map(|port| SocketAddr::new(HERE, port));
    let socket = UdpSocket::bind((HERE, 0)).await.unwrap();
    socket.send_to(&request((true, true), None), first).await.unwrap();
    let bytes = receive(&socket, first).await;
    assert_eq!(Received::parse(&bytes).unwrap().error_code(), Some(420));
    socket.send_to(&request((false, true), None), first).await.unwrap();
    let bytes = receive(&socket, second).await;
    let answer = Received::parse(&bytes).unwrap();
    assert_eq!((answer.class(), answer.other_address()), (Class::Success, None));
}

#[tokio::test]
async fn an_alternate_address_of_another_host_is_refused_at_the_start() {
    let error = builder().alternate("192.0.2.77".parse().unwrap()).start().await.unwrap_err();
    assert!(error.to_string().contains("192.0.2.77"), "{error}");
}
