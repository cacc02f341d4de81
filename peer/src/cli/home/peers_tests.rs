use super::*;

fn id(seed: u8) -> PeerId {
    PeerId::from_bytes([seed; 32])
}

fn alias(text: &str) -> Alias {
    text.parse().unwrap()
}

const DAY: Duration = Duration::from_secs(86_400);

#[test]
fn an_invitation_for_one_is_spent_with_its_first_use() {
    let now = SystemTime::now();
    let mut peers = Peers::default();
    let secret = peers.invite(true, None, Some(alias("bob")), now);
    assert!(peers.would_redeem(id(1), &secret, now));
    assert!(peers.redeem(id(1), &secret, now));
    assert!(peers.is_trusted(id(1)) && peers.named(&alias("bob")).unwrap().id == id(1));
    assert!(!peers.redeem(id(2), &secret, now) && !peers.is_trusted(id(2)));
    assert!(peers.redeem(id(1), &secret, now), "its answer may have been lost");
}

#[test]
fn a_lasting_invitation_admits_several_until_it_expires() {
    let now = SystemTime::now();
    let mut peers = Peers::default();
    let secret = peers.invite(false, Some(DAY), None, now);
    assert!(peers.redeem(id(1), &secret, now));
    assert!(peers.redeem(id(2), &secret, now + DAY / 2));
    assert!(!peers.redeem(id(3), &secret, now + DAY));
    assert_eq!(peers.invites(now + DAY).count(), 0);
}

#[test]
fn another_secret_admits_nobody() {
    let now = SystemTime::now();
    let mut peers = Peers::default();
    peers.invite(false, None, None, now);
    assert!(!peers.redeem(id(1), &InviteSecret([0; 16]), now));
    assert!(!peers.would_redeem(id(1), &InviteSecret([0; 16]), now));
}

#[test]
fn whoever_is_trusted_no_more_needs_an_invitation() {
    let now = SystemTime::now();
    let mut peers = Peers::default();
    let secret = peers.invite(true, None, None, now);
    assert!(peers.redeem(id(1), &secret, now));
    assert!(peers.untrust(id(1)) && !peers.untrust(id(1)));
    assert!(!peers.redeem(id(1), &secret, now));
}

#[test]
fn withdrawn_invitations_admit_nobody() {
    let now = SystemTime::now();
    let mut peers = Peers::default();
    let (first, second) = (peers.invite(false, None, None, now), peers.invite(false, None, None, now));
    let short = peers.invites(now).next().unwrap().short().to_owned();
    assert_eq!(peers.withdraw(&short).unwrap(), 1);
    assert!(!peers.redeem(id(1), &first, now));
    assert!(matches!(peers.withdraw(&short), Err(PeersError::NoInvite(_))));
    assert_eq!(peers.withdraw("all").unwrap(), 1);
    assert!(!peers.redeem(id(1), &second, now));
}

#[test]
fn an_alias_belongs_to_one_peer() {
    let mut peers = Peers::default();
    peers.name(id(1), alias("nas")).unwrap();
    assert!(matches!(peers.name(id(2), alias("nas")), Err(PeersError::Taken(..))));
    peers.name(id(1), alias("cellar")).unwrap();
    peers.name(id(2), alias("nas")).unwrap();
    assert!(peers.is(id(1), &Who::Alias(alias("cellar"))) && !peers.is(id(1), &Who::Alias(alias("nas"))));
    assert!(
        peers.is(id(1), &Who::Anyone) && !peers.is(id(1), &Who::Trusted) && peers.is(id(1), &Who::Id(id(1)))
    );
}

#[test]
fn what_is_known_survives_its_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("deep/peers.toml");
    let now = SystemTime::now();
    let server = format!("rv://{}@192.0.2.7,[2001:db8::7]", id(9)).parse().unwrap();
    let shown = InviteSecret([5; 16]);
    let ticket = Ticket { peer: id(1), servers: vec![server], secret: Some(shown.clone()) };
    let secret = Peers::update(&path, |peers| {
        peers.keep(&ticket);
        peers.trust(id(1));
        peers.name(id(1), alias("nas"))?;
        Ok(peers.invite(true, Some(DAY), None, now))
    })
    .unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(!text.contains(&HEXLOWER.encode(&secret.0)), "a secret that we gave away is not kept");
    let peers = Peers::load(&path).unwrap();
    let known = peers.named(&alias("nas")).unwrap();
    assert_eq!((known.id, known.servers(), known.secret()), (id(1), ticket.servers, Some(shown.clone())));
    assert!(peers.would_redeem(id(2), &secret, now));
    Peers::update(&path, |peers| {
        peers.secret_shown(id(1), &shown);
        Ok(())
    })
    .unwrap();
    assert_eq!(Peers::load(&path).unwrap().get(id(1)).unwrap().secret(), None);
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn changes_from_several_threads_all_arrive() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("peers.toml");
    std::thread::scope(|scope| {
        for seed in 1..=8 {
            let path = &path;
            scope.spawn(move || {
                Peers::update(path, |peers| {
                    peers.trust(id(seed));
                    Ok(())
                })
            });
        }
    });
    assert_eq!(Peers::load(&path).unwrap().known.len(), 8);
}

#[test]
fn a_damaged_file_is_an_error_and_stays_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("peers.toml");
    std::fs::write(&path, "[[peer]]\nid = \"short\"\n").unwrap();
    let error = Peers::update(&path, |_| Ok(())).unwrap_err().to_string();
    assert!(error.contains("damaged") && error.contains("52 characters"), "{error}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "[[peer]]\nid = \"short\"\n");
}

#[test]
fn names_that_could_be_something_else_are_no_aliases() {
    for text in ["", "anyone", "trusted", "rvt1abc", "-v", "a b", "a/b", "ü", &"x".repeat(33)] {
        assert!(text.parse::<Alias>().is_err(), "{text:?}");
    }
    for text in ["nas", "home.server_1", "A-B", &"x".repeat(32)] {
        assert!(text.parse::<Alias>().is_ok(), "{text:?}");
    }
}
