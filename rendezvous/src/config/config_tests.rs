use super::*;

fn parse(text: &str) -> Result<Config, String> {
    Config::parse(text, Path::new("rendezvous.toml")).map_err(|error| error.to_string())
}

/// The file with what is commented out as an example in force.
fn with_examples() -> String {
    let uncomment = |line: &str| match line.strip_prefix("# ") {
        Some(example) if example.split_once(" = ").is_some_and(|(key, _)| !key.contains(' ')) => {
            example.to_owned()
        }
        _ => line.to_owned(),
    };
    DEFAULT.lines().map(uncomment).collect::<Vec<_>>().join("\n")
}

#[test]
fn the_printed_file_is_the_defaults() {
    assert_eq!(parse(DEFAULT).unwrap(), Config::default());
    assert_eq!(parse("").unwrap(), Config::default());
}

#[test]
fn the_printed_file_has_every_key_and_no_other() {
    let table: toml::Table = with_examples().parse().unwrap();
    let mut printed = BTreeMap::new();
    flatten("", serde_json::to_value(table).unwrap(), &mut printed);
    let keys = |map: BTreeMap<String, serde_json::Value>| map.into_keys().collect::<Vec<_>>();
    assert_eq!(keys(printed), keys(Config::default().keys()));
    assert!(parse(&with_examples()).unwrap().state.directory.is_some());
}

#[test]
fn the_page_for_operators_has_every_key_and_no_other() {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/README.md")).unwrap();
    let documented: std::collections::BTreeSet<String> = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `"))
        .filter_map(|line| line.split_once('`'))
        .map(|(key, _)| key.to_owned())
        .collect();
    let known: std::collections::BTreeSet<String> = Config::default().keys().into_keys().collect();
    assert_eq!(documented, known);
}

#[test]
fn an_error_names_the_file_and_the_line() {
    let unknown = parse("[limits]\n\nregistration = 5\n").unwrap_err();
    assert!(
        unknown.starts_with("rendezvous.toml, line 3: ") && unknown.contains("`registration`"),
        "{unknown}"
    );
    let section = parse("[limit]\n").unwrap_err();
    assert!(section.contains("line 1") && section.contains("limit"), "{section}");
    let kind = parse("[network]\nport = \"https\"\n").unwrap_err();
    assert!(kind.contains("line 2"), "{kind}");
    let together = parse("[network]\n# two\nreflection_ports = [5, 5]\n").unwrap_err();
    assert!(together.contains("line 3: reflection_ports"), "{together}");
    let host = parse("[network]\nhosts = [\"no host\"]\n").unwrap_err();
    assert!(host.contains("line 2") && host.contains("no host"), "{host}");
    let mode = parse("[admission]\nmode = \"callout\"\n").unwrap_err();
    assert!(mode.contains("line 2") && mode.contains("url"), "{mode}");
    let nobody = parse("[admission]\nallow = [\"abc\"]\n").unwrap_err();
    assert!(nobody.contains("line 2"), "{nobody}");
}

#[test]
fn a_missing_file_is_an_error() {
    let missing = Config::load(Path::new("/nonexistent/rendezvous.toml")).unwrap_err().to_string();
    assert!(
        missing.contains("/nonexistent/rendezvous.toml") && missing.contains("config default"),
        "{missing}"
    );
}

#[test]
fn what_can_be_reloaded_is_told_from_what_cannot() {
    let before = Config::default();
    let after = parse(
        "drain_seconds = 1\n[network]\nport = 4433\ntls_port = 8443\n[limits]\nconnecting = { burst = 1, per_second = 1 }\n",
    );
    let (now, later) = before.changes(&after.unwrap());
    assert_eq!(now, ["drain_seconds", "limits.connecting"]);
    assert_eq!(later, ["network.port", "network.tls_port"]);
}
