//! Sending: the offer, then answers to what the receiver asks.

use std::sync::Arc;

use bytes::Bytes;
use quinn::{ReadError, RecvStream, SendStream, WriteError};
use tokio::sync::mpsc;

use super::message::{
    Deframer, FrameError, FromSender, Item, MAX_MESSAGE, ReceiverProblem, Refusal, SILENCE, ToSender,
    VERSION, encode,
};
use super::progress::Progress;
use super::reader::{Question, Reader};
use super::source::Source;
use super::tree::{GroupValue, groups};

/// Blocks between disk and network, and questions that wait.
const QUEUE: usize = 4;

/// What became of an offer that was taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Sent {
    /// Files that the receiver has, and has kept as they were: another file of that name was there.
    pub kept: u32,
    /// Files that could not be sent.
    pub failed: u32,
}

/// Why sending failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// The other side does not want it.
    #[error("not accepted: {0}")]
    Refused(Refusal),
    /// The other side could not go on.
    #[error(transparent)]
    Receiver(ReceiverProblem),
    /// The session broke; what has arrived is kept.
    #[error("the session broke: {0}")]
    Broken(String),
    /// The other side does not follow the protocol.
    #[error("the other side does not follow the protocol: {0}")]
    Protocol(&'static str),
}

impl SendError {
    /// Whether the same over a new session, or a little later, may do.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Broken(_) | Self::Refused(Refusal::Busy))
    }
}

impl From<WriteError> for SendError {
    fn from(error: WriteError) -> Self {
        Self::Broken(error.to_string())
    }
}

impl From<ReadError> for SendError {
    fn from(error: ReadError) -> Self {
        Self::Broken(error.to_string())
    }
}

impl From<FrameError> for SendError {
    fn from(error: FrameError) -> Self {
        match error {
            FrameError::Truncated => Self::Broken("it ended in the middle".to_owned()),
            _ => Self::Protocol("its answers cannot be read"),
        }
    }
}

/// Offers `source` on a stream and sends what the receiver asks for, until it has everything.
///
/// The other side calls [`receive`](super::receive) on the same stream. When it breaks off, the same over another stream goes on where this has
/// ended.
///
/// # Errors
///
/// See [`SendError`].
pub async fn send(
    mut send: SendStream,
    receive: RecvStream,
    source: &Source,
    progress: &Arc<Progress>,
) -> Result<Sent, SendError> {
    progress.begin(source.manifest.files(), source.manifest.bytes());
    let mut answers = Answers { receive, deframer: Deframer::default(), input: Bytes::new() };
    let offered = async {
        for message in offer(source) {
            send.write_all(&message).await?;
        }
        Ok(())
    };
    match offered.await {
        Ok(()) => {}
        // It has stopped listening: its answer says why.
        Err(WriteError::Stopped(_)) => {}
        Err(error) => return Err(error.into()),
    }
    match answers.next().await? {
        ToSender::Accepted => {}
        ToSender::Refused(reason) => return Err(SendError::Refused(reason)),
        ToSender::Failed(problem) => return Err(SendError::Receiver(problem)),
        _ => return Err(SendError::Protocol("questions before it has accepted")),
    }
    let (questions_in, questions) = mpsc::channel(QUEUE);
    let (blocks_in, mut blocks) = mpsc::channel::<Bytes>(QUEUE);
    let reader = Reader::new(source.clone(), blocks_in, progress.clone());
    let reader = tokio::task::spawn_blocking(move || reader.run(questions));
    let listen = answers.listen(source, questions_in);
    let talking_to = &mut send;
    // Ends the reader, too, when it ends: the blocks go with it.
    let mut talk = Box::pin(async move {
        while let Some(block) = blocks.recv().await {
            match talking_to.write_chunk(block).await {
                Ok(()) => {}
                // The reason comes on the other half.
                Err(WriteError::Stopped(_)) => break,
                Err(error) => return Err(SendError::from(error)),
            }
        }
        drop(blocks);
        Ok(())
    });
    tokio::pin!(listen);
    let mut talking = true;
    let sent = loop {
        tokio::select! {
            sent = &mut listen => break sent?,
            talked = &mut talk, if talking => {
                talked?;
                talking = false;
            }
        }
    };
    // Unblocks the reader, if the receiver ended before it had all its answers.
    drop(talk);
    let _ = reader.await;
    let _ = send.finish();
    Ok(sent)
}

