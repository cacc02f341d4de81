//! Senders that mean harm: whatever they say, nothing is written outside of the folder.

use std::fs;
use std::os::unix::fs::symlink;
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use tempfile::TempDir;

use super::message::{FromSender, VERSION, content_header, encode};
use super::transfer_tests::{Line, Willing};
use super::tree::GROUP;
use super::*;

const NOW: Modified = Modified { seconds: 1, nanoseconds: 2 };

fn folder(parent: Option<u32>, name: &[u8]) -> Entry {
    Entry { parent, name: name.to_vec(), kind: Kind::Folder { mode: 0o755, modified: NOW } }
}

fn file(parent: Option<u32>, name: &[u8]) -> Entry {
    Entry { parent, name: name.to_vec(), kind: Kind::File { size: 4, mode: 0o6777, modified: NOW } }
}

fn link(parent: Option<u32>, name: &[u8], target: &[u8]) -> Entry {
    Entry { parent, name: name.to_vec(), kind: Kind::Link { target: target.to_vec() } }
}

fn offer(entries: Vec<Entry>) -> Vec<u8> {
    let mut frames = Vec::new();
    encode(&FromSender::Offer { version: VERSION, entries: entries.len() as u32 }, &mut frames);
    encode(&FromSender::Entries(entries), &mut frames);
    frames
}

/// What a sender of four bytes says.
fn content_of(file: u32, content: &[u8; 4]) -> Vec<u8> {
    let mut frames = Vec::new();
    encode(&FromSender::Begin { file, size: 4, mode: 0o6777, modified: NOW }, &mut frames);
    frames.extend(content_header(4));
    frames.extend(content);
    encode(&FromSender::End { hash: *blake3::hash(content).as_bytes() }, &mut frames);
    frames
}

/// A folder in a folder: what is written outside of the inner one is seen in the outer one.
struct Prison {
    outer: TempDir,
}

impl Prison {
    fn new() -> Self {
        let outer = TempDir::new().unwrap();
        fs::create_dir(outer.path().join("inner")).unwrap();
        fs::create_dir(outer.path().join("victim")).unwrap();
        fs::write(outer.path().join("victim/file"), "mine").unwrap();
        symlink("../victim", outer.path().join("inner/way-out")).unwrap();
        symlink("../victim/file", outer.path().join("inner/to-file")).unwrap();
        Self { outer }
    }

    fn is_intact(&self) -> bool {
        let names = |path: &str| {
            let mut names: Vec<_> = fs::read_dir(self.outer.path().join(path))
                .unwrap()
                .map(|entry| entry.unwrap().file_name())
                .collect();
            names.sort();
            names
        };
        names("") == ["inner", "victim"]
            && names("victim") == ["file"]
            && fs::read_to_string(self.outer.path().join("victim/file")).unwrap() == "mine"
    }

