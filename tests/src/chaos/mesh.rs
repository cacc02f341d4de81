//! The lab of a run: places, servers, and peers that send to each other.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use netsim::{Direction, Host, Impairment, Lab, Site, SiteConfig, Trouble};
use nix::sys::signal::Signal;
use tempfile::TempDir;

use super::member::{Load, Member};
use super::plan::{Disturbance, PEERS, PeerIndex, Place, PlaceId, Plan, Settings, Way};
use crate::process::{PATIENCE, Program};
use crate::world::start_server;

/// A rendezvous server that may be killed.
struct Server {
    host: Host,
    state: PathBuf,
    address: String,
    program: Option<Program>,
}

impl Server {
    fn start(host: Host, state: PathBuf) -> anyhow::Result<Self> {
        let (program, address) = start_server(&host, &state, true)?;
        Ok(Self { host, state, address, program: Some(program) })
    }

    fn kill(&mut self) -> anyhow::Result<()> {
        let Some(mut program) = self.program.take() else { return Ok(()) };
        program.signal(Signal::SIGKILL)?;
        program.wait(PATIENCE)?;
        Ok(())
    }

    fn restart(&mut self) -> anyhow::Result<()> {
        let (program, address) = start_server(&self.host, &self.state, true)?;
        ensure!(address == self.address, "another address after the restart: {address}");
        self.program = Some(program);
        Ok(())
    }
}

/// All of it.
pub(super) struct Mesh {
    lab: Lab,
    places: Vec<Place>,
    sites: Vec<Site>,
    servers: Vec<Server>,
    hosts: Vec<Host>,
    pub(super) members: Vec<Member>,
    _directory: TempDir,
}

impl Mesh {
    /// Builds the places and starts everybody. Nothing is sent yet.
    pub(super) fn new(
        plan: &Plan,
        settings: &Settings,
        load: &Load,
        logs: Option<&Path>,
    ) -> anyhow::Result<Self> {
        let directory = TempDir::new()?;
        let mut lab = Lab::new(settings.seed)?;
        let servers: Vec<Server> = (0..settings.servers)
            .map(|number| {
                let host = lab.add_server(&format!("rendezvous{number}"))?;
                Server::start(host, directory.path().join(format!("server{number}")))
            })
            .collect::<anyhow::Result<_>>()?;
        let sites: Vec<Site> = (0..)
            .zip(&plan.places)
            .map(|(number, place)| {
                let config = SiteConfig::new(place.network.kind).input(place.network.input);
                Ok(lab.add_site(&format!("place{number}"), config.delay(place.delay))?)
            })
            .collect::<anyhow::Result<_>>()?;
        let hosts: Vec<Host> = sites[..PEERS].iter().map(|site| site.host(0)).collect();
        let addresses: Vec<&str> = servers.iter().map(|server| server.address.as_str()).collect();
        let mut members = (0..)
            .zip(&hosts)
            .map(|(index, host)| Member::start(host, index, &addresses, load, logs))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let ids = members.iter_mut().map(Member::online).collect::<anyhow::Result<Vec<_>>>()?;
        members.iter_mut().try_for_each(|member| member.meet(&ids))?;
        Ok(Self { lab, places: plan.places.clone(), sites, servers, hosts, members, _directory: directory })
    }

    /// Lets something begin. `in_force` has it already.
    pub(super) fn begin(&mut self, what: &Disturbance, in_force: &[Disturbance]) -> anyhow::Result<()> {
        match what {
            Disturbance::Move { peer, to } => self.move_all(&[(*peer, *to)]),
            Disturbance::MoveBoth { peers, to } => self.move_all(&[(peers[0], to[0]), (peers[1], to[1])]),
            Disturbance::Sleep { .. } | Disturbance::SleepBoth { .. } => self.signal(what, Signal::SIGSTOP),
            Disturbance::KillServer { server } => self.servers[*server].kill(),
            _ => self.apply(what, in_force),
        }
    }

    /// Lets something end. `in_force` has it no more.
    pub(super) fn end(&mut self, what: &Disturbance, in_force: &[Disturbance]) -> anyhow::Result<()> {
        match what {
            Disturbance::Move { .. } | Disturbance::MoveBoth { .. } => Ok(()),
            Disturbance::Sleep { .. } | Disturbance::SleepBoth { .. } => self.signal(what, Signal::SIGCONT),
            Disturbance::KillServer { server } => self.servers[*server].restart(),
            Disturbance::Reboot { place, other_ports } => {
                let site = &self.sites[*place];
                if *other_ports {
                    site.reboot_with_other_ports()?;
                } else {
                    site.reboot()?;
                }
                self.apply(what, in_force)
            }
            _ => self.apply(what, in_force),
        }
    }

    fn signal(&self, what: &Disturbance, signal: Signal) -> anyhow::Result<()> {
        what.peers().into_iter().try_for_each(|peer| self.members[peer].signal(signal))
    }

