//! Programs inside hosts, none of which outlives the lab.

use std::ffi::OsStr;
use std::io::{self, Read};
use std::panic::resume_unwind;
use std::path::Path;
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use nix::sched::{CloneFlags, unshare};

use crate::namespace::Namespace;
use crate::sys;

/// The thread that starts every program of a lab, in a process namespace of the lab's own.
///
/// The first process of that namespace is a sleeper that the kernel kills when this thread ends, however it
/// ends; and with the first process of a namespace the kernel kills all others, grandchildren too.
#[derive(Debug)]
pub(crate) struct Spawner {
    requests: Mutex<Option<Sender<Request>>>,
    init: Mutex<Child>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Request {
    command: Command,
    netns: Namespace,
    reply: Sender<(Command, io::Result<Child>)>,
}

impl Spawner {
    pub(crate) fn new() -> io::Result<Arc<Self>> {
        let (requests, receiver) = mpsc::channel();
        let (started, init) = mpsc::channel();
        let thread = thread::Builder::new().name("netsim-spawner".into()).spawn(move || {
            let init = start_init();
            let alive = init.is_ok();
            if started.send(init).is_ok() && alive {
                serve(&receiver);
            }
        })?;
        let init = init.recv().unwrap_or_else(|_| Err(gone()))?;
        Ok(Arc::new(Self {
            requests: Mutex::new(Some(requests)),
            init: Mutex::new(init),
            thread: Some(thread),
        }))
    }

    /// Kills every program, and refuses to start more.
    pub(crate) fn kill_all(&self) {
        lock(&self.requests).take();
        // Fails only when the sleeper has been waited for, and then all is over already.
        let _ = lock(&self.init).kill();
    }

