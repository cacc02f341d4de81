//! The library in the lab: who dials whom, and how many at once.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use end_to_end::process::PATIENCE;
use end_to_end::world::{SITE_DELAY, World};
use libtest_mimic::Trial;
use netsim::{Host, RouterKind, SiteConfig};
use peer::{Endpoint, Session};

use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("dialling::both_at_once_share_one_session", both_at_once),
        trial("dialling::five_peers_at_once_on_one_endpoint", five_at_once),
        trial("dialling::a_second_session_takes_the_path_of_the_first", a_second_session),
        trial("dialling::ten_dials_at_once_to_one_peer_give_ten_sessions", ten_dials_at_once),
        trial("dialling::a_dialled_peer_may_not_dial_back_uninvited", no_dialling_back),
        trial("dialling::ipv6_behind_firewalls_is_direct", ipv6_behind_firewalls),
    ]
}

/// A runtime whose threads live in a host of the lab.
pub(crate) fn runtime(host: &Host) -> anyhow::Result<tokio::runtime::Runtime> {
    let host = host.clone();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .on_thread_start(move || host.enter().expect("a thread may enter its lab's namespace"))
        .enable_all()
        .build()?;
    Ok(runtime)
}

/// Runs a future on a thread of the runtime, so inside its host.
pub(crate) fn on<T: Send + 'static>(
    runtime: &tokio::runtime::Runtime,
    future: impl Future<Output = anyhow::Result<T>> + Send + 'static,
) -> anyhow::Result<T> {
    let task = runtime.spawn(future);
    runtime.block_on(async { tokio::time::timeout(PATIENCE, task).await })??
}

pub(crate) async fn endpoint(address: String) -> anyhow::Result<Endpoint> {
    let endpoint = Endpoint::builder().server(address.parse()?).bind().await?;
    endpoint.online().await?;
    Ok(endpoint)
}

pub(crate) async fn until_direct(session: &Session) -> anyhow::Result<()> {
    let mut changes = session.path_changes();
    loop {
        let next = futures_util::StreamExt::next(&mut changes);
        let path = tokio::time::timeout(PATIENCE, next).await?.context("the session ended")?;
        if path.is_direct() {
            return Ok(());
        }
    }
}

/// Sends `text` on a new stream and gives what comes back.
pub(crate) async fn ask(session: &Session, text: &str) -> anyhow::Result<String> {
    let (mut send, mut receive) = session.open_bi().await?;
    send.write_all(text.as_bytes()).await?;
    send.finish()?;
    Ok(String::from_utf8(receive.read_to_end(1024).await?)?)
}

/// Echoes every stream of a session until it ends.
pub(crate) async fn echo(session: Session) {
    while let Ok((mut send, mut receive)) = session.accept_bi().await {
        if let Ok(text) = receive.read_to_end(1024).await {
            let _ = send.write_all(&text).await;
            let _ = send.finish();
        }
    }
}

/// Two homes that cannot be reached unasked, each with an endpoint.
struct Homes {
    world: World,
    runtimes: [tokio::runtime::Runtime; 2],
}

impl Homes {
    fn new(seed: u64, config: impl Fn() -> SiteConfig) -> anyhow::Result<Self> {
        let mut world = World::new(seed)?;
        let sites = [world.lab.add_site("a", config())?, world.lab.add_site("b", config())?];
        let runtimes = [runtime(&sites[0].host(0))?, runtime(&sites[1].host(0))?];
        Ok(Self { world, runtimes })
    }

    fn endpoint(&self, side: usize) -> anyhow::Result<Endpoint> {
        on(&self.runtimes[side], endpoint(self.world.address.clone()))
    }

    /// An endpoint in the first home, and the id of one in the second that echoes.
    fn dialler_and_echo(&self) -> anyhow::Result<(Endpoint, peer::PeerId)> {
        let (dialler, listener) = (self.endpoint(0)?, self.endpoint(1)?);
        let target = listener.id();
        self.runtimes[1].spawn(async move {
            while let Some(session) = listener.accept().await {
                tokio::spawn(echo(session));
            }
        });
        Ok((dialler, target))
    }
}

fn home() -> SiteConfig {
    SiteConfig::new(RouterKind::EimApdf).delay(SITE_DELAY)
}

fn both_at_once() -> anyhow::Result<()> {
    let homes = Homes::new(4, home)?;
    let runtimes = &homes.runtimes;
    for round in 0..5 {
        let endpoints = [homes.endpoint(0)?, homes.endpoint(1)?];
        let ids = [endpoints[0].id(), endpoints[1].id()];
        let dials: Vec<_> = (0..2)
            .map(|side| {
                let (endpoint, target) = (endpoints[side].clone(), ids[1 - side]);
                runtimes[side]
                    .spawn(async move { tokio::time::timeout(PATIENCE, endpoint.connect(target)).await })
            })
            .collect();
        let mut sessions = Vec::new();
        for (dial, runtime) in dials.into_iter().zip(runtimes) {
            sessions.push(runtime.block_on(dial)???);
        }
        // One session: what one end opens the other accepts.
        let other = sessions[1].clone();
        runtimes[1].spawn(echo(other));
        let asker = sessions[0].clone();
        let answer = on(&runtimes[0], async move {
            let answer = ask(&asker, "same session?").await?;
            until_direct(&asker).await?;
            Ok(answer)
        })?;
        ensure!(answer == "same session?", "round {round}: {answer:?}");
        ensure!(sessions[0].side() != sessions[1].side(), "round {round}: each has its own connection");
        for (endpoint, runtime) in endpoints.into_iter().zip(runtimes) {
            // Nobody was left waiting to be accepted.
            let accepting = endpoint.clone();
            let extra = runtime.block_on(async move {
                tokio::time::timeout(Duration::from_millis(200), accepting.accept()).await.is_ok()
            });
            ensure!(!extra, "round {round}: a second session");
            on(runtime, async move {
                endpoint.close().await;
                Ok(())
            })?;
        }
    }
    Ok(())
}

