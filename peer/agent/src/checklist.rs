//! Sockets, remote candidates, and the pairs that they make (RFC 8445, section 6.1.2).

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rendezvous_wire::candidate::{MAX_CANDIDATES, is_probeable};
use rendezvous_wire::message::Role;
use rendezvous_wire::{Candidate, CandidateKind};

use crate::config::{MAX_PAIRS, MAX_PEER_REFLEXIVE};
use crate::likelihood::{Neighbourhood, likelihood};
use crate::path::{Family, Path, SocketId};
use crate::report::{CheckError, PairState};
use crate::selection::Measured;
use crate::volley::Volley;

/// How long a learnt candidate keeps its place. Two sides whose NATs change the mapping with every destination but let
/// everything in would otherwise show each other new addresses for ever, as fast as the line allows.
const LEARNT_LIFETIME: Duration = Duration::from_secs(60);

/// One of our sockets.
#[derive(Debug)]
struct Socket {
    id: SocketId,
    family: Family,
    /// The candidate priority of the base (RFC 8445, 5.1.2.1).
    priority: u32,
    /// Its pairs are with those alone whose checks have come to it.
    reserved: bool,
}

/// A candidate of the other side.
#[derive(Debug, Clone, Copy)]
struct Remote {
    candidate: Candidate,
    /// When it was learnt from a check; `None` when the other side has named it.
    learnt: Option<Instant>,
}

/// Hardly any path has such a round-trip time. An answer after so long is rather that of a machine that has slept.
pub(crate) const UNBELIEVABLE: Duration = Duration::from_secs(1);

/// A candidate pair and everything known about it.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) path: Path,
    pub(crate) kind: CandidateKind,
    pub(crate) state: PairState,
    pub(crate) volley: Option<Volley>,
    /// When a check of it was last answered, if that was since checks last began anew.
    pub(crate) proven: Option<Instant>,
    /// Smoothed.
    pub(crate) rtt: Option<Duration>,
    /// Its mean deviation.
    rtt_variation: Duration,
    pub(crate) mapped: Option<SocketAddr>,
    pub(crate) error: Option<CheckError>,
    pub(crate) sent: u64,
    pub(crate) answered: u64,
    pub(crate) requests: u64,
    pub(crate) source_known: bool,
    /// Place in the order of first checks, smallest first.
    pub(crate) order: usize,
}

impl Pair {
    fn new(path: Path, kind: CandidateKind) -> Self {
        Self {
            path,
            kind,
            state: PairState::Waiting,
            volley: None,
            proven: None,
            rtt: None,
            rtt_variation: Duration::ZERO,
            mapped: None,
            error: None,
            sent: 0,
            answered: 0,
            requests: 0,
            source_known: false,
            order: 0,
        }
    }

    pub(crate) fn measured(&self) -> Option<Measured> {
        Some(Measured { rtt: self.rtt?, remote_kind: self.kind, remote: self.path.remote })
    }

    /// RFC 6298, section 2: a new sample weighs an eighth, and a quarter in the variation. The first since checks began anew stands alone: the network
    /// may be another. So does one that shows the earlier ones to be no round trips: the other side has slept.
    pub(crate) fn note_rtt(&mut self, sample: Duration) {
        let slept = |rtt: &Duration| *rtt > UNBELIEVABLE && sample < *rtt / 2;
        let earlier = self.rtt.filter(|rtt| self.proven.is_some() && !slept(rtt));
        self.rtt_variation = match earlier {
            Some(rtt) => (self.rtt_variation * 3 + rtt.abs_diff(sample)) / 4,
            None => sample / 2,
        };
        self.rtt = Some(earlier.map_or(sample, |rtt| (rtt * 7 + sample) / 8));
    }

    /// How long an answer may take: the RTO of RFC 6298, section 2, without its least of 1 s, and with the variation
    /// bounded, of which a young pair knows too little.
    pub(crate) fn answer_time(&self) -> Duration {
        let rtt = self.rtt.unwrap_or_default();
        rtt + (4 * self.rtt_variation).min((rtt / 2).max(Duration::from_millis(50)))
    }
}

