//! Every interval of the agent, with its source.

use std::time::Duration;

/// Between two checks, over all pairs: Ta (RFC 8445, 14.2, not less than 5 ms).
pub const TA: Duration = Duration::from_millis(5);

/// Checks that may leave at once after a pause: see the crate's page on pacing.
pub const TA_DEPTH: u32 = 4;

/// Pauses between the checks of one pair; after the last one the pair has failed. Seven retransmissions, as Rc in RFC 8489
/// 6.2.1, but starting at 200 ms: see the crate's page on retransmission.
pub const RETRANSMIT: [Duration; 8] = [
    Duration::from_millis(200),
    Duration::from_millis(200),
    Duration::from_millis(300),
    Duration::from_millis(400),
    Duration::from_millis(600),
    Duration::from_millis(1000),
    Duration::from_millis(1500),
    Duration::from_millis(1000),
];

/// A check that was triggered by one from the other side is not sent sooner than this after the last on the same
/// pair: two sides must not excite each other.
pub const TRIGGER_SPACING: Duration = Duration::from_millis(20);

/// How long other pairs are still tried after the first was selected, for a better one.
pub const SETTLE: Duration = Duration::from_millis(1000);

/// Mean interval of consent checks (RFC 7675, 5.1); each is drawn from 0.8 to 1.2 times this.
pub const CONSENT_INTERVAL: Duration = Duration::from_secs(5);

/// Consent is lost after this long without an answer (RFC 7675, 5.1).
pub const CONSENT_EXPIRY: Duration = Duration::from_secs(30);

/// Pause before the second round; doubled each time up to [`ROUND_PAUSE_MAX`], and drawn from 0.8 to 1.2 times that.
pub const ROUND_PAUSE: Duration = Duration::from_secs(2);

/// Longest pause between rounds: a session that is stuck on the relay for more than a minute after its network has become better is the field's
/// first complaint.
pub const ROUND_PAUSE_MAX: Duration = Duration::from_secs(60);

/// Most pairs of a checklist (RFC 8445, 6.1.2.5).
pub const MAX_PAIRS: usize = 100;

/// Transactions of one pair that an answer is still accepted for.
pub const MAX_OUTSTANDING: usize = 10;
