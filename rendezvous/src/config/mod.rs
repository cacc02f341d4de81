//! The configuration file: one TOML file, of which everything may be left out.
//!
//! [`DEFAULT`] is the file with every default in it and a word on each; `rendezvous config default` prints it.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rendezvous_wire::address::ParseAddressError;
use rendezvous_wire::admission::MOST_BITS;
use rendezvous_wire::candidate::MAX_CANDIDATES;
use rendezvous_wire::{DEFAULT_REFLECTION_PORTS, DEFAULT_SIGNALLING_PORT, PeerId, RendezvousAddress};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::Limits;
use crate::server::TlsPort;

/// The commented file of all defaults.
pub const DEFAULT: &str = include_str!("default.toml");

/// Where the file is looked for when none is named.
pub const PLACE: &str = "/etc/rendezvous.toml";

/// Sections whose values take effect on SIGHUP.
const RELOADABLE: [&str; 3] = ["drain_seconds", "admission.", "limits."];

/// Everything that can be set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// How long a server that was told to stop goes on for sessions that it relays.
    pub drain_seconds: u64,
    /// Ports and addresses.
    pub network: Network,
    /// Files.
    pub state: State,
    /// Who may register.
    pub admission: Admission,
    /// What those may use.
    pub limits: Limits,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            drain_seconds: 10,
            network: Network::default(),
            state: State::default(),
            admission: Admission::default(),
            limits: Limits::default(),
        }
    }
}

/// Ports and addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Network {
    /// Addresses to listen on; none: all.
    pub listen: Vec<IpAddr>,
    /// UDP port of signalling.
    pub port: u16,
    /// TCP port.
    #[serde(serialize_with = "write_tls_port", deserialize_with = "read_tls_port")]
    pub tls_port: TlsPort,
    /// UDP ports of STUN and the relay.
    pub reflection_ports: [u16; 2],
    /// Names or addresses for peers; none: the machine's own best.
    #[serde(deserialize_with = "read_hosts")]
    pub hosts: Vec<String>,
    /// Second addresses for RFC 5780.
    pub alternate_ips: Vec<IpAddr>,
    /// Relay threads; 0: one per core.
    pub relay_threads: usize,
}

impl Default for Network {
    fn default() -> Self {
        Self {
            listen: Vec::new(),
            port: DEFAULT_SIGNALLING_PORT,
            tls_port: TlsPort::Same,
            reflection_ports: DEFAULT_REFLECTION_PORTS,
            hosts: Vec::new(),
            alternate_ips: Vec::new(),
            relay_threads: 0,
        }
    }
}

impl Network {
    /// Relay threads, when their number is set.
    pub fn threads(&self) -> Option<NonZeroUsize> {
        NonZeroUsize::new(self.relay_threads)
    }
}

/// Files.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct State {
    /// Where the key and the store are.
    pub directory: Option<PathBuf>,
    /// The socket of the live commands.
    pub control_socket: Option<PathBuf>,
}

/// Who may register.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Admission {
    /// How newcomers are judged.
    pub mode: Mode,
    /// Peers that are always admitted unless they are banned.
    #[serde(serialize_with = "write_ids", deserialize_with = "read_ids")]
    pub allow: Vec<PeerId>,
    /// Newcomers a second beyond which they have to work; 0: they never have to.
    pub work_above: u32,
    /// Bits of work when that is reached.
    pub work_bits: u8,
    /// The most bits of work.
    pub work_most_bits: u8,
    /// The operator's own service, for [`Mode::Callout`].
    pub callout: Callout,
}

impl Default for Admission {
    fn default() -> Self {
        Self {
            mode: Mode::Open,
            allow: Vec::new(),
            work_above: 256,
            work_bits: 14,
            work_most_bits: 20,
            callout: Callout::default(),
        }
    }
}

/// How newcomers are judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Everybody is admitted, within the limits.
    #[default]
    Open,
    /// Who presents a token, and who was admitted by name.
    Token,
    /// Only who was admitted by name: in `allow`, or with `rendezvous admit`.
    AllowList,
    /// Whom an HTTP service of the operator's admits.
    Callout,
}

