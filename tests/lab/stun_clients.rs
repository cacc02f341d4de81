//! Other people's STUN clients learn from our server what the lab's routers were built to do: coturn's (RFC 8489, RFC 5780), and one of
//! RFC 3489, which is not answered.

use std::net::Ipv4Addr;

use anyhow::{Context as _, ensure};
use end_to_end::world::{SITE_DELAY, World};
use libtest_mimic::Trial;
use netsim::{Host, InputPolicy, RouterKind, SiteConfig};

use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    let kinds = [
        (RouterKind::EimEif, "Endpoint Independent Mapping", "Endpoint Independent Filtering"),
        (RouterKind::EimAdf, "Endpoint Independent Mapping", "Address Dependent Filtering"),
        (RouterKind::EimApdf, "Endpoint Independent Mapping", "Address and Port Dependent Filtering"),
        (RouterKind::Apdm, "Address and Port Dependent Mapping", "Address and Port Dependent Filtering"),
    ];
    let mut trials: Vec<_> = kinds
        .into_iter()
        .map(|(kind, mapping, filtering)| {
            trial(format!("stun_clients::coturns_name_what_{kind}_does"), move || {
                coturns(kind, mapping, filtering)
            })
        })
        .collect();
    trials.push(trial("stun_clients::the_classic_one_is_not_answered", classic));
    trials
}

fn place(kind: RouterKind) -> anyhow::Result<(World, Host, Ipv4Addr)> {
    let mut world = World::new(1)?;
    let site = world.lab.add_site("a", SiteConfig::new(kind).input(InputPolicy::Drop).delay(SITE_DELAY))?;
    let server = world.server_host.ipv4();
    Ok((world, site.host(0), server))
}

/// What a client says. Some wait for ever, so they run under `timeout`.
fn say(host: &Host, program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let mut command = host.command("timeout");
    command.args(["60", program]).args(arguments);
    let output =
        command.output().with_context(|| format!("{program} cannot be started: run `make tools`"))?;
    ensure!(output.status.code() != Some(124), "{program} has waited for too long");
    ensure!(output.status.code() != Some(127), "{program} is not installed: run `make tools`");
    Ok([output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat())
}

fn coturns(kind: RouterKind, mapping: &str, filtering: &str) -> anyhow::Result<()> {
    let (_world, host, server) = place(kind)?;
    let server = server.to_string();
    let own = format!("UDP reflexive addr: {}:", host.reflexive_ipv4());
    let said = say(&host, "turnutils_stunclient", &[&server])?;
    ensure!(said.contains(&own), "not the router's address: {said}");
    // An unpadded request leaves no room for OTHER-ADDRESS in an answer that does not amplify.
    let said = say(&host, "turnutils_natdiscovery", &["-m", "-f", "-P", &server])?;
    for behaviour in [mapping, filtering] {
        ensure!(said.contains(&format!("NAT with {behaviour}!")), "not {behaviour}: {said}");
    }
    ensure!(said.contains(&own), "not the router's address: {said}");
    Ok(())
}

/// The requests of RFC 3489 have no magic cookie, and their answers would tell far more than they asked with.
fn classic() -> anyhow::Result<()> {
    let (_world, host, server) = place(RouterKind::EimApdf)?;
    let server = server.to_string();
    let said = say(&host, "stun", &[&server])?;
    ensure!(said.contains("Blocked or could not reach STUN server"), "{said}");
    let said = say(&host, "turnutils_stunclient", &[&server])?;
    ensure!(said.contains("UDP reflexive addr"), "the server answers others: {said}");
    Ok(())
}
