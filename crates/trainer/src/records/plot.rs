//! The loss curve as SVG and PNG.

use std::sync::OnceLock;

use anyhow::anyhow;
use plotters::{
    coord::Shift,
    prelude::*,
    style::{FontStyle, register_font},
};

use super::Metrics;

/// The size of the SVG in pixels.
const SIZE: (u32, u32) = (960, 540);
/// The PNG has this many pixels per SVG pixel, ...
const PNG_SCALE: u32 = 2;
/// ... each the mean of a square of this many drawn pixels: plotters draws thick lines without antialiasing.
const SUPERSAMPLING: u32 = 2;
/// The widest smoothing, in steps.
const WIDEST_WINDOW: f64 = 50.0;
/// The family under which the embedded font is known to plotters; in an SVG, the viewer's own.
const FONT: &str = "sans-serif";

/// The losses of a run, as plotted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curve {
    /// Stands above the plot.
    pub title: String,
    /// Step and loss of every optimizer step.
    pub train: Vec<(u64, f64)>,
    /// Step and loss of every evaluation.
    pub held_out: Vec<(u64, f64)>,
}

/// Colours of a plot.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Theme {
    background: Option<RGBColor>,
    text: RGBColor,
    axis: RGBColor,
    grid: RGBColor,
    train: RGBColor,
    held_out: RGBColor,
}

impl Theme {
    /// Dark on white.
    pub const LIGHT: Theme = Theme {
        background: Some(RGBColor(255, 255, 255)),
        text: RGBColor(38, 43, 51),
        axis: RGBColor(150, 156, 166),
        grid: RGBColor(232, 235, 240),
        train: RGBColor(37, 99, 205),
        held_out: RGBColor(217, 95, 14),
    };
    /// Bright on a dark page, whose background shows through.
    pub const DARK: Theme = Theme {
        background: None,
        text: RGBColor(214, 219, 227),
        axis: RGBColor(110, 118, 130),
        grid: RGBColor(48, 54, 64),
        train: RGBColor(96, 158, 255),
        held_out: RGBColor(255, 159, 82),
    };

    /// The theme without a background of its own.
    pub const fn transparent(self) -> Theme {
        Theme {
            background: None,
            ..self
        }
    }
}

impl Curve {
    /// The curve of a run's metrics.
    pub fn of(title: impl Into<String>, metrics: &[Metrics]) -> Curve {
        let mut curve = Curve {
            title: title.into(),
            ..Curve::default()
        };
        for line in metrics {
            match line {
                Metrics::Train(metrics) => curve.train.push((metrics.step, metrics.loss)),
                Metrics::Eval(metrics) => curve.held_out.push((metrics.step, metrics.eval_loss)),
            }
        }
        curve
    }

    /// The plot as an SVG document.
    ///
    /// # Errors
    /// Where plotters fails; it then names its reason.
    pub fn svg(&self, theme: Theme) -> anyhow::Result<String> {
        register_embedded_font()?;
        let mut svg = String::new();
        self.draw(
            SVGBackend::with_string(&mut svg, SIZE).into_drawing_area(),
            theme,
            1,
        )?;
        Ok(svg)
    }

    /// The plot as a PNG file of 1920 x 1080 pixels.
    ///
    /// # Errors
    /// As [`Curve::svg`].
    pub fn png(&self) -> anyhow::Result<Vec<u8>> {
        register_embedded_font()?;
        let scale = PNG_SCALE * SUPERSAMPLING;
        let drawn = (SIZE.0 * scale, SIZE.1 * scale);
        let mut pixels = vec![0; drawn.0 as usize * drawn.1 as usize * 3];
        self.draw(
            BitMapBackend::with_buffer(&mut pixels, drawn).into_drawing_area(),
            Theme::LIGHT,
            scale,
        )?;
        let (width, height) = (SIZE.0 * PNG_SCALE, SIZE.1 * PNG_SCALE);
        let mut file = Vec::new();
        let mut encoder = png::Encoder::new(&mut file, width, height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&downsample(&pixels, width as usize))?;
        writer.finish()?;
        Ok(file)
    }

