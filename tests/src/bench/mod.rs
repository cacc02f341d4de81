//! The benchmark of reflection and relay: the program under test is a process of its own, whose CPU time the kernel counts; the load
//! comes from here.
//!
//! Every load is closed: a step sends what the socket buffers hold, then waits until all of it has arrived, so that nothing is lost and
//! every program under test sees the same. Load and program share one core where CPU time alone counts, the program under a policy
//! that does not preempt (`SCHED_BATCH`): then it always finds the whole step waiting, however busy the machine is.

pub mod contender;
pub mod lanes;
pub mod measure;
pub mod registrar;
pub mod streams;
pub mod subject;
pub mod turn;
