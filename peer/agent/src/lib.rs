//! The connectivity agent.
