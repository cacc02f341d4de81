//! The server's end of the socket.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use rendezvous_wire::{PeerId, RendezvousAddress};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;
use tokio::time::timeout;
use tracing::{debug, info};

use super::{AdmittedRow, Answer, BanRow, MOST_QUESTION, NewToken, Question, Stats, TokenRow};
use crate::admission::gate::NotKept;
use crate::admission::policy::Policy;
use crate::admission::records::{Seconds, Write};
use crate::admission::{Ban, Enrolment, Records, TokenRecord};
use crate::owner::Event;
use crate::relay::count::Meter;
use crate::signalling::Shared;

/// How long a question may take to come.
const PATIENCE: Duration = Duration::from_secs(10);

/// Answers questions.
#[derive(Debug)]
pub(crate) struct Desk {
    pub(crate) shared: Arc<Shared>,
    pub(crate) address: RendezvousAddress,
    pub(crate) meter: Meter,
    pub(crate) since: Instant,
}

/// Makes the socket. One that is there already was left behind: the store is ours alone by now.
pub(crate) fn listen(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(listener)
}

impl Desk {
    /// Answers for as long as the server runs.
    pub(crate) async fn serve(self, listener: UnixListener) {
        let desk = Arc::new(self);
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let desk = desk.clone();
                    tokio::spawn(async move {
                        if let Err(error) = desk.converse(stream).await {
                            debug!(%error, "a command was not answered");
                        }
                    });
                }
                Err(error) => {
                    debug!(%error, "a command was not heard");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    async fn converse(&self, mut stream: UnixStream) -> io::Result<()> {
        let asker = stream.peer_cred()?.uid();
        // Whoever may write to the socket is let in by its mode; this holds even where that is changed.
        if asker != 0 && asker != nix::unistd::geteuid().as_raw() {
            info!(uid = asker, "a user who is neither root nor the server's own has tried a command");
            return Ok(());
        }
        let mut line = String::new();
        let (reader, mut writer) = stream.split();
        let mut reader = BufReader::new(reader.take(MOST_QUESTION));
        timeout(PATIENCE, reader.read_line(&mut line)).await??;
        let answer = match serde_json::from_str(&line) {
            Ok(question) => self.answer(question).await,
            Err(error) => Answer::Failed(format!(
                "the question cannot be read, so it is of another version than the server; restart the server: {error}"
            )),
        };
        let mut answer = serde_json::to_string(&answer)?;
        answer.push('\n');
        writer.write_all(answer.as_bytes()).await?;
        writer.shutdown().await
    }

    async fn answer(&self, question: Question) -> Answer {
        match self.try_answer(question).await {
            Ok(answer) => answer,
            Err(error) => Answer::Failed(error.to_string()),
        }
    }

    async fn try_answer(&self, question: Question) -> Result<Answer, NotKept> {
        let gate = &self.shared.gate;
        let records = gate.records();
        Ok(match question {
            Question::Admit { peer, note } => {
                let new = !records.admitted.contains_key(&peer);
                gate.enrol(peer, note).await?;
                info!(%peer, "admitted by command");
                Answer::Done(new)
            }
            Question::Withdraw { peer } => {
                gate.change(vec![Write::Withdraw(peer)]).await?;
                Answer::Done(records.admitted.contains_key(&peer))
            }
            Question::Ban { peer, seconds, reason } => {
                let lasts = seconds.map(Duration::from_secs);
                gate.change(vec![Policy::make_ban(peer, lasts, reason, SystemTime::now())]).await?;
                self.ban(peer).await;
                info!(%peer, "banned by command");
                Answer::Done(!records.bans.contains_key(&peer))
            }
            Question::Unban { peer } => {
                gate.change(vec![Write::Unban(peer)]).await?;
                // Without an owner the server is about to end.
                let _ = self.shared.events.send(Event::Unban(peer)).await;
                info!(%peer, "no longer banned, by command");
                Answer::Done(records.bans.contains_key(&peer))
            }
            Question::NewToken { uses, seconds, note } => {
                let (number, token) = gate.make_token(uses, seconds.map(Duration::from_secs), note).await?;
                let address = format!("{}#{token}", self.address);
                Answer::Token(NewToken { number, token: token.to_string(), address })
            }
            Question::WithdrawToken { number } => {
                gate.change(vec![Write::NoToken(number)]).await?;
                Answer::Done(records.tokens.contains_key(&number))
            }
            Question::Tokens => Answer::Tokens(tokens(&records)),
            Question::Admitted => Answer::Admitted(admitted(&records)),
            Question::Banned => Answer::Banned(banned(&records)),
            Question::Peers => self.of_owner(Event::Peers).await.map_or_else(stopping, Answer::Peers),
            Question::Sessions => {
                self.of_owner(Event::Sessions).await.map_or_else(stopping, Answer::Sessions)
            }
            Question::Stats => {
                self.stats().await.map_or_else(stopping, |stats| Answer::Stats(Box::new(stats)))
            }
        })
    }

    /// Ends what a peer has; it has when this returns.
    async fn ban(&self, peer: PeerId) {
        let reason = self.shared.gate.bar(peer).map(|refusal| refusal.to_string()).unwrap_or_default();
        let (done, ended) = oneshot::channel();
        if self.shared.events.send(Event::Ban { peer, reason, done }).await.is_ok() {
            let _ = ended.await;
        }
    }

    async fn of_owner<T>(&self, event: impl FnOnce(oneshot::Sender<T>) -> Event) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.shared.events.send(event(reply)).await.ok()?;
        answer.await.ok()
    }

