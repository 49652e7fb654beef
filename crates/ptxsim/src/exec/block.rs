//! A block: its shared memory, its warps and its barriers.

use std::sync::atomic::Ordering::Relaxed;

use super::access::locate;
use super::bulk::Stores;
use super::cluster::Cluster;
use super::copies::Copies;
use super::launch::{Launch, mix};
use super::registers::{Registers, first_lane};
use super::step::Flow;
use super::warp::{Group, State, Warp};
use super::wgmma::Products;
use crate::observe::{Observer, Site, Violation};
use crate::program::{BarrierKind, Op, Program, Reg, WarpOp};
use crate::report::{Fault, FaultKind};

/// How far a block got.
pub(super) enum Progress {
    Done,
    /// It made room for other blocks.
    Paused,
    /// Its threads wait for something that another block of the cluster has to do.
    Blocked,
}

/// Warp instructions that a block runs before it makes room.
const BLOCK_QUANTUM: u64 = 1 << 22;

/// A barrier's arrivals, one mask of lanes per warp.
#[derive(Default)]
pub(super) struct Arrivals {
    waiting: Vec<u32>,
    announced: Vec<u32>,
    /// Threads that it waits for, when given.
    expected: Option<u32>,
    /// Of `barrier.red`.
    votes: u32,
    voters: u32,
}

impl Arrivals {
    fn count(&self) -> u32 {
        self.waiting
            .iter()
            .chain(&self.announced)
            .map(|mask| mask.count_ones())
            .sum()
    }
}

/// Barriers of a block, by the ISA.
const BARRIERS: usize = 16;

pub(super) struct Block<'l, O> {
    pub launch: &'l Launch<'l>,
    pub program: &'l Program,
    pub number: u32,
    /// Its number in the cluster.
    pub rank: u32,
    pub cluster: Cluster,
    pub shared: Vec<u8>,
    pub warps: Vec<Warp>,
    pub observer: O,
    pub barriers: [Arrivals; BARRIERS],
    /// Warp instructions run so far.
    pub clock: u64,
    random: u64,
}

