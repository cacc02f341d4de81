//! Receiving: consent, questions, and what becomes of the answers.

use std::future::Future;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc as std_mpsc;
use std::time::Duration;

use bytes::Bytes;
use quinn::{ReadError, RecvStream, SendStream};
use tokio::sync::mpsc;
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::Instant;

use super::arrival::ArrivalError;
use super::blocks::Blocks;
use super::folders::{Folders, Top, open_root};
use super::manifest::{Kind, MAX_ENTRIES, Manifest, ManifestBuilder, ManifestError};
use super::message::{
    ALIVE, Deframer, FileProblem, FrameError, FromSender, Item, MAX_MESSAGE, ReceiverProblem, Refusal,
    ToSender, VERSION, encode,
};
use super::plan::{Asked, Planned, Planner};
use super::progress::Progress;
use super::store::{self, StoreError};
use super::writer::{Outcome, TakingError, Writer};

/// Blocks that wait for the disk.
const BLOCKS: usize = 8;

/// Bytes that are worth waking the disk's thread for: waking it for every read costs switches where both share a processor.
const BLOCK: usize = 256 << 10;

/// How long less than that waits for more.
const MOMENT: Duration = Duration::from_millis(5);

/// Answers and questions that wait for the network.
const ANSWERS: usize = 64;

/// How long a sender may say nothing before its offer is complete: it keeps others waiting.
const HESITATION: Duration = Duration::from_secs(30);

/// How long the last word may take to be heard.
const GOODBYE: Duration = Duration::from_secs(5);

/// Who decides what is taken.
pub trait Consent: Send {
    /// Whether to take what is offered. Nothing has been written yet.
    fn accept(&mut self, offer: &Manifest) -> impl Future<Output = bool> + Send;

    /// Whether offered files may replace others of the same names; `paths` can be shown. Everything else has arrived.
    fn replace(&mut self, paths: &[String]) -> impl Future<Output = bool> + Send;
}

/// What became of an offer.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Received {
    /// Files that have arrived and are verified.
    pub received: u32,
    /// Files that were there already, verified.
    pub same: u32,
    /// Paths where something else was, and still is.
    pub kept: Vec<String>,
    /// Paths that could not be sent, and why.
    pub failed: Vec<(String, FileProblem)>,
}

/// Why receiving failed. What has arrived is kept, and not sent again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReceiveError {
    /// The folder cannot be used.
    #[error("{path} cannot be opened: {source}")]
    Folder {
        /// The folder.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// The offer was not accepted.
    #[error("the offer was declined")]
    Declined,
    /// The offer could do harm; nothing was written.
    #[error("the offer was refused: {0}")]
    Offer(#[from] ManifestError),
    /// Another version of the protocol.
    #[error(
        "the other side speaks version {0} of the transfer protocol, and not {VERSION}: update one of the two"
    )]
    Version(u16),
    /// The disk.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What came is not what was sent, or not what was asked for.
    #[error("{path}: {source}")]
    Content {
        /// The file.
        path: String,
        /// What is wrong.
        source: ArrivalError,
    },
    /// The session broke, or the sender has stopped; what has arrived is kept.
    #[error("the session broke: {0}")]
    Broken(String),
    /// The other side does not follow the protocol.
    #[error("the other side does not follow the protocol: {0}")]
    Protocol(&'static str),
    /// A bug.
    #[error("the transfer was abandoned")]
    Abandoned,
}

impl ReceiveError {
    /// Whether the same over a new session may do.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Broken(_))
    }

    /// What the sender is told whose offer is not taken.
    fn refusal(&self) -> Refusal {
        match self {
            Self::Declined => Refusal::Declined,
            Self::Version(_) => Refusal::Version,
            _ => Refusal::Unsound,
        }
    }

    /// What the sender is told when it has begun.
    fn problem(&self) -> ReceiverProblem {
        match self {
            Self::Store(error) => error.problem(),
            Self::Folder { .. } => ReceiverProblem::Disk,
            Self::Content { source: ArrivalError::Grown, .. } => ReceiverProblem::Grown,
            Self::Content { .. } | Self::Protocol(_) | Self::Offer(_) | Self::Version(_) => {
                ReceiverProblem::Protocol
            }
            Self::Declined | Self::Broken(_) | Self::Abandoned => ReceiverProblem::Stopped,
        }
    }
}

