//! What peers and rendezvous servers say to each other.
