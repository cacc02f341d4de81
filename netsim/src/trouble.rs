//! Several things that are wrong at the same time: what is in force on a site's line is named as a whole, so that one trouble may end while
//! others go on.

use crate::link::{Impairment, LinkError};
use crate::outage::{drops, ends};
use crate::site::{Direction, Site};
use crate::tool::{self, ToolError};

/// Something that is wrong on a site's line.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Trouble {
    /// Every packet in this direction vanishes.
    Cut(Direction),
    /// Packets to this site, from it, or both, vanish. Servers, and through them the site, can still be reached.
    CutFrom(Site, Direction),
    /// Every UDP packet vanishes.
    NoUdp,
    /// Packets to this site that are longer than so many bytes vanish without a word.
    NarrowTo(Site, u16),
}

impl Trouble {
    fn rules(&self) -> String {
        match self {
            Self::Cut(direction) => drops("troubles", *direction, "", ""),
            Self::CutFrom(other, direction) => {
                let of = |family: usize, end| ends(other, end)[family].clone();
                let family =
                    |family| drops("troubles", *direction, &of(family, "daddr"), &of(family, "saddr"));
                family(0) + &family(1)
            }
            Self::NoUdp => drops("troubles", Direction::Both, "meta l4proto udp", "meta l4proto udp"),
            Self::NarrowTo(other, mtu) => {
                let [ipv4, ipv6] = ends(other, "daddr");
                let long = |to| drops("troubles", Direction::Up, &format!("{to} meta length > {mtu}"), "");
                long(ipv4) + &long(ipv6)
            }
        }
    }
}

impl Site {
    /// These troubles and no others from now on, in one moment; with none of them the line is as it was built. Packets that the line has taken
    /// already still arrive. Does not touch what [`cut`](Self::cut) and its like have done. Sites behind one carrier have one line.
    ///
    /// # Errors
    ///
    /// When nftables refuses.
    pub fn set_troubles(&self, troubles: &[Trouble]) -> Result<(), ToolError> {
        let table = "add table inet troubles\ndelete table inet troubles\nadd table inet troubles\n\
                     add chain inet troubles up { type filter hook prerouting priority raw; }\n\
                     add chain inet troubles down { type filter hook postrouting priority mangle; }\n";
        let rules: String = troubles.iter().map(Trouble::rules).collect();
        tool::nft(self.edge(), &format!("{table}{rules}"))
    }

    /// What the line does to packets from now on: toward the internet, and from it. Those that it has taken already travel as they would have;
    /// later ones do not overtake them.
    ///
    /// # Errors
    ///
    /// When the line was built without any impairment: there is nothing then that could delay or lose a packet.
    pub fn impair(&self, up: Impairment, down: Impairment) -> Result<(), LinkError> {
        self.link().ok_or(LinkError::Unimpaired)?.change(up, down)
    }
}
