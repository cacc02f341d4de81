//! The configuration file: TOML, written by people. An unknown key is an error.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use peer::forward::{BindPattern, TargetPattern};
use peer::{PeerId, RendezvousAddress, Token};
use serde::Deserialize;
use serde::de::{self, Deserializer, SeqAccess, Visitor};

use super::peers::Who;

/// What the file says.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(in crate::cli) struct Config {
    /// Rendezvous servers to register with.
    #[serde(deserialize_with = "texts")]
    pub(in crate::cli) servers: Vec<RendezvousAddress>,
    /// By the id of a server, what admits us there.
    #[serde(deserialize_with = "tokens")]
    pub(in crate::cli) tokens: BTreeMap<PeerId, Token>,
    /// The key file.
    pub(in crate::cli) key: Option<PathBuf>,
    /// Whether the router is asked for a port mapping.
    pub(in crate::cli) port_mapping: Option<bool>,
    /// What `peer listen --serve` gives to whom.
    pub(in crate::cli) serve: Vec<Serve>,
}

/// What some peers may use.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(in crate::cli) struct Serve {
    /// Who.
    #[serde(deserialize_with = "texts")]
    pub(in crate::cli) to: Vec<Who>,
    /// Where connections may be made to, on their behalf.
    #[serde(default, deserialize_with = "texts")]
    pub(in crate::cli) forward: Vec<TargetPattern>,
    /// Where they may have us listen.
    #[serde(default, deserialize_with = "texts")]
    pub(in crate::cli) listen: Vec<BindPattern>,
    /// Whether they may measure what a session with us carries.
    #[serde(default)]
    pub(in crate::cli) bench: bool,
}

/// Why there is no configuration to use.
#[derive(Debug, thiserror::Error)]
pub(in crate::cli) enum ConfigError {
    #[error("{path}: {source}", path = path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{path}, line {line}: {message}", path = path.display())]
    Content { path: PathBuf, line: usize, message: String },
}

impl Config {
    /// Reads the file; what it says when there is none is nothing.
    pub(in crate::cli) fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = super::read(path).map_err(|source| ConfigError::Io { path: path.to_owned(), source })?;
        Self::parse(&text.unwrap_or_default(), path)
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|error| ConfigError::Content {
            path: path.to_owned(),
            line: line_of(text, error.span().map_or(0, |span| span.start)),
            message: error.message().to_owned(),
        })
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1
}

/// Adds servers to the file, or makes it; leaves what else it says, and its comments, alone. Returns those that are new.
pub(in crate::cli) fn add_servers(
    path: &Path,
    servers: &[RendezvousAddress],
) -> Result<Vec<RendezvousAddress>, ConfigError> {
    let io = |source| ConfigError::Io { path: path.to_owned(), source };
    let _lock = super::Lock::take(path).map_err(io)?;
    let text = super::read(path).map_err(io)?;
    // Whatever is wrong with it is told before anything is changed.
    let present = Config::parse(text.as_deref().unwrap_or_default(), path)?;
    let known = |server: &&RendezvousAddress| !present.servers.contains(server);
    let new: Vec<RendezvousAddress> = servers.iter().filter(known).cloned().collect();
    if text.is_some() && new.is_empty() {
        return Ok(new);
    }
    let text = text.unwrap_or_else(|| FRESH.to_owned());
    let mut document: toml_edit::DocumentMut =
        text.parse().map_err(|error: toml_edit::TomlError| ConfigError::Content {
            path: path.to_owned(),
            line: line_of(&text, error.span().map_or(0, |span| span.start)),
            message: error.message().to_owned(),
        })?;
    // One that is a single text, not a list, becomes a list.
    let mut list = toml_edit::Array::new();
    for server in &present.servers {
        list.push(server.to_string());
    }
    let keep = document.get_mut("servers").and_then(toml_edit::Item::as_array_mut);
    let list = match keep {
        Some(present) => present,
        None => {
            document["servers"] = toml_edit::value(list);
            document["servers"].as_array_mut().unwrap_or_else(|| unreachable!("it was set to a list"))
        }
    };
    for server in &new {
        list.push(server.to_string());
    }
    super::replace(path, &document.to_string()).map_err(io)?;
    Ok(new)
}

/// Keeps the token that admits us at a server, in the place of any other for that server.
pub(in crate::cli) fn keep_token(path: &Path, server: PeerId, token: &Token) -> Result<(), ConfigError> {
    let io = |source| ConfigError::Io { path: path.to_owned(), source };
    let _lock = super::Lock::take(path).map_err(io)?;
    let text = super::read(path).map_err(io)?.unwrap_or_else(|| FRESH.to_owned());
    Config::parse(&text, path)?;
    let mut document: toml_edit::DocumentMut =
        text.parse().map_err(|error: toml_edit::TomlError| ConfigError::Content {
            path: path.to_owned(),
            line: line_of(&text, error.span().map_or(0, |span| span.start)),
            message: error.message().to_owned(),
        })?;
    let tokens = document.entry("tokens").or_insert_with(toml_edit::table);
    tokens[&server.to_string()] = toml_edit::value(token.to_string());
    super::replace(path, &document.to_string()).map_err(io)
}

/// Tokens by servers' ids.
fn tokens<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<PeerId, Token>, D::Error> {
    let entry = |(server, token): (String, String)| {
        let id = server.parse().map_err(|error| de::Error::custom(format!("{server:?}: {error}")))?;
        // The token itself is told nobody.
        Ok((id, token.parse().map_err(de::Error::custom)?))
    };
    BTreeMap::<String, String>::deserialize(deserializer)?.into_iter().map(entry).collect()
}

