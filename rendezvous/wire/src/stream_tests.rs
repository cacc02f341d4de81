use rand::rngs::StdRng;
use rand::{Rng as _, RngCore as _, SeedableRng as _};

use super::*;
use crate::message::{IntroductionId, Request, decode, encode};
use crate::relay::Channel;

fn frames(count: usize, segment: usize, last: usize) -> Vec<u8> {
    let header = Channel::new(7).unwrap().header();
    let frame = |length: usize| {
        let mut frame = header.to_vec();
        frame.resize(length, length as u8);
        frame
    };
    let mut all = frame(segment).repeat(count - 1);
    all.extend(frame(last));
    all
}

/// Everything in `bytes`, handed over in parts that end where `cuts` say.
fn read(bytes: &[u8], cuts: &[usize]) -> Result<Vec<Record>, RecordError> {
    let mut decoder = Decoder::default();
    let mut records = Vec::new();
    let mut start = 0;
    for end in cuts.iter().copied().chain([bytes.len()]) {
        decoder.buffer().extend_from_slice(&bytes[start..end]);
        start = end;
        while let Some(record) = decoder.poll()? {
            records.push(record);
        }
    }
    Ok(records)
}

fn sample() -> (Vec<u8>, Vec<Record>) {
    let message = encode(&Request::Close(IntroductionId(5))).unwrap();
    let batch = frames(3, 40, 9);
    let mut bytes = BytesMut::new();
    put_binding(0x0102_0304_0506_0708, &mut bytes);
    put_message(&message, &mut bytes);
    let mut backlog = Backlog::new(1000);
    assert!(backlog.push_frames(&batch, 40));
    bytes.extend_from_slice(&backlog.take(BytesMut::new()));
    put_close(3, "full", &mut bytes);
    let records = vec![
        Record::Binding(0x0102_0304_0506_0708),
        Record::Message(Bytes::from(message).slice(2..)),
        Record::Frames { bytes: batch.into(), segment: 40 },
        Record::Close { code: 3, reason: "full".into() },
    ];
    (bytes.to_vec(), records)
}

#[test]
fn records_survive_being_cut_anywhere() {
    let (bytes, records) = sample();
    for one in 0..bytes.len() {
        for other in one..bytes.len() {
            assert_eq!(read(&bytes, &[one, other]).unwrap(), records);
        }
    }
    let Record::Message(body) = &records[1] else { panic!() };
    assert_eq!(decode::<Request>(body).unwrap(), Request::Close(IntroductionId(5)));
}

#[test]
fn what_breaks_a_bound_is_refused_before_its_bytes_have_come() {
    for (header, expected) in [
        (&[4, 0, 0][..], RecordError::Kind(4)),
        (&[CLOSE, 1, 5], RecordError::Length { kind: CLOSE, length: 261 }),
        (&[0x16, 3, 1], RecordError::Kind(0x16)),
        (&[MESSAGE, 0xff, 0xff], RecordError::Length { kind: MESSAGE, length: 0xffff }),
        (&[BINDING, 0, 7], RecordError::Length { kind: BINDING, length: 7 }),
        (&[FRAMES, 0, 6], RecordError::Length { kind: FRAMES, length: 6 }),
        (&[FRAMES, 0, 7, 0, 4, 0x20, 0, 0, 1, 0], RecordError::Segment(4)),
        (&[FRAMES, 0, 7, 0xff, 0xff, 0x20, 0, 0, 1, 0], RecordError::Segment(0xffff)),
    ] {
        assert_eq!(read(header, &[]), Err(expected), "{header:?}");
    }
}

#[test]
fn a_long_reason_is_cut_between_characters() {
    let mut bytes = BytesMut::new();
    put_close(1, &"ä".repeat(200), &mut bytes);
    let expected = Record::Close { code: 1, reason: "ä".repeat(128) };
    assert_eq!(read(&bytes, &[]).unwrap(), [expected]);
}