impl<'l, O: Observer> Block<'l, O> {
    pub fn new(launch: &'l Launch<'l>, number: u32, rank: u32) -> Block<'l, O> {
        let program = launch.program;
        let threads = launch.threads();
        let warp = |number: u32| {
            let present = (threads - number * 32).min(32);
            let lanes = u32::MAX >> (32 - present);
            let group = Group {
                mask: lanes,
                ..Group::START
            };
            Warp {
                number,
                registers: Registers::new(program.registers, program.constants.clone()),
                groups: vec![group],
                lanes,
                calls: vec![Vec::new(); 32],
                local: vec![0; 32 * program.local_bytes as usize],
                copies: Copies::default(),
                stores: Stores::default(),
                arrivals: Vec::new(),
                products: Products::default(),
                cluster_phase: [0; 32],
            }
        };
        let warps: Vec<Warp> = (0..threads.div_ceil(32)).map(warp).collect();
        let arrivals = || Arrivals {
            waiting: vec![0; warps.len()],
            announced: vec![0; warps.len()],
            ..Arrivals::default()
        };
        Block {
            launch,
            program,
            number,
            rank,
            // These are lent for each turn.
            cluster: Cluster::default(),
            shared: Vec::new(),
            observer: O::default(),
            barriers: std::array::from_fn(|_| arrivals()),
            clock: 0,
            random: mix(launch.config.seed ^ u64::from(number) << 32),
            warps,
        }
    }

    fn next_random(&mut self) -> u64 {
        self.random = mix(self.random);
        self.random
    }

    /// Runs until every warp has finished or the quantum is over.
    pub fn run(&mut self) -> Result<Progress, Fault> {
        let end = self.clock + BLOCK_QUANTUM;
        loop {
            let count = self.warps.len();
            let first = if self.launch.config.seed == 0 {
                0
            } else {
                self.next_random() as usize
            };
            let mut ran = false;
            let before = self.clock;
            for index in 0..count {
                let warp = (first % count + index) % count;
                // Long enough to stay in the cache, short enough to mix the warps.
                let quantum = 256 + self.next_random() % 256;
                ran |= self.run_warp(warp, quantum)?;
            }
            if let Some(limit) = self.launch.config.max_instructions {
                self.spend(self.clock - before, limit)?;
            }
            if self.warps.iter().all(|warp| warp.groups.is_empty()) {
                return self.finish();
            }
            if !ran && !self.unblock()? {
                return Ok(Progress::Blocked);
            }
            if self.clock >= end {
                return Ok(Progress::Paused);
            }
        }
    }

    /// Adds to what the launch has run, and ends it once that is too much.
    fn spend(&self, instructions: u64, limit: u64) -> Result<(), Fault> {
        let before = self.launch.spent.fetch_add(instructions, Relaxed);
        let running = self.warps.iter().enumerate().find_map(|(w, warp)| {
            let group = warp.groups.first()?;
            Some((w, *group))
        });
        match running {
            Some((w, group)) if before + instructions > limit => {
                let site = self.site(w, group.pc, group.mask);
                Err(self.fault(&site, first_lane(group.mask), FaultKind::Endless { limit }))
            }
            _ => Ok(()),
        }
    }

    /// Every thread has exited; nobody may be left at a barrier.
    fn finish(&mut self) -> Result<Progress, Fault> {
        if self.launch.config.checks.async_copies {
            self.check_copies_landed()?;
        }
        Ok(Progress::Done)
    }

    pub fn site(&self, warp: usize, pc: u32, active: u32) -> Site {
        Site {
            block: self.number,
            rank: self.rank,
            warp: self.warps[warp].number,
            pc,
            active,
        }
    }

    pub fn fault(&self, site: &Site, lane: usize, kind: FaultKind) -> Fault {
        let thread = site.warp * 32 + lane as u32;
        Fault {
            kernel: self.program.name.clone(),
            kind: Box::new(kind),
            party: Some(Box::new(self.launch.party(site.block, thread, site.pc))),
            printed: String::new(),
        }
    }

    pub fn violation(&self, site: &Site, violation: Violation) -> Fault {
        self.fault(site, violation.lane, violation.kind)
    }

    /// Runs one warp until it waits, ends, or has run `quantum` instructions. Returns whether it
    /// ran at all.
    fn run_warp(&mut self, w: usize, quantum: u64) -> Result<bool, Fault> {
        let program = self.program;
        let end = self.clock + quantum;
        let mut ran = false;
        self.wake(w);
        'groups: loop {
            let Some(index) = self.warps[w].pick() else {
                if self.settle(w)? {
                    continue;
                }
                return Ok(ran);
            };
            if self.clock >= end {
                return Ok(true);
            }
            ran = true;
            let index = if self.warps[w].groups.len() > 1 {
                self.warps[w].merge(index)
            } else {
                0
            };
            let meeting = self.warps[w].next_meeting(index);
            let Group {
                mut pc,
                mask,
                depth,
                forced,
                ..
            } = self.warps[w].groups[index];
            loop {
                let instr = &program.code[pc as usize];
                let active = match instr.guard {
                    None => mask,
                    Some(guard) => {
                        let bits = self.warps[w].registers.predicate(guard.predicate);
                        mask & if guard.negated { !bits } else { bits }
                    }
                };
                self.clock += 1;
                let flow = if active == 0 {
                    Flow::Next
                } else {
                    let site = self.site(w, pc, active);
                    self.observer
                        .issue(self.launch, &site, instr)
                        .map_err(|violation| self.violation(&site, *violation))?;
                    self.step(w, &site, instr, forced)?
                };
                match flow {
                    Flow::Next => pc += 1,
                    Flow::Jump(target) if active == mask => pc = target,
                    _ => {
                        let group = &mut self.warps[w].groups[index];
                        group.pc = pc;
                        group.forced = false;
                        self.redirect(w, index, active, flow, depth)?;
                        continue 'groups;
                    }
                }
                if pc >= meeting || self.clock >= end || forced {
                    let group = &mut self.warps[w].groups[index];
                    group.pc = pc;
                    group.forced = false;
                    continue 'groups;
                }
            }
        }
    }

    /// Control flow that changes the groups of a warp.
    fn redirect(
        &mut self,
        w: usize,
        index: usize,
        active: u32,
        flow: Flow,
        depth: u32,
    ) -> Result<(), Fault> {
        let warp = &mut self.warps[w];
        let pc = warp.groups[index].pc;
        let rest = warp.groups[index].mask & !active;
        match flow {
            Flow::Next => warp.groups[index].pc = pc + 1,
            Flow::Jump(target) => {
                self.observer.diverged();
                let other = warp.split(index, active, target, depth);
                if other != index {
                    warp.groups[index].pc = pc + 1;
                }
            }
            Flow::Scatter(targets) => {
                let mut pieces = targets;
                pieces.retain(|(_, mask, _)| *mask != 0);
                if pieces.len() + usize::from(rest != 0) > 1 {
                    self.observer.diverged();
                }
                for (target, mask, depth) in pieces {
                    warp.split(index, mask, target, depth);
                }
                if rest != 0
                    && let Some(group) = warp.groups.iter_mut().find(|g| g.mask == rest)
                {
                    group.pc = pc + 1;
                }
            }
            Flow::Exit => {
                warp.groups[index].mask = rest;
                warp.groups[index].pc = pc + 1;
                warp.groups.retain(|group| group.mask != 0);
                self.cluster.leave(active.count_ones());
            }
            Flow::Park => self.park(w, index, active, State::Parked),
            Flow::Wait => self.park(w, index, active, State::Waiting),
            Flow::Barrier(id) => {
                self.park(w, index, active, State::AtBarrier(id));
                self.release(id)?;
            }
        }
        Ok(())
    }

    /// Lets the groups go on whose wait is over.
    fn wake(&mut self, w: usize) {
        for index in 0..self.warps[w].groups.len() {
            let Group {
                pc, mask, state, ..
            } = self.warps[w].groups[index];
            if state == State::Waiting && self.resumes(w, pc, mask) {
                self.warps[w].groups[index].state = State::Ready;
            }
        }
    }

    /// Whether the instruction at which lanes wait would not make them wait again.
    fn resumes(&self, w: usize, pc: u32, mask: u32) -> bool {
        match &self.program.code[pc as usize].op {
            Op::Mbarrier(op) => self.mbarrier_resumes(w, mask, op),
            Op::WarpgroupWait { .. } => self.warpgroup_is_here(w),
            Op::ClusterWait { .. } => self.cluster_done(w, mask),
            _ => true,
        }
    }

    /// All threads wait and nothing can wake them.
    pub fn deadlock(&self) -> Fault {
        let waits = |g: &&Group| g.state == State::Waiting;
        let stuck = self
            .warps
            .iter()
            .enumerate()
            .find_map(|(w, warp)| warp.groups.iter().find(waits).map(|group| (w, *group)));
        let (w, group) = stuck.unwrap_or((0, Group::START));
        let site = self.site(w, group.pc, group.mask);
        let lane = first_lane(group.mask);
        let waiting_for = match &self.program.code[group.pc as usize].op {
            Op::Mbarrier(op) => {
                let registers = &self.warps[w].registers;
                let located = locate(registers, op.space, &op.address, group.mask).next();
                self.describe_mbarrier(located.map_or(0, |located| located.addresses[lane]))
            }
            Op::WarpgroupWait { .. } => "the other warps of its warpgroup".to_string(),
            _ => "the other blocks of its cluster".to_string(),
        };
        self.fault(&site, lane, FaultKind::Deadlock { waiting_for })
    }

    /// Stops the active lanes of a group at its instruction; the others go on.
    fn park(&mut self, w: usize, index: usize, active: u32, state: State) {
        let warp = &mut self.warps[w];
        let Group {
            pc, depth, mask, ..
        } = warp.groups[index];
        if mask != active {
            let parked = warp.split(index, active, pc, depth);
            warp.groups[parked].state = state;
            warp.groups[index].pc = pc + 1;
            return;
        }
        warp.groups[index].state = state;
        if state == State::Parked {
            // Lanes that parked here before: together they may be all that are needed.
            let here = |g: &Group| g.state == State::Parked && g.pc == pc && g.depth == depth;
            if warp.groups.iter().filter(|g| here(g)).count() > 1 {
                for group in warp.groups.iter_mut().filter(|g| here(g)) {
                    group.state = State::Ready;
                }
            }
        }
    }

    /// No group of the warp can run. Decides about the parked ones: returns whether one can now.
    fn settle(&mut self, w: usize) -> Result<bool, Fault> {
        let warp = &mut self.warps[w];
        let parked = |g: &Group| g.state == State::Parked;
        // Lanes that wait may still come to where the parked ones are.
        if warp.groups.iter().any(|g| g.state == State::Waiting) {
            return Ok(false);
        }
        let Some(&group) = warp.groups.iter().find(|g| parked(g)) else {
            return Ok(false);
        };
        let code = &self.program.code;
        let is_sync = |g: &Group| match &code[g.pc as usize].op {
            Op::Warp { op, .. } => matches!(**op, WarpOp::Sync),
            _ => false,
        };
        // `bar.warp.sync` joins lanes at different instructions.
        if let Op::Warp { mask, .. } = &code[group.pc as usize].op
            && is_sync(&group)
        {
            let needed = warp.registers.word(*mask)[first_lane(group.mask)];
            let syncing = |g: &Group| parked(g) && is_sync(g);
            let union = warp
                .groups
                .iter()
                .filter(|g| syncing(g))
                .fold(0, |m, g| m | g.mask);
            if needed & !union == 0 {
                for group in warp.groups.iter_mut().filter(|g| syncing(g)) {
                    group.state = State::Ready;
                    group.pc += 1;
                }
                self.observer.warp_synchronized(self.rank, w as u32);
                return Ok(true);
            }
        }
        let checks = self.launch.config.checks;
        let instr = &code[group.pc as usize];
        let checked = match instr.op {
            Op::Barrier(_) => checks.barriers,
            _ => checks.missing_lanes,
        };
        if !checked {
            for other in warp.groups.iter_mut().filter(|g| g.state == State::Parked) {
                if other.pc == group.pc {
                    other.state = State::Ready;
                    other.forced = true;
                }
            }
            return Ok(true);
        }
        let expected = match &instr.op {
            Op::Warp { mask, .. } => warp.registers.word(*mask)[first_lane(group.mask)],
            // Those that have exited are the ones that it misses.
            Op::Barrier(_) => warp.lanes,
            _ => u32::MAX,
        };
        let missing = expected & !group.mask;
        let other = warp.groups.iter().find(|g| g.mask & missing != 0).copied();
        let elsewhere = other.map(|other| {
            let lane = first_lane(other.mask & missing) as u32;
            self.launch
                .party(self.number, w as u32 * 32 + lane, other.pc)
        });
        let kind = FaultKind::MissingLanes {
            arrived: group.mask,
            expected,
            elsewhere,
        };
        let site = self.site(w, group.pc, group.mask);
        Err(self.fault(&site, first_lane(group.mask), kind))
    }

    /// Records the arrival of the active lanes of a warp at a barrier.
    pub fn arrive(
        &mut self,
        w: usize,
        site: &Site,
        barrier: &crate::program::Barrier,
    ) -> Result<Flow, Fault> {
        let warp = &self.warps[w];
        let lane = first_lane(site.active);
        let id = warp.registers.word(barrier.id)[lane];
        let expected = barrier
            .threads
            .map(|threads| warp.registers.word(threads)[lane]);
        let undefined = |what: &str| FaultKind::Undefined(what.to_string());
        if id as usize >= BARRIERS {
            return Err(self.fault(site, lane, undefined("a block has barriers 0 to 15")));
        }
        if expected.is_some_and(|threads| threads == 0 || threads % 32 != 0) {
            let what = "the thread count of a barrier is a multiple of 32 and not 0";
            return Err(self.fault(site, lane, undefined(what)));
        }
        let votes = warp.registers.predicate(barrier.p) & site.active;
        let arrivals = &mut self.barriers[id as usize];
        if arrivals.count() > 0 && arrivals.expected != expected {
            let what = format!("threads disagree about how many barrier {id} waits for");
            return Err(self.fault(site, lane, FaultKind::Undefined(what)));
        }
        arrivals.expected = expected;
        if barrier.kind == BarrierKind::Arrive {
            arrivals.announced[w] |= site.active;
            self.release(id)?;
            return Ok(Flow::Next);
        }
        arrivals.waiting[w] |= site.active;
        arrivals.votes += votes.count_ones();
        arrivals.voters += site.active.count_ones();
        Ok(Flow::Barrier(id))
    }

    /// Threads that a barrier waits for.
    fn expected(&self, arrivals: &Arrivals) -> u32 {
        match arrivals.expected {
            Some(threads) => threads,
            // Threads that left count as missing only where that is checked.
            None if self.launch.config.checks.barriers => self.launch.threads(),
            None => self.warps.iter().map(|warp| warp.live().count_ones()).sum(),
        }
    }

    /// Lets the threads at barrier `id` go if all have arrived. Returns whether they went.
    fn release(&mut self, id: u32) -> Result<bool, Fault> {
        let arrivals = &self.barriers[id as usize];
        let arrived = arrivals.count();
        if arrived == 0 || arrived < self.expected(arrivals) {
            return Ok(false);
        }
        self.observer
            .synchronized(self.rank, &arrivals.waiting, &arrivals.announced);
        let (votes, voters) = (arrivals.votes, arrivals.voters);
        for warp in &mut self.warps {
            for group in &mut warp.groups {
                if group.state != State::AtBarrier(id) {
                    continue;
                }
                if let Op::Barrier(barrier) = &self.program.code[group.pc as usize].op {
                    let result = match barrier.kind {
                        BarrierKind::Popc => votes,
                        BarrierKind::And => u32::from(votes == voters),
                        _ => u32::from(votes > 0),
                    };
                    let lanes = if result == 0 { 0 } else { u32::MAX };
                    match barrier.d {
                        Reg::Word(d, _) => {
                            warp.registers.set_word(d, group.mask, &[result; 32]);
                        }
                        Reg::Predicate(d) => warp.registers.set_predicate(d, group.mask, lanes),
                        Reg::Wide(_) | Reg::Sink => {}
                    }
                }
                group.state = State::Ready;
                group.pc += 1;
            }
        }
        let arrivals = &mut self.barriers[id as usize];
        arrivals.waiting.fill(0);
        arrivals.announced.fill(0);
        (arrivals.votes, arrivals.voters, arrivals.expected) = (0, 0, None);
        Ok(true)
    }

    /// No warp can run: releases a barrier that only waits for threads that have left, or says
    /// what is wrong. Returns whether a thread can go on.
    fn unblock(&mut self) -> Result<bool, Fault> {
        for id in 0..BARRIERS as u32 {
            if self.release(id)? {
                return Ok(true);
            }
        }
        let waits = |g: &Group| g.state == State::Waiting;
        if self.warps.iter().any(|warp| warp.groups.iter().any(waits)) {
            return Ok(false);
        }
        let stuck = self.warps.iter().enumerate().find_map(|(w, warp)| {
            let waits = |g: &&Group| matches!(g.state, State::AtBarrier(_));
            warp.groups.iter().find(waits).map(|group| (w, *group))
        });
        let Some((w, group)) = stuck else {
            return Ok(true);
        };
        let State::AtBarrier(id) = group.state else {
            return Ok(true);
        };
        let arrivals = &self.barriers[id as usize];
        let elsewhere = self.warps.iter().enumerate().find_map(|(other, warp)| {
            let group = warp
                .groups
                .iter()
                .find(|g| g.state != State::AtBarrier(id))?;
            let thread = other as u32 * 32 + first_lane(group.mask) as u32;
            Some(self.launch.party(self.number, thread, group.pc))
        });
        let kind = FaultKind::ShortBarrier {
            barrier: id,
            arrived: arrivals.count(),
            expected: self.expected(arrivals),
            elsewhere,
        };
        let site = self.site(w, group.pc, group.mask);
        Err(self.fault(&site, first_lane(group.mask), kind))
    }
}
