//! What the doctor has found, what follows from it, and both in words. Pure.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use rendezvous_wire::RendezvousAddress;

use crate::portmap::Mapped;
use crate::signalling::ServerError;

use super::finding::{Allocation, FamilyFinding, Filtering, Mapping};
use super::lifetime::BindingLifetime;
use super::machine::{Machine, is_shared};
use super::tcp::Tcp;

/// Everything that was found.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Diagnosis {
    /// The rendezvous server at which it was measured.
    pub server: RendezvousAddress,
    /// Whether one can register with it: where it answered, and how long that took.
    pub signalling: Result<(SocketAddr, Duration), ServerError>,
    /// What happens to IPv4.
    pub ipv4: Family,
    /// What happens to IPv6.
    pub ipv6: Family,
    /// The first routers on the way, those that say so.
    pub hops: Vec<IpAddr>,
    /// What is left where UDP does not pass.
    pub tcp: Tcp,
    /// Where plain HTTP is sent instead; tried where nothing has answered.
    pub portal: Option<String>,
    /// Whether the router opens ports when it is asked to.
    pub port_mapping: PortMapping,
    /// The machine itself.
    pub machine: Machine,
}

/// What happens to one address family.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Family {
    /// The server has no address of this family; whether the machine has a global one.
    NotAtServer {
        /// It has.
        here: bool,
    },
    /// The machine has no way to addresses of this family.
    Absent,
    /// Packets leave, and nothing comes back.
    Broken {
        /// The address from which they leave.
        local: IpAddr,
    },
    /// It works.
    Works(FamilyFinding),
}

/// Whether the router opens ports when it is asked to (PCP, NAT-PMP, UPnP).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum PortMapping {
    /// Nobody has asked it.
    NotTested,
    /// It does; the mapping was given back.
    Works(Mapped),
    /// It would, but has no address of the Internet itself.
    BehindAnotherNat,
    /// It does not, or there is no router.
    Unavailable,
    /// The machine has an address of the Internet.
    NotNeeded,
}

impl PortMapping {
    /// A short name for programs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NotTested => "not-tested",
            Self::Works(mapped) => mapped.protocol.name(),
            Self::BehindAnotherNat => "behind-another-nat",
            Self::Unavailable => "unavailable",
            Self::NotNeeded => "not-needed",
        }
    }
}

/// How many NATs are on the way, as far as can be seen from inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Translators {
    /// It is not known.
    Unknown,
    /// None.
    None,
    /// At least one.
    One,
    /// The carrier's, and most likely one of one's own.
    Carrier,
}

/// With whom direct sessions are possible over IPv4.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reach {
    /// Too little is known.
    Unknown,
    /// Everybody, at once.
    Everybody,
    /// Everybody; with those whose NAT takes a random port for every destination after a few seconds.
    EverybodyInTime,
    /// Everybody but those whose NAT takes a random port for every destination and does not let in new ones.
    NotRandomPorts,
    /// Everybody but those whose NAT takes a port for every destination as well and does not let in new ones.
    NotPortDependent,
    /// Nobody directly, everybody over the relay: nothing answers over UDP, but TCP passes.
    RelayOnly,
    /// Nobody: nothing answers.
    Nobody,
}

impl Family {
    /// The finding, where there is one.
    pub fn finding(&self) -> Option<&FamilyFinding> {
        match self {
            Self::Works(finding) => Some(finding),
            _ => None,
        }
    }

    /// A short name for programs.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::NotAtServer { .. } => "not-at-server",
            Self::Absent => "absent",
            Self::Broken { .. } => "broken",
            Self::Works(_) => "works",
        }
    }
}

impl Translators {
    /// A short name for programs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::None => "none",
            Self::One => "one",
            Self::Carrier => "carrier",
        }
    }
}

impl Reach {
    /// A short name for programs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Everybody => "everybody",
            Self::EverybodyInTime => "everybody-in-time",
            Self::NotRandomPorts => "not-random-ports",
            Self::NotPortDependent => "not-port-dependent",
            Self::RelayOnly => "relay-only",
            Self::Nobody => "nobody",
        }
    }
}

impl fmt::Display for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unknown => "too little could be measured to say whom you reach directly",
            Self::Everybody => "direct with everybody who can use UDP",
            Self::EverybodyInTime => {
                "direct with everybody who can use UDP; with those whose NAT takes a random port for every destination it takes \
                 some seconds, over the relay meanwhile"
            }
            Self::NotRandomPorts => {
                "direct with most, with some after a few seconds; over the relay with those whose NAT takes a random port for every \
                 destination"
            }
            Self::NotPortDependent => {
                "direct with most, with some after a few seconds; over the relay with those whose NAT takes a port for every destination, as yours does"
            }
            Self::RelayOnly => {
                "over the relay with everybody, by TCP, and directly with nobody elsewhere: nothing answers over UDP, so this network blocks it"
            }
            Self::Nobody => {
                "no sessions from here: nothing answers over UDP, and TCP is no way to the server either; this network blocks both, or the \
                 server is off"
            }
        })
    }
}

