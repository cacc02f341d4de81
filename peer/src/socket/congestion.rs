//! A congestion controller that knows of path switches.
//!
//! QUIC sees one stable address while the path under it changes, so it keeps the old path's congestion window,
//! and losses of the old path would cut the new one's. This controller shares a [`PathEpoch`] with the path socket: on a
//! switch it starts a fresh Cubic (at half the window that the same kind of path last had, if any), ignores what
//! happens to packets sent before, and leaves room for new packets while old ones are still counted as in flight.
//!
//! It also knows of sleep. What was under way when one side fell asleep is acknowledged when it wakes; QUIC takes that for a round trip, and paces by it:
//! a window in a minute instead of in a tenth of a second. While the smoothed round-trip time is far beyond what packets have just taken, the window that the
//! pacer is told is larger by as much, which makes the pace the right one.

use std::any::Any;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics, Cubic, CubicConfig};
use quinn_proto::RttEstimator;

/// What a connection's controller shares with the path socket.
#[derive(Debug)]
pub(crate) struct PathEpoch {
    generation: AtomicU64,
    state: Mutex<EpochState>,
}

#[derive(Debug, Clone, Copy)]
struct EpochState {
    switched: Instant,
    direct: bool,
}

impl PathEpoch {
    pub(crate) fn new(now: Instant) -> Self {
        Self { generation: AtomicU64::new(0), state: Mutex::new(EpochState { switched: now, direct: false }) }
    }

    /// The path has been switched; packets sent from `now` on take the new one.
    pub(crate) fn advance(&self, direct: bool, now: Instant) {
        *self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner) =
            EpochState { switched: now, direct };
        self.generation.fetch_add(1, Ordering::Release);
    }

    fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    fn state(&self) -> EpochState {
        *self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Makes [`SwitchAware`] controllers.
#[derive(Debug)]
pub(crate) struct SwitchAwareConfig(pub(crate) Arc<PathEpoch>);

impl ControllerFactory for SwitchAwareConfig {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(SwitchAware::new(self.0.clone(), now, current_mtu))
    }
}

/// Cubic that starts anew on every path switch.
#[derive(Debug, Clone)]
struct SwitchAware {
    epoch: Arc<PathEpoch>,
    /// The generation that `cubic` belongs to.
    seen: u64,
    switched: Instant,
    direct: bool,
    cubic: Cubic,
    mtu: u16,
    in_flight: u64,
    /// Bytes in flight that were sent before the last switch.
    stale: u64,
    /// The last window on a relayed and on a direct path.
    last_window: [u64; 2],
    /// How long the last packets took to be acknowledged.
    recent: [Duration; RECENT],
    /// By how much QUIC's round-trip time exceeds that, if it does by far; else 1.
    excess: u64,
}

/// How many samples tell what the path is like.
const RECENT: usize = 4;

/// The smoothed round-trip time follows its samples closer than that on any network (an eighth of the difference with each; RFC 9002, section 5.3).
const FAR: u64 = 8;

/// quinn does not pace beyond.
const LARGEST_PACED: u64 = u32::MAX as u64 - 1;

impl SwitchAware {
    fn new(epoch: Arc<PathEpoch>, now: Instant, mtu: u16) -> Self {
        let state = epoch.state();
        Self {
            seen: epoch.generation(),
            switched: now,
            direct: state.direct,
            cubic: Cubic::new(Arc::new(CubicConfig::default()), now, mtu),
            epoch,
            mtu,
            in_flight: 0,
            stale: 0,
            last_window: [0; 2],
            recent: [Duration::ZERO; RECENT],
            excess: 1,
        }
    }

    /// A packet was acknowledged after `took`; `smoothed` does not know of that yet.
    fn compare(&mut self, took: Duration, smoothed: Duration) {
        self.recent.rotate_right(1);
        self.recent[0] = took;
        let next = smoothed.max(smoothed * 7 / 8 + took / 8);
        let least = self.recent.iter().min().copied().unwrap_or_default();
        let excess = next.as_micros().checked_div(least.as_micros()).unwrap_or(1) as u64;
        self.excess = if excess >= FAR { excess } else { 1 };
    }

    fn catch_up(&mut self, now: Instant) {
        let generation = self.epoch.generation();
        if generation == self.seen {
            return;
        }
        let state = self.epoch.state();
        self.last_window[usize::from(self.direct)] = self.cubic.window();
        self.seen = generation;
        self.direct = state.direct;
        self.switched = state.switched;
        self.stale = self.in_flight;
        // Careful resume: half of what this kind of path carried last.
        let mut config = CubicConfig::default();
        let initial = Cubic::new(Arc::new(config.clone()), now, self.mtu).initial_window();
        config.initial_window(initial.max(self.last_window[usize::from(self.direct)] / 2));
        self.cubic = Cubic::new(Arc::new(config), now, self.mtu);
    }
}

