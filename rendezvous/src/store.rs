//! The embedded store: one file, written by one thread. What waits for it together is committed together, and whoever has to know is told once it is
//! on disk.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use redb::{Database, ReadableDatabase as _, ReadableTable as _, TableDefinition};
use rendezvous_wire::PeerId;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::oneshot;
use tracing::{error, info};

use crate::admission::records::{Records, TokenRecord, Write};
use crate::usage::Month;

/// Name of the store in the state directory.
pub const FILE_NAME: &str = "store.redb";

/// Changes that are committed together at the most.
const BATCH: usize = 1_024;

/// Memory for pages of the store.
const CACHE: usize = 4 * 1024 * 1024;

/// A table of JSON by the 32 bytes of a key.
type ByPeer = TableDefinition<'static, [u8; 32], &'static [u8]>;

const BANS: ByPeer = TableDefinition::new("bans");
const ADMITTED: ByPeer = TableDefinition::new("admitted");
const USAGE: ByPeer = TableDefinition::new("usage");
const TOKENS: TableDefinition<'static, u64, &[u8]> = TableDefinition::new("tokens");
const NUMBERS: TableDefinition<'static, &str, u64> = TableDefinition::new("numbers");

/// The greatest number that a token has had.
const LAST_TOKEN: &str = "last token";

/// Why there is no store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Another process has it.
    #[error("{path} is in use: a server with this state directory is running already; stop it, or name another directory with --state-dir", path = path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// It cannot be read or written.
    #[error("the store {path}: {source}. If the disk is well and has room, put a backup in its place; without one, move it away: bans, tokens and \
             admissions are gone then", path = path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: Box<redb::Error>,
    },
    /// No directory, or not ours.
    #[error("{path}: {source}; name a writable directory with --state-dir", path = path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What was on disk.
#[derive(Debug, Default)]
pub struct Kept {
    /// Of admission.
    pub records: Records,
    /// Of this month's use.
    pub usage: Vec<(PeerId, u64)>,
}

/// Changes, and whom to tell when they are on disk.
type Order = (Vec<Write>, Option<oneshot::Sender<bool>>);

/// The way to the thread that writes.
#[derive(Debug)]
pub struct Store {
    orders: Option<Sender<Order>>,
    thread: Option<JoinHandle<()>>,
}

impl Store {
    /// Opens the store in a directory, or makes it, and reads all of it. Of use only what belongs to `month`.
    ///
    /// # Errors
    ///
    /// When it cannot be, or another process has it.
    pub fn open(directory: &Path, month: Month) -> Result<(Self, Kept), StoreError> {
        let path = directory.join(FILE_NAME);
        let broken =
            |source: redb::Error| StoreError::Broken { path: path.clone(), source: Box::new(source) };
        if !path.exists() {
            create(directory, &path).map_err(|error| match error {
                redb::Error::Io(source) => StoreError::Directory { path: directory.to_owned(), source },
                error => broken(error),
            })?;
        }
        let database = open_file(&path).map_err(|error| match error {
            redb::DatabaseError::DatabaseAlreadyOpen => StoreError::InUse { path: path.clone() },
            error => broken(error.into()),
        })?;
        let kept = read(&database, month).map_err(broken)?;
        let (orders, inbox) = channel();
        let place = path.clone();
        let thread = std::thread::Builder::new()
            .name("store".into())
            .spawn(move || run(Some(database), &place, &inbox));
        let thread = thread.map_err(|source| StoreError::Directory { path: directory.to_owned(), source })?;
        Ok((Self { orders: Some(orders), thread: Some(thread) }, kept))
    }

    /// Keeps changes, all of them or none. True once they are on disk; false when they will never be.
    pub async fn keep(&self, writes: Vec<Write>) -> bool {
        let (told, kept) = oneshot::channel();
        let Some(orders) = &self.orders else { return false };
        orders.send((writes, Some(told))).is_ok() && kept.await.unwrap_or(false)
    }

    /// Keeps changes by and by.
    pub fn keep_later(&self, writes: Vec<Write>) {
        if let Some(orders) = &self.orders {
            // The thread ends only after this.
            let _ = orders.send((writes, None));
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            error!("the store's thread has panicked");
        }
    }
}

