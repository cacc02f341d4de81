//! Tickets: everything that it takes to reach a peer, in one word.
//!
//! `rvt1…` is Bech32m (BIP 350) with the human-readable part `rvt` over a postcard body: the peer's id, its rendezvous servers and, in
//! an invitation, a secret that admits whoever shows it. In upper case it fits the alphanumeric mode of a QR code.

use std::fmt;
use std::str::FromStr;

use bech32::primitives::decode::CheckedHrpstring;
use bech32::{Bech32m, Hrp};
use serde::{Deserialize, Serialize};

use crate::address::RendezvousAddress;
use crate::identity::PeerId;

/// Most servers in one ticket.
pub const MAX_TICKET_SERVERS: usize = 4;

/// Bytes of an invitation's secret.
pub const SECRET_LEN: usize = 16;

const HRP: Hrp = Hrp::parse_unchecked("rvt");

/// The secret of an invitation. Shown by the one who was invited to the one who invited, inside the session.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InviteSecret(pub [u8; SECRET_LEN]);

impl fmt::Debug for InviteSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("InviteSecret(..)")
    }
}

/// A peer and its rendezvous servers; with a secret, an invitation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ticket {
    /// Whom it leads to.
    pub peer: PeerId,
    /// Where that peer registers: 1 to [`MAX_TICKET_SERVERS`].
    pub servers: Vec<RendezvousAddress>,
    /// What admits whoever shows it.
    pub secret: Option<InviteSecret>,
}

/// What is written: addresses as text, without the scheme, and servers' ids as bytes.
#[derive(Serialize, Deserialize)]
struct Body {
    peer: PeerId,
    servers: Vec<(PeerId, String)>,
    secret: Option<InviteSecret>,
}

/// Why a text is not a [`Ticket`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseTicketError {
    /// It does not begin as tickets do.
    #[error("a ticket starts with rvt1")]
    Prefix,
    /// The checksum does not match.
    #[error("the ticket is mistyped or cut: its checksum does not match")]
    Checksum,
    /// Sound, but of another shape: from a newer version.
    #[error("the ticket has a content that this version does not know")]
    Content,
}

/// Why a [`Ticket`] has no text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a ticket names 1 to {MAX_TICKET_SERVERS} rendezvous servers with no more than a few hosts each")]
pub struct UnwritableTicket;

impl Ticket {
    /// Whether a text claims to be one.
    pub fn looks_like(text: &str) -> bool {
        text.get(..4).is_some_and(|start| start.eq_ignore_ascii_case("rvt1"))
    }

    /// Its text, `rvt1…`, in lower case.
    ///
    /// # Errors
    ///
    /// When it names no server, too many, or ones with very long names.
    pub fn encode(&self) -> Result<String, UnwritableTicket> {
        if !(1..=MAX_TICKET_SERVERS).contains(&self.servers.len()) {
            return Err(UnwritableTicket);
        }
        let place = |server: &RendezvousAddress| {
            let text = server.to_string();
            text.split_once('@').map_or_else(String::new, |(_, place)| place.to_owned())
        };
        let servers = self.servers.iter().map(|server| (server.id, place(server))).collect();
        let body = Body { peer: self.peer, servers, secret: self.secret.clone() };
        let bytes = postcard::to_stdvec(&body).map_err(|_| UnwritableTicket)?;
        bech32::encode::<Bech32m>(HRP, &bytes).map_err(|_| UnwritableTicket)
    }
}

impl FromStr for Ticket {
    type Err = ParseTicketError;

    fn from_str(text: &str) -> Result<Self, ParseTicketError> {
        if !Self::looks_like(text) {
            return Err(ParseTicketError::Prefix);
        }
        let checked = CheckedHrpstring::new::<Bech32m>(text).map_err(|_| ParseTicketError::Checksum)?;
        if checked.hrp() != HRP {
            return Err(ParseTicketError::Prefix);
        }
        let bytes: Vec<u8> = checked.byte_iter().collect();
        let body: Body = postcard::from_bytes(&bytes).map_err(|_| ParseTicketError::Content)?;
        if !(1..=MAX_TICKET_SERVERS).contains(&body.servers.len()) {
            return Err(ParseTicketError::Content);
        }
        let server = |(id, place): (PeerId, String)| format!("rv://{id}@{place}").parse();
        let servers = body.servers.into_iter().map(server).collect::<Result<_, _>>();
        Ok(Self {
            peer: body.peer,
            servers: servers.map_err(|_| ParseTicketError::Content)?,
            secret: body.secret,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticket(secret: bool) -> Ticket {
        let id = PeerId::from_bytes([9; 32]);
        Ticket {
            peer: PeerId::from_bytes([7; 32]),
            servers: vec![
                format!("rv://{id}@192.0.2.7,[2001:db8::7]:4433").parse().unwrap(),
                format!("rv://{id}@vps.example").parse().unwrap(),
            ],
            secret: secret.then_some(InviteSecret([3; SECRET_LEN])),
        }
    }

    #[test]
    fn tickets_survive_their_text_form_in_either_case() {
        for secret in [false, true] {
            let ticket = ticket(secret);
            let text = ticket.encode().unwrap();
            assert!(text.starts_with("rvt1"), "{text}");
            assert_eq!(text.parse::<Ticket>().unwrap(), ticket);
            assert_eq!(text.to_uppercase().parse::<Ticket>().unwrap(), ticket);
        }
    }

    #[test]
    fn any_mistyped_character_is_found() {
        let text = ticket(true).encode().unwrap();
        for place in 4..text.len() {
            let other = if text.as_bytes()[place] == b'q' { "p" } else { "q" };
            let mut wrong = text.clone();
            wrong.replace_range(place..=place, other);
            assert_eq!(wrong.parse::<Ticket>(), Err(ParseTicketError::Checksum), "{place}");
        }
        assert_eq!(text[..text.len() - 1].parse::<Ticket>(), Err(ParseTicketError::Checksum));
    }

    #[test]
    fn sound_text_of_another_content_is_refused() {
        let encode = |bytes: &[u8]| bech32::encode::<Bech32m>(HRP, bytes).unwrap();
        // Nothing, no servers, a length that is not there, a server with a broken name.
        let mut none = vec![7; 32];
        none.extend([0, 0]);
        let mut huge = vec![7; 32];
        huge.extend([0xff, 0xff, 0xff, 0xff, 0x0f]);
        let mut broken = vec![7; 32];
        broken.push(1);
        broken.extend([9; 32]);
        broken.extend([1, b'[', 0]);
        for bytes in [&[][..], &none, &huge, &broken] {
            assert_eq!(encode(bytes).parse::<Ticket>(), Err(ParseTicketError::Content), "{bytes:?}");
        }
        let other = bech32::encode::<Bech32m>(Hrp::parse_unchecked("bc"), &[1, 2]).unwrap();
        assert_eq!(other.parse::<Ticket>(), Err(ParseTicketError::Prefix));
        assert_eq!("".parse::<Ticket>(), Err(ParseTicketError::Prefix));
        assert_eq!("rvt1".parse::<Ticket>(), Err(ParseTicketError::Checksum));
    }

    #[test]
    fn a_ticket_without_servers_leads_nowhere() {
        let ticket = Ticket { servers: Vec::new(), ..ticket(false) };
        assert_eq!(ticket.encode(), Err(UnwritableTicket));
    }
}
