//! What an emulated line carries, and how exact it is.

use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use netsim::{Host, Impairment, Lab, RouterKind, SiteConfig};
use nix::sys::socket::{setsockopt, sockopt};

use super::units;

/// A line and how hard to try it.
#[derive(Debug, Args)]
pub(super) struct Bench {
    /// One-way delay of the line.
    #[arg(long, value_parser = units::duration, default_value = "20ms")]
    delay: Duration,
    /// Seconds per offered load.
    #[arg(long, default_value_t = 2)]
    seconds: u64,
}

/// UDP payload of a datagram; 1,400 bytes fit every MTU in the lab.
const PAYLOAD: usize = 1_400;
/// Datagrams handed to the kernel in one call (UDP GSO), as fast QUIC senders do.
const SEGMENTS: usize = 16;
const ROUND_TRIPS: usize = 300;

impl Bench {
    pub(super) fn execute(&self, seed: u64) -> Result<ExitCode> {
        let mut lab = Lab::new(seed)?;
        let server = lab.add_server("server")?;
        let plain = lab.add_site("plain", SiteConfig::new(RouterKind::EimApdf))?.host(0);
        let line = Impairment::none().delay(self.delay);
        let config = SiteConfig::new(RouterKind::EimApdf).up(line.clone()).down(line);
        let site = lab.add_site("line", config)?;
        let host = site.host(0);

        let without = round_trips(&plain, &server)?;
        let with = round_trips(&host, &server)?;
        println!("round trip without a line   {}", percentiles(&without, Duration::ZERO));
        println!("beyond 2 x the delay        {}", percentiles(&with, 2 * self.delay));
        for offered in [100, 200, 400, 800, 1600] {
            let (sent, received) = self.blast(&host, &server, offered)?;
            let rate = |datagrams: u64| datagrams * PAYLOAD as u64 * 8 / self.seconds / 1_000_000;
            let lost = sent.saturating_sub(received) as f64 / sent.max(1) as f64;
            println!(
                "UDP, {offered:>4} Mbit/s offered   {:>4} Mbit/s sent, {:>4} Mbit/s received, {:.2} % lost",
                rate(sent),
                rate(received),
                100.0 * lost
            );
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Datagrams sent and received at an offered load in Mbit/s.
    fn blast(&self, from: &Host, to: &Host, offered: u64) -> Result<(u64, u64)> {
        let receiver = to.run(|| UdpSocket::bind((to.ipv4(), 0)))?;
        receiver.set_read_timeout(Some(Duration::from_millis(50)))?;
        setsockopt(&receiver, sockopt::RcvBuf, &(4 << 20))?;
        let sender = from.run(|| UdpSocket::bind((from.ipv4(), 0)))?;
        sender.connect(receiver.local_addr()?)?;
        setsockopt(&sender.as_fd(), sockopt::UdpGsoSegment, &i32::try_from(PAYLOAD)?)?;
        let (done, received) = (AtomicBool::new(false), AtomicU64::new(0));
        let sent = thread::scope(|scope| {
            scope.spawn(|| {
                let mut buffer = [0; PAYLOAD];
                loop {
                    match receiver.recv(&mut buffer) {
                        Ok(_) => received.fetch_add(1, Ordering::Relaxed),
                        Err(_) if done.load(Ordering::Relaxed) => break,
                        Err(_) => continue,
                    };
                }
            });
            let sent = self.send_paced(&sender, offered);
            thread::sleep(2 * self.delay);
            done.store(true, Ordering::Relaxed);
            sent
        });
        Ok((sent, received.into_inner()))
    }

    fn send_paced(&self, sender: &UdpSocket, offered: u64) -> u64 {
        let burst = vec![0; PAYLOAD * SEGMENTS];
        let interval = Duration::from_nanos(burst.len() as u64 * 8 * 1_000 / offered);
        let (start, mut sent) = (Instant::now(), 0);
        let mut next = start;
        while start.elapsed() < Duration::from_secs(self.seconds) {
            if sender.send(&burst).is_ok() {
                sent += SEGMENTS as u64;
            }
            next += interval;
            thread::sleep(next.saturating_duration_since(Instant::now()));
        }
        sent
    }
}

/// Round trips of single datagrams, sorted.
fn round_trips(from: &Host, to: &Host) -> Result<Vec<Duration>> {
    let echo = to.run(|| UdpSocket::bind((to.ipv4(), 0)))?;
    let asker = from.run(|| UdpSocket::bind((from.ipv4(), 0)))?;
    asker.connect(echo.local_addr()?)?;
    asker.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut trips = thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..=ROUND_TRIPS {
                let mut buffer = [0; 16];
                if let Ok((length, from)) = echo.recv_from(&mut buffer) {
                    // A lost answer shows as the asker's timeout.
                    let _ = echo.send_to(&buffer[..length], from);
                }
            }
        });
        // The first one resolves addresses on the way.
        let trips = (0..=ROUND_TRIPS).map(|_| {
            let start = Instant::now();
            asker.send(b"there and back")?;
            asker.recv(&mut [0; 16])?;
            Ok(start.elapsed())
        });
        trips.skip(1).collect::<Result<Vec<_>>>()
    })?;
    trips.sort_unstable();
    Ok(trips)
}

fn percentiles(sorted: &[Duration], base: Duration) -> String {
    let at = |percent: usize| sorted[(sorted.len() - 1) * percent / 100].saturating_sub(base);
    format!("median {:.0?}, 90 % {:.0?}, 99 % {:.0?}, most {:.0?}", at(50), at(90), at(99), at(100))
}
