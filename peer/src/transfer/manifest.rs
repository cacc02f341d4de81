//! What is offered: folders, files and links, checked so that nothing of it can lie outside of the folder it is put into.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

/// Entries in one offer.
pub const MAX_ENTRIES: usize = 1 << 20;

/// Bytes of all names and link targets of an offer.
const MAX_NAME_BYTES: usize = 64 << 20;

/// Folders within folders; each that is open costs a descriptor.
const MAX_DEPTH: u16 = 200;

/// The longest name that file systems take (NAME_MAX).
const MAX_NAME: usize = 255;

/// The longest path that systems take (PATH_MAX), and so the longest link target.
const MAX_TARGET: usize = 4096;

/// What a file's name ends with while it is incomplete; such names cannot be offered.
pub(crate) const PART_SUFFIX: &[u8] = b".peer-part";

/// The largest file: what `ftruncate` takes.
pub(crate) const MAX_SIZE: u64 = i64::MAX as u64;

/// A moment, as file systems keep it: since 1970, UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Modified {
    /// Whole seconds; negative before 1970.
    pub seconds: i64,
    /// Nanoseconds after these.
    pub nanoseconds: u32,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// A folder; what is in it follows.
    Folder {
        /// Permission bits; what is not in 0o777 is not kept.
        mode: u32,
        /// When it was last changed.
        modified: Modified,
    },
    /// A file.
    File {
        /// Bytes, holes included.
        size: u64,
        /// Permission bits; what is not in 0o777 is not kept.
        mode: u32,
        /// When it was last changed.
        modified: Modified,
    },
    /// A symbolic link to something within the same top folder.
    Link {
        /// Where to, relative to the folder that the link is in.
        target: Vec<u8>,
    },
}

/// One name of an offer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The entry of the folder that it is in, by its place in the offer; `None` at the top.
    pub parent: Option<u32>,
    /// Its name in there: bytes, in whatever encoding.
    pub name: Vec<u8>,
    /// What it is.
    pub kind: Kind,
}

/// Why an offer is refused. Names are shown with everything escaped that a terminal might take for a command.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// Not a name: empty, `.`, `..`, with a slash or a zero byte, too long, or one that unfinished files have.
    #[error("{0:?} is no name that a file may be sent under")]
    Name(String),
    /// The parent is no earlier folder.
    #[error("{0:?} is in no folder of the offer")]
    Parent(String),
    /// Twice the same.
    #[error("{0:?} is in the offer twice")]
    Twice(String),
    /// The link leads out of what is sent.
    #[error("the link {0:?} leads out of the folder that is sent")]
    Link(String),
    /// A number that no file system knows.
    #[error("{0:?} has a size or a date that cannot be")]
    Value(String),
    /// Too deep, or too much in all.
    #[error(
        "more than one transfer can hold ({MAX_ENTRIES} names, {MAX_DEPTH} levels): send it in parts, or pack it with tar"
    )]
    TooMuch,
}

/// A checked offer: parents come before what is in them, and no name, link or number can do harm.
#[derive(Debug, Clone, Default)]
pub struct Manifest {
    entries: Vec<Entry>,
    files: u32,
    bytes: u64,
}

/// A manifest in the making.
#[derive(Debug, Default)]
pub(crate) struct ManifestBuilder {
    manifest: Manifest,
    depths: Vec<u16>,
    seen: HashSet<(Option<u32>, Vec<u8>)>,
    name_bytes: usize,
}

/// For people: everything that is not printable is escaped.
pub(crate) fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name)
        .chars()
        .flat_map(|c| {
            let plain = !c.is_control() && !is_reordering(c);
            plain.then_some(c).into_iter().chain((!plain).then(|| c.escape_unicode()).into_iter().flatten())
        })
        .collect()
}

/// Characters that make what follows be read in another order or not be seen (Unicode, UAX 9).
const fn is_reordering(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

fn is_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= MAX_NAME
        && name != b"."
        && name != b".."
        && !name.contains(&b'/')
        && !name.contains(&0)
        && !name.ends_with(PART_SUFFIX)
}

