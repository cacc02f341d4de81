//! The hand-written path of the bare Binding request, held against `stun-rs` byte for byte.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use stun_rs::attributes::stun::{Fingerprint, Software, XorMappedAddress};
use stun_rs::methods::BINDING;
use stun_rs::{
    DecoderContextBuilder, MessageClass, MessageDecoderBuilder, MessageEncoderBuilder, StunAttribute,
    StunMessage, StunMessageBuilder,
};

use super::*;
use crate::limits::Rate;

/// The whole of `bytes` as a valid message, by the codec alone. It takes the cookie's place for granted.
fn decode(bytes: &[u8]) -> Option<StunMessage> {
    if bytes.get(4..8) != Some(&MAGIC_COOKIE) {
        return None;
    }
    let context = DecoderContextBuilder::default().with_validation().build();
    let (message, length) =
        MessageDecoderBuilder::default().with_context(context).build().decode(bytes).ok()?;
    (length == bytes.len()).then_some(message)
}

/// What the codec answers to a Binding request with no attribute but FINGERPRINT; `None`: it is no such request.
fn by_the_codec(datagram: &[u8], mapped: SocketAddr) -> Option<Vec<u8>> {
    let request = decode(datagram)?;
    let bare = matches!(request.attributes(), [] | [StunAttribute::Fingerprint(_)]);
    if !bare || request.method() != BINDING || request.class() != MessageClass::Request {
        return None;
    }
    Some(encode(
        StunMessageBuilder::new(BINDING, MessageClass::SuccessResponse)
            .with_transaction_id(*request.transaction_id())
            .with_attribute(XorMappedAddress::from(mapped))
            .with_attribute(Fingerprint::default()),
    ))
}

fn encode(message: StunMessageBuilder) -> Vec<u8> {
    let mut bytes = vec![0; 512];
    let length = MessageEncoderBuilder::default().build().encode(&mut bytes, &message.build()).unwrap();
    bytes.truncate(length);
    bytes
}

/// By the hand-written path: as [`handle_stun`] begins.
fn by_hand(datagram: &[u8], mapped: SocketAddr) -> Option<Vec<u8>> {
    let transaction = bare_request(datagram).filter(|_| fingerprint_holds(datagram))?;
    Some(bare_answer(transaction, mapped).as_ref().to_vec())
}

fn seeds(rng: &mut StdRng) -> Vec<u8> {
    let mut transaction = [0; 12];
    rng.fill_bytes(&mut transaction);
    let class = match rng.random_range(0..8) {
        0 => MessageClass::Indication,
        1 => MessageClass::SuccessResponse,
        _ => MessageClass::Request,
    };
    let mut message = StunMessageBuilder::new(BINDING, class).with_transaction_id(transaction.into());
    if rng.random_range(0..8) == 0 {
        message = message.with_attribute(Software::new("somebody").unwrap());
    }
    if rng.random() {
        message = message.with_attribute(Fingerprint::default());
    }
    encode(message)
}

fn mutate(rng: &mut StdRng, datagram: &mut Vec<u8>) {
    match rng.random_range(0..6) {
        0 if !datagram.is_empty() => {
            let place = rng.random_range(0..datagram.len());
            datagram[place] ^= 1 << rng.random_range(0..8);
        }
        1 => datagram.truncate(rng.random_range(0..=datagram.len())),
        2 => datagram.extend((0..rng.random_range(1..12)).map(|_| rng.random::<u8>())),
        // The header's fields, with values that are nearly right.
        3 if datagram.len() >= 4 => datagram[3] = rng.random_range(0..16) * 4,
        4 if datagram.len() >= 20 => datagram[rng.random_range(0..8)] = rng.random(),
        _ => {}
    }
}

#[test]
fn the_fast_path_takes_what_the_codec_takes_and_answers_with_the_same_bytes() {
    let (mut alike, mut declined) = (0, 0);
    for seed in 0..60 {
        let mut rng = StdRng::seed_from_u64(seed);
        for round in 0..2_000 {
            let mut datagram = seeds(&mut rng);
            for _ in 0..rng.random_range(0..3) {
                mutate(&mut rng, &mut datagram);
            }
            let ip = match rng.random() {
                true => IpAddr::from(rng.random::<[u8; 4]>()),
                false => IpAddr::from(rng.random::<[u8; 16]>()).to_canonical(),
            };
            let mapped = SocketAddr::new(ip, rng.random());
            let (hand, codec) = (by_hand(&datagram, mapped), by_the_codec(&datagram, mapped));
            assert_eq!(hand, codec, "seed {seed}, round {round}: {datagram:02x?} from {mapped}");
            match hand {
                Some(_) => alike += 1,
                None => declined += 1,
            }
        }
    }
    assert!(
        alike > 10_000 && declined > 10_000,
        "{alike} answered, {declined} declined: the test has lost its subject"
    );
}

#[test]
fn what_the_fast_path_declines_gets_the_same_answer_as_ever() {
    // Through the whole of the server's handling: an attribute that asks for nothing changes nothing in what is mapped.
    let mut table = Table::new(Duration::from_secs(60), Rate::new(8, 8));
    let mut strangers = SourceBuckets::new(Rate::new(1_000, 1_000), [3, 4]);
    let origins = Origins::default();
    let remote: SocketAddr = "198.51.100.7:40000".parse().unwrap();
    let flow = Flow { remote, local: None, socket: 0 };
    let bare = || StunMessageBuilder::new(BINDING, MessageClass::Request).with_transaction_id([5; 12].into());
    let named = bare().with_attribute(Software::new("somebody").unwrap());
    for request in [bare(), named] {
        let reaction =
            handle_stun(&mut table, &mut strangers, &origins, &encode(request), flow, Instant::now());
        let answer = reaction.answer.unwrap();
        let message = decode(answer.as_ref()).expect("the codec takes the answer, FINGERPRINT included");
        assert_eq!(
            (message.class(), message.transaction_id().as_bytes()),
            (MessageClass::SuccessResponse, &[5; 12])
        );
        let mapped = message.attributes().iter().find_map(|attribute| match attribute {
            StunAttribute::XorMappedAddress(mapped) => Some(*mapped.socket_address()),
            _ => None,
        });
        assert_eq!(mapped, Some(remote));
    }
}
