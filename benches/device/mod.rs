//! A CUDA device for benchmarks: buffers whose storage type is told at run time, and random numbers in them.
#![allow(dead_code, reason = "each program uses its own part")]

pub mod turns;

use anyhow::{Result, ensure};
use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, DevicePtr,
    sys::{self, CUevent_flags::CU_EVENT_DEFAULT},
};
use fuselora_kernels::{Element, Kernels, LaunchError, Operand, OperandMut};
use half::{bf16, f16};
use std::cell::Cell;
use std::sync::Arc;

/// The kernels, on a stream of the device.
pub struct Device {
    pub kernels: Kernels,
    pub stream: Arc<CudaStream>,
    seed: Cell<u64>,
}

/// Elements on the device.
pub struct Buffer {
    bytes: CudaSlice<u8>,
    address: u64,
    len: usize,
    element: Element,
}

/// One call of an operation on tensors of its own.
pub type Call = Box<dyn FnMut(&Kernels) -> Result<(), LaunchError>>;

/// Prepares a call on tensors that it makes.
pub type Make = Box<dyn Fn(&Device) -> Result<Call>>;

/// Random elements are drawn this many at a time, and repeated.
const DRAWN: usize = 1 << 20;

impl Device {
    /// The first device of the driver.
    ///
    /// # Errors
    /// When there is no driver or no device.
    pub fn open() -> Result<Device> {
        // SAFETY: it only asks the loader for the driver's library.
        let present = unsafe { sys::is_culib_present() };
        ensure!(present, "this machine has no CUDA driver");
        let context = CudaContext::new(0)?;
        // SAFETY: cudarc's events order work between streams, and there is one.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream()?;
        Ok(Device {
            kernels: Kernels::new(&stream)?,
            stream,
            seed: Cell::new(0),
        })
    }

    /// `len` random elements: numbers in [-1, 1), bytes of any value.
    pub fn random(&self, element: Element, len: u64) -> Result<Buffer> {
        let drawn = random_bytes(self.next_seed(), element, DRAWN.min(usize::try_from(len)?));
        let mut buffer = self.empty(element, len)?;
        if drawn.is_empty() {
            return Ok(buffer);
        }
        let all = usize::try_from(len * element.size_in_bytes())?;
        let mut bytes = buffer.bytes.slice_mut(..all);
        self.stream
            .memcpy_htod(&drawn, &mut bytes.slice_mut(..drawn.len()))?;
        let mut filled = drawn.len();
        while filled < all {
            let (source, mut rest) = bytes.split_at_mut(filled);
            let count = filled.min(all - filled);
            self.stream
                .memcpy_dtod(&source.slice(..count), &mut rest.slice_mut(..count))?;
            filled += count;
        }
        // The numbers drawn are dropped here, and a copy of pageable memory may still be under way.
        self.stream.synchronize()?;
        Ok(buffer)
    }

    /// `values` on the device.
    pub fn indices(&self, values: &[u32]) -> Result<Buffer> {
        let mut buffer = self.empty(Element::U32, values.len() as u64)?;
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_ne_bytes()).collect();
        self.stream.memcpy_htod(&bytes, &mut buffer.bytes)?;
        self.stream.synchronize()?;
        Ok(buffer)
    }

    /// `len` zeros.
    pub fn empty(&self, element: Element, len: u64) -> Result<Buffer> {
        // The driver makes no empty allocation.
        let size = usize::try_from(len * element.size_in_bytes())?.max(1);
        let bytes = self.stream.alloc_zeros::<u8>(size)?;
        let (address, recorded) = bytes.device_ptr(&self.stream);
        drop(recorded);
        Ok(Buffer {
            address,
            len: usize::try_from(len)?,
            element,
            bytes,
        })
    }

    /// What the device takes for the work that `submit` gives it, between two events.
    pub fn seconds(&self, submit: impl FnOnce() -> Result<()>) -> Result<f64> {
        let event = || self.stream.context().new_event(Some(CU_EVENT_DEFAULT));
        let (start, end) = (event()?, event()?);
        start.record(&self.stream)?;
        submit()?;
        end.record(&self.stream)?;
        end.synchronize()?;
        Ok(f64::from(start.elapsed_ms(&end)?) / 1e3)
    }

    fn next_seed(&self) -> u64 {
        self.seed.set(self.seed.get() + 1);
        self.seed.get()
    }
}

impl Buffer {
    /// As a launcher takes it, to read.
    pub fn operand(&self) -> Operand<'_> {
        // SAFETY: the allocation holds as many, and lives as long as the borrow; it is freed in the stream's order.
        unsafe { Operand::from_raw(self.address, self.len, self.element) }
    }

    /// `count` rows of `width` elements from row `first` on, to read.
    pub fn rows(&self, first: u32, count: u32, width: u32) -> Operand<'_> {
        let (address, len) = self.range(first, count, width);
        // SAFETY: they lie within the allocation, which lives as long as the borrow.
        unsafe { Operand::from_raw(address, len, self.element) }
    }

    /// The same, to write.
    pub fn rows_mut(&mut self, first: u32, count: u32, width: u32) -> OperandMut<'_> {
        let (address, len) = self.range(first, count, width);
        // SAFETY: as above, and the borrow is the only one.
        unsafe { OperandMut::from_raw(address, len, self.element) }
    }

    /// Where rows begin, and how many elements they have.
    fn range(&self, first: u32, count: u32, width: u32) -> (u64, usize) {
        let [begin, len] = [first, count].map(|rows| u64::from(rows) * u64::from(width));
        assert!(begin + len <= self.len as u64, "rows beyond the buffer");
        (
            self.address + begin * self.element.size_in_bytes(),
            len as usize,
        )
    }

    /// As a launcher takes it, to write.
    pub fn operand_mut(&mut self) -> OperandMut<'_> {
        // SAFETY: as above, and the borrow is the only one.
        unsafe { OperandMut::from_raw(self.address, self.len, self.element) }
    }
}

/// `count` random elements as they are stored.
fn random_bytes(seed: u64, element: Element, count: usize) -> Vec<u8> {
    let mut state = seed << 32;
    let mut next = || {
        // splitmix64
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    };
    let mut number = || (next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
    match element {
        Element::F32 => (0..count).flat_map(|_| number().to_ne_bytes()).collect(),
        Element::F16 => (0..count)
            .flat_map(|_| f16::from_f32(number()).to_ne_bytes())
            .collect(),
        Element::Bf16 => (0..count)
            .flat_map(|_| bf16::from_f32(number()).to_ne_bytes())
            .collect(),
        Element::U8 => (0..count).map(|_| next() as u8).collect(),
        Element::U32 => (0..count)
            .flat_map(|_| (next() as u32).to_ne_bytes())
            .collect(),
    }
}