#[test]
fn a_backlog_holds_what_it_may_and_counts_what_is_being_written() {
    let batch = frames(10, 100, 100);
    let record = RECORD_HEADER + SEGMENT + batch.len();
    let mut backlog = Backlog::new(2 * record);
    assert!(backlog.is_empty());
    assert!(backlog.push_frames(&batch, 100) && backlog.push_frames(&batch, 100));
    assert!(!backlog.push_frames(&batch, 100));
    let taken = backlog.take(BytesMut::new());
    assert_eq!(taken.len(), 2 * record);
    assert!(!backlog.push_frames(&batch, 100), "still being written");
    let nothing = backlog.take(taken);
    assert!(nothing.is_empty() && backlog.push_frames(&batch, 100));
}

#[test]
fn the_memory_of_a_burst_is_given_back() {
    let batch = frames(40, 1_452, 1_452);
    let mut backlog = Backlog::new(1 << 18);
    let mut taken = BytesMut::new();
    for _ in 0..4 {
        assert!(backlog.push_frames(&batch, 1_452));
        taken = backlog.take(taken);
        assert!(taken.capacity() >= batch.len());
    }
    for _ in 0..2 {
        backlog.push_frames(&batch[..1_452], 1_452);
        taken = backlog.take(taken);
    }
    assert!(taken.capacity() + backlog.waiting.capacity() < 3 * OVERSIZE * 1_460);
}

#[test]
fn a_batch_that_is_too_long_for_a_record_is_cut_between_frames() {
    let batch = frames(50, 1_452, 100);
    let mut backlog = Backlog::new(1 << 20);
    assert!(backlog.push_frames(&batch, 1_452));
    let records = read(&backlog.take(BytesMut::new()), &[]).unwrap();
    assert_eq!(records.len(), 2);
    let mut joined = Vec::new();
    for record in records {
        let Record::Frames { bytes, segment } = record else { panic!() };
        assert_eq!((segment, joined.len() % 1_452), (1_452, 0));
        joined.extend_from_slice(&bytes);
    }
    assert_eq!(joined, batch);
}

#[test]
fn frames_that_are_none_are_not_queued() {
    let mut backlog = Backlog::new(1 << 20);
    assert!(!backlog.push_frames(&[0x20, 0, 0, 1], 4));
    assert!(!backlog.push_frames(&frames(1, 1_501, 1_501), 1_501));
    assert!(backlog.is_empty());
    // One frame, as it comes from a socket without coalescing: the segment size may be the buffer's.
    assert!(backlog.push_frames(&frames(1, 5, 5), 9_000));
}

/// Random bytes, and records with random bytes changed: no panic, no more held than a record and what was read with it, and nothing out of bounds.
#[test]
fn nonsense_is_an_error_and_holds_no_memory() {
    let (valid, _) = sample();
    for seed in 0..2_000 {
        let mut random = StdRng::seed_from_u64(seed);
        let mut bytes = valid.repeat(3);
        if seed % 2 == 0 {
            bytes = vec![0; random.random_range(0..5_000)];
            random.fill_bytes(&mut bytes);
            for byte in bytes.iter_mut().step_by(random.random_range(1..7)) {
                *byte %= 5;
            }
        } else {
            for _ in 0..random.random_range(1..6) {
                let place = random.random_range(0..bytes.len());
                bytes[place] = random.random();
            }
        }
        let mut decoder = Decoder::default();
        'stream: for part in bytes.chunks(random.random_range(1..900)) {
            decoder.buffer().extend_from_slice(part);
            loop {
                match decoder.poll() {
                    Ok(Some(Record::Message(body))) => {
                        assert!(body.len() <= MAX_MESSAGE, "seed {seed}");
                        let _ = decode::<Request>(&body);
                    }
                    Ok(Some(Record::Frames { bytes, segment })) => {
                        assert!(!bytes.is_empty() && (5..=MAX_FRAME).contains(&segment), "seed {seed}");
                    }
                    Ok(Some(Record::Binding(_) | Record::Close { .. })) => {}
                    Ok(None) => break,
                    Err(_) => break 'stream,
                }
            }
            assert!(decoder.buffer().len() <= RECORD_HEADER + 0xffff + 900, "seed {seed}");
        }
    }
}
