//! Both sides over a QUIC connection on loopback, with real folders.

use std::fs;
use std::io::{Read as _, Seek as _, Write as _};
use std::net::Ipv4Addr;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use quinn::{Connection, RecvStream, SendStream};
use rand::rngs::SmallRng;
use rand::{Rng as _, RngCore as _, SeedableRng as _};
use rendezvous_wire::{KeyPair, SESSION_ALPN, tls};
use tempfile::TempDir;

use super::message::{ToSender, encode};
use super::tree::GROUP;
use super::*;

/// Two connected QUIC endpoints.
pub(crate) struct Line {
    _endpoints: [quinn::Endpoint; 2],
    pub(crate) near: Connection,
    pub(crate) far: Connection,
}

impl Line {
    pub(crate) async fn new() -> Self {
        let (own, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let server = tls::server_config(&other, Some(own.id()), SESSION_ALPN).unwrap();
        let server = quinn::crypto::rustls::QuicServerConfig::try_from(server).unwrap();
        let server = quinn::ServerConfig::with_crypto(Arc::new(server));
        let listening = quinn::Endpoint::server(server, (Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let mut dialling = quinn::Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let client = tls::client_config(&own, other.id(), SESSION_ALPN).unwrap();
        let client = quinn::crypto::rustls::QuicClientConfig::try_from(client).unwrap();
        dialling.set_default_client_config(quinn::ClientConfig::new(Arc::new(client)));
        let connecting = dialling.connect(listening.local_addr().unwrap(), "peer").unwrap();
        let accepting = async { listening.accept().await.unwrap().await.unwrap() };
        let (near, far) = tokio::join!(connecting, accepting);
        Self { _endpoints: [dialling, listening], near: near.unwrap(), far }
    }

    /// One stream, seen from both sides.
    pub(crate) async fn stream(&self) -> ((SendStream, RecvStream), (SendStream, RecvStream)) {
        let (mut send, receive) = self.near.open_bi().await.unwrap();
        send.write_all(&[0]).await.unwrap();
        let (far_send, mut far_receive) = self.far.accept_bi().await.unwrap();
        far_receive.read_exact(&mut [0]).await.unwrap();
        ((send, receive), (far_send, far_receive))
    }
}

/// Takes everything; replaces or not.
pub(super) struct Willing {
    pub(super) replace: bool,
    pub(super) asked: Vec<String>,
}

impl Consent for Willing {
    async fn accept(&mut self, _: &Manifest) -> bool {
        true
    }

    async fn replace(&mut self, paths: &[String]) -> bool {
        self.asked = paths.to_vec();
        self.replace
    }
}

struct Done {
    sent: Result<Sent, SendError>,
    received: Result<Received, ReceiveError>,
    carried: u64,
    asked: Vec<String>,
}

async fn transfer(paths: &[PathBuf], target: &Path, replace: bool) -> Done {
    let line = Line::new().await;
    let ((send_near, receive_near), (send_far, receive_far)) = line.stream().await;
    let source = Source::collect(paths).unwrap();
    let (sending, receiving) = (Arc::new(Progress::default()), Arc::new(Progress::default()));
    let mut consent = Willing { replace, asked: Vec::new() };
    let both = async {
        tokio::join!(
            send(send_near, receive_near, &source, &sending),
            receive(send_far, receive_far, target, &mut consent, &receiving)
        )
    };
    let (sent, received) = tokio::time::timeout(Duration::from_secs(120), both).await.expect("it ends");
    if received.is_ok() {
        assert_eq!(sending.now().carried, receiving.now().carried);
    }
    Done { sent, received, carried: receiving.now().carried, asked: consent.asked }
}

/// Everything in a folder that is to be the same, in order.
fn listing(root: &Path) -> Vec<String> {
    fn list(root: &Path, path: &Path, into: &mut Vec<String>) {
        let mut entries: Vec<_> = fs::read_dir(path).unwrap().map(Result::unwrap).collect();
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let (path, metadata) = (entry.path(), entry.metadata().unwrap());
            let name = path.strip_prefix(root).unwrap();
            if metadata.is_symlink() {
                into.push(format!("{name:?} -> {:?}", fs::read_link(&path).unwrap()));
                continue;
            }
            let (mode, modified) = (metadata.mode(), (metadata.mtime(), metadata.mtime_nsec()));
            if metadata.is_dir() {
                into.push(format!("{name:?}/ {mode:o} {modified:?}"));
                list(root, &path, into);
            } else {
                let hash = blake3::hash(&fs::read(&path).unwrap());
                into.push(format!("{name:?} {mode:o} {modified:?} {hash}"));
            }
        }
    }
    let mut lines = Vec::new();
    list(root, root, &mut lines);
    lines
}

/// Random bytes, the same for the same seed.
fn fill(path: &Path, seed: u64, size: usize) {
    let mut content = vec![0; size];
    SmallRng::seed_from_u64(seed).fill_bytes(&mut content);
    fs::write(path, content).unwrap();
}

fn date(path: &Path, seconds: u64) {
    let modified = SystemTime::UNIX_EPOCH + Duration::new(seconds, 123_456_789);
    fs::File::open(path).unwrap().set_modified(modified).unwrap();
}

/// A tree with something of every kind.
fn garden(root: &Path) -> PathBuf {
    let top = root.join("garden");
    fs::create_dir_all(top.join("beds/empty")).unwrap();
    fs::create_dir(top.join("locked")).unwrap();
    fill(&top.join("none"), 0, 0);
    fill(&top.join("one"), 1, 1);
    fill(&top.join("group"), 2, GROUP as usize);
    fill(&top.join("more"), 3, 3 * GROUP as usize + 77);
    fill(&top.join("locked/inside"), 4, 5000);
    fill(&top.join(std::ffi::OsStr::from_bytes(b"\xff\xfe not utf-8 \n")), 5, 10);
    for number in 0..300 {
        fill(&top.join(format!("beds/{number}")), number, number as usize * 11);
    }
    symlink("beds/7", top.join("link")).unwrap();
    symlink("../one", top.join("beds/up")).unwrap();
    symlink("nowhere", top.join("dangling")).unwrap();
    fs::set_permissions(top.join("one"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(top.join("none"), fs::Permissions::from_mode(0o400)).unwrap();
    date(&top.join("one"), 1_000_000_000);
    date(&top.join("beds/empty"), 77);
    date(&top.join("beds"), 5);
    date(&top.join("locked"), 999);
    fs::set_permissions(top.join("locked"), fs::Permissions::from_mode(0o555)).unwrap();
    top
}

/// So that it can be removed.
fn unlock(root: &Path) {
    let _ = fs::set_permissions(root.join("garden/locked"), fs::Permissions::from_mode(0o755));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tree_arrives_as_it_was() {
    let (from, to) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let paths = [garden(from.path())];
    let done = transfer(&paths, to.path(), false).await;
    let received = done.received.unwrap();
    assert_eq!((received.received, received.same), (306, 0));
    assert!(received.kept.is_empty() && received.failed.is_empty());
    assert_eq!(done.sent.unwrap(), Sent::default());
    assert_eq!(listing(to.path()), listing(from.path()));
    // Once more: all of it is there, and none of it is carried.
    let again = transfer(&paths, to.path(), false).await;
    let received = again.received.unwrap();
    assert_eq!((received.received, received.same, again.carried), (0, 306, 0));
    assert_eq!(listing(to.path()), listing(from.path()));
    unlock(from.path());
    unlock(to.path());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_there_is_kept_unless_told_otherwise() {
    let (from, to) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let names = ["longer", "same-size", "identical", "new", "folder", "linked"];
    for name in names {
        fs::write(from.path().join(name), "what is sent").unwrap();
    }
    fs::write(to.path().join("longer"), "what was there before").unwrap();
    fs::write(to.path().join("same-size"), "what was her").unwrap();
    fs::write(to.path().join("identical"), "what is sent").unwrap();
    fs::create_dir(to.path().join("folder")).unwrap();
    let victim = TempDir::new().unwrap();
    fs::write(victim.path().join("file"), "not yours").unwrap();
    symlink(victim.path().join("file"), to.path().join("linked")).unwrap();
    let paths = names.map(|name| from.path().join(name));
    let done = transfer(&paths, to.path(), false).await;
    let received = done.received.unwrap();
    assert_eq!((received.received, received.same), (1, 1));
    assert_eq!(received.kept, ["longer", "same-size", "folder", "linked"]);
    assert_eq!(done.asked, received.kept);
    assert_eq!(done.sent.unwrap(), Sent { kept: 4, failed: 0 });
    assert_eq!(fs::read_to_string(to.path().join("longer")).unwrap(), "what was there before");
    assert_eq!(fs::read_to_string(to.path().join("same-size")).unwrap(), "what was her");
    // Told otherwise; a folder never gives way, a link does, and not what it leads to.
    let done = transfer(&paths, to.path(), true).await;
    let received = done.received.unwrap();
    assert_eq!((received.received, received.same, received.kept), (3, 2, vec!["folder".to_owned()]));
    for name in ["longer", "same-size", "linked"] {
        assert_eq!(fs::read_to_string(to.path().join(name)).unwrap(), "what is sent");
    }
    assert!(!to.path().join("linked").is_symlink());
    assert_eq!(fs::read_to_string(victim.path().join("file")).unwrap(), "not yours");
    assert_eq!(fs::read_dir(to.path()).unwrap().count(), names.len(), "no part is left");
}

#[tokio::test(flavor = "multi_thread")]
async fn links_in_the_target_are_not_followed() {
    let (from, to, victim) = (TempDir::new().unwrap(), TempDir::new().unwrap(), TempDir::new().unwrap());
    fs::create_dir_all(from.path().join("d/e")).unwrap();
    fs::write(from.path().join("d/e/f"), "sent").unwrap();
    symlink(victim.path(), to.path().join("d")).unwrap();
    let done = transfer(&[from.path().join("d")], to.path(), true).await;
    let error = done.received.unwrap_err();
    assert!(matches!(error, ReceiveError::Store(_)) && error.to_string().contains("no folder"), "{error}");
    assert!(matches!(done.sent, Err(SendError::Receiver(ReceiverProblem::Disk))));
    assert_eq!(fs::read_dir(victim.path()).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sparse_file_stays_sparse() {
    let (from, to) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let path = from.path().join("disk.img");
    let size = 300 << 20;
    let file = fs::File::create(&path).unwrap();
    file.set_len(size).unwrap();
    // Some within groups, some across, the last byte a hole.
    for at in [0, 5 * GROUP + 300_000, 20 * GROUP - 3000, 299 * GROUP] {
        file.write_all_at(&[at as u8 | 1; 10_000], at).unwrap();
    }
    let done = transfer(std::slice::from_ref(&path), to.path(), false).await;
    assert_eq!(done.received.unwrap().received, 1);
    assert!(done.carried < 200_000, "{}", done.carried);
    let target = to.path().join("disk.img");
    assert!(fs::read(&path).unwrap() == fs::read(&target).unwrap());
    let blocks = fs::metadata(&target).unwrap().blocks() * 512;
    assert!(blocks < 400_000, "{blocks} bytes on disk");
}

/// What is in a part counts as far as it is the sender's, byte for byte, and no further.
#[tokio::test(flavor = "multi_thread")]
async fn a_part_is_believed_only_where_it_is_right() {
    let (from, to) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let path = from.path().join("big");
    fill(&path, 9, 20 * GROUP as usize + 5);
    let content = fs::read(&path).unwrap();
    // Twelve groups and a bit: one flipped bit, one group never written.
    let mut part = content[..12 * GROUP as usize + 1000].to_vec();
    part[3 * GROUP as usize + 17] ^= 1;
    let file = fs::File::create(to.path().join("big.peer-part")).unwrap();
    file.write_all_at(&part[..5 * GROUP as usize], 0).unwrap();
    file.write_all_at(&part[6 * GROUP as usize..], 6 * GROUP).unwrap();
    drop(file);
    let done = transfer(&[path], to.path(), false).await;
    assert_eq!(done.received.unwrap().received, 1);
    assert!(fs::read(to.path().join("big")).unwrap() == content);
    assert_eq!(done.carried, 10 * GROUP + 5, "two of the twelve groups, and the rest");
}

/// A group of several pieces of data with holes in between that is here, and wrong: all of its pieces come.
#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_part_of_a_sparse_file_is_made_right() {
    let (from, to) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let (path, part) = (from.path().join("sparse"), to.path().join("sparse.peer-part"));
    for (path, wrong) in [(&path, 0), (&part, 1)] {
        let file = fs::File::create(path).unwrap();
        file.set_len(4 * GROUP).unwrap();
        for place in [100_000, 400_000, 900_000] {
            file.write_all_at(&[7; 9000], GROUP + place).unwrap();
        }
        file.write_all_at(&[7 + wrong], GROUP + 400_000).unwrap();
        file.write_all_at(&[9; 5000], 3 * GROUP).unwrap();
    }
    let done = transfer(std::slice::from_ref(&path), to.path(), false).await;
    assert_eq!(done.received.unwrap().received, 1);
    assert!(fs::read(to.path().join("sparse")).unwrap() == fs::read(&path).unwrap());
}

/// A part of a file that has since become another, shorter one.
#[tokio::test(flavor = "multi_thread")]
async fn a_part_of_an_older_version_does_no_harm() {
    let (from, to) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let path = from.path().join("big");
    fill(&path, 9, 9 * GROUP as usize);
    fs::copy(&path, to.path().join("big.peer-part")).unwrap();
    let mut file = fs::File::options().write(true).open(&path).unwrap();
    file.set_len(4 * GROUP + 5).unwrap();
    file.seek(std::io::SeekFrom::Start(GROUP)).unwrap();
    file.write_all(b"changed").unwrap();
    drop(file);
    let done = transfer(std::slice::from_ref(&path), to.path(), false).await;
    assert_eq!(done.received.unwrap().received, 1);
    assert!(fs::read(to.path().join("big")).unwrap() == fs::read(&path).unwrap());
    assert_eq!(done.carried, GROUP, "the group that has changed");
}

/// The connection goes at a random moment, several times; what is carried in all is hardly more than what there is.
#[tokio::test(flavor = "multi_thread")]
async fn broken_connections_cost_little() {
    let (from, to) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let top = from.path().join("top");
    fs::create_dir(&top).unwrap();
    fill(&top.join("a"), 1, 30 << 20);
    for number in 0..200 {
        fill(&top.join(format!("b{number}")), number, 5000);
    }
    fill(&top.join("c"), 2, 30 << 20);
    let source = Source::collect(&[top]).unwrap();
    let (mut carried, mut breaks) = (0, 0);
    let mut random = SmallRng::seed_from_u64(1);
    loop {
        let line = Line::new().await;
        let ((send_near, receive_near), (send_far, receive_far)) = line.stream().await;
        let (sending, receiving) = (Arc::new(Progress::default()), Arc::new(Progress::default()));
        let mut consent = Willing { replace: false, asked: Vec::new() };
        // After a third more each time, so that it ends.
        let limit = random.random_range(5_u64 << 20..40 << 20);
        let near = line.near.clone();
        let watched = receiving.clone();
        let cut = tokio::spawn(async move {
            while watched.now().carried < limit {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            near.close(0_u8.into(), b"cut");
        });
        let (_, received) = tokio::join!(
            send(send_near, receive_near, &source, &sending),
            receive(send_far, receive_far, to.path(), &mut consent, &receiving)
        );
        cut.abort();
        carried += receiving.now().carried;
        match received {
            Ok(_) => break,
            Err(error) => assert!(error.is_transient(), "{error}"),
        }
        breaks += 1;
    }
    assert!(breaks > 0);
    assert_eq!(listing(to.path()), listing(from.path()));
    let all = source.manifest().bytes();
    assert!(carried <= all + breaks * 2 * GROUP, "{carried} carried of {all}, {breaks} breaks");
}

/// A file that is written to all the time is given up on by name; the others arrive.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_keeps_changing_is_named() {
    let (from, to) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let (restless, quiet) = (from.path().join("restless"), from.path().join("quiet"));
    fill(&restless, 1, 40 << 20);
    fill(&quiet, 2, 100_000);
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (path, stopped) = (restless.clone(), stop.clone());
    let writing = std::thread::spawn(move || {
        let file = fs::File::options().write(true).open(path).unwrap();
        let mut count = 0_u64;
        while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
            file.write_all_at(&count.to_le_bytes(), (count % 4096) * 8).unwrap();
            count += 1;
        }
    });
    let done = transfer(&[restless, quiet.clone()], to.path(), false).await;
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    writing.join().unwrap();
    let received = done.received.unwrap();
    assert_eq!(received.failed, [("restless".to_owned(), FileProblem::Changing)]);
    assert_eq!((received.received, done.sent.unwrap().failed), (1, 1));
    assert_eq!(fs::read(to.path().join("quiet")).unwrap(), fs::read(quiet).unwrap());
    assert!(!to.path().join("restless").exists());
}

/// A file that has changed once, between the offer and the question, arrives as it is now.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_has_changed_since_the_offer_arrives_as_it_is() {
    struct Meddling(PathBuf);
    impl Consent for Meddling {
        async fn accept(&mut self, _: &Manifest) -> bool {
            fs::write(&self.0, "now it is this").unwrap();
            true
        }

        async fn replace(&mut self, _: &[String]) -> bool {
            false
        }
    }
    let (from, to) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let path = from.path().join("file");
    fs::write(&path, "what it was").unwrap();
    let source = Source::collect(std::slice::from_ref(&path)).unwrap();
    let line = Line::new().await;
    let ((send_near, receive_near), (send_far, receive_far)) = line.stream().await;
    let progress = Arc::default();
    let mut consent = Meddling(path);
    let (sent, received) = tokio::join!(
        send(send_near, receive_near, &source, &progress),
        receive(send_far, receive_far, to.path(), &mut consent, &progress)
    );
    sent.unwrap();
    assert_eq!(received.unwrap().received, 1);
    assert_eq!(fs::read_to_string(to.path().join("file")).unwrap(), "now it is this");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_declined_is_not_written() {
    struct No;
    impl Consent for No {
        async fn accept(&mut self, offer: &Manifest) -> bool {
            assert_eq!(offer.top().collect::<Vec<_>>(), ["file"]);
            false
        }

        async fn replace(&mut self, _: &[String]) -> bool {
            unreachable!("nothing was accepted")
        }
    }
    let (from, to) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    fs::write(from.path().join("file"), "x").unwrap();
    let source = Source::collect(&[from.path().join("file")]).unwrap();
    let line = Line::new().await;
    let ((send_near, receive_near), (send_far, receive_far)) = line.stream().await;
    let (progress, mut no) = (Arc::default(), No);
    let (sent, received) = tokio::join!(
        send(send_near, receive_near, &source, &progress),
        receive(send_far, receive_far, to.path(), &mut no, &progress)
    );
    assert!(matches!(sent, Err(SendError::Refused(Refusal::Declined))));
    assert!(matches!(received, Err(ReceiveError::Declined)));
    assert_eq!(fs::read_dir(to.path()).unwrap().count(), 0);
}

#[test]
fn what_cannot_be_sent_is_left_out_and_named() {
    let from = TempDir::new().unwrap();
    let top = from.path().join("top");
    fs::create_dir_all(top.join("deep")).unwrap();
    fs::write(top.join("file"), "x").unwrap();
    fs::write(top.join("file.peer-part"), "x").unwrap();
    symlink("/etc/passwd", top.join("absolute")).unwrap();
    symlink("../../x", top.join("deep/out")).unwrap();
    symlink("../file", top.join("deep/in")).unwrap();
    let socket = std::os::unix::net::UnixListener::bind(top.join("socket")).unwrap();
    let source = Source::collect(std::slice::from_ref(&top)).unwrap();
    drop(socket);
    let left_out: Vec<_> = source.left_out().iter().map(|left| left.reason.clone()).collect();
    let expected = [LeftOutReason::Link, LeftOutReason::Link, LeftOutReason::Part, LeftOutReason::Special];
    assert_eq!(left_out, expected);
    assert_eq!(source.manifest().entries().len(), 4);
    // Named outright, it is an error.
    let error = Source::collect(&[top.join("file.peer-part")]).unwrap_err();
    assert!(matches!(error, SourceError::Unsendable { .. }), "{error}");
    assert!(matches!(Source::collect(&["/".into()]), Err(SourceError::Nameless(_))));
    assert!(matches!(Source::collect(&[top.join("none")]), Err(SourceError::Path { .. })));
    let twice = Source::collect(&[top.join("file"), top.join("file")]);
    assert!(matches!(twice, Err(SourceError::Manifest(ManifestError::Twice(_)))));
}

/// A receiver that has gone without a word is not waited for.
#[tokio::test(flavor = "multi_thread")]
async fn a_silent_receiver_is_given_up_on() {
    let from = TempDir::new().unwrap();
    fs::write(from.path().join("file"), "x").unwrap();
    let source = Source::collect(&[from.path().join("file")]).unwrap();
    let line = Line::new().await;
    let ((send_near, receive_near), far) = line.stream().await;
    let progress = Arc::default();
    let sending = send(send_near, receive_near, &source, &progress);
    let sent = tokio::time::timeout(Duration::from_secs(60), sending).await.expect("it ends");
    assert!(sent.unwrap_err().is_transient());
    drop(far);
}

/// A receiver that thinks for longer is.
#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_may_think_for_long() {
    struct Slow;
    impl Consent for Slow {
        async fn accept(&mut self, _: &Manifest) -> bool {
            tokio::time::sleep(message::SILENCE + Duration::from_secs(3)).await;
            true
        }

        async fn replace(&mut self, _: &[String]) -> bool {
            false
        }
    }
    let (from, to) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    fs::write(from.path().join("file"), "x").unwrap();
    let source = Source::collect(&[from.path().join("file")]).unwrap();
    let line = Line::new().await;
    let ((send_near, receive_near), (send_far, receive_far)) = line.stream().await;
    let (progress, mut slow) = (Arc::default(), Slow);
    let (sent, received) = tokio::join!(
        send(send_near, receive_near, &source, &progress),
        receive(send_far, receive_far, to.path(), &mut slow, &progress)
    );
    sent.unwrap();
    assert_eq!(received.unwrap().received, 1);
}

/// A receiver that claims to have what it has not gets a file of its own making, and does the sender no harm.
#[tokio::test(flavor = "multi_thread")]
async fn claims_that_no_file_supports_are_refused() {
    let from = TempDir::new().unwrap();
    fill(&from.path().join("file"), 1, 3 * GROUP as usize);
    let source = Source::collect(&[from.path().join("file")]).unwrap();
    let claims = [
        vec![ToSender::Known { first: 3, values: vec![[0; 32]] }],
        vec![ToSender::Known { first: u64::MAX, values: vec![[0; 32]; 5] }],
        vec![
            ToSender::Known { first: 1, values: vec![[0; 32]] },
            ToSender::Known { first: 0, values: vec![[0; 32]] },
        ],
        vec![ToSender::Accepted],
    ];
    for claim in claims {
        let line = Line::new().await;
        let ((send_near, receive_near), (mut send_far, _receive_far)) = line.stream().await;
        let mut frames = Vec::new();
        encode(&ToSender::Accepted, &mut frames);
        claim.iter().for_each(|claim| encode(claim, &mut frames));
        send_far.write_all(&frames).await.unwrap();
        let sent = send(send_near, receive_near, &source, &Arc::default()).await;
        assert!(matches!(sent, Err(SendError::Protocol(_))), "{claim:?}: {sent:?}");
    }
}

/// Random and mutated answers: the sender ends with an error, or waits for more.
#[tokio::test(flavor = "multi_thread")]
async fn garbage_does_a_sender_no_harm() {
    let from = TempDir::new().unwrap();
    fill(&from.path().join("file"), 1, 2 * GROUP as usize);
    let source = Source::collect(&[from.path().join("file")]).unwrap();
    let line = Line::new().await;
    for seed in 0..150 {
        let mut random = SmallRng::seed_from_u64(seed);
        let ((send_near, receive_near), (mut send_far, mut receive_far)) = line.stream().await;
        let mut frames = Vec::new();
        encode(&ToSender::Accepted, &mut frames);
        let honest = frames.len();
        encode(&ToSender::Known { first: 0, values: vec![[1; 32]; 2] }, &mut frames);
        encode(&ToSender::Want { first: 0, count: u32::MAX }, &mut frames);
        encode(&ToSender::Compare { file: 0, hash: [1; 32] }, &mut frames);
        for _ in 0..random.random_range(1..5) {
            let at = random.random_range(honest..frames.len());
            frames[at] = random.random();
        }
        let drain = tokio::spawn(async move { receive_far.read_to_end(100 << 20).await });
        send_far.write_all(&frames).await.unwrap();
        send_far.finish().unwrap();
        let progress = Arc::default();
        let sending = send(send_near, receive_near, &source, &progress);
        let sent = tokio::time::timeout(Duration::from_secs(60), sending).await.expect("it ends");
        // One that hits no rule ends with the stream; none ends well, since nobody has said that it is done
        // (unless a mutation has made a `Done`, number 5 of the answers, of another).
        assert!(sent.is_err() || frames[honest..].contains(&5), "seed {seed}: {sent:?}");
        let _ = drain.await;
    }
    let mut buffer = Vec::new();
    fs::File::open(from.path().join("file")).unwrap().read_to_end(&mut buffer).unwrap();
    assert_eq!(buffer.len() as u64, 2 * GROUP);
}
