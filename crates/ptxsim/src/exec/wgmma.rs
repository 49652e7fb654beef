//! `wgmma`: products of a warpgroup that land when they are waited for, and not before.
//!
//! Each warp computes its 16 rows. The four warps of a warpgroup meet at `wgmma.wait_group`, because
//! one of them may release the operands on behalf of all.

use super::block::Block;
use super::registers::first_lane;
use super::step::Flow;
use crate::matrix::LaneRegister;
use crate::matrix::wgmma::{Descriptor, Operand, WARPS};
use crate::observe::{Observer, Site};
use crate::program::{Op, WarpgroupA, WarpgroupMultiply};
use crate::report::{Access, AccessKind, Fault, FaultKind, Space};

/// A product that has been issued.
struct Product {
    /// Where, and so which instruction.
    site: Site,
    group: u32,
    /// Descriptors; that of A is unused where A is in registers.
    a: u64,
    b: u64,
    accumulate: bool,
}

/// The products of one warp.
#[derive(Default)]
pub(super) struct Products {
    pending: Vec<Product>,
    /// Groups that the warp has committed.
    committed: u32,
}

impl Products {
    pub fn commit(&mut self) {
        self.committed += 1;
    }

    pub fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }
}

impl<O: Observer> Block<'_, O> {
    /// `wgmma.mma_async` of a whole warp.
    pub(super) fn issue_product(
        &mut self,
        w: usize,
        site: &Site,
        multiply: &WarpgroupMultiply,
    ) -> Result<(), Fault> {
        let registers = &self.warps[w].registers;
        let lane = first_lane(site.active);
        let a = match multiply.a {
            WarpgroupA::Descriptor(slot) => registers.wide(slot)[lane],
            WarpgroupA::Registers(_) => 0,
        };
        let b = registers.wide(multiply.b)[lane];
        let accumulate = registers.predicate(multiply.scale_d) >> lane & 1 == 1;
        let shape = multiply.shape;
        let mut chunks: Vec<u32> = Vec::new();
        if let WarpgroupA::Descriptor(_) = multiply.a {
            let (rows, descriptor) = (Self::rows(w), Descriptor::decode(a));
            let of_a = shape.chunks(Operand::A, rows, descriptor, multiply.a_transposed);
            chunks.extend(of_a.map(|(address, ..)| address));
        }
        let of_b = shape.chunks(
            Operand::B,
            0..shape.n,
            Descriptor::decode(b),
            multiply.b_transposed,
        );
        chunks.extend(of_b.map(|(address, ..)| address));
        for address in chunks {
            if address as usize + 16 > self.shared.len() {
                let access = Access {
                    kind: AccessKind::Read,
                    space: Space::Shared,
                    address: address.into(),
                    bytes: 16,
                };
                let limit = Some(self.shared.len() as u64);
                let kind = FaultKind::OutOfBounds {
                    access,
                    nearest: None,
                    limit,
                };
                return Err(self.fault(site, lane, kind));
            }
            self.watch_async_read(site, lane, address, 16)?;
        }
        let products = &mut self.warps[w].products;
        let group = products.committed;
        products.pending.push(Product {
            site: *site,
            group,
            a,
            b,
            accumulate,
        });
        Ok(())
    }

    /// A warp's rows of A.
    fn rows(w: usize) -> std::ops::Range<usize> {
        let first = 16 * (w % WARPS);
        first..first + 16
    }

    /// `wgmma.wait_group`: waits for the warpgroup, then lands all but the last `pending` groups.
    pub(super) fn wait_for_products(&mut self, w: usize, pending: u32) -> Flow {
        if !self.warpgroup_is_here(w) {
            return Flow::Wait;
        }
        let committed = self.warps[w].products.committed;
        let first = w / WARPS * WARPS;
        for w in first..(first + WARPS).min(self.warps.len()) {
            let products = std::mem::take(&mut self.warps[w].products.pending);
            let (landing, waiting) = products
                .into_iter()
                .partition(|product| product.group + pending < committed);
            self.warps[w].products.pending = waiting;
            let landing: Vec<Product> = landing;
            for product in landing {
                self.land_product(w, &product);
            }
        }
        Flow::Next
    }

    /// Whether the other warps of the warpgroup have committed as many groups as warp `w`.
    pub(super) fn warpgroup_is_here(&self, w: usize) -> bool {
        let committed = self.warps[w].products.committed;
        let first = w / WARPS * WARPS;
        let group = &self.warps[first..(first + WARPS).min(self.warps.len())];
        group
            .iter()
            .all(|warp| warp.products.committed >= committed || warp.groups.is_empty())
    }

    fn land_product(&mut self, w: usize, product: &Product) {
        let Op::WarpgroupMultiply(multiply) = &self.program.code[product.site.pc as usize].op
        else {
            return;
        };
        let shape = multiply.shape;
        let registers = &self.warps[w].registers;
        // In bounds, as was checked at the issue.
        let read = |address: u32| {
            let mut chunk = [0; 16];
            chunk.copy_from_slice(&self.shared[address as usize..address as usize + 16]);
            Ok::<_, std::convert::Infallible>(chunk)
        };
        let from_shared = |operand, rows, descriptor, transposed| {
            let descriptor = Descriptor::decode(descriptor);
            let Ok(matrix) = shape.from_shared(operand, rows, descriptor, transposed, read);
            matrix
        };
        let fetch = |slots: &[_]| -> Vec<LaneRegister> {
            slots.iter().map(|&slot| *registers.word(slot)).collect()
        };
        let a = match &multiply.a {
            WarpgroupA::Registers(slots) => shape.a_from_registers(&fetch(slots)),
            WarpgroupA::Descriptor(_) => {
                from_shared(Operand::A, Self::rows(w), product.a, multiply.a_transposed)
            }
        };
        let b = from_shared(Operand::B, 0..shape.n, product.b, multiply.b_transposed);
        let mut d = fetch(&multiply.d);
        shape.multiply(&a, &b, product.accumulate, &mut d);
        for (slot, row) in multiply.d.iter().zip(&d) {
            self.warps[w]
                .registers
                .set_word(*slot, product.site.active, row);
        }
    }
}
