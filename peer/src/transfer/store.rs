//! The receiver's disk: parts, whole files, links, dates.
//!
//! A file grows in its *part* beside it and gets its name when its content is verified. Nothing else is kept for going on later:
//! what a part has is found out from its content, group by group, and compared with the sender's.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, FallocateFlags, FlockOperation, Mode, OFlags, RenameFlags, Timespec, Timestamps, fallocate,
    fchmod, flock, futimens, linkat, openat, renameat, renameat_with, unlinkat,
};
use rustix::io::Errno;

use super::arrival::Sink;
use super::manifest::{Modified, PART_SUFFIX};
use super::message::ReceiverProblem;

/// The longest name that file systems take.
const MAX_NAME: usize = 255;

/// What the disk refused.
#[derive(Debug, thiserror::Error)]
#[error("{}", describe(path, source))]
pub struct StoreError {
    /// Where, to be shown.
    pub path: String,
    /// What the system said.
    pub source: io::Error,
}

fn describe(path: &str, error: &io::Error) -> String {
    match Errno::from_io_error(error) {
        Some(Errno::NOSPC | Errno::DQUOT) => {
            format!(
                "the disk is full, at {path}; what has arrived is kept: make room, and let it be sent again"
            )
        }
        Some(Errno::ACCESS | Errno::PERM | Errno::ROFS) => {
            format!("{path} may not be written ({error}): change its permissions, or choose another folder")
        }
        Some(Errno::WOULDBLOCK) => format!("{path} is being received by another process"),
        Some(Errno::NOTDIR | Errno::LOOP) => {
            format!("{path} is there and is no folder: move it away, or choose another folder")
        }
        _ => format!("{path} cannot be written: {error}"),
    }
}

impl StoreError {
    pub(crate) fn at(path: String, source: io::Error) -> Self {
        Self { path, source }
    }

    /// What the other side is told.
    pub(crate) fn problem(&self) -> ReceiverProblem {
        match Errno::from_io_error(&self.source) {
            Some(Errno::NOSPC | Errno::DQUOT) => ReceiverProblem::DiskFull,
            Some(Errno::ACCESS | Errno::PERM | Errno::ROFS) => ReceiverProblem::Denied,
            _ => ReceiverProblem::Disk,
        }
    }
}

/// The name of a file's part.
pub(crate) fn part_name(name: &Path) -> PathBuf {
    let mut bytes = name.as_os_str().as_bytes().to_vec();
    if bytes.len() + PART_SUFFIX.len() > MAX_NAME {
        // Long names are told apart by a hash.
        let hash = blake3::hash(&bytes).to_hex();
        bytes.truncate(MAX_NAME - PART_SUFFIX.len() - 17);
        bytes.push(b'.');
        bytes.extend_from_slice(&hash.as_bytes()[..16]);
    }
    bytes.extend_from_slice(PART_SUFFIX);
    PathBuf::from(OsString::from_vec(bytes))
}

/// An open part.
pub(crate) struct Part {
    file: File,
    /// Whether there may be something in it that does not belong there.
    used: bool,
    /// Where the content that was written ends.
    end: u64,
}

impl Part {
    /// Opens the part of `name`, or makes it; nothing else can be writing it.
    pub(crate) fn open(folder: BorrowedFd<'_>, name: &Path) -> io::Result<Self> {
        let name = part_name(name);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let open = |more| openat(folder, &name, flags | more, Mode::RUSR | Mode::WUSR).map(File::from);
        let file = match open(OFlags::EXCL) {
            Ok(file) => {
                flock(&file, FlockOperation::NonBlockingLockExclusive)?;
                return Ok(Self { file, used: false, end: 0 });
            }
            Err(Errno::EXIST) => open(OFlags::empty())?,
            Err(error) => return Err(error.into()),
        };
        let metadata = file.metadata()?;
        if !metadata.is_file() || metadata.nlink() != 1 {
            // Not of our making, or something else as well: what it is linked to must not be written.
            unlinkat(folder, &name, AtFlags::empty())?;
            return Self::open_new(open(OFlags::EXCL)?);
        }
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Self { used: metadata.len() > 0, end: 0, file })
    }

    fn open_new(file: File) -> io::Result<Self> {
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Self { file, used: false, end: 0 })
    }

    /// Forgets everything that was in it.
    pub(crate) fn clear(&mut self) -> io::Result<()> {
        if self.used || self.end > 0 {
            self.file.set_len(0)?;
        }
        (self.used, self.end) = (false, 0);
        Ok(())
    }

    /// Gives it its size, permissions and date, and then its name. With `replace`, in place of a file that has the name.
    pub(crate) fn finish(
        self,
        folder: BorrowedFd<'_>,
        name: &Path,
        size: u64,
        (mode, modified): (u32, Modified),
        replace: bool,
    ) -> io::Result<()> {
        if self.used || self.end != size {
            self.file.set_len(size)?;
        }
        fchmod(&self.file, Mode::from_raw_mode(mode & 0o777))?;
        futimens(&self.file, &timestamps(modified))?;
        let part = part_name(name);
        if replace {
            return Ok(renameat(folder, &part, folder, name)?);
        }
        match renameat_with(folder, &part, folder, name, RenameFlags::NOREPLACE) {
            Ok(()) => Ok(()),
            // A file system that cannot; a second name cannot be given to what exists either.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                linkat(folder, &part, folder, name, AtFlags::empty())?;
                Ok(unlinkat(folder, &part, AtFlags::empty())?)
            }
            Err(error) => Err(error.into()),
        }
    }
}

