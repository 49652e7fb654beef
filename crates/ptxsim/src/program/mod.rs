//! A kernel as the engine runs it: decoded once, to a dense list of instructions.
//!
//! What an opcode with its modifiers means is looked up here, in `opcodes`. Arithmetic becomes a
//! pointer to a function over whole rows of lanes, one per combination of opcode, type and
//! modifiers; everything that touches memory, control flow or other lanes is a variant of [`Op`].

mod asynchronous;
mod decoder;
mod layout;
mod line;
mod opcodes;
mod ops;
mod pressure;
mod reach;
mod types;

use std::sync::Arc;

pub(crate) use asynchronous::*;
pub(crate) use decoder::decode;
pub(crate) use layout::{FUNCTION_TAG, Symbols, device_variables};
pub(crate) use ops::*;

use crate::exec::registers::{Constants, RegisterCounts, RowFn, Slot};
use crate::report::{Location, SourceLine};

/// One kernel parameter's place in the argument buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Param {
    /// Offset in bytes.
    pub offset: u32,
    /// Size in bytes.
    pub size: u32,
    /// Alignment in bytes.
    pub align: u32,
}

/// What kind of work an instruction is, for the counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    Integer,
    Float,
    Matrix,
    Memory,
    Control,
    Synchronization,
    /// A step of the instruction behind it: not counted.
    Step,
}

/// The predicate that an instruction runs under.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Guard {
    pub predicate: Slot,
    pub negated: bool,
}

/// One decoded instruction.
pub(crate) struct Instr {
    pub guard: Option<Guard>,
    pub op: Op,
    pub class: Class,
    /// Floating-point operations of one active lane; of the whole warp for matrix instructions.
    pub flops: u32,
}

/// Where an instruction stands in the text.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Origin {
    pub at: u32,
    pub end: u32,
    /// File number and line of the last `.loc`.
    pub source: Option<(u32, u32)>,
}

/// A kernel and the functions that it may call.
pub(crate) struct Program {
    pub name: Arc<str>,
    pub code: Vec<Instr>,
    pub origins: Vec<Origin>,
    /// The 32-bit registers that each instruction of the text names, and whether it writes them.
    named: Vec<Vec<(Slot, bool)>>,
    pub registers: RegisterCounts,
    pub constants: Arc<Constants>,
    pub params: Arc<[Param]>,
    pub params_bytes: u32,
    /// Shared memory declared with a size; dynamic shared memory starts behind it.
    pub shared_bytes: u32,
    /// Local memory of one thread: depots and the parameters of calls.
    pub local_bytes: u32,
    /// Where the functions that may be called through a pointer begin, by module-wide number.
    pub functions: Vec<Option<CallTarget>>,
    /// 32-bit registers of a thread that are live at once, or more.
    pub live_registers: u32,
    pub max_threads: Option<u32>,
    /// Registers of a thread, by `.maxnreg`.
    pub max_registers: Option<u32>,
    /// Blocks that a multiprocessor is to hold at once, by `.minnctapersm`.
    pub min_blocks: Option<u32>,
    pub required_block: Option<[u32; 3]>,
    pub required_cluster: Option<[u32; 3]>,
    pub text: Arc<ModuleText>,
}

/// The PTX text and the files it was made from, for messages.
pub(crate) struct ModuleText {
    pub source: String,
    pub files: Vec<(u32, Arc<str>)>,
}

impl Program {
    /// Whether anything reads shared memory through the asynchronous proxy.
    pub fn uses_async_proxy(&self) -> bool {
        let reads = |instr: &Instr| matches!(instr.op, Op::BulkCopy(_) | Op::WarpgroupMultiply(_));
        self.code.iter().any(reads)
    }

    pub fn uses_warpgroups(&self) -> bool {
        let multiplies = |instr: &Instr| matches!(instr.op, Op::WarpgroupMultiply(_));
        self.code.iter().any(multiplies)
    }

    /// The 32-bit registers that an instruction names, and whether it writes them.
    pub fn named(&self, pc: u32) -> &[(Slot, bool)] {
        self.named.get(pc as usize).map_or(&[], Vec::as_slice)
    }

    /// The place of instruction `pc`.
    pub fn location(&self, pc: u32) -> Location {
        let Some(origin) = self.origins.get(pc as usize) else {
            return Location {
                ptx_line: 0,
                instruction: "end of the code".into(),
                source: None,
            };
        };
        let text = &self.text.source;
        let (at, end) = (origin.at as usize, origin.end as usize);
        let source = origin.source.and_then(|(number, line)| {
            let (_, file) = self.text.files.iter().find(|(n, _)| *n == number)?;
            Some(SourceLine {
                file: file.clone(),
                line,
            })
        });
        let words: Vec<&str> = text[at..end].split_whitespace().collect();
        Location {
            ptx_line: text[..at].matches('\n').count() as u32 + 1,
            instruction: words.join(" ").into(),
            source,
        }
    }
}
