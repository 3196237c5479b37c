"""The page that shows an evaluation: tables, pictures drawn as SVG, the papers' figures, as HTML and as Markdown."""