/// Under another name first: whatever happens meanwhile, the file under the right one is whole.
fn create(directory: &Path, path: &Path) -> Result<(), redb::Error> {
    let fresh = directory.join(format!("{FILE_NAME}.new"));
    match std::fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let database = Database::create(&fresh)?;
    let transaction = database.begin_write()?;
    for table in [BANS, ADMITTED, USAGE] {
        transaction.open_table(table)?;
    }
    transaction.open_table(TOKENS)?;
    transaction.open_table(NUMBERS)?;
    transaction.commit()?;
    drop(database);
    std::fs::rename(&fresh, path)?;
    std::fs::File::open(directory)?.sync_all()?;
    Ok(())
}

fn open_file(path: &Path) -> Result<Database, redb::DatabaseError> {
    Database::builder().set_cache_size(CACHE).open(path)
}

fn read(database: &Database, month: Month) -> Result<Kept, redb::Error> {
    let transaction = database.begin_read()?;
    let mut kept = Kept::default();
    let records = &mut kept.records;
    for row in transaction.open_table(BANS)?.iter()? {
        let (peer, ban) = row?;
        if let Some(ban) = parse(ban.value()) {
            records.bans.insert(PeerId::from_bytes(peer.value()), ban);
        }
    }
    for row in transaction.open_table(ADMITTED)?.iter()? {
        let (peer, enrolment) = row?;
        if let Some(enrolment) = parse(enrolment.value()) {
            records.admitted.insert(PeerId::from_bytes(peer.value()), enrolment);
        }
    }
    for row in transaction.open_table(TOKENS)?.iter()? {
        let (number, token) = row?;
        if let Some(token) = parse(token.value()) {
            records.tokens.insert(number.value(), token);
        }
    }
    let last = transaction.open_table(NUMBERS)?.get(LAST_TOKEN)?;
    records.last_token = last.map_or(0, |last| last.value());
    for row in transaction.open_table(USAGE)?.iter()? {
        let (peer, used) = row?;
        if let Some((of, bytes)) = parse::<(Month, u64)>(used.value())
            && of == month
        {
            kept.usage.push((PeerId::from_bytes(peer.value()), bytes));
        }
    }
    Ok(kept)
}

/// What was written by a version of another mind is left alone.
fn parse<T: DeserializeOwned>(json: &[u8]) -> Option<T> {
    serde_json::from_slice(json).inspect_err(|error| error!(%error, "a row of the store cannot be read")).ok()
}

fn run(mut database: Option<Database>, path: &Path, inbox: &Receiver<Order>) {
    while let Ok(first) = inbox.recv() {
        let mut orders = vec![first];
        orders.extend(inbox.try_iter().take(BATCH - 1));
        let kept = keep(&mut database, path, &orders);
        for (_, told) in orders {
            if let Some(told) = told {
                // Whoever has gone does not need to know.
                let _ = told.send(kept);
            }
        }
    }
}

/// After an error the file is opened anew: redb goes on with nothing else.
fn keep(database: &mut Option<Database>, path: &Path, orders: &[Order]) -> bool {
    let reopened = database.is_none();
    let result = match database.take().map_or_else(|| open_file(path), Ok) {
        Ok(open) => commit(&open, orders).map(|()| *database = Some(open)),
        Err(error) => Err(error.into()),
    };
    match result {
        Ok(()) if reopened => info!("the store can be written again"),
        Ok(()) => {}
        Err(error) if reopened => tracing::debug!(%error, "the store cannot be written"),
        Err(error) => {
            error!(path = %path.display(), %error, "the store cannot be written: is the disk full? What needs it is refused");
        }
    }
    database.is_some()
}