    fn draw<DB: DrawingBackend>(
        &self,
        area: DrawingArea<DB, Shift>,
        theme: Theme,
        scale: u32,
    ) -> anyhow::Result<()> {
        let drawing = |error: DrawingAreaErrorKind<DB::ErrorType>| {
            anyhow!("the loss plot cannot be drawn: {error}")
        };
        let px = |size: u32| size * scale;
        let font = |size: u32| (FONT, px(size)).into_font().color(&theme.text);
        if let Some(background) = theme.background {
            area.fill(&background).map_err(drawing)?;
        }
        let area = area.margin(px(20), px(14), px(18), px(28));
        let title = area.titled(&self.title, font(20)).map_err(drawing)?;
        let (steps, losses) = self.ranges();
        let mut chart = ChartBuilder::on(&title)
            .margin_top(px(10))
            .x_label_area_size(px(46))
            .y_label_area_size(px(58))
            .build_cartesian_2d(steps, losses)
            .map_err(drawing)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(theme.grid.stroke_width(scale))
            .axis_style(theme.axis.stroke_width(scale))
            .label_style(font(14))
            .axis_desc_style(font(15))
            .x_desc("optimizer step")
            .y_desc("loss (nats per target token)")
            .x_label_formatter(&|step| format!("{step:.0}"))
            .y_label_formatter(&|loss| format!("{loss:.2}"))
            .x_labels(10)
            .y_labels(8)
            .set_all_tick_mark_size(px(4))
            .draw()
            .map_err(drawing)?;

        let smooth = smoothed(&self.train);
        let raw = self.train.iter().map(|&(step, loss)| (step as f64, loss));
        let faint = theme.train.mix(0.28);
        let sample =
            move |x: i32, y: i32, width: u32| (vec![(x, y), (x + px(22) as i32, y)], width);
        chart
            .draw_series(LineSeries::new(raw, faint.stroke_width(scale)))
            .map_err(drawing)?
            .label("training, each step")
            .legend(move |(x, y)| {
                let (points, width) = sample(x, y, scale);
                PathElement::new(points, theme.train.mix(0.45).stroke_width(width))
            });
        let line = theme.train.stroke_width(px(5) / 2);
        chart
            .draw_series(LineSeries::new(smooth, line))
            .map_err(drawing)?
            .label("training, smoothed")
            .legend(move |(x, y)| PathElement::new(sample(x, y, 0).0, line));
        if !self.held_out.is_empty() {
            let points: Vec<(f64, f64)> = self
                .held_out
                .iter()
                .map(|&(step, loss)| (step as f64, loss))
                .collect();
            let line = theme.held_out.stroke_width(px(3) / 2);
            chart
                .draw_series(LineSeries::new(points.iter().copied(), line))
                .map_err(drawing)?;
            let radius = px(9) / 2;
            chart
                .draw_series(
                    points
                        .iter()
                        .map(|&point| Circle::new(point, radius, theme.held_out.filled())),
                )
                .map_err(drawing)?
                .label("held out")
                .legend(move |(x, y)| {
                    EmptyElement::at((x, y))
                        + PathElement::new(vec![(0, 0), (px(22) as i32, 0)], line)
                        + Circle::new((px(11) as i32, 0), radius, theme.held_out.filled())
                });
        }
        let plate = theme
            .background
            .map_or(TRANSPARENT, |background| background.mix(0.85));
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(plate)
            .border_style(TRANSPARENT)
            .legend_area_size(px(30))
            .margin(px(8))
            .label_font(font(14))
            .draw()
            .map_err(drawing)?;
        area.present().map_err(drawing)
    }

    /// The axes' ranges: all points, with a little air above and below.
    fn ranges(&self) -> (std::ops::Range<f64>, std::ops::Range<f64>) {
        let points = || self.train.iter().chain(&self.held_out);
        let last = points().map(|&(step, _)| step).max().unwrap_or(0).max(1) as f64;
        let finite = || {
            points()
                .map(|&(_, loss)| loss)
                .filter(|loss| loss.is_finite())
        };
        let low = finite().reduce(f64::min).unwrap_or(0.0);
        let high = finite().reduce(f64::max).unwrap_or(1.0);
        let air = ((high - low) * 0.06).max(0.01);
        (0.0..last, (low - air).max(0.0)..high + air)
    }
}

