use std::{fmt, ops::Deref};

/// The extents of a tensor, outermost first.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Shape(Box<[usize]>);

impl Shape {
    /// The number of elements, or `None` where it overflows. A shape without dimensions holds one element.
    pub fn element_count(&self) -> Option<usize> {
        self.iter()
            .try_fold(1, |count: usize, &extent| count.checked_mul(extent))
    }
}

impl Deref for Shape {
    type Target = [usize];

    fn deref(&self) -> &[usize] {
        &self.0
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(extents: [usize; N]) -> Shape {
        Shape(Box::new(extents))
    }
}

impl From<&[usize]> for Shape {
    fn from(extents: &[usize]) -> Shape {
        Shape(extents.into())
    }
}

impl From<&Shape> for Shape {
    fn from(shape: &Shape) -> Shape {
        shape.clone()
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn displays_like_a_list() {
        assert_eq!(Shape::from([2, 3]).to_string(), "[2, 3]");
        assert_eq!(Shape::from([]).to_string(), "[]");
    }

    #[test]
    fn element_count_is_checked() {
        assert_eq!(Shape::from([2, 3]).element_count(), Some(6));
        assert_eq!(Shape::from([]).element_count(), Some(1));
        assert_eq!(Shape::from([usize::MAX, 2]).element_count(), None);
        assert_eq!(Shape::from([usize::MAX, 2, 0]).element_count(), None);
    }
}
