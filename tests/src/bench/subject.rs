//! Programs under test.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, gettid};

/// A running program, ended when dropped.
pub struct Subject {
    child: Child,
    output: Option<BufReader<ChildStdout>>,
}

/// Where a program may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// On this core, never preempting the load.
    Yielding(usize),
    /// Anywhere, never preempting the load.
    YieldingAnywhere,
    /// On this core, before all other work of the machine if that is allowed (`SCHED_FIFO`).
    Urgent(usize),
    /// On this core, as the kernel schedules it.
    Core(usize),
    /// Anywhere.
    Anywhere,
}

impl Subject {
    /// Starts a program. Its standard input is a pipe, and so is its standard output.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn start(program: &Path, arguments: &[&str], place: Place) -> anyhow::Result<Self> {
        let mut command = match place {
            Place::Anywhere => Command::new(program),
            Place::Core(core) => on_core(core, program),
            Place::Urgent(core) => {
                let mut command = Command::new("chrt");
                command.args(["--fifo", "1", "taskset", "-c", &core.to_string()]).arg(program);
                command
            }
            Place::YieldingAnywhere => {
                let mut command = Command::new("chrt");
                command.args(["--batch", "0"]).arg(program);
                command
            }
            Place::Yielding(core) => {
                let mut command = Command::new("chrt");
                command.args(["--batch", "0", "taskset", "-c", &core.to_string()]).arg(program);
                command
            }
        };
        command.args(arguments).env("RUST_LOG", "warn");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child =
            command.spawn().with_context(|| format!("{} cannot be started", program.display()))?;
        let output = child.stdout.take().map(BufReader::new);
        Ok(Self { child, output })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Writes its standard input and closes it.
    ///
    /// # Errors
    ///
    /// When it does not read.
    pub fn tell(&mut self, text: &str) -> anyhow::Result<()> {
        let mut input = self.child.stdin.take().context("standard input is closed")?;
        Ok(std::io::Write::write_all(&mut input, text.as_bytes())?)
    }

    /// The next line of its standard output.
    ///
    /// # Errors
    ///
    /// When it ends instead.
    pub fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        let output = self.output.as_mut().context("standard output is not read")?;
        ensure!(output.read_line(&mut line)? > 0, "a program under test ended before it was ready");
        Ok(line.trim_end().to_owned())
    }

    /// Asks it to stop.
    ///
    /// # Errors
    ///
    /// When it is gone.
    pub fn terminate(&self) -> anyhow::Result<()> {
        Ok(kill(Pid::from_raw(i32::try_from(self.id())?), Signal::SIGTERM)?)
    }

    /// Reads no more of its standard output, and keeps it from blocking on it.
    pub fn drain(&mut self) {
        if let Some(mut output) = self.output.take() {
            std::thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
        }
    }

    /// CPU time of all its threads so far.
    ///
    /// # Errors
    ///
    /// When it is gone.
    pub fn cpu(&self) -> anyhow::Result<Duration> {
        Ok(self.threads()?.into_iter().map(|(_, cpu)| cpu).sum())
    }

    /// Its threads' names, and their CPU time so far, to the nanosecond (`schedstat`).
    ///
    /// # Errors
    ///
    /// When it is gone.
    pub fn threads(&self) -> anyhow::Result<Vec<(String, Duration)>> {
        Ok(self.tasks()?.into_iter().map(|(_, name, cpu)| (name, cpu)).collect())
    }

    /// CPU time of the thread of this name so far.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn thread(&self, name: &str) -> anyhow::Result<Duration> {
        let found = self.tasks()?.into_iter().find(|(_, other, _)| other == name);
        Ok(found.with_context(|| format!("no thread {name}"))?.2)
    }

    /// Keeps the thread of this name on this core.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn keep_thread_on(&self, name: &str, core: usize) -> anyhow::Result<()> {
        let found = self.tasks()?.into_iter().find(|(_, other, _)| other == name);
        let (thread, ..) = found.with_context(|| format!("no thread {name}"))?;
        let mut set = CpuSet::new();
        set.set(core)?;
        Ok(sched_setaffinity(Pid::from_raw(thread), &set)?)
    }

    /// Its threads' ids, names, and CPU time.
    fn tasks(&self) -> anyhow::Result<Vec<(i32, String, Duration)>> {
        let tasks = format!("/proc/{}/task", self.id());
        let mut threads = Vec::new();
        for task in std::fs::read_dir(&tasks).with_context(|| format!("{tasks} is gone"))? {
            let task = task?.path();
            // A thread may end meanwhile.
            let Ok(schedule) = std::fs::read_to_string(task.join("schedstat")) else { continue };
            let Ok(name) = std::fs::read_to_string(task.join("comm")) else { continue };
            let spent = schedule.split(' ').next().context("time on the CPU")?.parse()?;
            let id = task.file_name().and_then(|id| id.to_str()).context("a thread's id")?.parse()?;
            threads.push((id, name.trim_end().to_owned(), Duration::from_nanos(spent)));
        }
        Ok(threads)
    }

    /// Resident memory, in bytes.
    ///
    /// # Errors
    ///
    /// When it is gone.
    pub fn memory(&self) -> anyhow::Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
        let kilobytes: u64 = line.trim().trim_end_matches(" kB").parse()?;
        Ok(kilobytes * 1024)
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn on_core(core: usize, program: &Path) -> Command {
    let mut command = Command::new("taskset");
    command.args(["-c", &core.to_string()]).arg(program);
    command
}

/// Whether the calling thread now runs before all other work of the machine, as far as its cores go; or, `on` being false, no longer.
pub fn be_urgent(on: bool) -> bool {
    let thread = gettid().to_string();
    let (policy, priority) = if on { ("--fifo", "1") } else { ("--other", "0") };
    let mut command = Command::new("chrt");
    command.args([policy, "--pid", priority, &thread]).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// Keeps the calling thread on these cores.
///
/// # Errors
///
/// When the machine does not have them.
pub fn stay_on(cores: &[usize]) -> anyhow::Result<()> {
    let mut set = CpuSet::new();
    for core in cores {
        set.set(*core)?;
    }
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}
