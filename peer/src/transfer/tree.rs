//! BLAKE3 in groups of 1 MiB: every group has a value of its own, and the values make the file's hash, the same that
//! `b3sum` prints. So a part of a file can be verified, and kept, without the rest.

use blake3::Hasher;
use blake3::hazmat::{self, HasherExt as _, Mode};

/// Bytes in a group; the last one of a file may be shorter.
pub(crate) const GROUP: u64 = 1 << 20;

/// What a group's content hashes to where it stands: a chaining value of the file's tree; the file's hash where the group is all of
/// the file.
pub(crate) type GroupValue = [u8; 32];

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// How many groups a file has. An empty file has one, of no bytes.
pub(crate) const fn groups(size: u64) -> u64 {
    match size.div_ceil(GROUP) {
        0 => 1,
        groups => groups,
    }
}

/// Bytes of one group of a file of `size` bytes.
pub(crate) const fn group_length(size: u64, group: u64) -> u64 {
    let start = group.saturating_mul(GROUP);
    let left = size.saturating_sub(start);
    if left < GROUP { left } else { GROUP }
}

/// One group in the making.
pub(crate) struct GroupHasher {
    hasher: Hasher,
    alone: bool,
}

impl GroupHasher {
    /// For group number `group` of a file of `size` bytes.
    pub(crate) fn new(size: u64, group: u64) -> Self {
        let mut hasher = Hasher::new();
        let alone = groups(size) == 1;
        if !alone {
            hasher.set_input_offset(group * GROUP);
        }
        Self { hasher, alone }
    }

    pub(crate) fn update(&mut self, content: &[u8]) {
        self.hasher.update(content);
    }

    pub(crate) fn update_zeros(&mut self, mut count: u64) {
        while count > 0 {
            let now = count.min(ZEROS.len() as u64);
            self.hasher.update(&ZEROS[..now as usize]);
            count -= now;
        }
    }

    pub(crate) fn finish(&self) -> GroupValue {
        if self.alone { *self.hasher.finalize().as_bytes() } else { self.hasher.finalize_non_root() }
    }
}

/// The file's hash from the values of its groups, in order. Keeps one value for each level of the tree.
#[derive(Debug, Default, Clone)]
pub(crate) struct Tree {
    /// Roots of finished subtrees, largest first. The two newest are merged only when something follows: the last merge is another.
    stack: Vec<GroupValue>,
    pushed: u64,
}

impl Tree {
    pub(crate) fn push(&mut self, value: GroupValue) {
        while self.stack.len() > self.pushed.count_ones() as usize {
            self.merge(hazmat::merge_subtrees_non_root);
        }
        self.stack.push(value);
        self.pushed += 1;
    }

    fn merge(&mut self, how: impl Fn(&GroupValue, &GroupValue, Mode<'_>) -> GroupValue) {
        if let (Some(right), Some(left)) = (self.stack.pop(), self.stack.pop()) {
            self.stack.push(how(&left, &right, Mode::Hash));
        }
    }

    /// The file's hash; `None` when there was no group.
    pub(crate) fn finish(mut self) -> Option<[u8; 32]> {
        while self.stack.len() > 2 {
            self.merge(hazmat::merge_subtrees_non_root);
        }
        if self.stack.len() == 2 {
            self.merge(|left, right, mode| *hazmat::merge_subtrees_root(left, right, mode).as_bytes());
        }
        self.stack.pop()
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{RngCore as _, SeedableRng as _};

    use super::*;

    fn by_groups(content: &[u8]) -> [u8; 32] {
        let size = content.len() as u64;
        let mut tree = Tree::default();
        for group in 0..groups(size) {
            let start = (group * GROUP) as usize;
            let mut hasher = GroupHasher::new(size, group);
            hasher.update(&content[start..start + group_length(size, group) as usize]);
            tree.push(hasher.finish());
        }
        tree.finish().unwrap()
    }

    #[test]
    fn groups_make_the_hash_of_the_whole() {
        let mut content = vec![0; 9 << 20];
        SmallRng::seed_from_u64(1).fill_bytes(&mut content);
        let whole = GROUP as usize;
        let around = |count: usize| [count * whole - 1, count * whole, count * whole + 1];
        let mut lengths: Vec<usize> = (1..9).flat_map(around).collect();
        lengths.extend([0, 1, 1023, 1024, 1025, content.len()]);
        for length in lengths {
            let expected = *blake3::hash(&content[..length]).as_bytes();
            assert_eq!(by_groups(&content[..length]), expected, "{length} bytes");
        }
    }

    #[test]
    fn zeros_need_no_buffer() {
        let mut hasher = GroupHasher::new(5 * GROUP, 3);
        hasher.update_zeros(GROUP);
        let mut slow = GroupHasher::new(5 * GROUP, 3);
        slow.update(&vec![0; GROUP as usize]);
        assert_eq!(hasher.finish(), slow.finish());
        assert_eq!(group_length(GROUP * 2 + 5, 2), 5);
    }
}
