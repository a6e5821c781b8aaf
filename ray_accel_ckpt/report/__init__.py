"""What happened in a run, told from its journal: figures, pictures, a page."""