/// Sockets, remote candidates and pairs.
#[derive(Debug, Default)]
pub(crate) struct Checklist {
    sockets: Vec<Socket>,
    remotes: Vec<Remote>,
    pub(crate) pairs: Vec<Pair>,
    local: Vec<Candidate>,
    controlled: bool,
}

impl Checklist {
    pub(crate) fn set_role(&mut self, role: Role) {
        self.controlled = role == Role::Controlled;
        self.reorder();
    }

    /// Adds a socket, or replaces what was known of it. True when it is new.
    pub(crate) fn add_socket(&mut self, id: SocketId, family: Family, local: &[Candidate]) -> bool {
        for candidate in local.iter().filter(|candidate| Family::from(candidate.address) == family) {
            if !self.local.contains(candidate) && self.local.len() < 4 * MAX_CANDIDATES {
                self.local.push(*candidate);
            }
        }
        let hosts = local.iter().filter(|candidate| candidate.kind == CandidateKind::Host);
        let of_family = hosts.filter(|candidate| Family::from(candidate.address) == family);
        let default = CandidateKind::Host.priority(u16::MAX);
        let priority = of_family.map(|candidate| candidate.priority).max().unwrap_or(default);
        if let Some(socket) = self.sockets.iter_mut().find(|socket| socket.id == id) {
            *socket = Socket { id, family, priority, reserved: false };
            self.reorder();
            return false;
        }
        self.sockets.push(Socket { id, family, priority, reserved: false });
        for index in 0..self.remotes.len() {
            self.pair(id, self.remotes[index].candidate);
        }
        self.reorder();
        true
    }

    /// Adds a socket whose pairs are with those alone whose checks come to it. Only toward them has its NAT a door, and a dozen such sockets
    /// paired with everybody would leave no room for the pair that works.
    pub(crate) fn add_reserved_socket(&mut self, id: SocketId, family: Family) {
        if self.family(id).is_none() {
            let priority = CandidateKind::Host.priority(u16::MAX);
            self.sockets.push(Socket { id, family, priority, reserved: true });
        }
    }

    fn is_reserved(&self, socket: SocketId) -> bool {
        self.sockets.iter().any(|known| known.id == socket && known.reserved)
    }

    /// Forgets a socket, its pairs, and who was known only by checks to it.
    pub(crate) fn remove_socket(&mut self, id: SocketId) {
        self.sockets.retain(|socket| socket.id != id);
        self.pairs.retain(|pair| pair.path.socket != id);
        let pairs = &self.pairs;
        let has_pair =
            |remote: &Remote| pairs.iter().any(|pair| pair.path.remote == remote.candidate.address);
        self.remotes.retain(|remote| remote.learnt.is_none() || has_pair(remote));
        self.reorder();
    }

    pub(crate) fn socket_of(&self, family: Family) -> Option<SocketId> {
        self.sockets.iter().find(|socket| socket.family == family).map(|socket| socket.id)
    }

    pub(crate) fn family(&self, socket: SocketId) -> Option<Family> {
        self.sockets.iter().find(|known| known.id == socket).map(|known| known.family)
    }

    /// PRIORITY of a check: that of a peer-reflexive candidate of this base (RFC 8445, 7.1.1).
    pub(crate) fn peer_reflexive_priority(&self, socket: SocketId) -> u32 {
        let base = self.sockets.iter().find(|known| known.id == socket).map_or(0, |known| known.priority);
        (CandidateKind::PeerReflexive.type_preference() << 24) | (base & 0x00ff_ffff)
    }

    /// Whether an address is one of our candidates.
    pub(crate) fn is_local(&self, address: SocketAddr) -> bool {
        self.local.iter().any(|candidate| candidate.address == address)
    }

    /// Adds what the other side names. `keep` is never thrown out to make room.
    pub(crate) fn add_named(&mut self, candidate: Candidate, keep: Option<Path>) {
        let keep = keep.map(|path| path.remote);
        let known = |remote: &Remote| remote.candidate.address == candidate.address;
        if let Some(remote) = self.remotes.iter_mut().find(|remote| known(remote)) {
            // Signalling has caught up with a check (RFC 8838, section 11.4).
            *remote = Remote { candidate, learnt: None };
            let same = self.pairs.iter_mut().filter(|pair| pair.path.remote == candidate.address);
            same.for_each(|pair| pair.kind = candidate.kind);
        } else if is_probeable(candidate.address) && self.make_room(None, MAX_CANDIDATES, keep) {
            self.add(candidate, None);
        }
        self.reorder();
    }

