//! Two sides that send each other a message every 20 ms over two relays, any half of which may be dead.

use super::super::vigil::{Step, Vigil};
use super::*;

const MS: Duration = Duration::from_millis(1);

/// From a side to a server, or back.
const HALF: Duration = Duration::from_millis(20);

/// What is dead: by server, by side, upward and downward.
type Dead = [[[bool; 2]; 2]; 2];

#[derive(Debug, Clone, Copy)]
enum Packet {
    Data { over: usize },
    Answer { from: usize },
}

struct Side {
    carrying: usize,
    watch: RelayWatch,
    vigils: [Vigil; 2],
    traffic: RelayTraffic,
    /// When data came.
    data: Vec<u64>,
    moves: u32,
}

impl Side {
    fn new(seed: u64) -> Self {
        Self {
            carrying: 0,
            watch: RelayWatch::default(),
            vigils: [Vigil::new(seed), Vigil::new(seed + 100)],
            traffic: RelayTraffic::default(),
            data: Vec::new(),
            moves: 0,
        }
    }
}

struct Model {
    start: Instant,
    sides: [Side; 2],
    under_way: Vec<(u64, usize, Packet)>,
    dead: Dead,
    copies: u32,
}

impl Model {
    fn new() -> Self {
        let sides = [Side::new(1), Side::new(2)];
        Self { start: Instant::now(), sides, under_way: Vec::new(), dead: Dead::default(), copies: 0 }
    }

    fn send(&mut self, side: usize, over: usize, now: u64) {
        if !self.dead[over][side][0] && !self.dead[over][1 - side][1] {
            self.under_way.push((now + 40, 1 - side, Packet::Data { over }));
        }
    }

    fn ask(&mut self, side: usize, server: usize, now: u64) {
        if self.dead[server][side] == [false, false] {
            self.under_way.push((now + 40, side, Packet::Answer { from: server }));
        }
    }

    /// From one millisecond to another; each side says something in every twentieth one if `talking`.
    fn run(&mut self, from: u64, to: u64, talking: [bool; 2]) {
        for ms in from..to {
            let now = self.start + MS * ms as u32;
            let (due, later) =
                std::mem::take(&mut self.under_way).into_iter().partition(|(at, ..)| *at <= ms);
            self.under_way = later;
            for (_, to, packet) in due {
                let side: &mut Side = &mut self.sides[to];
                match packet {
                    Packet::Answer { from } => drop(side.vigils[from].handle_answer(now)),
                    Packet::Data { over } if over == side.carrying => {
                        side.traffic.unanswered_since = None;
                        side.traffic.heard = true;
                        side.data.push(ms);
                    }
                    Packet::Data { .. } => {
                        side.traffic.elsewhere = true;
                        side.data.push(ms);
                    }
                }
            }
            for (number, talking) in talking.into_iter().enumerate() {
                if talking && ms % 20 == 7 * number as u64 {
                    let side = &mut self.sides[number];
                    side.traffic.unanswered_since.get_or_insert(now);
                    side.traffic.last_sent = Some(now);
                    let (carrying, both) = (side.carrying, side.watch.is_doubtful());
                    self.send(number, carrying, ms);
                    if both {
                        self.copies += 1;
                        self.send(number, 1 - carrying, ms);
                    }
                }
                for server in 0..2 {
                    while let Some(step) = self.sides[number].vigils[server].poll(now) {
                        if step == Step::Ask {
                            self.ask(number, server, ms);
                        }
                    }
                }
                let side = &mut self.sides[number];
                let about = Circumstances {
                    doubtful: side.vigils[side.carrying].is_doubtful(),
                    spare: !side.vigils[1 - side.carrying].is_doubtful(),
                    rtt: Some(4 * HALF),
                };
                let verdict = side.watch.poll(side.traffic, about, now);
                (side.traffic.heard, side.traffic.elsewhere) = (false, false);
                match verdict {
                    Some(Verdict::Ask) => side.vigils[side.carrying].suspect(now),
                    Some(Verdict::Move) => {
                        side.carrying = 1 - side.carrying;
                        side.traffic.unanswered_since = None;
                        side.moves += 1;
                    }
                    Some(Verdict::Doubt | Verdict::Keep) | None => {}
                }
            }
        }
    }

    /// The longest that a side has heard nothing.
    fn gap(&self, side: usize) -> u64 {
        self.sides[side].data.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(u64::MAX)
    }
}

#[test]
fn whatever_dies_of_a_relay_the_other_one_carries_within_a_second() {
    // Every half of the first server's that may be dead, alone and together.
    for mask in 1..16u8 {
        let mut model = Model::new();
        model.run(0, 2_000, [true, true]);
        assert_eq!((model.copies, model.gap(0), model.gap(1)), (0, 20, 20), "no doubt before");
        let bit = |place: u8| mask & (1 << place) != 0;
        model.dead[0] = [[bit(0), bit(1)], [bit(2), bit(3)]];
        model.run(2_000, 12_000, [true, true]);
        for side in 0..2 {
            assert!(model.gap(side) <= 600, "{mask:04b}: {} ms at {side}", model.gap(side));
            assert!(model.sides[side].data.last().is_some_and(|last| *last > 11_900), "{mask:04b}");
        }
        // Both have left for good: no copies any more, no more moves than it takes.
        let copies = model.copies;
        model.run(12_000, 20_000, [true, true]);
        assert_eq!(model.copies, copies, "{mask:04b}: it goes on and on");
        let moves = model.sides.iter().map(|side| side.moves).max();
        assert!(moves <= Some(2), "{mask:04b}: {moves:?}");
    }
}