/// The losses under a Gaussian window: centred, so that the line does not lag behind a falling loss. Its
/// standard deviation is a fiftieth of the run, and at most [`WIDEST_WINDOW`] steps.
fn smoothed(points: &[(u64, f64)]) -> Vec<(f64, f64)> {
    let deviation = (points.len() as f64 / 50.0).clamp(0.5, WIDEST_WINDOW);
    let reach = (3.0 * deviation).ceil() as usize;
    let weights: Vec<f64> = (0..=reach)
        .map(|distance| (-0.5 * (distance as f64 / deviation).powi(2)).exp())
        .collect();
    (0..points.len())
        .map(|at| {
            let first = at.saturating_sub(reach);
            let window = &points[first..points.len().min(at + reach + 1)];
            let (mut sum, mut weight) = (0.0, 0.0);
            for (offset, &(_, loss)) in window.iter().enumerate() {
                let share = weights[at.abs_diff(first + offset)];
                sum += share * loss;
                weight += share;
            }
            (points[at].0 as f64, sum / weight)
        })
        .collect()
}

/// The mean of each square of [`SUPERSAMPLING`] pixels, for an RGB image of `width` pixels to come.
fn downsample(pixels: &[u8], width: usize) -> Vec<u8> {
    let factor = SUPERSAMPLING as usize;
    let drawn_row = width * factor * 3;
    let mut out = Vec::with_capacity(pixels.len() / (factor * factor));
    for rows in pixels.chunks_exact(drawn_row * factor) {
        for x in 0..width {
            for channel in 0..3 {
                let square = (0..factor * factor).map(|i| {
                    usize::from(
                        rows[i / factor * drawn_row + (x * factor + i % factor) * 3 + channel],
                    )
                });
                out.push((square.sum::<usize>() / (factor * factor)) as u8);
            }
        }
    }
    out
}

fn register_embedded_font() -> anyhow::Result<()> {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    let valid = REGISTERED.get_or_init(|| {
        register_font(
            FONT,
            FontStyle::Normal,
            include_bytes!("../../assets/Roboto-Regular.ttf"),
        )
        .is_ok()
    });
    if *valid {
        Ok(())
    } else {
        Err(anyhow!("the embedded font is unreadable"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve() -> Curve {
        let train = (1..=200)
            .map(|step| (step, 2.0 * (-(step as f64) / 60.0).exp() + 0.8))
            .collect();
        Curve {
            title: "Loss & <more>".into(),
            train,
            held_out: vec![(0, 2.9), (100, 1.4), (200, 1.0)],
        }
    }

    #[test]
    fn the_svg_shows_title_axes_and_every_evaluation() {
        let svg = curve().svg(Theme::LIGHT).unwrap();
        for text in [
            "Loss &amp; &lt;more&gt;",
            "optimizer step",
            "loss (nats per target token)",
            "held out",
        ] {
            assert!(svg.contains(text), "{text} is missing");
        }
        // Three evaluations, and the sample in the legend.
        assert_eq!(svg.matches("<circle").count(), 4);
    }

    #[test]
    fn the_png_has_its_size_and_is_not_blank() {
        let file = curve().png().unwrap();
        let mut reader = png::Decoder::new(std::io::Cursor::new(file))
            .read_info()
            .unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut pixels).unwrap();
        assert_eq!((info.width, info.height), (1920, 1080));
        let blue = pixels
            .chunks_exact(3)
            .filter(|pixel| pixel[2] > 180 && pixel[0] < 60)
            .count();
        assert!(blue > 2000, "{blue} pixels of the training curve");
    }

    #[test]
    fn runs_without_points_or_with_nan_still_plot() {
        Curve::default().svg(Theme::DARK).unwrap();
        let curve = Curve {
            train: vec![(1, f64::NAN), (2, 1.0)],
            ..Curve::default()
        };
        curve.svg(Theme::LIGHT).unwrap();
    }

    #[test]
    fn smoothing_keeps_a_line_and_levels_noise() {
        let line: Vec<(u64, f64)> = (0..200)
            .map(|step| (step, 3.0 - 0.01 * step as f64))
            .collect();
        for (step, loss) in &smoothed(&line)[15..185] {
            assert!((loss - (3.0 - 0.01 * step)).abs() < 1e-9);
        }
        let noisy: Vec<(u64, f64)> = (0..200)
            .map(|step| (step, if step % 2 == 0 { 2.0 } else { 4.0 }))
            .collect();
        assert!(
            smoothed(&noisy)[15..185]
                .iter()
                .all(|(_, loss)| (loss - 3.0).abs() < 0.01)
        );
    }

    #[test]
    fn downsampling_takes_the_mean() {
        let row = [[0u8, 0, 0], [100, 40, 8]].concat();
        assert_eq!(downsample(&[row.clone(), row].concat(), 1), [50, 20, 4]);
    }
}