fn commit(database: &Database, orders: &[Order]) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    {
        let mut bans = transaction.open_table(BANS)?;
        let mut admitted = transaction.open_table(ADMITTED)?;
        let mut usage = transaction.open_table(USAGE)?;
        let mut tokens = transaction.open_table(TOKENS)?;
        let mut numbers = transaction.open_table(NUMBERS)?;
        for write in orders.iter().flat_map(|(writes, _)| writes) {
            match write {
                Write::Ban(peer, ban) => drop(bans.insert(peer.as_bytes(), &*json(ban))?),
                Write::Unban(peer) => drop(bans.remove(peer.as_bytes())?),
                Write::Admit(peer, enrolment) => drop(admitted.insert(peer.as_bytes(), &*json(enrolment))?),
                Write::Withdraw(peer) => drop(admitted.remove(peer.as_bytes())?),
                Write::Token(number, token) => {
                    let last = numbers.get(LAST_TOKEN)?.map_or(0, |last| last.value());
                    numbers.insert(LAST_TOKEN, last.max(*number))?;
                    tokens.insert(number, &*json(token))?;
                }
                Write::Spend(number) => {
                    let known = tokens.get(number)?.and_then(|token| parse::<TokenRecord>(token.value()));
                    if let Some(token) = known {
                        let spent = TokenRecord { used: token.used + 1, ..token };
                        tokens.insert(number, &*json(&spent))?;
                    }
                }
                Write::NoToken(number) => drop(tokens.remove(number)?),
                Write::Usage(month, rows) => {
                    // Those of earlier months go with their first row of this one; the rest at the turn of the month.
                    for (peer, bytes) in rows {
                        usage.insert(peer.as_bytes(), &*json(&(month, bytes)))?;
                    }
                    if rows.is_empty() {
                        let old = |json: &[u8]| parse::<(Month, u64)>(json).is_none_or(|(of, _)| of < *month);
                        usage.retain(|_, json| !old(json))?;
                    }
                }
            }
        }
    }
    transaction.commit()?;
    Ok(())
}

fn json(value: &impl Serialize) -> Vec<u8> {
    // Structures of numbers and texts always can be written.
    serde_json::to_vec(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::Policy;
    use crate::admission::records::{Enrolment, Seconds};
    use std::time::SystemTime;

    fn month() -> Month {
        Month::of(SystemTime::now())
    }

    fn writes() -> Vec<Write> {
        let peer = |number| PeerId::from_bytes([number; 32]);
        let token =
            TokenRecord { hash: [5; 32], uses: 3, used: 1, at: Seconds(7), until: None, note: "x".into() };
        let enrolment = Enrolment { at: Seconds(9), token: Some(4), note: String::new() };
        vec![
            Policy::make_ban(peer(1), None, "no".into(), SystemTime::now()),
            Write::Admit(peer(2), enrolment.clone()),
            Write::Admit(peer(3), enrolment),
            Write::Withdraw(peer(3)),
            Write::Token(4, token.clone()),
            Write::Token(5, token),
            Write::Spend(4),
            Write::NoToken(5),
            Write::Spend(5),
        ]
    }

    #[tokio::test]
    async fn what_was_kept_is_there_again() {
        let directory = tempfile::tempdir().unwrap();
        let (store, kept) = Store::open(directory.path(), month()).unwrap();
        assert_eq!(kept.records, Records::default());
        let mut expected = Records::default();
        writes().iter().for_each(|write| expected.apply(write));
        assert!(store.keep(writes()).await);
        let peer = PeerId::from_bytes([8; 32]);
        store.keep_later(vec![Write::Usage(month(), vec![(peer, 77)])]);
        drop(store);
        let (_store, kept) = Store::open(directory.path(), month()).unwrap();
        assert_eq!(kept.records, expected);
        assert_eq!(kept.records.last_token, 5, "a withdrawn token's number is not given again");
        assert_eq!(kept.usage, [(peer, 77)]);
    }

    #[test]
    fn a_store_in_use_and_one_that_is_none_are_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let first = Store::open(directory.path(), month()).unwrap();
        let second = Store::open(directory.path(), month()).unwrap_err();
        assert!(matches!(second, StoreError::InUse { .. }), "{second}");
        drop(first);
        std::fs::write(directory.path().join(FILE_NAME), vec![7; 100_000]).unwrap();
        let broken = Store::open(directory.path(), month()).unwrap_err();
        assert!(
            matches!(&broken, StoreError::Broken { .. }) && broken.to_string().contains("backup"),
            "{broken}"
        );
    }
}
