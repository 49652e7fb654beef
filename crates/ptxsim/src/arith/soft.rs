//! Exact binary numbers and their rounding: the soft-float behind every operation that the host
//! does not do natively.
//!
//! A value is kept as an integer significand of up to 128 bits times a power of two, so products
//! and aligned sums lose nothing; where bits must be dropped they are *jammed* into the lowest bit
//! (set if anything below was set), which a later rounding to 53 bits or fewer cannot tell from
//! the exact value.

/// How a result that does not fit is rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// `.rn`, `.rni`: to nearest, ties to even.
    NearestEven,
    /// `.rna`: to nearest, ties away from zero.
    NearestAway,
    /// `.rz`, `.rzi`: towards zero.
    Zero,
    /// `.rm`, `.rmi`: towards minus infinity.
    Down,
    /// `.rp`, `.rpi`: towards plus infinity.
    Up,
}

/// A binary floating-point format: one sign bit, `exponent_bits`, `fraction_bits`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Width of the biased exponent.
    pub exponent_bits: u32,
    /// Width of the fraction, without the implicit bit.
    pub fraction_bits: u32,
    /// Whether the largest exponent encodes infinities (all but `e4m3`).
    pub has_infinity: bool,
    /// The bit pattern of the NaN that operations return.
    pub nan: u64,
}

impl Format {
    /// `.f16`
    pub const F16: Format = Format::ieee(5, 10, 0x7fff);
    /// `.bf16`
    pub const BF16: Format = Format::ieee(8, 7, 0x7fff);
    /// `.f32`
    pub const F32: Format = Format::ieee(8, 23, 0x7fff_ffff);
    /// `.f64`
    pub const F64: Format = Format::ieee(11, 52, 0xfff8_0000_0000_0000);
    /// `.tf32` as a 19-bit number; a register holds it 13 bits further left.
    pub const TF32: Format = Format::ieee(8, 10, 0x3ffff);
    /// `.e5m2`
    pub const E5M2: Format = Format::ieee(5, 2, 0x7f);
    /// `.e4m3`: no infinity, one NaN per sign, largest finite value 448.
    pub const E4M3: Format = Format {
        exponent_bits: 4,
        fraction_bits: 3,
        has_infinity: false,
        nan: 0x7f,
    };

    const fn ieee(exponent_bits: u32, fraction_bits: u32, nan: u64) -> Format {
        Format {
            exponent_bits,
            fraction_bits,
            has_infinity: true,
            nan,
        }
    }

    const fn bias(&self) -> i32 {
        (1 << (self.exponent_bits - 1)) - 1
    }

    /// Exponent of the least significant bit of a subnormal.
    const fn lowest_exponent(&self) -> i32 {
        1 - self.bias() - self.fraction_bits as i32
    }

    /// The sign bit.
    pub const fn sign_bit(&self) -> u64 {
        1 << (self.exponent_bits + self.fraction_bits)
    }

    /// Bits of the largest finite magnitude.
    pub const fn max_finite(&self) -> u64 {
        if self.has_infinity {
            self.infinity() - 1
        } else {
            self.sign_bit() - 2
        }
    }

    /// Bits of plus infinity (of the lowest NaN, where there is no infinity).
    pub const fn infinity(&self) -> u64 {
        ((1 << self.exponent_bits) - 1) << self.fraction_bits
    }

    /// The number that `bits` encode.
    pub fn unpack(&self, bits: u64) -> Number {
        let negative = bits & self.sign_bit() != 0;
        let magnitude = bits & (self.sign_bit() - 1);
        if magnitude > self.max_finite() {
            let infinite = self.has_infinity && magnitude == self.infinity();
            return if infinite {
                Number::Infinity { negative }
            } else {
                Number::Nan
            };
        }
        let fraction = magnitude & ((1 << self.fraction_bits) - 1);
        let biased = (magnitude >> self.fraction_bits) as i32;
        let (significand, exponent) = match biased {
            0 => (fraction, self.lowest_exponent()),
            _ => (
                fraction | 1 << self.fraction_bits,
                self.lowest_exponent() + biased - 1,
            ),
        };
        Number::Finite(Exact {
            negative,
            significand: significand.into(),
            exponent,
        })
    }

