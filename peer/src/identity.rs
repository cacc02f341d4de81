//! The key file: made on first use, kept, never overwritten.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use rendezvous_wire::KeyPair;
use rendezvous_wire::identity::KeyError;

/// Why the key file could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// It could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file or its folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Its content is no key.
    #[error(
        "{path} holds no usable key: {source}. Restore it from a backup, or move it away to get a new identity"
    )]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: KeyError,
    },
    /// A new key could not be made.
    #[error(transparent)]
    Generate(KeyError),
    /// There is no home directory to keep it in.
    #[error("there is no home directory to keep a key in; name a file with --key")]
    NoHome,
}

/// Where the key is kept unless another place is named: `peer/key.pem` in the user's data directory.
pub fn default_path() -> Result<PathBuf, IdentityError> {
    let directories = directories::ProjectDirs::from("", "", "peer").ok_or(IdentityError::NoHome)?;
    Ok(directories.data_dir().join("key.pem"))
}

/// Reads the key, or makes one and keeps it, readable by its owner alone.
pub fn load_or_create(path: &Path) -> Result<KeyPair, IdentityError> {
    let failed = |source| IdentityError::Io { path: path.to_owned(), source };
    match fs::read_to_string(path) {
        Ok(pem) => {
            KeyPair::from_pem(&pem).map_err(|source| IdentityError::Content { path: path.to_owned(), source })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let key = KeyPair::generate().map_err(IdentityError::Generate)?;
            if store(path, &key.to_pem()).map_err(failed)? {
                Ok(key)
            } else {
                // Another process was first; its key counts.
                load_or_create(path)
            }
        }
        Err(error) => Err(failed(error)),
    }
}

/// Writes a new file whole or not at all. False when there is one already.
fn store(path: &Path, pem: &str) -> io::Result<bool> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(directory)?;
    let temporary = directory.join(format!(".key-{}.tmp", std::process::id()));
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(&temporary)?;
    file.write_all(pem.as_bytes())?;
    file.sync_all()?;
    // A link, unlike a rename, does not replace.
    let linked = fs::hard_link(&temporary, path);
    fs::remove_file(&temporary)?;
    match linked {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_made_once_and_kept_private() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep/key.pem");
        let id = load_or_create(&path).unwrap().id();
        assert_eq!(load_or_create(&path).unwrap().id(), id);
        let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&path).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing temporary stays");
    }

    #[test]
    fn a_damaged_key_is_an_error_and_stays_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key.pem");
        fs::write(&path, "damaged").unwrap();
        assert!(matches!(load_or_create(&path), Err(IdentityError::Content { .. })));
        assert_eq!(fs::read_to_string(&path).unwrap(), "damaged");
    }
}
