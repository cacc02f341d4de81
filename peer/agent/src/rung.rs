//! The rungs of the ladder by name, and what came of each.

use std::fmt;

use crate::birthday::Part;
use crate::meeting::Progress;

/// A way to a direct path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Rung {
    /// Simultaneous checks.
    Plain,
    /// Checks to a port that a router was asked for.
    PortMapped,
    /// Checks from fresh ports at a moment that the server gave, both NATs having been opened before.
    Primed,
    /// The same, toward ports that a NAT was expected to give next.
    Predicted,
    /// Many sockets on one side, many probes on the other.
    Birthday,
}

impl Rung {
    /// A short name for programs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::PortMapped => "port-mapped",
            Self::Primed => "primed",
            Self::Predicted => "predicted",
            Self::Birthday => "birthday",
        }
    }
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plain => "simultaneous checks",
            Self::PortMapped => "a port mapping",
            Self::Primed => "primed checks",
            Self::Predicted => "predicted ports",
            Self::Birthday => "birthday probing",
        })
    }
}

/// What was done on a rung above the plain one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum RungReport {
    /// Meetings: primed checks, or predicted ports.
    Meetings {
        /// Which of the two.
        rung: Rung,
        /// Meetings begun.
        attempts: usize,
        /// How far the best of them came.
        progress: Progress,
    },
    /// Birthday probing.
    Birthday {
        /// Our part.
        part: Part,
        /// Probes or knocks sent.
        sent: u64,
        /// It was broken off because the relay began to lose.
        broken_off: bool,
    },
}

impl fmt::Display for RungReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Meetings { rung, attempts, progress } => {
                let outcome = match progress {
                    Progress::NotBegun => "not needed so far",
                    Progress::Unmeasured => "our own ports could not be foretold",
                    Progress::Alone => "the other side did not take part",
                    Progress::HalfPrimed => "the other side was not heard of again",
                    Progress::Knocked => "both sides knocked",
                };
                write!(f, "{rung}: {attempts} begun, {outcome}")
            }
            Self::Birthday { part, sent, broken_off } => {
                let what = match part {
                    Part::Easy => "probes",
                    Part::Hard => "knocks",
                };
                let end = if *broken_off { ", broken off because the relay began to lose" } else { "" };
                write!(f, "{}: {sent} {what}{end}", Rung::Birthday)
            }
        }
    }
}
