//! Outages: what of a site's line, or of what its router remembers, goes.

use std::io;
use std::net::SocketAddrV4;
use std::os::fd::AsRawFd as _;

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

use crate::router::{Mapping, nft};
use crate::site::{Direction, Site};
use crate::tool::{self, ToolError};

/// An empty table in place of whatever was there, in one transaction. At the provider's edge, which tracks no
/// flows; ARP is not touched, so a restored line works at once.
const CUT_NOTHING: &str = "\
add table inet cut
delete table inet cut
add table inet cut
add chain inet cut up { type filter hook prerouting priority raw; }
add chain inet cut down { type filter hook postrouting priority mangle; }
";

impl Site {
    /// Lets every packet in this direction vanish, until [`restore`](Self::restore). Packets that the line has
    /// taken already still arrive. Sites behind one carrier have one line.
    ///
    /// # Errors
    ///
    /// When nftables refuses.
    pub fn cut(&self, direction: Direction) -> Result<(), ToolError> {
        tool::nft(self.edge(), &format!("{CUT_NOTHING}{}", drops("cut", direction, "", "")))
    }

    /// The same for packets to and from one other site alone: servers, and through them the other site, can still be
    /// reached.
    ///
    /// # Errors
    ///
    /// When nftables refuses.
    pub fn cut_between(&self, other: &Self, direction: Direction) -> Result<(), ToolError> {
        let (to, from) = (ends(other, "daddr"), ends(other, "saddr"));
        let families = to.iter().zip(&from);
        let rules: String = families.map(|(to, from)| drops("cut", direction, to, from)).collect();
        tool::nft(self.edge(), &format!("{CUT_NOTHING}{rules}"))
    }

    /// Lets every UDP packet to these ports of the internet and from them vanish, until [`restore`](Self::restore); without any
    /// port, every UDP packet.
    ///
    /// # Errors
    ///
    /// When nftables refuses.
    pub fn cut_udp(&self, ports: &[u16]) -> Result<(), ToolError> {
        let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
        let matching = |field: &str| match ports.is_empty() {
            true => "meta l4proto udp".to_owned(),
            false => format!("udp {field} {{ {} }}", ports.join(", ")),
        };
        let (up, down) = (matching("dport"), matching("sport"));
        let rules = format!(
            "add rule inet cut up iifname site {up} drop\nadd rule inet cut down oifname site {down} drop\n"
        );
        tool::nft(self.edge(), &format!("{CUT_NOTHING}{rules}"))
    }

    /// Lets every packet vanish that is not TCP to this address, or an answer, until [`restore`](Self::restore): a network with a
    /// proxy and nothing else.
    ///
    /// # Errors
    ///
    /// When nftables refuses.
    pub fn cut_all_but(&self, tcp: SocketAddrV4) -> Result<(), ToolError> {
        let (ip, port) = (tcp.ip(), tcp.port());
        let rules = format!(
            "add rule inet cut up iifname site ip daddr {ip} tcp dport {port} accept\n\
             add rule inet cut up iifname site meta l4proto {{ tcp, udp, icmp }} drop\n\
             add rule inet cut down oifname site meta l4proto {{ udp, icmp }} drop\n"
        );
        tool::nft(self.edge(), &format!("{CUT_NOTHING}{rules}"))
    }

    /// Undoes every [`cut`](Self::cut) and [`cut_between`](Self::cut_between).
    ///
    /// # Errors
    ///
    /// When nftables refuses.
    pub fn restore(&self) -> Result<(), ToolError> {
        tool::nft(self.edge(), CUT_NOTHING)
    }