impl Controller for SwitchAware {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.catch_up(now);
        self.in_flight += bytes;
        self.cubic.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        self.catch_up(now);
        self.compare(now.saturating_duration_since(sent), rtt.get());
        self.in_flight = self.in_flight.saturating_sub(bytes);
        if sent < self.switched {
            self.stale = self.stale.saturating_sub(bytes);
        } else {
            self.cubic.on_ack(now, sent, bytes, app_limited, rtt);
        }
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, largest: Option<u64>) {
        self.in_flight = in_flight;
        self.stale = self.stale.min(in_flight);
        self.cubic.on_end_acks(now, in_flight, app_limited, largest);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, persistent: bool, lost_bytes: u64) {
        self.catch_up(now);
        self.in_flight = self.in_flight.saturating_sub(lost_bytes);
        if sent < self.switched {
            self.stale = self.stale.saturating_sub(lost_bytes);
        } else {
            self.cubic.on_congestion_event(now, sent, persistent, lost_bytes);
        }
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.mtu = new_mtu;
        self.cubic.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        if self.epoch.generation() == self.seen {
            let window = self.cubic.window();
            window.saturating_mul(self.excess).min(LARGEST_PACED).max(window) + self.stale
        } else {
            // A switch that no packet has followed yet: room for a first flight beside what is still out there.
            self.in_flight + self.cubic.initial_window()
        }
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = self.cubic.metrics();
        metrics.congestion_window = self.window();
        metrics
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.cubic.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn controller() -> (Arc<PathEpoch>, SwitchAware, Instant) {
        let now = Instant::now();
        let epoch = Arc::new(PathEpoch::new(now));
        (epoch.clone(), SwitchAware::new(epoch, now, 1200), now)
    }

    #[test]
    fn losses_of_the_old_path_do_not_cut_the_new_one() {
        let (epoch, mut controller, start) = controller();
        controller.on_sent(start, 100_000, 1);
        let switch = start + Duration::from_millis(10);
        epoch.advance(true, switch);
        controller.on_sent(switch + Duration::from_millis(1), 1200, 2);
        let window = controller.window();
        controller.on_congestion_event(switch + Duration::from_millis(2), start, false, 50_000);
        assert_eq!(controller.cubic.window(), controller.initial_window());
        assert!(controller.window() < window, "lost bytes no longer widen the window");
        controller.on_congestion_event(
            switch + Duration::from_millis(9),
            switch + Duration::from_millis(1),
            false,
            1200,
        );
        assert!(controller.cubic.window() < controller.initial_window());
    }

    #[test]
    fn there_is_room_at_once_although_old_bytes_are_in_flight() {
        let (epoch, mut controller, start) = controller();
        controller.on_sent(start, 1_000_000, 1);
        epoch.advance(true, start + Duration::from_millis(10));
        assert!(controller.window() >= 1_000_000 + controller.initial_window());
        controller.on_sent(start + Duration::from_millis(11), 1200, 2);
        assert!(controller.window() >= 1_000_000 + controller.initial_window());
        controller.on_end_acks(start + Duration::from_millis(12), 1200, false, Some(1));
        assert!(controller.window() <= controller.initial_window() + 1200);
    }

    #[test]
    fn a_known_kind_of_path_resumes_at_half_its_window() {
        let (epoch, mut controller, start) = controller();
        controller.last_window = [0, 800_000];
        epoch.advance(true, start);
        controller.on_sent(start, 1200, 1);
        assert_eq!(controller.cubic.window(), 400_000);
    }

    #[test]
    fn after_a_sleep_the_pace_is_that_of_the_path() {
        const MS: Duration = Duration::from_millis(1);
        let (_epoch, mut controller, _) = controller();
        let window = controller.window();
        // As quinn sees it: 90 s of sleep, then the path again.
        let mut smoothed = 80 * MS;
        let mut pace = Vec::new();
        for (index, took) in [80; 10].into_iter().chain([90_000]).chain([80; 60]).enumerate() {
            controller.compare(took * MS, smoothed);
            smoothed = smoothed * 7 / 8 + took * MS / 8;
            // Round trips that a window takes.
            pace.push((index, smoothed.as_secs_f64() / 0.08 * window as f64 / controller.window() as f64));
        }
        assert!(pace.iter().all(|(_, trips)| *trips < FAR as f64 + 0.1), "{pace:?}");
        assert_eq!(controller.window(), window, "it is over");
        // A queue that fills and empties is none of that.
        for took in [80, 200, 500, 900, 1_200, 1_200, 1_200, 1_000, 600, 300, 150, 80, 80] {
            controller.compare(took * MS, smoothed);
            smoothed = smoothed * 7 / 8 + took * MS / 8;
            assert_eq!(controller.window(), window, "{took}");
        }
    }
}
