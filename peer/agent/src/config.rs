//! What an agent is made of, and every timer with its source.

use std::fmt;
use std::time::Duration;

use rendezvous_wire::message::{Credentials, Role};

/// Most checks of a pair in one volley: Rc of RFC 8489, section 6.2.1.
pub const RC: usize = 7;

/// Most candidate pairs of an agent (RFC 8445, section 6.1.2.5).
pub const MAX_PAIRS: usize = 100;

/// Most peer-reflexive candidates that an agent remembers. Each is an address that the other side made us send to
/// without naming it; a peer behind one NAT shows one per socket, and more only while it moves.
pub const MAX_PEER_REFLEXIVE: usize = 32;

/// What an [`Agent`](crate::Agent) needs to know at its start: one side of an introduction.
#[derive(Clone)]
pub struct Config {
    /// Our role to begin with; a conflict may change it (RFC 8445, 7.3.1.1).
    pub role: Role,
    /// Our credentials: the other side's checks are authenticated by this password.
    pub local: Credentials,
    /// The other side's credentials.
    pub remote: Credentials,
    /// Seeds transaction ids, tie-breaker and jitter. Random and secret outside of tests.
    pub seed: u64,
    /// Times.
    pub timers: Timers,
}

impl Config {
    /// A configuration with the default [`Timers`].
    pub fn new(role: Role, local: Credentials, remote: Credentials, seed: u64) -> Self {
        Self { role, local, remote, seed, timers: Timers::default() }
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("role", &self.role)
            .field("local", &self.local)
            .field("remote", &self.remote)
            .field("timers", &self.timers)
            .finish_non_exhaustive()
    }
}

/// Every time that an agent goes by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timers {
    /// Ta, the pace of checks over all pairs. RFC 8445, 14.2: 50 ms unless there is reason for another value, never
    /// below 5 ms; shorter values count as 5 ms. Default 10 ms: a check is about 130 bytes, so this is about
    /// 100 kbit/s while checks last.
    pub ta: Duration,
    /// Checks that may leave together after a pause, the average pace being kept. RFC 8445 has 1. Default 4: the
    /// likeliest address per family, and two more.
    pub burst: u32,
    /// What follows the n-th check of a volley: the wait for the next, after the last one the wait before the pair
    /// has failed. RFC 8489, 6.2.1, doubles from an RTO of 500 ms and gives up after 39.5 s. Default 200, 200, 400,
    /// 600, 1000, 1600, 2000 ms: four checks in the first 0.8 s, seven in 4 s, failed after 6 s.
    pub intervals: [Duration; RC],
    /// Least time between two checks of a pair of which the second is triggered. Default 20 ms: on a shorter path
    /// the answer to the first is there before, and makes the second needless.
    pub trigger_spacing: Duration,
    /// How long other pairs are still checked after a path was selected, in the hope of a better one. Default 1 s.
    pub settle: Duration,
    /// Between consent checks, randomised by 0.8 to 1.2. Default 5 s (RFC 7675, section 5.1).
    pub consent_interval: Duration,
    /// Consent is lost after so long without an answer. Default 30 s (RFC 7675, section 5.1).
    pub consent_timeout: Duration,
    /// How long traffic on the selected path may go unanswered before the path is in doubt: three round trips, at least and
    /// at most this. Default 200 ms, which no acknowledgement exceeds on a path of home use (`max_ack_delay` of RFC 9000 is
    /// 25 ms), and 1 s.
    pub silence: [Duration; 2],
    /// How long a path stays in doubt before it is given up, at least. Default 1 s: twenty checks, of which none is answered by
    /// chance once in 10^20 where every tenth fails.
    pub doubt: Duration,
    /// The grid on which rounds of checks are repeated while no path is selected. Default 4 s: the rounds of an
    /// agent that finds nothing begin 0, 8, 16, 32, 64, 128, 192 ... s after its start, each up to a quarter of a
    /// grid step later.
    pub grid: Duration,
    /// Rounds are at most `2^max_level` grid steps apart. Default 4: 64 s.
    pub max_level: u32,
}

impl Default for Timers {
    fn default() -> Self {
        let ms = Duration::from_millis;
        Self {
            ta: ms(10),
            burst: 4,
            intervals: [ms(200), ms(200), ms(400), ms(600), ms(1000), ms(1600), ms(2000)],
            trigger_spacing: ms(20),
            settle: ms(1000),
            consent_interval: ms(5000),
            consent_timeout: ms(30_000),
            silence: [ms(200), ms(1000)],
            doubt: ms(1000),
            grid: ms(4000),
            max_level: 4,
        }
    }
}

impl Timers {
    /// From the first check of a volley to its failure; a transaction is remembered for as long.
    pub fn volley(&self) -> Duration {
        self.intervals.iter().sum()
    }

    /// From the first check of a volley until three of its checks are unanswered.
    pub(crate) fn patience(&self) -> Duration {
        self.intervals[..3].iter().sum()
    }
}
