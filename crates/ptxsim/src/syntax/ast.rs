//! The syntax tree. Strings are slices of the PTX text; positions are byte offsets in it.

/// A whole PTX file.
#[derive(Debug, Default)]
pub(crate) struct Module<'a> {
    /// The architecture: `sm_80`, `sm_90a`.
    pub target: &'a str,
    /// `.file` numbers and names.
    pub files: Vec<(u32, &'a str)>,
    /// Variables of module scope.
    pub variables: Vec<Variable<'a>>,
    /// Kernels and functions, declarations without a body included.
    pub functions: Vec<Function<'a>>,
}

/// Where a variable lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum VariableSpace {
    Global,
    Const,
    Shared,
    Local,
    Param,
}

/// `.shared .align 16 .b8 tile[1024];`
#[derive(Debug, Clone)]
pub(crate) struct Variable<'a> {
    pub at: usize,
    pub space: VariableSpace,
    /// From `.align`, else the element's size.
    pub align: u32,
    /// Bytes of one element.
    pub element_bytes: u32,
    pub name: &'a str,
    /// Number of elements; `None` for `[]`.
    pub elements: Option<u64>,
    pub external: bool,
    pub initial: Vec<Initial<'a>>,
}

impl Variable<'_> {
    /// Size in bytes; 0 for `[]`.
    pub fn bytes(&self) -> u64 {
        self.elements
            .unwrap_or(0)
            .saturating_mul(u64::from(self.element_bytes))
    }
}

/// One element of an initialiser.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Initial<'a> {
    /// Bits of a number.
    Bits(u64),
    /// The address of a variable or function, plus an offset; `generic(name)` or `name`.
    Address(&'a str, i64),
}

/// `.entry` or `.func`.
#[derive(Debug)]
pub(crate) struct Function<'a> {
    pub at: usize,
    pub is_entry: bool,
    pub name: &'a str,
    pub returns: Vec<Variable<'a>>,
    pub params: Vec<Variable<'a>>,
    /// `.maxntid`.
    pub max_threads: Option<u32>,
    /// `.maxnreg`
    pub max_registers: Option<u32>,
    /// `.minnctapersm`
    pub min_blocks: Option<u32>,
    /// `.reqntid`.
    pub required_block: Option<[u32; 3]>,
    /// `.reqnctapercluster`.
    pub required_cluster: Option<[u32; 3]>,
    pub body: Option<Vec<Statement<'a>>>,
}

#[derive(Debug)]
pub(crate) enum Statement<'a> {
    Label(&'a str),
    Registers(Registers<'a>),
    Variable(Variable<'a>),
    Instruction(Instruction<'a>),
    Block(Vec<Statement<'a>>),
    /// `.loc file line column`: the source of what follows.
    Loc {
        file: u32,
        line: u32,
    },
    /// `name: .branchtargets a, b;`
    BranchTargets {
        name: &'a str,
        targets: Vec<(usize, &'a str)>,
    },
    /// `name: .callprototype (returns) _ (params);`
    CallPrototype {
        name: &'a str,
    },
}

/// `.reg .b32 %r<10>;` or `.reg .pred p, q;`
#[derive(Debug)]
pub(crate) struct Registers<'a> {
    pub at: usize,
    /// The type's name without its dot.
    pub ty: &'a str,
    /// Names, with the count when given as `name<count>`.
    pub names: Vec<(&'a str, Option<u32>)>,
}

/// `@!%p1 ld.global.v2.f32 {%f1, %f2}, [%rd1+8];`
#[derive(Debug)]
pub(crate) struct Instruction<'a> {
    pub at: usize,
    pub end: usize,
    /// The predicate's name, and whether it is negated.
    pub guard: Option<(&'a str, bool)>,
    /// The opcode: the first part.
    pub opcode: &'a str,
    /// The other parts, without dots.
    pub modifiers: Vec<&'a str>,
    pub operands: Vec<(usize, Operand<'a>)>,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Operand<'a> {
    /// A register, variable, function or label; with `.x` for `%tid.x`.
    Name(&'a str),
    /// `!%p`.
    Not(&'a str),
    /// A whole number, two's complement.
    Int(i128),
    /// The bits of `0f3F800000`.
    F32(u32),
    /// The bits of `0d3FF0000000000000` or of a decimal number.
    F64(u64),
    /// `name+8`.
    Sum(&'a str, i64),
    /// `{a, b}`.
    Vector(Vec<Operand<'a>>),
    /// `[base+offset]`, with coordinates in `[map, {x, y}]`.
    Address {
        base: Base<'a>,
        offset: i64,
        coordinates: Vec<Operand<'a>>,
    },
    /// `a|b`.
    Pair(&'a str, &'a str),
    /// `(a, b)`: the arguments of a call.
    List(Vec<&'a str>),
    /// `-%r1`, as in the negated scale of an instruction descriptor.
    Negated(Box<Operand<'a>>),
}

/// What an address is relative to.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Base<'a> {
    Name(&'a str),
    Absolute,
}
