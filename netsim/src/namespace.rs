//! Network namespaces that exist only as file descriptors.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::panic::resume_unwind;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::ifaddrs::getifaddrs;
use nix::net::if_::{InterfaceFlags, if_nameindex};
use nix::sched::{CloneFlags, setns, unshare};

use crate::sys;

/// A network namespace without a name: the kernel removes it, and everything in it, once the last descriptor,
/// thread and process that refers to it is gone.
#[derive(Clone, Debug)]
pub(crate) struct Namespace(Arc<File>);

impl Namespace {
    /// Makes a namespace and writes `sysctls` (paths below `/proc/sys/net`) in it.
    ///
    /// Defaults for interfaces must be written before there is any interface. What the kernel lacks needs no
    /// setting.
    pub(crate) fn new(sysctls: &[(&str, &str)]) -> io::Result<Self> {
        // `unshare` and the sysctl tree are per thread, so the caller stays where it is.
        join(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            for (key, value) in sysctls {
                match write_sysctl(key, value) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    result => result?,
                }
            }
            Ok(Self(Arc::new(File::open("/proc/thread-self/ns/net")?)))
        })
    }

    /// Moves the calling thread into the namespace, for good.
    pub(crate) fn enter(&self) -> io::Result<()> {
        Ok(setns(&*self.0, CloneFlags::CLONE_NEWNET)?)
    }

    /// Runs `f` on a fresh thread inside the namespace. A panic of `f` goes on in the caller.
    pub(crate) fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> io::Result<T> {
        join(|| {
            self.enter()?;
            Ok(f())
        })
    }

    /// Waits until every interface that is up can send.
    ///
    /// The end of a cable that comes up first gets its queue only when a kernel worker has noticed that the other
    /// end came up, too. On a busy machine that takes a while, and until then packets vanish.
    pub(crate) fn wait_for_carrier(&self) -> io::Result<()> {
        self.run(|| {
            let deadline = Instant::now() + CARRIER_PATIENCE;
            loop {
                let ready = every_interface_runs()?;
                // The worker marks an interface as running before it is done with it.
                let settled = settle_every_carrier();
                if ready {
                    return settled;
                }
                if Instant::now() > deadline {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "an interface got no carrier"));
                }
                thread::sleep(Duration::from_millis(1));
            }
        })?
    }

    /// A path by which another program of the same user can name the namespace while this process lives.
    pub(crate) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Writes one sysctl of the calling thread's network namespace.
pub(crate) fn write_sysctl(key: &str, value: &str) -> io::Result<()> {
    let path = format!("/proc/sys/net/{key}");
    fs::write(&path, value).map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))
}

/// The kernel's worker needs a moment of processor time, nothing else.
const CARRIER_PATIENCE: Duration = Duration::from_secs(10);

fn every_interface_runs() -> io::Result<bool> {
    Ok(getifaddrs()?
        .map(|interface| interface.flags)
        .filter(|flags| flags.contains(InterfaceFlags::IFF_UP))
        .all(|flags| flags.contains(InterfaceFlags::IFF_RUNNING)))
}

fn settle_every_carrier() -> io::Result<()> {
    if_nameindex()?.iter().try_for_each(|interface| sys::settle_carrier(&interface.name().to_string_lossy()))
}

fn join<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| scope.spawn(f).join()).unwrap_or_else(|panic| resume_unwind(panic))
}
