//! The types that instructions name.

/// A type suffix such as `.u32`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Type {
    B1,
    B8,
    U8,
    S8,
    U4,
    S4,
    B16,
    U16,
    S16,
    F16,
    Bf16,
    B32,
    U32,
    S32,
    F32,
    Tf32,
    F16x2,
    Bf16x2,
    U16x2,
    S16x2,
    B64,
    U64,
    S64,
    F64,
    B128,
    E4m3,
    E5m2,
    E4m3x2,
    E5m2x2,
    Pred,
}

const NAMES: [(&str, Type); 30] = [
    ("b1", Type::B1),
    ("b8", Type::B8),
    ("u8", Type::U8),
    ("s8", Type::S8),
    ("u4", Type::U4),
    ("s4", Type::S4),
    ("b16", Type::B16),
    ("u16", Type::U16),
    ("s16", Type::S16),
    ("f16", Type::F16),
    ("bf16", Type::Bf16),
    ("b32", Type::B32),
    ("u32", Type::U32),
    ("s32", Type::S32),
    ("f32", Type::F32),
    ("tf32", Type::Tf32),
    ("f16x2", Type::F16x2),
    ("bf16x2", Type::Bf16x2),
    ("u16x2", Type::U16x2),
    ("s16x2", Type::S16x2),
    ("b64", Type::B64),
    ("u64", Type::U64),
    ("s64", Type::S64),
    ("f64", Type::F64),
    ("b128", Type::B128),
    ("e4m3", Type::E4m3),
    ("e5m2", Type::E5m2),
    ("e4m3x2", Type::E4m3x2),
    ("e5m2x2", Type::E5m2x2),
    ("pred", Type::Pred),
];

impl Type {
    pub fn parse(name: &str) -> Option<Type> {
        NAMES
            .iter()
            .find(|(text, _)| *text == name)
            .map(|(_, ty)| *ty)
    }

    pub fn name(self) -> &'static str {
        NAMES
            .iter()
            .find(|(_, ty)| *ty == self)
            .map_or("", |(name, _)| name)
    }

    /// Bits of a register that holds it.
    pub fn bits(self) -> u32 {
        match self {
            Type::B1 | Type::Pred => 1,
            Type::U4 | Type::S4 => 4,
            Type::B8 | Type::U8 | Type::S8 | Type::E4m3 | Type::E5m2 => 8,
            Type::B16 | Type::U16 | Type::S16 | Type::F16 | Type::Bf16 => 16,
            Type::E4m3x2 | Type::E5m2x2 => 16,
            Type::B32 | Type::U32 | Type::S32 | Type::F32 | Type::Tf32 => 32,
            Type::F16x2 | Type::Bf16x2 | Type::U16x2 | Type::S16x2 => 32,
            Type::B64 | Type::U64 | Type::S64 | Type::F64 => 64,
            Type::B128 => 128,
        }
    }

    pub fn is_signed(self) -> bool {
        matches!(
            self,
            Type::S4 | Type::S8 | Type::S16 | Type::S32 | Type::S64 | Type::S16x2
        )
    }

    /// Whether arithmetic on it is floating point.
    pub fn is_float(self) -> bool {
        use Type::{Bf16, Bf16x2, F16, F16x2, F32, F64};
        matches!(self, F16 | Bf16 | F16x2 | Bf16x2 | F32 | F64)
    }

    /// Whether it is one whole number.
    pub fn is_integer(self) -> bool {
        use Type::{S8, S16, S32, S64, U8, U16, U32, U64};
        matches!(self, U8 | S8 | U16 | S16 | U32 | S32 | U64 | S64)
    }

    /// Elements packed in one register.
    pub fn packed(self) -> u32 {
        match self {
            Type::F16x2 | Type::Bf16x2 | Type::U16x2 | Type::S16x2 => 2,
            _ => 1,
        }
    }
}
