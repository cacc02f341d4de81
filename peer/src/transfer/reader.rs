//! The sender's disk: reads, hashes and frames what is asked for, on a thread of its own.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;

use bytes::Bytes;
use rustix::io::Errno;
use tokio::sync::mpsc;

use super::content::{Groups, STEP, file_hash};
use super::folders::{Folders, Top};
use super::manifest::{Kind, Modified};
use super::message::{FileProblem, FromSender};
use super::outbox::{Gone, Outbox};
use super::progress::Progress;
use super::source::Source;
use super::tree::{GROUP, GroupHasher, GroupValue, Tree, group_length, groups};

/// How often a file that changes while it is read is begun again.
const ATTEMPTS: usize = 5;

/// What the receiver has asked for.
#[derive(Debug)]
pub(crate) enum Question {
    Want { first: u32, count: u32, known: Vec<(u64, GroupValue)> },
    Compare { file: u32, hash: [u8; 32] },
}

/// Answers one question after the other.
pub(crate) struct Reader {
    source: Source,
    folders: Folders,
    outbox: Outbox,
    progress: Arc<Progress>,
    failed: u32,
}

/// How reading a file ended.
enum Read {
    Sent,
    /// The file is not what it was when it was begun.
    Changed,
}

/// Why there is no point in going on with a file, or with any.
enum Stop {
    Problem(FileProblem),
    Gone,
}

impl From<Gone> for Stop {
    fn from(_: Gone) -> Self {
        Self::Gone
    }
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Problem(match Errno::from_io_error(&error) {
            // LOOP: a link where there was a file.
            Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => FileProblem::Gone,
            Some(Errno::ACCESS | Errno::PERM) => FileProblem::Denied,
            _ => FileProblem::Unreadable,
        })
    }
}

/// What tells that a file has been touched.
#[derive(PartialEq, Eq)]
struct Version {
    size: u64,
    modified: Modified,
    changed: (i64, i64),
    mode: u32,
}

impl Version {
    fn of(file: &File) -> Result<Self, Stop> {
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(Stop::Problem(FileProblem::Gone));
        }
        let nanoseconds = u32::try_from(metadata.mtime_nsec()).unwrap_or_default();
        Ok(Self {
            size: metadata.len(),
            modified: Modified { seconds: metadata.mtime(), nanoseconds },
            changed: (metadata.ctime(), metadata.ctime_nsec()),
            mode: metadata.mode() & 0o777,
        })
    }
}

impl Reader {
    pub(crate) fn new(source: Source, blocks: mpsc::Sender<Bytes>, progress: Arc<Progress>) -> Self {
        let folders = Folders::new(source.manifest.clone(), Top::Paths(source.paths.clone()));
        Self { source, folders, outbox: Outbox::new(blocks), progress, failed: 0 }
    }

    /// Answers until there are no more questions, or nobody takes the answers. How many files could not be sent.
    pub(crate) fn run(mut self, mut questions: mpsc::Receiver<Question>) -> u32 {
        loop {
            let question = match questions.try_recv() {
                Ok(question) => Some(question),
                Err(mpsc::error::TryRecvError::Disconnected) => None,
                Err(mpsc::error::TryRecvError::Empty) => {
                    // Whoever waits for the next question may wait for the last answer.
                    if self.outbox.flush().is_err() {
                        return self.failed;
                    }
                    questions.blocking_recv()
                }
            };
            let Some(question) = question else { return self.failed };
            if self.answer(question).is_err() {
                return self.failed;
            }
        }
    }

    fn answer(&mut self, question: Question) -> Result<(), Gone> {
        match question {
            Question::Want { first, count, known } => {
                for file in first..first.saturating_add(count) {
                    match self.source.manifest.get(file).map(|entry| &entry.kind) {
                        Some(Kind::File { .. }) => self.send(file, &known)?,
                        Some(_) => {}
                        None => break,
                    }
                }
                Ok(())
            }
            Question::Compare { file, hash } => {
                let answer = match self.hash(file) {
                    Ok(Some(own)) if own == hash => {
                        self.progress.file();
                        FromSender::Same { file }
                    }
                    Ok(_) => FromSender::Differs { file },
                    Err(problem) => FromSender::Failed { file, problem },
                };
                self.outbox.message(&answer)
            }
        }
    }

