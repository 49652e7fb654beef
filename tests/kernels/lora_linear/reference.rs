//! The layer in f64, forward and backward.

use super::case::{Case, Data, Dropout, Layer, SCALING, STEP};

/// `c[i][j] = Σ a[i][d]·b[d][j]`, with the strides of each factor along (i or j) and d.
fn product(
    [m, n, k]: [usize; 3],
    a: &[f64],
    (a_edge, a_depth): (usize, usize),
    b: &[f64],
    (b_edge, b_depth): (usize, usize),
) -> Vec<f64> {
    (0..m * n)
        .map(|i| {
            let (row, col) = (i / n, i % n);
            (0..k)
                .map(|d| a[row * a_edge + d * a_depth] * b[col * b_edge + d * b_depth])
                .sum()
        })
        .collect()
}

pub fn add(to: &mut [f64], values: &[f64], scaling: f64) {
    to.iter_mut()
        .zip(values)
        .for_each(|(to, value)| *to += scaling * value);
}

/// One projection in f64: the frozen part and the update apart, for they are rounded differently.
pub struct Exact {
    pub y: Vec<f64>,
    pub y_update: Vec<f64>,
    pub h: Vec<f64>,
    pub da: Vec<f64>,
    pub db: Vec<f64>,
    pub dx: Vec<f64>,
    pub dx_update: Vec<f64>,
}

/// The projection on `number` of each of its numbers: the identity, or the magnitude that bounds what
/// rounding can do.
pub fn exact(case: &Case, layer: &Layer, data: &Data, x: &[f32], number: fn(f32) -> f64) -> Exact {
    let all = |values: &[f32]| -> Vec<f64> { values.iter().map(|&x| number(x)).collect() };
    let (t, i, o, r) = (
        case.tokens,
        case.in_features,
        layer.out_features,
        layer.rank,
    );
    let scaling = f64::from(SCALING);
    let [x, w, a, b, dy] = [x, &data.w, &data.a, &data.b, &data.dy].map(all);
    let keep = kept(data.dropout, t * i);
    let dropped: Vec<f64> = x.iter().zip(&keep).map(|(x, keep)| x * keep).collect();

    let mut y = product([t, o, i], &x, (i, 1), &w, (i, 1));
    if layer.bias {
        for y in y.chunks_exact_mut(o) {
            add(y, &all(&data.bias), 1.0);
        }
    }
    let h = product([t, r, i], &dropped, (i, 1), &a, (i, 1));
    let mut y_update = vec![0.0; t * o];
    add(
        &mut y_update,
        &product([t, o, r], &h, (r, 1), &b, (r, 1)),
        scaling,
    );

    let mut dh = vec![0.0; t * r];
    add(
        &mut dh,
        &product([t, r, o], &dy, (o, 1), &b, (1, r)),
        scaling,
    );
    let (mut da, mut db) = (all(&data.da), all(&data.db));
    if !layer.frozen {
        add(
            &mut da,
            &product([r, i, t], &dh, (1, r), &dropped, (1, i)),
            1.0,
        );
        add(
            &mut db,
            &product([o, r, t], &dy, (1, o), &h, (1, r)),
            scaling,
        );
    }
    let dx = product([t, i, o], &dy, (o, 1), &w, (1, i));
    let mut dx_update = product([t, i, r], &dh, (r, 1), &a, (1, i));
    dx_update
        .iter_mut()
        .zip(&keep)
        .for_each(|(dx, keep)| *dx *= keep);
    Exact {
        y,
        y_update,
        h,
        da,
        db,
        dx,
        dx_update,
    }
}

/// What dropout multiplies each element with.
pub fn kept(dropout: Option<Dropout>, count: usize) -> Vec<f64> {
    let Some(dropout) = dropout else {
        return vec![1.0; count];
    };
    let kept_factor = 1.0 / (1.0 - f64::from(dropout.probability));
    let group = |group: usize| {
        let words = philox(
            [dropout.seed as u32, (dropout.seed >> 32) as u32],
            [group as u32, 0, dropout.stream, STEP],
        );
        words.map(|word| {
            let uniform = (word >> 8) as f32 / 16_777_216.0;
            if uniform >= dropout.probability {
                kept_factor
            } else {
                0.0
            }
        })
    };
    (0..count.div_ceil(4)).flat_map(group).take(count).collect()
}

/// Philox4x32-10.
fn philox(mut key: [u32; 2], mut c: [u32; 4]) -> [u32; 4] {
    for _ in 0..10 {
        let (p, q) = (u64::from(c[0]) * 0xD251_1F53, u64::from(c[2]) * 0xCD9E_8D57);
        c = [
            (q >> 32) as u32 ^ c[1] ^ key[0],
            q as u32,
            (p >> 32) as u32 ^ c[3] ^ key[1],
            p as u32,
        ];
        key = [
            key[0].wrapping_add(0x9E37_79B9),
            key[1].wrapping_add(0xBB67_AE85),
        ];
    }
    c
}
