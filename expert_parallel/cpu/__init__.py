"""The CPU's products in less time, to the same bits: rows over streams, and many tokens at once, by trial."""
