//! Attention, forward and backward, against a plain f64 computation.

use crate::device::{Device, numbers};
use cudarc::driver::{CudaSlice, DeviceRepr, ValidAsZeroBits};
use fuselora_kernels::attention::{Attention, Gradients, Rows, Saved, backward, forward};
use fuselora_kernels::{LaunchError, Stored};
use half::{bf16, f16};
use proptest::prelude::*;
use std::ops::Range;

pub const KERNELS: &[&str] = &[
    "attention_backward_kv_128_bf16",
    "attention_backward_kv_128_f16",
    "attention_backward_kv_128_f32",
    "attention_backward_kv_256_bf16",
    "attention_backward_kv_256_f16",
    "attention_backward_kv_256_f32",
    "attention_backward_kv_64_bf16",
    "attention_backward_kv_64_f16",
    "attention_backward_kv_64_f32",
    "attention_backward_q_128_bf16",
    "attention_backward_q_128_f16",
    "attention_backward_q_128_f32",
    "attention_backward_q_256_bf16",
    "attention_backward_q_256_f16",
    "attention_backward_q_256_f32",
    "attention_backward_q_64_bf16",
    "attention_backward_q_64_f16",
    "attention_backward_q_64_f32",
    "attention_forward_128_bf16",
    "attention_forward_128_f16",
    "attention_forward_128_f32",
    "attention_forward_256_bf16",
    "attention_forward_256_f16",
    "attention_forward_256_f32",
    "attention_forward_64_bf16",
    "attention_forward_64_f16",
    "attention_forward_64_f32",
    "attention_merge_bf16",
    "attention_merge_f16",
    "attention_merge_f32",
];

/// How far the storage types round.
trait Storage: Stored + DeviceRepr + ValidAsZeroBits + Clone + Default + PartialEq {
    /// The largest relative error of rounding to it.
    const ROUNDOFF: f64;
    /// The largest absolute error of rounding a number too small for that.
    const TINY: f64;
    fn rounded(x: f32) -> Self;
    fn value(&self) -> f64;
}

impl Storage for f32 {
    const ROUNDOFF: f64 = U;
    const TINY: f64 = 0.0;
    fn rounded(x: f32) -> f32 {
        x
    }
    fn value(&self) -> f64 {
        (*self).into()
    }
}

impl Storage for f16 {
    const ROUNDOFF: f64 = 1.0 / (1u64 << 11) as f64;
    const TINY: f64 = 1.0 / (1u64 << 25) as f64;
    fn rounded(x: f32) -> f16 {
        f16::from_f32(x)
    }
    fn value(&self) -> f64 {
        (*self).into()
    }
}

impl Storage for bf16 {
    const ROUNDOFF: f64 = 1.0 / (1u64 << 8) as f64;
    const TINY: f64 = 1e-38;
    fn rounded(x: f32) -> bf16 {
        bf16::from_f32(x)
    }
    fn value(&self) -> f64 {
        (*self).into()
    }
}

/// The unit roundoff of f32, in which everything is accumulated.
const U: f64 = 1.0 / (1u64 << 24) as f64;

/// A batch: the lengths of each sequence's queries and keys, and the heads.
#[derive(Debug, Clone)]
struct Batch {
    lengths: Vec<(usize, usize)>,
    /// Tokens of k and v that no sequence counts.
    unused: usize,
    group: usize,
    kv_heads: usize,
    head_dim: usize,
    window: Option<usize>,
    seed: u64,
}

/// Numbers, and for each how far a result may be from it.
#[derive(Debug, Default)]
struct Bounded {
    values: Vec<f64>,
    bounds: Vec<f64>,
}

impl Bounded {
    fn zeros(len: usize) -> Bounded {
        Bounded {
            values: vec![0.0; len],
            bounds: vec![0.0; len],
        }
    }

    fn add(&mut self, index: usize, value: f64, bound: f64) {
        self.values[index] += value;
        self.bounds[index] += bound;
    }