fn five_at_once() -> anyhow::Result<()> {
    let kinds = [
        RouterKind::EimEif,
        RouterKind::EimApdf,
        RouterKind::Apdm,
        RouterKind::Public,
        RouterKind::CarrierApdm,
    ];
    let mut world = World::new(5)?;
    let hub = world.lab.add_site("hub", home())?;
    let hub_runtime = runtime(&hub.host(0))?;
    let hub_endpoint = on(&hub_runtime, endpoint(world.address.clone()))?;
    let hub_id = hub_endpoint.id();
    let serving = hub_endpoint.clone();
    hub_runtime.spawn(async move {
        while let Some(session) = serving.accept().await {
            tokio::spawn(echo(session));
        }
    });
    let mut spokes = Vec::new();
    for (number, kind) in kinds.into_iter().enumerate() {
        let site = world.lab.add_site(&format!("spoke{number}"), SiteConfig::new(kind).delay(SITE_DELAY))?;
        let runtime = runtime(&site.host(0))?;
        let endpoint = on(&runtime, endpoint(world.address.clone()))?;
        spokes.push((kind, runtime, endpoint));
    }
    let dials: Vec<_> = spokes
        .iter()
        .map(|(kind, runtime, endpoint)| {
            let (kind, endpoint) = (*kind, endpoint.clone());
            runtime.spawn(async move {
                let session = endpoint.connect(hub_id).await?;
                for turn in 0..20 {
                    let text = format!("{kind} {turn}");
                    ensure!(ask(&session, &text).await? == text);
                }
                if !matches!(kind, RouterKind::Apdm | RouterKind::CarrierApdm) {
                    until_direct(&session).await?;
                }
                ensure!(ask(&session, "bye").await? == "bye");
                anyhow::Ok(())
            })
        })
        .collect();
    for (dial, (kind, runtime, _)) in dials.into_iter().zip(&spokes) {
        runtime.block_on(async { tokio::time::timeout(PATIENCE, dial).await })???;
        eprintln!("{kind} done");
    }
    Ok(())
}

fn a_second_session() -> anyhow::Result<()> {
    let homes = Homes::new(6, home)?;
    let (dialler, target) = homes.dialler_and_echo()?;
    on(&homes.runtimes[0], async move {
        let first = dialler.connect(target).await?;
        until_direct(&first).await?;
        let second = dialler.connect(target).await?;
        ensure!(second.path().is_some_and(|path| path.is_direct()), "a way that is known is found anew");
        ensure!(ask(&second, "two").await? == "two");
        drop(second);
        ensure!(ask(&first, "one").await? == "one", "the end of one session ended another");
        Ok(())
    })
}

fn ten_dials_at_once() -> anyhow::Result<()> {
    let homes = Homes::new(9, home)?;
    let (dialler, target) = homes.dialler_and_echo()?;
    on(&homes.runtimes[0], async move {
        let dials: Vec<_> = (0..10)
            .map(|number| {
                let dialler = dialler.clone();
                tokio::spawn(async move {
                    let session = dialler.connect(target).await?;
                    until_direct(&session).await?;
                    let text = format!("dial {number}");
                    ensure!(ask(&session, &text).await? == text);
                    anyhow::Ok(session.stable_id())
                })
            })
            .collect();
        let mut connections = std::collections::BTreeSet::new();
        for dial in dials {
            connections.insert(dial.await??);
        }
        ensure!(connections.len() == 10, "{} connections", connections.len());
        Ok(())
    })
}

fn no_dialling_back() -> anyhow::Result<()> {
    let homes = Homes::new(10, home)?;
    let runtimes = &homes.runtimes;
    let address = homes.world.address.clone();
    let dialler = on(&runtimes[0], async move {
        let nobody = peer::IntroductionPolicy::Only(Vec::new());
        let endpoint = Endpoint::builder().server(address.parse()?).policy(nobody).bind().await?;
        endpoint.online().await?;
        Ok(endpoint)
    })?;
    let listener = homes.endpoint(1)?;
    let (target, origin) = (listener.id(), dialler.id());
    // It stays where it is: an endpoint that is gone could not be dialled in any case.
    let dialling = dialler.clone();
    let session = on(&runtimes[0], async move { Ok(dialling.connect(target).await?) })?;
    on(&runtimes[1], async move {
        let accepted = listener.accept().await.context("open")?;
        let back = listener.connect(origin).await;
        ensure!(back.is_err(), "a peer that admits nobody was dialled");
        ensure!(accepted.close_reason().is_none(), "and the session that it asked for is gone");
        Ok(())
    })?;
    ensure!(session.close_reason().is_none());
    drop(dialler);
    Ok(())
}

fn ipv6_behind_firewalls() -> anyhow::Result<()> {
    let homes = Homes::new(7, || SiteConfig::new(RouterKind::Apdm).delay(SITE_DELAY).ipv6(true))?;
    let (dialler, target) = homes.dialler_and_echo()?;
    on(&homes.runtimes[0], async move {
        let session = dialler.connect(target).await?;
        until_direct(&session).await?;
        ensure!(
            matches!(session.path(), Some(peer::Path::Direct { remote, .. }) if remote.is_ipv6()),
            "IPv4 between these two cannot be punched: {:?}",
            session.path()
        );
        ensure!(ask(&session, "six").await? == "six");
        Ok(())
    })
}
