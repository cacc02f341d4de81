//! What one peer, one source address and all of them together may use. Nothing here reads a clock.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use rendezvous_wire::PeerId;
use rendezvous_wire::candidate::MAX_CANDIDATES;
use rendezvous_wire::relay::Channel;
use serde::{Deserialize, Serialize};

/// Bounds of a server. [`Limits::default`] suits a small VPS. A source is an IPv4 address or an IPv6 /64, a prefix an IPv4 /24 or an IPv6 /48.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Registrations at a time. A waiting QUIC connection costs about 37 kB.
    pub registrations: usize,
    /// Registrations at a time from one source: a carrier NAT hides thousands of homes.
    pub registrations_per_source: usize,
    /// Registrations at a time from one prefix.
    pub registrations_per_prefix: usize,
    /// Registrations at a time under one key; one more ends the oldest, which is most likely a process that has
    /// died without a word.
    pub registrations_per_peer: usize,
    /// Relay channels at a time; at most half of all numbers, so that a free one is found at once.
    pub channels: usize,
    /// Relay channels at a time that one key has asked for or is the target of.
    pub channels_per_peer: usize,
    /// Introductions at a time that one registration may have asked for.
    pub asked_per_registration: usize,
    /// Introductions at a time in which one registration may be the target.
    pub answered_per_registration: usize,
    /// Introductions at a time from one registration to one other, so that no stranger fills a peer's share.
    pub introductions_per_pair: usize,
    /// New signalling connections per source. A handshake costs about 0.2 ms of CPU. All peers behind one carrier's address come back at the
    /// same time when the server was away.
    pub connecting: Rate,
    /// The same per prefix.
    pub connecting_per_prefix: Rate,
    /// Registrations per key.
    pub registering: Rate,
    /// Candidates in one registration.
    pub candidates: usize,
    /// Introductions asked for per key.
    pub introducing: Rate,
    /// Introductions asked for per source, whatever the number of registrations there.
    pub introducing_per_source: Rate,
    /// The same per prefix.
    pub introducing_per_prefix: Rate,
    /// Meetings asked for per registration; an introduction asks for one a second at most.
    pub meeting: Rate,
    /// Kilobits a second that the relay carries in all, shared fairly among those who send; 0: no limit.
    pub relay_kbit: u64,
    /// Kilobits a second that the relay carries of what one key sends; 0: no limit.
    pub relay_kbit_per_peer: u64,
    /// Megabytes that the relay carries from and to one key in a calendar month (UTC); 0: no limit.
    pub relay_mb_per_month: u64,
    /// Unauthenticated STUN answers per source and relay thread. What an attacker can have us send to a victim
    /// whose address he forges; peers that wait for a server to come back ask four times a second.
    pub reflecting: Rate,
    /// Bind requests per registration and relay thread; each one costs an HMAC and a message to the other threads.
    pub binding: Rate,
    /// Bytes of notices waiting for a peer that does not read; one more and its connection is closed.
    pub queued_bytes: usize,
    /// How long a binding lives without a bind request: as long as a permission of TURN (RFC 8656, section 9). Peers renew
    /// it at least three times within, so two renewals may be lost.
    #[serde(rename = "lease_seconds", with = "seconds")]
    pub lease: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            registrations: 16_384,
            registrations_per_source: 4_096,
            registrations_per_prefix: 8_192,
            registrations_per_peer: 16,
            channels: 262_144,
            channels_per_peer: 8_192,
            asked_per_registration: 256,
            answered_per_registration: 4_096,
            introductions_per_pair: 16,
            connecting: Rate::new(4_096, 256),
            connecting_per_prefix: Rate::new(8_192, 512),
            registering: Rate::new(64, 4),
            candidates: MAX_CANDIDATES,
            introducing: Rate::new(128, 8),
            introducing_per_source: Rate::new(4_096, 256),
            introducing_per_prefix: Rate::new(8_192, 512),
            meeting: Rate::new(128, 16),
            relay_kbit: 0,
            relay_kbit_per_peer: 0,
            relay_mb_per_month: 0,
            reflecting: Rate::new(1_024, 512),
            binding: Rate::new(64, 16),
            queued_bytes: 64 * 1024,
            lease: Duration::from_secs(300),
        }
    }
}

impl Limits {
    /// [`Limits::channels`], never more than half of all channel numbers.
    pub(crate) fn channel_bound(&self) -> usize {
        self.channels.min(Channel::COUNT as usize / 2)
    }

    /// Bytes a second that the relay carries in all.
    pub(crate) fn relay_rate(&self) -> Option<u64> {
        bytes_a_second(self.relay_kbit)
    }

