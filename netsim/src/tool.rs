//! Runs `ip`, `iptables-restore` and `nft` inside a namespace, one batch per call.

use std::io::{self, Write};
use std::process::{Command, Stdio};

use crate::namespace::Namespace;

/// One of the system's tools could not do its part.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ToolError {
    /// The program is not installed.
    #[error("`{tool}` was not found: install the Debian package `{package}`, and have /usr/sbin in PATH")]
    Missing {
        /// The program.
        tool: &'static str,
        /// The Debian package that holds it.
        package: &'static str,
    },
    /// The program could not be started, or not be spoken to.
    #[error("could not run `{command}`")]
    Run {
        /// The program with its arguments.
        command: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The program ran and reported a failure.
    #[error("`{command}` failed: {stderr}\nits input was:\n{input}")]
    Failed {
        /// The program with its arguments.
        command: String,
        /// What it wrote to standard error.
        stderr: String,
        /// The batch it was given.
        input: String,
    },
}

struct Tool {
    program: &'static str,
    arguments: &'static [&'static str],
    package: &'static str,
}

const IP: Tool = Tool { program: "ip", arguments: &["-batch", "-"], package: "iproute2" };
const IPTABLES: Tool = Tool { program: "iptables-restore", arguments: &["-w"], package: "iptables" };
const IP6TABLES: Tool = Tool { program: "ip6tables-restore", arguments: &["-w"], package: "iptables" };
const NFT: Tool = Tool { program: "nft", arguments: &["-f", "-"], package: "nftables" };

/// Runs lines of `ip` in `namespace`.
pub(crate) fn ip(namespace: &Namespace, batch: &str) -> Result<(), ToolError> {
    IP.run(namespace, batch)
}

/// Replaces IPv4 tables of `namespace`.
pub(crate) fn iptables(namespace: &Namespace, rules: &str) -> Result<(), ToolError> {
    IPTABLES.run(namespace, rules)
}

/// Replaces IPv6 tables of `namespace`.
pub(crate) fn ip6tables(namespace: &Namespace, rules: &str) -> Result<(), ToolError> {
    IP6TABLES.run(namespace, rules)
}

/// What `nft list` says of an object of `namespace`, such as `chain inet filter forward`.
pub(crate) fn nft_list(namespace: &Namespace, object: &str) -> Result<String, ToolError> {
    NFT.output(namespace, &format!("list {object}\n"))
}

/// Applies one nftables transaction in `namespace`.
pub(crate) fn nft(namespace: &Namespace, transaction: &str) -> Result<(), ToolError> {
    NFT.run(namespace, transaction)
}

impl Tool {
    fn run(&self, namespace: &Namespace, input: &str) -> Result<(), ToolError> {
        self.output(namespace, input).map(drop)
    }

    fn output(&self, namespace: &Namespace, input: &str) -> Result<String, ToolError> {
        let command = || format!("{} {}", self.program, self.arguments.join(" "));
        let output = namespace.run(|| self.feed(input)).and_then(|output| output).map_err(|source| {
            if source.kind() == io::ErrorKind::NotFound {
                ToolError::Missing { tool: self.program, package: self.package }
            } else {
                ToolError::Run { command: command(), source }
            }
        })?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(ToolError::Failed { command: command(), stderr, input: input.to_owned() })
    }

    fn feed(&self, input: &str) -> io::Result<std::process::Output> {
        let mut child = Command::new(self.program)
            .args(self.arguments)
            // The lock that iptables-legacy insists on; its usual place belongs to root.
            .env("XTABLES_LOCKFILE", "/dev/null")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(input.as_bytes()));
        let output = child.wait_with_output()?;
        // A tool that stops reading has a better reason to tell than our broken pipe.
        if output.status.success() { written.map(|()| output) } else { Ok(output) }
    }
}
