//! The report of a run: one HTML file that needs nothing beside it.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use super::{Curve, Theme};

/// What the model answered to one prompt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// What it was given.
    pub prompt: String,
    /// What the data wants; may be empty.
    pub reference: String,
    /// The answer before training.
    pub before: String,
    /// The answer after training.
    pub after: String,
}

/// Everything that the report shows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// What was trained on what.
    pub title: String,
    /// Name and value of the figures at the top: steps, tokens/s, memory.
    pub figures: Vec<(String, String)>,
    /// The losses.
    pub curve: Curve,
    /// Held-out loss before training, where there are held-out rows.
    pub eval_loss_before: Option<f64>,
    /// Held-out loss after training.
    pub eval_loss_after: Option<f64>,
    /// Answers to held-out prompts.
    pub answers: Vec<Answer>,
    /// Name and value of every setting.
    pub settings: Vec<(String, String)>,
}

impl Report {
    /// The report as an HTML document.
    ///
    /// # Errors
    /// Where the curve cannot be drawn.
    pub fn html(&self) -> anyhow::Result<String> {
        let title = escape(&self.title);
        let light = self.curve.svg(Theme::LIGHT.transparent())?;
        let dark = self.curve.svg(Theme::DARK)?;
        let mut page = format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        );
        page += &self.tiles();
        let _ = write!(
            page,
            "<figure class=\"light\">{light}</figure>\n<figure class=\"dark\">{dark}</figure>\n"
        );
        page += &self.answer_table();
        page += "<h2>Settings</h2>\n<p>The same are in <code>run.toml</code>, which repeats the run with \
                 <code>fuselora train --config run.toml</code>.</p>\n<table class=\"settings\">\n";
        for (name, value) in &self.settings {
            let _ = writeln!(
                page,
                "<tr><th>{}</th><td>{}</td></tr>",
                escape(name),
                escape(value)
            );
        }
        page += "</table>\n</body>\n</html>\n";
        Ok(page)
    }

    fn tiles(&self) -> String {
        let mut tiles = self.figures.clone();
        if let (Some(before), Some(after)) = (self.eval_loss_before, self.eval_loss_after) {
            tiles.insert(
                0,
                (
                    "held-out loss".to_string(),
                    format!("{before:.3} → {after:.3}"),
                ),
            );
            tiles.insert(
                1,
                (
                    "held-out perplexity".to_string(),
                    format!("{:.2} → {:.2}", before.exp(), after.exp()),
                ),
            );
        }
        let mut out = "<dl class=\"tiles\">\n".to_string();
        for (name, value) in tiles {
            let _ = writeln!(
                out,
                "<div><dt>{}</dt><dd>{}</dd></div>",
                escape(&name),
                escape(&value)
            );
        }
        out + "</dl>\n"
    }

    fn answer_table(&self) -> String {
        if self.answers.is_empty() {
            return String::new();
        }
        let mut out = "<h2>Answers to held-out prompts</h2>\n<table class=\"answers\">\n\
                       <tr><th>prompt</th><th>before</th><th>after</th><th>wanted</th></tr>\n"
            .to_string();
        for answer in &self.answers {
            out += "<tr>";
            for text in [
                &answer.prompt,
                &answer.before,
                &answer.after,
                &answer.reference,
            ] {
                let _ = write!(out, "<td><div>{}</div></td>", escape(text));
            }
            out += "</tr>\n";
        }
        out + "</table>\n"
    }
}

const STYLE: &str = "\
:root { color-scheme: light dark; --text: #262b33; --quiet: #667080; --line: #e2e6ec; --page: #ffffff; --tile: #f5f7fa; }
body { max-width: 62rem; margin: 2.5rem auto; padding: 0 1.25rem; font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); }
h1 { font-size: 1.6rem; margin: 0 0 1.25rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { color: var(--quiet); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .75rem; margin: 0; }
.tiles div { background: var(--tile); border-radius: .5rem; padding: .7rem .9rem; }
.tiles dt { color: var(--quiet); font-size: .85rem; }
.tiles dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
figure { margin: 1.5rem 0 0; }
figure svg { width: 100%; height: auto; }
.dark { display: none; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: .45rem .7rem .45rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--quiet); }
.answers { table-layout: fixed; }
.answers div { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24rem; overflow-y: auto; }
.settings th { width: 16rem; font-weight: 400; }
.settings td { font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) {
  :root { --text: #d6dbe3; --quiet: #98a2b3; --line: #303640; --page: #14171c; --tile: #1d2128; }
  .light { display: none; }
  .dark { display: block; }
}
";

/// The text with the characters that HTML gives a meaning written as entities.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            other => out.push(other),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_shown_and_escaped() {
        let hostile = "<script>alert('x & y')</script>";
        let field = |name: &str| {
            (
                format!("{name}{hostile}"),
                format!("value of {name}{hostile}"),
            )
        };
        let report = Report {
            title: format!("title{hostile}"),
            figures: vec![field("figure")],
            curve: Curve {
                title: hostile.into(),
                train: vec![(1, 2.0), (2, 1.0)],
                held_out: vec![],
            },
            eval_loss_before: Some(2.0),
            eval_loss_after: Some(1.0),
            answers: vec![Answer {
                prompt: format!("prompt{hostile}"),
                reference: format!("reference{hostile}"),
                before: format!("before{hostile}"),
                after: format!("after{hostile}"),
            }],
            settings: vec![field("setting")],
        };
        let page = report.html().unwrap();
        assert!(!page.contains("<script"));
        let escaped = "&lt;script&gt;alert(&#39;x &amp; y&#39;)&lt;/script&gt;";
        for part in [
            "title",
            "figure",
            "value of figure",
            "prompt",
            "reference",
            "before",
            "after",
            "setting",
        ] {
            assert!(page.contains(&format!("{part}{escaped}")), "{part}");
        }
        assert!(page.contains("2.000 → 1.000") && page.contains("7.39 → 2.72"));
        assert!(
            !page.contains("src=") && !page.contains("href="),
            "nothing is fetched"
        );
    }

    #[test]
    fn what_there_is_not_is_left_out() {
        let page = Report::default().html().unwrap();
        assert!(!page.contains("held-out"));
    }
}
