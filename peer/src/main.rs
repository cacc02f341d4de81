//! The `peer` command. Parses and calls; see `peer --help`.

#![forbid(unsafe_code)]

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::complete();
    let arguments = match cli::Arguments::of_command_line() {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    // One thread for the network: a datagram, its session and its stream are hot in one processor's cache, and no thread wakes another on a packet's way.
    // Disks and names have threads of their own.
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
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
