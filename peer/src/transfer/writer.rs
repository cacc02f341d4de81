//! Takes the answers to what was asked, on a thread of its own.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc as std_mpsc;

use bytes::Bytes;
use rustix::fs::{AtFlags, Mode, fchmod, fstat, futimens, readlinkat, symlinkat, unlinkat};
use rustix::io::Errno;
use tokio::sync::mpsc;

use super::arrival::{Arrival, ArrivalError, Known, TakeError};
use super::folders::Folders;
use super::manifest::{Kind, Manifest, Modified};
use super::message::{Deframer, FileProblem, FrameError, FromSender, Item};
use super::plan::{Asked, Existing, existing};
use super::progress::Progress;
use super::store::{Part, StoreError, timestamps};

/// Files may be larger than what was consented to by so much in all, and an eighth of it.
const GROWTH: u64 = 64 << 20;

/// How much of a hole is dealt with before it is asked whether the session still lives.
const HOLE_STEP: u64 = 64 << 20;

/// Why taking ended early.
#[derive(Debug)]
pub(crate) enum TakingError {
    Store(StoreError),
    Arrival(String, ArrivalError),
    Frame(FrameError),
    Protocol(&'static str),
    /// Nothing comes any more.
    Broken,
}

impl From<FrameError> for TakingError {
    fn from(error: FrameError) -> Self {
        Self::Frame(error)
    }
}

/// What became of the files, so far.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Those that are on disk, and were not before.
    pub(crate) received: u32,
    /// Those that were there.
    pub(crate) same: u32,
    /// Those that are there and are others.
    pub(crate) conflicts: Vec<u32>,
    pub(crate) failed: Vec<(u32, FileProblem)>,
}

pub(crate) struct Writer {
    manifest: Arc<Manifest>,
    folders: Folders,
    blocks: mpsc::Receiver<Bytes>,
    /// What is left of the one that came last.
    block: Bytes,
    deframer: Deframer,
    progress: Arc<Progress>,
    /// Bytes by which files may yet be larger than offered.
    growth_left: u64,
    pub(crate) outcome: Outcome,
    /// Whether a file with the name of an offered one gives way.
    pub(crate) replace: bool,
}

impl Writer {
    pub(crate) fn new(
        manifest: Arc<Manifest>,
        folders: Folders,
        blocks: mpsc::Receiver<Bytes>,
        progress: Arc<Progress>,
    ) -> Self {
        let growth_left = manifest.bytes() / 8 + GROWTH;
        Self {
            growth_left,
            manifest,
            folders,
            blocks,
            block: Bytes::new(),
            deframer: Deframer::default(),
            progress,
            outcome: Outcome::default(),
            replace: false,
        }
    }

    /// Takes the answers to all that is asked, until nothing more is.
    pub(crate) fn run(&mut self, asked: &std_mpsc::Receiver<Asked>) -> Result<(), TakingError> {
        for question in asked {
            match question {
                Asked::Want { first, count } => {
                    let manifest = self.manifest.clone();
                    for file in first..first + count {
                        if matches!(manifest.get(file).map(|entry| &entry.kind), Some(Kind::File { .. })) {
                            self.take(file, Known::new())?;
                        }
                    }
                }
                Asked::Rest { file, known } => self.take(file, known)?,
                Asked::Compare { file } => self.compared(file)?,
            }
        }
        Ok(())
    }

    fn item(&mut self) -> Result<Item<FromSender>, TakingError> {
        loop {
            if let Some(item) = self.deframer.next(&mut self.block)? {
                return Ok(item);
            }
            self.block = self.blocks.blocking_recv().ok_or(TakingError::Broken)?;
        }
    }

    fn compared(&mut self, file: u32) -> Result<(), TakingError> {
        match self.item()? {
            Item::Message(FromSender::Same { file: answered }) if answered == file => {
                self.outcome.same += 1;
                self.progress.file();
                self.progress.passed(self.offered_size(file));
            }
            Item::Message(FromSender::Differs { file: answered }) if answered == file => {
                self.outcome.conflicts.push(file);
            }
            Item::Message(FromSender::Failed { file: answered, problem }) if answered == file => {
                self.outcome.failed.push((file, problem));
            }
            _ => return Err(TakingError::Protocol("another answer than was asked for")),
        }
        Ok(())
    }

