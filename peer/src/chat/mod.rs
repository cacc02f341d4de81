//! Lines of text between two people, each delivered once, over as many sessions as it takes.
//!
//! A [`Conversation`] is what one side knows: the lines that the other has not heard, and what was heard of it. It does no I/O. Each session brings a
//! stream that [`Frame`]s travel on; when one is lost, the next begins with what either side has heard, and the rest is said again. A line is
//! shown once as long as both programs live; one that is started anew knows nothing of what its predecessor has shown.
//!
//! Who opens the stream, and what tells it from others, is the application's business; `peer chat` asks for it with
//! [`Request::Chat`](crate::service::Request::Chat).

mod conversation;

#[cfg(test)]
mod conversation_tests;

pub use conversation::{Conversation, Event, Full, LATE, MAX_WAITING, Violation};

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt as _};

/// Most bytes of a line; a longer one goes in [`pieces`].
pub const MAX_LINE: usize = 8192;

/// Most bytes of a frame, without its length.
const MAX_FRAME: usize = MAX_LINE + 32;

/// What travels on the stream: a 16-bit big-endian length, and this in postcard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Frame {
    /// The first frame of either side on every stream.
    Hello {
        /// Chosen at random when the program was started: its lines are counted from 1.
        epoch: u64,
        /// The other's epoch, and the last of its lines that was shown here.
        heard: Option<(u64, u64)>,
    },
    /// A line.
    Line {
        /// One more than that of the line before.
        number: u64,
        /// Milliseconds that it has waited for a stream that would carry it.
        age: u64,
        /// Without line ends.
        text: String,
    },
    /// All lines up to this one were shown.
    Heard(u64),
    /// This side leaves. Nothing follows.
    Bye,
}

/// Why a frame cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The stream has ended or broken.
    #[error("the stream has ended")]
    Ended,
    /// It is nothing that this version knows, or too long.
    #[error("the other side says what this version does not understand")]
    Malformed,
}

impl Frame {
    /// Its bytes, the length first.
    pub fn encode(&self) -> Vec<u8> {
        let body = postcard::to_stdvec(self).unwrap_or_default();
        debug_assert!(body.len() <= MAX_FRAME, "lines have bounds");
        let mut bytes = Vec::from(u16::try_from(body.len()).unwrap_or(0).to_be_bytes());
        bytes.extend(body);
        bytes
    }

    fn decode(body: &[u8]) -> Result<Self, FrameError> {
        let (frame, rest) = postcard::take_from_bytes::<Self>(body).map_err(|_| FrameError::Malformed)?;
        let sound = match &frame {
            Self::Line { number, text, .. } => *number > 0 && text.len() <= MAX_LINE,
            _ => true,
        };
        if sound && rest.is_empty() { Ok(frame) } else { Err(FrameError::Malformed) }
    }

    /// Reads the next one. Not to be dropped half way.
    ///
    /// # Errors
    ///
    /// When there is none, or it is none.
    pub async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Result<Self, FrameError> {
        let length = usize::from(stream.read_u16().await.map_err(|_| FrameError::Ended)?);
        if length > MAX_FRAME {
            return Err(FrameError::Malformed);
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await.map_err(|_| FrameError::Ended)?;
        Self::decode(&body)
    }
}

/// A line that is longer than [`MAX_LINE`] in several that are not, cut between characters; any other as it is.
pub fn pieces(line: &str) -> impl Iterator<Item = &str> {
    let mut rest = Some(line);
    std::iter::from_fn(move || {
        let line = rest.take()?;
        let (piece, more) = line.split_at(line.floor_char_boundary(MAX_LINE));
        rest = (!more.is_empty()).then_some(more);
        Some(piece)
    })
}

/// A line as it may be shown: what could move a cursor, set a colour, reorder text or hide in it is written out, as `\u{1b}`.
/// Tabs stay; so do the joiners (U+200C, U+200D) that scripts and emoji are written with.
pub fn harmless(line: &str) -> Cow<'_, str> {
    if !line.contains(is_harmful) {
        return Cow::Borrowed(line);
    }
    let mut shown = String::with_capacity(line.len() + 16);
    for c in line.chars() {
        if is_harmful(c) { shown.extend(c.escape_unicode()) } else { shown.push(c) }
    }
    Cow::Owned(shown)
}

/// Control characters (C0, DEL, C1), line and paragraph separators, and the invisible ones of Unicode 16.0, 23.2: marks of direction, embeddings, overrides and
/// isolates (UAX #9), deprecated format characters, annotations, tags.
fn is_harmful(c: char) -> bool {
    (c.is_control() && c != '\t')
        || matches!(
            c,
            '\u{00ad}'
                | '\u{061c}'
                | '\u{180e}'
                | '\u{200b}'
                | '\u{200e}'..='\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{feff}'
                | '\u{fff9}'..='\u{fffb}'
                | '\u{e0000}'..='\u{e0fff}'
        )
}
