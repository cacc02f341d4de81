//! `peer doctor`.

use std::time::Duration;

use clap::Args;
use peer::RendezvousAddress;
use peer::doctor::{Allocation, Diagnosis, Doctor, Family, Tcp};
use serde_json::{Value, json};

use super::report::Report;
use super::{Failure, exit, interrupted, print_line, settings};

pub(super) const EXAMPLES: &str = "\
Examples:
  peer doctor
      Say what this network does to peers, and whom they reach directly; takes ten seconds.
  peer doctor --lifetime
      Measure the whole binding lifetime as well, for up to five minutes.
  peer doctor --server rv://ID@vps.example --json > report.json

The report goes to standard output, progress to standard error. A server with a second
address (rendezvous serve --alternate-ip) can tell more.";

#[derive(Debug, Args)]
pub(super) struct DoctorArguments {
    /// The rendezvous server to measure at, as it printed its address; of several the first is used [default: that of
    /// `peer init`].
    #[arg(long, env = "PEER_SERVER", value_name = "RV_ADDRESS", value_delimiter = ' ')]
    server: Vec<RendezvousAddress>,
    /// Measure for how long bindings live, up to five minutes.
    #[arg(long)]
    lifetime: bool,
    /// Print the report as one JSON object, and progress as JSON objects.
    #[arg(long)]
    pub(super) json: bool,
}

pub(super) async fn run(arguments: DoctorArguments) -> Result<(), Failure> {
    let report = Report::new(arguments.json);
    let servers = settings::servers(&arguments.server)?;
    let Some(server) = servers.into_iter().next() else { return Err(settings::no_server()) };
    let doctor = Doctor::new(server);
    let doctor = if arguments.lifetime { doctor.whole_lifetime() } else { doctor };
    let diagnosis = tokio::select! {
        diagnosis = doctor.examine(|stage| report.stage(stage)) => diagnosis,
        () = interrupted() => return Err(Failure::interrupted()),
    };
    if arguments.json {
        print_line(to_json(&diagnosis))?;
    } else {
        print_line(&diagnosis)?;
    }
    match diagnosis.failure() {
        None => Ok(()),
        Some(error) => Err(Failure { code: exit::SERVER, error: error.clone().into() }),
    }
}

fn seconds(duration: Option<Duration>) -> Option<u64> {
    duration.map(|duration| duration.as_secs())
}

fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

fn to_json(diagnosis: &Diagnosis) -> Value {
    let signalling = match &diagnosis.signalling {
        Ok((address, rtt)) => json!({ "works": true, "address": address, "rtt_ms": ms(*rtt) }),
        Err(_) => json!({ "works": false, "error": diagnosis.udp_failure() }),
    };
    let tcp = match &diagnosis.tcp {
        Tcp::Works { address, took, .. } => json!({ "address": address, "took_ms": ms(*took) }),
        Tcp::Failed(error) => json!({ "error": error.to_string() }),
        _ => json!({}),
    };
    json!({
        "event": "diagnosis",
        "server": diagnosis.server.to_string(),
        "signalling": signalling,
        "ipv4": family(&diagnosis.ipv4),
        "ipv6": family(&diagnosis.ipv6),
        "hops": diagnosis.hops,
        "nats": diagnosis.translators().name(),
        "tcp": diagnosis.tcp.name(),
        "tcp_details": tcp,
        "captive_portal": diagnosis.portal,
        "port_mapping": diagnosis.port_mapping.name(),
        "receive_buffer": diagnosis.machine.receive_buffer,
        "send_buffer": diagnosis.machine.send_buffer,
        "devices": diagnosis.machine.unlikely_devices,
        "through": diagnosis.machine.through,
        "verdict": diagnosis.reach().name(),
        "words": diagnosis.reach().to_string(),
        "advice": diagnosis.advice(),
    })
}

fn family(family: &Family) -> Value {
    let mut fields = json!({ "state": family.name() });
    if let Some(found) = family.finding() {
        let allocation = found.mapping.allocation();
        fields["local"] = json!(found.local);
        fields["mapped"] = json!(found.mapped);
        fields["rtt_ms"] = json!(found.rtt.map(ms));
        fields["mapping"] = json!(found.mapping.name());
        fields["ports"] = json!(allocation.map(Allocation::name));
        fields["port_step"] = match allocation {
            Some(Allocation::Sequential(step)) => json!(step),
            _ => Value::Null,
        };
        fields["filtering"] = json!(found.filtering.name());
        fields["hairpinning"] = json!(found.hairpinning);
        fields["lifetime_at_least_s"] = json!(seconds(found.lifetime.at_least));
        fields["lifetime_less_than_s"] = json!(seconds(found.lifetime.less_than));
    }
    fields
}
