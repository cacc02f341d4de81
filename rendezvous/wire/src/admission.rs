//! What a server asks of those who want to register: a token that its operator has given out, or work.
//!
//! A challenge is bound to both keys and to a number that the server has drawn for this one connection, so that no work is of use twice, nor
//! to anybody else. Judging an answer costs one SHA-256 (FIPS 180-4); finding one costs `2^bits` of them in the mean.

use std::fmt;
use std::str::FromStr;

use data_encoding::BASE32_NOPAD;
use ring::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};

use crate::identity::PeerId;

/// Bytes of a token.
pub const TOKEN_LEN: usize = 16;

/// Characters of a token's text.
const TOKEN_TEXT: usize = 26;

/// Most bits that a peer works for: some seconds of one core. A server that asks for more is not worth it.
pub const MOST_BITS: u8 = 24;

/// Keeps these hashes apart from all others.
const PURPOSE: &[u8] = b"rendezvous proof of work 1";

/// A token of admission: whoever presents it may register, as often as its operator has said. Secret.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Token(pub [u8; TOKEN_LEN]);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&BASE32_NOPAD.encode(&self.0).to_lowercase())
    }
}

/// Why a text is not a [`Token`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a token is {TOKEN_TEXT} letters and digits, as `rendezvous token new` printed it")]
pub struct ParseTokenError;

impl FromStr for Token {
    type Err = ParseTokenError;

    fn from_str(text: &str) -> Result<Self, ParseTokenError> {
        if text.len() != TOKEN_TEXT {
            return Err(ParseTokenError);
        }
        let bytes = BASE32_NOPAD.decode(text.to_uppercase().as_bytes()).map_err(|_| ParseTokenError)?;
        bytes.try_into().map(Self).map_err(|_| ParseTokenError)
    }
}

impl Token {
    /// SHA-256 of it: what a server keeps.
    pub fn hash(&self) -> [u8; 32] {
        let mut context = Context::new(&SHA256);
        context.update(b"rendezvous token 1");
        context.update(&self.0);
        finish(context)
    }
}

/// Asks for work before a registration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Challenge {
    /// Of this connection alone.
    pub nonce: [u8; 16],
    /// The leading zero bits that the hash is to have.
    pub bits: u8,
    /// Seconds until the answer counts no more.
    pub seconds: u16,
}

/// The answer to a [`Challenge`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Solution(pub u64);

/// A challenge as it stands between one server and one peer.
#[derive(Debug, Clone, Copy)]
pub struct Work {
    /// The challenge.
    pub challenge: Challenge,
    /// Who asks.
    pub server: PeerId,
    /// Who works.
    pub peer: PeerId,
}

impl Work {
    fn prefix(&self) -> Context {
        let mut context = Context::new(&SHA256);
        context.update(PURPOSE);
        context.update(self.server.as_bytes());
        context.update(self.peer.as_bytes());
        context.update(&self.challenge.nonce);
        context.update(&[self.challenge.bits]);
        context
    }

    fn counts(&self, mut prefix: Context, solution: Solution) -> bool {
        prefix.update(&solution.0.to_be_bytes());
        leading_zeros(&finish(prefix)) >= u32::from(self.challenge.bits)
    }

    /// Whether this answers the challenge.
    pub fn is_done_by(&self, solution: Solution) -> bool {
        self.counts(self.prefix(), solution)
    }

    /// Does the work, from `start` on; blocks for some seconds at most. `None` when it is for more than [`MOST_BITS`], or when `goes_on`, which is
    /// asked now and then, says no.
    pub fn solve(&self, start: u64, mut goes_on: impl FnMut() -> bool) -> Option<Solution> {
        if self.challenge.bits > MOST_BITS {
            return None;
        }
        let prefix = self.prefix();
        let mut tried = 0u64;
        loop {
            let solution = Solution(start.wrapping_add(tried));
            if self.counts(prefix.clone(), solution) {
                return Some(solution);
            }
            tried += 1;
            if tried.is_multiple_of(1 << 14) && !goes_on() {
                return None;
            }
        }
    }
}

fn finish(context: Context) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(context.finish().as_ref());
    hash
}

fn leading_zeros(hash: &[u8; 32]) -> u32 {
    let [high, low] = [0, 16].map(|at| {
        let mut half = [0; 16];
        half.copy_from_slice(&hash[at..at + 16]);
        u128::from_be_bytes(half)
    });
    if high == 0 { 128 + low.leading_zeros() } else { high.leading_zeros() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(bits: u8) -> Work {
        let challenge = Challenge { nonce: [3; 16], bits, seconds: 20 };
        Work { challenge, server: PeerId::from_bytes([1; 32]), peer: PeerId::from_bytes([2; 32]) }
    }

    #[test]
    fn tokens_survive_their_text_form_in_either_case() {
        let token = Token([7; TOKEN_LEN]);
        let text = token.to_string();
        assert_eq!(text.parse::<Token>(), Ok(token.clone()));
        assert_eq!(text.to_uppercase().parse::<Token>(), Ok(token));
        for wrong in ["", "abc", &text[1..], &format!("{text}a"), &format!("{}1", &text[1..])] {
            assert_eq!(wrong.parse::<Token>(), Err(ParseTokenError), "{wrong}");
        }
    }

    #[test]
    fn work_counts_for_one_peer_one_server_and_one_challenge() {
        let done = work(12);
        let solution = done.solve(99, || true).unwrap();
        assert!(done.is_done_by(solution));
        let elsewhere = Work { server: PeerId::from_bytes([9; 32]), ..done };
        let somebody = Work { peer: PeerId::from_bytes([9; 32]), ..done };
        let later = Work { challenge: Challenge { nonce: [4; 16], ..done.challenge }, ..done };
        let counted = [elsewhere, somebody, later].iter().filter(|work| work.is_done_by(solution)).count();
        assert_eq!(counted, 0, "each had one chance in 4096, and the numbers here are fixed");
    }

    #[test]
    fn nobody_works_without_end() {
        assert_eq!(work(MOST_BITS + 1).solve(0, || true), None);
        assert_eq!(work(MOST_BITS).solve(0, || false), None);
        assert!(work(0).solve(5, || true) == Some(Solution(5)));
    }

    #[test]
    fn zeros_are_counted_over_the_middle() {
        let mut hash = [0; 32];
        assert_eq!(leading_zeros(&hash), 256);
        hash[16] = 1;
        assert_eq!(leading_zeros(&hash), 135);
        hash[0] = 0x10;
        assert_eq!(leading_zeros(&hash), 3);
    }
}