    /// Bytes a second of one key.
    pub(crate) fn relay_rate_per_peer(&self) -> Option<u64> {
        bytes_a_second(self.relay_kbit_per_peer)
    }

    /// Bytes of one key in a month.
    pub(crate) fn relay_month(&self) -> Option<u64> {
        (self.relay_mb_per_month > 0).then(|| self.relay_mb_per_month.saturating_mul(1_000_000))
    }
}

fn bytes_a_second(kbit: u64) -> Option<u64> {
    (kbit > 0).then(|| kbit.saturating_mul(125))
}

mod seconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(duration.as_secs())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        u64::deserialize(deserializer).map(Duration::from_secs)
    }
}

/// So many at once, and so many a second in the long run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Written", into = "Written")]
pub struct Rate {
    burst: u32,
    interval: Duration,
}

/// As it stands in the configuration.
#[derive(Serialize, Deserialize)]
#[serde(rename = "rate", deny_unknown_fields)]
struct Written {
    burst: u32,
    per_second: u32,
}

impl From<Written> for Rate {
    fn from(written: Written) -> Self {
        Self::new(written.burst, written.per_second)
    }
}

impl From<Rate> for Written {
    fn from(rate: Rate) -> Self {
        let per_second = 1_000_000_000 / rate.interval.as_nanos().max(1);
        Self { burst: rate.burst, per_second: u32::try_from(per_second).unwrap_or(u32::MAX) }
    }
}

impl Rate {
    /// `burst` at once, `per_second` (at least 1) in the long run.
    pub const fn new(burst: u32, per_second: u32) -> Self {
        let per_second = if per_second == 0 { 1 } else { per_second };
        Self { burst, interval: Duration::from_nanos(1_000_000_000 / per_second as u64) }
    }
}

/// A token bucket, kept as the moment at which it will be full again (the generic cell rate algorithm).
#[derive(Debug, Clone, Copy, Default)]
pub struct Bucket {
    full_at: Option<Instant>,
}

impl Bucket {
    /// Takes one token; `false` when there is none.
    pub fn take(&mut self, rate: Rate, now: Instant) -> bool {
        let full_at = self.full_at.map_or(now, |at| at.max(now)) + rate.interval;
        if full_at - now > rate.interval * rate.burst {
            return false;
        }
        self.full_at = Some(full_at);
        true
    }
}

/// A source of packets as far as quotas go: an IPv4 address, or the /64 of an IPv6 one, since a whole /64 belongs to
/// one site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Source(u64);

impl From<IpAddr> for Source {
    fn from(ip: IpAddr) -> Self {
        match ip.to_canonical() {
            // Prefixes of real sources (2000::/3, fc00::/7) have high bits set, so the families do not meet.
            IpAddr::V4(ip) => Self(u64::from(ip.to_bits())),
            IpAddr::V6(ip) => Self((ip.to_bits() >> 64) as u64),
        }
    }
}

impl Source {
    /// The prefix that it belongs to: an IPv4 /24, or the /48 of an IPv6 address, which is what one customer may have (RFC 6177).
    pub fn prefix(self) -> Self {
        match u32::try_from(self.0) {
            Ok(v4) => Self(u64::from(v4 & !0xff)),
            Err(_) => Self(self.0 & !0xffff),
        }
    }
}

/// Quotas of a key are counted like those of a source. Whoever makes keys until one collides with another's must match 64 bits.
impl From<PeerId> for Source {
    fn from(peer: PeerId) -> Self {
        let half = peer.as_bytes().first_chunk().copied().unwrap_or_default();
        Self(u64::from_be_bytes(half))
    }
}

/// One bucket per source in bounded memory and without eviction: sources share a bucket when their keyed hashes
/// collide, and nobody can choose whom to collide with.
#[derive(Debug)]
pub struct SourceBuckets {
    buckets: Box<[Bucket]>,
    keys: [u64; 2],
    rate: Rate,
}

impl SourceBuckets {
    /// Buckets in a table: 16 bytes each.
    const COUNT: usize = 1 << 14;

    /// Full buckets, hashed under `keys`.
    pub fn new(rate: Rate, keys: [u64; 2]) -> Self {
        Self { buckets: vec![Bucket::default(); Self::COUNT].into_boxed_slice(), keys, rate }
    }

    /// Takes one token of this source; `false` when there is none.
    pub fn take(&mut self, source: Source, now: Instant) -> bool {
        let cell =
            folded_multiply(folded_multiply(source.0 ^ self.keys[0], self.keys[1] | 1), self.keys[0] | 1);
        self.buckets[cell as usize % Self::COUNT].take(self.rate, now)
    }

