//! `peer init` and `peer invite`: set up once.

use std::io::IsTerminal as _;
use std::time::{Duration, SystemTime};

use clap::Args;
use peer::{RendezvousAddress, Ticket, Token};
use qrcode::QrCode;
use qrcode::render::unicode::Dense1x2;
use serde_json::json;

use super::home::config;
use super::home::peers::Alias;
use super::report::Report;
use super::settings::{self, KeyArguments};
use super::{Failure, exit, print_line};

pub(super) const INIT_EXAMPLES: &str = "\
Examples:
  peer init rv://ID@vps.example
      The address is what `rendezvous serve` printed.
  peer init rv://ID@vps.example#TOKEN
      Where the server admits newcomers with a token; also as --token TOKEN.
  peer init TICKET --as nas
      With a ticket: its servers, and whom it leads to.

Prints this machine's id.";

pub(super) const INVITE_EXAMPLES: &str = "\
Examples:
  peer invite
  peer invite --once --expires 1d --name laptop
      For one, for a day, who will be known here as `laptop`.
  peer invite --withdraw all
      Take all open invitations back; those who have used one stay trusted.

Prints the ticket; on a terminal its QR code as well. Whoever shows it while this machine
listens is trusted from then on, by id, until `peer untrust`.";

#[derive(Debug, Args)]
pub(super) struct InitArguments {
    /// The rendezvous server's address (rv://..., with #TOKEN where it asks for one), or a ticket.
    #[arg(value_name = "RV_ADDRESS|TICKET")]
    place: Place,
    /// The name for whom the ticket leads to.
    #[arg(long = "as", value_name = "ALIAS")]
    alias: Option<Alias>,
    /// The token that the server's operator has given out.
    #[arg(long, env = "PEER_TOKEN", value_name = "TOKEN", hide_env_values = true)]
    token: Option<Token>,
    #[command(flatten)]
    key: KeyArguments,
    /// Print the id as a JSON object, and say what happens in JSON objects.
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Debug, Clone)]
enum Place {
    Server(Box<RendezvousAddress>, Option<Token>),
    Ticket(Box<Ticket>),
}

