"""Same inputs through source and artifact: cases, figures, gates, quality on text, the guilty pass."""
