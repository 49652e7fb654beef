//! The shapes of Llama models.

/// The extents of a model.
#[derive(Debug, Clone, Copy)]
pub struct Model {
    pub name: &'static str,
    pub hidden: u32,
    pub intermediate: u32,
    pub layers: u32,
    pub heads: u32,
    pub kv_heads: u32,
    pub head_dim: u32,
    pub vocab: u32,
}

/// Llama 3.2 1B, 3.1 8B, 3.1 70B.
pub const MODELS: [Model; 3] = [
    Model {
        name: "1B",
        hidden: 2048,
        intermediate: 8192,
        layers: 16,
        heads: 32,
        kv_heads: 8,
        head_dim: 64,
        vocab: 128_256,
    },
    Model {
        name: "8B",
        hidden: 4096,
        intermediate: 14336,
        layers: 32,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        vocab: 128_256,
    },
    Model {
        name: "70B",
        hidden: 8192,
        intermediate: 28672,
        layers: 80,
        heads: 64,
        kv_heads: 8,
        head_dim: 128,
        vocab: 128_256,
    },
];

impl Model {
    /// Inputs and outputs of each kind of linear layer.
    pub fn projections(&self) -> [(&'static str, [u32; 2]); 4] {
        [
            ("q, o", [self.hidden, self.hidden]),
            ("k, v", [self.hidden, self.kv_heads * self.head_dim]),
            ("gate, up", [self.hidden, self.intermediate]),
            ("down", [self.intermediate, self.hidden]),
        ]
    }

    /// The outputs of the linear layers that share an input of `hidden` features.
    pub fn groups(&self) -> [(&'static str, Vec<u32>); 2] {
        let kv = self.kv_heads * self.head_dim;
        [
            ("q, k, v", vec![self.hidden, kv, kv]),
            ("gate, up", vec![self.intermediate; 2]),
        ]
    }
}
