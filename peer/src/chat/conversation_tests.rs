use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::*;

/// One side and what it has shown.
struct Side {
    conversation: Conversation,
    heard: Vec<String>,
    events: Vec<Event>,
}

impl Side {
    fn new(epoch: u64) -> Self {
        Self { conversation: Conversation::new(epoch), heard: Vec::new(), events: Vec::new() }
    }

    fn show(&mut self) {
        while let Some(event) = self.conversation.poll_event() {
            if let Event::Line { text, .. } = &event {
                self.heard.push(text.clone());
            }
            self.events.push(event);
        }
    }

    fn take(&mut self, frame: &Frame, now: Instant) {
        let bytes = frame.encode();
        let frame = Frame::decode(&bytes[2..]).unwrap();
        self.conversation.handle_frame(frame, now).unwrap();
        self.show();
    }
}

/// A new stream between the two.
fn meet(a: &mut Side, b: &mut Side) {
    a.conversation.handle_stream();
    b.conversation.handle_stream();
}

/// Carries frames until nobody has any.
fn settle(a: &mut Side, b: &mut Side, now: Instant) {
    loop {
        let (to_b, to_a) = (a.conversation.poll_transmit(now), b.conversation.poll_transmit(now));
        if to_a.is_none() && to_b.is_none() {
            return;
        }
        if let Some(frame) = to_b {
            b.take(&frame, now);
        }
        if let Some(frame) = to_a {
            a.take(&frame, now);
        }
    }
}

#[test]
fn lines_go_both_ways_and_are_heard() {
    let (mut a, mut b, now) = (Side::new(1), Side::new(2), Instant::now());
    a.conversation.say("before we met", now).unwrap();
    meet(&mut a, &mut b);
    settle(&mut a, &mut b, now);
    b.conversation.say("hello", now).unwrap();
    a.conversation.say("there", now).unwrap();
    settle(&mut a, &mut b, now);
    assert_eq!((a.heard, b.heard), (vec!["hello".to_owned()], vec!["before we met".into(), "there".into()]));
    assert_eq!((a.conversation.undelivered(), b.conversation.undelivered()), (0, 0));
    assert_eq!(a.events[0], Event::Here { anew: false });
}

#[test]
fn what_was_not_acknowledged_is_said_again_once() {
    let (mut a, mut b, now) = (Side::new(1), Side::new(2), Instant::now());
    meet(&mut a, &mut b);
    settle(&mut a, &mut b, now);
    for line in ["one", "two", "three"] {
        a.conversation.say(line, now).unwrap();
    }
    // Two arrive and are shown, no acknowledgement comes back; the third is lost.
    for _ in 0..2 {
        let frame = a.conversation.poll_transmit(now).unwrap();
        b.take(&frame, now);
    }
    assert!(a.conversation.poll_transmit(now).is_some());
    for side in [&mut a, &mut b] {
        side.conversation.handle_loss();
    }
    assert_eq!(a.conversation.undelivered(), 3);
    meet(&mut a, &mut b);
    settle(&mut a, &mut b, now);
    assert_eq!(b.heard, ["one", "two", "three"]);
    assert_eq!(a.conversation.undelivered(), 0);
}

#[test]
fn a_late_line_is_told_of_once_and_so_is_its_arrival() {
    let (mut a, mut b, start) = (Side::new(1), Side::new(2), Instant::now());
    a.conversation.say("anybody?", start).unwrap();
    assert_eq!(a.conversation.poll_timeout(), Some(start + LATE));
    a.conversation.handle_timeout(start + LATE - Duration::from_millis(1));
    assert_eq!(a.conversation.poll_event(), None);
    for _ in 0..2 {
        a.conversation.handle_timeout(start + LATE);
    }
    a.show();
    assert_eq!(a.events, [Event::Late { number: 1, text: "anybody?".into() }]);
    assert_eq!(a.conversation.poll_timeout(), None);
    let now = start + Duration::from_secs(60);
    meet(&mut a, &mut b);
    settle(&mut a, &mut b, now);
    let after = Duration::from_secs(60);
    assert!(a.events.contains(&Event::Delivered { number: 1, text: "anybody?".into(), after }));
    assert!(b.events.contains(&Event::Line { text: "anybody?".into(), age: after }));
}

#[test]
fn a_program_that_is_started_anew_hears_what_was_not_heard() {
    let (mut a, mut b, now) = (Side::new(1), Side::new(2), Instant::now());
    meet(&mut a, &mut b);
    a.conversation.say("to the first", now).unwrap();
    settle(&mut a, &mut b, now);
    a.conversation.handle_loss();
    a.conversation.say("to the second", now).unwrap();
    let mut b = Side::new(3);
    meet(&mut a, &mut b);
    b.conversation.say("I am new", now).unwrap();
    settle(&mut a, &mut b, now);
    assert_eq!((a.heard, b.heard), (vec!["I am new".to_owned()], vec!["to the second".to_owned()]));
    assert!(a.events.contains(&Event::Here { anew: true }));
}

#[test]
fn goodbye_comes_after_the_last_line() {
    let (mut a, mut b, now) = (Side::new(1), Side::new(2), Instant::now());
    a.conversation.say("last words", now).unwrap();
    a.conversation.leave();
    meet(&mut a, &mut b);
    settle(&mut a, &mut b, now);
    assert!(a.conversation.is_over() && b.conversation.is_over() && !b.conversation.is_met());
    assert_eq!(b.heard, ["last words"]);
    assert_eq!(b.events.last(), Some(&Event::Left));
    // To one who has left nothing is sent.
    b.conversation.say("wait", now).unwrap();
    assert_eq!(b.conversation.poll_transmit(now), None);
    assert_eq!(b.conversation.undelivered(), 1);
}

