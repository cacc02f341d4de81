//! What a person sees and types, or what a program reads and writes.

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use peer::chat::{MAX_LINE, harmless};
use rustyline_async::{Readline, ReadlineEvent, SharedWriter};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::super::Failure;
use super::super::report::Report;

/// What comes from this side.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Input {
    Line(String),
    /// There is nothing more to say.
    End,
    Interrupted,
}

/// Something that was said.
pub(super) struct Said<'a> {
    /// The alias or the id of who said it.
    pub(super) name: &'a str,
    pub(super) id: &'a str,
    pub(super) text: &'a str,
    pub(super) age: Duration,
}

/// A terminal, or standard input and output by lines.
pub(super) enum Front {
    Screen(Screen),
    Plain(Plain),
}

pub(super) struct Screen {
    editor: Readline,
    above: SharedWriter,
    styled: bool,
}

pub(super) struct Plain {
    /// `None`: all were said.
    lines: Option<Lines<tokio::io::Stdin>>,
    output: tokio::io::Stdout,
    report: Report,
}

impl Front {
    /// Whether there is a terminal to talk at.
    pub(super) fn is_terminal(report: &Report) -> bool {
        !report.is_json() && std::io::stdin().is_terminal() && std::io::stdout().is_terminal()
    }

    pub(super) fn screen() -> Result<Self, Failure> {
        let failed = |error| Failure::failed(anyhow::anyhow!("the terminal cannot be used: {error}"));
        let (mut editor, above) = Readline::new("> ".into()).map_err(failed)?;
        // What was typed is shown as what was said is.
        editor.should_print_line_on(false, false);
        let styled = super::super::style::wanted(&std::io::stdout());
        Ok(Self::Screen(Screen { editor, above, styled }))
    }

    pub(super) fn plain(report: &Report) -> Self {
        let lines = Some(Lines::new(tokio::io::stdin()));
        Self::Plain(Plain { lines, output: tokio::io::stdout(), report: report.clone() })
    }

    pub(super) fn is_screen(&self) -> bool {
        matches!(self, Self::Screen(_))
    }

    /// The next line of this side. May be dropped and called again.
    pub(super) async fn input(&mut self) -> Input {
        match self {
            Self::Screen(screen) => screen.input().await,
            Self::Plain(Plain { lines: Some(lines), .. }) => {
                lines.next().await.map_or(Input::End, Input::Line)
            }
            Self::Plain(_) => std::future::pending().await,
        }
    }

    /// There will be no more input.
    pub(super) fn stop(&mut self) {
        if let Self::Plain(plain) = self {
            plain.lines = None;
        }
    }

    /// Shows what the other side has said.
    pub(super) async fn said(&mut self, said: &Said<'_>) -> std::io::Result<()> {
        match self {
            Self::Screen(screen) => {
                screen.line(said.age, said.name, said.text);
                Ok(())
            }
            Self::Plain(plain) => plain.said(said).await,
        }
    }

    /// Shows what was said here; a program knows.
    pub(super) fn echo(&mut self, text: &str) {
        if let Self::Screen(screen) = self {
            screen.line(Duration::ZERO, "you", &harmless(text));
        }
    }

    /// Tells something that nobody has said.
    pub(super) fn note(&mut self, event: &str, fields: Value, words: &str) {
        match self {
            Self::Screen(screen) => screen.note(words),
            Self::Plain(plain) => plain.report.say(event, fields, words),
        }
    }
}

impl Screen {
    async fn input(&mut self) -> Input {
        match self.editor.readline().await {
            Ok(ReadlineEvent::Line(line)) => {
                if !line.trim().is_empty() {
                    self.editor.add_history_entry(line.clone());
                }
                Input::Line(line)
            }
            Ok(ReadlineEvent::Eof) | Err(_) => Input::End,
            Ok(ReadlineEvent::Interrupted) => Input::Interrupted,
        }
    }

    fn line(&mut self, age: Duration, name: &str, text: &str) {
        let (name, clock) = (self.style("1", name), self.style("2", &clock(age)));
        self.print(&format!("{clock} {name}: {text}"));
    }

    fn note(&mut self, words: &str) {
        for words in words.lines() {
            // As it stands on standard error.
            let words = words.strip_prefix("peer: ").unwrap_or(words);
            let words = self.style("2", &format!("{} * {}", clock(Duration::ZERO), harmless(words)));
            self.print(&words);
        }
    }

    fn print(&mut self, line: &str) {
        // Were the queue full, the line would go with the next.
        let _ = writeln!(self.above, "{line}");
    }

