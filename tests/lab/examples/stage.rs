//! Two homes that know each other, with what examples speak of in them.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use end_to_end::process::binary;
use end_to_end::world::World;
use netsim::{Host, RouterKind, SiteConfig};
use tempfile::TempDir;

use super::running::Running;

/// The stage of one example: `laptop` and `nas` trust each other by name, `fresh` is a machine beside the laptop that knows nobody.
pub(crate) struct Stage {
    pub(crate) world: World,
    pub(crate) laptop_host: Host,
    pub(crate) nas_host: Host,
    pub(crate) laptop_id: String,
    pub(crate) nas_id: String,
    laptop_folder: TempDir,
    nas_folder: TempDir,
}

/// The file that a line writes to.
pub(crate) fn output_file(line: &str) -> Option<&str> {
    line.split_once(" > ").map(|(_, file)| file.trim())
}

impl Stage {
    pub(crate) fn new(example: &str) -> anyhow::Result<Self> {
        let mut world = World::new(6)?;
        let site = || SiteConfig::new(RouterKind::EimApdf);
        // A short life of bindings is soon measured.
        let measured = example.contains("--lifetime");
        let config =
            if measured { site().binding_lifetime(std::time::Duration::from_secs(12)) } else { site() };
        let laptop_host = world.lab.add_site("a", config)?.host(0);
        let nas_host = world.lab.add_site("b", site())?.host(0);
        let address = world.address.clone();
        let laptop_id = world.done(&laptop_host, "laptop", &["init", &address])?;
        let nas_id = world.done(&nas_host, "nas", &["init", &address])?;
        world.done(&laptop_host, "laptop", &["trust", &nas_id, "--as", "nas"])?;
        world.done(&nas_host, "nas", &["trust", &laptop_id, "--as", "laptop"])?;
        let (laptop_folder, nas_folder) = (TempDir::new()?, TempDir::new()?);
        for folder in [&laptop_folder, &nas_folder] {
            std::fs::create_dir(folder.path().join("photos"))?;
            for file in ["photos/one.jpg", "report.pdf", "big.iso", "backup.tar"] {
                std::fs::write(folder.path().join(file), format!("this is {file}\n").repeat(1000))?;
            }
        }
        Ok(Self { world, laptop_host, nas_host, laptop_id, nas_id, laptop_folder, nas_folder })
    }

    /// With what an example cannot know: the server, the other side, a ticket of `nas`.
    fn line(&self, line: &str, other: &str) -> anyhow::Result<String> {
        let mut line = line.replace("rv://ID@vps.example", &format!("'{}'", self.world.address));
        line = line.replace("#TOKEN", &format!("#{}", "a".repeat(26)));
        if line.contains("TICKET") {
            let ticket = self.world.done(&self.nas_host, "nas", &["invite"])?;
            line = line.replace("TICKET", &ticket);
        }
        let words = line.split(' ').map(|word| if word == "PEER" { other } else { word });
        Ok(words.collect::<Vec<_>>().join(" "))
    }

    fn run(
        &self,
        host: &Host,
        name: &str,
        folder: &Path,
        line: &str,
        other: &str,
    ) -> anyhow::Result<Running> {
        let line = self.line(line, other)?;
        let programs = binary("peer")?;
        let programs = programs.parent().context("a folder of programs")?;
        let path = format!("{}:{}", programs.display(), std::env::var("PATH")?);
        let mut command = host.command("bash");
        // A signal is for the program, not for its shell.
        let exec = if line.starts_with("peer ") && !line.contains(" | ") { "exec " } else { "" };
        command.args(["--norc", "-o", "pipefail", "-c", &format!("{exec}{line}")]);
        command.current_dir(folder).envs(self.world.home(name)?).env("PATH", path);
        for variable in ["PEER_SERVER", "PEER_KEY", "RUST_LOG", "HTTPS_PROXY", "https_proxy"] {
            command.env_remove(variable);
        }
        Running::start(command, &line)
    }

    /// Starts a line on the laptop.
    pub(crate) fn laptop(&self, line: &str) -> anyhow::Result<Running> {
        self.run(&self.laptop_host, "laptop", self.laptop_folder.path(), line, &self.nas_id)
    }

    /// Starts a line on the machine that knows nobody.
    pub(crate) fn fresh(&self, line: &str) -> anyhow::Result<Running> {
        self.run(&self.laptop_host, "fresh", self.laptop_folder.path(), line, &self.nas_id)
    }

    /// Starts a line on the nas.
    pub(crate) fn nas(&self, line: &str) -> anyhow::Result<Running> {
        self.run(&self.nas_host, "nas", self.nas_folder.path(), line, &self.laptop_id)
    }

    /// The same, and waits until it says this.
    pub(crate) fn nas_waits(&self, line: &str, words: &str) -> anyhow::Result<Running> {
        let running = self.nas(line)?;
        running.says(words)?;
        Ok(running)
    }

    /// The same on the laptop.
    pub(crate) fn laptop_waits(&self, line: &str, words: &str) -> anyhow::Result<Running> {
        let running = self.laptop(line)?;
        running.says(words)?;
        Ok(running)
    }

    /// A file in the folder in which lines run on the laptop.
    pub(crate) fn at_laptop(&self, file: &str) -> anyhow::Result<String> {
        read(self.laptop_folder.path(), file)
    }

    /// The same on the nas.
    pub(crate) fn at_nas(&self, file: &str) -> anyhow::Result<String> {
        read(self.nas_folder.path(), file)
    }

    /// The path of a file there.
    pub(crate) fn nas_path(&self, file: &str) -> anyhow::Result<String> {
        let path: PathBuf = self.nas_folder.path().join(file);
        path.to_str().map(str::to_owned).context("a temporary path in UTF-8")
    }

    /// Adds to what the configuration of the nas serves.
    pub(crate) fn serve(&self, rule: &str) -> anyhow::Result<()> {
        let [(_, config), ..] = self.world.home("nas")?;
        let path = Path::new(&config).join("peer/config.toml");
        let text = std::fs::read_to_string(&path)?;
        ensure!(!text.contains("\n[[serve]]"), "it serves something already");
        Ok(std::fs::write(&path, format!("{text}\n[[serve]]\n{rule}\n"))?)
    }
}

fn read(folder: &Path, file: &str) -> anyhow::Result<String> {
    std::fs::read_to_string(folder.join(file)).with_context(|| file.to_owned())
}
