"""The page that shows an evaluation: tables, pictures drawn as SVG, the papers' figures, as HTML and as Markdown.
Leaves out how scores come about (`evaluation/`) and where the files of a run are.
"""