    /// Rounding to the storage type, and the rounding of a sum of `terms`, which are not larger together
    /// than `magnitudes`.
    fn round<T: Storage>(&mut self, terms: usize, magnitudes: &[f64]) {
        for ((bound, value), magnitude) in self.bounds.iter_mut().zip(&self.values).zip(magnitudes)
        {
            *bound += terms as f64 * U * magnitude;
            *bound += T::ROUNDOFF * (value.abs() + *bound) + T::TINY;
        }
    }

    fn check<T: Storage>(&self, name: &str, found: &[T]) -> Result<(), TestCaseError> {
        prop_assert_eq!(found.len(), self.values.len());
        for (i, found) in found.iter().enumerate() {
            let (found, value, bound) = (found.value(), self.values[i], self.bounds[i]);
            let error = (found - value).abs();
            prop_assert!(
                error <= bound,
                "{name}[{i}] = {found}, not {value}: off by {error}, not {bound}"
            );
        }
        Ok(())
    }
}

struct Inputs<T> {
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    d_o: Vec<T>,
}

#[derive(Debug, PartialEq)]
struct Results<T> {
    o: Vec<T>,
    lse: Vec<f32>,
    dq: Vec<T>,
    dk: Vec<T>,
    dv: Vec<T>,
}

#[derive(Debug)]
struct Expected {
    o: Bounded,
    lse: Bounded,
    dq: Bounded,
    dk: Bounded,
    dv: Bounded,
}

fn boundaries(lengths: impl Iterator<Item = usize>) -> Vec<u32> {
    let mut end = 0;
    std::iter::once(0)
        .chain(lengths.map(|length| {
            end += length as u32;
            end
        }))
        .collect()
}

impl Batch {
    fn heads(&self) -> usize {
        self.group * self.kv_heads
    }

    fn tokens(&self) -> usize {
        self.lengths.iter().map(|(queries, _)| queries).sum()
    }

    fn kv_tokens(&self) -> usize {
        self.lengths.iter().map(|(_, keys)| keys).sum::<usize>() + self.unused
    }

    fn scale(&self) -> f32 {
        1.5 / (self.head_dim as f32).sqrt()
    }

    fn inputs<T: Storage>(&self) -> Inputs<T> {
        let q_len = self.tokens() * self.heads() * self.head_dim;
        let kv_len = self.kv_tokens() * self.kv_heads * self.head_dim;
        let make = |seed: u64, len, size: f32| {
            numbers(self.seed ^ seed, len)
                .iter()
                .map(|x| T::rounded(x * size))
                .collect()
        };
        Inputs {
            q: make(1, q_len, 2.0),
            k: make(2, kv_len, 2.0),
            v: make(3, kv_len, 1.0),
            d_o: make(4, q_len, 1.0),
        }
    }

