//! `peer listen`.

use std::process::Stdio;
use std::sync::Arc;

use clap::Args;
use peer::Session;
use peer::daemon::{Access, Wanted};
use peer::forward::{BindPattern, Notice, Observer, Rules, TargetPattern};
use peer::quinn::{RecvStream, SendStream};
use peer::service::{Hub, Incoming, Opening};
use tokio::process::Command;
use tokio::sync::Semaphore;

use super::connect::follow;
use super::gate::{Gate, Grant};
use super::home::config::{Config, Serve};
use super::home::peers::{Peers, Who};
use super::report::Report;
use super::settings::{self, EndpointArguments, PeerName};
use super::{Failure, follow_servers, interrupted, pipe};

pub(super) const EXAMPLES: &str = "\
Examples:
  peer listen --echo
  peer listen > received.tar
  peer listen --allow PEER -- uptime
      Run a command for every session of that one peer.
  peer listen --allow-forward localhost:80 --allow-forward 192.168.1.0/24:22
      Trusted peers may connect to the web server here, and by SSH to that network.
  peer listen --allow-listen 127.0.0.1:8000-8010
      Trusted peers may have ports here lead to them (peer forward -R).
  peer listen --bench
      Trusted peers may measure what a session with this machine carries (peer bench).
  peer listen --serve
      Give what the configuration says, to whom it says:
        [[serve]]
        to = \"trusted\"          # or \"anyone\", an alias, an id, or a list of them
        forward = [\"localhost:22\", \"udp:localhost:53\", \"/run/docker.sock\"]
        bench = true            # peer bench

Nothing is forwarded that is not named. A pipe, --echo and COMMAND are for whoever knows this
machine's id, unless --allow names some. Open invitations (peer invite) are taken meanwhile.";

/// Commands that run at once; further streams wait.
const MAX_COMMANDS: usize = 64;

/// What those hear that came too late.
const ONE_SESSION: &[u8] = b"this listener serves one session, and has one";

/// Sessions that have brought no pipe yet.
const MAX_WAITING: usize = 64;

#[derive(Debug, Args)]
pub(super) struct ListenArguments {
    #[command(flatten)]
    pub(super) endpoint: EndpointArguments,
    /// Send back whatever arrives, for every session until stopped.
    #[arg(long, conflicts_with = "command")]
    echo: bool,
    /// Accept this peer only, by alias or id; may be given more than once [default: see below].
    #[arg(long, value_name = "PEER")]
    allow: Vec<PeerName>,
    /// Forward to this host and port, or Unix socket, for trusted peers, or for those of --allow: [udp:]HOST:PORT or /PATH, where the host
    /// may be a prefix or `*`, and the port a range or `*`.
    #[arg(long, value_name = "TARGET")]
    allow_forward: Vec<TargetPattern>,
    /// Listen for them at this address and port, or Unix socket: [udp:]ADDRESS:PORT or /PATH.
    #[arg(long, value_name = "PLACE")]
    allow_listen: Vec<BindPattern>,
    /// Let trusted peers, or those of --allow, measure what a session with this machine carries (peer bench).
    #[arg(long)]
    bench: bool,
    /// Give what the configuration says under [[serve]].
    #[arg(long)]
    serve: bool,
    /// Run this for every stream of every session, joined to its standard input and output.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// What a pipe gets.
#[derive(Debug, Clone)]
enum Service {
    Echo,
    Command(Arc<[String]>, Arc<Semaphore>),
    /// Nothing: this listener forwards only.
    Refuse,
}

pub(super) async fn run(arguments: ListenArguments, verbose: bool) -> Result<(), Failure> {
    let settings = arguments.endpoint.settle()?;
    let report = arguments.endpoint.report(&settings);
    let allowed = arguments
        .allow
        .iter()
        .map(|name| settings.find(name).map(|found| found.id))
        .collect::<Result<Vec<_>, _>>()?;
    let forwardings =
        arguments.serve || !arguments.allow_forward.is_empty() || !arguments.allow_listen.is_empty();
    let measurements = arguments.serve || arguments.bench;
    let named = arguments.bench || !arguments.allow_forward.is_empty() || !arguments.allow_listen.is_empty();
    let service = if arguments.echo {
        Some(Service::Echo)
    } else if !arguments.command.is_empty() {
        Some(Service::Command(arguments.command.into(), Arc::new(Semaphore::new(MAX_COMMANDS))))
    } else if named || arguments.serve {
        Some(Service::Refuse)
    } else {
        None
    };
    let mut grants = Vec::new();
    if named {
        let to = if allowed.is_empty() {
            vec![Who::Trusted]
        } else {
            allowed.iter().copied().map(Who::Id).collect()
        };
        let rules = Rules { forward: arguments.allow_forward, listen: arguments.allow_listen };
        grants.push(Grant { to, rules, bench: arguments.bench });
    }
    if arguments.serve {
        grants.extend(configured(&settings.config, &settings.peers()?, &report));
        if grants.is_empty() {
            report.nothing_served();
        }
    }
    let anyone = allowed.is_empty() && !matches!(service, Some(Service::Refuse));
    let gate = Arc::new(Gate::new(settings.home.clone(), grants, allowed, anyone, &report)?);
    let pipes = !matches!(service, Some(Service::Refuse));
    let wanted = Wanted { pipes, forwardings, measurements, ..Wanted::default() };
    let access = settings.serving(gate.policy(), (wanted, None), &report, "listen").await?;
    follow_servers(&access, &report, verbose);
    report.listening(access.id(), access.servers().unwrap_or(&settings.servers));
    let outcome = tokio::select! {
        outcome = async {
            match service {
                Some(service) => serve(&access, &service, &gate, &report).await,
                None => pipe_first(&access, &gate, &report).await,
            }
        } => outcome,
        () = gate.watch(&access) => Ok(()),
        // Stopping it is how a listener ends.
        () = interrupted() => Ok(()),
    };
    settings::conclude(&access, outcome).await
}

/// What the configuration gives to whom.
pub(super) fn configured(config: &Config, peers: &Peers, report: &Report) -> Vec<Grant> {
    for who in config.serve.iter().flat_map(|serve| &serve.to) {
        // An invitation may yet bring somebody of that name.
        if let Who::Alias(alias) = who
            && peers.named(alias).is_none()
        {
            report.nobody_of_that_name(alias);
        }
    }
    let rules = |serve: &Serve| Rules { forward: serve.forward.clone(), listen: serve.listen.clone() };
    let grant = |serve: &Serve| Grant { to: serve.to.clone(), rules: rules(serve), bench: serve.bench };
    config.serve.iter().map(grant).collect()
}

/// Joins the first session that brings a pipe to standard input and output, and turns others away.
async fn pipe_first(access: &Access, gate: &Arc<Gate>, report: &Report) -> Result<(), Failure> {
    let Some((session, send, receive)) = first_pipe(access, gate, report).await else {
        return settings::brought_all(access);
    };
    let turn_away = async {
        while let Some(other) = access.accept().await {
            other.close(1u8.into(), ONE_SESSION);
        }
        std::future::pending::<()>().await;
    };
    // What else that session wants is answered; another pipe is not taken.
    let others = serve_streams(&session, &Service::Refuse, gate, report);
    let stream = send.id();
    let piped = async {
        let upload = pipe::upload(tokio::io::stdin(), send);
        let download = pipe::download(receive, tokio::io::stdout(), || report.first_byte(&session));
        let totals = tokio::try_join!(upload, download)?;
        session.delivered(stream).await?;
        anyhow::Ok(totals)
    };
    let outcome = tokio::select! {
        outcome = piped => outcome,
        _ = async { tokio::join!(others, turn_away) } => return Ok(()),
    };
    let (sent, received) = outcome.map_err(Failure::broken)?;
    report.closed(&session, sent, received);
    // The side that dialled closes when it has everything.
    let _ = tokio::time::timeout(std::time::Duration::from_secs(5), session.closed()).await;
    Ok(())
}

/// Waits for a session that brings a pipe; others may ping or use an invitation meanwhile, and go.
async fn first_pipe(
    access: &Access,
    gate: &Arc<Gate>,
    report: &Report,
) -> Option<(Session, SendStream, RecvStream)> {
    let mut waiting = tokio::task::JoinSet::new();
    let mut sessions: Vec<Session> = Vec::new();
    loop {
        tokio::select! {
            session = access.accept(), if waiting.len() < MAX_WAITING => {
                let session = session?;
                report.connected(&session);
                tokio::spawn(follow(session.clone(), report.clone()));
                sessions.retain(|other| other.close_reason().is_none());
                sessions.push(session.clone());
                let gate = gate.clone();
                waiting.spawn(async move {
                    let met = pipe::meet(&session, Some(&gate)).await;
                    (session, met)
                });
            }
            Some(met) = waiting.join_next() => match met {
                Ok((session, Ok((send, receive)))) => {
                    for other in sessions.iter().filter(|other| other.stable_id() != session.stable_id()) {
                        other.close(1u8.into(), ONE_SESSION);
                    }
                    return Some((session, send, receive));
                }
                Ok((session, Err(error))) => report.session_failed(session.peer(), &error),
                Err(_) => {}
            },
        }
    }
}

async fn serve(access: &Access, service: &Service, gate: &Arc<Gate>, report: &Report) -> Result<(), Failure> {
    while let Some(session) = access.accept().await {
        tokio::spawn(serve_session(session, service.clone(), gate.clone(), report.clone()));
    }
    settings::brought_all(access)
}

async fn serve_session(session: Session, service: Service, gate: Arc<Gate>, report: Report) {
    report.connected(&session);
    let paths = tokio::spawn(follow(session.clone(), report.clone()));
    serve_streams(&session, &service, &gate, &report).await;
    paths.abort();
    let stats = session.stats();
    report.closed(&session, stats.udp_tx.bytes, stats.udp_rx.bytes);
}

/// Every stream that the other side opens, until the session is over.
async fn serve_streams(session: &Session, service: &Service, gate: &Arc<Gate>, report: &Report) {
    let hub = Hub::new(session.clone());
    let mut streams = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            opening = hub.accept() => match opening {
                Ok(opening) => {
                    streams.spawn(serve_stream(opening, service.clone(), gate.clone()));
                }
                Err(_) => break,
            },
            Some(ended) = streams.join_next() => match ended {
                Ok(Err(error)) if session.close_reason().is_none() => report.session_failed(session.peer(), &error),
                _ => {}
            },
        }
    }
    // Commands end with their session.
    streams.shutdown().await;
}