    /// `number` rounded to this format: overflow goes to infinity or to the largest finite value
    /// as the rounding direction says, and to NaN where there is no infinity.
    pub fn pack(&self, number: Number, rounding: Rounding) -> u64 {
        let sign = |negative: bool| if negative { self.sign_bit() } else { 0 };
        let exact = match number {
            Number::Nan => return self.nan,
            Number::Infinity { negative } if self.has_infinity => {
                return sign(negative) | self.infinity();
            }
            Number::Infinity { negative } => return sign(negative) | self.nan,
            Number::Finite(exact) => exact,
        };
        let negative = exact.negative;
        if exact.significand == 0 {
            return sign(negative);
        }
        // The exponent of the result's last bit: `fraction_bits` below the leading bit, but never
        // below the last bit of a subnormal.
        let leading = exact.exponent + 127 - exact.significand.leading_zeros() as i32;
        let last = (leading - self.fraction_bits as i32).max(self.lowest_exponent());
        let significand = exact.rounded_at(last, rounding) as u64;
        // An implicit bit that is there (or that a carry produced) adds one to the exponent field.
        let magnitude =
            (((last - self.lowest_exponent()) as u64) << self.fraction_bits) + significand;
        if magnitude <= self.max_finite() {
            return sign(negative) | magnitude;
        }
        let stays_finite = match rounding {
            Rounding::NearestEven | Rounding::NearestAway => false,
            Rounding::Zero => true,
            Rounding::Down => !negative,
            Rounding::Up => negative,
        };
        match (stays_finite, self.has_infinity) {
            (true, _) => sign(negative) | self.max_finite(),
            (false, true) => sign(negative) | self.infinity(),
            (false, false) => sign(negative) | self.nan,
        }
    }
}

/// A number without the limits of a format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Number {
    /// Not a number.
    Nan,
    /// An infinity.
    Infinity {
        /// Its sign.
        negative: bool,
    },
    /// A finite value, zeros included.
    Finite(Exact),
}

/// `±significand · 2^exponent`; a zero keeps its sign.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exact {
    /// The sign.
    pub negative: bool,
    /// The integer significand.
    pub significand: u128,
    /// The power of two that scales it.
    pub exponent: i32,
}

impl Exact {
    /// An integer.
    pub fn from_integer(value: i128) -> Exact {
        Exact {
            negative: value < 0,
            significand: value.unsigned_abs(),
            exponent: 0,
        }
    }

    /// The magnitude as a multiple of `2^exponent`, rounded; the caller chooses an exponent for
    /// which the result fits.
    pub fn rounded_at(self, exponent: i32, rounding: Rounding) -> u128 {
        let drop = exponent - self.exponent;
        if drop <= 0 {
            return self.significand << -drop;
        }
        // Beyond 127 dropped bits only "is there anything" matters, and 127 keeps that below half.
        let (significand, drop) = match drop {
            1..=127 => (self.significand, drop as u32),
            _ => ((self.significand != 0).into(), 127),
        };
        let kept = significand >> drop;
        let dropped = significand & ((1 << drop) - 1);
        let half = 1 << (drop - 1);
        let up = match rounding {
            Rounding::NearestEven => dropped > half || (dropped == half && kept & 1 == 1),
            Rounding::NearestAway => dropped >= half,
            Rounding::Zero => false,
            Rounding::Down => self.negative && dropped != 0,
            Rounding::Up => !self.negative && dropped != 0,
        };
        kept + u128::from(up)
    }

    /// The same value with its leading bit at bit 125, which leaves room for the carry of a sum.
    fn normalized(self) -> Exact {
        let up = self.significand.leading_zeros() as i32 - 2;
        if up >= 0 {
            Exact {
                significand: self.significand << up,
                exponent: self.exponent - up,
                ..self
            }
        } else {
            self.jammed(-up as u32)
        }
    }

    /// Shifted right by `drop` bits, whatever falls off jammed into the lowest bit.
    fn jammed(self, drop: u32) -> Exact {
        let significand = match drop {
            0..=127 => {
                let lost = self.significand & ((1 << drop) - 1) != 0;
                (self.significand >> drop) | u128::from(lost)
            }
            _ => (self.significand != 0).into(),
        };
        Exact {
            significand,
            exponent: self.exponent + drop as i32,
            ..self
        }
    }
}

impl Number {
    /// An exact zero.
    pub const fn zero(negative: bool) -> Number {
        Number::Finite(Exact {
            negative,
            significand: 0,
            exponent: 0,
        })
    }

    /// With the sign flipped.
    pub fn negated(self) -> Number {
        match self {
            Number::Nan => Number::Nan,
            Number::Infinity { negative } => Number::Infinity {
                negative: !negative,
            },
            Number::Finite(x) => Number::Finite(Exact {
                negative: !x.negative,
                ..x
            }),
        }
    }