impl Diagnosis {
    /// With whom direct sessions are possible over IPv4.
    pub fn reach(&self) -> Reach {
        let works = |family: &Family| family.finding().is_some();
        if !works(&self.ipv4) && !works(&self.ipv6) {
            return match (&self.signalling, &self.tcp) {
                (Ok(_), _) => Reach::Unknown,
                (Err(_), Tcp::Works { .. }) => Reach::RelayOnly,
                (Err(_), _) => Reach::Nobody,
            };
        }
        let Some(finding) = self.ipv4.finding() else { return Reach::Unknown };
        match (finding.mapping, finding.filtering) {
            (Mapping::Unknown, _) => Reach::Unknown,
            _ if self.is_port_mapped() => Reach::Everybody,
            (mapping, _) if mapping.is_dependent() => match mapping.allocation() {
                Some(Allocation::Preserving | Allocation::Sequential(_)) => Reach::NotRandomPorts,
                _ => Reach::NotPortDependent,
            },
            (_, Filtering::EndpointIndependent | Filtering::AddressDependent | Filtering::NotByPort) => {
                Reach::Everybody
            }
            (_, Filtering::AddressAndPortDependent | Filtering::Unknown) => Reach::EverybodyInTime,
        }
    }

    /// Why the server cannot be used at all; `None` when one can register with it over UDP or over TCP.
    pub fn failure(&self) -> Option<&ServerError> {
        match (&self.signalling, &self.tcp) {
            (Ok(_), _) | (_, Tcp::Works { .. }) => None,
            (Err(ServerError::Unreachable { .. } | ServerError::Resolve { .. }), Tcp::Failed(error)) => {
                Some(error)
            }
            (Err(error), _) => Some(error),
        }
    }

    /// Why one cannot register over UDP, in words.
    pub fn udp_failure(&self) -> Option<String> {
        self.signalling.as_ref().err().map(|error| match error {
            ServerError::Unreachable { host, port } => {
                format!("no answer from {host} on UDP port {port}")
            }
            error => error.to_string(),
        })
    }

    /// Whether the router lets in what comes to an address that servers see us come from.
    fn is_port_mapped(&self) -> bool {
        let PortMapping::Works(mapped) = self.port_mapping else { return false };
        let seen = self.ipv4.finding().is_some_and(|finding| {
            finding.mapped.iter().any(|address| address.ip() == IpAddr::V4(*mapped.external.ip()))
        });
        seen && self.translators() == Translators::One
    }

    /// How many NATs are on the way.
    pub fn translators(&self) -> Translators {
        let Some(finding) = self.ipv4.finding() else { return Translators::Unknown };
        let shared = self.carrier_hop().is_some() || is_shared(finding.local.ip());
        match finding.mapping {
            Mapping::Unknown => Translators::Unknown,
            Mapping::None => Translators::None,
            _ if shared && self.machine.through.is_none() => Translators::Carrier,
            _ => Translators::One,
        }
    }

    /// A router of the range that carriers use toward their customers.
    fn carrier_hop(&self) -> Option<IpAddr> {
        self.hops.iter().copied().find(|hop| is_shared(*hop))
    }

