//! The daemon and its commands, without a network between peers.