    /// The pair on which an authentic check has come, made if need be (RFC 8445, 7.3.1.3).
    pub(crate) fn learn(
        &mut self,
        path: Path,
        priority: u32,
        keep: Option<Path>,
        now: Instant,
    ) -> Option<usize> {
        if self.position(path).is_none() {
            let known = |remote: &&Remote| remote.candidate.address == path.remote;
            if let Some(remote) = self.remotes.iter().find(known) {
                self.pair(path.socket, remote.candidate);
            } else if self.make_room(Some(now), MAX_PEER_REFLEXIVE, keep.map(|path| path.remote)) {
                let kind = CandidateKind::PeerReflexive;
                let candidate = Candidate { kind, address: path.remote, priority };
                if self.is_reserved(path.socket) {
                    self.remotes.push(Remote { candidate, learnt: Some(now) });
                    self.pair(path.socket, candidate);
                } else {
                    self.add(candidate, Some(now));
                }
            }
            self.reorder();
        }
        self.position(path)
    }

    pub(crate) fn position(&self, path: Path) -> Option<usize> {
        self.pairs.iter().position(|pair| pair.path == path)
    }

    pub(crate) fn get(&self, path: Path) -> Option<&Pair> {
        self.pairs.iter().find(|pair| pair.path == path)
    }

    pub(crate) fn get_mut(&mut self, path: Path) -> Option<&mut Pair> {
        self.pairs.iter_mut().find(|pair| pair.path == path)
    }

    /// RFC 8445, 6.1.2.3.
    pub(crate) fn priority(&self, pair: &Pair) -> u64 {
        let local = self.sockets.iter().find(|socket| socket.id == pair.path.socket);
        let remote = self.remotes.iter().find(|remote| remote.candidate.address == pair.path.remote);
        let ours = u64::from(local.map_or(0, |socket| socket.priority));
        let theirs = u64::from(remote.map_or(0, |remote| remote.candidate.priority));
        let (controlling, controlled) = if self.controlled { (theirs, ours) } else { (ours, theirs) };
        (controlling.min(controlled) << 32)
            .saturating_add(2 * controlling.max(controlled))
            .saturating_add(u64::from(controlling > controlled))
    }

    /// Whether there is, or could be made, room for one more candidate of its sort: named, or learnt now. What is
    /// thrown out is the oldest that is not proven; a learnt one only after [`LEARNT_LIFETIME`].
    fn make_room(&mut self, learnt: Option<Instant>, most: usize, keep: Option<SocketAddr>) -> bool {
        let of_sort = |remote: &&Remote| remote.learnt.is_some() == learnt.is_some();
        if self.remotes.iter().filter(of_sort).count() < most {
            return true;
        }
        let pairs = &self.pairs;
        let expendable = |remote: &Remote| {
            let young = remote.learnt.zip(learnt).is_some_and(|(then, now)| now < then + LEARNT_LIFETIME);
            let of_remote = |pair: &&Pair| pair.path.remote == remote.candidate.address;
            let proven = pairs.iter().filter(of_remote).any(|pair| pair.proven.is_some());
            !(young || proven || Some(remote.candidate.address) == keep)
        };
        let oldest = self.remotes.iter().position(|remote| of_sort(&remote) && expendable(remote));
        let Some(oldest) = oldest else { return false };
        let gone = self.remotes.remove(oldest).candidate.address;
        self.pairs.retain(|pair| pair.path.remote != gone);
        true
    }

    fn add(&mut self, candidate: Candidate, learnt: Option<Instant>) {
        self.remotes.push(Remote { candidate, learnt });
        let open = self.sockets.iter().filter(|socket| !socket.reserved).map(|socket| socket.id);
        for socket in open.collect::<Vec<_>>() {
            self.pair(socket, candidate);
        }
    }

    fn pair(&mut self, socket: SocketId, candidate: Candidate) {
        let path = Path { socket, remote: candidate.address };
        let fits = self.family(socket) == Some(candidate.address.into());
        if fits && self.pairs.len() < MAX_PAIRS && self.position(path).is_none() {
            self.pairs.push(Pair::new(path, candidate.kind));
        }
    }

