//! Reports as a table for people.

use std::fmt::Display;

use super::Report;
use crate::router::{Filtering, Mapping, PortAllocation};

const HEADINGS: [&str; 13] = [
    "kind",
    "NATs",
    "mapping",
    "ports",
    "hairpin",
    "own port",
    "filtering",
    "2 hosts, 1 port",
    "leaves",
    "WAN input",
    "poisoned",
    "low TTL",
    "verdict",
];

/// One line per report. What differs from what is expected is marked, with the expected value.
pub fn table(reports: &[Report]) -> String {
    let mut rows = vec![HEADINGS.map(str::to_owned)];
    rows.extend(reports.iter().map(row));
    let widths: Vec<usize> = (0..HEADINGS.len())
        .map(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or_default())
        .collect();
    let lines = rows.iter().map(|row| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn row(report: &Report) -> [String; HEADINGS.len()] {
    let (observed, expected) = (&report.observed, &report.expected);
    let leaves = |udp, web, other| {
        let words =
            [(udp, "UDP"), (web, "TCP 443"), (other, "TCP")].into_iter().filter(|(leaves, _)| *leaves);
        words.map(|(_, word)| word).collect::<Vec<_>>().join("+")
    };
    [
        report.kind.to_string(),
        cell(observed.nats, expected.nats),
        cell(observed.mapping.map_or("-", mapping), expected.mapping.map_or("-", mapping)),
        cell(
            observed.allocation.map_or_else(|| "-".to_owned(), allocation),
            expected.allocation.map_or_else(|| "-".to_owned(), allocation),
        ),
        cell(yes(observed.hairpin), yes(expected.hairpin)),
        cell(yes(observed.port_preserved), yes(expected.port_preserved)),
        cell(observed.filtering.map_or("-", filtering), expected.filtering.map_or("-", filtering)),
        cell(yes(observed.shared_port), yes(expected.shared_port)),
        cell(
            leaves(observed.udp, observed.tcp_web, observed.tcp_other),
            leaves(expected.udp, expected.tcp_web, expected.tcp_other),
        ),
        cell(observed.input, expected.input),
        cell(yes(observed.poisoned), yes(expected.poisoned)),
        cell(ttl(observed.low_ttl), ttl(expected.low_ttl)),
        if report.agrees { "ok" } else { "FAIL" }.to_owned(),
    ]
}

fn cell<T: PartialEq + Display>(observed: T, expected: T) -> String {
    if observed == expected { observed.to_string() } else { format!("{observed} (not {expected})") }
}

fn yes(value: Option<bool>) -> &'static str {
    match value {
        Some(true) => "yes",
        Some(false) => "no",
        None => "-",
    }
}

fn ttl(value: Option<usize>) -> String {
    value.map_or_else(|| "-".to_owned(), |ttl| ttl.to_string())
}

fn mapping(mapping: Mapping) -> &'static str {
    match mapping {
        Mapping::EndpointIndependent => "EIM",
        Mapping::AddressDependent => "ADM",
        Mapping::AddressAndPortDependent => "APDM",
    }
}

fn allocation(allocation: PortAllocation) -> String {
    match allocation {
        PortAllocation::Random => "random".to_owned(),
        PortAllocation::Sequential { step } => format!("+{step}"),
        PortAllocation::Preserving => "own first".to_owned(),
    }
}

fn filtering(filtering: Filtering) -> &'static str {
    match filtering {
        Filtering::EndpointIndependent => "EIF",
        Filtering::AddressDependent => "ADF",
        Filtering::AddressAndPortDependent => "APDF",
    }
}