    fn hash(&mut self, index: u32) -> Result<Option<[u8; 32]>, FileProblem> {
        let read = |folders: &mut Folders, buffer: &mut [u8]| -> Result<_, Stop> {
            let file = folders.open_file(index)?;
            let before = Version::of(&file)?;
            let hash = file_hash(&file, before.size, buffer)?;
            Ok(if Version::of(&file)? == before { hash.map(|hash| (hash, before.size)) } else { None })
        };
        match read(&mut self.folders, self.outbox.scratch()) {
            Ok(Some((hash, size))) => {
                self.progress.passed(size);
                Ok(Some(hash))
            }
            Ok(None) => Ok(None),
            Err(Stop::Problem(problem)) => Err(problem),
            Err(Stop::Gone) => Err(FileProblem::Unreadable),
        }
    }

    fn send(&mut self, file: u32, known: &[(u64, GroupValue)]) -> Result<(), Gone> {
        let mut problem = FileProblem::Changing;
        let mut known = known;
        for _ in 0..ATTEMPTS {
            let before = self.progress.now().bytes;
            match self.send_once(file, known) {
                Ok(Read::Sent) => {
                    self.progress.file();
                    return Ok(());
                }
                Ok(Read::Changed) => {
                    self.progress.took_back(self.progress.now().bytes - before);
                    // What the receiver knew may be overwritten by now.
                    known = &[];
                }
                Err(Stop::Gone) => return Err(Gone),
                Err(Stop::Problem(found)) => {
                    problem = found;
                    break;
                }
            }
        }
        self.failed += 1;
        self.outbox.message(&FromSender::Failed { file, problem })
    }

    fn send_once(&mut self, index: u32, known: &[(u64, GroupValue)]) -> Result<Read, Stop> {
        let file = self.folders.open_file(index)?;
        let version = Version::of(&file)?;
        let size = version.size;
        self.outbox.message(&FromSender::Begin {
            file: index,
            size,
            mode: version.mode,
            modified: version.modified,
        })?;
        let mut reader = Groups::new(&file, size)?;
        let mut tree = Tree::default();
        let mut known = known.iter().peekable();
        for group in 0..groups(size) {
            let length = group_length(size, group);
            while known.next_if(|(number, _)| *number < group).is_some() {}
            if let Some((_, theirs)) = known.next_if(|(number, _)| length > 0 && *number == group) {
                let Some((_, value)) = reader.load(group, self.outbox.scratch())? else {
                    return Ok(Read::Changed);
                };
                if value == *theirs {
                    tree.push(value);
                    self.outbox.skip()?;
                    self.progress.passed(length);
                    continue;
                }
            }
            let Some(value) = self.send_group(&mut reader, size, group)? else { return Ok(Read::Changed) };
            tree.push(value);
        }
        let Some(hash) = tree.finish() else { return Ok(Read::Changed) };
        if Version::of(&file)? != version {
            return Ok(Read::Changed);
        }
        self.outbox.message(&FromSender::End { hash })?;
        Ok(Read::Sent)
    }

    /// One group as content and holes, and its value; `None`: the file is shorter than it was.
    fn send_group(
        &mut self,
        reader: &mut Groups<'_>,
        size: u64,
        group: u64,
    ) -> Result<Option<GroupValue>, Stop> {
        let (start, length) = (group * GROUP, group_length(size, group));
        let mut hasher = GroupHasher::new(size, group);
        let mut at = 0;
        for range in reader.data(group)? {
            self.send_hole(&mut hasher, (range.start - at) as u64)?;
            at = range.start;
            while at < range.end {
                let room = self.outbox.room((range.end - at).min(STEP))?;
                if !reader.read(start + at as u64, room)? {
                    return Ok(None);
                }
                hasher.update(room);
                let count = room.len();
                self.outbox.content(count)?;
                self.progress.carried(count as u64);
                at += count;
            }
        }
        self.send_hole(&mut hasher, length - at as u64)?;
        Ok(Some(hasher.finish()))
    }

    fn send_hole(&mut self, hasher: &mut GroupHasher, length: u64) -> Result<(), Gone> {
        if length > 0 {
            hasher.update_zeros(length);
            self.outbox.hole(length)?;
            self.progress.passed(length);
        }
        Ok(())
    }
}

const _: () = assert!(STEP <= super::message::MAX_CONTENT);