impl From<ReadError> for ReceiveError {
    fn from(error: ReadError) -> Self {
        Self::Broken(error.to_string())
    }
}

impl From<FrameError> for ReceiveError {
    fn from(error: FrameError) -> Self {
        match error {
            FrameError::Truncated => Self::Broken("it ended in the middle".to_owned()),
            _ => Self::Protocol("its frames cannot be read"),
        }
    }
}

impl From<TakingError> for ReceiveError {
    fn from(error: TakingError) -> Self {
        match error {
            TakingError::Store(error) => error.into(),
            TakingError::Arrival(path, source) => Self::Content { path, source },
            TakingError::Frame(error) => error.into(),
            TakingError::Protocol(what) => Self::Protocol(what),
            TakingError::Broken => Self::Broken("nothing more came".to_owned()),
        }
    }
}

/// Takes what the other side offers with [`send`](super::send) on this stream into `folder`, if `consent` allows it.
///
/// Nothing is written outside of `folder`, no link is followed, nothing that is there is replaced unless `consent` says so. A file has its
/// name only once its content is verified; until then it grows beside it, in a file whose name ends with `.peer-part`. Calling it again with
/// the same offer goes on from there. When it returns, everything is on disk.
///
/// # Errors
///
/// See [`ReceiveError`].
pub async fn receive(
    send: SendStream,
    mut receive: RecvStream,
    folder: &Path,
    consent: &mut impl Consent,
    progress: &Arc<Progress>,
) -> Result<Received, ReceiveError> {
    let (answers, answers_out) = mpsc::channel(ANSWERS);
    let mut tasks = JoinSet::new();
    tasks.spawn(answer(send, answers_out));
    let offer = async {
        let manifest = read_offer(&mut receive).await?;
        if consent.accept(&manifest).await { Ok(Arc::new(manifest)) } else { Err(ReceiveError::Declined) }
    };
    let manifest = match offer.await {
        Ok(manifest) => manifest,
        Err(error) => {
            last_word(answers, tasks, ToSender::Refused(error.refusal())).await;
            return Err(error);
        }
    };
    progress.begin(manifest.files(), manifest.bytes());
    let (blocks_in, blocks) = mpsc::channel(BLOCKS);
    let mut pump = JoinSet::new();
    pump.spawn(pour(receive, blocks_in));
    let outcome = async {
        let root = open_root(folder).map_err(|source| {
            let path = folder.display().to_string();
            ReceiveError::Folder { path, source }
        })?;
        let take = Take { manifest: manifest.clone(), root: Arc::new(root), questions: answers.clone() };
        // Fails only when the session has, which the writer finds out.
        let _ = answers.send(ToSender::Accepted).await;
        take.all(blocks, consent, progress).await
    };
    let outcome = outcome.await;
    let word = match &outcome {
        Ok(outcome) => {
            ToSender::Done { kept: outcome.conflicts.len() as u32, failed: outcome.failed.len() as u32 }
        }
        Err(error) => ToSender::Failed(error.problem()),
    };
    if outcome.is_err() {
        // A sender that is not done sees that it may stop.
        pump.shutdown().await;
    }
    last_word(answers, tasks, word).await;
    let outcome = outcome?;
    Ok(Received {
        received: outcome.received,
        same: outcome.same,
        kept: outcome.conflicts.iter().map(|entry| manifest.path(*entry)).collect(),
        failed: outcome.failed.iter().map(|(entry, problem)| (manifest.path(*entry), *problem)).collect(),
    })
}

/// Takes nothing, and says why.
pub async fn refuse(send: SendStream, refusal: Refusal) {
    let (answers, answers_out) = mpsc::channel(1);
    let mut tasks = JoinSet::new();
    tasks.spawn(answer(send, answers_out));
    last_word(answers, tasks, ToSender::Refused(refusal)).await;
}

