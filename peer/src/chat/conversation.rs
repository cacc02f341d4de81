//! What one side knows of a conversation: a pure state machine.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::{Frame, MAX_LINE, harmless};

/// A line that is not acknowledged for so long is told of: the time after which a session that does not answer is doubted (two retransmissions of any
/// usual path are well within it, RFC 9002, 6.2).
pub const LATE: Duration = Duration::from_secs(5);

/// Most lines that wait to be heard.
pub const MAX_WAITING: usize = 1024;

/// Something to show.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// The other side is there, for the first time or again.
    Here {
        /// Its program is another than the one that was there before.
        anew: bool,
    },
    /// The other side has said something.
    Line {
        /// [Harmless](harmless).
        text: String,
        /// How long it has waited there.
        age: Duration,
    },
    /// One of our lines has not been heard for [`LATE`].
    Late {
        /// Its number.
        number: u64,
        /// What it says.
        text: String,
    },
    /// A line that was late has been heard.
    Delivered {
        /// Its number.
        number: u64,
        /// What it says.
        text: String,
        /// How long that took.
        after: Duration,
    },
    /// The other side has left.
    Left,
}

/// Why a line is not taken: too many wait already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{MAX_WAITING} lines wait to be delivered already")]
pub struct Full;

/// The other side does not keep to the rules; the stream must be given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the other side does not keep to the rules of a conversation")]
pub struct Violation;

#[derive(Debug)]
struct Waiting {
    number: u64,
    text: String,
    since: Instant,
    late: bool,
}

#[derive(Debug, Clone, Copy)]
struct Other {
    epoch: u64,
    /// The last of its lines that was taken.
    heard: u64,
}

/// What was done on the present stream.
#[derive(Debug, Default)]
struct Standing {
    hello_sent: bool,
    greeted: bool,
    /// The last of our lines that went onto it.
    sent: u64,
    heard_due: bool,
    bye_sent: bool,
    left: bool,
}

/// One side of a conversation.
#[derive(Debug)]
pub struct Conversation {
    epoch: u64,
    /// The number of our last line.
    last: u64,
    waiting: VecDeque<Waiting>,
    other: Option<Other>,
    stream: Option<Standing>,
    leaving: bool,
    events: VecDeque<Event>,
}

impl Conversation {
    /// Begins, with a random number that tells this program from others.
    pub fn new(epoch: u64) -> Self {
        Self {
            epoch,
            last: 0,
            waiting: VecDeque::new(),
            other: None,
            stream: None,
            leaving: false,
            events: VecDeque::new(),
        }
    }

    /// Says a line of at most [`MAX_LINE`] bytes; what is longer is cut.
    ///
    /// # Errors
    ///
    /// When [`MAX_WAITING`] wait already.
    pub fn say(&mut self, line: &str, now: Instant) -> Result<u64, Full> {
        if self.is_full() {
            return Err(Full);
        }
        self.last += 1;
        let text = line[..line.floor_char_boundary(MAX_LINE)].to_owned();
        self.waiting.push_back(Waiting { number: self.last, text, since: now, late: false });
        Ok(self.last)
    }

    /// Whether no line is taken.
    pub fn is_full(&self) -> bool {
        self.waiting.len() >= MAX_WAITING
    }

    /// How many lines have not been heard.
    pub fn undelivered(&self) -> usize {
        self.waiting.len()
    }

    /// Says goodbye once everything is heard.
    pub fn leave(&mut self) {
        self.leaving = true;
    }

    /// Whether goodbye was said on the present stream, by either side.
    pub fn is_over(&self) -> bool {
        self.stream.as_ref().is_some_and(|stream| stream.bye_sent || stream.left)
    }

    /// Whether the other side is there.
    pub fn is_met(&self) -> bool {
        self.stream.as_ref().is_some_and(|stream| stream.greeted && !stream.left)
    }

    /// A new stream stands, in place of whatever there was.
    pub fn handle_stream(&mut self) {
        self.stream = Some(Standing::default());
    }

    /// The stream is gone.
    pub fn handle_loss(&mut self) {
        self.stream = None;
    }