    /// Lets packets from this site that are longer than `mtu` bytes vanish on their way to the other site, or with `None` on their
    /// way to the servers, without a word (a black hole: no ICMP). Replaces every earlier one.
    ///
    /// # Errors
    ///
    /// When nftables refuses.
    pub fn narrow(&self, other: Option<&Self>, mtu: u16) -> Result<(), ToolError> {
        let to = other.map_or_else(
            || "ip daddr 203.0.113.0/24".to_owned(),
            |other| {
                let [.., index, _] = other.wan_ipv4().octets();
                format!("ip daddr {{ 198.18.{index}.0/24, 198.19.{index}.0/24 }}")
            },
        );
        let table = "add table inet narrow\ndelete table inet narrow\nadd table inet narrow\n\
                     add chain inet narrow up { type filter hook prerouting priority raw; }\n";
        let rule = format!("add rule inet narrow up iifname site {to} meta length > {mtu} drop\n");
        tool::nft(self.edge(), &format!("{table}{rule}"))
    }

    /// The router nearest to the hosts forgets every flow and every binding, as after a reboot that takes no time.
    ///
    /// # Errors
    ///
    /// When the kernel or nftables refuses.
    pub fn reboot(&self) -> Result<(), ToolError> {
        let (namespace, router) = self.home_router();
        namespace
            .run(flush_conntrack)
            .and_then(|flushed| flushed)
            .map_err(|source| ToolError::Run { command: "conntrack -F".to_owned(), source })?;
        tool::nft(namespace, router.forget())
    }

    /// The same, and what comes after it has other UDP ports than before: those of one of 60 ranges, the next of them after every such reboot.
    /// A mapping that was endpoint-independent still is; where ports are random, or where nothing is translated, it makes no difference.
    ///
    /// # Errors
    ///
    /// When the kernel or nftables refuses.
    pub fn reboot_with_other_ports(&self) -> Result<(), ToolError> {
        let (namespace, router) = self.home_router();
        if router.mapping == Some(Mapping::EndpointIndependent) {
            tool::nft(namespace, &nft::renumber(self.next_range()))?;
        }
        self.reboot()
    }
}

/// What matches packets of each family whose `daddr` or `saddr` is of this site. See the address plan: its access line and its hosts.
pub(crate) fn ends(site: &Site, end: &str) -> [String; 2] {
    let [.., index, _] = site.wan_ipv4().octets();
    [
        format!("ip {end} {{ 198.18.{index}.0/24, 198.19.{index}.0/24 }}"),
        format!("ip6 {end} 2001:db8:{index:x}::/48"),
    ]
}

/// Rules for `table` that drop what matches `up` on its way to the internet, and `down` on its way from there.
pub(crate) fn drops(table: &str, direction: Direction, up: &str, down: &str) -> String {
    let mut rules = String::new();
    if direction != Direction::Down {
        rules += &format!("add rule inet {table} up iifname site {up} drop\n");
    }
    if direction != Direction::Up {
        rules += &format!("add rule inet {table} down oifname site {down} drop\n");
    }
    rules
}

/// Empties the table of flows of the calling thread's namespace, in the kernel's own words: `IPCTNL_MSG_CT_DELETE` of
/// linux/netfilter/nfnetlink_conntrack.h, without a tuple.
fn flush_conntrack() -> io::Result<()> {
    const LENGTH: u32 = 20;
    const CONNTRACK_DELETE: u16 = 1 << 8 | 2;
    const REQUEST_ACK: u16 = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
    let (flags, protocol) = (SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter);
    let netlink = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
    let mut request = LENGTH.to_ne_bytes().to_vec();
    request.extend([CONNTRACK_DELETE, REQUEST_ACK].map(u16::to_ne_bytes).concat());
    // Sequence, port, and a `struct nfgenmsg` for every family.
    request.resize(LENGTH as usize, 0);
    send(netlink.as_raw_fd(), &request, MsgFlags::empty())?;
    let mut answer = [0; 64];
    let length = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    // The error follows the header, 0 for none.
    match answer[..length]
        .get(16..20)
        .map(|error| i32::from_ne_bytes([error[0], error[1], error[2], error[3]]))
    {
        Some(0) => Ok(()),
        Some(error) => Err(io::Error::from_raw_os_error(-error)),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}
