"""Commands `lq-train`, `lq-search`, `lq-sensitivity`, `lq-export`, `lq-report` and `lq-explain`."""
