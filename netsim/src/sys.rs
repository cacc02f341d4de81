//! The few system calls that neither `std` nor `nix` wraps safely.
#![allow(unsafe_code)]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::prctl;
use nix::sys::signal::{SigHandler, Signal, signal};

/// Makes the program die when the thread that spawns it ends, and reap orphans without looking at them.
///
/// Both settings survive `execve` of an ordinary program.
pub(crate) fn prepare_init(command: &mut Command) {
    let prepare = || {
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        // SAFETY: `SIG_IGN` runs no code of ours.
        unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) }?;
        Ok::<(), io::Error>(())
    };
    // SAFETY: the closure only calls `prctl` and `signal`, both safe between fork and exec.
    unsafe { command.pre_exec(prepare) };
}
