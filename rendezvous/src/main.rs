//! The rendezvous server's command line.

#![forbid(unsafe_code)]

mod cli;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    cli::complete();
    let arguments = cli::Arguments::parse();
    arguments.init_logging();
    match arguments.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rendezvous: {error:#}");
            ExitCode::FAILURE
        }
    }
}
