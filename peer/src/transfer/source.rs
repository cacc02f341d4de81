//! What is to be sent: a walk through the given paths.

use std::collections::BTreeMap;
use std::fs::{Metadata, read_dir};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::manifest::{Entry, Kind, Manifest, ManifestBuilder, ManifestError, Modified, PART_SUFFIX, shown};

/// Files and folders to send.
#[derive(Debug, Clone)]
pub struct Source {
    pub(crate) manifest: Arc<Manifest>,
    pub(crate) paths: Arc<BTreeMap<u32, PathBuf>>,
    left_out: Vec<LeftOut>,
}

/// Something that is not sent.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct LeftOut {
    /// Its path, to be shown.
    pub path: String,
    /// Why.
    pub reason: LeftOutReason,
}

/// Why something is not sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LeftOutReason {
    /// A link to somewhere else.
    #[error("a link that leads out of the folder that is sent")]
    Link,
    /// Neither file, folder nor link.
    #[error("neither a file nor a folder nor a link")]
    Special,
    /// An unfinished transfer's.
    #[error("an unfinished file of another transfer")]
    Part,
    /// The folder cannot be listed.
    #[error("it cannot be read: {0}")]
    Unreadable(String),
}

/// Why nothing can be sent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// A path that was named cannot be read.
    #[error("{}: {source}", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A path without a name, such as `/`.
    #[error("{} has no name to send it under", .0.display())]
    Nameless(PathBuf),
    /// Something that can be named but not sent.
    #[error("{}: {reason}", path.display())]
    Unsendable {
        /// The path.
        path: PathBuf,
        /// Why.
        reason: LeftOutReason,
    },
    /// The offer would break the rules.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
}

fn modified(metadata: &Metadata) -> Modified {
    Modified {
        seconds: metadata.mtime(),
        nanoseconds: u32::try_from(metadata.mtime_nsec()).unwrap_or_default(),
    }
}

struct Walk {
    builder: ManifestBuilder,
    left_out: Vec<LeftOut>,
}

impl Source {
    /// Lists `paths` and all that is in them. A path that is a link stands for what it leads to; links in folders stay links. What
    /// cannot be sent is told in [`left_out`](Self::left_out). Blocks on the disk.
    ///
    /// # Errors
    ///
    /// When one of `paths` cannot be sent, two have the same name, or it is more than one offer holds.
    pub fn collect(paths: &[PathBuf]) -> Result<Self, SourceError> {
        let mut walk = Walk { builder: ManifestBuilder::default(), left_out: Vec::new() };
        let mut tops = BTreeMap::new();
        for path in paths {
            let failed = |source| SourceError::Path { path: path.clone(), source };
            let real = path.canonicalize().map_err(failed)?;
            let metadata = real.symlink_metadata().map_err(failed)?;
            // What a person calls it: a link's name rather than its target's.
            let name = path.file_name().or_else(|| real.file_name());
            let name = name.ok_or_else(|| SourceError::Nameless(path.clone()))?;
            let unsendable = |reason| SourceError::Unsendable { path: path.clone(), reason };
            if name.as_bytes().ends_with(PART_SUFFIX) {
                return Err(unsendable(LeftOutReason::Part));
            }
            tops.insert(walk.builder.len() as u32, real.clone());
            if !walk.add(None, name.as_bytes(), &real, &metadata)? {
                return Err(unsendable(LeftOutReason::Special));
            }
        }
        Ok(Self { manifest: Arc::new(walk.builder.finish()), paths: Arc::new(tops), left_out: walk.left_out })
    }

    /// What there is to send.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// What is not sent, and why.
    pub fn left_out(&self) -> &[LeftOut] {
        &self.left_out
    }
}

impl Walk {
    /// Adds what is at `path`, and all that is in it. False: it cannot be sent.
    fn add(
        &mut self,
        parent: Option<u32>,
        name: &[u8],
        path: &Path,
        metadata: &Metadata,
    ) -> Result<bool, ManifestError> {
        let entry = |kind| Entry { parent, name: name.to_vec(), kind };
        let (kind, mode, modified) = (metadata.file_type(), metadata.mode() & 0o777, modified(metadata));
        if kind.is_dir() {
            let folder = self.builder.add(entry(Kind::Folder { mode, modified }))?;
            self.list(folder, path)?;
        } else if kind.is_file() {
            self.builder.add(entry(Kind::File { size: metadata.len(), mode, modified }))?;
        } else if kind.is_symlink() {
            return self.add_link(parent, name, path);
        } else {
            self.leave_out(path, LeftOutReason::Special);
            return Ok(false);
        }
        Ok(true)
    }

    fn add_link(&mut self, parent: Option<u32>, name: &[u8], path: &Path) -> Result<bool, ManifestError> {
        let target = match std::fs::read_link(path) {
            Ok(target) => target.as_os_str().as_bytes().to_vec(),
            Err(error) => {
                self.leave_out(path, LeftOutReason::Unreadable(error.to_string()));
                return Ok(false);
            }
        };
        match self.builder.add(Entry { parent, name: name.to_vec(), kind: Kind::Link { target } }) {
            Ok(_) => Ok(true),
            Err(ManifestError::Link(_)) => {
                self.leave_out(path, LeftOutReason::Link);
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Everything in a folder, by name, so that two walks give the same order.
    fn list(&mut self, folder: u32, path: &Path) -> Result<(), ManifestError> {
        let listed = read_dir(path).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        let mut entries = match listed {
            Ok(entries) => entries,
            Err(error) => {
                self.leave_out(path, LeftOutReason::Unreadable(error.to_string()));
                return Ok(());
            }
        };
        entries.sort_unstable_by_key(std::fs::DirEntry::file_name);
        for entry in entries {
            let (path, name) = (entry.path(), entry.file_name());
            if name.as_bytes().ends_with(PART_SUFFIX) {
                self.leave_out(&path, LeftOutReason::Part);
                continue;
            }
            match entry.metadata() {
                Ok(metadata) => {
                    self.add(Some(folder), name.as_bytes(), &path, &metadata)?;
                }
                // Gone since it was listed.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => self.leave_out(&path, LeftOutReason::Unreadable(error.to_string())),
            }
        }
        Ok(())
    }

    fn leave_out(&mut self, path: &Path, reason: LeftOutReason) {
        self.left_out.push(LeftOut { path: shown(path.as_os_str().as_bytes()), reason });
    }
}
