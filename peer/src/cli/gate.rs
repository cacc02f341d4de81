//! Who is let in, and to what, while we listen.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use peer::bench::Bencher;
use peer::daemon::Access;
use peer::forward::{Listeners, Notice, Observer, Rules, serve};
use peer::service::{Answer, Cause, Exchange, Request};
use peer::{IntroductionPolicy, InviteSecret, PeerId};

use super::Failure;
use super::home::Home;
use super::home::peers::{Peers, Who};
use super::listen;
use super::report::Report;

/// How often it is looked whether peers were trusted or invited meanwhile.
const LOOK: Duration = Duration::from_secs(1);

/// Most ids of an introduction policy; with more trusted peers everybody is introduced, and told apart here.
const MOST_IDS: usize = 256;

/// Tells a file from the one that it replaced.
pub(super) type Stamp = Option<(u64, u64, i64, i64)>;

/// Who may have what.
pub(super) type Grants = Arc<[Grant]>;

/// What some peers may have.
#[derive(Debug)]
pub(super) struct Grant {
    pub(super) to: Vec<Who>,
    pub(super) rules: Rules,
    /// Whether they may measure what a session carries.
    pub(super) bench: bool,
}

/// Answers requests by what the person wants. What is known of peers is read again whenever its file has changed.
#[derive(Debug)]
pub(super) struct Gate {
    home: Option<Home>,
    grants: RwLock<Grants>,
    /// Those of `--allow`; nobody else is let in unless the list is empty.
    allowed: Vec<PeerId>,
    /// Whether there is something for whoever comes.
    anyone: bool,
    known: Mutex<(Stamp, Arc<Peers>)>,
    listeners: Listeners,
    bencher: Bencher,
    observer: Observer,
    report: Report,
}

impl Gate {
    pub(super) fn new(
        home: Option<Home>,
        grants: Vec<Grant>,
        allowed: Vec<PeerId>,
        anyone: bool,
        report: &Report,
    ) -> Result<Self, Failure> {
        let stamp = stamp(home.as_ref());
        let peers = match &home {
            Some(home) => Peers::load(&home.peers)?,
            None => Peers::default(),
        };
        let known = Mutex::new((stamp, Arc::new(peers)));
        Ok(Self {
            home,
            grants: RwLock::new(grants.into()),
            allowed,
            anyone,
            known,
            listeners: Listeners::default(),
            bencher: Bencher::default(),
            observer: listen::observer(report),
            report: report.clone(),
        })
    }

    /// The same, with somebody else who hears of what is served.
    pub(super) fn observed(self, observer: Observer) -> Self {
        Self { observer, ..self }
    }

    /// What is given to whom from now on.
    pub(super) fn set_grants(&self, grants: Vec<Grant>) {
        *self.grants.write().unwrap_or_else(PoisonError::into_inner) = grants.into();
    }

    /// What is given to whom.
    pub(super) fn grants(&self) -> Grants {
        self.grants.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether a request is for something that is given here, or for nothing more than an answer.
    pub(super) fn takes(&self, peer: PeerId, request: &Request) -> bool {
        match request {
            Request::Ping | Request::Invite(_) => true,
            Request::Bench(_) => self.may_bench(peer),
            request => self.rules(peer).names(request),
        }
    }

    /// What is known now.
    fn peers(&self) -> Arc<Peers> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let now = stamp(self.home.as_ref());
        if let (true, Some(home)) = (known.0 != now, &self.home) {
            match Peers::load(&home.peers) {
                Ok(peers) => *known = (now, Arc::new(peers)),
                // What was known goes on to hold.
                Err(error) => tracing::warn!(%error, "the known peers cannot be read"),
            }
        }
        known.1.clone()
    }

    /// Whom the rendezvous server may introduce to us.
    pub(super) fn policy(&self) -> IntroductionPolicy {
        if !self.allowed.is_empty() {
            return IntroductionPolicy::Only(self.allowed.clone());
        }
        let peers = self.peers();
        let grants = self.grants();
        let whos: Vec<&Who> = grants.iter().flat_map(|grant| &grant.to).collect();
        // Who was invited is not known by id.
        let strangers = whos.contains(&&Who::Anyone) || peers.invites(SystemTime::now()).next().is_some();
        if self.anyone || strangers {
            return IntroductionPolicy::Anyone;
        }
        let known = peers.known.iter().map(|known| known.id);
        let named = whos.iter().filter_map(|who| if let Who::Id(id) = who { Some(*id) } else { None });
        let mut ids: Vec<PeerId> =
            known.chain(named).filter(|id| whos.iter().any(|who| peers.is(*id, who))).collect();
        ids.sort_unstable();
        ids.dedup();
        if ids.len() > MOST_IDS { IntroductionPolicy::Anyone } else { IntroductionPolicy::Only(ids) }
    }

