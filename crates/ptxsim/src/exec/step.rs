//! One instruction of one warp.

use super::block::Block;
use super::launch::unflatten;
use super::registers::{FULL, Row, Slot, first_lane, lanes};
use crate::matrix::{LaneRegister, mma, rows};
use crate::observe::{Observer, Site};
use crate::program::*;
use crate::report::{Fault, FaultKind};

/// Where the active lanes go after an instruction.
pub(super) enum Flow {
    Next,
    Jump(u32),
    /// Target, lanes and call depth of each part.
    Scatter(Vec<(u32, u32, u32)>),
    Exit,
    /// Lanes that the instruction needs are missing.
    Park,
    /// Waits at a block barrier.
    Barrier(u32),
    /// Waits until something else has happened, then runs the instruction again.
    Wait,
}

/// Calls that may be open at once.
const MAX_CALL_DEPTH: usize = 64;

impl<O: Observer> Block<'_, O> {
    /// Executes `instr` for the lanes of `site.active`, which is not empty.
    #[inline(always)]
    pub(super) fn step(
        &mut self,
        w: usize,
        site: &Site,
        instr: &Instr,
        forced: bool,
    ) -> Result<Flow, Fault> {
        let active = site.active;
        match &instr.op {
            Op::Alu(row, operands) => row(&mut self.warps[w].registers, operands, active),
            Op::Load(load) => self.load(w, site, load)?,
            Op::Store(store) => self.store(w, site, store)?,
            Op::Branch { target } => return Ok(Flow::Jump(*target)),
            Op::Special { d, register } => self.special(w, active, *d, *register),
            Op::Pack(parts) => self.pack(w, active, parts),
            Op::Unpack(parts) => self.unpack(w, active, parts),
            Op::MatrixMultiply(multiply) => {
                if active != FULL && !forced {
                    return Ok(Flow::Park);
                }
                self.multiply(w, multiply);
            }
            Op::LoadMatrix(movement) | Op::StoreMatrix(movement) => {
                if active != FULL && !forced {
                    return Ok(Flow::Park);
                }
                self.move_matrix(w, site, movement)?;
            }
            Op::TransposeMatrix { d, a } => {
                if active != FULL && !forced {
                    return Ok(Flow::Park);
                }
                let registers = &mut self.warps[w].registers;
                let transposed = rows::transpose(registers.word(*a));
                registers.set_word(*d, active, &transposed);
            }
            Op::Warp { mask, op } => {
                let registers = &self.warps[w].registers;
                let needed = registers.word(*mask)[first_lane(active)];
                if needed & !active != 0 && !forced {
                    return Ok(Flow::Park);
                }
                let left_out = active & !needed;
                if left_out != 0 && self.launch.config.checks.missing_lanes {
                    let what = format!("a lane that its own mask, {needed:#010x}, leaves out");
                    return Err(self.fault(site, first_lane(left_out), FaultKind::Undefined(what)));
                }
                self.collective(w, site, needed & active, op);
            }
            Op::ActiveMask { d } => {
                self.warps[w].registers.set_word(*d, active, &[active; 32]);
            }
            Op::AsyncCopy(copy) => self.issue_copy(w, site, copy)?,
            Op::AsyncCommit => self.warps[w].copies.commit(active),
            Op::AsyncWait { pending } => self.wait_for_copies(w, site, *pending),
            Op::Barrier(barrier) => {
                if barrier.aligned && active != self.warps[w].live() && !forced {
                    return Ok(Flow::Park);
                }
                return self.arrive(w, site, barrier);
            }
            Op::Atomic(atomic) => self.atomic(w, site, atomic)?,
            Op::Fence { device } => self.observer.fence(site, *device),
            Op::BranchIndexed { index, targets } => {
                let index = *self.warps[w].registers.word(*index);
                let mut parts: Vec<(u32, u32, u32)> = Vec::new();
                let depth = self.depth(w, active);
                for lane in lanes(active) {
                    let Some(&target) = targets.get(index[lane] as usize) else {
                        let what =
                            format!("brx.idx with index {} of {}", index[lane], targets.len());
                        return Err(self.fault(site, lane, FaultKind::Undefined(what)));
                    };
                    match parts.iter_mut().find(|(pc, _, _)| *pc == target) {
                        Some((_, mask, _)) => *mask |= 1 << lane,
                        None => parts.push((target, 1 << lane, depth)),
                    }
                }
                return Ok(Flow::Scatter(parts));
            }
            Op::Call(call) => return self.call(w, site, call),
            Op::Return => return Ok(self.ret(w, site)),
            Op::Exit => return Ok(Flow::Exit),
            Op::Trap => return Err(self.fault(site, first_lane(active), FaultKind::Trap)),
            Op::Mbarrier(op) => return self.mbarrier(w, site, op),
            Op::ProxyFence => self.observer.proxy_fence(site),
            Op::BulkCopy(copy) => self.issue_bulk(w, site, copy)?,
            Op::BulkCommit => self.warps[w].stores.commit(active),
            Op::BulkWait { pending } => self.wait_for_stores(w, active, *pending),
            Op::WarpgroupMultiply(multiply) => {
                if active != FULL && !forced {
                    return Ok(Flow::Park);
                }
                self.issue_product(w, site, multiply)?;
            }
            Op::WarpgroupCommit => {
                if active != FULL && !forced {
                    return Ok(Flow::Park);
                }
                self.warps[w].products.commit();
            }
            Op::WarpgroupWait { pending } => {
                if active != FULL && !forced {
                    return Ok(Flow::Park);
                }
                return Ok(self.wait_for_products(w, *pending));
            }
            Op::ClusterArrive { aligned } => {
                if *aligned && active != self.warps[w].live() && !forced {
                    return Ok(Flow::Park);
                }
                self.cluster_arrive(w, site);
            }
            Op::ClusterWait { aligned } => {
                if *aligned && active != self.warps[w].live() && !forced {
                    return Ok(Flow::Park);
                }
                return Ok(self.cluster_wait(w, site));
            }
            Op::MapAddress { d, a, rank } => {
                let rank = *self.warps[w].registers.word(*rank);
                self.map_address(w, site, *d, *a, &rank)?;
            }
            Op::RankOfAddress { d, a } => self.rank_of_address(w, active, *d, *a),
            // Registers are read and written in program order: only a check asks for the fence.
            Op::WarpgroupFence | Op::Nothing => {}
        }
        Ok(Flow::Next)
    }

    fn depth(&self, w: usize, active: u32) -> u32 {
        self.warps[w].calls[first_lane(active)].len() as u32
    }

    fn special(&mut self, w: usize, active: u32, d: Reg, register: SpecialRegister) {
        use SpecialRegister::*;
        let config = self.launch.config;
        let block = unflatten(self.number, config.grid);
        let thread = |lane: usize| unflatten(w as u32 * 32 + lane as u32, config.block);
        let cluster = config.cluster;
        let rank = |c: [u32; 3]| c[0] + cluster[0] * (c[1] + cluster[1] * c[2]);
        let within = [0, 1, 2].map(|axis| block[axis] % cluster[axis]);
        let uniform = |value: u32| -> Row<u64> { [value.into(); 32] };
        let values: Row<u64> = match register {
            Tid(axis) => std::array::from_fn(|lane| thread(lane)[axis].into()),
            Ntid(axis) => uniform(config.block[axis]),
            Ctaid(axis) => uniform(block[axis]),
            Nctaid(axis) => uniform(config.grid[axis]),
            LaneId => std::array::from_fn(|lane| lane as u64),
            WarpId => uniform(w as u32),
            Nwarpid => uniform(self.warps.len() as u32),
            SmId => uniform(self.number % self.launch.profile.sm_count),
            Nsmid => uniform(self.launch.profile.sm_count),
            GridId => uniform(0),
            LaneMaskEq => std::array::from_fn(|lane| 1 << lane),
            LaneMaskLe => std::array::from_fn(|lane| (2 << lane) - 1),
            LaneMaskLt => std::array::from_fn(|lane| (1 << lane) - 1),
            LaneMaskGe => std::array::from_fn(|lane| u64::from(u32::MAX << lane)),
            LaneMaskGt => std::array::from_fn(|lane| u64::from((u32::MAX << lane) << 1)),
            Clock => [self.clock; 32],
            DynamicSharedSize => uniform(config.shared_bytes),
            TotalSharedSize => uniform(self.launch.shared_bytes),
            ClusterId(axis) => uniform(block[axis] / cluster[axis]),
            Nclusterid(axis) => uniform(config.grid[axis] / cluster[axis]),
            ClusterCtaid(axis) => uniform(within[axis]),
            ClusterNctaid(axis) => uniform(cluster[axis]),
            ClusterCtaRank => uniform(rank(within)),
            ClusterNctaRank => uniform(cluster.iter().product()),
            IsExplicitCluster => uniform(u32::from(cluster != [1; 3])),
        };
        let registers = &mut self.warps[w].registers;
        match d {
            Reg::Word(slot, _) => registers.set_word(slot, active, &values.map(|v| v as u32)),
            Reg::Wide(slot) => registers.set_wide(slot, active, &values),
            Reg::Predicate(slot) => {
                let bits =
                    (0..32).fold(0, |bits, lane| bits | u32::from(values[lane] != 0) << lane);
                registers.set_predicate(slot, active, bits);
            }
            Reg::Sink => {}
        }
    }

    fn pack(&mut self, w: usize, active: u32, parts: &Parts) {
        let registers = &mut self.warps[w].registers;
        let bits = parts.whole_bits / parts.parts.len() as u32;
        let mut whole = [0u64; 32];
        for (index, part) in parts.parts.iter().enumerate() {
            if let Reg::Word(slot, _) = part {
                let values = registers.word(*slot);
                for (whole, value) in whole.iter_mut().zip(values) {
                    *whole |= (u64::from(*value) & ((1 << bits) - 1)) << (bits * index as u32);
                }
            }
        }
        if parts.whole_bits == 64 {
            registers.set_wide(parts.whole, active, &whole);
        } else {
            registers.set_word(parts.whole, active, &whole.map(|value| value as u32));
        }
    }

    fn unpack(&mut self, w: usize, active: u32, parts: &Parts) {
        let registers = &mut self.warps[w].registers;
        let bits = parts.whole_bits / parts.parts.len() as u32;
        let mask = ((1u64 << bits) - 1) as u32;
        let whole = match parts.whole_bits {
            64 => *registers.wide(parts.whole),
            _ => registers.word(parts.whole).map(u64::from),
        };
        for (index, part) in parts.parts.iter().enumerate() {
            if let Reg::Word(slot, _) = part {
                let shift = bits * index as u32;
                let values = whole.map(|value| (value >> shift) as u32 & mask);
                registers.set_word(*slot, active, &values);
            }
        }
    }

    fn multiply(&mut self, w: usize, multiply: &MatrixMultiply) {
        let registers = &mut self.warps[w].registers;
        let shape = &multiply.shape;
        if shape.a == mma::Input::F64 {
            let fetch = |slots: &[Slot]| -> Vec<Row<u64>> {
                slots.iter().map(|&slot| *registers.wide(slot)).collect()
            };
            let (a, b, c) = (fetch(&multiply.a), fetch(&multiply.b), fetch(&multiply.c));
            let mut d = vec![[0; 32]; multiply.d.len()];
            mma::multiply_f64(shape, &a, &b, &c, &mut d);
            for (slot, row) in multiply.d.iter().zip(&d) {
                registers.set_wide(*slot, FULL, row);
            }
            return;
        }
        // The largest fragments: 4 registers of A, 2 (4 with 4-bit elements) of B, 4 of C and D.
        let fetch = |slots: &[Slot]| -> [LaneRegister; 8] {
            let mut fragment = [[0; 32]; 8];
            for (row, slot) in fragment.iter_mut().zip(slots) {
                *row = *registers.word(*slot);
            }
            fragment
        };
        let (a, b, c) = (fetch(&multiply.a), fetch(&multiply.b), fetch(&multiply.c));
        let (a, b) = (&a[..multiply.a.len()], &b[..multiply.b.len()]);
        let c = &c[..multiply.c.len()];
        let mut d = [[0; 32]; 8];
        let rows = &mut d[..multiply.d.len()];
        match shape.d {
            mma::Accumulator::S32 => mma::multiply_int(shape, a, b, c, rows),
            _ => mma::multiply_float(shape, a, b, c, rows),
        }
        for (slot, row) in multiply.d.iter().zip(&d) {
            registers.set_word(*slot, FULL, row);
        }
    }

    fn call(&mut self, w: usize, site: &Site, call: &Call) -> Result<Flow, Fault> {
        let active = site.active;
        match &call.target {
            Callee::Print => {
                self.print(w, site, call)?;
                return Ok(Flow::Next);
            }
            Callee::AssertFail => return Err(self.assert_failed(w, site, call)),
            Callee::Function(_) | Callee::Pointer(_) => {}
        }
        let mut parts: Vec<(u32, u32, u32)> = Vec::new();
        for lane in lanes(active) {
            let number = match call.target {
                Callee::Pointer(slot) => {
                    let pointer = self.warps[w].registers.wide(slot)[lane];
                    (pointer & FUNCTION_TAG != 0).then_some((pointer & !FUNCTION_TAG) as usize)
                }
                Callee::Function(number) => Some(number),
                _ => None,
            };
            let program = self.program;
            let target = number.and_then(|n| program.functions.get(n)?.as_ref());
            let Some(target) = target.filter(|t| t.params.len() == call.arguments.len()) else {
                let what = "a call through a pointer that is not to a function of its type";
                return Err(self.fault(site, lane, FaultKind::Undefined(what.into())));
            };
            let warp = &mut self.warps[w];
            let recursive = warp.calls[lane].contains(&site.pc);
            if recursive || warp.calls[lane].len() >= MAX_CALL_DEPTH {
                let what = "recursion is not modelled".into();
                return Err(self.fault(site, lane, FaultKind::Undefined(what)));
            }
            for (&(from, bytes), &(to, size)) in call.arguments.iter().zip(&target.params) {
                self.copy_local(w, site, lane, from, to, bytes.min(size));
            }
            let warp = &mut self.warps[w];
            warp.calls[lane].push(site.pc);
            let depth = warp.calls[lane].len() as u32;
            match parts.iter_mut().find(|(pc, _, _)| *pc == target.pc) {
                Some((_, mask, _)) => *mask |= 1 << lane,
                None => parts.push((target.pc, 1 << lane, depth)),
            }
        }
        Ok(Flow::Scatter(parts))
    }

    fn ret(&mut self, w: usize, site: &Site) -> Flow {
        let mut parts: Vec<(u32, u32, u32)> = Vec::new();
        for lane in lanes(site.active) {
            let warp = &mut self.warps[w];
            let Some(call_pc) = warp.calls[lane].pop() else {
                continue;
            };
            let depth = warp.calls[lane].len() as u32;
            let program = self.program;
            if let Op::Call(call) = &program.code[call_pc as usize].op {
                let target = match call.target {
                    Callee::Function(number) => Some(number),
                    Callee::Pointer(slot) => {
                        let pointer = warp.registers.wide(slot)[lane];
                        Some((pointer & !FUNCTION_TAG) as usize)
                    }
                    _ => None,
                };
                if let Some(target) = target.and_then(|n| program.functions.get(n)?.as_ref()) {
                    for (&(to, size), &(from, bytes)) in call.results.iter().zip(&target.returns) {
                        self.copy_local(w, site, lane, from, to, bytes.min(size));
                    }
                }
            }
            match parts.iter_mut().find(|(pc, _, _)| *pc == call_pc + 1) {
                Some((_, mask, _)) => *mask |= 1 << lane,
                None => parts.push((call_pc + 1, 1 << lane, depth)),
            }
        }
        Flow::Scatter(parts)
    }

    fn copy_local(&mut self, w: usize, site: &Site, lane: usize, from: u32, to: u32, bytes: u32) {
        let base = lane * self.program.local_bytes as usize;
        let (from, to, bytes) = (base + from as usize, base + to as usize, bytes as usize);
        self.warps[w].local.copy_within(from..from + bytes, to);
        self.observer
            .local_written(site, lane, (to - base) as u64, bytes as u32);
    }
}