    fn offered_size(&self, file: u32) -> u64 {
        match self.manifest.get(file).map(|entry| &entry.kind) {
            Some(Kind::File { size, .. }) => *size,
            _ => 0,
        }
    }

    fn store_error(&self, file: u32) -> impl Fn(io::Error) -> TakingError + use<> {
        let path = self.manifest.path(file);
        move |error| TakingError::Store(StoreError::at(path.clone(), error))
    }

    /// One file, from its beginning to its end.
    fn take(&mut self, file: u32, known: Known) -> Result<(), TakingError> {
        let (size, mode, modified) = match self.item()? {
            Item::Message(FromSender::Begin { file: begun, size, mode, modified }) if begun == file => {
                (size, mode, modified)
            }
            Item::Message(FromSender::Failed { file: failed, problem }) if failed == file => {
                self.outcome.failed.push((file, problem));
                return Ok(());
            }
            _ => return Err(TakingError::Protocol("another file than was asked for")),
        };
        self.allow_growth(file, size)?;
        let opened = self.folders.place(file).and_then(|(folder, name)| Part::open(folder, &name));
        let mut part = match opened {
            Ok(part) => part,
            Err(error) => return Err(self.store_error(file)(error)),
        };
        if known.is_empty() {
            part.clear().map_err(|error| self.store_error(file)(error))?;
        }
        let mut taken = Taken { size, mode, modified, arrival: Arrival::new(size, known), counted: 0 };
        loop {
            match self.item()? {
                Item::Content(content) => {
                    let length = content.len() as u64;
                    taken
                        .arrival
                        .content(&content, &mut part)
                        .map_err(|error| self.broken_rule(file, error))?;
                    self.progress.carried(length);
                    taken.counted += length;
                }
                Item::Message(FromSender::Hole { length }) => {
                    self.take_hole(file, length, &mut taken, &mut part)?;
                }
                Item::Message(FromSender::Skip { groups }) => {
                    let skipped = taken.arrival.skip(groups);
                    let length =
                        skipped.map_err(|error| TakingError::Arrival(self.manifest.path(file), error))?;
                    self.progress.passed(length);
                    taken.counted += length;
                }
                // It has changed: all of it comes again.
                Item::Message(FromSender::Begin { file: begun, size, mode, modified }) if begun == file => {
                    self.allow_growth(file, size)?;
                    self.progress.took_back(taken.counted);
                    part.clear().map_err(|error| self.store_error(file)(error))?;
                    let arrival = Arrival::new(size, Known::new());
                    taken = Taken { size, mode, modified, arrival, counted: 0 };
                }
                Item::Message(FromSender::End { hash }) => return self.finish(file, part, taken, hash),
                Item::Message(FromSender::Failed { file: failed, problem }) if failed == file => {
                    self.progress.took_back(taken.counted);
                    self.outcome.failed.push((file, problem));
                    return Ok(());
                }
                Item::Message(_) => return Err(TakingError::Protocol("something else amid a file")),
            }
        }
    }

    /// A hole, step by step: it costs the other side one message, and us the hashing of as many zeros as it likes.
    fn take_hole(
        &mut self,
        file: u32,
        length: u64,
        taken: &mut Taken,
        part: &mut Part,
    ) -> Result<(), TakingError> {
        taken.arrival.check(length).map_err(|error| TakingError::Arrival(self.manifest.path(file), error))?;
        let mut left = length;
        while left > 0 {
            if self.blocks.is_closed() && self.blocks.is_empty() {
                return Err(TakingError::Broken);
            }
            let step = left.min(HOLE_STEP);
            let hole = taken.arrival.hole(step, part);
            hole.map_err(|error| self.broken_rule(file, error))?;
            self.progress.passed(step);
            taken.counted += step;
            left -= step;
        }
        Ok(())
    }

    /// A file may have grown since its owner was asked, but not by as much as the sender likes.
    fn allow_growth(&mut self, file: u32, size: u64) -> Result<(), TakingError> {
        let growth = size.saturating_sub(self.offered_size(file));
        match self.growth_left.checked_sub(growth) {
            Some(left) => {
                self.growth_left = left;
                Ok(())
            }
            None => Err(TakingError::Arrival(self.manifest.path(file), ArrivalError::Grown)),
        }
    }

