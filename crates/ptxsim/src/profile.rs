//! The devices that the simulator can present itself as.

/// The properties of one GPU model: what a kernel may ask of it, and the figures of its roofline.
#[derive(Debug, Clone, PartialEq)]
pub struct Profile {
    /// Marketing name, as the driver reports it.
    pub name: &'static str,
    /// Compute capability, major and minor.
    pub compute_capability: (u32, u32),
    /// Streaming multiprocessors.
    pub sm_count: u32,
    /// Device memory, bytes.
    pub memory_bytes: u64,
    /// Second-level cache, bytes.
    pub l2_bytes: u64,
    /// Shared memory that a block may use without opting in, bytes.
    pub shared_per_block: u32,
    /// Shared memory that a block may use after opting in, bytes.
    pub shared_per_block_optin: u32,
    /// Shared memory of one multiprocessor, bytes.
    pub shared_per_sm: u32,
    /// 32-bit registers of one multiprocessor.
    pub registers_per_sm: u32,
    /// Resident threads of one multiprocessor.
    pub threads_per_sm: u32,
    /// Resident blocks of one multiprocessor.
    pub blocks_per_sm: u32,
    /// Boost clock, kHz.
    pub clock_khz: u32,
    /// Memory clock, kHz.
    pub memory_clock_khz: u32,
    /// Memory bus width, bits.
    pub memory_bus_bits: u32,
    /// Device-memory bandwidth, bytes per second.
    pub bandwidth: f64,
    /// Dense bf16 tensor-core peak with f32 accumulation, FLOP per second.
    pub tensor_flops: f64,
    /// f32 peak of the ordinary cores, FLOP per second.
    pub f32_flops: f64,
}

impl Profile {
    /// NVIDIA A100 SXM, 80 GB (compute capability 8.0).
    pub fn a100() -> Profile {
        Profile {
            name: "NVIDIA A100-SXM4-80GB",
            compute_capability: (8, 0),
            sm_count: 108,
            memory_bytes: 80 << 30,
            l2_bytes: 40 << 20,
            shared_per_block: 48 << 10,
            shared_per_block_optin: 163 << 10,
            shared_per_sm: 164 << 10,
            registers_per_sm: 65536,
            threads_per_sm: 2048,
            blocks_per_sm: 32,
            clock_khz: 1_410_000,
            memory_clock_khz: 1_593_000,
            memory_bus_bits: 5120,
            bandwidth: 2.039e12,
            tensor_flops: 312e12,
            f32_flops: 19.5e12,
        }
    }

    /// NVIDIA H100 SXM, 80 GB (compute capability 9.0).
    pub fn h100() -> Profile {
        Profile {
            name: "NVIDIA H100 80GB HBM3",
            compute_capability: (9, 0),
            sm_count: 132,
            memory_bytes: 80 << 30,
            l2_bytes: 50 << 20,
            shared_per_block: 48 << 10,
            shared_per_block_optin: 227 << 10,
            shared_per_sm: 228 << 10,
            registers_per_sm: 65536,
            threads_per_sm: 2048,
            blocks_per_sm: 32,
            clock_khz: 1_980_000,
            memory_clock_khz: 2_619_000,
            memory_bus_bits: 5120,
            bandwidth: 3.352e12,
            tensor_flops: 989.4e12,
            f32_flops: 66.9e12,
        }
    }

    /// NVIDIA GeForce RTX 4090, 24 GB (compute capability 8.9).
    pub fn rtx4090() -> Profile {
        Profile {
            name: "NVIDIA GeForce RTX 4090",
            compute_capability: (8, 9),
            sm_count: 128,
            memory_bytes: 24 << 30,
            l2_bytes: 72 << 20,
            shared_per_block: 48 << 10,
            shared_per_block_optin: 99 << 10,
            shared_per_sm: 100 << 10,
            registers_per_sm: 65536,
            threads_per_sm: 1536,
            blocks_per_sm: 24,
            clock_khz: 2_520_000,
            memory_clock_khz: 10_501_000,
            memory_bus_bits: 384,
            bandwidth: 1.008e12,
            tensor_flops: 165.2e12,
            f32_flops: 82.6e12,
        }
    }

    /// The profile that a user names: `a100`, `h100` or `rtx4090`, in any case.
    pub fn named(name: &str) -> Option<Profile> {
        match name.to_ascii_lowercase().as_str() {
            "a100" => Some(Profile::a100()),
            "h100" => Some(Profile::h100()),
            "rtx4090" => Some(Profile::rtx4090()),
            _ => None,
        }
    }
}