/// How a file that `peer init` makes begins.
const FRESH: &str = "\
# Settings of `peer`. A flag or an environment variable goes before what stands here.
#
# key = \"/path/to/key.pem\"
# port-mapping = false
#
# What `peer listen --serve` gives to whom: \"anyone\", \"trusted\", an alias or an id.
# [[serve]]
# to = \"trusted\"
# forward = [\"localhost:22\", \"192.168.1.0/24:80\"]
# listen = [\"127.0.0.1:8080\"]

";

/// One text or a list of texts, each of which is a `T`.
fn texts<'de, D: Deserializer<'de>, T: FromStr<Err: fmt::Display>>(
    deserializer: D,
) -> Result<Vec<T>, D::Error> {
    struct Texts<T>(PhantomData<T>);
    struct Text<T>(T);

    impl<'de, T: FromStr<Err: fmt::Display>> Deserialize<'de> for Text<T> {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            let text = String::deserialize(deserializer)?;
            text.parse().map(Self).map_err(|error| de::Error::custom(format!("{text:?}: {error}")))
        }
    }

    impl<'de, T: FromStr<Err: fmt::Display>> Visitor<'de> for Texts<T> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a text or a list of texts")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
            let parsed = text.parse().map_err(|error| de::Error::custom(format!("{text:?}: {error}")))?;
            Ok(vec![parsed])
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
            let mut all = Vec::new();
            while let Some(Text(parsed)) = list.next_element()? {
                all.push(parsed);
            }
            Ok(all)
        }
    }

    deserializer.deserialize_any(Texts(PhantomData))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "aebagbafaydqqcikbmga2dqpcaireeyuculbogazdinryhi6d4qa";

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("config.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn everything_may_be_left_out() {
        let config = parse("").unwrap();
        assert!(config.servers.is_empty() && config.key.is_none() && config.serve.is_empty());
    }

    #[test]
    fn a_whole_configuration_is_understood() {
        let text = format!(
            "servers = [\"rv://{ID}@vps.example\"]\nkey = \"k.pem\"\nport-mapping = false\n\
             [[serve]]\nto = \"trusted\"\nforward = \"localhost:22\"\n\
             [[serve]]\nto = [\"nas\", \"{ID}\"]\nlisten = [\"127.0.0.1:8080\", \"udp:*:53\"]\n\
             bench = true\n"
        );
        let config = parse(&text).unwrap();
        assert_eq!(config.servers.len(), 1);
        assert_eq!(config.port_mapping, Some(false));
        assert_eq!(config.serve[0].forward.len(), 1);
        assert_eq!(config.serve[1].to.len(), 2);
        assert_eq!(config.serve[1].listen.len(), 2);
        assert_eq!((config.serve[0].bench, config.serve[1].bench), (false, true));
    }

    #[test]
    fn an_error_names_the_file_and_the_line() {
        let unknown = parse("# first\n\nserver = \"rv://x\"\n").unwrap_err();
        assert!(unknown.starts_with("config.toml, line 3: ") && unknown.contains("`server`"), "{unknown}");
        let wrong = parse("port-mapping = true\nservers = [\"http://x\"]\n").unwrap_err();
        assert!(wrong.contains("line 2: \"http://x\"") && wrong.contains("rv://"), "{wrong}");
        let nested = parse("[[serve]]\nto = \"nas\"\nforwards = []\n").unwrap_err();
        assert!(nested.contains("line 3") && nested.contains("forwards"), "{nested}");
        let broken = parse("key = \n").unwrap_err();
        assert!(broken.contains("line 1"), "{broken}");
    }

    #[test]
    fn a_server_is_added_and_comments_stay() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep/config.toml");
        let server: RendezvousAddress = format!("rv://{ID}@one.example").parse().unwrap();
        let other: RendezvousAddress = format!("rv://{ID}@two.example").parse().unwrap();
        let both = [server.clone(), other.clone()];
        assert_eq!(add_servers(&path, &both[..1]).unwrap(), both[..1]);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text + "# mine\nport-mapping = false # for the cellar\n").unwrap();
        assert_eq!(add_servers(&path, &both).unwrap(), both[1..]);
        assert!(add_servers(&path, &both[..1]).unwrap().is_empty());
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains("# mine") && text.contains("# for the cellar"), "{text}");
        assert_eq!(Config::load(&path).unwrap().servers, both);
    }

    #[test]
    fn a_token_is_kept_beside_what_was_there() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.toml");
        let server: RendezvousAddress = format!("rv://{ID}@one.example").parse().unwrap();
        add_servers(&path, std::slice::from_ref(&server)).unwrap();
        let [first, second] = [[1; 16], [2; 16]].map(Token);
        for token in [&first, &second] {
            keep_token(&path, server.id, token).unwrap();
            assert_eq!(Config::load(&path).unwrap().tokens[&server.id], *token);
        }
        let other = format!("rv://{ID}@two.example").parse().unwrap();
        add_servers(&path, &[other]).unwrap();
        let config = Config::load(&path).unwrap();
        assert_eq!((config.servers.len(), config.tokens.len()), (2, 1));
        let wrong = parse(&format!("[tokens]\n{ID} = \"abc\"\n")).unwrap_err();
        assert!(wrong.contains("token new") && !wrong.contains("abc\""), "{wrong}");
    }

    #[test]
    fn a_file_with_an_error_is_left_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.toml");
        std::fs::write(&path, "wrong = 1\n").unwrap();
        let server: RendezvousAddress = format!("rv://{ID}@one.example").parse().unwrap();
        assert!(matches!(add_servers(&path, &[server]), Err(ConfigError::Content { line: 1, .. })));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "wrong = 1\n");
    }
}