    /// With an SGR attribute (ECMA-48, 8.3.117), where that is wanted.
    fn style(&self, attribute: &str, text: &str) -> String {
        if self.styled { format!("\u{1b}[{attribute}m{text}\u{1b}[m") } else { text.to_owned() }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // What waits above, and no prompt.
        let _ = self.editor.flush();
    }
}

/// The time of day so long ago.
fn clock(age: Duration) -> String {
    let now = jiff::Zoned::now();
    let then = jiff::SignedDuration::try_from(age).ok().and_then(|age| now.checked_sub(age).ok());
    then.unwrap_or(now).strftime("%H:%M").to_string()
}

impl Plain {
    async fn said(&mut self, said: &Said<'_>) -> std::io::Result<()> {
        let line = if self.report.is_json() {
            let age = u64::try_from(said.age.as_millis()).unwrap_or(u64::MAX);
            let fields = json!({
                "event": "line", "peer": said.id, "name": said.name, "text": said.text, "age_ms": age,
            });
            format!("{fields}\n")
        } else {
            format!("{}\n", said.text)
        };
        self.output.write_all(line.as_bytes()).await?;
        self.output.flush().await
    }
}

/// Lines of an input, none longer than [`MAX_LINE`]: what is longer comes in several.
pub(super) struct Lines<R> {
    input: R,
    buffer: Vec<u8>,
    ended: bool,
}

impl<R: tokio::io::AsyncRead + Unpin> Lines<R> {
    pub(super) fn new(input: R) -> Self {
        Self { input, buffer: Vec::new(), ended: false }
    }

    /// The next line; what is no UTF-8 is replaced (U+FFFD). May be dropped and called again.
    pub(super) async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(line) = self.take() {
                return Some(line);
            }
            if self.ended {
                return None;
            }
            self.buffer.reserve(MAX_LINE);
            if let Ok(0) | Err(_) = self.input.read_buf(&mut self.buffer).await {
                self.ended = true;
            }
        }
    }

    /// A whole line, or as much as a line may hold.
    fn take(&mut self) -> Option<String> {
        let end = self.buffer.iter().take(MAX_LINE + 1).position(|byte| *byte == b'\n');
        let (line, rest) = match end {
            Some(end) => (end, end + 1),
            None if self.buffer.len() > MAX_LINE => {
                let cut = cut(&self.buffer[..=MAX_LINE]);
                (cut, cut)
            }
            None if self.ended && !self.buffer.is_empty() => (self.buffer.len(), self.buffer.len()),
            None => return None,
        };
        let bytes: Vec<u8> = self.buffer.drain(..rest).collect();
        let bytes = bytes[..line].strip_suffix(b"\r").filter(|_| rest > line).unwrap_or(&bytes[..line]);
        Some(String::from_utf8_lossy(bytes).into_owned())
    }
}

/// The last place where text may be cut: no character of UTF-8 goes on there.
fn cut(bytes: &[u8]) -> usize {
    let last = bytes.len() - 1;
    (1..=last).rev().take(4).find(|at| bytes[*at] & 0xc0 != 0x80).unwrap_or(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn lines(input: &[u8]) -> Vec<String> {
        let mut lines = Lines::new(input);
        let mut all = Vec::new();
        while let Some(line) = lines.next().await {
            all.push(line);
        }
        all
    }

    #[tokio::test]
    async fn input_comes_by_lines() {
        assert_eq!(lines(b"one\r\n\ntwo\nno end").await, ["one", "", "two", "no end"]);
        assert!(lines(b"").await.is_empty());
        assert_eq!(lines(b"a\xffb\n").await, ["a\u{fffd}b"]);
    }

    #[tokio::test]
    async fn an_endless_line_is_cut_between_characters_and_nothing_is_lost() {
        for start in ["", "x", "xy", "xyz"] {
            let text = format!("{start}{}", "€".repeat(MAX_LINE));
            let parts = lines(text.as_bytes()).await;
            assert!(parts.iter().all(|part| part.len() <= MAX_LINE));
            assert_eq!(parts.concat(), text);
        }
        // Bytes that are no text grow when they are replaced; they are said in pieces.
        let parts = lines(&vec![0xff; 2 * MAX_LINE]).await;
        assert_eq!(parts.concat().chars().count(), 2 * MAX_LINE);
    }

    #[tokio::test]
    async fn a_line_of_the_greatest_length_is_one_line() {
        let text = format!("{}\nnext\n", "x".repeat(MAX_LINE));
        assert_eq!(lines(text.as_bytes()).await.len(), 2);
    }
}
