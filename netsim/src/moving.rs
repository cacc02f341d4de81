//! A host moves from one site to another, as a laptop does that changes from one network to the next: its programs and their sockets
//! stay, its interface and addresses are new.

use std::sync::Arc;

use crate::host::Host;
use crate::lab::{BuildError, Lab};
use crate::site::Site;
use crate::tool;

impl Lab {
    /// Takes `host`, of whichever site, to `site`, where it gets a new interface with the next free address. The handle that comes back knows
    /// the new addresses; older handles of the host still run programs in it.
    ///
    /// The old interface vanishes, and with it the old addresses and routes, as when a cable is pulled.
    ///
    /// # Errors
    ///
    /// When the site is full, or `ip` fails.
    pub fn move_host(&self, host: &Host, site: &Site) -> Result<Host, BuildError> {
        let (number, at) = site.welcome().ok_or_else(|| BuildError::Full(site.name().to_owned()))?;
        let (netns, router) = (host.namespace(), site.home());
        tool::ip(netns, "link delete eth0\n")?;
        tool::ip(
            router,
            &format!(
                "link add name host{number} type veth peer name eth0 netns {}\nlink set host{number} master lan up\n",
                netns.path()
            ),
        )?;
        // The cable works before anybody hears of addresses, as it does where those come by DHCP.
        tool::ip(netns, "link set eth0 up\n")?;
        [router, netns]
            .into_iter()
            .try_for_each(crate::namespace::Namespace::wait_for_carrier)
            .map_err(BuildError::Namespace)?;
        tool::ip(netns, &at.host_batch(number))?;
        Ok(at.host(host.name().to_owned(), number, netns.clone(), Arc::clone(&self.spawner)))
    }
}
