//! A file's content by groups, holes left out.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::tree::{GROUP, GroupHasher, GroupValue, Tree, group_length, groups};

/// Read and hashed at once: a good deal less than a processor's own cache, and enough for all of its lanes.
pub(crate) const STEP: usize = 128 << 10;

/// Reads groups, best in ascending order.
pub(crate) struct Groups<'f> {
    file: &'f File,
    size: u64,
    /// Whether it has holes, as far as can be told.
    sparse: bool,
    /// The data at or after what was asked for last.
    extent: Range<u64>,
    /// The group that was asked for last.
    last: Option<u64>,
}

/// What a loaded group is made of: ranges of data from its beginning on, with holes in between.
pub(crate) type Data = Vec<Range<usize>>;

impl<'f> Groups<'f> {
    /// For the first `size` bytes.
    pub(crate) fn new(file: &'f File, size: u64) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let sparse = metadata.blocks().saturating_mul(512) < metadata.len();
        let extent = if sparse { 0..0 } else { 0..u64::MAX };
        Ok(Self { file, size, sparse, extent, last: None })
    }

    /// The first data that ends after `offset`.
    fn find_data(&mut self, offset: u64) -> io::Result<()> {
        if !self.sparse || offset < self.extent.end {
            return Ok(());
        }
        let data = match rustix::fs::seek(self.file, SeekFrom::Data(offset)) {
            Ok(data) => data,
            // Nothing but a hole from here on.
            Err(Errno::NXIO) => {
                self.extent = u64::MAX..u64::MAX;
                return Ok(());
            }
            // A file system that does not tell: everything counts as data.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                self.extent = 0..u64::MAX;
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        self.extent = data..rustix::fs::seek(self.file, SeekFrom::Hole(data))?;
        Ok(())
    }

    /// Where a group has data.
    pub(crate) fn data(&mut self, group: u64) -> io::Result<Data> {
        let start = group * GROUP;
        let end = start + group_length(self.size, group);
        if self.sparse && self.last.is_some_and(|last| group <= last) {
            // What is known lies behind it.
            self.extent = 0..0;
        }
        self.last = Some(group);
        let mut data = Data::new();
        let mut offset = start;
        while offset < end {
            self.find_data(offset)?;
            let from = self.extent.start.max(offset).min(end);
            let to = self.extent.end.min(end);
            if from < to {
                data.push((from - start) as usize..(to - start) as usize);
            }
            offset = to.max(from).max(offset + 1);
        }
        Ok(data)
    }

    /// Fills the buffer from there. False: the file is shorter than it was.
    pub(crate) fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<bool> {
        match self.file.read_exact_at(buffer, offset) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Reads a group's data into the beginning of `buffer`, and tells where it is and what it hashes to. Holes are left as they are. `None`:
    /// the file is shorter than it was.
    pub(crate) fn load(&mut self, group: u64, buffer: &mut [u8]) -> io::Result<Option<(Data, GroupValue)>> {
        let data = self.data(group)?;
        let mut hasher = GroupHasher::new(self.size, group);
        let mut at = 0;
        for range in &data {
            hasher.update_zeros((range.start - at) as u64);
            at = range.start;
            // Hashed while it is in the processor's cache.
            for step in buffer[range.clone()].chunks_mut(STEP) {
                if !self.read(group * GROUP + at as u64, step)? {
                    return Ok(None);
                }
                hasher.update(step);
                at += step.len();
            }
        }
        hasher.update_zeros(group_length(self.size, group) - at as u64);
        Ok(Some((data, hasher.finish())))
    }
}

/// The hash of a whole file; `None` when it is shorter than `size` bytes.
pub(crate) fn file_hash(file: &File, size: u64, buffer: &mut [u8]) -> io::Result<Option<[u8; 32]>> {
    let mut reader = Groups::new(file, size)?;
    let mut tree = Tree::default();
    for group in 0..groups(size) {
        let Some((_, value)) = reader.load(group, buffer)? else { return Ok(None) };
        tree.push(value);
    }
    Ok(tree.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_found_and_hash_as_zeros() {
        let file = tempfile::tempfile().unwrap();
        let size = 5 * GROUP + 70_000;
        file.set_len(size).unwrap();
        let places = [(0, 10_u64), (GROUP + 300_000, 4096), (GROUP * 3 - 5000, 10_000), (size - 3, 3)];
        let mut content = vec![0; size as usize];
        for (at, count) in places {
            content[at as usize..(at + count) as usize].fill(7);
            file.write_all_at(&content[at as usize..(at + count) as usize], at).unwrap();
        }
        let mut buffer = vec![0xee; GROUP as usize];
        let hash = file_hash(&file, size, &mut buffer).unwrap();
        assert_eq!(hash, Some(*blake3::hash(&content).as_bytes()));
        let mut reader = Groups::new(&file, size).unwrap();
        let with_data: Vec<u64> = (0..6).filter(|group| !reader.data(*group).unwrap().is_empty()).collect();
        assert_eq!(with_data, [0, 1, 2, 3, 5]);
        // Again, in whatever order: several places of one group, and none of another.
        file.write_all_at(&[7; 10], GROUP + 700_000).unwrap();
        let mut reader = Groups::new(&file, size).unwrap();
        let first: Vec<Data> = (0..6).map(|group| reader.data(group).unwrap()).collect();
        assert!(first[1].len() > 1 && first[4].is_empty(), "{first:?}");
        for group in [5, 1, 1, 0, 4, 1] {
            assert_eq!(reader.data(group).unwrap(), first[group as usize], "group {group}");
        }
        // Shorter than it is said to be.
        let dense = tempfile::tempfile().unwrap();
        dense.write_all_at(&[1; 100], 0).unwrap();
        assert_eq!(file_hash(&dense, 101, &mut buffer).unwrap(), None);
    }
}