/// What is offered, all of it checked.
async fn read_offer(receive: &mut RecvStream) -> Result<Manifest, ReceiveError> {
    let (mut deframer, mut input) = (Deframer::default(), Bytes::new());
    let (mut builder, mut expected) = (ManifestBuilder::default(), None);
    loop {
        match deframer.next(&mut input)? {
            Some(Item::Message(FromSender::Offer { version, entries })) if expected.is_none() => {
                if version != VERSION {
                    return Err(ReceiveError::Version(version));
                }
                if entries as usize > MAX_ENTRIES {
                    return Err(ManifestError::TooMuch.into());
                }
                expected = Some(entries as usize);
            }
            Some(Item::Message(FromSender::Entries(batch))) if expected.is_some() => {
                for entry in batch {
                    builder.add(entry)?;
                }
            }
            Some(_) => return Err(ReceiveError::Protocol("something else than an offer")),
            None => match tokio::time::timeout(HESITATION, receive.read_chunk(MAX_MESSAGE, true)).await {
                Ok(chunk) => input = chunk?.ok_or(FrameError::Truncated)?.bytes,
                Err(_) => return Err(ReceiveError::Broken("it has not said what it offers".to_owned())),
            },
        }
        match expected {
            Some(expected) if builder.len() == expected && input.is_empty() => return Ok(builder.finish()),
            Some(expected) if builder.len() > expected => {
                return Err(ReceiveError::Protocol("more entries than it announced"));
            }
            _ => {}
        }
    }
}

/// Writes answers and questions as they come, several at once where several wait, and now and then that we are there. Ends when the last word has been
/// heard.
async fn answer(mut send: SendStream, mut answers: mpsc::Receiver<ToSender>) {
    let mut alive = tokio::time::interval(ALIVE);
    let mut batch = Vec::new();
    loop {
        let next = tokio::select! {
            next = answers.recv() => next,
            _ = alive.tick() => Some(ToSender::Alive),
        };
        let Some(next) = next else { break };
        batch.clear();
        encode(&next, &mut batch);
        while batch.len() < MAX_MESSAGE {
            let Ok(next) = answers.try_recv() else { break };
            encode(&next, &mut batch);
        }
        if send.write_all(&batch).await.is_err() {
            return;
        }
    }
    if send.finish().is_ok() {
        let _ = send.stopped().await;
    }
}

/// Reads as fast as the disk takes; wakes it for a good deal at once, or after a moment. Copies: what QUIC gives are pieces of a datagram each, too small to
/// hash and to write.
async fn pour(mut receive: RecvStream, blocks: mpsc::Sender<Bytes>) {
    let moment = tokio::time::sleep(MOMENT);
    tokio::pin!(moment);
    // Those that wait, the one that is filled, and the one that is written.
    let mut pool = Blocks::new(BLOCK, BLOCKS + 2);
    let mut over = false;
    while !over {
        let (mut block, mut used) = (pool.take(), 0);
        while used < BLOCK {
            tokio::select! {
                biased;
                read = receive.read(&mut block[used..]) => {
                    let Ok(Some(count)) = read else {
                        // The writer finds out that this is the end, and whether it is the right one.
                        over = true;
                        break;
                    };
                    if used == 0 {
                        moment.as_mut().reset(Instant::now() + MOMENT);
                    }
                    used += count;
                }
                () = &mut moment, if used > 0 => break,
            }
        }
        if used > 0 && blocks.send(pool.give(block, used)).await.is_err() {
            return;
        }
    }
}

/// Says it, and waits a moment until it has been heard.
async fn last_word(answers: mpsc::Sender<ToSender>, mut tasks: JoinSet<()>, word: ToSender) {
    let heard = async {
        let _ = answers.send(word).await;
        drop(answers);
        tasks.join_next().await;
    };
    let _ = tokio::time::timeout(GOODBYE, heard).await;
}

