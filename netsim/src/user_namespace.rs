//! Becoming root of a user namespace, so that no real root is needed.

use std::fs;
use std::io;

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{getegid, geteuid};

/// `CAP_NET_ADMIN`, `CAP_NET_RAW` and `CAP_SYS_ADMIN`, as bits of `CapEff` in `/proc/self/status`.
const NEEDED_CAPABILITIES: u64 = 1 << 12 | 1 << 13 | 1 << 21;

/// Why [`enter_user_namespace`] failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnterError {
    /// The process already has several threads; the kernel moves only single-threaded processes.
    #[error("the process has more than one thread: call enter_user_namespace() first thing in main")]
    Threads,
    /// The kernel gives ordinary users no user namespaces.
    #[error(
        "the kernel refuses a user namespace ({errno}): run as root, or look at the sysctls \
         kernel.unprivileged_userns_clone (must be 1), user.max_user_namespaces (must not be 0) \
         and kernel.apparmor_restrict_unprivileged_userns (must be 0)"
    )]
    Refused {
        /// What `unshare` said.
        errno: Errno,
    },
    /// The user and group could not be mapped to root.
    #[error(
        "could not write {path}: the kernel may restrict user namespaces (kernel.apparmor_restrict_unprivileged_userns)"
    )]
    Map {
        /// The file that could not be written.
        path: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Gives an ordinary user the rights to build a lab; does nothing when the process has them already.
///
/// The process becomes root of a new user namespace, in which only the caller's own user and group exist. Its
/// files, its network and its view of the machine stay as they are: the rights reach only into namespaces that
/// it makes from now on. Nothing needs to be mounted.
///
/// Must be the first line of `main`, before any thread is started (so not inside an async runtime, nor under
/// the standard test harness).
///
/// ```no_run
/// fn main() -> Result<(), Box<dyn std::error::Error>> {
///     netsim::enter_user_namespace()?;
///     let lab = netsim::Lab::new(1)?;
///     # drop(lab);
///     Ok(())
/// }
/// ```
///
/// # Errors
///
/// When the process has several threads, or the system does not let ordinary users make user namespaces.
pub fn enter_user_namespace() -> Result<(), EnterError> {
    if has_capabilities() {
        return Ok(());
    }
    let (user, group) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER).map_err(|errno| match errno {
        Errno::EINVAL => EnterError::Threads,
        errno => EnterError::Refused { errno },
    })?;
    // An ordinary user may map groups only after giving up setgroups(2): user_namespaces(7).
    write("/proc/self/setgroups", "deny")?;
    write("/proc/self/uid_map", &format!("0 {user} 1"))?;
    write("/proc/self/gid_map", &format!("0 {group} 1"))
}

fn has_capabilities() -> bool {
    let effective = fs::read_to_string("/proc/self/status").ok().and_then(|status| {
        let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
        u64::from_str_radix(line.trim(), 16).ok()
    });
    effective.is_some_and(|effective| effective & NEEDED_CAPABILITIES == NEEDED_CAPABILITIES)
}

fn write(path: &'static str, contents: &str) -> Result<(), EnterError> {
    fs::write(path, contents).map_err(|source| EnterError::Map { path, source })
}
