//! What a launch did, in numbers.

use std::fmt;

/// Totals of one launch, over all blocks. Instructions are counted per warp unless said otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Warp instructions issued, of any class.
    pub instructions: u64,
    /// Thread instructions: warp instructions times their active lanes.
    pub thread_instructions: u64,
    /// Integer, logic, comparison, move and conversion instructions.
    pub integer_instructions: u64,
    /// Floating-point instructions.
    pub float_instructions: u64,
    /// Matrix instructions (`mma`, `wgmma`).
    pub matrix_instructions: u64,
    /// Loads and stores of any space, atomics and asynchronous copies.
    pub memory_instructions: u64,
    /// Branches, calls and returns.
    pub control_instructions: u64,
    /// Branches at which lanes of a warp took different ways.
    pub divergent_branches: u64,
    /// Floating-point operations on tensor cores (a multiply-add counts as two).
    pub tensor_flops: u64,
    /// Floating-point operations elsewhere (a multiply-add counts as two), per thread.
    pub flops: u64,
    /// Global bytes that threads asked to read.
    pub global_read_bytes: u64,
    /// Global bytes that threads asked to write.
    pub global_write_bytes: u64,
    /// 32-byte sectors that the reads touch, each counted once per warp instruction.
    pub global_read_sectors: u64,
    /// 32-byte sectors that the writes touch, each counted once per warp instruction.
    pub global_write_sectors: u64,
    /// Different global bytes read, in 32-byte sectors over the whole launch: the traffic floor.
    pub unique_read_bytes: u64,
    /// Different global bytes written, in 32-byte sectors over the whole launch.
    pub unique_write_bytes: u64,
    /// Shared-memory accesses, per warp instruction.
    pub shared_accesses: u64,
    /// Passes that bank conflicts add to them.
    pub bank_conflicts: u64,
    /// Block barriers that a warp arrived at.
    pub barriers: u64,
    /// Asynchronous copies issued.
    pub async_copies: u64,
}

impl Counters {
    /// Adds the figures of one block.
    pub(super) fn add(&mut self, block: &Counters) {
        let Counters {
            instructions,
            thread_instructions,
            integer_instructions,
            float_instructions,
            matrix_instructions,
            memory_instructions,
            control_instructions,
            divergent_branches,
            tensor_flops,
            flops,
            global_read_bytes,
            global_write_bytes,
            global_read_sectors,
            global_write_sectors,
            unique_read_bytes,
            unique_write_bytes,
            shared_accesses,
            bank_conflicts,
            barriers,
            async_copies,
        } = block;
        self.instructions += instructions;
        self.thread_instructions += thread_instructions;
        self.integer_instructions += integer_instructions;
        self.float_instructions += float_instructions;
        self.matrix_instructions += matrix_instructions;
        self.memory_instructions += memory_instructions;
        self.control_instructions += control_instructions;
        self.divergent_branches += divergent_branches;
        self.tensor_flops += tensor_flops;
        self.flops += flops;
        self.global_read_bytes += global_read_bytes;
        self.global_write_bytes += global_write_bytes;
        self.global_read_sectors += global_read_sectors;
        self.global_write_sectors += global_write_sectors;
        self.unique_read_bytes += unique_read_bytes;
        self.unique_write_bytes += unique_write_bytes;
        self.shared_accesses += shared_accesses;
        self.bank_conflicts += bank_conflicts;
        self.barriers += barriers;
        self.async_copies += async_copies;
    }
}

impl fmt::Display for Counters {
    /// A table with a line for each figure.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines = [
            ("warp instructions", self.instructions),
            ("  integer", self.integer_instructions),
            ("  float", self.float_instructions),
            ("  matrix", self.matrix_instructions),
            ("  memory", self.memory_instructions),
            ("  control", self.control_instructions),
            ("thread instructions", self.thread_instructions),
            ("divergent branches", self.divergent_branches),
            ("FLOPs on tensor cores", self.tensor_flops),
            ("other FLOPs", self.flops),
            ("global bytes read", self.global_read_bytes),
            ("  moved in sectors", 32 * self.global_read_sectors),
            ("  different bytes", self.unique_read_bytes),
            ("global bytes written", self.global_write_bytes),
            ("  moved in sectors", 32 * self.global_write_sectors),
            ("  different bytes", self.unique_write_bytes),
            ("shared accesses", self.shared_accesses),
            ("  bank conflicts", self.bank_conflicts),
            ("barriers", self.barriers),
            ("asynchronous copies", self.async_copies),
        ];
        for (index, (label, value)) in lines.into_iter().enumerate() {
            let end_of_last = if index == 0 { "" } else { "\n" };
            write!(f, "{end_of_last}{label:<22}{value:>16}")?;
        }
        Ok(())
    }
}