    /// The computation with all scores at hand. A bound follows the roundings that the kernels make: sums in
    /// f32, and in the storage type the inputs of each product (p and ds) and the results. It is derived,
    /// not fitted: only the small constants of the exponential (2 ulp) and of the merging of tiles are
    /// rounded up.
    fn expected<T: Storage>(&self, inputs: &Inputs<T>) -> Expected {
        let (d, heads) = (self.head_dim, self.heads());
        let values = |x: &[T]| x.iter().map(T::value).collect::<Vec<f64>>();
        let [q, k, v, d_o] = [&inputs.q, &inputs.k, &inputs.v, &inputs.d_o].map(|x| values(x));
        let scale = f64::from(self.scale());
        let mut o = Bounded::zeros(q.len());
        let mut lse = Bounded::zeros(self.tokens() * heads);
        let [mut dq, mut dk, mut dv] = [q.len(), k.len(), v.len()].map(Bounded::zeros);
        let [mut dq_size, mut dk_size, mut dv_size] =
            [q.len(), k.len(), v.len()].map(|n| vec![0.0; n]);
        let (mut first_query, mut first_key) = (0, 0);
        for &(queries, keys) in &self.lengths {
            for (query, head) in (0..queries * heads).map(|i| (i / heads, i % heads)) {
                let position = query + keys - queries;
                let first = self
                    .window
                    .map_or(0, |window| (position + 1).saturating_sub(window));
                let seen = first..position + 1;
                let row = (first_query + query) * heads + head;
                let at_row = row * d..(row + 1) * d;
                let at_key = |key: usize| -> Range<usize> {
                    let start = ((first_key + key) * self.kv_heads + head / self.group) * d;
                    start..start + d
                };
                let dot = |a: &[f64], b: &[f64]| -> (f64, f64) {
                    a.iter()
                        .zip(b)
                        .map(|(a, b)| a * b)
                        .fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()))
                };
                let roundings = (d + 8) as f64 * U;
                let scores: Vec<(f64, f64)> = seen
                    .clone()
                    .map(|key| {
                        let (sum, size) = dot(&q[at_row.clone()], &k[at_key(key)]);
                        (scale * sum, scale * size * roundings)
                    })
                    .collect();
                let largest = scores.iter().map(|s| s.0).fold(f64::MIN, f64::max);
                let sum: f64 = scores.iter().map(|s| (s.0 - largest).exp()).sum();
                let row_lse = largest + sum.ln();
                // Relative error of an exponential: the absolute one of its argument, and its own.
                let score_error =
                    scores.iter().map(|s| s.1).fold(0.0, f64::max) + 4.0 * U * largest.abs();
                let sum_error = score_error + (seen.len() + 8) as f64 * U;
                let lse_error = sum_error + 4.0 * U * (row_lse.abs() + 1.0);
                lse.add(row, row_lse, lse_error);
                let p: Vec<f64> = scores.iter().map(|s| (s.0 - row_lse).exp()).collect();

                for (key, p) in seen.clone().zip(&p) {
                    for (i, j) in at_row.clone().zip(at_key(key)) {
                        let error = p * (score_error + 2.0 * sum_error + T::ROUNDOFF) + T::TINY;
                        o.add(i, p * v[j], error * v[j].abs());
                    }
                }
                for i in at_row.clone() {
                    o.bounds[i] += T::ROUNDOFF * (o.values[i].abs() + o.bounds[i]) + T::TINY;
                }
                let (delta, size) = dot(&d_o[at_row.clone()], &o.values[at_row.clone()]);
                let delta_error = roundings * size
                    + at_row
                        .clone()
                        .map(|i| d_o[i].abs() * o.bounds[i])
                        .sum::<f64>();
                for (key, p) in seen.zip(&p) {
                    let p_error = p * (score_error + lse_error + 4.0 * U);
                    let (dp, size) = dot(&d_o[at_row.clone()], &v[at_key(key)]);
                    let ds = p * (dp - delta);
                    let ds_error = p_error * (dp - delta).abs()
                        + (p + p_error)
                            * (roundings * size + delta_error + 2.0 * U * (dp.abs() + delta.abs()));
                    let to_storage =
                        |x: f64, error: f64| error + T::ROUNDOFF * (x.abs() + error) + T::TINY;
                    let (p_error, ds_error) = (to_storage(*p, p_error), to_storage(ds, ds_error));
                    for (i, j) in at_row.clone().zip(at_key(key)) {
                        dq.add(i, scale * ds * k[j], scale * ds_error * k[j].abs());
                        dk.add(j, scale * ds * q[i], scale * ds_error * q[i].abs());
                        dv.add(j, p * d_o[i], p_error * d_o[i].abs());
                        dq_size[i] += (scale * ds * k[j]).abs();
                        dk_size[j] += (scale * ds * q[i]).abs();
                        dv_size[j] += (p * d_o[i]).abs();
                    }
                }
            }
            (first_query, first_key) = (first_query + queries, first_key + keys);
        }
        let most_keys = self.lengths.iter().map(|l| l.1).max().unwrap_or(0) + 8;
        dq.round::<T>(most_keys, &dq_size);
        dk.round::<T>(most_keys * self.group, &dk_size);
        dv.round::<T>(most_keys * self.group, &dv_size);
        Expected { o, lse, dq, dk, dv }
    }

    fn on_device<T: Storage>(
        &self,
        inputs: &Inputs<T>,
        order: u64,
    ) -> Result<Results<T>, LaunchError> {
        let device = Device::open();
        device.shuffle(order);
        let q_seqlens = device.upload(&boundaries(self.lengths.iter().map(|l| l.0)));
        let k_seqlens = device.upload(&boundaries(self.lengths.iter().map(|l| l.1)));
        let attention = Attention {
            heads: self.heads() as u32,
            kv_heads: self.kv_heads as u32,
            head_dim: self.head_dim as u32,
            scale: self.scale(),
            window: self.window.map(|window| window as u32),
            q_rows: Rows {
                cu_seqlens: device.operand(&q_seqlens),
                total: self.tokens() as u32,
                max_len: self.lengths.iter().map(|l| l.0).max().unwrap_or(0) as u32,
            },
            kv_rows: Rows {
                cu_seqlens: device.operand(&k_seqlens),
                total: (self.kv_tokens() - self.unused) as u32,
                max_len: self.lengths.iter().map(|l| l.1).max().unwrap_or(0) as u32,
            },
        };
        // There is no allocation of nothing: an empty tensor is an empty view of something.
        let [q, k, v, d_o] = [&inputs.q, &inputs.k, &inputs.v, &inputs.d_o].map(|x| match x[..] {
            [] => device.output(1),
            _ => device.upload(x),
        });
        let (q_len, kv_len) = (inputs.q.len(), inputs.k.len());
        let lse_len = self.tokens() * self.heads();
        let partial_len = attention.partial_len() as usize;
        let statistics_len = attention.statistics_len() as usize;
        let [mut o, mut dq] = [q_len; 2].map(|len| device.output::<T>(len.max(1)));
        let [mut dk, mut dv] = [kv_len; 2].map(|len| device.output::<T>(len.max(1)));
        let [mut lse, mut partial, mut statistics] =
            [lse_len, partial_len, statistics_len].map(|len| device.output::<f32>(len.max(1)));
        forward(
            &device.kernels,
            &attention,
            device.operand(&q.slice(..q_len)),
            device.operand(&k.slice(..kv_len)),
            device.operand(&v.slice(..inputs.v.len())),
            device.operand_mut(&mut o.slice_mut(..q_len)),
            device.operand_mut(&mut lse.slice_mut(..lse_len)),
            device.operand_mut(&mut partial.slice_mut(..partial_len)),
        )?;
        backward(
            &device.kernels,
            &attention,
            &Saved {
                d_o: device.operand(&d_o.slice(..q_len)),
                q: device.operand(&q.slice(..q_len)),
                k: device.operand(&k.slice(..kv_len)),
                v: device.operand(&v.slice(..inputs.v.len())),
                o: device.operand(&o.slice(..q_len)),
                lse: device.operand(&lse.slice(..lse_len)),
            },
            device.operand_mut(&mut statistics.slice_mut(..statistics_len)),
            Gradients {
                dq: device.operand_mut(&mut dq.slice_mut(..q_len)),
                dk: device.operand_mut(&mut dk.slice_mut(..kv_len)),
                dv: device.operand_mut(&mut dv.slice_mut(..kv_len)),
            },
        )?;
        let download = |buffer: &CudaSlice<T>, len| {
            let mut values = device.download(buffer);
            values.truncate(len);
            values
        };
        let mut lse = device.download(&lse);
        lse.truncate(lse_len);
        Ok(Results {
            o: download(&o, q_len),
            lse,
            dq: download(&dq, q_len),
            dk: download(&dk, kv_len),
            dv: download(&dv, kv_len),
        })
    }

    /// The results are within their bounds, and the same bits in another order of blocks and warps.
    fn check<T: Storage>(&self) -> Result<(), TestCaseError> {
        let inputs = self.inputs::<T>();
        let expected = self.expected(&inputs);
        let found = self.on_device(&inputs, self.seed)?;
        expected.o.check("o", &found.o)?;
        expected.lse.check("lse", &found.lse)?;
        expected.dq.check("dq", &found.dq)?;
        expected.dk.check("dk", &found.dk)?;
        expected.dv.check("dv", &found.dv)?;
        let again = self.on_device(&inputs, !self.seed)?;
        prop_assert!(found == again, "another order of blocks gives other bits");
        Ok(())
    }
}

