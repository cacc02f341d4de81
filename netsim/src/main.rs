//! `netsim`: labs from the command line.

fn main() {}
