//! Everything at once, for three minutes.

use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::ensure;
use end_to_end::chaos::{Load, Manner, Settings, run};
use libtest_mimic::Trial;

use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![trial("chaos::three_minutes_of_everything", three_minutes)]
}

/// Every kind of disturbance once at least. Few blocks: debug builds, and other tests run beside it.
fn three_minutes() -> anyhow::Result<()> {
    let seed = std::env::var("LAB_CHAOS_SEED").map_or(Ok(1), |text| text.parse())?;
    let settings = Settings {
        seed,
        lasts: Duration::from_secs(180),
        events_per_minute: 8.0,
        quiet_end: Duration::from_secs(20),
        servers: 1,
    };
    let manner = Manner { load: Load { rate: 10.0, ..Load::default() }, ..Manner::default() };
    let report = run(&settings, &manner, &AtomicBool::new(false))?;
    println!("{report}");
    ensure!(
        report.is_good(),
        "{report}\nonce more: LAB_CHAOS_SEED={seed} cargo test -p end-to-end --test lab -- chaos"
    );
    Ok(())
}