    fn spawn(&self, command: &mut Command, netns: &Namespace) -> io::Result<Child> {
        let (reply, answer) = mpsc::channel();
        let netns = netns.clone();
        let request = Request { command: std::mem::replace(command, Command::new("")), netns, reply };
        lock(&self.requests).as_ref().ok_or_else(gone)?.send(request).map_err(|_| gone())?;
        let (used, child) = answer.recv().map_err(|_| gone())?;
        *command = used;
        child
    }
}

impl Drop for Spawner {
    fn drop(&mut self) {
        self.kill_all();
        if let Some(thread) = self.thread.take() {
            // It has nothing that could panic; and if it had, its end is all we want.
            let _ = thread.join();
        }
        // The first process can be reaped only after all others, which the handles (gone by now) have reaped.
        let _ = lock(&self.init).wait();
    }
}

fn start_init() -> io::Result<Child> {
    unshare(CloneFlags::CLONE_NEWPID)?;
    let mut sleeper = Command::new("sleep");
    sleeper.arg("infinity").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    sys::prepare_init(&mut sleeper);
    sleeper.spawn()
}

fn serve(requests: &Receiver<Request>) {
    for Request { mut command, netns, reply } in requests {
        let child = netns.enter().and_then(|()| command.spawn());
        // The asker is blocked on the answer.
        let _ = reply.send((command, child));
    }
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the lab has been dropped")
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // What they guard is replaced as a whole, so it is sound even after a panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A program to run in a [`Host`](crate::Host): [`std::process::Command`], except for where it runs and that
/// its [`HostChild`] is killed when dropped.
///
/// The program, and all that it starts, ends with the lab at the latest. It runs in a process namespace of the
/// lab: the process id it sees for itself is not [`HostChild::id`].
#[derive(Debug)]
pub struct HostCommand {
    command: Command,
    netns: Namespace,
    spawner: Arc<Spawner>,
}

impl HostCommand {
    pub(crate) fn new(program: &OsStr, netns: Namespace, spawner: Arc<Spawner>) -> Self {
        Self { command: Command::new(program), netns, spawner }
    }

    /// Adds an argument.
    pub fn arg(&mut self, arg: impl AsRef<OsStr>) -> &mut Self {
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    pub fn args(&mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> &mut Self {
        self.command.args(args);
        self
    }

    /// Sets an environment variable.
    pub fn env(&mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> &mut Self {
        self.command.env(key, value);
        self
    }

    /// Sets environment variables.
    pub fn envs(
        &mut self,
        variables: impl IntoIterator<Item = (impl AsRef<OsStr>, impl AsRef<OsStr>)>,
    ) -> &mut Self {
        self.command.envs(variables);
        self
    }

    /// Removes an inherited environment variable.
    pub fn env_remove(&mut self, key: impl AsRef<OsStr>) -> &mut Self {
        self.command.env_remove(key);
        self
    }

    /// Sets the working directory.
    pub fn current_dir(&mut self, directory: impl AsRef<Path>) -> &mut Self {
        self.command.current_dir(directory);
        self
    }

    /// Sets standard input.
    pub fn stdin(&mut self, stdin: impl Into<Stdio>) -> &mut Self {
        self.command.stdin(stdin);
        self
    }

    /// Sets standard output.
    pub fn stdout(&mut self, stdout: impl Into<Stdio>) -> &mut Self {
        self.command.stdout(stdout);
        self
    }

    /// Sets standard error.
    pub fn stderr(&mut self, stderr: impl Into<Stdio>) -> &mut Self {
        self.command.stderr(stderr);
        self
    }

    /// Starts the program.
    ///
    /// # Errors
    ///
    /// As [`std::process::Command::spawn`], and [`io::ErrorKind::BrokenPipe`] after the lab has been dropped.
    pub fn spawn(&mut self) -> io::Result<HostChild> {
        let mut child = self.spawner.spawn(&mut self.command, &self.netns)?;
        Ok(HostChild {
            stdin: child.stdin.take(),
            stdout: child.stdout.take(),
            stderr: child.stderr.take(),
            child,
            _spawner: Arc::clone(&self.spawner),
        })
    }

    /// Runs the program to its end and collects what it writes.
    ///
    /// # Errors
    ///
    /// As [`HostCommand::spawn`] and [`HostChild::wait_with_output`].
    pub fn output(&mut self) -> io::Result<Output> {
        self.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?.wait_with_output()
    }

    /// Runs the program to its end.
    ///
    /// # Errors
    ///
    /// As [`HostCommand::spawn`] and [`HostChild::wait`].
    pub fn status(&mut self) -> io::Result<ExitStatus> {
        self.spawn()?.wait()
    }
}

/// A program running in a host. Dropping it kills the program and waits for its end.
#[derive(Debug)]
pub struct HostChild {
    /// Its standard input, if it was piped and not taken.
    pub stdin: Option<ChildStdin>,
    /// Its standard output, if it was piped and not taken.
    pub stdout: Option<ChildStdout>,
    /// Its standard error, if it was piped and not taken.
    pub stderr: Option<ChildStderr>,
    child: Child,
    /// Keeps the process namespace until its last process has been reaped.
    _spawner: Arc<Spawner>,
}

impl HostChild {
    /// Its process id as the lab's process sees it.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Kills it.
    ///
    /// # Errors
    ///
    /// As [`std::process::Child::kill`].
    pub fn kill(&mut self) -> io::Result<()> {
        self.child.kill()
    }

    /// Closes its standard input and waits for its end.
    ///
    /// # Errors
    ///
    /// As [`std::process::Child::wait`].
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        self.stdin.take();
        self.child.wait()
    }

    /// Its exit status, if it has ended.
    ///
    /// # Errors
    ///
    /// As [`std::process::Child::try_wait`].
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// Waits for its end and collects what it writes to the pipes that are left.
    ///
    /// # Errors
    ///
    /// As [`std::process::Child::wait_with_output`].
    pub fn wait_with_output(mut self) -> io::Result<Output> {
        self.stdin.take();
        // Not `Child`'s own: on an error it would leave a process behind that nobody reaps.
        let (stdout, stderr) = (self.stdout.take(), self.stderr.take());
        let (stdout, stderr) = thread::scope(|scope| {
            let stderr = scope.spawn(|| read_to_end(stderr));
            let stdout = read_to_end(stdout);
            (stdout, stderr.join().unwrap_or_else(|panic| resume_unwind(panic)))
        });
        Ok(Output { stdout: stdout?, stderr: stderr?, status: self.wait()? })
    }
}

fn read_to_end(pipe: Option<impl Read>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    pipe.map_or(Ok(0), |mut pipe| pipe.read_to_end(&mut bytes))?;
    Ok(bytes)
}

impl Drop for HostChild {
    fn drop(&mut self) {
        // Both fail only when it has ended and been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
