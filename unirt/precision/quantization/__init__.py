"""Into few bits and back: where Q/DQ goes, for whom, and how it is written."""
