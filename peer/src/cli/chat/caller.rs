//! The side that calls.

use std::sync::Arc;
use std::time::{Duration, Instant};

use peer::daemon::Access;
use rand::Rng as _;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::sleep_until;

use super::super::Failure;
use super::super::gate::Gate;
use super::super::report::Report;
use super::super::send::Patience;
use super::super::settings::{Found, Settings};
use super::links::{self, Link, Trouble};

/// Before a call that follows on a failure at once.
pub(super) const PAUSE: Duration = Duration::from_secs(2);

/// Calls until the other side is there, and again when it is lost.
pub(super) struct Caller {
    pub(super) access: Access,
    pub(super) settings: Arc<Settings>,
    pub(super) found: Found,
    pub(super) gate: Arc<Gate>,
    pub(super) links: mpsc::Sender<Link>,
    pub(super) report: Report,
    pub(super) patience: Patience,
    pub(super) running: Option<JoinHandle<Result<Option<Link>, Trouble>>>,
    /// When to call next.
    pub(super) again: Option<tokio::time::Instant>,
    /// Whether anybody was ever there.
    pub(super) met: bool,
}

impl Caller {
    /// Calls again: at once, unless what was there before was of no use.
    pub(super) fn call_again(&mut self, at_once: bool) {
        self.patience.renew();
        if self.running.is_none() && self.again.is_none() {
            let pause = if at_once { Duration::ZERO } else { PAUSE };
            self.again = Some(tokio::time::Instant::now() + pause);
        }
    }

    /// The outcome of the next call; never where none is due.
    pub(super) async fn called(&mut self) -> Result<Option<Link>, Trouble> {
        if self.running.is_none() {
            match self.again {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
            self.again = None;
            self.running = Some(tokio::spawn(links::call(
                self.access.clone(),
                self.settings.clone(),
                self.found.clone(),
                self.gate.clone(),
                self.links.clone(),
                self.report.clone(),
            )));
        }
        let Some(running) = &mut self.running else { std::future::pending().await };
        let outcome = running.await;
        self.running = None;
        outcome.unwrap_or_else(|error| Err(Trouble::Passing(Failure::failed(error))))
    }

    /// What follows from a call that led to nothing: another, or the end.
    pub(super) fn failed(&mut self, trouble: Option<Trouble>) -> Result<(), Failure> {
        let failure = match trouble {
            Some(Trouble::Refused(failure)) if !self.met => return Err(failure),
            Some(Trouble::Refused(failure) | Trouble::Passing(failure)) => Some(failure),
            None => None,
        };
        match (self.patience.pause(Instant::now()), failure) {
            // Two that call each other do not do so at the same moments for ever.
            (Some(pause), failure) => {
                if let Some(failure) = failure {
                    self.patience.tell(&failure, self.found.id, "peer chat", &self.report);
                }
                let pause = pause.mul_f64(rand::rng().random_range(0.5..1.0));
                self.again = Some(tokio::time::Instant::now() + pause);
                Ok(())
            }
            (None, Some(failure)) => Err(failure),
            (None, None) => Err(Failure::broken(anyhow::anyhow!("{} was not reached", self.found.id))),
        }
    }

    pub(super) fn reached(&mut self) {
        self.met = true;
        self.patience.renew();
        // What was told of waiting is news again.
        self.patience.forget();
        self.again = None;
    }
}