fn batches() -> impl Strategy<Value = Batch> {
    let lengths =
        (0usize..70, 0usize..40).prop_map(|(queries, cached)| (queries, queries + cached));
    (
        prop::collection::vec(lengths, 0..4),
        0usize..3,
        1usize..4,
        1usize..3,
        prop::sample::select(vec![1, 5, 8, 24, 64, 72, 80, 128, 200, 256]),
        prop::option::of(1usize..80),
        any::<u64>(),
    )
        .prop_map(
            |(lengths, unused, group, kv_heads, head_dim, window, seed)| Batch {
                lengths,
                unused,
                group,
                kv_heads,
                head_dim,
                window,
                seed,
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn is_attention_in_f32(batch in batches()) {
        batch.check::<f32>()?;
    }

    #[test]
    fn is_attention_in_f16(batch in batches()) {
        batch.check::<f16>()?;
    }

    #[test]
    fn is_attention_in_bf16(batch in batches()) {
        batch.check::<bf16>()?;
    }
}

/// Few queries with a long cache: the keys of a query are shared by several blocks.
fn decoding() -> impl Strategy<Value = Batch> {
    let lengths = (0usize..=16, 500usize..1100);
    (
        prop::collection::vec(lengths, 1..3),
        1usize..5,
        prop::sample::select(vec![3, 16, 64]),
        prop::option::of(300usize..1200),
        any::<u64>(),
    )
        .prop_map(|(lengths, group, head_dim, window, seed)| Batch {
            lengths,
            unused: 0,
            group: group.min(64 / 16),
            kv_heads: 1,
            head_dim,
            window,
            seed,
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4))]

    #[test]
    fn splits_a_long_cache_in_f32(batch in decoding()) {
        batch.check::<f32>()?;
    }

    #[test]
    fn splits_a_long_cache_in_f16(batch in decoding()) {
        batch.check::<f16>()?;
    }

    #[test]
    fn splits_a_long_cache_in_bf16(batch in decoding()) {
        batch.check::<bf16>()?;
    }
}

#[test]
fn names_what_does_not_fit() {
    let batch = Batch {
        lengths: vec![(3, 5), (2, 2)],
        unused: 1,
        group: 2,
        kv_heads: 2,
        head_dim: 8,
        window: None,
        seed: 0,
    };
    let message = |batch: &Batch, change: fn(&mut Inputs<f32>)| {
        let mut inputs = batch.inputs::<f32>();
        change(&mut inputs);
        batch.on_device(&inputs, 0).unwrap_err().to_string()
    };
    assert_eq!(
        message(&batch, |inputs| inputs.v.truncate(100)),
        "v holds 100 elements where 128 were expected"
    );
    assert_eq!(
        message(&batch, |inputs| {
            inputs.k.truncate(100);
            inputs.v.truncate(100);
        }),
        "k holds 100 elements where 112 were expected"
    );
    let with = |change: fn(&mut Batch)| {
        let mut batch = batch.clone();
        change(&mut batch);
        message(&batch, |_| {})
    };
    assert_eq!(
        with(|batch| batch.window = Some(0)),
        "window is 0: it must be at least 1"
    );
    assert_eq!(
        with(|batch| batch.head_dim = 257),
        "head_dim is 257: it must be from 1 to 256"
    );
    assert_eq!(
        with(|batch| batch.lengths = vec![(3, 2)]),
        "q_rows.max_len is 3: no sequence may have fewer keys than queries"
    );
}