/// Whether a link that is `depth` folders deep stays within its top folder: up only at the beginning and not too far, then down. What is
/// passed on the way down is a folder of the offer, or a link for which the same holds.
pub(crate) fn stays_within(target: &[u8], depth: u16) -> bool {
    if target.is_empty() || target.len() > MAX_TARGET || target.contains(&0) || target[0] == b'/' {
        return false;
    }
    let mut ups = 0_u16;
    let mut down = false;
    for part in target.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." if down => return false,
            b".." => ups = ups.saturating_add(1),
            _ => down = true,
        }
    }
    ups < depth
}

impl ManifestBuilder {
    pub(crate) fn add(&mut self, entry: Entry) -> Result<u32, ManifestError> {
        let error = |kind: fn(String) -> ManifestError| kind(shown(&entry.name));
        if !is_name(&entry.name) {
            return Err(error(ManifestError::Name));
        }
        let depth = match entry.parent {
            None => 0,
            Some(parent) => match self.manifest.entries.get(parent as usize) {
                Some(Entry { kind: Kind::Folder { .. }, .. }) => self.depths[parent as usize] + 1,
                _ => return Err(error(ManifestError::Parent)),
            },
        };
        let mut name_bytes = entry.name.len();
        match &entry.kind {
            Kind::Folder { modified, .. } if modified.nanoseconds >= 1_000_000_000 => {
                return Err(error(ManifestError::Value));
            }
            Kind::File { size, modified, .. }
                if *size > MAX_SIZE
                    || modified.nanoseconds >= 1_000_000_000
                    || self.manifest.bytes.checked_add(*size).is_none() =>
            {
                return Err(error(ManifestError::Value));
            }
            Kind::Link { target } if !stays_within(target, depth) => return Err(error(ManifestError::Link)),
            Kind::Link { target } => name_bytes += target.len(),
            Kind::Folder { .. } | Kind::File { .. } => {}
        }
        self.name_bytes += name_bytes;
        if depth >= MAX_DEPTH
            || self.manifest.entries.len() >= MAX_ENTRIES
            || self.name_bytes > MAX_NAME_BYTES
        {
            return Err(ManifestError::TooMuch);
        }
        if !self.seen.insert((entry.parent, entry.name.clone())) {
            return Err(error(ManifestError::Twice));
        }
        if let Kind::File { size, .. } = entry.kind {
            self.manifest.files += 1;
            self.manifest.bytes += size;
        }
        self.depths.push(depth);
        self.manifest.entries.push(entry);
        Ok(self.manifest.entries.len() as u32 - 1)
    }

    pub(crate) fn len(&self) -> usize {
        self.manifest.entries.len()
    }

    pub(crate) fn finish(self) -> Manifest {
        self.manifest
    }
}

impl Manifest {
    /// Everything, folders before what is in them.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// How many files.
    pub fn files(&self) -> u32 {
        self.files
    }

    /// How many bytes all files have, holes included.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What is not in a folder: names that can be shown.
    pub fn top(&self) -> impl Iterator<Item = String> {
        self.entries.iter().filter(|entry| entry.parent.is_none()).map(|entry| {
            let folder = matches!(entry.kind, Kind::Folder { .. });
            shown(&entry.name) + if folder { "/" } else { "" }
        })
    }

    /// The path of an entry from the top, to be shown.
    pub fn path(&self, entry: u32) -> String {
        let mut names = Vec::new();
        let mut next = Some(entry);
        while let Some(entry) = next.and_then(|index| self.entries.get(index as usize)) {
            names.push(shown(&entry.name));
            next = entry.parent;
        }
        names.reverse();
        names.join("/")
    }

