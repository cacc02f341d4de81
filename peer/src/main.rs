//! The `peer` command. Parses and calls; see `peer --help`.

#![forbid(unsafe_code)]

mod cli;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    cli::complete();
    let arguments = cli::Arguments::parse();
    match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => {
            let code = runtime.block_on(cli::run(arguments));
            // Standard input may still be blocked in a read that nobody waits for any more.
            runtime.shutdown_background();
            code
        }
        Err(error) => {
            eprintln!("peer: no runtime: {error}");
            ExitCode::FAILURE
        }
    }
}
