//! Who may register: the one place where that is decided.
//!
//! | module | what |
//! |---|---|
//! | [`records`] | what is kept: who is banned, who was admitted, which tokens there are |
//! | [`policy`] | the judgement. Pure |
//! | [`pressure`] | how much work newcomers have to do. Pure |
//! | `callout` | asks the operator's own service |
//! | `gate` | the shell: carries out what the policy says, and answers only when it is on disk |

mod callout;
pub(crate) mod gate;
pub mod policy;
pub mod pressure;
pub mod records;

pub use policy::{Policy, Refusal, Verdict};
pub use records::{Ban, Enrolment, Records, TokenRecord, Write};
