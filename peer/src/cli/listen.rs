//! `peer listen`.

use std::process::Stdio;
use std::sync::Arc;

use clap::Args;
use peer::{Endpoint, IntroductionPolicy, PeerId, Session};
use tokio::process::Command;
use tokio::sync::Semaphore;

use super::connect::follow;
use super::report::Report;
use super::{EndpointArguments, Failure, follow_servers, interrupted, pipe};

pub(super) const EXAMPLES: &str = "\
Examples:
  peer listen --server rv://ID@vps.example --echo
  peer listen --server rv://ID@vps.example > received.tar
  peer listen --server rv://ID@vps.example --allow PEER -- uptime";

/// Commands that run at once; further streams wait.
const MAX_COMMANDS: usize = 64;

#[derive(Debug, Args)]
pub(super) struct ListenArguments {
    #[command(flatten)]
    pub(super) endpoint: EndpointArguments,
    /// Send back whatever arrives, for every session until stopped.
    #[arg(long, conflicts_with = "command")]
    echo: bool,
    /// Accept this peer only; may be given more than once [default: anyone who knows this id].
    #[arg(long, value_name = "PEER")]
    allow: Vec<PeerId>,
    /// Run this for every stream of every session, joined to its standard input and output.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// What a session gets.
#[derive(Debug, Clone)]
enum Service {
    Echo,
    Command(Arc<[String]>, Arc<Semaphore>),
}

pub(super) async fn run(arguments: ListenArguments, verbose: bool) -> Result<(), Failure> {
    let report = Report::new(arguments.endpoint.json);
    let policy = if arguments.allow.is_empty() {
        IntroductionPolicy::Anyone
    } else {
        IntroductionPolicy::Only(arguments.allow.clone())
    };
    let endpoint = arguments.endpoint.open(policy, &report).await?;
    follow_servers(&endpoint, &report, verbose);
    report.listening(endpoint.id(), &arguments.endpoint.server);
    let service = if arguments.echo {
        Some(Service::Echo)
    } else if arguments.command.is_empty() {
        None
    } else {
        Some(Service::Command(arguments.command.into(), Arc::new(Semaphore::new(MAX_COMMANDS))))
    };
    let outcome = tokio::select! {
        outcome = async {
            match service {
                Some(service) => serve(&endpoint, &service, &report).await,
                None => pipe_first(&endpoint, &report).await,
            }
        } => outcome,
        // Stopping it is how a listener ends.
        () = interrupted() => Ok(()),
    };
    endpoint.close().await;
    outcome
}

/// Joins the first session to standard input and output, and turns others away.
async fn pipe_first(endpoint: &Endpoint, report: &Report) -> Result<(), Failure> {
    let Some(session) = endpoint.accept().await else { return Ok(()) };
    report.connected(&session);
    let paths = tokio::spawn(follow(session.clone(), report.clone()));
    let turn_away = async {
        while let Some(other) = endpoint.accept().await {
            other.close(1u8.into(), b"this listener serves one session, and has one");
        }
        std::future::pending::<()>().await;
    };
    let piped = async {
        let (send, receive) = pipe::meet(&session).await?;
        let upload = pipe::upload(tokio::io::stdin(), send);
        let download = pipe::download(receive, tokio::io::stdout(), || report.first_byte(&session));
        tokio::try_join!(upload, download)
    };
    let outcome = tokio::select! {
        outcome = piped => outcome,
        () = turn_away => return Ok(()),
    };
    paths.abort();
    let (sent, received) = outcome.map_err(Failure::broken)?;
    report.closed(&session, sent, received);
    // The side that dialled closes when it has everything.
    let _ = tokio::time::timeout(std::time::Duration::from_secs(5), session.closed()).await;
    Ok(())
}

async fn serve(endpoint: &Endpoint, service: &Service, report: &Report) -> Result<(), Failure> {
    while let Some(session) = endpoint.accept().await {
        tokio::spawn(serve_session(session, service.clone(), report.clone()));
    }
    Ok(())
}

async fn serve_session(session: Session, service: Service, report: Report) {
    report.connected(&session);
    let paths = tokio::spawn(follow(session.clone(), report.clone()));
    let mut streams = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            stream = pipe::accept(&session) => match stream {
                Ok((send, receive)) => {
                    let service = service.clone();
                    streams.spawn(async move {
                        match service {
                            Service::Echo => pipe::echo(send, receive).await,
                            Service::Command(command, running) => {
                                let _running = running.acquire_owned().await?;
                                run_command(&command, send, receive).await
                            }
                        }
                    });
                }
                Err(_) if session.close_reason().is_some() => break,
                // That one stream was of no use.
                Err(error) => report.session_failed(session.peer(), &error),
            },
            Some(ended) = streams.join_next() => match ended {
                Ok(Err(error)) if session.close_reason().is_none() => report.session_failed(session.peer(), &error),
                _ => {}
            },
        }
    }
    // Commands end with their session.
    streams.shutdown().await;
    paths.abort();
    let stats = session.stats();
    report.closed(&session, stats.udp_tx.bytes, stats.udp_rx.bytes);
}

/// Joins a command's standard input and output to a stream; its standard error stays ours.
async fn run_command(
    command: &[String],
    send: peer::quinn::SendStream,
    receive: peer::quinn::RecvStream,
) -> anyhow::Result<u64> {
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