    /// All of them at the same time.
    fn move_all(&mut self, moves: &[(PeerIndex, PlaceId)]) -> anyhow::Result<()> {
        let (lab, sites, hosts) = (&self.lab, &self.sites, &self.hosts);
        let moved: Vec<_> = std::thread::scope(|scope| {
            let moving: Vec<_> = moves
                .iter()
                .map(|(peer, to)| scope.spawn(move || lab.move_host(&hosts[*peer], &sites[*to])))
                .collect();
            moving.into_iter().map(std::thread::ScopedJoinHandle::join).collect()
        });
        for ((peer, _), moved) in moves.iter().zip(moved) {
            self.hosts[*peer] = moved.map_err(|_| anyhow::anyhow!("a move panicked"))??;
        }
        Ok(())
    }

    /// Makes the lines that `what` touches as `in_force` has them.
    fn apply(&self, what: &Disturbance, in_force: &[Disturbance]) -> anyhow::Result<()> {
        let touched = match what {
            Disturbance::Cut { between, .. } | Disturbance::Narrow { between, .. } => between.to_vec(),
            Disturbance::Reboot { place, .. }
            | Disturbance::NoUdp { place }
            | Disturbance::Loss { place, .. }
            | Disturbance::Slow { place, .. } => vec![*place],
            _ => Vec::new(),
        };
        for place in touched {
            let site = &self.sites[place];
            match what {
                Disturbance::Loss { .. } | Disturbance::Slow { .. } => {
                    let line = line(place, &self.places[place], in_force);
                    site.impair(line.clone(), line)?;
                }
                _ => site.set_troubles(&self.troubles(place, in_force))?,
            }
        }
        Ok(())
    }

    fn troubles(&self, at: PlaceId, in_force: &[Disturbance]) -> Vec<Trouble> {
        let site = |place: PlaceId| self.sites[place].clone();
        let trouble = |what: &Disturbance| match what {
            // On one of the two lines, seen from there.
            Disturbance::Cut { between: [a, b], way } if *a == at => {
                let direction = match way {
                    Way::Both => Direction::Both,
                    Way::There => Direction::Up,
                    Way::Back => Direction::Down,
                };
                Some(Trouble::CutFrom(site(*b), direction))
            }
            Disturbance::Narrow { between: [a, b], mtu } if *a == at => {
                Some(Trouble::NarrowTo(site(*b), *mtu))
            }
            Disturbance::Narrow { between: [a, b], mtu } if *b == at => {
                Some(Trouble::NarrowTo(site(*a), *mtu))
            }
            Disturbance::Reboot { place, .. } if *place == at => Some(Trouble::Cut(Direction::Both)),
            Disturbance::NoUdp { place } if *place == at => Some(Trouble::NoUdp),
            _ => None,
        };
        in_force.iter().filter_map(trouble).collect()
    }

    /// Of the servers, for the report.
    pub(super) fn wait_for_members(&mut self, patience: Duration) -> anyhow::Result<()> {
        self.members.iter_mut().try_for_each(|member| {
            let status = member.wait(patience).with_context(|| format!("peer {}", member.index()))?;
            ensure!(status.success(), "peer {} ended with {status}", member.index());
            Ok(())
        })
    }
}

/// What the line of a place is like, each way.
fn line(at: PlaceId, place: &Place, in_force: &[Disturbance]) -> Impairment {
    let (mut delay, mut kept, mut rate) = (place.delay, 1.0, None);
    for what in in_force {
        match what {
            Disturbance::Loss { place, per_mille } if *place == at => {
                kept *= 1.0 - f64::from(*per_mille) / 1e3;
            }
            Disturbance::Slow { place, more, rate: narrow } if *place == at => {
                delay += *more;
                rate = Some(rate.map_or(*narrow, |rate: u64| rate.min(*narrow)));
            }
            _ => {}
        }
    }
    let line = Impairment::none().delay(delay).loss(1.0 - kept);
    rate.map_or(line.clone(), |rate| line.rate(rate))
}

#[cfg(test)]
mod tests {
    use netsim::{InputPolicy, RouterKind};

    use super::*;
    use crate::cell::Network;

    #[test]
    fn a_line_is_as_bad_as_all_that_is_wrong_with_it() {
        let ms = Duration::from_millis;
        let network = Network { kind: RouterKind::EimApdf, input: InputPolicy::Drop };
        let place = Place { network, delay: ms(10) };
        let slow = Disturbance::Slow { place: 3, more: ms(50), rate: 6_000_000 };
        let loss = Disturbance::Loss { place: 3, per_mille: 100 };
        let elsewhere = Disturbance::Loss { place: 4, per_mille: 400 };
        assert_eq!(line(3, &place, &[elsewhere]), Impairment::none().delay(ms(10)));
        let expected = Impairment::none().delay(ms(60)).rate(6_000_000).loss(1.0 - (1.0 - 0.1));
        assert_eq!(line(3, &place, &[slow, elsewhere, loss]), expected);
    }
}