    /// What the user could change, most useful first.
    pub fn advice(&self) -> Vec<&'static str> {
        let mut advice = Vec::new();
        let reach = self.reach();
        if reach == Reach::RelayOnly {
            advice.push(
                "have the firewall of this network let out UDP and its answers in, to any port if possible: direct sessions are faster, and spare \
                 the server",
            );
            return advice;
        }
        if reach == Reach::Nobody {
            if self.portal.is_some() {
                advice.push("log in to this network with a browser, then try again");
            }
            advice.push(
                "see whether `peer doctor` works from another network: if it does, have the firewall of this one let out UDP and its \
                 answers in; if not, see to the server",
            );
            return advice;
        }
        if self.signalling.is_err() {
            advice.push("open the server's signalling port for UDP in its firewall, and see that `rendezvous serve` runs there");
        }
        let ipv6 = self.ipv6.finding().is_some();
        let carrier = self.translators() == Translators::Carrier;
        if matches!(reach, Reach::NotPortDependent | Reach::NotRandomPorts) {
            if carrier {
                advice.push("ask the carrier for an IPv4 address of your own, or for IPv6");
            } else {
                if self.port_mapping == PortMapping::Unavailable {
                    advice.push(
                        "switch on port mapping at the router (UPnP, NAT-PMP or PCP): peers behind any NAT then reach you directly",
                    );
                }
                advice.push(
                    "switch the router to endpoint-independent mapping (\"full cone\" or \"open NAT\" in some menus), or let it \
                     forward a UDP port to this machine",
                );
            }
        }
        match &self.ipv6 {
            _ if ipv6 || reach == Reach::Everybody => {}
            Family::Absent => {
                advice.push("switch on IPv6 at the router: peers that have it as well need no NAT traversal");
            }
            Family::Broken { .. } => {
                advice.push("repair IPv6: this machine has an address, and nothing comes back to it");
            }
            Family::NotAtServer { .. } | Family::Works(_) => {}
        }
        if self.machine.through.is_some() {
            advice.push("leave the VPN for this: what was measured is the VPN's network, not yours");
        }
        if self.shortest_lifetime().is_some() {
            advice.push("raise the router's UDP time-out: RFC 4787 asks for two minutes at least");
        }
        advice
    }

    /// A binding lifetime under the 30 s for which common keep-alives are made.
    fn shortest_lifetime(&self) -> Option<Duration> {
        let of = |family: &Family| family.finding()?.lifetime.less_than;
        [&self.ipv4, &self.ipv6]
            .into_iter()
            .filter_map(of)
            .min()
            .filter(|found| *found <= Duration::from_secs(30))
    }
}

/// A line: what, and what it means.
fn line(f: &mut fmt::Formatter<'_>, what: &str, words: &str) -> fmt::Result {
    writeln!(f, "{what:<19} {words}")
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = match (&self.signalling, self.udp_failure()) {
            (Ok((address, rtt)), _) => {
                format!("{address} over UDP, {:.1} ms there and back: you can be reached", ms(*rtt))
            }
            (Err(_), failure) => failure.unwrap_or_default(),
        };
        line(f, "rendezvous server", &words)?;
        self.write_family(f, "IPv4", &self.ipv4)?;
        self.write_family(f, "IPv6", &self.ipv6)?;
        line(f, "TCP", &self.describe_tcp())?;
        if let Some(portal) = &self.portal {
            line(
                f,
                "captive portal",
                &format!("somebody answers in the server's place and sends to {portal}"),
            )?;
        }
        line(
            f,
            "port mapping",
            &match self.port_mapping {
                PortMapping::NotTested => "not tested (PCP, NAT-PMP, UPnP)".to_owned(),
                PortMapping::Works(Mapped { protocol, external }) => {
                    format!("the router let in what came to {external}, asked by {protocol}")
                }
                PortMapping::BehindAnotherNat => {
                    "the router would, but is itself behind another NAT, so of no use".to_owned()
                }
                PortMapping::Unavailable => {
                    "the router does none, or it is switched off there (PCP, NAT-PMP, UPnP)".to_owned()
                }
                PortMapping::NotNeeded => {
                    "not needed: this machine has an address of the Internet".to_owned()
                }
            },
        )?;
        self.write_machine(f)?;
        write!(f, "\nverdict: {}", self.reach())?;
        if self.ipv6.finding().is_some() {
            write!(f, "; over IPv6 with everybody who has it as well")?;
        }
        for advice in self.advice() {
            write!(f, "\n  what would help: {advice}")?;
        }
        Ok(())
    }
}

impl Diagnosis {
    fn write_family(&self, f: &mut fmt::Formatter<'_>, name: &str, family: &Family) -> fmt::Result {
        let finding = match family {
            Family::NotAtServer { here: true } => {
                return line(f, name, "not tested: the server has no such address; this machine has one");
            }
            Family::NotAtServer { here: false } => {
                return line(f, name, "absent here, and the server has no such address either");
            }
            Family::Absent => return line(f, name, "absent: this machine has no way to such addresses"),
            Family::Broken { local } => {
                return line(f, name, &format!("broken: packets leave from {local}, and nothing comes back"));
            }
            Family::Works(finding) => finding,
        };
        let mut seen: Vec<String> = finding.mapped.iter().map(ToString::to_string).collect();
        seen.dedup();
        line(f, name, &format!("{} is seen as {}", finding.local, seen.join(", ")))?;
        if name == "IPv4" {
            line(f, "  NATs", &self.describe_translators())?;
        }
        line(f, "  mapping", &format!("{}: {}", finding.mapping, meaning_of_mapping(finding.mapping)))?;
        if finding.is_pooled() {
            line(
                f,
                "  addresses",
                "several at once: one socket may be seen at different addresses (RFC 4787, REQ-2)",
            )?;
        }
        line(
            f,
            "  filtering",
            &format!("{}: {}", finding.filtering, meaning_of_filtering(finding.filtering)),
        )?;
        if finding.is_translated() {
            line(
                f,
                "  hairpinning",
                match finding.hairpinning {
                    Some(true) => "yes: two peers behind this NAT can meet at their mapped addresses",
                    Some(false) => {
                        "no: two peers behind this NAT meet at the addresses of their LAN, or over the relay"
                    }
                    None => "unknown",
                },
            )?;
        }
        line(f, "  binding lifetime", &describe_lifetime(finding.lifetime))
    }

