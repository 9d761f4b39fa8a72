"""The embedding service: texts to the vectors that the pipeline would make of them."""
