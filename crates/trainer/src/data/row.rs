//! A row: tokens, and what each position is to predict.

/// One training example.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    tokens: Vec<u32>,
    targets: Vec<Option<u32>>,
    adapter: Option<String>,
}

impl Row {
    /// A row whose position `i` predicts token `i + 1` where `learned[i + 1]` is set.
    ///
    /// `learned[0]` has no effect: nothing predicts the first token.
    pub fn from_learned(tokens: Vec<u32>, learned: &[bool]) -> Row {
        let labels = tokens
            .iter()
            .zip(learned)
            .map(|(&token, &learned)| learned.then_some(token))
            .collect();
        Row::from_labels(tokens, labels)
    }

    /// A row from labels aligned with the tokens, as Hugging Face models take them: the label at `i + 1` is
    /// predicted from position `i`, and `None` (there -100) is no target.
    pub fn from_labels(tokens: Vec<u32>, mut labels: Vec<Option<u32>>) -> Row {
        debug_assert_eq!(tokens.len(), labels.len());
        labels.rotate_left(1);
        if let Some(last) = labels.last_mut() {
            *last = None;
        }
        Row {
            tokens,
            targets: labels,
            adapter: None,
        }
    }

    /// The row with the name of its adapter.
    pub fn with_adapter(self, adapter: Option<String>) -> Row {
        Row { adapter, ..self }
    }

    /// The name of the adapter that the row is for, where it says so.
    pub fn adapter(&self) -> Option<&str> {
        self.adapter.as_deref()
    }

    /// The tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// What each position is to predict; as many as there are tokens, the last one always `None`.
    pub fn targets(&self) -> &[Option<u32>] {
        &self.targets
    }

    /// How many positions have a target.
    pub fn target_count(&self) -> usize {
        self.targets.iter().flatten().count()
    }

    /// Keeps the first `length` tokens.
    pub fn truncate(&mut self, length: usize) {
        self.tokens.truncate(length);
        self.targets.truncate(length);
        if let Some(last) = self.targets.last_mut() {
            *last = None;
        }
    }

    /// The leading tokens that hold no target: what the model is given, and what it is to continue.
    pub fn prompt(&self) -> &[u32] {
        let first = self.targets.iter().position(Option::is_some);
        &self.tokens[..first.map_or(self.tokens.len(), |position| position + 1)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shift_pairs_each_position_with_the_next_label() {
        let row = Row::from_labels(vec![5, 6, 7, 8], vec![Some(5), None, Some(70), Some(8)]);
        assert_eq!(row.targets(), [None, Some(70), Some(8), None]);
        assert_eq!(row.target_count(), 2);
        assert_eq!(row.prompt(), [5, 6]);
    }

    #[test]
    fn the_first_token_is_never_a_target() {
        let row = Row::from_learned(vec![5, 6], &[true, false]);
        assert_eq!(row.targets(), [None, None]);
        assert_eq!(row.prompt(), [5, 6]);
    }

    #[test]
    fn truncation_drops_the_target_beyond_the_end() {
        let mut row = Row::from_learned(vec![1, 2, 3, 4], &[true; 4]);
        row.truncate(3);
        assert_eq!(row.tokens(), [1, 2, 3]);
        assert_eq!(row.targets(), [Some(2), Some(3), None]);
    }
}