    /// Puts the pairs into the order of their first checks: by likelihood, then in turns of socket and kind (so that
    /// four temporary IPv6 addresses do not go before the one IPv4 mapping), then by priority.
    fn reorder(&mut self) {
        let neighbourhood =
            Neighbourhood::new(&self.local, self.remotes.iter().map(|remote| &remote.candidate));
        let mut keys: Vec<_> = (self.pairs.iter().enumerate())
            .map(|(index, pair)| {
                let class = likelihood(pair.kind, pair.path.remote.ip(), &neighbourhood);
                (class, u64::MAX - self.priority(pair), pair.path, pair.kind, index)
            })
            .collect();
        keys.sort_unstable();
        let mut turns: Vec<(u8, SocketId, CandidateKind, usize)> = Vec::new();
        let mut order: Vec<_> = (keys.into_iter().enumerate())
            .map(|(place, (class, _, path, kind, index))| {
                let group = |turn: &&mut (u8, SocketId, CandidateKind, usize)| {
                    (turn.0, turn.1, turn.2) == (class, path.socket, kind)
                };
                let nth = match turns.iter_mut().find(group) {
                    Some(turn) => {
                        turn.3 += 1;
                        turn.3
                    }
                    None => {
                        turns.push((class, path.socket, kind, 0));
                        0
                    }
                };
                (class, nth, place, index)
            })
            .collect();
        order.sort_unstable();
        for (place, (.., index)) in order.into_iter().enumerate() {
            self.pairs[index].order = place;
        }
    }
}

/// Whether an IP address belongs to a site and not to the Internet (RFC 1918, RFC 6598, RFC 4193).
pub(crate) fn is_site_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let [a, b, ..] = ip.octets();
            ip.is_private() || (a == 100 && b & 0xc0 == 64)
        }
        IpAddr::V6(ip) => ip.is_unique_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::origin;

    /// The answer to a question from before the other side's sleep: two round trips later it is known for what it is.
    #[test]
    fn a_sleep_is_no_round_trip() {
        let [slept, really] = [1_800, 60].map(Duration::from_millis);
        let path = Path { socket: SocketId(0), remote: ([203, 0, 113, 1], 5000).into() };
        let mut pair = Pair::new(path, CandidateKind::Host);
        pair.note_rtt(slept);
        pair.proven = Some(origin());
        assert_eq!(pair.rtt, Some(slept));
        pair.note_rtt(really);
        assert_eq!(pair.rtt, Some(really));
        assert!(pair.answer_time() < 3 * really, "{:?}", pair.answer_time());
        // Jitter is smoothed as ever, and a path that is so slow is believed.
        pair.note_rtt(really / 3);
        assert!(pair.rtt > Some(really * 3 / 4));
        let mut slow = Pair::new(path, CandidateKind::Host);
        slow.proven = Some(origin());
        (0..10).for_each(|_| slow.note_rtt(slept));
        assert_eq!(slow.rtt, Some(slept));
    }

    #[test]
    fn many_reserved_sockets_leave_room_for_each_others_pairs() {
        let now = origin();
        let mut checklist = Checklist::default();
        checklist.add_socket(SocketId(0), Family::V4, &[]);
        for port in 1..=MAX_CANDIDATES as u16 {
            let address = ([203, 0, 113, 1], port).into();
            checklist.add_named(Candidate::new(CandidateKind::ServerReflexive, address, port), None);
        }
        let paths = (1..=8).flat_map(|socket| {
            let remote = ([203, 0, 113, 2], 5000 + socket as u16).into();
            let named = ([203, 0, 113, 1], socket as u16).into();
            [remote, named].map(|remote| Path { socket: SocketId(socket), remote })
        });
        for path in paths.clone() {
            checklist.add_reserved_socket(path.socket, Family::V4);
            assert!(checklist.learn(path, 1, None, now).is_some(), "{path}");
        }
        assert_eq!(checklist.pairs.len(), MAX_CANDIDATES + 16);
        for path in paths {
            checklist.remove_socket(path.socket);
        }
        assert_eq!((checklist.pairs.len(), checklist.remotes.len()), (MAX_CANDIDATES, MAX_CANDIDATES));
    }
}
