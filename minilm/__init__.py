"""The one import name. The entries of this folder are links to the top-level folders, whose own names (`data`,
`model`) are too common to import by: a `data.py` in a user's folder would hide them."""
