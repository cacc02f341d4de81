//! `peer chat`.

mod caller;
mod front;
mod links;
mod talk;

use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use peer::daemon::Wanted;
use peer::forward::Rules;
use peer::{IntroductionPolicy, PeerId};
use tokio::sync::mpsc;

use super::gate::{Gate, Grant};
use super::home::peers::Who;
use super::send::Patience;
use super::settings::{self, EndpointArguments, PeerName};
use super::{Failure, follow_servers, interrupted};
use caller::Caller;
use front::Front;
use talk::Talk;

pub(super) const EXAMPLES: &str = "\
Examples:
  peer chat nas
      Talk with whoever sits there: peer chat laptop, or peer chat --listen.
  peer chat --listen
      Wait for any trusted peer.
  peer chat --listen --from laptop
  echo \"backup done\" | peer chat nas --wait 60
      Without a terminal: a line for each line, to the end of the input.

At a terminal: /path says which path is in use, /quit or Ctrl-D leaves. A session that breaks
is opened again, and what was not acknowledged is said again, once. Control characters that
arrive are written out.";

#[derive(Debug, Args)]
pub(super) struct ChatArguments {
    #[command(flatten)]
    pub(super) endpoint: EndpointArguments,
    /// Wait until a peer calls [default: trusted peers only].
    #[arg(long, conflicts_with_all = ["peer", "wait"])]
    listen: bool,
    /// Talk with this peer only, by alias or id; may be given more than once.
    #[arg(long, value_name = "PEER", requires = "listen")]
    from: Vec<PeerName>,
    /// Give up when the other side has not been there for so long [default: wait until interrupted].
    #[arg(long, value_name = "SECONDS")]
    wait: Option<u64>,
    /// The peer to talk with: an alias, an id or a ticket.
    #[arg(required_unless_present = "listen")]
    peer: Option<PeerName>,
}

pub(super) async fn run(arguments: ChatArguments, verbose: bool) -> Result<(), Failure> {
    let settings = arguments.endpoint.settle()?;
    let report = arguments.endpoint.report(&settings);
    let found = arguments.peer.as_ref().map(|name| settings.find(name)).transpose()?;
    let from = arguments.from.iter().map(|name| settings.find(name).map(|found| found.id));
    let allowed: Vec<PeerId> = match &found {
        Some(found) => vec![found.id],
        None => from.collect::<Result<_, _>>()?,
    };
    // Nothing but a conversation is to be had here; who may have one is the gate's to say.
    let anybody = Grant { to: vec![Who::Trusted], rules: Rules::default(), bench: false };
    let grants = if allowed.is_empty() { vec![anybody] } else { Vec::new() };
    let at_terminal = Front::is_terminal(&report);
    let (words, mut shown) = mpsc::unbounded_channel();
    let notes = if at_terminal { report.clone().shown_by(words) } else { report.clone() };
    let gate = Arc::new(Gate::new(settings.home.clone(), grants, allowed, false, &notes)?);
    let policy: IntroductionPolicy = gate.policy();
    let wanted = Wanted { conversations: true, ..Wanted::default() };
    let access = settings.serving(policy, (wanted, found.as_ref()), &report, "chat").await?;
    follow_servers(&access, &notes, verbose);
    let front = if at_terminal { Front::screen() } else { Ok(Front::plain(&report)) };
    let front = match front {
        Ok(front) => front,
        Err(failure) => {
            access.close().await;
            return Err(failure);
        }
    };
    let (links, mut linked) = mpsc::channel(8);
    let caller = found.map(|found| Caller {
        access: access.clone(),
        settings: Arc::new(settings),
        found,
        gate: gate.clone(),
        links: links.clone(),
        report: notes.clone(),
        patience: Patience::new(arguments.wait.map(Duration::from_secs)),
        running: None,
        again: Some(tokio::time::Instant::now()),
        met: false,
    });
    let mut talk = Talk::new(access.id(), front, gate.clone(), notes.clone(), caller);
    talk.begin();
    let outcome = tokio::select! {
        outcome = talk.run(&mut linked, &mut shown) => outcome,
        () = links::answer(&access, &gate, &links, &notes) => Ok(()),
        () = gate.watch(&access) => Ok(()),
        () = interrupted() => Err(Failure::interrupted()),
    };
    talk.end().await;
    drop(talk);
    settings::conclude(&access, outcome).await
}
