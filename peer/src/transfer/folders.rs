//! Folders by descriptor: every step down is one name, relative to an open folder, and never follows a link. So whatever names an
//! offer has and whatever happens to the disk meanwhile, nothing is opened outside of the folder where it began.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, Mode, OFlags, openat};

use super::manifest::Manifest;

/// Where the entries at the top are.
pub(crate) enum Top {
    /// All in this folder.
    Folder(Arc<OwnedFd>),
    /// Each where it says; nothing but the last step must be what it was.
    Paths(Arc<BTreeMap<u32, PathBuf>>),
}

/// The folders of a manifest, opened as they are needed.
pub(crate) struct Folders {
    manifest: Arc<Manifest>,
    top: Top,
    /// The folders above the entry that was asked for last, each in the one before.
    open: Vec<(u32, OwnedFd)>,
}

const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Opens a folder by path, links followed: the one that a person has named.
pub(crate) fn open_root(path: &Path) -> io::Result<OwnedFd> {
    Ok(openat(CWD, path, FOLDER.difference(OFlags::NOFOLLOW), Mode::empty())?)
}

impl Folders {
    pub(crate) fn new(manifest: Arc<Manifest>, top: Top) -> Self {
        Self { manifest, top, open: Vec::new() }
    }

    /// The folder that an entry is in, and its name in there. The name of an entry at the top may be a path.
    pub(crate) fn place(&mut self, entry: u32) -> io::Result<(BorrowedFd<'_>, PathBuf)> {
        let manifest = self.manifest.clone();
        let found = manifest.get(entry).ok_or(io::ErrorKind::NotFound)?;
        let name = Path::new(OsStr::from_bytes(&found.name)).to_owned();
        match found.parent {
            Some(parent) => {
                self.descend(parent)?;
                let (_, folder) = self.open.last().ok_or(io::ErrorKind::NotFound)?;
                Ok((folder.as_fd(), name))
            }
            None => match &self.top {
                Top::Folder(folder) => Ok((folder.as_fd(), name)),
                Top::Paths(paths) => Ok((CWD, paths.get(&entry).cloned().ok_or(io::ErrorKind::NotFound)?)),
            },
        }
    }

    /// The folder that this entry is.
    pub(crate) fn folder(&mut self, entry: u32) -> io::Result<BorrowedFd<'_>> {
        self.descend(entry)?;
        self.open.last().map(|(_, folder)| folder.as_fd()).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Opens `folder` and those above it that are not open, and closes all others.
    fn descend(&mut self, folder: u32) -> io::Result<()> {
        let mut missing = Vec::new();
        let mut next = Some(folder);
        let keep = loop {
            let Some(index) = next else { break 0 };
            if let Some(depth) = self.open.iter().position(|(open, _)| *open == index) {
                break depth + 1;
            }
            missing.push(index);
            next = self.manifest.get(index).ok_or(io::ErrorKind::NotFound)?.parent;
        };
        self.open.truncate(keep);
        for index in missing.into_iter().rev() {
            let manifest = self.manifest.clone();
            let name = &manifest.get(index).ok_or(io::ErrorKind::NotFound)?.name;
            let name = OsStr::from_bytes(name);
            let opened = match (self.open.last(), &self.top) {
                (Some((_, above)), _) => openat(above, name, FOLDER, Mode::empty())?,
                (None, Top::Folder(top)) => openat(top, name, FOLDER, Mode::empty())?,
                (None, Top::Paths(paths)) => {
                    let path = paths.get(&index).ok_or(io::ErrorKind::NotFound)?;
                    openat(CWD, path, FOLDER, Mode::empty())?
                }
            };
            self.open.push((index, opened));
        }
        Ok(())
    }

    /// Opens a file to read; never waits, whatever it has become.
    pub(crate) fn open_file(&mut self, entry: u32) -> io::Result<File> {
        let (folder, name) = self.place(entry)?;
        open_existing(folder, &name)
    }
}

/// Opens what should be a file, to read.
pub(crate) fn open_existing(folder: BorrowedFd<'_>, name: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    Ok(openat(folder, name, flags, Mode::empty())?.into())
}