/// An HTTP service that judges newcomers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Callout {
    /// Where to.
    pub url: String,
    /// How long an answer may take.
    pub timeout_ms: u64,
    /// What holds when there is none.
    pub on_failure: OnFailure,
    /// How long an answer is good for.
    pub cache_seconds: u64,
}

impl Default for Callout {
    fn default() -> Self {
        Self { url: String::new(), timeout_ms: 2_000, on_failure: OnFailure::Refuse, cache_seconds: 60 }
    }
}

impl Callout {
    /// How long an answer may take.
    pub fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }
}

/// What holds when the service does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFailure {
    /// Nobody new gets in.
    Refuse,
    /// Everybody gets in.
    Admit,
}

/// Why there is no configuration to use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file.
    #[error("{path}: {source}. `rendezvous config default` prints one to begin with", path = path.display())]
    Io {
        /// Its name.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// What stands in it.
    #[error("{path}, line {line}: {message}", path = path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
}

impl Config {
    /// Reads the file of this name, which must be there.
    ///
    /// # Errors
    ///
    /// When it is not, and when it says what makes no sense, with the line.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path);
        Self::parse(&text.map_err(|source| ConfigError::Io { path: path.to_owned(), source })?, path)
    }

    /// Reads the file of that name, or else, where there is one, the one at [`PLACE`]; which it was.
    ///
    /// # Errors
    ///
    /// As [`Config::load`].
    pub fn find(named: Option<&Path>) -> Result<(Self, Option<PathBuf>), ConfigError> {
        let usual = Path::new(PLACE);
        match named.or(Some(usual).filter(|path| path.exists())) {
            Some(path) => Ok((Self::load(path)?, Some(path.to_owned()))),
            None => Ok((Self::default(), None)),
        }
    }

    /// Reads a text. `path` is for errors.
    ///
    /// # Errors
    ///
    /// As [`Config::load`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let content = |line, message| ConfigError::Content { path: path.to_owned(), line, message };
        let config: Self = toml::from_str(text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start);
            content(line_of(text, at), error.message().trim().replace('\n', "; "))
        })?;
        match config.contradiction() {
            Some((key, message)) => Err(content(line_of_key(text, key), format!("{key}: {message}"))),
            None => Ok(config),
        }
    }

    /// The first value that makes no sense, or not together with the others: its key, and what is wrong with it.
    pub fn contradiction(&self) -> Option<(&'static str, String)> {
        let (network, admission, limits) = (&self.network, &self.admission, &self.limits);
        let [first, second] = network.reflection_ports;
        let families = |ip: &IpAddr| {
            network.alternate_ips.iter().filter(|other| other.is_ipv4() == ip.is_ipv4()).count()
        };
        let callout = admission.mode == Mode::Callout;
        let bits = admission.work_most_bits;
        let url = &admission.callout.url;
        let checks: [(bool, &'static str, String); 10] = [
            (first == second && first != 0, "reflection_ports", "takes two different ports".into()),
            (
                network.alternate_ips.iter().any(|ip| families(ip) > 1),
                "alternate_ips",
                "at most one IPv4 and one IPv6 address".into(),
            ),
            (
                callout && url.is_empty(),
                "mode",
                "\"callout\" needs the url of your service in [admission.callout]".into(),
            ),
            (
                !url.is_empty() && !url.starts_with("http://") && !url.starts_with("https://"),
                "url",
                "begins with http:// or https://".into(),
            ),
            (!(1..=30_000).contains(&admission.callout.timeout_ms), "timeout_ms", "from 1 to 30000".into()),
            (
                bits > MOST_BITS,
                "work_most_bits",
                format!("at most {MOST_BITS}: peers refuse to work for more"),
            ),
            (admission.work_bits > bits, "work_bits", format!("more than work_most_bits, which is {bits}")),
            (limits.candidates > MAX_CANDIDATES, "candidates", format!("at most {MAX_CANDIDATES}")),
            (!(30..=3_600).contains(&limits.lease.as_secs()), "lease_seconds", "from 30 to 3600".into()),
            (
                limits.queued_bytes < 32 * 1024,
                "queued_bytes",
                "at least 32768: a notice may have half of that".into(),
            ),
        ];
        checks.into_iter().find(|(wrong, ..)| *wrong).map(|(_, key, message)| (key, message))
    }

    /// Every key by its full name, with its value.
    pub fn keys(&self) -> BTreeMap<String, serde_json::Value> {
        let mut keys = BTreeMap::new();
        // A structure of texts, numbers and lists always is JSON.
        flatten("", serde_json::to_value(self).unwrap_or_default(), &mut keys);
        keys
    }

    /// What is different in `other`: the keys that take effect at once, and those that need a new start.
    pub fn changes(&self, other: &Self) -> (Vec<String>, Vec<String>) {
        let others = other.keys();
        let changed = self.keys().into_iter().filter(|(key, value)| others.get(key) != Some(value));
        changed.map(|(key, _)| key).partition(|key| RELOADABLE.iter().any(|section| key.starts_with(section)))
    }
}