    /// From now on at this rate.
    pub fn set_rate(&mut self, rate: Rate) {
        self.rate = rate;
    }
}

/// Buckets of sources, and of the prefixes that they belong to.
#[derive(Debug)]
pub struct PrefixBuckets {
    sources: SourceBuckets,
    prefixes: SourceBuckets,
}

impl PrefixBuckets {
    /// Full buckets, hashed under `keys`.
    pub fn new([source, prefix]: [Rate; 2], keys: [u64; 2]) -> Self {
        let others = keys.map(|key| key.rotate_left(32));
        Self { sources: SourceBuckets::new(source, keys), prefixes: SourceBuckets::new(prefix, others) }
    }

    /// Takes one token of this source and one of its prefix; `false` when either has none. A source that has none costs its prefix nothing.
    pub fn take(&mut self, source: Source, now: Instant) -> bool {
        self.sources.take(source, now) && self.prefixes.take(source.prefix(), now)
    }

    /// From now on at these rates.
    pub fn set_rates(&mut self, [source, prefix]: [Rate; 2]) {
        self.sources.set_rate(source);
        self.prefixes.set_rate(prefix);
    }
}

fn folded_multiply(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product >> 64) as u64 ^ product as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_gives_its_burst_and_then_its_rate() {
        let start = Instant::now();
        let rate = Rate::new(5, 10);
        let mut bucket = Bucket::default();
        assert_eq!((0..100).filter(|_| bucket.take(rate, start)).count(), 5);
        let later = start + Duration::from_millis(250);
        assert_eq!((0..100).filter(|_| bucket.take(rate, later)).count(), 2);
        let much_later = start + Duration::from_secs(3600);
        assert_eq!((0..100).filter(|_| bucket.take(rate, much_later)).count(), 5);
    }

    #[test]
    fn an_empty_rate_gives_nothing() {
        assert!(!Bucket::default().take(Rate::new(0, 1), Instant::now()));
    }

    #[test]
    fn sources_are_addresses_and_prefixes() {
        let source = |text: &str| Source::from(text.parse::<IpAddr>().unwrap());
        assert_eq!(source("192.0.2.1"), source("::ffff:192.0.2.1"));
        assert_ne!(source("192.0.2.1"), source("192.0.2.2"));
        assert_eq!(source("2001:db8::1"), source("2001:db8::ffff:1"));
        assert_ne!(source("2001:db8::1"), source("2001:db8:0:1::1"));
    }

    #[test]
    fn prefixes_are_wider_than_sources() {
        let prefix = |text: &str| Source::from(text.parse::<IpAddr>().unwrap()).prefix();
        assert_eq!(prefix("192.0.2.1"), prefix("192.0.2.200"));
        assert_ne!(prefix("192.0.2.1"), prefix("192.0.3.1"));
        assert_eq!(prefix("2001:db8:1:2::1"), prefix("2001:db8:1:ffff::1"));
        assert_ne!(prefix("2001:db8:1::1"), prefix("2001:db8:2::1"));
    }

    #[test]
    fn a_prefix_has_a_bucket_of_its_own() {
        let now = Instant::now();
        let rates = [Rate::new(2, 1), Rate::new(5, 1)];
        let mut buckets = PrefixBuckets::new(rates, [0x1234_5678_9abc_def0, 0x0fed_cba9_8765_4321]);
        let taken = (0..9).filter(|host| buckets.take(Source(0xc000_0200 + host % 4), now)).count();
        assert_eq!(taken, 5, "four sources of two each");
        assert!(buckets.take(Source(0xc000_0301), now), "another prefix");
    }

    #[test]
    fn one_source_does_not_spend_what_another_has() {
        let now = Instant::now();
        let mut buckets = SourceBuckets::new(Rate::new(3, 1), [0x1234_5678_9abc_def0, 0x0fed_cba9_8765_4321]);
        let (one, other) = (Source(0xc000_0201), Source(0xc000_0202));
        assert_eq!((0..9).filter(|_| buckets.take(one, now)).count(), 3);
        assert_eq!((0..9).filter(|_| buckets.take(other, now)).count(), 3);
    }

    #[test]
    fn hashing_spreads_neighbours() {
        let now = Instant::now();
        let mut buckets = SourceBuckets::new(Rate::new(1, 1), [7, 11]);
        let admitted = (0..1000u64).filter(|n| buckets.take(Source(0x0a00_0000 + n), now)).count();
        assert!(admitted > 900, "{admitted} of 1000 sources had a bucket of their own");
    }
}
