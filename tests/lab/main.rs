//! The lab tests: real `rendezvous` and `peer` processes behind the kernel's own NAT. Run by `make test`; one test by
//! `cargo test -p end-to-end --test lab -- NAME`.
//!
//! `LAB_LOG=peer=debug` shows what the programs and the library log.

#![forbid(unsafe_code)]

mod admission;
mod benchmarks;
mod browser;
mod chaos;
mod chat;
mod commands;
mod daemon;
mod dialling;
mod doctor;
mod errors;
mod examples;
mod explain;
mod failover;
mod families;
mod forwarding;
mod garbage;
mod household;
mod keep_alive;
mod library;
mod matrix;
mod mtu;
mod networks;
mod poisoned;
mod portmap;
mod reach;
mod restart;
mod reverse_proxy;
mod roaming;
mod sending;
mod servers;
mod setup;
mod stun_clients;
mod tcp;
mod transfer;

use libtest_mimic::{Arguments, Failed, Trial};

fn trial(name: impl Into<String>, test: impl FnOnce() -> anyhow::Result<()> + Send + 'static) -> Trial {
    Trial::test(name, move || test().map_err(|error| Failed::from(format!("{error:#}"))))
}

fn main() -> std::process::ExitCode {
    // Before any thread starts.
    if let Err(error) = netsim::enter_user_namespace() {
        eprintln!("no lab: {error}");
        return std::process::ExitCode::FAILURE;
    }
    if let Ok(filter) = std::env::var("LAB_LOG") {
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    }
    let mut arguments = Arguments::from_args();
    // Most tests wait for the network, not for a processor.
    arguments.test_threads.get_or_insert(4);
    let mut trials = matrix::trials();
    trials.extend(admission::trials());
    trials.extend(chaos::trials());
    trials.extend(chat::trials());
    trials.extend(poisoned::trials());
    trials.extend(restart::trials());
    trials.extend(roaming::trials());
    trials.extend(dialling::trials());
    trials.extend(commands::trials());
    trials.extend(daemon::trials());
    trials.extend(setup::trials());
    trials.extend(forwarding::trials());
    trials.extend(reach::trials());
    trials.extend(errors::trials());
    trials.extend(examples::trials());
    trials.extend(doctor::trials());
    trials.extend(explain::trials());
    trials.extend(families::trials());
    trials.extend(library::trials());
    trials.extend(keep_alive::trials());
    trials.extend(portmap::trials());
    trials.extend(networks::trials());
    trials.extend(household::trials());
    trials.extend(stun_clients::trials());
    trials.extend(benchmarks::trials());
    trials.extend(browser::trials());
    trials.extend(transfer::trials());
    trials.extend(sending::trials());
    trials.extend(tcp::trials());
    trials.extend(reverse_proxy::trials());
    trials.extend(failover::trials());
    trials.extend(mtu::trials());
    trials.extend(servers::trials());
    trials.extend(garbage::trials());
    libtest_mimic::run(&arguments, trials).exit_code()
}
