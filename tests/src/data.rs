//! Data that can be checked without being kept.

use std::io::{self, Read, Write};

use rand::rngs::SmallRng;
use rand::{RngCore as _, SeedableRng as _};
use ring::digest::{Context, SHA256};

const BLOCK: usize = 256 * 1024;

/// Writes `length` pseudo-random bytes; their SHA-256.
///
/// # Errors
///
/// What `output` says.
pub fn produce(seed: u64, length: u64, output: &mut impl Write) -> io::Result<Vec<u8>> {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut digest = Context::new(&SHA256);
    let mut block = vec![0; BLOCK];
    let mut left = length;
    while left > 0 {
        let count = left.min(BLOCK as u64) as usize;
        random.fill_bytes(&mut block[..count]);
        digest.update(&block[..count]);
        output.write_all(&block[..count])?;
        left -= count as u64;
    }
    output.flush()?;
    Ok(digest.finish().as_ref().to_vec())
}

/// Reads to the end; the number of bytes and their SHA-256.
///
/// # Errors
///
/// What `input` says.
pub fn consume(input: &mut impl Read) -> io::Result<(u64, Vec<u8>)> {
    let mut digest = Context::new(&SHA256);
    let mut block = vec![0; BLOCK];
    let mut total = 0;
    loop {
        match input.read(&mut block)? {
            0 => return Ok((total, digest.finish().as_ref().to_vec())),
            count => {
                digest.update(&block[..count]);
                total += count as u64;
            }
        }
    }
}
