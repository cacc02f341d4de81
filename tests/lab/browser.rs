//! A browser's ICE agent learns its server-reflexive candidate from our server. `make browser`: the browser is a large package, so the
//! other targets leave this out.

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;

use anyhow::{Context as _, ensure};
use end_to_end::world::{SITE_DELAY, World};
use libtest_mimic::Trial;
use netsim::{RouterKind, SiteConfig};

use crate::trial;

const BROWSER: &str = "chromium-headless-shell";

pub(crate) fn trials() -> Vec<Trial> {
    [RouterKind::EimApdf, RouterKind::Apdm]
        .into_iter()
        .map(|kind| {
            let name = format!("browser::chromium_learns_its_address_behind_{kind}");
            trial(name, move || candidates(kind)).with_ignored_flag(true)
        })
        .collect()
}

/// What the page writes to the console before each candidate, and once there will be no more.
const CANDIDATE: &str = "a=candidate:";
const END: &str = "gathering is complete";

fn page(server: &str) -> String {
    format!(
        r#"<!doctype html><script>
const connection = new RTCPeerConnection({{iceServers: [{{urls: "stun:{server}:3478"}}, {{urls: "stun:{server}:3479"}}]}});
connection.onicecandidate = ({{candidate}}) => console.log(candidate ? "a=" + candidate.candidate : "{END}");
connection.createDataChannel("any");
connection.createOffer().then(offer => connection.setLocalDescription(offer));
</script>"#
    )
}

fn candidates(kind: RouterKind) -> anyhow::Result<()> {
    let mut world = World::new(1)?;
    let site = world.lab.add_site("a", SiteConfig::new(kind).delay(SITE_DELAY))?;
    let host = site.host(0);
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("page.html");
    std::fs::write(&file, page(&world.server_host.ipv4().to_string()))?;
    // `timeout` bounds what is read below: it ends the browser, which otherwise stays.
    let mut command = host.command("timeout");
    command.args(["60", BROWSER, "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]);
    command.args(["--enable-logging=stderr", "--remote-debugging-port=0"]);
    command.arg(format!("--user-data-dir={}", directory.path().join("profile").display()));
    command.arg(format!("file://{}", file.display()));
    let mut browser = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("{BROWSER} cannot be started: run `make browsertools`"))?;
    let said = BufReader::new(browser.stderr.take().context("standard error")?);
    let (mut all, mut found) = (String::new(), Vec::new());
    let mut complete = false;
    for line in said.lines() {
        let line = line?;
        if let Some((_, candidate)) = line.split_once(CANDIDATE) {
            found.push(candidate.to_owned());
        }
        complete = line.contains(END);
        all.push_str(&line);
        all.push('\n');
        if complete {
            break;
        }
    }
    ensure!(complete, "{BROWSER} has not gathered its candidates: {all}");
    let reflexive = format!(" {} ", host.reflexive_ipv4());
    let own = |candidate: &&String| candidate.contains(" typ srflx") && candidate.contains(&reflexive);
    let learnt = found.iter().filter(own).count();
    // Both ports see one mapping of an endpoint-independent router, which is one candidate, and two of the other.
    let expected = if kind == RouterKind::Apdm { 2 } else { 1 };
    ensure!(learnt == expected, "{learnt} server-reflexive candidates of {reflexive}: {found:?}");
    Ok(())
}