    pub(crate) fn get(&self, entry: u32) -> Option<&Entry> {
        self.entries.get(entry as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Modified = Modified { seconds: 1, nanoseconds: 2 };

    fn folder(parent: Option<u32>, name: &[u8]) -> Entry {
        Entry { parent, name: name.to_vec(), kind: Kind::Folder { mode: 0o755, modified: NOW } }
    }

    fn file(parent: Option<u32>, name: &[u8]) -> Entry {
        Entry { parent, name: name.to_vec(), kind: Kind::File { size: 3, mode: 0o644, modified: NOW } }
    }

    fn link(parent: Option<u32>, target: &[u8]) -> Entry {
        Entry { parent, name: b"link".to_vec(), kind: Kind::Link { target: target.to_vec() } }
    }

    #[test]
    fn names_that_would_escape_are_refused() {
        let long = vec![b'x'; 256];
        let names: [&[u8]; 10] =
            [b"", b".", b"..", b"/", b"/etc/passwd", b"a/b", b"../a", b"a\0b", &long, b"a.peer-part"];
        for name in names {
            let mut builder = ManifestBuilder::default();
            assert!(matches!(builder.add(file(None, name)), Err(ManifestError::Name(_))), "{name:?}");
        }
        // What looks strange and is harmless.
        for name in [&b"..."[..], b" ", b"-rf", b"\xff\xfe", b"a\\b", b"~", b"con"] {
            assert_eq!(ManifestBuilder::default().add(file(None, name)), Ok(0), "{name:?}");
        }
    }

    #[test]
    fn only_an_earlier_folder_is_a_parent() {
        let mut builder = ManifestBuilder::default();
        assert!(matches!(builder.add(file(Some(0), b"a")), Err(ManifestError::Parent(_))));
        builder.add(folder(None, b"d")).unwrap();
        let file_entry = builder.add(file(Some(0), b"f")).unwrap();
        let link_entry = builder.add(link(Some(0), b"f")).unwrap();
        for parent in [file_entry, link_entry, 3, u32::MAX] {
            let added = builder.add(file(Some(parent), b"x"));
            assert!(matches!(added, Err(ManifestError::Parent(_))), "{parent}");
        }
    }

    #[test]
    fn a_link_and_a_folder_cannot_have_one_name() {
        let mut builder = ManifestBuilder::default();
        builder.add(folder(None, b"d")).unwrap();
        builder.add(link(Some(0), b"f")).unwrap();
        assert!(matches!(builder.add(folder(Some(0), b"link")), Err(ManifestError::Twice(_))));
    }

    #[test]
    fn links_stay_within_their_top_folder() {
        let depth_two: [(&[u8], bool); 14] = [
            (b"f", true),
            (b"./f", true),
            (b"a/b", true),
            (b"../f", true),
            (b"..", true),
            (b"../../f", false),
            (b"../..", false),
            (b"a/..", false),
            (b"a/../../../x", false),
            (b"../a/..", false),
            (b"/etc", false),
            (b"", false),
            (b"a\0", false),
            (b".././/../x", false),
        ];
        for (target, inside) in depth_two {
            assert_eq!(stays_within(target, 2), inside, "{}", String::from_utf8_lossy(target));
        }
        // At the top there is nothing to stay within.
        assert!(!stays_within(b"f", 0));
    }

    #[test]
    fn what_no_file_system_knows_is_refused() {
        let mut entry = file(None, b"a");
        entry.kind = Kind::File { size: u64::MAX, mode: 0, modified: NOW };
        assert!(matches!(ManifestBuilder::default().add(entry.clone()), Err(ManifestError::Value(_))));
        entry.kind =
            Kind::File { size: 0, mode: 0, modified: Modified { seconds: 0, nanoseconds: u32::MAX } };
        assert!(matches!(ManifestBuilder::default().add(entry), Err(ManifestError::Value(_))));
    }

    #[test]
    fn an_offer_is_bounded() {
        let mut builder = ManifestBuilder::default();
        let mut parent = None;
        let deep = loop {
            match builder.add(folder(parent, b"d")) {
                Ok(index) => parent = Some(index),
                Err(error) => break error,
            }
        };
        assert_eq!((deep, builder.len()), (ManifestError::TooMuch, usize::from(MAX_DEPTH)));
    }

    #[test]
    fn names_cannot_command_a_terminal() {
        assert_eq!(shown(b"a\x1b[2Jb\n"), "a\\u{1b}[2Jb\\u{a}");
        assert_eq!(shown("ä\u{202e}gpj".as_bytes()), "ä\\u{202e}gpj");
    }
}