/// The offer in frames.
fn offer(source: &Source) -> Vec<Vec<u8>> {
    let entries = source.manifest.entries();
    let mut frame = Vec::new();
    encode(&FromSender::Offer { version: VERSION, entries: entries.len() as u32 }, &mut frame);
    let mut frames = vec![frame];
    let (mut batch, mut size) = (Vec::new(), 0);
    for entry in entries {
        let encoded = postcard::to_stdvec(entry).map_or(MAX_MESSAGE, |bytes| bytes.len());
        if size + encoded > MAX_MESSAGE - 64 {
            frames.push(entries_frame(std::mem::take(&mut batch)));
            size = 0;
        }
        batch.push(entry.clone());
        size += encoded;
    }
    if !batch.is_empty() {
        frames.push(entries_frame(batch));
    }
    frames
}

fn entries_frame(batch: Vec<super::manifest::Entry>) -> Vec<u8> {
    let mut frame = Vec::new();
    encode(&FromSender::Entries(batch), &mut frame);
    frame
}

/// The receiver's half.
struct Answers {
    receive: RecvStream,
    deframer: Deframer,
    input: Bytes,
}

impl Answers {
    /// The next answer that says something.
    async fn next(&mut self) -> Result<ToSender, SendError> {
        loop {
            match tokio::time::timeout(SILENCE, self.next_of_any_kind()).await {
                Ok(Ok(ToSender::Alive)) => {}
                Ok(answer) => return answer,
                Err(_) => {
                    let words = format!("nothing was heard for {} s", SILENCE.as_secs());
                    return Err(SendError::Broken(words));
                }
            }
        }
    }

    async fn next_of_any_kind(&mut self) -> Result<ToSender, SendError> {
        loop {
            match self.deframer.next(&mut self.input)? {
                Some(Item::Message(message)) => return Ok(message),
                Some(Item::Content(_)) => return Err(SendError::Protocol("content where none belongs")),
                None => {}
            }
            match self.receive.read_chunk(MAX_MESSAGE, true).await? {
                Some(chunk) => self.input = chunk.bytes,
                None => return Err(FrameError::Truncated.into()),
            }
        }
    }

    /// Passes questions on until the receiver is done.
    async fn listen(mut self, source: &Source, questions: mpsc::Sender<Question>) -> Result<Sent, SendError> {
        let mut known: Vec<(u64, GroupValue)> = Vec::new();
        // No file needs more, unless it has grown since it was offered; then the rest is sent again.
        let most = source.manifest.entries().iter().map(|entry| match entry.kind {
            super::Kind::File { size, .. } => groups(size),
            _ => 0,
        });
        let most = most.max().unwrap_or(0);
        loop {
            let question = match self.next().await? {
                ToSender::Known { first, values } => {
                    let end = first.saturating_add(values.len() as u64);
                    let ascends = known.last().is_none_or(|(last, _)| *last < first);
                    if end > most || !ascends {
                        return Err(SendError::Protocol("it has groups that no file has"));
                    }
                    known.extend((first..end).zip(values));
                    continue;
                }
                ToSender::Want { first, count } => {
                    Question::Want { first, count, known: std::mem::take(&mut known) }
                }
                ToSender::Compare { file, hash } => Question::Compare { file, hash },
                ToSender::Done { kept, failed } => return Ok(Sent { kept, failed }),
                ToSender::Failed(problem) => return Err(SendError::Receiver(problem)),
                ToSender::Refused(_) | ToSender::Accepted | ToSender::Alive => {
                    return Err(SendError::Protocol("it has accepted twice"));
                }
            };
            // The reader ends first only when nothing can be written any more, which the other half tells.
            let _ = questions.send(question).await;
        }
    }
}
