//! Asks the operator's own HTTP service whether a peer is admitted: at most so many questions at a time, each within its time, answers kept for a while.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rendezvous_wire::PeerId;
use serde::Deserialize;
use serde_json::json;
use tokio::sync::Semaphore;
use tracing::warn;

use super::policy::Refusal;
use crate::config::{Callout, OnFailure};

/// Questions at a time; each has a thread while it waits.
const AT_ONCE: usize = 32;

/// Most bytes of an answer.
const MOST_BYTES: u64 = 16 * 1024;

/// Most characters of a reason; what the peer is told has to fit the last record of a stream.
const MOST_REASON: usize = 120;

/// Answers that are kept.
const MOST_KEPT: usize = 1 << 16;

/// How often failures are logged.
const TELL: Duration = Duration::from_secs(60);

/// What the service says.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct Answer {
    admit: bool,
    #[serde(default)]
    reason: String,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
enum CalloutError {
    #[error("{0}")]
    Http(#[from] Box<ureq::Error>),
    #[error("status {0}")]
    Status(u16),
    #[error("no JSON of the form {{\"admit\": true}}: {0}")]
    Json(#[from] serde_json::Error),
    #[error("too many questions are under way, or the time is over")]
    Late,
}

/// The service, and what it has said.
#[derive(Debug)]
pub(super) struct Service {
    places: Semaphore,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    kept: HashMap<PeerId, (Instant, Answer)>,
    told: Option<Instant>,
}

impl Service {
    pub(super) fn new() -> Self {
        Self { places: Semaphore::new(AT_ONCE), state: Mutex::default() }
    }

    /// Forgets what it has said.
    pub(super) fn forget(&self) {
        self.state().kept.clear();
    }

    /// Whether this peer is admitted.
    pub(super) async fn ask(
        &self,
        settings: &Callout,
        peer: PeerId,
        source: IpAddr,
        server: PeerId,
    ) -> Result<(), Refusal> {
        let now = Instant::now();
        let lasts = Duration::from_secs(settings.cache_seconds);
        let kept = self
            .state()
            .kept
            .get(&peer)
            .filter(|(at, _)| now < *at + lasts)
            .map(|(_, answer)| answer.clone());
        let answer = match kept {
            Some(answer) => Ok(answer),
            None => self.ask_anew(settings, peer, source, server).await,
        };
        match answer {
            Ok(Answer { admit: true, .. }) => Ok(()),
            Ok(Answer { reason, .. }) => Err(Refusal::CalledOut(
                reason.chars().take(MOST_REASON).filter(|c| !c.is_control()).collect(),
            )),
            Err(error) => {
                self.tell(settings, &error, now);
                match settings.on_failure {
                    OnFailure::Admit => Ok(()),
                    OnFailure::Refuse => Err(Refusal::NoAnswer),
                }
            }
        }
    }

    async fn ask_anew(
        &self,
        settings: &Callout,
        peer: PeerId,
        source: IpAddr,
        server: PeerId,
    ) -> Result<Answer, CalloutError> {
        let (url, time) = (settings.url.clone(), settings.timeout());
        let question = json!({
            "peer": peer.to_string(),
            "source": source.to_canonical().to_string(),
            "server": server.to_string(),
        });
        let asking = async {
            let place = self.places.acquire().await;
            let answer = tokio::task::spawn_blocking(move || post(&url, &question.to_string(), time)).await;
            drop(place);
            answer.unwrap_or(Err(CalloutError::Late))
        };
        // A name that does not resolve may take longer than the client can be bounded by.
        let answer = tokio::time::timeout(time, asking).await.unwrap_or(Err(CalloutError::Late))?;
        let now = Instant::now();
        let mut state = self.state();
        if state.kept.len() >= MOST_KEPT {
            let lasts = Duration::from_secs(settings.cache_seconds);
            state.kept.retain(|_, (at, _)| now < *at + lasts);
        }
        if state.kept.len() < MOST_KEPT {
            state.kept.insert(peer, (now, answer.clone()));
        }
        Ok(answer)
    }

    fn tell(&self, settings: &Callout, error: &CalloutError, now: Instant) {
        let mut state = self.state();
        if state.told.is_none_or(|told| now >= told + TELL) {
            state.told = Some(now);
            warn!(url = settings.url, %error, "the service that judges newcomers gives no answer; on_failure holds");
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn post(url: &str, question: &str, time: Duration) -> Result<Answer, CalloutError> {
    let config = ureq::Agent::config_builder()
        .timeout_global(Some(time))
        .http_status_as_error(false)
        .max_redirects(0)
        .proxy(None)
        .build();
    let agent = ureq::Agent::new_with_config(config);
    let request = agent.post(url).header("content-type", "application/json");
    let mut response = request.send(question).map_err(Box::new)?;
    if response.status() != ureq::http::StatusCode::OK {
        return Err(CalloutError::Status(response.status().as_u16()));
    }
    let body = response.body_mut().with_config().limit(MOST_BYTES).read_to_string().map_err(Box::new)?;
    Ok(serde_json::from_str(&body)?)
}
