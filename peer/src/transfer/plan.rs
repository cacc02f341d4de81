//! The receiver's questions: looks at what is there, makes the folders, asks for what is missing.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc as std_mpsc;

use rustix::fs::{AtFlags, FileType, Mode, fchmod, mkdirat, readlinkat, statat};
use rustix::io::Errno;
use tokio::sync::mpsc;

use super::arrival::Known;
use super::content::{Groups, file_hash};
use super::folders::{Folders, open_existing};
use super::manifest::{Kind, Manifest};
use super::message::{MAX_VALUES, ToSender};
use super::store::{StoreError, part_name};
use super::tree::{GROUP, group_length, groups};

/// A question whose answer comes next, after those of the questions before it.
#[derive(Debug)]
pub(crate) enum Asked {
    /// For the files among these entries.
    Want { first: u32, count: u32 },
    /// For one file, some of which is in its part.
    Rest { file: u32, known: Known },
    /// Whether the file that is there is the offered one.
    Compare { file: u32 },
}

/// What is at a file's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Existing {
    Nothing,
    File { size: u64 },
    Folder,
    Other,
}

/// What is to be done about an offered file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    Want,
    /// Groups of its part may be right.
    Resume,
    /// It may be there.
    Compare,
    /// Another one is there.
    Conflict,
}

/// `part` is the size of what is there of it.
pub(crate) fn decide(size: u64, existing: Existing, part: Option<u64>) -> Decision {
    match existing {
        Existing::File { size: other } if other == size => Decision::Compare,
        Existing::File { .. } | Existing::Folder | Existing::Other => Decision::Conflict,
        // Less than a group is sooner sent than verified.
        Existing::Nothing if size > GROUP && part.is_some_and(|part| part >= GROUP) => Decision::Resume,
        Existing::Nothing => Decision::Want,
    }
}

/// What the plan finds out on its way.
#[derive(Debug, Default)]
pub(crate) struct Planned {
    /// Files that are there, and are others than those offered.
    pub(crate) conflicts: Vec<u32>,
}

pub(crate) struct Planner {
    manifest: Arc<Manifest>,
    folders: Folders,
    questions: mpsc::Sender<ToSender>,
    asked: std_mpsc::Sender<Asked>,
    /// Folders, by entry, that this plan has made: nothing is in them.
    new: Vec<bool>,
    planned: Planned,
    /// Files to be asked for, first and count.
    run: Option<(u32, u32)>,
    buffer: Vec<u8>,
}

/// Questions about so many entries are asked before more are looked at.
const RUN: u32 = 256;

impl Planner {
    pub(crate) fn new(
        manifest: Arc<Manifest>,
        folders: Folders,
        questions: mpsc::Sender<ToSender>,
        asked: std_mpsc::Sender<Asked>,
    ) -> Self {
        let new = vec![false; manifest.entries().len()];
        let planned = Planned::default();
        Self { manifest, folders, questions, asked, new, planned, run: None, buffer: Vec::new() }
    }

    /// Goes through the whole offer. Ends early when nobody listens any more.
    pub(crate) fn run(mut self) -> Result<Planned, StoreError> {
        let manifest = self.manifest.clone();
        for (index, entry) in manifest.entries().iter().enumerate() {
            let index = index as u32;
            let more = match entry.kind {
                Kind::Folder { mode, .. } => self.folder(index, mode).map(|()| true),
                Kind::File { size, .. } => self.file(index, size),
                Kind::Link { ref target } => self.link(index, target),
            };
            match more {
                Ok(true) => {}
                Ok(false) => return Ok(self.planned),
                Err(error) => return Err(StoreError::at(manifest.path(index), error)),
            }
        }
        self.ask_run();
        Ok(self.planned)
    }

