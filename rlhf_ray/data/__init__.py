"""Rows of data, from a file or data set to token ids: formats, templates, splits, tokenising, and the order in which prompts are
used.

In come paths or URIs and the fields of `DataConfig`; out come tokenised examples, with an account of every row that was dropped,
and what a manifest records of the files. Read `load.py` first; `formats.py` recognises rows, `templates.py` renders prompts,
`splits.py` holds prompts out by their hash, `collate.py` pads, `tinyworld/` is the bundled task. It must not know models or stages.
"""
