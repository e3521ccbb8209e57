"""Cells from AnnData to batches. AnnData lives here and nowhere below."""
