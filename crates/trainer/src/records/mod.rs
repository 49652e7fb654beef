//! What a run leaves behind: metrics, TensorBoard events, a plot, a report, and what it shows meanwhile.

mod metrics;
mod plot;
mod progress;
mod report;
mod tensorboard;

pub use metrics::{EvalMetrics, Metrics, MetricsLog, TrainMetrics};
pub use plot::{Curve, Theme};
pub use progress::Progress;
pub use report::{Answer, Report};
pub use tensorboard::EventWriter;
