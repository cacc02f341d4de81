//! `netsim`: labs from the command line.

mod cli;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let arguments = cli::Arguments::parse();
    match cli::execute(arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("netsim: {error:#}");
            ExitCode::from(2)
        }
    }
}