/// Rates are values, everything else that has keys is a section.
fn flatten(name: &str, value: serde_json::Value, keys: &mut BTreeMap<String, serde_json::Value>) {
    match value {
        serde_json::Value::Object(fields) if !fields.contains_key("burst") => {
            for (field, value) in fields {
                let name = if name.is_empty() { field } else { format!("{name}.{field}") };
                flatten(&name, value, keys);
            }
        }
        value => drop(keys.insert(name.to_owned(), value)),
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1
}

/// The line that sets this key, or the last one.
fn line_of_key(text: &str, key: &str) -> usize {
    let sets = |line: &str| {
        line.trim_start().strip_prefix(key).is_some_and(|rest| rest.trim_start().starts_with('='))
    };
    text.lines().position(sets).map_or_else(|| text.lines().count().max(1), |place| place + 1)
}

/// A host as an `rv://` address may name it.
///
/// # Errors
///
/// When none can.
pub fn parse_host(text: &str) -> Result<String, ParseAddressError> {
    let id = PeerId::from_bytes([0; 32]);
    let host = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text).to_owned();
    let port = DEFAULT_SIGNALLING_PORT;
    let address = RendezvousAddress { id, host, alternatives: Vec::new(), port };
    let parsed: RendezvousAddress = address.to_string().parse()?;
    if parsed == address { Ok(address.host) } else { Err(ParseAddressError::Host) }
}

fn read_hosts<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let hosts = Vec::<String>::deserialize(deserializer)?;
    let host =
        |text: String| parse_host(&text).map_err(|error| de::Error::custom(format!("{text:?}: {error}")));
    hosts.into_iter().map(host).collect()
}

fn write_ids<S: Serializer>(ids: &[PeerId], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(ids.iter().map(PeerId::to_string))
}

fn read_ids<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<PeerId>, D::Error> {
    let ids = Vec::<String>::deserialize(deserializer)?;
    let id = |text: String| text.parse().map_err(|error| de::Error::custom(format!("{text:?}: {error}")));
    ids.into_iter().map(id).collect()
}

fn write_tls_port<S: Serializer>(port: &TlsPort, serializer: S) -> Result<S::Ok, S::Error> {
    match port {
        TlsPort::Same => serializer.serialize_str("same"),
        TlsPort::Off => serializer.serialize_str("off"),
        TlsPort::Number(number) => serializer.serialize_u16(*number),
    }
}

fn read_tls_port<'de, D: Deserializer<'de>>(deserializer: D) -> Result<TlsPort, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "a port, \"same\" or \"off\"")]
    enum Written {
        Number(u16),
        Word(String),
    }
    match Written::deserialize(deserializer)? {
        Written::Number(number) => Ok(TlsPort::Number(number)),
        Written::Word(word) if word == "same" => Ok(TlsPort::Same),
        Written::Word(word) if word == "off" => Ok(TlsPort::Off),
        Written::Word(_) => Err(de::Error::custom("a port, \"same\" or \"off\"")),
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
