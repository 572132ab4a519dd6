//! The measurements, by the name of the figure.

use super::statistics::Spread;

/// All measurements so far.
#[derive(Debug, Default)]
pub(crate) struct Record {
    figures: Vec<Figure>,
    repetition: usize,
}

/// A figure that is measured in each repetition, once or more.
#[derive(Debug)]
pub(crate) struct Figure {
    pub(crate) name: String,
    pub(crate) unit: &'static str,
    /// The repetition, and a value or the reason for its absence.
    outcomes: Vec<(usize, Result<f64, String>)>,
}

impl Record {
    /// Assigns the measurements that follow to this repetition.
    pub(crate) fn begin(&mut self, repetition: usize) {
        self.repetition = repetition;
    }

    pub(crate) fn note(&mut self, name: &str, unit: &'static str, outcome: Result<f64, String>) {
        let outcome = (self.repetition, outcome);
        match self.figures.iter_mut().find(|figure| figure.name == name) {
            Some(figure) => figure.outcomes.push(outcome),
            None => {
                self.figures.push(Figure { name: name.to_owned(), unit, outcomes: vec![outcome] });
            }
        }
    }

    pub(crate) fn figures(&self) -> &[Figure] {
        &self.figures
    }

    /// The value of a figure in a repetition: the median of several measurements, or the reason for its
    /// absence.
    pub(crate) fn value(&self, name: &str, repetition: usize) -> Result<f64, String> {
        let figure = self.figures.iter().find(|figure| figure.name == name);
        let outcomes = figure.into_iter().flat_map(|figure| &figure.outcomes);
        let here = outcomes.filter(|(of, _)| *of == repetition).map(|(_, outcome)| outcome.clone());
        let values = here.collect::<Result<Vec<f64>, String>>()?;
        Spread::of(&values).map(|spread| spread.median).ok_or_else(|| format!("{name} was not measured"))
    }

    /// The number of repetitions begun.
    pub(crate) fn repetitions(&self) -> usize {
        self.repetition + 1
    }
}

impl Figure {
    pub(crate) fn values(&self) -> Vec<f64> {
        self.outcomes.iter().filter_map(|(_, outcome)| outcome.as_ref().ok().copied()).collect()
    }

    pub(crate) fn spread(&self) -> Option<Spread> {
        Spread::of(&self.values())
    }

    /// The reasons for missing values, each once, with its count.
    pub(crate) fn failures(&self) -> Vec<(String, usize)> {
        let mut failures: Vec<(String, usize)> = Vec::new();
        for failure in self.outcomes.iter().filter_map(|(_, outcome)| outcome.as_ref().err()) {
            match failures.iter_mut().find(|(known, _)| known == failure) {
                Some((_, times)) => *times += 1,
                None => failures.push((failure.clone(), 1)),
            }
        }
        failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_stay_with_their_repetition() {
        let mut record = Record::default();
        record.note("speed", "MB/s", Ok(1.0));
        record.begin(1);
        record.note("speed", "MB/s", Err("it broke".into()));
        record.begin(2);
        record.note("speed", "MB/s", Ok(3.0));
        record.note("speed", "MB/s", Ok(5.0));
        record.note("speed", "MB/s", Ok(4.0));
        assert_eq!(record.value("speed", 0), Ok(1.0));
        assert_eq!(record.value("speed", 1), Err("it broke".into()));
        assert_eq!(record.value("speed", 2), Ok(4.0));
        assert!(record.value("speed", 3).is_err() && record.value("size", 0).is_err());
        assert_eq!(record.figures()[0].values(), [1.0, 3.0, 5.0, 4.0]);
        assert_eq!(record.figures()[0].failures(), [("it broke".to_owned(), 1)]);
    }
}