    /// A frame has come on the present stream.
    ///
    /// # Errors
    ///
    /// When it does not belong there.
    pub fn handle_frame(&mut self, frame: Frame, now: Instant) -> Result<(), Violation> {
        let stream = self.stream.as_mut().ok_or(Violation)?;
        match frame {
            Frame::Hello { epoch, heard } if !stream.greeted => {
                let anew = self.other.is_some_and(|other| other.epoch != epoch);
                if self.other.is_none() || anew {
                    self.other = Some(Other { epoch, heard: 0 });
                }
                let heard = match heard {
                    Some((epoch, number)) if epoch == self.epoch => number,
                    _ => 0,
                };
                if heard > self.last {
                    return Err(Violation);
                }
                stream.greeted = true;
                stream.sent = heard;
                self.events.push_back(Event::Here { anew });
                self.acknowledged(heard, now);
            }
            Frame::Line { number, age, text } if stream.greeted && !stream.left => {
                let Some(other) = &mut self.other else { return Err(Violation) };
                stream.heard_due = true;
                if number <= other.heard {
                    return Ok(());
                }
                // The first that we hear may be any: what went before was heard by whoever was here before us.
                if other.heard > 0 && number > other.heard + 1 {
                    return Err(Violation);
                }
                other.heard = number;
                let text = harmless(&text).into_owned();
                self.events.push_back(Event::Line { text, age: Duration::from_millis(age) });
            }
            Frame::Heard(number) if stream.greeted && number <= stream.sent => {
                self.acknowledged(number, now);
            }
            Frame::Bye if stream.greeted && !stream.left => {
                stream.left = true;
                self.events.push_back(Event::Left);
            }
            _ => return Err(Violation),
        }
        Ok(())
    }

    fn acknowledged(&mut self, number: u64, now: Instant) {
        while self.waiting.front().is_some_and(|waiting| waiting.number <= number) {
            let Some(Waiting { number, text, since, late }) = self.waiting.pop_front() else { break };
            if late {
                let after = now.saturating_duration_since(since);
                self.events.push_back(Event::Delivered { number, text, after });
            }
        }
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        for waiting in &mut self.waiting {
            if !waiting.late && waiting.since + LATE <= now {
                waiting.late = true;
                self.events.push_back(Event::Late { number: waiting.number, text: waiting.text.clone() });
            }
        }
    }

    /// When [`handle_timeout`](Self::handle_timeout) has something to do.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.waiting.iter().find(|waiting| !waiting.late).map(|waiting| waiting.since + LATE)
    }

    /// The next thing to show. What is taken from here counts as shown.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// The next frame for the present stream. To be asked when [`poll_event`](Self::poll_event) has no more: a line is acknowledged when it was shown.
    pub fn poll_transmit(&mut self, now: Instant) -> Option<Frame> {
        let stream = self.stream.as_mut()?;
        if stream.bye_sent {
            return None;
        }
        if !stream.hello_sent {
            stream.hello_sent = true;
            let heard = self.other.filter(|other| other.heard > 0).map(|other| (other.epoch, other.heard));
            return Some(Frame::Hello { epoch: self.epoch, heard });
        }
        if !stream.greeted {
            return None;
        }
        let unshown = self.events.iter().any(|event| matches!(event, Event::Line { .. }));
        if let (true, false, Some(other)) = (stream.heard_due, unshown, self.other) {
            stream.heard_due = false;
            return Some(Frame::Heard(other.heard));
        }
        if stream.left {
            return None;
        }
        // They stand in order, without gaps.
        let first = self.waiting.front().map_or(self.last + 1, |waiting| waiting.number);
        let next = usize::try_from((stream.sent + 1).saturating_sub(first)).unwrap_or(usize::MAX);
        if let Some(waiting) = self.waiting.get(next) {
            stream.sent = waiting.number;
            let age = now.saturating_duration_since(waiting.since).as_millis();
            return Some(Frame::Line {
                number: waiting.number,
                age: u64::try_from(age).unwrap_or(u64::MAX),
                text: waiting.text.clone(),
            });
        }
        if self.leaving && self.waiting.is_empty() {
            stream.bye_sent = true;
            return Some(Frame::Bye);
        }
        None
    }
}
