//! The shell around the policy: connections come here before they register, and operators with their commands.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use rand::RngCore as _;
use rendezvous_wire::admission::{Challenge, Work};
use rendezvous_wire::{PeerId, Token};

use super::callout::Service;
use super::policy::{Policy, Refusal, Verdict};
use super::records::{Enrolment, Records, Seconds, Write};
use crate::config::Admission;
use crate::store::Store;

/// How long work may take: of the most bits that any peer does, on a slow machine, several times over.
pub(crate) const WORK_TIME: Duration = Duration::from_secs(30);

/// Decides who may register.
#[derive(Debug)]
pub(crate) struct Gate {
    server: PeerId,
    policy: Mutex<Policy>,
    service: Service,
    /// Newcomers that were asked for work, and peers that were turned away.
    challenged: AtomicU64,
    refused: AtomicU64,
    making: tokio::sync::Mutex<()>,
    /// Without one everything is forgotten at the end.
    store: Option<Arc<Store>>,
}

/// The store could not be written: nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the store cannot be written, so nothing has changed; is the disk full? The server's log says more")]
pub(crate) struct NotKept;

impl Gate {
    pub(crate) fn new(
        server: PeerId,
        settings: Admission,
        records: Records,
        store: Option<Arc<Store>>,
    ) -> Self {
        let policy = Mutex::new(Policy::new(settings, records));
        Self {
            server,
            policy,
            service: Service::new(),
            challenged: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            making: tokio::sync::Mutex::default(),
            store,
        }
    }

    pub(crate) fn configure(&self, settings: Admission) {
        self.service.forget();
        self.policy().configure(settings);
    }

    /// The work that a peer has to do first. `able`: it knows what that is.
    pub(crate) fn work(&self, peer: PeerId, able: bool) -> Result<Option<Work>, Refusal> {
        let work = self.work_of(peer, able);
        let counter = match &work {
            Ok(None) => return work,
            Ok(Some(_)) => &self.challenged,
            Err(_) => &self.refused,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        work
    }

    fn work_of(&self, peer: PeerId, able: bool) -> Result<Option<Work>, Refusal> {
        let mut policy = self.policy();
        if let Some(refusal) = policy.bar(peer, SystemTime::now()) {
            return Err(refusal);
        }
        let bits = policy.work(peer, Instant::now());
        if bits == 0 {
            return Ok(None);
        }
        if !able {
            return Err(Refusal::TooOld);
        }
        let mut nonce = [0; 16];
        rand::rng().fill_bytes(&mut nonce);
        let challenge = Challenge { nonce, bits, seconds: WORK_TIME.as_secs() as u16 };
        Ok(Some(Work { challenge, server: self.server, peer }))
    }

    /// Judges a peer that has done its work. What has to be on disk is when this returns.
    pub(crate) async fn judge(
        &self,
        peer: PeerId,
        source: IpAddr,
        token: Option<&Token>,
    ) -> Result<(), Refusal> {
        let judgement = self.judgement(peer, source, token).await;
        if judgement.is_err() {
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
        judgement
    }

    async fn judgement(&self, peer: PeerId, source: IpAddr, token: Option<&Token>) -> Result<(), Refusal> {
        let verdict = self.policy().judge(peer, token, SystemTime::now());
        match verdict {
            Verdict::Admit => {}
            Verdict::Refuse(refusal) => return Err(refusal),
            Verdict::CallOut => {
                let settings = self.policy().settings().callout.clone();
                self.service.ask(&settings, peer, source, self.server).await?;
            }
            Verdict::Enrol(writes) => {
                // A connection that ends meanwhile leaves the use in force: it may well be on disk.
                if !self.keep(writes.clone()).await {
                    self.policy().undo(&writes);
                    return Err(Refusal::Store);
                }
            }
        }
        self.policy().remember(peer, Instant::now());
        Ok(())
    }

    /// Whether a ban of this peer has come to its end since this was last asked.
    pub(crate) fn take_lapsed(&self, peer: PeerId) -> bool {
        let lapsed = self.policy().take_lapsed(peer, SystemTime::now());
        if lapsed {
            self.keep_later(vec![Write::Unban(peer)]);
        }
        lapsed
    }

    /// Makes a token, which is told nobody else.
    pub(crate) async fn make_token(
        &self,
        uses: u32,
        lifetime: Option<Duration>,
        note: String,
    ) -> Result<(u64, Token), NotKept> {
        let mut bytes = [0; 16];
        rand::rng().fill_bytes(&mut bytes);
        let token = Token(bytes);
        // One at a time, or two would get one number.
        let _turn = self.making.lock().await;
        let (number, write) = self.policy().make_token(&token, uses, lifetime, note, SystemTime::now());
        self.change(vec![write]).await?;
        Ok((number, token))
    }

    /// Lets a peer in whatever the mode.
    pub(crate) async fn enrol(&self, peer: PeerId, note: String) -> Result<(), NotKept> {
        let enrolment = Enrolment { at: Seconds::from(SystemTime::now()), token: None, note };
        self.change(vec![Write::Admit(peer, enrolment)]).await
    }

    /// Keeps changes, and then follows them.
    pub(crate) async fn change(&self, writes: Vec<Write>) -> Result<(), NotKept> {
        if !self.keep(writes.clone()).await {
            return Err(NotKept);
        }
        self.policy().apply(&writes);
        Ok(())
    }

    /// Why a peer is refused whatever it presents.
    pub(crate) fn bar(&self, peer: PeerId) -> Option<Refusal> {
        self.policy().bar(peer, SystemTime::now())
    }

    pub(crate) fn records(&self) -> Records {
        self.policy().records().clone()
    }

    pub(crate) fn challenged(&self) -> u64 {
        self.challenged.load(Ordering::Relaxed)
    }

    pub(crate) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    pub(crate) fn newcomers(&self) -> f64 {
        self.policy().newcomers(Instant::now())
    }

    /// Keeps changes by and by.
    pub(crate) fn keep_later(&self, writes: Vec<Write>) {
        if let Some(store) = &self.store {
            store.keep_later(writes);
        }
    }

    async fn keep(&self, writes: Vec<Write>) -> bool {
        match &self.store {
            Some(store) => store.keep(writes).await,
            None => true,
        }
    }

    fn policy(&self) -> MutexGuard<'_, Policy> {
        self.policy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