#[test]
fn both_servers_can_be_lost_one_after_the_other() {
    let mut model = Model::new();
    model.run(0, 1_000, [true, true]);
    model.dead[0] = [[true; 2]; 2];
    model.run(1_000, 5_000, [true, true]);
    assert_eq!(model.sides.each_ref().map(|side| side.carrying), [1, 1]);
    model.dead[0] = Default::default();
    model.run(5_000, 8_000, [true, true]);
    assert!(model.sides.iter().all(|side| !side.vigils[0].is_doubtful()), "it is known to be back");
    model.dead[1] = [[true; 2]; 2];
    model.run(8_000, 12_000, [true, true]);
    assert_eq!(model.sides.each_ref().map(|side| side.carrying), [0, 0]);
    assert!(model.gap(0) <= 600 && model.gap(1) <= 600, "{} {}", model.gap(0), model.gap(1));
}

#[test]
fn silence_is_no_reason() {
    let mut model = Model::new();
    model.run(0, 1_000, [true, true]);
    model.run(1_000, 60_000, [false, false]);
    model.run(60_000, 61_000, [true, true]);
    assert_eq!((model.copies, model.sides[0].moves + model.sides[1].moves), (0, 0));
}

#[test]
fn a_bare_acknowledgement_puts_nothing_in_doubt_and_lets_the_driver_sleep() {
    let start = Instant::now();
    let mut watch = RelayWatch::default();
    let traffic =
        RelayTraffic { unanswered_since: Some(start), last_sent: Some(start), ..RelayTraffic::default() };
    let about = Circumstances { doubtful: false, spare: true, rtt: Some(80 * MS) };
    let mut looks = 0;
    let mut verdicts = Vec::new();
    let mut now = start;
    loop {
        verdicts.extend(watch.poll(traffic, about, now));
        let Some(next) = watch.poll_timeout() else { break };
        assert!(next > now);
        (now, looks) = (next, looks + 1);
    }
    assert_eq!(verdicts, [Verdict::Ask]);
    assert!(looks < 12 && now < start + 2 * LULL, "{looks}");
}

#[test]
fn with_one_server_there_is_nothing_but_to_ask_it() {
    let start = Instant::now();
    let mut watch = RelayWatch::default();
    let about = Circumstances { doubtful: true, spare: false, rtt: None };
    let mut verdicts = Vec::new();
    for ms in 0..3_000 {
        let now = start + ms * MS;
        let traffic =
            RelayTraffic { unanswered_since: Some(start), last_sent: Some(now), ..RelayTraffic::default() };
        verdicts.extend(watch.poll(traffic, about, now));
    }
    assert_eq!(verdicts, [Verdict::Ask]);
}

/// A relay that carries nothing for five seconds, and one side that sends ever more rarely, as QUIC does.
#[test]
fn what_comes_after_a_long_silence_is_noticed_once() {
    let start = Instant::now();
    let mut watch = RelayWatch::default();
    let about = Circumstances { doubtful: false, spare: false, rtt: Some(80 * MS) };
    let mut traffic = RelayTraffic::default();
    let (mut lull, mut sent) = (0, 0);
    for ms in 0..5_000 {
        let now = start + ms * MS;
        if [0, 20, 40, 300, 900, 2_100, 4_500].contains(&ms) {
            if ms - sent >= 1_000 {
                lull += 1;
                traffic.unanswered_since = Some(now);
            }
            sent = ms;
            traffic.unanswered_since.get_or_insert(now);
            traffic.last_sent = Some(now);
        }
        watch.poll(traffic, about, now);
        assert!(!watch.take_revival(), "nothing has come");
    }
    assert_eq!(lull, 2);
    assert!(watch.is_silent());
    let heard = RelayTraffic { unanswered_since: None, heard: true, ..traffic };
    watch.poll(heard, about, start + 5_000 * MS);
    assert!(watch.take_revival() && !watch.take_revival() && !watch.is_silent());
}

#[test]
fn an_answer_in_time_or_after_a_pause_is_no_revival() {
    let start = Instant::now();
    let mut watch = RelayWatch::default();
    let about = Circumstances { doubtful: false, spare: false, rtt: Some(80 * MS) };
    for second in 0..60 {
        // A bare acknowledgement is the last that leaves; much later there is a question, and an answer at once.
        let asked = start + second * 20 * 1_000 * MS;
        for ms in (0..19_000).step_by(50) {
            let traffic = RelayTraffic {
                unanswered_since: Some(asked),
                last_sent: Some(asked),
                heard: ms == 100,
                ..RelayTraffic::default()
            };
            watch.poll(traffic, about, asked + ms * MS);
            assert!(!watch.take_revival() && !watch.is_silent());
        }
    }
}