    /// Says `offer`, and once that has been answered `content`, if there is any, to a receiver that takes all and replaces all.
    async fn say(&self, line: &Line, offer: Vec<u8>, content: Vec<u8>) -> Result<Received, ReceiveError> {
        let ((mut send_near, mut receive_near), (send_far, receive_far)) = line.stream().await;
        let saying = async {
            // It may have heard enough before the end.
            let _ = send_near.write_all(&offer).await;
            if !content.is_empty() {
                let _ = receive_near.read_chunk(100, true).await;
            }
            let _ = send_near.write_all(&content).await;
            let _ = send_near.finish();
            let _ = receive_near.read_to_end(1 << 20).await;
        };
        let mut consent = Willing { replace: true, asked: Vec::new() };
        let progress = Arc::default();
        let inner = self.outer.path().join("inner");
        let both =
            async { tokio::join!(receive(send_far, receive_far, &inner, &mut consent, &progress), saying) };
        let (received, ()) = tokio::time::timeout(Duration::from_secs(60), both).await.expect("it ends");
        received
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn offers_that_would_escape_are_refused_whole() {
    let offers = [
        vec![file(None, b"fine"), file(None, b"../victim/new")],
        vec![file(None, b"fine"), file(None, b"..")],
        vec![file(None, b"/tmp/x")],
        vec![folder(None, b".."), file(Some(0), b"x")],
        vec![folder(None, b"a/b")],
        vec![file(None, b"")],
        vec![file(None, b"a\0b")],
        vec![file(None, b"x.peer-part")],
        vec![file(Some(0), b"own parent")],
        vec![file(Some(7), b"no parent")],
        vec![link(None, b"l", b"../victim"), file(Some(0), b"file")],
        vec![folder(None, b"d"), link(Some(0), b"l", b"../../victim")],
        vec![folder(None, b"d"), link(Some(0), b"l", b"/")],
        vec![folder(None, b"d"), link(Some(0), b"l", b"x/../../..")],
        vec![folder(None, b"d"), link(Some(0), b"x", b"y"), folder(Some(0), b"x")],
    ];
    let line = Line::new().await;
    for entries in offers {
        let prison = Prison::new();
        let content = [content_of(0, b"evil"), content_of(1, b"evil")].concat();
        let received = prison.say(&line, offer(entries.clone()), content).await;
        assert!(matches!(received, Err(ReceiveError::Offer(_))), "{entries:?}: {received:?}");
        assert!(prison.is_intact(), "{entries:?}");
        let names = fs::read_dir(prison.outer.path().join("inner")).unwrap().count();
        assert_eq!(names, 2, "{entries:?}: something was written");
    }
}

/// Links that were there before lead out; nothing goes through them, whatever the offer calls itself.
#[tokio::test(flavor = "multi_thread")]
async fn links_that_lead_out_are_no_way_out() {
    let line = Line::new().await;
    let prison = Prison::new();
    let offered = offer(vec![folder(None, b"way-out"), file(Some(0), b"file")]);
    let received = prison.say(&line, offered, content_of(1, b"evil")).await;
    assert!(matches!(received, Err(ReceiveError::Store(_))), "{received:?}");
    assert!(prison.is_intact());
    // A file in place of a link replaces the link, since this receiver replaces all.
    let offered = offer(vec![file(None, b"to-file")]);
    let received = prison.say(&line, offered, content_of(0, b"evil")).await;
    assert_eq!(received.unwrap().received, 1);
    assert!(prison.is_intact());
    assert_eq!(fs::read_to_string(prison.outer.path().join("inner/to-file")).unwrap(), "evil");
}

#[tokio::test(flavor = "multi_thread")]
async fn content_must_be_what_was_asked_for() {
    let line = Line::new().await;
    let entries = || vec![file(None, b"a"), file(None, b"b")];
    let begin = |file, size| FromSender::Begin { file, size, mode: 0, modified: NOW };
    let cases: Vec<(&str, Vec<FromSender>)> = vec![
        ("another file", vec![begin(1, 4)]),
        ("no file", vec![begin(9, 4)]),
        ("no question", vec![FromSender::Same { file: 0 }]),
        ("beyond the end", vec![begin(0, 4), FromSender::Hole { length: 5 }]),
        ("less than all", vec![begin(0, 4), FromSender::End { hash: [0; 32] }]),
        ("what is not here", vec![begin(0, 4 * GROUP), FromSender::Skip { groups: 2 }]),
        ("any number of groups", vec![begin(0, 4 * GROUP), FromSender::Skip { groups: u64::MAX }]),
        (
            "another hash",
            vec![begin(0, 4), FromSender::Hole { length: 4 }, FromSender::End { hash: [0; 32] }],
        ),
        ("an offer", vec![FromSender::Offer { version: VERSION, entries: 1 }]),
    ];
    for (name, messages) in cases {
        let prison = Prison::new();
        let ((mut send_near, mut receive_near), (send_far, receive_far)) = line.stream().await;
        let saying = async {
            send_near.write_all(&offer(entries())).await.unwrap();
            // The first answer: it has accepted.
            receive_near.read_chunk(100, true).await.unwrap();
            let mut frames = Vec::new();
            messages.iter().for_each(|message| encode(message, &mut frames));
            let _ = send_near.write_all(&frames).await;
            let _ = receive_near.read_to_end(1 << 20).await;
        };
        let mut consent = Willing { replace: true, asked: Vec::new() };
        let inner = prison.outer.path().join("inner");
        let progress = Arc::default();
        let receiving = receive(send_far, receive_far, &inner, &mut consent, &progress);
        let both = async { tokio::join!(receiving, saying) };
        let (received, ()) = tokio::time::timeout(Duration::from_secs(60), both).await.expect(name);
        let refused = matches!(received, Err(ReceiveError::Protocol(_) | ReceiveError::Content { .. }));
        assert!(refused, "{name}: {received:?}");
        assert!(!inner.join("a").exists() && prison.is_intact(), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn random_offers_stay_inside() {
    let line = Line::new().await;
    let mut taken = 0;
    for seed in 0..150 {
        let mut random = SmallRng::seed_from_u64(seed);
        let names: [&[u8]; 12] = [
            b"a",
            b"b",
            b"..",
            b".",
            b"way-out",
            b"to-file",
            b"victim",
            b"a/b",
            b"\xff",
            b"../victim",
            b"inner",
            b"c",
        ];
        let count = random.random_range(1..8);
        let mut entries: Vec<Entry> = Vec::new();
        for _ in 0..count {
            let parent = random.random_bool(0.6).then(|| random.random_range(0..count as u32));
            // More sound names than others, so that some offers are taken.
            let pick = if random.random_bool(0.9) {
                [0, 1, 8, 11, 10][random.random_range(0..5)]
            } else {
                random.random_range(0..12)
            };
            let name = names[pick];
            entries.push(match random.random_range(0..4) {
                0 | 1 => folder(parent, name),
                2 => file(parent, name),
                _ => link(parent, name, names[random.random_range(0..12)]),
            });
        }
        let prison = Prison::new();
        let mut offer = offer(entries.clone());
        let mut content = Vec::new();
        for (index, entry) in entries.iter().enumerate() {
            if matches!(entry.kind, Kind::File { .. }) {
                content.extend(content_of(index as u32, b"evil"));
            }
        }
        if random.random_bool(0.2) && !content.is_empty() {
            let at = random.random_range(0..content.len());
            content[at] = random.random();
        } else if random.random_bool(0.3) {
            let at = random.random_range(0..offer.len());
            offer[at] = random.random();
            // It may announce more than there is, and be waited for.
            content.clear();
        }
        let received = prison.say(&line, offer, content).await;
        taken += u32::from(received.is_ok());
        assert!(prison.is_intact(), "seed {seed}: {entries:?}: {received:?}");
    }
    assert!(taken > 5, "only {taken} offers were taken");
}