impl Sink for Part {
    type Error = io::Error;

    fn write(&mut self, offset: u64, content: &[u8]) -> io::Result<()> {
        self.file.write_all_at(content, offset)?;
        self.end = self.end.max(offset + content.len() as u64);
        Ok(())
    }

    fn hole(&mut self, offset: u64, length: u64) -> io::Result<()> {
        if !self.used || length == 0 {
            return Ok(());
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, flags, offset, length) {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                let zeros = [0; 64 << 10];
                let mut at = offset;
                while at < offset + length {
                    let count = (offset + length - at).min(zeros.len() as u64);
                    self.file.write_all_at(&zeros[..count as usize], at)?;
                    at += count;
                }
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }
}

pub(crate) fn timestamps(modified: Modified) -> Timestamps {
    let last_modification =
        Timespec { tv_sec: modified.seconds, tv_nsec: i64::from(modified.nanoseconds) as _ };
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT as _ },
        last_modification,
    }
}

/// Waits until everything is on disk.
pub(crate) fn sync(folder: &OwnedFd) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    rustix::fs::syncfs(folder.as_fd())?;
    #[cfg(not(target_os = "linux"))]
    {
        let _ = folder;
        rustix::fs::sync();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_long_names_have_names() {
        let long = |last: u8| {
            let mut name = vec![b'x'; 254];
            name.push(last);
            part_name(Path::new(&OsString::from_vec(name)))
        };
        assert_eq!(long(b'a').as_os_str().len(), 255);
        assert_ne!(long(b'a'), long(b'b'));
        assert_eq!(part_name(Path::new("a.txt")), Path::new("a.txt.peer-part"));
        assert!(long(b'a').as_os_str().as_bytes().ends_with(PART_SUFFIX));
    }

    #[test]
    fn a_part_is_never_written_through_a_link() {
        let directory = tempfile::tempdir().unwrap();
        let victim = directory.path().join("victim");
        std::fs::write(&victim, "mine").unwrap();
        let inside = directory.path().join("inside");
        std::fs::create_dir(&inside).unwrap();
        let folder = super::super::folders::open_root(&inside).unwrap();
        // A symbolic link is refused, a hard link gives way.
        std::os::unix::fs::symlink(&victim, inside.join("a.peer-part")).unwrap();
        assert!(Part::open(folder.as_fd(), Path::new("a")).is_err());
        std::fs::hard_link(&victim, inside.join("b.peer-part")).unwrap();
        let mut part = Part::open(folder.as_fd(), Path::new("b")).unwrap();
        part.write(0, b"theirs").unwrap();
        assert_eq!(std::fs::read(&victim).unwrap(), b"mine");
    }

    #[test]
    fn one_part_has_one_writer() {
        let directory = tempfile::tempdir().unwrap();
        let folder = super::super::folders::open_root(directory.path()).unwrap();
        let first = Part::open(folder.as_fd(), Path::new("a")).unwrap();
        let second = Part::open(folder.as_fd(), Path::new("a")).err().unwrap();
        assert_eq!(Errno::from_io_error(&second), Some(Errno::WOULDBLOCK));
        drop(first);
        assert!(Part::open(folder.as_fd(), Path::new("a")).is_ok());
    }

    #[test]
    fn a_name_that_has_come_meanwhile_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let folder = super::super::folders::open_root(directory.path()).unwrap();
        let modified = Modified { seconds: 5, nanoseconds: 6 };
        let open = || {
            let mut part = Part::open(folder.as_fd(), Path::new("a")).unwrap();
            part.write(0, b"theirs").unwrap();
            part
        };
        let part = open();
        std::fs::write(directory.path().join("a"), "mine").unwrap();
        let finished = part.finish(folder.as_fd(), Path::new("a"), 6, (0o4755, modified), false);
        assert_eq!(finished.unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(directory.path().join("a")).unwrap(), b"mine");
        open().finish(folder.as_fd(), Path::new("a"), 6, (0o4755, modified), true).unwrap();
        let metadata = std::fs::metadata(directory.path().join("a")).unwrap();
        assert_eq!(std::fs::read(directory.path().join("a")).unwrap(), b"theirs");
        // What would give it its owner's rights is not kept.
        assert_eq!((metadata.mode() & 0o7777, metadata.mtime(), metadata.mtime_nsec()), (0o755, 5, 6));
    }
}