    /// Keeps the policy up to date; never ends.
    pub(super) async fn watch(&self, access: &Access) {
        let mut told = self.policy();
        loop {
            tokio::time::sleep(LOOK).await;
            let policy = self.policy();
            if policy != told {
                access.set_policy(policy.clone()).await;
                told = policy;
            }
        }
    }

    /// What a person calls that peer: its alias, or else its id.
    pub(super) fn name(&self, peer: PeerId) -> String {
        self.alias(peer).unwrap_or_else(|| peer.to_string())
    }

    /// Its alias.
    pub(super) fn alias(&self, peer: PeerId) -> Option<String> {
        self.peers().get(peer)?.alias.as_ref().map(ToString::to_string)
    }

    /// Whether that peer may talk with whoever sits here: one of those that are let in, or a trusted one where none were named.
    pub(super) fn admits(&self, peer: PeerId) -> bool {
        if self.allowed.is_empty() {
            self.peers().is(peer, &Who::Trusted)
        } else {
            self.allowed.contains(&peer)
        }
    }

    /// What that peer may have.
    fn rules(&self, peer: PeerId) -> Rules {
        let peers = self.peers();
        let mut all = Rules::default();
        for grant in self.grants().iter().filter(|grant| grant.to.iter().any(|who| peers.is(peer, who))) {
            all.forward.extend(grant.rules.forward.iter().cloned());
            all.listen.extend(grant.rules.listen.iter().cloned());
        }
        all
    }

    /// Whether that peer may measure what a session carries.
    fn may_bench(&self, peer: PeerId) -> bool {
        let peers = self.peers();
        self.grants().iter().any(|grant| grant.bench && grant.to.iter().any(|who| peers.is(peer, who)))
    }

    /// Answers a request, and does what it asks for until it is over.
    pub(super) async fn answer(&self, request: Request, mut exchange: Exchange) {
        let peer = exchange.peer();
        match request {
            Request::Invite(secret) => {
                let answer = self.redeem(peer, secret).await;
                if let Answer::Accepted | Answer::Refused = answer {
                    self.report.redeemed(peer, answer == Answer::Accepted);
                }
                if exchange.respond(answer).await.is_ok() {
                    let _ = exchange.send.finish();
                }
            }
            Request::Bench(order) if self.may_bench(peer) => self.bencher.serve(order, exchange).await,
            Request::Bench(_) => {
                self.observer.notice(Notice::Denied { peer, what: "measuring".to_owned() });
                exchange.refuse().await;
            }
            request => serve(request, exchange, &self.rules(peer), &self.listeners, &self.observer).await,
        }
    }

    /// Trusts whoever shows the secret of an open invitation; that is on disk before it is told.
    async fn redeem(&self, peer: PeerId, secret: InviteSecret) -> Answer {
        let Some(home) = self.home.clone() else { return Answer::Refused };
        // A stranger who guesses writes nothing.
        if !self.peers().would_redeem(peer, &secret, SystemTime::now()) {
            return Answer::Refused;
        }
        let redeem =
            move || Peers::update(&home.peers, |peers| Ok(peers.redeem(peer, &secret, SystemTime::now())));
        match tokio::task::spawn_blocking(redeem).await {
            Ok(Ok(true)) => Answer::Accepted,
            Ok(Ok(false)) => Answer::Refused,
            Ok(Err(error)) => {
                tracing::error!(%error, "an invitation could not be taken");
                Answer::Failed(Cause::Other)
            }
            Err(_) => Answer::Failed(Cause::Other),
        }
    }
}

fn stamp(home: Option<&Home>) -> Stamp {
    stamp_of(&home?.peers)
}

/// What a file is now; `None` where there is none.
pub(super) fn stamp_of(path: &Path) -> Stamp {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.ino(), metadata.size(), metadata.mtime(), metadata.mtime_nsec()))
}
