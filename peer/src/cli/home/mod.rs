//! What a person has set up: the configuration, the peers that are known, and what was seen of them last.

pub(in crate::cli) mod config;
pub(in crate::cli) mod last;
pub(in crate::cli) mod peers;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

/// Where it is kept, by the XDG base directory specification.
#[derive(Debug, Clone)]
pub(in crate::cli) struct Home {
    /// Written by people, and by `peer init`.
    pub(in crate::cli) config: PathBuf,
    /// Peers and invitations: written by commands.
    pub(in crate::cli) peers: PathBuf,
    /// The last paths: may be lost.
    pub(in crate::cli) last: PathBuf,
}

impl Home {
    /// The user's; `None` where there is no home directory.
    pub(in crate::cli) fn find() -> Option<Self> {
        let directories = directories::ProjectDirs::from("", "", "peer")?;
        let state = directories.state_dir().unwrap_or(directories.data_local_dir());
        Some(Self {
            config: directories.config_dir().join("config.toml"),
            peers: directories.data_dir().join("peers.toml"),
            last: state.join("paths.toml"),
        })
    }
}

/// A file's text; `None` where there is none.
fn read(path: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Holds off other processes that would change the same file, until it is dropped.
struct Lock(#[expect(dead_code, reason = "the lock lasts as long as the file is open")] File);

impl Lock {
    fn take(path: &Path) -> io::Result<Self> {
        let directory = directory_of(path);
        fs::create_dir_all(directory)?;
        // A file of its own: the one that it guards is replaced.
        let file =
            OpenOptions::new().write(true).create(true).truncate(false).open(path.with_extension("lock"))?;
        file.lock()?;
        Ok(Self(file))
    }
}

/// Replaces the file as a whole, for its owner's eyes; once this returns it survives a crash of the machine. At any moment there is the old
/// file or the new one.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let directory = directory_of(path);
    fs::create_dir_all(directory)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = directory.join(format!(".{name}-{}.tmp", std::process::id()));
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let written = options.open(&temporary).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    });
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written?;
    File::open(directory)?.sync_all()
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