struct Take {
    manifest: Arc<Manifest>,
    root: Arc<std::os::fd::OwnedFd>,
    questions: mpsc::Sender<ToSender>,
}

impl Take {
    async fn all(
        &self,
        blocks: mpsc::Receiver<Bytes>,
        consent: &mut impl Consent,
        progress: &Arc<Progress>,
    ) -> Result<Outcome, ReceiveError> {
        let folders = Folders::new(self.manifest.clone(), Top::Folder(self.root.clone()));
        let writer = Writer::new(self.manifest.clone(), folders, blocks, progress.clone());
        let (mut writer, planned) = self.first_round(writer).await?;
        let mut conflicts = planned.conflicts;
        conflicts.append(&mut writer.outcome.conflicts);
        conflicts.sort_unstable();
        if !conflicts.is_empty() {
            let paths: Vec<String> = conflicts.iter().map(|entry| self.manifest.path(*entry)).collect();
            if consent.replace(&paths).await {
                writer = self.second_round(writer, conflicts).await?;
            } else {
                let is_link = |entry: &u32| {
                    matches!(self.manifest.get(*entry).map(|entry| &entry.kind), Some(Kind::Link { .. }))
                };
                // Links are counted when their turn comes.
                writer.outcome.conflicts = conflicts.into_iter().filter(|entry| !is_link(entry)).collect();
            }
        }
        let root = self.root.clone();
        let finished = spawn_blocking(move || {
            writer.finish_tree()?;
            store::sync(&root).map_err(|error| StoreError::at(".".to_owned(), error))?;
            Ok::<_, StoreError>(writer.outcome)
        });
        Ok(finished.await.map_err(|_| ReceiveError::Abandoned)??)
    }

    /// Everything that is not there.
    async fn first_round(&self, mut writer: Writer) -> Result<(Writer, Planned), ReceiveError> {
        let (asked_in, asked) = std_mpsc::channel();
        let folders = Folders::new(self.manifest.clone(), Top::Folder(self.root.clone()));
        let planner = Planner::new(self.manifest.clone(), folders, self.questions.clone(), asked_in);
        let planning = spawn_blocking(move || planner.run());
        let writing = spawn_blocking(move || writer.run(&asked).map(|()| writer));
        let written = writing.await.map_err(|_| ReceiveError::Abandoned)?;
        // The planner ends when the writer has.
        let planned = planning.await.map_err(|_| ReceiveError::Abandoned)?;
        match (written, planned) {
            (Ok(writer), Ok(planned)) => Ok((writer, planned)),
            (_, Err(error)) => Err(error.into()),
            (Err(error), Ok(_)) => Err(error.into()),
        }
    }

    /// What replaces others.
    async fn second_round(&self, mut writer: Writer, conflicts: Vec<u32>) -> Result<Writer, ReceiveError> {
        let (asked_in, asked) = std_mpsc::channel();
        let (questions, manifest) = (self.questions.clone(), self.manifest.clone());
        let (writer_out, written) = std_mpsc::sync_channel(1);
        writer.replace = true;
        let writing = spawn_blocking(move || {
            let files = writer.replaceable(&conflicts);
            let files =
                files.map_err(|error| StoreError::at(manifest.top().next().unwrap_or_default(), error));
            let failed = files.as_ref().err().is_some();
            let _ = writer_out.send(files);
            if failed { Ok(writer) } else { writer.run(&asked).map(|()| writer) }
        });
        let asking = spawn_blocking(move || {
            for file in written.recv().unwrap_or_else(|_| Ok(Vec::new()))? {
                let _ = asked_in.send(Asked::Want { first: file, count: 1 });
                if questions.blocking_send(ToSender::Want { first: file, count: 1 }).is_err() {
                    break;
                }
            }
            Ok::<_, StoreError>(())
        });
        let written = writing.await.map_err(|_| ReceiveError::Abandoned)?;
        asking.await.map_err(|_| ReceiveError::Abandoned)??;
        Ok(written?)
    }
}
