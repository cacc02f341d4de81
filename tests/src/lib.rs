//! End-to-end: real binaries, real sockets, the kernel's own NAT. What the tests in `lab/`, the demo, the matrix and the benchmarks
//! share.

#![forbid(unsafe_code)]

pub mod bench;
pub mod bulk;
pub mod cell;
pub mod chaos;
pub mod data;
pub mod echo;
pub mod failover;
pub mod figures;
pub mod herd;
pub mod household;
pub mod process;
pub mod program;
pub mod pulse;
pub mod servers;
pub mod simulation;
pub mod terminal;
pub mod world;