    fn folder(&mut self, index: u32, mode: u32) -> io::Result<()> {
        let (parent, name) = self.folders.place(index)?;
        match mkdirat(parent, &name, Mode::from_raw_mode((mode & 0o777) | 0o700)) {
            Ok(()) => self.new[index as usize] = true,
            // It may be one; opening it will tell, and tell links from folders.
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let folder = self.folders.folder(index)?;
        if self.new[index as usize] {
            // Whatever the umask.
            fchmod(folder, Mode::from_raw_mode((mode & 0o777) | 0o700))?;
        }
        Ok(())
    }

    /// Links are made last; here it is only found out whether one is in the way of something else.
    fn link(&mut self, index: u32, target: &[u8]) -> io::Result<bool> {
        let (folder, name) = self.folders.place(index)?;
        match readlinkat(folder, &name, Vec::new()) {
            Ok(present) if present.as_bytes() == target => {}
            Err(Errno::NOENT) => {}
            // EINVAL: there is something that is no link.
            Ok(_) | Err(Errno::INVAL) => self.planned.conflicts.push(index),
            Err(error) => return Err(error.into()),
        }
        Ok(true)
    }

    /// False: nobody listens.
    fn file(&mut self, index: u32, size: u64) -> io::Result<bool> {
        let in_new = self.manifest.get(index).and_then(|entry| entry.parent);
        if in_new.is_some_and(|parent| self.new[parent as usize]) {
            return Ok(self.want(index));
        }
        let (folder, name) = self.folders.place(index)?;
        let there = existing(folder, &name)?;
        let part_name = part_name(&name);
        let part = match existing(folder, &part_name)? {
            Existing::File { size } => Some(size),
            Existing::Nothing | Existing::Folder | Existing::Other => None,
        };
        match decide(size, there, part) {
            Decision::Want => Ok(self.want(index)),
            Decision::Conflict => {
                self.planned.conflicts.push(index);
                Ok(self.ask_run())
            }
            Decision::Compare => {
                let file = open_existing(folder, &name)?;
                self.buffer.resize(GROUP as usize, 0);
                // Shorter than it was a moment ago: another one is there.
                let Some(hash) = file_hash(&file, size, &mut self.buffer)? else {
                    self.planned.conflicts.push(index);
                    return Ok(self.ask_run());
                };
                Ok(self.ask_run()
                    && self.ask(ToSender::Compare { file: index, hash }, Asked::Compare { file: index }))
            }
            Decision::Resume => {
                let part = open_existing(folder, &part_name)?;
                let known = self.known(&part, size)?;
                Ok(self.ask_run() && self.rest(index, known))
            }
        }
    }

    /// The values of the part's groups. Whatever they are, the sender compares them with its own.
    fn known(&mut self, part: &std::fs::File, size: u64) -> io::Result<Known> {
        self.buffer.resize(GROUP as usize, 0);
        let length = part.metadata()?.len();
        let mut reader = Groups::new(part, size)?;
        let mut known = Known::new();
        for group in 0..groups(size) {
            if group * GROUP + group_length(size, group) > length {
                break;
            }
            if reader.data(group)?.is_empty() {
                continue;
            }
            let Some((_, value)) = reader.load(group, &mut self.buffer)? else { break };
            known.push_back((group, value));
        }
        Ok(known)
    }

    fn rest(&mut self, file: u32, known: Known) -> bool {
        let values: Vec<_> = known.iter().copied().collect();
        for run in values.chunk_by(|one, next| one.0 + 1 == next.0) {
            for some in run.chunks(MAX_VALUES) {
                let message = ToSender::Known {
                    first: some[0].0,
                    values: some.iter().map(|(_, value)| *value).collect(),
                };
                if self.questions.blocking_send(message).is_err() {
                    return false;
                }
            }
        }
        self.ask(ToSender::Want { first: file, count: 1 }, Asked::Rest { file, known })
    }

    /// One more file that is wanted whole.
    fn want(&mut self, index: u32) -> bool {
        let mut open = true;
        match &mut self.run {
            Some((first, count)) if index - *first < RUN => *count = index - *first + 1,
            _ => {
                open = self.ask_run();
                self.run = Some((index, 1));
            }
        }
        open
    }

    /// Asks for the files that are gathered. Whoever leaves a file out must call it: a run has every file from its first to its last.
    fn ask_run(&mut self) -> bool {
        match self.run.take() {
            Some((first, count)) => self.ask(ToSender::Want { first, count }, Asked::Want { first, count }),
            None => true,
        }
    }

    fn ask(&self, question: ToSender, asked: Asked) -> bool {
        self.asked.send(asked).is_ok() && self.questions.blocking_send(question).is_ok()
    }
}

/// What is at a name, links not followed.
pub(crate) fn existing(folder: BorrowedFd<'_>, name: &Path) -> io::Result<Existing> {
    match statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(found) if FileType::from_raw_mode(found.st_mode) == FileType::RegularFile => {
            Ok(Existing::File { size: found.st_size as u64 })
        }
        Ok(found) if FileType::from_raw_mode(found.st_mode) == FileType::Directory => Ok(Existing::Folder),
        Ok(_) => Ok(Existing::Other),
        Err(Errno::NOENT) => Ok(Existing::Nothing),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_decides_what_is_asked() {
        use Decision::{Compare, Conflict, Resume, Want};
        use Existing::{File, Nothing, Other};
        let large = 3 * GROUP;
        let cases = [
            (large, Nothing, None, Want),
            (large, Nothing, Some(GROUP - 1), Want),
            (large, Nothing, Some(GROUP), Resume),
            // Longer than the file: what is of use is found out by comparison.
            (large, Nothing, Some(9 * GROUP), Resume),
            (GROUP, Nothing, Some(GROUP), Want),
            (large, File { size: large }, None, Compare),
            (large, File { size: large }, Some(GROUP), Compare),
            (large, File { size: large + 1 }, Some(GROUP), Conflict),
            (0, File { size: 0 }, None, Compare),
            (0, File { size: 1 }, None, Conflict),
            (large, Other, Some(GROUP), Conflict),
        ];
        for (size, existing, part, expected) in cases {
            assert_eq!(decide(size, existing, part), expected, "{size}, {existing:?}, {part:?}");
        }
    }
}
