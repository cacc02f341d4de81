//! The side that is measured.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;

use super::{Arrived, Counters, LONGEST, OVER, Order, REPORT, give, take};
use crate::service::{Answer, Cause, Exchange};

/// Flows at a time, of all sessions together: one each way. More would measure each other.
const FLOWS: usize = 2;

/// How much later than a flow's longest time its end may come: what was on its way, and the reset itself.
const GRACE: Duration = Duration::from_secs(10);

/// Lets itself be measured, by one at a time. A cheap handle; whom it is for is for its owner to decide.
#[derive(Debug, Clone)]
pub struct Bencher(Arc<Semaphore>);

impl Default for Bencher {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(FLOWS)))
    }
}

impl Bencher {
    /// Does what is asked. Ends with the flow, at the latest a little after [`LONGEST`].
    pub async fn serve(&self, order: Order, mut exchange: Exchange) {
        if order == Order::Count {
            let counters = Counters::of(exchange.hub().session());
            if exchange.respond(Answer::Accepted).await.is_ok()
                && exchange.send.write_all(&counters.to_bytes()).await.is_ok()
            {
                let _ = exchange.send.finish();
            }
            return;
        }
        let Ok(_turn) = self.0.try_acquire() else {
            return exchange.end(Answer::Failed(Cause::Busy)).await;
        };
        match order {
            Order::Give { millis } => {
                let time = Duration::from_millis(millis.into());
                if time > LONGEST {
                    return exchange.refuse().await;
                }
                if exchange.respond(Answer::Accepted).await.is_ok() {
                    give(&mut exchange.send, time).await;
                }
            }
            Order::Take => {
                if exchange.respond(Answer::Accepted).await.is_ok() {
                    let _ = tokio::time::timeout(LONGEST + GRACE, take_and_tell(&mut exchange)).await;
                    let _ = exchange.receive.stop(OVER.into());
                }
            }
            Order::Count => {}
        }
    }
}

/// Takes one flow, and tells how much it is while it comes.
async fn take_and_tell(exchange: &mut Exchange) {
    let arrived = Mutex::new(Arrived::default());
    let now = || *arrived.lock().unwrap_or_else(PoisonError::into_inner);
    let taking = take(&mut exchange.receive, |so_far| {
        *arrived.lock().unwrap_or_else(PoisonError::into_inner) = so_far;
    });
    tokio::pin!(taking);
    let mut ticks = tokio::time::interval(REPORT);
    let mut told = Arrived::default();
    loop {
        let over = tokio::select! {
            () = &mut taking => true,
            _ = ticks.tick() => false,
        };
        let report = now();
        if (over || report != told) && exchange.send.write_all(&report.to_bytes()).await.is_err() {
            return;
        }
        told = report;
        if over {
            let _ = exchange.send.finish();
            return;
        }
    }
}
