//! What the demo, the matrix and the benchmarks have in common: a main that runs in a lab.

use std::process::ExitCode;

use clap::Parser;

/// Makes labs possible, parses the arguments, runs. `run` says whether all was as it should be; an error is printed.
///
/// Must be the whole of `main`: no thread may have been started before.
pub fn main<A: Parser>(name: &str, run: impl FnOnce(A) -> anyhow::Result<bool>) -> ExitCode {
    if let Err(error) = netsim::enter_user_namespace() {
        eprintln!("{name}: no lab: {error}");
        return ExitCode::FAILURE;
    }
    match run(A::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{name}: {error:#}");
            ExitCode::FAILURE
        }
    }
}
