//! Where the daemon listens, and who may speak to it: nobody but the user whose it is.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::net::{UnixListener, UnixStream};

use super::DaemonError;

/// Where the daemon listens unless told otherwise: `peer/control.sock` in the user's runtime directory, else in the state directory. `None` where
/// there is no home directory.
pub fn default_place() -> Option<PathBuf> {
    let directories = directories::ProjectDirs::from("", "", "peer")?;
    let directory = directories.runtime_dir().or(directories.state_dir());
    Some(directory.unwrap_or(directories.data_local_dir()).join("control.sock"))
}

/// A socket that is listened at. It is removed when this is dropped; whatever a daemon that was killed has left is replaced by the next.
#[derive(Debug)]
pub(super) struct Listening {
    pub(super) listener: UnixListener,
    path: PathBuf,
    inode: u64,
    /// Held for as long as the daemon lives, whatever its end.
    _locks: [File; 2],
}

impl Drop for Listening {
    fn drop(&mut self) {
        // Another's is left alone.
        if fs::symlink_metadata(&self.path).is_ok_and(|metadata| metadata.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The user that this process acts for.
fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

impl Listening {
    /// Listens at `path` for the identity whose key file is `key`. Must be called inside a tokio runtime.
    pub(super) fn begin(path: &Path, key: &Path) -> Result<Self, DaemonError> {
        let io = |source| DaemonError::Io { path: path.to_owned(), source: Arc::new(source) };
        let directory =
            path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(io)?;
        check_directory(directory)?;
        let lock = |path: &Path, error: DaemonError| {
            let mut options = OpenOptions::new();
            // The key's lock is its own file, which may be for reading only.
            let file = if path == key { options.read(true) } else { options.write(true).create(true) };
            let file = file
                .open(path)
                .map_err(|source| DaemonError::Io { path: path.to_owned(), source: Arc::new(source) })?;
            match file.try_lock() {
                Ok(()) => Ok(file),
                Err(TryLockError::WouldBlock) => Err(error),
                Err(TryLockError::Error(source)) => {
                    Err(DaemonError::Io { path: path.to_owned(), source: Arc::new(source) })
                }
            }
        };
        let of_key = lock(key, DaemonError::IdentityTaken { key: key.to_owned() })?;
        let of_path = lock(&path.with_extension("lock"), DaemonError::PlaceTaken { path: path.to_owned() })?;
        match fs::symlink_metadata(path) {
            Ok(metadata) if metadata.file_type().is_socket() => fs::remove_file(path).map_err(io)?,
            Ok(_) => return Err(DaemonError::NoSocket { path: path.to_owned() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io(error)),
        }
        let listener = UnixListener::bind(path).map_err(io)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(io)?;
        let inode = fs::symlink_metadata(path).map_err(io)?.ino();
        Ok(Self { listener, path: path.to_owned(), inode, _locks: [of_key, of_path] })
    }
}

/// It must be ours alone: a socket's own mode does not count everywhere (unix(7)).
fn check_directory(directory: &Path) -> Result<(), DaemonError> {
    let metadata = fs::metadata(directory)
        .map_err(|source| DaemonError::Io { path: directory.to_owned(), source: Arc::new(source) })?;
    let (path, mode) = (directory.to_owned(), metadata.mode() & 0o777);
    if metadata.uid() != own_uid() {
        return Err(DaemonError::ForeignDirectory { path });
    }
    if mode & 0o077 != 0 { Err(DaemonError::OpenDirectory { path, mode }) } else { Ok(()) }
}

/// Whether whoever has connected is the user whose daemon this is.
pub(super) fn is_own(socket: &UnixStream) -> bool {
    socket.peer_cred().is_ok_and(|credentials| credentials.uid() == own_uid())
}

/// Connects to the daemon that listens at `path`.
pub(super) async fn connect(path: &Path) -> Result<UnixStream, DaemonError> {
    use io::ErrorKind::{ConnectionRefused, NotFound, PermissionDenied};
    let path = path.to_owned();
    match UnixStream::connect(&path).await {
        // Somebody else who listens there would hear whom we want to reach.
        Ok(socket) if is_own(&socket) => Ok(socket),
        Ok(_) => Err(DaemonError::Foreign { path }),
        Err(error) if matches!(error.kind(), NotFound | ConnectionRefused) => {
            Err(DaemonError::NotRunning { path })
        }
        Err(error) if error.kind() == PermissionDenied => Err(DaemonError::Foreign { path }),
        Err(source) => Err(DaemonError::Io { path, source: Arc::new(source) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let (key, path) = (directory.path().join("key.pem"), directory.path().join("run/control.sock"));
        fs::write(&key, "a key").unwrap();
        (directory, path, key)
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o777
    }

    #[tokio::test]
    async fn the_socket_is_for_its_owner_alone_and_goes_with_its_daemon() {
        let (_directory, path, key) = place();
        let listening = Listening::begin(&path, &key).unwrap();
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        let (socket, accepted) = tokio::join!(connect(&path), listening.listener.accept());
        assert!(socket.is_ok() && is_own(&accepted.unwrap().0));
        drop(listening);
        assert!(!path.exists());
        assert!(matches!(connect(&path).await, Err(DaemonError::NotRunning { .. })));
    }

    #[tokio::test]
    async fn what_a_killed_daemon_has_left_is_replaced() {
        let (_directory, path, key) = place();
        let listening = Listening::begin(&path, &key).unwrap();
        // As a kill does: the file stays, and nobody listens.
        let stale = path.with_extension("stale");
        fs::rename(&path, &stale).unwrap();
        drop(listening);
        fs::rename(&stale, &path).unwrap();
        assert!(matches!(connect(&path).await, Err(DaemonError::NotRunning { .. })));
        let listening = Listening::begin(&path, &key).unwrap();
        assert!(connect(&path).await.is_ok());
        drop(listening);
    }

    #[tokio::test]
    async fn a_second_daemon_is_refused_for_the_place_and_for_the_identity() {
        let (directory, path, key) = place();
        let _listening = Listening::begin(&path, &key).unwrap();
        let other_path = directory.path().join("elsewhere/control.sock");
        let same_identity = Listening::begin(&other_path, &key);
        assert!(matches!(same_identity, Err(DaemonError::IdentityTaken { .. })));
        let other_key = directory.path().join("other.pem");
        fs::write(&other_key, "another").unwrap();
        assert!(matches!(Listening::begin(&path, &other_key), Err(DaemonError::PlaceTaken { .. })));
        assert!(connect(&path).await.is_ok(), "the first one goes on");
    }

    #[tokio::test]
    async fn what_others_could_reach_is_refused() {
        let (directory, path, key) = place();
        let open = directory.path().join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o755)).unwrap();
        let refused = Listening::begin(&open.join("control.sock"), &key).unwrap_err().to_string();
        assert!(refused.contains("0755") && refused.contains("chmod 700"), "{refused}");
        DirBuilder::new().mode(0o700).create(path.parent().unwrap()).unwrap();
        fs::write(&path, "precious").unwrap();
        assert!(matches!(Listening::begin(&path, &key), Err(DaemonError::NoSocket { .. })));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }
}
