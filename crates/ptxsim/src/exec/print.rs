//! `printf` and `assert` on the device.

use std::sync::PoisonError;

use super::block::Block;
use super::registers::{first_lane, lanes};
use crate::memory::Window;
use crate::observe::{Observer, Site};
use crate::program::Call;
use crate::report::{Fault, FaultKind};

/// The longest string that is read from memory.
const MAX_TEXT: u64 = 1 << 16;

impl<O: Observer> Block<'_, O> {
    /// The bytes of a call's argument, as a number.
    fn argument(&self, w: usize, lane: usize, call: &Call, index: usize) -> u64 {
        let Some(&(at, bytes)) = call.arguments.get(index) else {
            return 0;
        };
        self.local_number(w, lane, at.into(), bytes.min(8) as usize)
            .unwrap_or(0)
    }

    fn local_number(&self, w: usize, lane: usize, at: u64, bytes: usize) -> Option<u64> {
        let size = self.program.local_bytes as usize;
        let local = self.warps[w].local.get(lane * size..(lane + 1) * size)?;
        let bytes = local.get(at as usize..)?.get(..bytes)?;
        Some(
            bytes
                .iter()
                .rev()
                .fold(0, |value, &byte| value << 8 | u64::from(byte)),
        )
    }

    /// A zero-terminated string in device memory.
    fn text(&self, address: u64) -> String {
        let mut out = Vec::new();
        for at in address..address.saturating_add(MAX_TEXT) {
            let mut byte = [0];
            match self.launch.memory.resolve(at, 1) {
                Ok((allocation, offset)) => allocation.read_bytes(offset, &mut byte),
                Err(_) => break,
            }
            if byte[0] == 0 {
                break;
            }
            out.push(byte[0]);
        }
        String::from_utf8_lossy(&out).into_owned()
    }

    pub(super) fn assert_failed(&self, w: usize, site: &Site, call: &Call) -> Fault {
        let lane = first_lane(site.active);
        let text = |index| self.text(self.argument(w, lane, call, index));
        let kind = FaultKind::Assert {
            message: text(0),
            file: text(1),
            line: self.argument(w, lane, call, 2) as u32,
            function: text(3),
        };
        self.fault(site, lane, kind)
    }

    pub(super) fn print(&mut self, w: usize, site: &Site, call: &Call) -> Result<(), Fault> {
        let mut out = String::new();
        for lane in lanes(site.active) {
            let format = self.text(self.argument(w, lane, call, 0));
            let mut at = self.argument(w, lane, call, 1) & !Window::LOCAL;
            let next = |bytes: u64| {
                at = at.next_multiple_of(bytes);
                let value = self.local_number(w, lane, at, bytes as usize).unwrap_or(0);
                at += bytes;
                value
            };
            render(&format, next, |address| self.text(address), &mut out);
            if let Some(&(to, bytes)) = call.results.first() {
                let at = lane * self.program.local_bytes as usize + to as usize;
                self.warps[w].local[at..at + bytes as usize].fill(0);
                self.observer.local_written(site, lane, to.into(), bytes);
            }
        }
        self.launch
            .printed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_str(&out);
        Ok(())
    }
}

/// Formats as C's `printf` does; `next(n)` gives the next argument of `n` bytes.
fn render(
    format: &str,
    mut next: impl FnMut(u64) -> u64,
    text: impl Fn(u64) -> String,
    out: &mut String,
) {
    let mut rest = format;
    while let Some(percent) = rest.find('%') {
        out.push_str(&rest[..percent]);
        rest = &rest[percent + 1..];
        let end =
            rest.find(|c: char| c.is_ascii_alphabetic() && !"hlLqjzt".contains(c) || c == '%');
        let Some(end) = end else {
            out.push('%');
            break;
        };
        let (spec, conversion) = (&rest[..end], rest.as_bytes()[end] as char);
        rest = &rest[end + 1..];
        let long = spec.contains('l') || spec.contains('z') || spec.contains('j');
        let size = if long { 8 } else { 4 };
        let digits: &str = spec.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let flags_end = digits
            .find(|c: char| !"-+ #0".contains(c))
            .unwrap_or(digits.len());
        let (flags, sizes) = digits.split_at(flags_end);
        let (width, precision) = match sizes.split_once('.') {
            Some((width, precision)) => (width, Some(precision.parse().unwrap_or(0))),
            None => (sizes, None),
        };
        let width = width.parse::<usize>().unwrap_or(0).min(4096);
        let precision = precision.map(|precision: usize| precision.min(4096));
        let body = match conversion {
            '%' => "%".to_string(),
            'd' | 'i' if long => (next(size) as i64).to_string(),
            'd' | 'i' => (next(size) as i32).to_string(),
            'u' => next(size).to_string(),
            'x' => format!("{:x}", next(size)),
            'X' => format!("{:X}", next(size)),
            'o' => format!("{:o}", next(size)),
            'p' => format!("{:#x}", next(8)),
            'c' => ((next(4) as u8) as char).to_string(),
            's' => text(next(8)),
            'f' | 'F' => format!("{:.*}", precision.unwrap_or(6), f64::from_bits(next(8))),
            'e' | 'E' => exponent(f64::from_bits(next(8)), precision.unwrap_or(6)),
            'g' | 'G' => shortest(f64::from_bits(next(8)), precision.unwrap_or(6)),
            other => format!("%{spec}{other}"),
        };
        let signed =
            flags.contains('+') && !body.starts_with('-') && "dieEfFgG".contains(conversion);
        let body = if signed { format!("+{body}") } else { body };
        if flags.contains('-') {
            out.push_str(&format!("{body:<width$}"));
        } else if flags.contains('0') && !"sc".contains(conversion) {
            let (sign, magnitude) = match body.strip_prefix(['-', '+']) {
                Some(magnitude) => (&body[..1], magnitude),
                None => ("", &body[..]),
            };
            out.push_str(&format!(
                "{sign}{magnitude:0>width$}",
                width = width - width.min(sign.len())
            ));
        } else {
            out.push_str(&format!("{body:>width$}"));
        }
    }
    out.push_str(rest);
}

/// C's `%e`: at least two digits of exponent, with its sign.
fn exponent(value: f64, precision: usize) -> String {
    let text = format!("{value:.precision$e}");
    match text.split_once('e') {
        Some((mantissa, power)) => match power.strip_prefix('-') {
            Some(power) => format!("{mantissa}e-{power:0>2}"),
            None => format!("{mantissa}e+{power:0>2}"),
        },
        None => text,
    }
}

/// C's `%g`.
fn shortest(value: f64, precision: usize) -> String {
    let precision = precision.max(1);
    let power = format!("{value:.*e}", precision - 1)
        .split_once('e')
        .and_then(|(_, power)| power.parse::<i32>().ok());
    let Some(power) = power else {
        return value.to_string();
    };
    let trim = |text: String| match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_string(),
        false => text,
    };
    if power < -4 || power >= precision as i32 {
        let text = exponent(value, precision - 1);
        match text.split_once('e') {
            Some((mantissa, power)) => format!("{}e{power}", trim(mantissa.to_string())),
            None => text,
        }
    } else {
        let decimals = (precision as i32 - 1 - power).max(0) as usize;
        trim(format!("{value:.decimals$}"))
    }
}
