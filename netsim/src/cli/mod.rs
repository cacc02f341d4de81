//! The command line: what can be asked for, and who answers.

mod bench;
mod run;
mod topology;
mod units;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand, ValueEnum};
use netsim::{InputPolicy, RouterKind, enter_user_namespace, probe};

const EXAMPLES: &str = "\
Examples:
  netsim probe
      prove every kind of router
  netsim probe eim-apdf apdm --input accept
  netsim run --site a=eim-apdf --site b=apdm --delay 20ms --server s \\
      's&:./rendezvous' 'b&:./peer listen' 'a:./peer connect b'
      run programs in hosts; those with & are stopped when the others have ended
  netsim run --site a=public,rate=50mbit,loss=1% --server s 's&:iperf3 -s' 'a:iperf3 -c $NETSIM_S'
      every program knows the addresses: $NETSIM_<HOST> and $NETSIM_<HOST>_IPV6
  netsim shell --site a=carrier-apdm --server s a
      look around in host a
  netsim topology --site a=eim-eif,hosts=2,ipv6 --server s
      print who has which address

A site is NAME=KIND[,OPTION...]. Options: hosts=N, ipv6[=firewall|open|only|broken], input=POLICY, hairpin,
behind=SITE (one more customer of its carrier, on its line), delay=20ms, jitter=5ms, loss=1%, reorder=1%, duplicate=1%, rate=50mbit (each direction),
port-mapping (UPnP, NAT-PMP, PCP by miniupnpd). Its hosts are NAME, NAME.1, NAME.2, ...

Kinds: public, eim-eif, eim-adf, eim-apdf, apdm, apdm-sequential, apdm-preserving, firewall, udp-blocked,
carrier-eim, carrier-apdm.

Root is not needed where ordinary users may make user namespaces. Nothing is left when netsim ends.";

/// A lab of Linux network namespaces with iptables NAT, for programs that traverse NAT.
#[derive(Debug, Parser)]
#[command(version, after_long_help = EXAMPLES)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// What everything random in the lab follows from.
    #[arg(long, global = true, default_value_t = 1)]
    seed: u64,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Prove by traffic that every kind of router does what its name says; exit with 1 if one does not.
    Probe(Probe),
    /// Run programs in the hosts of a lab; exit with the first failure among them.
    Run(run::Run),
    /// Open a shell, or run one program, in a host of a lab.
    Shell(run::Shell),
    /// Print the names and addresses of a lab.
    Topology(topology::Print),
    /// Measure what an emulated line carries on this machine, and how exact it is.
    BenchLink(bench::Bench),
}

#[derive(Debug, Args)]
struct Probe {
    /// Which kinds; all unless given.
    kinds: Vec<RouterKind>,
    /// What the routers do with packets for nobody.
    #[arg(long, value_enum, default_value_t = Policies::Drop)]
    input: Policies,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Policies {
    Drop,
    Reject,
    Accept,
    All,
}

impl Policies {
    fn list(self) -> Vec<InputPolicy> {
        match self {
            Self::Drop => vec![InputPolicy::Drop],
            Self::Reject => vec![InputPolicy::Reject],
            Self::Accept => vec![InputPolicy::Accept],
            Self::All => InputPolicy::ALL.to_vec(),
        }
    }
}

pub(crate) fn execute(Arguments { command, seed }: Arguments) -> Result<ExitCode> {
    // No thread has been started yet.
    enter_user_namespace()?;
    match command {
        Command::Probe(probe) => probe.execute(seed),
        Command::Run(run) => run.execute(seed),
        Command::Shell(shell) => shell.execute(seed),
        Command::Topology(print) => print.execute(seed),
        Command::BenchLink(bench) => bench.execute(seed),
    }
}

impl Probe {
    fn execute(&self, seed: u64) -> Result<ExitCode> {
        let kinds = if self.kinds.is_empty() { &RouterKind::ALL[..] } else { &self.kinds };
        let mut reports = Vec::new();
        for input in self.input.list() {
            for kind in kinds {
                reports.push(probe::probe(*kind, input, seed)?);
            }
        }
        if self.json {
            println!("{}", serde_json::to_string_pretty(&reports)?);
        } else {
            println!("{}", probe::table(&reports));
        }
        let agree = reports.iter().all(|report| report.agrees);
        Ok(if agree { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
