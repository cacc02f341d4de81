//! Everything at once: six peers in a lab, a stream between every two of them, and all that can happen to a network, at random
//! times that follow from a seed.

pub mod blocks;
pub mod plan;
