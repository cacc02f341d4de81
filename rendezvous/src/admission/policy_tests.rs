use super::*;

fn peer(number: u8) -> PeerId {
    PeerId::from_bytes([number; 32])
}

fn time(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000 + seconds)
}

fn policy(mode: Mode) -> Policy {
    Policy::new(Admission { mode, allow: vec![peer(1)], ..Admission::default() }, Records::default())
}

fn with_token(uses: u32, lifetime: Option<u64>) -> (Policy, Token) {
    let mut policy = policy(Mode::Token);
    let token = Token([9; 16]);
    let lifetime = lifetime.map(Duration::from_secs);
    let (_, write) = policy.make_token(&token, uses, lifetime, "friends".into(), time(0));
    policy.apply(&[write]);
    (policy, token)
}

#[test]
fn each_mode_admits_whom_it_says() {
    for mode in [Mode::Open, Mode::Token, Mode::AllowList, Mode::Callout] {
        let mut policy = policy(mode);
        assert_eq!(policy.judge(peer(1), None, time(0)), Verdict::Admit, "allowed");
        let newcomer = policy.judge(peer(2), None, time(0));
        let expected = match mode {
            Mode::Open => Verdict::Admit,
            Mode::Token => Verdict::Refuse(Refusal::TokenNeeded),
            Mode::AllowList => Verdict::Refuse(Refusal::NotListed(peer(2))),
            Mode::Callout => Verdict::CallOut,
        };
        assert_eq!(newcomer, expected);
        let enrolment = Enrolment { at: Seconds(1), token: None, note: String::new() };
        policy.apply(&[Write::Admit(peer(2), enrolment)]);
        assert_eq!(policy.judge(peer(2), None, time(0)), Verdict::Admit, "admitted by name");
        policy.apply(&[Policy::make_ban(peer(1), None, "spam".into(), time(0))]);
        assert!(matches!(policy.judge(peer(1), None, time(0)), Verdict::Refuse(Refusal::Banned { .. })));
    }
}

#[test]
fn a_token_admits_so_many_peers_each_of_them_for_good() {
    let (mut policy, token) = with_token(2, None);
    let Verdict::Enrol(writes) = policy.judge(peer(2), Some(&token), time(0)) else { panic!() };
    assert!(matches!(writes[..], [Write::Spend(1), Write::Admit(..)]));
    assert_eq!(policy.records().tokens[&1].used, 1);
    assert_eq!(policy.judge(peer(2), Some(&token), time(0)), Verdict::Admit, "not spent twice");
    assert_eq!(policy.judge(peer(2), None, time(0)), Verdict::Admit, "nor needed again");
    assert!(matches!(policy.judge(peer(3), Some(&token), time(0)), Verdict::Enrol(_)));
    assert_eq!(policy.judge(peer(4), Some(&token), time(0)), Verdict::Refuse(Refusal::TokenUsed));
    let other = Token([8; 16]);
    assert_eq!(policy.judge(peer(4), Some(&other), time(0)), Verdict::Refuse(Refusal::TokenUnknown));
    policy.apply(&[Write::NoToken(1)]);
    assert_eq!(policy.judge(peer(4), Some(&token), time(0)), Verdict::Refuse(Refusal::TokenUnknown));
    assert_eq!(policy.make_token(&other, 1, None, String::new(), time(0)).0, 2, "no number is used again");
}

#[test]
fn a_token_expires() {
    let (mut policy, token) = with_token(5, Some(60));
    assert!(matches!(policy.judge(peer(2), Some(&token), time(59)), Verdict::Enrol(_)));
    assert_eq!(policy.judge(peer(3), Some(&token), time(60)), Verdict::Refuse(Refusal::TokenExpired));
    assert_eq!(policy.judge(peer(2), Some(&token), time(60)), Verdict::Admit);
}

#[test]
fn what_could_not_be_kept_has_not_happened() {
    let (mut policy, token) = with_token(1, None);
    let before = policy.records().clone();
    let Verdict::Enrol(writes) = policy.judge(peer(2), Some(&token), time(0)) else { panic!() };
    policy.undo(&writes);
    assert_eq!(*policy.records(), before);
    assert!(matches!(policy.judge(peer(3), Some(&token), time(0)), Verdict::Enrol(_)));
}

#[test]
fn a_ban_says_why_and_how_long_and_ends() {
    let mut policy = policy(Mode::Open);
    policy.apply(&[Policy::make_ban(peer(5), Some(Duration::from_secs(60)), "too loud".into(), time(0))]);
    let said = policy.bar(peer(5), time(59)).unwrap().to_string();
    assert!(
        said.contains("too loud") && said.contains("2023-11-14T22:14:20Z") && said.contains("ask"),
        "{said}"
    );
    assert!(!policy.take_lapsed(peer(5), time(59)));
    assert_eq!(policy.bar(peer(5), time(60)), None);
    assert!(policy.take_lapsed(peer(5), time(60)) && !policy.take_lapsed(peer(5), time(60)));
}

#[test]
fn only_newcomers_work() {
    let mut policy = policy(Mode::Open);
    let now = Instant::now();
    policy.configure(Admission { work_above: 1, ..policy.settings().clone() });
    let asked = (0..50u8).filter(|number| policy.work(peer(100 + number), now) > 0).count();
    assert!(asked >= 40, "{asked}");
    assert_eq!(policy.work(peer(1), now), 0, "allowed");
    policy.remember(peer(120), now);
    assert_eq!(policy.work(peer(120), now), 0);
    assert!(policy.work(peer(120), now + REMEMBERED) == 0, "the flood is long over");
    let flood = (0..50u8).filter(|number| policy.work(peer(100 + number), now + REMEMBERED) > 0).count();
    assert!(flood > 0);
    policy.apply(&[Write::Withdraw(peer(120))]);
    assert!(policy.work(peer(120), now + REMEMBERED) > 0);
}

#[test]
fn refusals_say_what_to_do() {
    let all = [
        Refusal::NotListed(peer(3)),
        Refusal::TokenNeeded,
        Refusal::TokenUnknown,
        Refusal::TokenUsed,
        Refusal::TokenExpired,
        Refusal::CalledOut("not a member".into()),
        Refusal::NoAnswer,
        Refusal::Work,
        Refusal::TooOld,
        Refusal::Store,
    ];
    for refusal in all {
        let said = refusal.to_string();
        assert!(said.contains("ask") || said.contains("tell") || said.contains("try again"), "{said}");
        assert!(said.len() < 256, "{} characters: it has to fit a stream's last record", said.len());
    }
}
