//! When colours and other attributes of text are wanted.

use std::env;
use std::io::IsTerminal;

/// Whether text that goes there may be styled: a terminal that can, and nobody who has said no (https://no-color.org).
pub(super) fn wanted(output: &impl IsTerminal) -> bool {
    let refused = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    output.is_terminal() && !refused && env::var_os("TERM").is_none_or(|term| term != "dumb")
}
