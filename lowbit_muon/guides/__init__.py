"""The guides, as Markdown; `make docs` makes pages of them."""