async fn serve_stream(opening: Opening, service: Service, gate: Arc<Gate>) -> anyhow::Result<()> {
    match opening.read().await? {
        Incoming::Pipe(send, receive) => serve_pipe(send, receive, service).await,
        Incoming::Request(request, exchange) => {
            gate.answer(request, exchange).await;
            Ok(())
        }
        _ => Ok(()),
    }
}

async fn serve_pipe(send: SendStream, receive: RecvStream, service: Service) -> anyhow::Result<()> {
    match service {
        Service::Echo => pipe::echo(send, receive).await.map(|_| ()),
        Service::Command(command, running) => {
            let _running = running.acquire_owned().await?;
            run_command(&command, send, receive).await.map(|_| ())
        }
        Service::Refuse => {
            pipe::refuse(send, receive);
            Ok(())
        }
    }
}

/// What becomes of requests, told.
pub(super) fn observer(report: &Report) -> Observer {
    let report = report.clone();
    Observer::new(move |notice: Notice| report.forwarding(&notice))
}

/// Joins a command's standard input and output to a stream; its standard error stays ours.
async fn run_command(command: &[String], send: SendStream, receive: RecvStream) -> anyhow::Result<u64> {
    let [program, arguments @ ..] = command else { anyhow::bail!("no command") };
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| anyhow::anyhow!("{program} cannot be run: {error}"))?;
    let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
        anyhow::bail!("{program} has no standard input or output")
    };
    let feed = async {
        // It may end before it has read everything; its output is what counts.
        let _ = pipe::download(receive, stdin, || {}).await;
        std::future::pending::<()>().await;
    };
    let finish = async {
        let sent = pipe::upload(stdout, send).await;
        child.wait().await?;
        sent
    };
    tokio::select! {
        sent = finish => sent,
        () = feed => unreachable!("it waits for ever"),
    }
}
