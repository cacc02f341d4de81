//! Everything at once: six peers in a lab, a stream between every two of them, and all that can happen to a network, at random
//! times that follow from a seed.

pub mod blocks;
mod cause;
mod conductor;
mod member;
mod mesh;
pub mod plan;
mod report;

pub use cause::{Cause, Happening, Late, Record, Stall, Whereabouts};
pub use conductor::{Manner, run};
pub use member::Load;
pub use plan::Settings;
pub use report::{Judged, Report, Stream};