    /// `self + other`, ready to be rounded to 53 bits or fewer. `rounding` decides only the sign
    /// of an exact zero from operands of opposite sign.
    pub fn plus(self, other: Number, rounding: Rounding) -> Number {
        let (a, b) = match (self, other) {
            (Number::Nan, _) | (_, Number::Nan) => return Number::Nan,
            (Number::Infinity { negative: a }, Number::Infinity { negative: b }) if a != b => {
                return Number::Nan;
            }
            (infinity @ Number::Infinity { .. }, _) | (_, infinity @ Number::Infinity { .. }) => {
                return infinity;
            }
            (Number::Finite(a), Number::Finite(b)) => (a, b),
        };
        let zero_sign = if a.negative == b.negative {
            a.negative
        } else {
            rounding == Rounding::Down
        };
        match (a.significand, b.significand) {
            (0, 0) => return Number::zero(zero_sign),
            (0, _) => return Number::Finite(b),
            (_, 0) => return Number::Finite(a),
            _ => {}
        }
        let (a, b) = (a.normalized(), b.normalized());
        let (large, small) = if a.exponent >= b.exponent {
            (a, b)
        } else {
            (b, a)
        };
        let small = small.jammed((large.exponent - small.exponent) as u32);
        if large.negative == small.negative {
            let significand = large.significand + small.significand;
            return Number::Finite(Exact {
                significand,
                ..large
            });
        }
        let (negative, significand) = match large.significand.cmp(&small.significand) {
            std::cmp::Ordering::Equal => return Number::zero(zero_sign),
            std::cmp::Ordering::Greater => (large.negative, large.significand - small.significand),
            std::cmp::Ordering::Less => (small.negative, small.significand - large.significand),
        };
        Number::Finite(Exact {
            negative,
            significand,
            exponent: large.exponent,
        })
    }

    /// `self * other`, exact for significands of up to 64 bits each.
    pub fn times(self, other: Number) -> Number {
        let negative = self.is_negative() != other.is_negative();
        match (self, other) {
            (Number::Nan, _) | (_, Number::Nan) => Number::Nan,
            (Number::Finite(a), Number::Finite(b)) => Number::Finite(Exact {
                negative,
                significand: a.significand * b.significand,
                exponent: a.exponent + b.exponent,
            }),
            (Number::Finite(zero), _) | (_, Number::Finite(zero)) if zero.significand == 0 => {
                Number::Nan
            }
            _ => Number::Infinity { negative },
        }
    }

    /// `self / other`, ready to be rounded to 53 bits or fewer.
    pub fn divided_by(self, other: Number) -> Number {
        let negative = self.is_negative() != other.is_negative();
        match (self, other) {
            (Number::Nan, _) | (_, Number::Nan) => Number::Nan,
            (Number::Infinity { .. }, Number::Infinity { .. }) => Number::Nan,
            (Number::Infinity { .. }, _) => Number::Infinity { negative },
            (_, Number::Infinity { .. }) => Number::zero(negative),
            (Number::Finite(a), Number::Finite(b)) => match (a.significand, b.significand) {
                (0, 0) => Number::Nan,
                (0, _) => Number::zero(negative),
                (_, 0) => Number::Infinity { negative },
                // A 126-bit dividend over a divisor of at most 64 bits: 62 quotient bits or more.
                (_, divisor) => {
                    let a = a.normalized();
                    let inexact = !a.significand.is_multiple_of(divisor);
                    Number::Finite(Exact {
                        negative,
                        significand: (a.significand / divisor) | u128::from(inexact),
                        exponent: a.exponent - b.exponent,
                    })
                }
            },
        }
    }

    /// The square root, ready to be rounded to 53 bits or fewer.
    pub fn sqrt(self) -> Number {
        match self {
            Number::Finite(x) if x.significand == 0 => self,
            Number::Finite(x) if !x.negative => {
                let x = x.normalized();
                // The root of an even power of two is a power of two.
                let x = if x.exponent % 2 == 0 {
                    x
                } else {
                    Exact {
                        significand: x.significand << 1,
                        exponent: x.exponent - 1,
                        ..x
                    }
                };
                let root = x.significand.isqrt();
                let inexact = root * root != x.significand;
                Number::Finite(Exact {
                    negative: false,
                    // One more bit, so that the jammed one is below the root's own.
                    significand: (root << 1) | u128::from(inexact),
                    exponent: x.exponent / 2 - 1,
                })
            }
            Number::Infinity { negative: false } => self,
            _ => Number::Nan,
        }
    }

    /// The sign; NaN has none.
    pub fn is_negative(self) -> bool {
        match self {
            Number::Nan => false,
            Number::Infinity { negative } | Number::Finite(Exact { negative, .. }) => negative,
        }
    }

    /// Rounded to an integral value (`cvt.rni.f32.f32` and its kin); zeros keep the sign.
    pub fn to_integral(self, rounding: Rounding) -> Number {
        match self {
            Number::Finite(x) if x.exponent < 0 => Number::Finite(Exact {
                significand: x.rounded_at(0, rounding),
                exponent: 0,
                ..x
            }),
            other => other,
        }
    }
}
