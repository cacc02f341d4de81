//! The server's key on disk: made once, never overwritten.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rendezvous_wire::KeyPair;
use rendezvous_wire::identity::KeyError;
use tracing::warn;

/// Name of the key file in the state directory.
pub const FILE_NAME: &str = "server.key";

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyFileError {
    /// The file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file holds something else. It is left alone.
    #[error("{} holds no key that can be used ({source}); put the right file back, or move it away to get a new \
             key and with it a new address", path.display())]
    Parse {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        source: KeyError,
    },
    /// A new key could not be stored.
    #[error("cannot store a new key in {}: {source}; name a writable directory with --state-dir", path.display())]
    Write {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A new key could not be made.
    #[error(transparent)]
    Generate(KeyError),
}

/// Reads the key in `directory`; makes and stores one where there is none.
pub fn load_or_create(directory: &Path) -> Result<KeyPair, KeyFileError> {
    let path = directory.join(FILE_NAME);
    if let Some(key) = load(&path)? {
        return Ok(key);
    }
    let key = KeyPair::generate().map_err(KeyFileError::Generate)?;
    match store(directory, &path, &key) {
        Ok(()) => Ok(key),
        // Somebody else was quicker: theirs is the key.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            load(&path)?.ok_or(KeyFileError::Write { path, source: error })
        }
        Err(source) => Err(KeyFileError::Write { path, source }),
    }
}

pub(crate) fn load(path: &Path) -> Result<Option<KeyPair>, KeyFileError> {
    let pem = match fs::read_to_string(path) {
        Ok(pem) => pem,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(KeyFileError::Read { path: path.to_owned(), source }),
    };
    let key =
        KeyPair::from_pem(&pem).map_err(|source| KeyFileError::Parse { path: path.to_owned(), source })?;
    if fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o077 != 0) {
        warn!("{} can be read by other users; chmod 600 it", path.display());
    }
    Ok(Some(key))
}

/// Writes aside and links into place, which fails where a file already is.
fn store(directory: &Path, path: &Path, key: &KeyPair) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let aside = directory.join(format!(".{FILE_NAME}.{}", std::process::id()));
    let written = write_aside(&aside, key).and_then(|()| fs::hard_link(&aside, path));
    let _ = fs::remove_file(&aside);
    written?;
    File::open(directory)?.sync_all()
}

fn write_aside(aside: &Path, key: &KeyPair) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(aside)?;
    file.write_all(key.to_pem().as_bytes())?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_made_once_and_kept() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("deep/state");
        let first = load_or_create(&state).unwrap().id();
        assert_eq!(load_or_create(&state).unwrap().id(), first);
        let mode = fs::metadata(state.join(FILE_NAME)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(fs::read_dir(&state).unwrap().count(), 1, "nothing is left beside the key");
    }

    #[test]
    fn a_file_that_is_no_key_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(FILE_NAME);
        fs::write(&path, "precious").unwrap();
        assert!(matches!(load_or_create(directory.path()), Err(KeyFileError::Parse { .. })));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn storing_never_replaces_a_key() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(FILE_NAME);
        let first = load_or_create(directory.path()).unwrap();
        let error = store(directory.path(), &path, &KeyPair::generate().unwrap()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(load_or_create(directory.path()).unwrap().id(), first.id());
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();
        let error = load_or_create(&file.join("state")).unwrap_err();
        assert!(error.to_string().contains("state"), "{error}");
    }
}