    async fn stats(&self) -> Option<Stats> {
        let broker = self.of_owner(Event::Stats).await?;
        let relay = self.meter.count();
        Some(Stats {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            seconds: self.since.elapsed().as_secs(),
            unregistered: self.shared.unregistered.load(Ordering::Relaxed),
            newcomers_a_second: self.shared.gate.newcomers(),
            challenged: self.shared.gate.challenged(),
            refused: broker.refused + self.shared.gate.refused(),
            relay_forwarded: relay.forwarded,
            relay_forwarded_bytes: relay.forwarded_bytes,
            relay_refused: relay.refused,
            relay_dropped: relay.dropped,
            relay_limited: relay.limited,
            stun_answered: relay.answered,
            overflowed: relay.overflowed,
            ..broker
        })
    }
}

fn stopping() -> Answer {
    Answer::Failed("the server is stopping".to_owned())
}

fn tokens(records: &Records) -> Vec<TokenRow> {
    let row = |(number, token): (&u64, &TokenRecord)| TokenRow {
        number: *number,
        uses: token.uses,
        used: token.used,
        made: token.at.date(),
        expires: token.until.map(Seconds::date),
        note: token.note.clone(),
    };
    let mut rows: Vec<_> = records.tokens.iter().map(row).collect();
    rows.sort_by_key(|row| row.number);
    rows
}

fn admitted(records: &Records) -> Vec<AdmittedRow> {
    let row = |(peer, enrolment): (&PeerId, &Enrolment)| AdmittedRow {
        peer: peer.to_string(),
        since: enrolment.at.date(),
        token: enrolment.token,
        note: enrolment.note.clone(),
    };
    let mut rows: Vec<_> = records.admitted.iter().map(row).collect();
    rows.sort_by(|one, other| (&one.since, &one.peer).cmp(&(&other.since, &other.peer)));
    rows
}

fn banned(records: &Records) -> Vec<BanRow> {
    let row = |(peer, ban): (&PeerId, &Ban)| BanRow {
        peer: peer.to_string(),
        since: ban.at.date(),
        until: ban.until.map(Seconds::date),
        reason: ban.reason.clone(),
    };
    let mut rows: Vec<_> = records.bans.iter().map(row).collect();
    rows.sort_by(|one, other| (&one.since, &one.peer).cmp(&(&other.since, &other.peer)));
    rows
}