    fn broken_rule(&self, file: u32, error: TakeError<io::Error>) -> TakingError {
        match error {
            TakeError::Rules(error) => TakingError::Arrival(self.manifest.path(file), error),
            TakeError::Sink(error) => self.store_error(file)(error),
        }
    }

    fn finish(&mut self, file: u32, mut part: Part, taken: Taken, hash: [u8; 32]) -> Result<(), TakingError> {
        let Taken { size, mode, modified, arrival, .. } = taken;
        if let Err(error) = arrival.end(hash) {
            if error == ArrivalError::Hash {
                // Nothing of it can be trusted.
                let _ = part.clear();
            }
            return Err(TakingError::Arrival(self.manifest.path(file), error));
        }
        let replace = self.replace;
        let finished = self
            .folders
            .place(file)
            .and_then(|(folder, name)| part.finish(folder, &name, size, (mode, modified), replace));
        match finished {
            Ok(()) => self.outcome.received += 1,
            // It was not there when we looked.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => self.outcome.conflicts.push(file),
            Err(error) => return Err(self.store_error(file)(error)),
        }
        self.progress.file();
        Ok(())
    }

    /// What follows when all files are there: links, and the dates of folders, which every new name in them has changed.
    pub(crate) fn finish_tree(&mut self) -> Result<(), StoreError> {
        let manifest = self.manifest.clone();
        let entries = manifest.entries();
        for (index, entry) in entries.iter().enumerate() {
            if let Kind::Link { target } = &entry.kind {
                let index = index as u32;
                self.link(index, target).map_err(|error| StoreError::at(manifest.path(index), error))?;
            }
        }
        // What is in a folder comes after it in the offer, so from the end.
        for (index, entry) in entries.iter().enumerate().rev() {
            if let Kind::Folder { mode, modified } = entry.kind {
                let index = index as u32;
                let done = self.folder(index, mode & 0o777, modified);
                done.map_err(|error| StoreError::at(manifest.path(index), error))?;
            }
        }
        Ok(())
    }

    fn link(&mut self, index: u32, target: &[u8]) -> io::Result<()> {
        let replace = self.replace;
        let (folder, name) = self.folders.place(index)?;
        match symlinkat(target, folder, &name) {
            Ok(()) => return Ok(()),
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let same = |name: &Path| {
            readlinkat(folder, name, Vec::new()).is_ok_and(|present| present.as_bytes() == target)
        };
        if same(&name) {
            return Ok(());
        }
        // A folder never gives way.
        let removed = replace && unlinkat(folder, &name, AtFlags::empty()).is_ok();
        if removed {
            return Ok(symlinkat(target, folder, &name)?);
        }
        self.outcome.conflicts.push(index);
        Ok(())
    }

    fn folder(&mut self, index: u32, mode: u32, modified: Modified) -> io::Result<()> {
        let folder = self.folders.folder(index)?;
        // The permissions of a folder that was there before us are its owner's choice; ours has those that it was made with.
        let present = fstat(folder)?.st_mode & 0o777;
        if present != mode && present == mode | 0o700 {
            fchmod(folder, Mode::from_raw_mode(mode))?;
        }
        Ok(futimens(folder, &timestamps(modified))?)
    }

    /// Of entries whose names others have: the files that may come in their place. The rest are kept as they are.
    pub(crate) fn replaceable(&mut self, conflicts: &[u32]) -> io::Result<Vec<u32>> {
        let mut files = Vec::new();
        for &entry in conflicts {
            if !matches!(self.manifest.get(entry).map(|entry| &entry.kind), Some(Kind::File { .. })) {
                continue;
            }
            let (folder, name) = self.folders.place(entry)?;
            if existing(folder, &name)? == Existing::Folder {
                self.outcome.conflicts.push(entry);
            } else {
                files.push(entry);
            }
        }
        Ok(files)
    }
}

/// The file that is arriving.
struct Taken {
    size: u64,
    mode: u32,
    modified: Modified,
    arrival: Arrival,
    /// Bytes that the progress has counted.
    counted: u64,
}