impl std::str::FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if Ticket::looks_like(text) {
            text.parse().map(|ticket| Self::Ticket(Box::new(ticket))).map_err(|error| error.to_string())
        } else {
            let (address, token) = match text.split_once('#') {
                Some((address, token)) => (address, Some(token)),
                None => (text, None),
            };
            let token = token.map(str::parse::<Token>).transpose().map_err(|error| error.to_string())?;
            let server = address.parse().map_err(|error: peer::ParseAddressError| error.to_string())?;
            Ok(Self::Server(Box::new(server), token))
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct InviteArguments {
    /// For one peer only, the first that shows it.
    #[arg(long)]
    once: bool,
    /// For how long it may be used: 30m, 12h, 1d [default: until it is withdrawn].
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    expires: Option<Duration>,
    /// The alias by which whoever uses it will be known here.
    #[arg(long, value_name = "ALIAS")]
    name: Option<Alias>,
    /// Take an invitation back, by its number in `peer list`, or `all`.
    #[arg(long, value_name = "NUMBER", conflicts_with_all = ["once", "expires", "name"])]
    withdraw: Option<String>,
    /// A rendezvous server that the ticket names [default: those of `peer init`].
    #[arg(long, env = "PEER_SERVER", value_name = "RV_ADDRESS", value_delimiter = ' ')]
    server: Vec<RendezvousAddress>,
    #[command(flatten)]
    key: KeyArguments,
    /// Print a JSON object.
    #[arg(long)]
    pub(super) json: bool,
}

pub(super) fn init(arguments: &InitArguments) -> Result<(), Failure> {
    let report = Report::new(arguments.json);
    let home = settings::home()?;
    let servers = match &arguments.place {
        Place::Server(server, _) => vec![server.as_ref().clone()],
        Place::Ticket(ticket) => ticket.servers.clone(),
    };
    if matches!(&arguments.place, Place::Server(..)) && arguments.alias.is_some() {
        let error = anyhow::anyhow!("--as names the peer that a ticket leads to; this is a server's address");
        return Err(Failure { code: exit::USAGE, error });
    }
    let new = config::add_servers(&home.config, &servers)?;
    let token = match &arguments.place {
        Place::Server(_, Some(token)) => Some(token),
        _ => arguments.token.as_ref(),
    };
    if let Some(token) = token {
        for server in &servers {
            config::keep_token(&home.config, server.id, token)?;
        }
    }
    if let Place::Ticket(ticket) = &arguments.place {
        super::known::keep_ticket(ticket, arguments.alias.as_ref())?;
    }
    let id = arguments.key.load()?.id();
    let path = home.config.display().to_string();
    let shown: Vec<String> = new.iter().map(ToString::to_string).collect();
    let words = if new.is_empty() {
        format!("{path} names that server already")
    } else {
        format!("{path} names {}", shown.join(" and "))
    };
    report.say("initialized", json!({ "config": path, "servers": shown }), &words);
    if arguments.json {
        print_line(json!({ "id": id.to_string() }))?;
    } else {
        print_line(id)?;
    }
    Ok(())
}

pub(super) fn invite(arguments: &InviteArguments) -> Result<(), Failure> {
    let report = Report::new(arguments.json);
    if let Some(number) = &arguments.withdraw {
        let count = settings::update_peers(|peers| peers.withdraw(number))?;
        let words = format!("{count} {} taken back", if count == 1 { "invitation" } else { "invitations" });
        report.say("withdrawn", json!({ "count": count }), &words);
        return Ok(());
    }
    let mut servers = settings::servers(&arguments.server)?;
    if servers.is_empty() {
        return Err(settings::no_server());
    }
    servers.truncate(peer::MAX_TICKET_SERVERS);
    let peer = arguments.key.load()?.id();
    // Nothing is kept of an invitation that cannot be written down.
    let plain = Ticket { peer, servers, secret: None };
    plain.encode().map_err(|error| Failure { code: exit::FAILURE, error: error.into() })?;
    let now = SystemTime::now();
    let secret = settings::update_peers(|peers| {
        Ok(peers.invite(arguments.once, arguments.expires, arguments.name.clone(), now))
    })?;
    let ticket = Ticket { secret: Some(secret), ..plain };
    let text = ticket.encode().map_err(|error| Failure { code: exit::FAILURE, error: error.into() })?;
    if arguments.json {
        print_line(json!({ "ticket": text, "id": peer.to_string(), "once": arguments.once }))?;
    } else {
        print_line(&text)?;
        if std::io::stdout().is_terminal()
            && let Some(code) = qr_code(&text)
        {
            eprintln!("\n{code}");
        }
    }
    let how = match (arguments.once, arguments.expires) {
        (true, Some(time)) => format!("once, within {}", humantime::format_duration(time)),
        (true, None) => "once".to_owned(),
        (false, Some(time)) => format!("for {}", humantime::format_duration(time)),
        (false, None) => "until it is withdrawn".to_owned(),
    };
    let words = format!(
        "whoever has this ticket is let in, {how}; on the other machine: peer trust TICKET --as NAME"
    );
    report.say("invite", json!({ "id": peer.to_string() }), &words);
    Ok(())
}

/// In upper case, which a QR code holds in five and a half bits a character (ISO/IEC 18004, alphanumeric mode).
fn qr_code(ticket: &str) -> Option<String> {
    let code = QrCode::new(ticket.to_uppercase()).ok()?;
    // On a dark terminal the light modules are what is drawn.
    Some(code.render::<Dense1x2>().dark_color(Dense1x2::Light).light_color(Dense1x2::Dark).build())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_fits_a_qr_code_that_fits_a_terminal() {
        let id = peer::PeerId::from_bytes([9; 32]);
        let server = format!("rv://{id}@rendezvous.home.example,[2001:db8:1234:5678::1234]:4433");
        let ticket = Ticket {
            peer: id,
            servers: vec![server.parse().unwrap()],
            secret: Some(peer::InviteSecret([7; 16])),
        };
        let code = qr_code(&ticket.encode().unwrap()).unwrap();
        assert!(code.lines().count() <= 40, "{} lines", code.lines().count());
        assert!(code.lines().all(|line| line.chars().count() <= 80));
    }
}