#[test]
fn who_breaks_the_rules_is_found_out() {
    let now = Instant::now();
    let hello = Frame::Hello { epoch: 9, heard: None };
    let line = |number| Frame::Line { number, age: 0, text: "x".into() };
    let broken: [&[Frame]; 8] = [
        &[line(1)],
        &[Frame::Bye],
        &[Frame::Heard(0)],
        &[hello.clone(), hello.clone()],
        &[hello.clone(), Frame::Heard(1)],
        &[Frame::Hello { epoch: 9, heard: Some((1, 1)) }],
        &[hello.clone(), line(1), line(3)],
        &[hello.clone(), Frame::Bye, line(1)],
    ];
    for frames in broken {
        let mut conversation = Conversation::new(1);
        conversation.handle_stream();
        let (last, first) = frames.split_last().unwrap();
        for frame in first {
            assert_eq!(conversation.handle_frame(frame.clone(), now), Ok(()), "{frames:?}");
        }
        assert_eq!(conversation.handle_frame(last.clone(), now), Err(Violation), "{frames:?}");
    }
}

#[test]
fn only_so_many_lines_wait() {
    let (mut conversation, now) = (Conversation::new(1), Instant::now());
    for _ in 0..MAX_WAITING {
        conversation.say("x", now).unwrap();
    }
    assert_eq!(conversation.say("x", now), Err(Full));
}

/// Streams break at any moment, frames on their way are lost: each line is shown once, in order.
#[test]
fn any_number_of_losses_costs_no_line_and_doubles_none() {
    for seed in 0..300 {
        let mut random = StdRng::seed_from_u64(seed);
        let (mut a, mut b, now) = (Side::new(1), Side::new(2), Instant::now());
        let mut said = (0, 0);
        for _ in 0..20 {
            meet(&mut a, &mut b);
            let (mut to_a, mut to_b) = (Vec::new(), Vec::new());
            for _ in 0..random.random_range(0..40) {
                match random.random_range(0..6) {
                    0 => {
                        said.0 += 1;
                        a.conversation.say(&said.0.to_string(), now).unwrap();
                    }
                    1 => {
                        said.1 += 1;
                        b.conversation.say(&said.1.to_string(), now).unwrap();
                    }
                    2 => to_b.extend(a.conversation.poll_transmit(now)),
                    3 => to_a.extend(b.conversation.poll_transmit(now)),
                    4 if !to_a.is_empty() => a.take(&to_a.remove(0), now),
                    5 if !to_b.is_empty() => b.take(&to_b.remove(0), now),
                    _ => {}
                }
            }
            // One side may notice first.
            a.conversation.handle_loss();
            if random.random() {
                b.conversation.handle_loss();
            }
        }
        meet(&mut a, &mut b);
        settle(&mut a, &mut b, now);
        let all = |count: i32| (1..=count).map(|number| number.to_string()).collect::<Vec<_>>();
        assert_eq!((b.heard, a.heard), (all(said.0), all(said.1)), "seed {seed}");
    }
}

#[test]
fn garbage_is_no_frame_and_no_panic() {
    let mut random = StdRng::seed_from_u64(1);
    let mut conversation = Conversation::new(1);
    conversation.handle_stream();
    for _ in 0..50_000 {
        let length = random.random_range(0..48);
        let bytes: Vec<u8> =
            (0..length).map(|_| random.random::<u8>() >> random.random_range(0..8)).collect();
        if let Ok(frame) = Frame::decode(&bytes) {
            let _ = conversation.handle_frame(frame, Instant::now());
            while conversation.poll_event().is_some() {}
            let _ = conversation.poll_transmit(Instant::now());
        }
    }
}

#[test]
fn a_line_that_is_too_long_is_no_frame() {
    let line = |length| Frame::Line { number: u64::MAX, age: u64::MAX, text: "x".repeat(length) };
    let longest = line(MAX_LINE).encode();
    assert!(longest.len() <= MAX_FRAME + 2);
    assert_eq!(Frame::decode(&longest[2..]).unwrap(), line(MAX_LINE));
    let body = postcard::to_stdvec(&line(MAX_LINE + 1)).unwrap();
    assert!(Frame::decode(&body).is_err());
}

#[test]
fn long_lines_go_in_pieces_between_characters() {
    assert_eq!(pieces("").collect::<Vec<_>>(), [""]);
    assert_eq!(pieces("short").collect::<Vec<_>>(), ["short"]);
    let long = "ä".repeat(MAX_LINE);
    let parts: Vec<&str> = pieces(&long).collect();
    assert!(parts.iter().all(|part| part.len() <= MAX_LINE) && parts.len() == 2, "{}", parts.len());
    assert_eq!(parts.concat(), long);
    let odd = format!("x{long}");
    assert_eq!(pieces(&odd).collect::<String>(), odd);
}

#[test]
fn what_could_harm_a_terminal_is_written_out() {
    for (line, shown) in [
        ("plain, ünïcödé, العربية, 👩‍👩‍👧", "plain, ünïcödé, العربية, 👩‍👩‍👧"),
        ("a\tb", "a\tb"),
        ("\u{1b}[2J\u{7}", "\\u{1b}[2J\\u{7}"),
        ("\r\n\u{8}\u{7f}", "\\u{d}\\u{a}\\u{8}\\u{7f}"),
        ("\u{9b}31m\u{85}", "\\u{9b}31m\\u{85}"),
        ("\u{202e}txt.exe\u{202c}", "\\u{202e}txt.exe\\u{202c}"),
        ("\u{2066}\u{200f}\u{2028}\u{feff}\u{e0041}", "\\u{2066}\\u{200f}\\u{2028}\\u{feff}\\u{e0041}"),
    ] {
        assert_eq!(harmless(line), shown);
    }
}