    fn describe_tcp(&self) -> String {
        match &self.tcp {
            Tcp::Works { address, through_proxy: false, took } => {
                format!("{address}, the server's key proved over TLS in {:.1} ms: what is left where UDP is blocked", ms(*took))
            }
            Tcp::Works { address, through_proxy: true, took } => {
                format!("through the proxy {address}, the server's key proved over TLS in {:.1} ms: what is left where UDP is blocked", ms(*took))
            }
            Tcp::Refused => {
                "nobody listens at the server's port, and the way there is open: the server serves no TCP, or is off".to_owned()
            }
            Tcp::Silent => "nothing comes back from the server's port".to_owned(),
            Tcp::Failed(error) => error.to_string(),
        }
    }

    fn describe_translators(&self) -> String {
        match self.translators() {
            Translators::Unknown => "unknown".to_owned(),
            Translators::None => "none: the address of this machine is the Internet's".to_owned(),
            Translators::One => match self.hops.first() {
                Some(hop) => format!("one that can be seen; the first router is {hop}"),
                None => "one that can be seen".to_owned(),
            },
            Translators::Carrier => match self.carrier_hop() {
                Some(hop) => format!(
                    "the carrier's, at {hop}, besides your own: opening a port at your own router does not help (RFC 6598)"
                ),
                None => "the carrier's: this machine has an address of the range shared by its customers (RFC 6598)".to_owned(),
            },
        }
    }

    fn write_machine(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kib = |bytes: Option<usize>| {
            bytes.map_or("unknown".to_owned(), |bytes| format!("{} KiB", bytes / 1024))
        };
        let (receive, send) = (kib(self.machine.receive_buffer), kib(self.machine.send_buffer));
        line(f, "UDP buffers", &format!("{receive} to receive, {send} to send"))?;
        let devices = self.machine.unlikely_devices.join(", ");
        if let Some(device) = &self.machine.through {
            line(
                f,
                "devices",
                &format!("the server is reached through {device}: this is what was measured"),
            )?;
        } else if !devices.is_empty() {
            line(f, "devices", &format!("{devices}: bridges and VPNs, whose addresses are offered last"))?;
        }
        Ok(())
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn meaning_of_mapping(mapping: Mapping) -> &'static str {
    match mapping {
        Mapping::Unknown => "the server has answered from one port at most",
        Mapping::None => "everybody sees the machine's own address",
        Mapping::EndpointIndependent(_) | Mapping::NotByPort(_) => {
            "everybody sees the same address, so that others can be told it"
        }
        Mapping::AddressDependent(Allocation::Random)
        | Mapping::AddressAndPortDependent(Allocation::Random) => {
            "everybody sees another port, and nobody can tell which"
        }
        Mapping::AddressDependent(_) | Mapping::AddressAndPortDependent(_) => {
            "everybody may see another port, which can be foretold"
        }
    }
}

fn meaning_of_filtering(filtering: Filtering) -> &'static str {
    match filtering {
        Filtering::Unknown => "it could not be measured",
        Filtering::EndpointIndependent => "whoever knows the address gets in",
        Filtering::NotByPort => {
            "who was sent to gets in from any port; the server has no second address to tell more"
        }
        Filtering::AddressDependent => "who was sent to gets in, from any port",
        Filtering::AddressAndPortDependent => "only who was sent to gets in, from that very port",
    }
}

fn describe_lifetime(lifetime: BindingLifetime) -> String {
    let seconds = |duration: Duration| format!("{} s", duration.as_secs());
    match (lifetime.at_least, lifetime.less_than) {
        (Some(alive), None) => format!("at least {}", seconds(alive)),
        (Some(alive), Some(gone)) => {
            format!(
                "from {} to {}: peers keep bindings alive more often than that",
                seconds(alive),
                seconds(gone)
            )
        }
        (None, Some(gone)) => format!("less than {}: sessions at rest may break", seconds(gone)),
        (None, None) => "could not be measured".to_owned(),
    }
}

#[cfg(test)]
#[path = "diagnosis_tests.rs"]
mod tests;
