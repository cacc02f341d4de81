//! wip
mod exchange;
mod finding;
mod lifetime;
mod measurement;
#[cfg(test)]
mod model;
