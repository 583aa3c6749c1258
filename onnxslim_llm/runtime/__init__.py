"""Running a model: sessions, decoders with their cache, generation, tokenizers, measuring."""
